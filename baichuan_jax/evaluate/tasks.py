"""The test sets' files, in their authors' layouts, as subjects with examples and questions; anything odd is named with file and line.

mmlu    DIR/{dev,val,test}/SUBJECT_SPLIT.csv: question, A, B, C, D, letter; no header
ceval   DIR/{dev,val,test}/SUBJECT_SPLIT.csv: header id,question,A,B,C,D[,answer[,explanation]]
agieval DIR/SUBJECT.jsonl: passage, question, options, label
gaokao  DIR/SUBJECT.json: {"example": [{question, answer, ...}]}, the options inside the question

MMLU and C-Eval take their few-shot examples from dev/. The two others have one file a subject:
questions with four options and exactly one right answer are kept, the examples are drawn from them
by a seed, and the rest is asked.
"""

import csv
import dataclasses
import difflib
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.evaluate import subjects as names

LETTERS = "ABCD"
TASKS = ("mmlu", "ceval", "agieval", "gaokao")
SPLITS = {
    "mmlu": "test",
    "ceval": "val",
    "agieval": "all",
    "gaokao": "all",
}  # by default; C-Eval's test answers are not public


@dataclasses.dataclass(frozen=True)
class Question:
    """One row of a file. `choices` is empty where the options stand inside the question, `answer` None where it is not public."""

    row: int
    question: str
    choices: tuple[str, ...]
    answer: str | None
    id: str = ""


@dataclasses.dataclass(frozen=True)
class Subject:
    """One subject: what it is called inside a prompt, its categories, the examples to draw shots from, and the questions to ask."""

    name: str
    title: str
    language: str
    categories: tuple[str, ...]
    examples: list[Question]
    questions: list[Question]
    left_out: int
    """Rows that the filter left out."""


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
    """The subjects of a task, and a hash of the files read. `limit`: the first questions of each subject only.

    answers: a JSON file {subject: {id: letter}} for a split whose files hold none. Raises
    ConfigError for a folder that is another or is incomplete, and for every row that cannot be
    right.
    """
    folder, split = Path(folder), split or SPLITS[task]
    allowed = ("val", "test", "dev") if task in ("mmlu", "ceval") else ("all",)
    if split not in allowed:
        raise ConfigError(f"{task} has no split {split!r}; it has {', '.join(allowed)}")
    if shots < 0 or (limit is not None and limit < 1):
        raise ConfigError(f"shots={shots} must be 0 or more, and limit={limit} 1 or more")
    known = _known(task)
    wanted = list(known)
    if only is not None:
        for name in only:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ConfigError(
                    f"{task} has no subject {name!r} with four-option questions{hint}"
                )
        wanted = [name for name in known if name in only]
    files = _find_files(task, folder, split, wanted)
    given = _read_answers(Path(answers)) if answers is not None else {}
    digest = hashlib.sha256()
    found = []
    for name in wanted:
        for path in files[name]:
            content = path.read_bytes()
            digest.update(
                f"{path.relative_to(folder)} {hashlib.sha256(content).hexdigest()}\n".encode()
            )
        read = {
            "mmlu": _read_mmlu,
            "ceval": _read_ceval,
            "agieval": _read_agieval,
            "gaokao": _read_gaokao,
        }[task]
        *examples, questions = [read(path) for path in files[name]]
        rows = len(questions[0])
        if examples:
            pool, questions = examples[0][1], questions[1]
            if not pool or any(example.answer is None for example in pool):
                raise ConfigError(f"{files[name][0]} must hold examples with answers")
        else:
            pool, questions = _draw(questions[1], shots, f"{seed}/{task}/{name}")
        if len(pool) < shots:
            raise ConfigError(f"{files[name][0]} has {len(pool)} examples for {shots} shots")
        questions = [
            _answered(question, given.get(name, {}), name, answers) for question in questions
        ]
        if not questions:
            raise ConfigError(
                f"{files[name][-1]} has no questions"
                + (f" among {rows} rows that can be asked" if rows else "")
            )
        left_out = rows - len(questions) - (0 if examples else shots)
        found.append(Subject(name, *known[name], pool, questions[:limit], left_out))
    _check_answers(task, split, found, files)
    return found, digest.hexdigest()


def count_subjects(task: str) -> int:
    """How many subjects a whole task has."""
    return len(_known(task))


