"""The multiple-choice tests: which files make a subject, its examples and its questions.

mmlu     DIR/{dev,val,test}/SUBJECT_SPLIT.csv
ceval    DIR/{dev,val,test}/SUBJECT_SPLIT.csv
agieval  DIR/SUBJECT.jsonl
gaokao   DIR/SUBJECT.json

These are the authors' own layouts; questions.py reads the files. MMLU and C-Eval take their
few-shot examples from dev/. The two others have one file for each subject: a seed draws the
examples from its questions, and the rest is asked.

No question is asked with its answer among the examples (twins.py). Where examples are drawn, their
twins are not asked, as they themselves are not. MMLU's and C-Eval's authors chose which questions
are asked: all are, and one that stands in dev/ too is asked without that example.
"""

import dataclasses
import difflib
import hashlib
import itertools
from pathlib import Path
from typing import NamedTuple

from baichuan_jax.config.schema import ConfigError, require
from baichuan_jax.documents.files import require_unchanged, states
from baichuan_jax.evaluate import subjects as names
from baichuan_jax.evaluate.questions import LETTERS, READERS, Question, read_answers
from baichuan_jax.evaluate.twins import rows_with_twin

# Folders in which files are looked for that are not where they were said to be.
FOLDERS = 200
# The split that is asked by default. The answers of C-Eval's test split are not public.
SPLITS = {"mmlu": "test", "ceval": "val", "agieval": "all", "gaokao": "all"}


@dataclasses.dataclass(frozen=True)
class Subject:
    """One subject of a test."""

    name: str
    # What a prompt calls it.
    title: str
    language: str
    categories: tuple[str, ...]
    # What few-shot examples are taken from.
    examples: list[Question]
    questions: list[Question]
    # Rows that cannot be asked.
    left_out: int
    # Rows of the questions' file.
    rows: int = 0
    # Rows that are the same question as an example; where examples are drawn they are not asked.
    twins: tuple[int, ...] = ()


def load_subjects(
    task: str,
    folder: Path | str,
    *,
    split: str | None = None,
    only: list[str] | None = None,
    shots: int = 5,
    seed: int = 0,
    limit: int | None = None,
    answers: Path | str | None = None,
) -> tuple[list[Subject], str]:
    """The subjects of a task, and a hash of the files read.

    only: subjects by name, None: all. limit: the first questions of each subject only. answers: a
    JSON file {subject: {id: letter}} for a split whose files hold none. Raises ConfigError for a
    folder of another test or with files missing, and for every row that cannot be right.
    """
    # Settings are checked before any file is read.
    folder, split = Path(folder), split or SPLITS[task]
    allowed = ("val", "test", "dev") if task in ("mmlu", "ceval") else ("all",)
    if split not in allowed:
        raise ConfigError(f"{task} has no split {split!r}; it has {', '.join(allowed)}")
    require(shots >= 0, f"shots={shots} must be 0 or more")
    require(limit is None or limit >= 1, f"limit={limit} must be 1 or more")
    known = known_subjects(task)
    wanted = list(known) if only is None else _choose(task, known, only)
    files = subject_files(task, folder, split, wanted)
    before = states(str(path) for paths in files.values() for path in paths)
    # Only C-Eval's test split needs them: its authors keep the answers.
    given = read_answers(Path(answers)) if answers is not None else {}
    digest = hashlib.sha256()
    found, unanswered = [], 0
    for name in wanted:
        for path in files[name]:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            # Of names and contents: the same files give the same hash in any folder.
            digest.update(f"{path.relative_to(folder)} {content}\n".encode())
        read = _read(task, name, files[name], shots, seed)
        unanswered += sum(question.answer is None for question in read.questions)
        if task == "ceval" and split == "test":
            _require_distinct_ids(files[name][-1], read.questions)
        questions = [
            _answered(question, given.get(name, {}), name, answers) for question in read.questions
        ]
        found.append(
            Subject(
                name,
                *known[name],
                examples=read.examples,
                # Cut last: the examples that a seed draws must not depend on the limit.
                questions=questions[:limit],
                left_out=read.rows - read.usable,
                rows=read.rows,
                twins=read.twins,
            )
        )
    if answers is not None and not unanswered:
        # A file that is named and not used would look like one that decided the scores.
        raise ConfigError(f"answers={answers} has no use: all questions have answers in {folder}")
    _check_answers(task, split, found, files)
    # What was hashed is what was read.
    require_unchanged(before)
    return found, digest.hexdigest()


