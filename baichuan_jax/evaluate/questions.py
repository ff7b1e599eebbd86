"""Readers of the test sets' files, one for each layout: a file becomes rows and questions.

mmlu     CSV without a header: question, A, B, C, D, letter
ceval    CSV with the header id,question,A,B,C,D[,answer[,explanation]]
agieval  JSONL: passage, question, options, label
gaokao   JSON {"example": [{question, answer, ...}]}, the options inside the question's text

A reader checks every row and raises ConfigError with file and line at the first that cannot be
right. Rows that are right but cannot be asked (AGIEval and Gaokao: not four options, or not exactly
one right answer) are left out; `load_subjects` counts them. A new layout is a reader here and an
entry in READERS.
"""

import collections
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from baichuan_jax.config.parsing import csv_rows, parse_json, read_bytes, show
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.documents.reader import few, kind_of_value

LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """One row of a file."""

    # Its number in the file, from 0.
    row: int
    question: str
    # Empty where the question's text has the options in it.
    choices: tuple[str, ...]
    # A letter; None where it is not public.
    answer: str | None
    id: str = ""


class File(NamedTuple):
    """What a reader found: the number of rows, and the questions that can be asked."""

    rows: int
    questions: list[Question]


def read_mmlu(path: Path) -> File:
    """A CSV file of six columns."""
    # Not pandas, which turns the options "None" and "1.0" into other things than their text.
    rows = list(csv_rows(_text(path), str(path)))
    found = []
    for number, (line, row) in enumerate(rows):
        if len(row) != 6:
            raise ConfigError(
                f"{path}:{line}: {len(row)} fields instead of 6 (question, A, B, C, D, answer): "
                f"{_short(row)}"
            )
        found.append(Question(number, row[0], tuple(row[1:5]), _letter(row[5], path, line)))
    return File(len(rows), found)


