"""From prompts to records, from records to scores, and the folder that holds them.

The folder has settings.json (everything that decides the results), subjects/NAME.jsonl for each
finished subject, written whole, and at the end records.jsonl (a line for each question),
result.json (scores and manifest) and, without public answers, submission.json. An interrupted
evaluation goes on from the finished subjects; another one is refused.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from baichuan_jax.config.parsing import (
    Count,
    parse_json,
    read_json,
    read_text,
    require_keys,
    require_type,
    show,
)
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.evaluate.prompts import Prompt, Protocol
from baichuan_jax.evaluate.questions import LETTERS, Question
from baichuan_jax.evaluate.scoring import Scorer, ScoreRequest
from baichuan_jax.evaluate.tasks import Subject
from baichuan_jax.resilience.causes import NumericsError
from baichuan_jax.runs.files import remove_leftovers, write_atomically

Record = dict[str, Any]
# What scores and manifest are made of.
_RECORD = {
    "subject": str,
    "index": Count,
    "prompt_sha256": str,
    "num_tokens": Count,
    "shots": Count,
    "logits": list[float],
    "prediction": str,
    "answer": str | None,
}


def score_prompts(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    protocol: Protocol,
    on_done: Callable[[int], object] | None = None,
) -> list[Record]:
    """A record of every prompt, in order. Raises NumericsError where a logit is not finite.

    `logits` of A to D: the original's logits of one token each, or lm-eval's log-likelihoods of the
    answers, summed over their tokens.
    """
    requests: list[ScoreRequest] = []
    # For each prompt and answer: (request, place among its wanted tokens) of each token.
    terms: list[list[list[tuple[int, int]]]] = []
    for prompt in prompts:
        # A request for each distinct beginning of the answers: where they share their first token,
        # it is scored once.
        wanted: dict[tuple[int, ...], list[int]] = {}
        for answer in prompt.continuations:
            for length, token in enumerate(answer):
                following = wanted.setdefault(answer[:length], [])
                if token not in following:
                    following.append(token)
        # Where this prompt's requests are in the list of all.
        number = {start: len(requests) + place for place, start in enumerate(wanted)}
        requests += [
            ScoreRequest([*prompt.tokens, *start], tuple(tokens), (prompt.subject, prompt.shots))
            for start, tokens in wanted.items()
        ]
        terms.append(
            [
                [
                    (number[answer[:length]], wanted[answer[:length]].index(token))
                    for length, token in enumerate(answer)
                ]
                for answer in prompt.continuations
            ]
        )
    logits, norms = scorer.score(requests, on_done)
    if protocol == "lm-eval":
        # log p = logit - log-normaliser, which the answers of the original have in common.
        logits = [row - norm for row, norm in zip(logits, norms, strict=True)]
    return [
        _record(
            prompt, [sum(float(logits[row][place]) for row, place in answer) for answer in answers]
        )
        for prompt, answers in zip(prompts, terms, strict=True)
    ]


def _record(prompt: Prompt, logits: list[float]) -> Record:
    """A line of records.jsonl. A hash stands for the prompt, so that two can be compared."""
    if not np.isfinite(logits).all():
        raise NumericsError(
            f"{prompt.subject}, question {prompt.index}: the logits {logits} are not finite"
        )
    return {
        "subject": prompt.subject,
        "index": prompt.index,
        **({"id": prompt.id} if prompt.id else {}),
        "prompt_sha256": prompt.sha256,
        "num_tokens": len(prompt.tokens),
        "shots": len(prompt.shots),
        "shot_rows": list(prompt.shots),
        "logits": logits,
        "prediction": _prediction(logits),
        "answer": prompt.answer,
    }


def _prediction(logits: Sequence[float]) -> str:
    return LETTERS[int(np.argmax(logits))]


def summarise(
    task: str, protocol: Protocol, subjects: Sequence[Subject], records: Sequence[Record]
) -> dict[str, Any]:
    """Scores as fractions with standard errors, overall, by category and by subject.

    Keys: average, stderr, micro, macro, categories, subjects. The average, and that of a category,
    counts every question alike (micro); the original's C-Eval counts every subject alike (macro).
    Without answers, only counts.
    """
    by_subject: dict[str, list[bool]] = {subject.name: [] for subject in subjects}
    # All have answers or none has: load_subjects checks it.
    unanswered = any(record["answer"] is None for record in records)
    for record in records:
        by_subject[record["subject"]].append(record["prediction"] == record["answer"])
    summary: dict[str, Any] = {"questions": len(records), "scored": not unanswered}
    if unanswered:
        return summary
    members: dict[str, list[list[bool]]] = {}
    for subject in subjects:
        for category in subject.categories:
            members.setdefault(category, []).append(by_subject[subject.name])
    groups = list(by_subject.values())
    averages = {"micro": _micro(groups), "macro": _macro(groups)}
    aggregation = "macro" if task == "ceval" and protocol == "original" else "micro"
    combine = _macro if aggregation == "macro" else _micro
    return summary | {
        "aggregation": aggregation,
        "average": averages[aggregation]["accuracy"],
        "stderr": averages[aggregation]["stderr"],
        **averages,
        "categories": {name: combine(group) for name, group in members.items()},
        "subjects": {name: _micro([group]) for name, group in by_subject.items()},
    }


def _micro(groups: list[list[bool]]) -> dict[str, Any]:
    """Share of right answers over all questions, with lm-eval's standard error."""
    right = [answer for group in groups for answer in group]
    n, accuracy = len(right), sum(right) / len(right)
    # Sample standard deviation / sqrt(n).
    stderr = math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else None
    return {"accuracy": accuracy, "stderr": stderr, "questions": n, "subjects": len(groups)}