def in_other_splits(
    task: str, folder: Path | str, split: str | None, subjects: list[Subject]
) -> dict[str, dict[str, int]]:
    """By split that is not asked, and subject: how many of its questions are asked all the same.

    Only of files that lie there and can be read: nothing else is made of them.
    """
    found: dict[str, dict[str, int]] = {}
    if task not in ("mmlu", "ceval"):
        return found
    for other in sorted({"val", "test"} - {split or SPLITS[task]}):
        for subject in subjects:
            path = Path(folder) / other / f"{subject.name}_{other}.csv"
            try:
                read = READERS[task](path).questions
            except ConfigError:
                continue
            if rows := rows_with_twin(subject.questions, read):
                found.setdefault(other, {})[subject.name] = len(rows)
    return found


def known_subjects(task: str) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """{subject: (title, language, categories)} of a whole task."""
    if task == "mmlu":
        # The title as hendrycks/test format_subject makes it.
        return {
            subject: (subject.replace("_", " "), "en", (category, subcategory))
            for category, subcategories in names.MMLU.items()
            for subcategory, group in subcategories.items()
            for subject in group.split()
        }
    if task == "ceval":
        return {
            # Hard is a category across the others.
            subject: (title, "zh", (category, *(("Hard",) if subject in names.CEVAL_HARD else ())))
            for category, group in names.CEVAL.items()
            for subject, title in names.pairs(group).items()
        }
    if task == "agieval":
        return {
            subject: (subject.replace("-", " ") if language == "en" else title, language, ())
            for language, group in names.AGIEVAL.items()
            for subject, title in names.pairs(group).items()
        }
    return {subject: (title, "zh", ()) for subject, title in names.pairs(names.GAOKAO).items()}


def order_key(seed: str, number: int) -> str:
    """Sort numbers by it to shuffle them: the SHA-256 of "seed/number" in hexadecimal.

    The same order in every language and version, which no library's random numbers promise.
    """
    return hashlib.sha256(f"{seed}/{number}".encode()).hexdigest()


def _choose(task: str, known: dict, only: list[str]) -> list[str]:
    """The named subjects in the task's order. Raises ConfigError for one that it lacks."""
    for name in only:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{task} has no subject {name!r} with four-option questions{hint}")
    return [name for name in known if name in only]


class _Read(NamedTuple):
    """One subject's files: rows of the questions' file, those that can be asked, and a Subject's
    examples, questions and twins."""

    rows: int
    usable: int
    examples: list[Question]
    questions: list[Question]
    twins: tuple[int, ...]


def _read(task: str, name: str, files: list[Path], shots: int, seed: int) -> _Read:
    """The files of one subject. Raises ConfigError where they have too little."""
    *dev, file = [READERS[task](path) for path in files]
    questions = file.questions
    if dev:
        examples = dev[0].questions
        if not examples or any(example.answer is None for example in examples):
            what = "one has none" if examples else "it has no rows"
            raise ConfigError(f"{files[0]} must hold examples with answers: {what}")
        twins = rows_with_twin(questions, examples) if shots else ()
    else:
        # Drawn by a hash of seed and row, so that a subject's examples depend on no other subject.
        order = lambda question: order_key(f"{seed}/{task}/{name}", question.row)
        examples = sorted(questions, key=order)[:shots]
        questions = [question for question in questions if question not in examples]
        twins = rows_with_twin(questions, examples)
        questions = [question for question in questions if question.row not in twins]
    if len(examples) < shots:
        raise ConfigError(f"{files[0]} has {len(examples)} examples for {shots} shots")
    if not questions:
        counted = f"{file.rows} rows, {len(file.questions)} that can be asked"
        drawn = "" if dev else f", {len(examples)} drawn as examples, {len(twins)} the same as one"
        raise ConfigError(f"{files[-1]} has no questions: {counted}{drawn}")
    return _Read(file.rows, len(file.questions), examples, questions, twins)