def read_ceval(path: Path) -> File:
    """A CSV file whose header names its columns; `answer` may be missing or empty."""
    # An empty file has an empty header, and is refused with it.
    (line, header), *rows = list(csv_rows(_text(path), str(path))) or [(1, [])]
    needed = ["id", "question", *LETTERS]
    missing = [column for column in needed if column not in header]
    twice = sorted(column for column, n in collections.Counter(header).items() if n > 1)
    if missing or twice:
        # Of two columns with one name the first would be lost.
        wrong = f"lacks {','.join(missing)}" if missing else f"has {','.join(twice)[:100]} twice"
        raise ConfigError(
            f"{path}:{line}: the header is {_short(header)}, which {wrong}; it must have "
            f"{','.join(needed)}[,answer], each once"
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
        # By name: the files of dev/ have a column more, the explanation.
        choices = tuple(cells[letter] for letter in LETTERS)
        found.append(Question(number, cells["question"], choices, answer, cells["id"]))
    return File(len(rows), found)


def read_agieval(path: Path) -> File:
    """Rows with four options and one right answer.

    `label` is a letter, or a list where several may be right.
    """
    lines = [
        (number, line) for number, line in enumerate(_text(path).split("\n"), 1) if line.strip()
    ]
    found = []
    for index, (line, text) in enumerate(lines):
        where = f"{path}:{line}"
        row = parse_json(text, where)
        # Rows of other forms have options or label null, and are left out.
        types = {"question": (str,), "options": (list, None), "label": (str, list, None)}
        _require_fields(row, types | {"passage": (str, None)}, where, optional=("passage",))
        options, label = row["options"], row["label"]
        labels = label if isinstance(label, list) else [label]
        for each in [*(options or []), *labels]:
            if not isinstance(each, str | None):
                raise ConfigError(f"{where}: options and label must be strings, not {show(each)}")
        if options is None or len(options) != len(LETTERS) or None in options:
            continue
        if len(labels) != 1 or len(labels[0] or "") != 1:
            continue
        # null in many rows.
        passage = row.get("passage") or ""
        question = f"{passage}\n{row['question']}" if passage else row["question"]
        answer = _letter(labels[0], path, line)
        found.append(Question(index, question, _without_letters(options), answer))
    return File(len(lines), found)


def read_gaokao(path: Path) -> File:
    """Questions whose answer is one letter."""
    rows = parse_json(_text(path), str(path))
    rows = rows.get("example") if isinstance(rows, dict) else None
    if not isinstance(rows, list):
        raise ConfigError(f'{path} must be {{"example": [...]}} with a list of questions')
    found = []
    for index, row in enumerate(rows):
        types = {"question": (str,), "answer": (list,)}
        _require_fields(row, types, f"{path}, example {index}")
        # Questions with several right letters, or several parts, are not asked.
        answer = row["answer"]
        if len(answer) == 1 and len(str(answer[0])) == 1:
            letter = _letter(str(answer[0]), path, f"example {index}")
            found.append(Question(index, row["question"].strip(), (), letter))
    return File(len(rows), found)


READERS: dict[str, Callable[[Path], File]] = {
    "mmlu": read_mmlu,
    "ceval": read_ceval,
    "agieval": read_agieval,
    "gaokao": read_gaokao,
}


def read_answers(path: Path) -> dict[str, dict[str, str]]:
    """{subject: {id: letter}} of a file of answers."""
    found = parse_json(_text(path), str(path))
    groups = found if isinstance(found, dict) else {"the file": found}
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(found, dict):
            raise ConfigError(
                f'{path} must be {{"subject": {{"0": "A", ...}}, ...}}, as C-Eval\'s submissions '
                f"are: {show(name)} is {kind_of_value(group)}"
            )
    return found


def _require_fields(
    row: Any, types: dict[str, tuple], where: str, optional: tuple[str, ...] = ()
) -> None:
    """Raise ConfigError where a row is no object or a field is missing or of another type.

    types: the allowed types of each field; None stands for null.
    """
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a row is {kind_of_value(row)}, expected an object")
    for name, allowed in types.items():
        if name not in row:
            if name in optional:
                continue
            raise ConfigError(f"{where}: there is no field {name!r} (there are: {few(row)})")
        value = row[name]
        if not any(value is None if each is None else isinstance(value, each) for each in allowed):
            wanted = {str: "a string", list: "a list", None: "null"}
            expected = " or ".join(wanted[each] for each in allowed)
            raise ConfigError(
                f"{where}: field {name!r} is {kind_of_value(value)}, expected {expected}"
            )


def _without_letters(options: list[str]) -> tuple[str, ...]:
    """Options without the letters that most of AGIEval's begin with.

    "(A)text" and "A. text" are always cut; "A text" only where all four options have that form,
    since "A man" may be an option's own text.
    """
    pairs = list(zip(LETTERS, options, strict=True))
    bare = all(re.match(rf"\s*{letter}\s", option) for letter, option in pairs)
    texts = []
    for letter, option in pairs:
        # In brackets any of the four letters counts: the files have options with a wrong one.
        mark = rf"[(（][A-D][)）]|{letter}\s*[.．、)）]" + (rf"|{letter}(?=\s)" if bare else "")
        texts.append(re.sub(rf"^\s*({mark})\s*", "", option, count=1))
    return tuple(texts)


def _letter(text: str, path: Path, line: int | str) -> str:
    # A tuple: `"AB" in "ABCD"` holds.
    if text not in tuple(LETTERS):
        raise ConfigError(
            f"{path}:{line}: the answer is {show(text)} and must be one of A, B, C, D"
        )
    return text


def _text(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    content = read_bytes(path)
    try:
        # -sig: a byte-order mark at the start would become part of the first name.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8 (byte {content[error.start]:#04x}); save it as UTF-8"
        ) from None


def _short(row: list[str]) -> str:
    text = ",".join(row)
    return repr(text if len(text) < 100 else text[:97] + "...")