def _macro(groups: list[list[bool]]) -> dict[str, Any]:
    """Mean of the subjects' accuracies; its standard error takes the subjects as independent."""
    parts = [_micro([group]) for group in groups]
    errors = [part["stderr"] for part in parts]
    stderr = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(parts)
    return {
        "accuracy": sum(part["accuracy"] for part in parts) / len(parts),
        "stderr": stderr,
        "questions": sum(map(len, groups)),
        "subjects": len(groups),
    }


class Results:
    """The output folder, opened with all that decides the results.

    A restart with the same settings goes on; other settings raise ConfigError. Where not `writes`
    (processes other than 0) nothing is read or written.
    """

    def __init__(self, folder: Path | str, settings: dict[str, Any], writes: bool = True) -> None:
        self.folder, self._writes = Path(folder), writes
        file = self.folder / "settings.json"
        if not writes:
            return
        if file.exists():
            # Half of one checkpoint's answers and half of another's would look like one result.
            before = require_type(read_json(file, paths=True), dict, str(file))
            self._refuse_others(before, settings)
            remove_leftovers(self.folder / "subjects")
        elif self.folder.exists() and any(map(_is_result, self.folder.iterdir())):
            raise ConfigError(f"{folder} exists and holds no evaluation; choose another --output")
        else:
            write_atomically(file, dump_json(settings))

    def _refuse_others(self, before: dict[str, Any], settings: dict[str, Any]) -> None:
        # Not in the folders of earlier versions, which go on.
        before = {key: settings[key] for key in ("model",) if key in settings} | before
        differing = sorted(
            key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key)
        )
        # The name of the same weights: a folder may move, and of a run's folder the newest
        # checkpoint is meant.
        if "weights_sha256" in settings and differing == ["checkpoint"]:
            differing = []
        if differing:
            changes = "; ".join(
                f"{key[:60]}: {show(before.get(key))} there, {show(settings.get(key))} now"
                for key in differing[:4]
            )
            raise ConfigError(
                f"{self.folder} holds results of another evaluation ({changes}); "
                "choose another --output"
            )

    def _path(self, subject: str) -> Path:
        return self.folder / "subjects" / f"{subject}.jsonl"

    def has(self, subject: str) -> bool:
        """Whether a subject is finished."""
        return self._path(subject).is_file()

    def save(self, subject: str, records: Sequence[Record]) -> None:
        """Keep a finished subject."""
        if self._writes:
            write_atomically(self._path(subject), _lines(records))

    def load(self, subject: Subject) -> list[Record]:
        """The records of a finished subject.

        Raises ConfigError where they are not those of its questions, each one once, in their order.
        """
        file = self._path(subject.name)
        try:
            # split("\n") and not splitlines(): a text may contain other line separators.
            lines = read_text(file).split("\n")[:-1]
            places = [f"line {number}" for number in range(1, len(lines) + 1)]
            records = [
                require_keys(parse_json(line, place), _RECORD, place)
                for place, line in zip(places, lines, strict=True)
            ]
            for place, record in zip(places, records, strict=True):
                try:
                    # records.jsonl holds all of it, and takes no NaN.
                    json.dumps(record, allow_nan=False)
                except ValueError:
                    raise ConfigError(f"{place} has a number that is not finite") from None
            for place, record, question in zip(places, records, subject.questions, strict=False):
                _require_record_of(question, subject.name, record, place)
            if len(records) != len(subject.questions):
                raise ConfigError(
                    f"it has {len(records)} lines and the subject {len(subject.questions)} "
                    "questions"
                )
            return records
        except ConfigError as error:
            raise ConfigError(
                f"{file} is no subject's records: {error}; delete it, to have its questions asked "
                "again"
            ) from None

    def finish(self, result: dict[str, Any], records: Sequence[Record]) -> None:
        """Write records.jsonl and result.json, and a submission for C-Eval's test split."""
        if not self._writes:
            return
        write_atomically(self.folder / "records.jsonl", _lines(records))
        if result["task"] == "ceval" and result["manifest"]["split"] == "test":
            # As C-Eval's site takes it: {subject: {id: letter}}.
            submission: dict[str, dict[str, str]] = {}
            for record in records:
                name = record.get("id", str(record["index"]))
                submission.setdefault(record["subject"], {})[name] = record["prediction"]
            write_atomically(self.folder / "submission.json", dump_json(submission))
        # Last: where result.json is, the records are complete.
        write_atomically(self.folder / "result.json", dump_json(result))


def _require_record_of(question: Question, subject: str, record: Record, place: str) -> None:
    """Raise ConfigError where a record is not of this question, or is no result of its logits."""
    wanted = {
        "subject": subject,
        "index": question.row,
        "id": question.id,
        "answer": question.answer,
    }
    for key, value in wanted.items():
        # A question without an id has a record without one.
        if (found := record.get(key, "")) != value:
            raise ConfigError(f"{place}: {key} is {show(found)} and its question's {show(value)}")
    logits, given = record["logits"], record["prediction"]
    if len(logits) != len(LETTERS):
        raise ConfigError(f"{place} has {len(logits)} logits and not one for each of A, B, C, D")
    if given != (right := _prediction(logits)):
        raise ConfigError(f"{place}: prediction is {show(given)} and by its logits {right}")


def _is_result(path: Path) -> bool:
    # A new folder holds the lock of this process, and maybe what a killed writer left.
    return path.suffix != ".tmp" and not path.name.startswith("lock")


def dump_json(content: Any) -> bytes:
    """A JSON file as this package writes it: indented, Chinese unescaped.

    Raises ValueError for NaN and infinities, which JSON has not.
    """
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _lines(records: Sequence[Record]) -> bytes:
    dump = lambda record: json.dumps(record, ensure_ascii=False, allow_nan=False)
    return "".join(dump(record) + "\n" for record in records).encode()