def _known(task: str) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """{subject: (title, language, categories)} of a whole task."""
    if task == "mmlu":
        return {
            subject: (subject.replace("_", " "), "en", (category, subcategory))
            for category, subcategories in names.MMLU.items()
            for subcategory, group in subcategories.items()
            for subject in group.split()
        }
    if task == "ceval":
        return {
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


def _find_files(task: str, folder: Path, split: str, wanted: list[str]) -> dict[str, list[Path]]:
    """{subject: [examples' file,] questions' file}. Raises ConfigError naming what is missing."""
    if task in ("mmlu", "ceval"):
        paths = {
            name: [folder / part / f"{name}_{part}.csv" for part in ("dev", split)]
            for name in wanted
        }
    else:
        ending = "jsonl" if task == "agieval" else "json"
        paths = {name: [folder / f"{name}.{ending}"] for name in wanted}
    missing = {path for group in paths.values() for path in group if not path.is_file()}
    if not missing:
        return paths
    there = [name for name, group in paths.items() if not missing.intersection(group)]
    if there:
        gone = sorted(str(path.relative_to(folder)) for path in missing)
        raise ConfigError(
            f"{folder} is incomplete: {len(gone)} of {task}'s files are missing: {', '.join(gone[:5])}"
            f"{', ...' if len(gone) > 5 else ''}; fetch the rest, or score a part: --subjects {','.join(there)}"
        )
    layout = (
        f"dev/ and {split}/ with SUBJECT_{split}.csv"
        if task in ("mmlu", "ceval")
        else next(iter(paths.values()))[0].name
    )
    ends = {path.relative_to(folder).parts for path in missing}
    depth = len(next(iter(ends)))
    nested = sorted(
        path
        for path in folder.rglob(f"*{next(iter(missing)).suffix}")
        if path.parts[-depth:] in ends
    )
    if nested:
        hint = f"it is in {nested[0].parents[depth - 1]}"
    elif folder.is_dir():
        hint = f"there are {', '.join(sorted(path.name for path in folder.iterdir())[:8]) or 'no files'}"
    else:
        hint = "there is no such folder"
    raise ConfigError(f"{folder} holds none of {task}'s data ({layout}, ...): {hint}")


def _read_mmlu(path: Path) -> tuple[list, list[Question]]:
    rows = list(_csv_rows(path))
    found = []
    for number, (line, row) in enumerate(rows):
        if len(row) != 6:
            raise ConfigError(
                f"{path}:{line}: {len(row)} fields instead of 6 (question, A, B, C, D, answer): {_short(row)}"
            )
        found.append(Question(number, row[0], tuple(row[1:5]), _letter(row[5], path, line)))
    return rows, found


def _read_ceval(path: Path) -> tuple[list, list[Question]]:
    (line, header), *rows = list(_csv_rows(path)) or [(1, [])]
    needed = ["id", "question", *LETTERS]
    if [column for column in needed if column not in header]:
        raise ConfigError(
            f"{path}:{line}: the header is {_short(header)} and must have {','.join(needed)}[,answer]"
        )
    found = []
    for number, (line, row) in enumerate(rows):
        if len(row) != len(header):
            raise ConfigError(
                f"{path}:{line}: {len(row)} fields and the header has {len(header)}: {_short(row)}"
            )
        cells = dict(zip(header, row, strict=True))
        letter = cells.get("answer", "").strip().upper()
        answer = _letter(letter, path, line) if letter else None
        found.append(
            Question(
                number,
                cells["question"],
                tuple(cells[letter] for letter in LETTERS),
                answer,
                cells["id"],
            )
        )
    return rows, found


def _read_agieval(path: Path) -> tuple[list, list[Question]]:
    """Rows with four options and one right answer; `label` is a letter, or a list where several may be right."""
    lines = [
        (number, line) for number, line in enumerate(_text(path).split("\n"), 1) if line.strip()
    ]
    found = []
    for index, (line, text) in enumerate(lines):
        row = _json(text, f"{path}:{line}")
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("question"), str)
            or not {"options", "label"} <= row.keys()
        ):
            raise ConfigError(
                f"{path}:{line}: a row must have question, options and label: {text[:80]!r}"
            )
        options, label = row["options"], row["label"]
        labels = list(label) if isinstance(label, list) else [label]
        if (
            not isinstance(options, list)
            or len(options) != 4
            or len(labels) != 1
            or len(labels[0] or "") != 1
        ):
            continue
        passage = row.get("passage") or ""
        question = f"{passage}\n{row['question']}" if passage else row["question"]
        found.append(
            Question(index, question, _without_letters(options), _letter(labels[0], path, line))
        )
    return lines, found