def subject_files(task: str, folder: Path, split: str, wanted: list[str]) -> dict[str, list[Path]]:
    """{subject: [examples' file,] questions' file}. Raises ConfigError naming what is missing."""
    if task in ("mmlu", "ceval"):
        paths = {
            name: [folder / part / f"{name}_{part}.csv" for part in ("dev", split)]
            for name in wanted
        }
        layout = f"dev/ and {split}/ with SUBJECT_{split}.csv"
    else:
        ending = "jsonl" if task == "agieval" else "json"
        paths = {name: [folder / f"{name}.{ending}"] for name in wanted}
        layout = f"{wanted[0]}.{ending}"
    # All that is missing is named at once, not one file a try.
    missing = {path for group in paths.values() for path in group if not path.is_file()}
    if not missing:
        return paths
    complete = [name for name, group in paths.items() if not missing.intersection(group)]
    if complete:
        absent = sorted(str(path.relative_to(folder)) for path in missing)
        more = ", ..." if len(absent) > 5 else ""
        raise ConfigError(
            f"{folder} is incomplete: {len(absent)} of {task}'s files are missing: "
            f"{', '.join(absent[:5])}{more}; fetch the rest, or score a part: "
            f"--subjects {','.join(complete)}"
        )
    hint = _where_instead(folder, missing)
    raise ConfigError(f"{folder} holds none of {task}'s data ({layout}, ...): {hint}")


def _where_instead(folder: Path, missing: set[Path]) -> str:
    """What a folder holds that lacks all files: often they are one folder further down."""
    if not folder.is_dir():
        return "there is no such folder"
    # An archive often unpacks into a folder of its own.
    ends = sorted(path.relative_to(folder) for path in missing)
    # No deeper and no more of them: the folder may be / by mistake, or lie on slow storage.
    inner = itertools.islice(itertools.chain(folder.glob("*/"), folder.glob("*/*/")), FOLDERS)
    for nested in sorted(inner):
        if any((nested / end).is_file() for end in ends):
            return f"it is in {nested}"
    inside = sorted(path.name for path in folder.iterdir())[:8]
    return f"there are {', '.join(inside) or 'no files'}"


def _answered(
    question: Question, answers: dict[str, str], subject: str, source: Path | str | None
) -> Question:
    """The question with its answer from a file of answers, where there is one."""
    if source is None or question.answer is not None:
        return question
    letter = answers.get(question.id)
    if letter not in tuple(LETTERS):
        raise ConfigError(
            f"{source}: the answer of {subject} {question.id} is {letter!r} and must be one of "
            "A, B, C, D"
        )
    return dataclasses.replace(question, answer=letter)


def _require_distinct_ids(file: Path, questions: list[Question]) -> None:
    """A submission and a file of answers have one letter for each id."""
    rows: dict[str, int] = {}
    for question in questions:
        name = question.id or str(question.row)
        if name in rows:
            raise ConfigError(
                f"{file}: rows {rows[name]} and {question.row} (from 0) both have the id {name!r}, "
                "and a submission holds one answer for each; correct the ids"
            )
        rows[name] = question.row


def _check_answers(
    task: str, split: str, found: list[Subject], files: dict[str, list[Path]]
) -> None:
    """All questions must have answers; of C-Eval's test split, all or none."""
    with_answers = [question.answer is not None for s in found for question in s.questions]
    if all(with_answers):
        return
    without = next(s.name for s in found if any(q.answer is None for q in s.questions))
    file = files[without][-1]
    if not (task == "ceval" and split == "test"):
        raise ConfigError(f"{file} has questions without answers; only C-Eval's test split may")
    if any(with_answers):
        raise ConfigError(
            f"some questions have answers and others, as in {file}, have none: bring all or none"
        )