def _read_gaokao(path: Path) -> tuple[list, list[Question]]:
    rows = _json(_text(path), str(path))
    rows = rows.get("example") if isinstance(rows, dict) else None
    if not isinstance(rows, list):
        raise ConfigError(f'{path} must be {{"example": [...]}} with a list of questions')
    found = []
    for index, row in enumerate(rows):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("question"), str)
            or not isinstance(row.get("answer"), list)
        ):
            raise ConfigError(
                f"{path}, example {index}: a question must have the text question and the list answer"
            )
        answer = row["answer"]
        if len(answer) == 1 and len(str(answer[0])) == 1:
            found.append(
                Question(
                    index,
                    row["question"].strip(),
                    (),
                    _letter(str(answer[0]), path, f"example {index}"),
                )
            )
    return rows, found


def _without_letters(options: list[str]) -> tuple[str, ...]:
    """Options without the letters that most of them begin with: "(A)text", "A. text", or "A text" where all four do so."""
    bare = all(
        re.match(rf"\s*{letter}\s", option) for letter, option in zip(LETTERS, options, strict=True)
    )
    texts = []
    for letter, option in zip(LETTERS, options, strict=True):
        mark = rf"\s*([(（][A-D][)）]|{letter}\s*[.．、)）]" + (
            rf"|{letter}(?=\s))\s*" if bare else r")\s*"
        )
        texts.append(re.sub(f"^{mark}", "", option, count=1))
    return tuple(texts)


def _draw(
    questions: list[Question], shots: int, seed: str
) -> tuple[list[Question], list[Question]]:
    """Examples drawn by a hash of the seed and the row, the same in every language and version; and what is left, in order."""
    drawn = sorted(questions, key=lambda question: order_key(seed, question.row))[:shots]
    return drawn, [question for question in questions if question not in drawn]


def order_key(seed: str, number: int) -> str:
    """What numbers are sorted by to be shuffled: the SHA-256 of "seed/number" in hexadecimal."""
    return hashlib.sha256(f"{seed}/{number}".encode()).hexdigest()


def _read_answers(path: Path) -> dict[str, dict[str, str]]:
    found = _json(_text(path), str(path))
    if not isinstance(found, dict) or not all(isinstance(group, dict) for group in found.values()):
        raise ConfigError(
            f'{path} must be {{"subject": {{"0": "A", ...}}, ...}}, as C-Eval\'s submissions are'
        )
    return found


def _answered(
    question: Question, answers: dict[str, str], subject: str, source: Path | str | None
) -> Question:
    if source is None or question.answer is not None:
        return question
    letter = answers.get(question.id)
    if letter not in tuple(LETTERS):
        raise ConfigError(
            f"{source}: the answer of {subject} {question.id} is {letter!r} and must be one of A, B, C, D"
        )
    return dataclasses.replace(question, answer=letter)


def _check_answers(
    task: str, split: str, found: list[Subject], files: dict[str, list[Path]]
) -> None:
    """All questions have answers, or none has, which is C-Eval's test split before its answers are brought."""
    without = [
        subject.name
        for subject in found
        if any(question.answer is None for question in subject.questions)
    ]
    if without and not (task == "ceval" and split == "test"):
        raise ConfigError(
            f"{files[without[0]][-1]} has questions without answers; only C-Eval's test split may"
        )
    if without and any(
        question.answer is not None for subject in found for question in subject.questions
    ):
        raise ConfigError(
            f"some questions have answers and others, as in {files[without[0]][-1]}, have none: bring all or none"
        )


def _letter(text: str, path: Path, line: int | str) -> str:
    if text not in tuple(LETTERS):
        raise ConfigError(f"{path}:{line}: the answer is {text!r} and must be one of A, B, C, D")
    return text


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line where it begins, fields) of every row. Every field stays the text it is: "None" and "1.0" too, unlike in pandas."""
    reader = csv.reader(io.StringIO(_text(path), newline=""))
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"{path}:{line}: {error}") from None


def _text(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8 (byte {content[error.start]:#04x}); save it as UTF-8"
        ) from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: no JSON: {error}") from None


def _short(row: list[str]) -> str:
    text = ",".join(row)
    return repr(text if len(text) < 100 else text[:97] + "...")
