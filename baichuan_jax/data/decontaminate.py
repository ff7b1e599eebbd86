"""Text of evaluation sets inside a corpus: sequences of 13 units that both hold; a unit is a Han character, or a word of others.

Thirteen, and what counts as a formula, follow GPT-3 (arXiv:2005.14165, appendix C). Compared are
question, passage and options, each by itself; case, width, punctuation and spacing do not count.
The pipeline removes the documents found (decontaminate.files); this command only looks:

`python -m baichuan_jax.data.decontaminate --evaluation 'ceval/*/*.csv' --input 'corpus/*.parquet'`
"""

import argparse
import collections
import csv
import functools
import glob
import hashlib
import io
import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.resilience.exits import run_command

UNITS = 13
FORMULA = 10  # a sequence that more documents hold is a formula of laws, forms or prayers, not a leak by itself (GPT-3: 10)
COVERED = 0.5  # share of a text's sequences from which on it is leaked all the same, where it has as many as UNITS
FIELDS = (
    "passage",
    "context",
    "question",
    "options",
    "choices",
    "A",
    "B",
    "C",
    "D",
    "E",
)  # of an item; what else it has is not asked
_UNIT = re.compile(
    r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)
_POWERS = np.array([pow(0x9E3779B97F4A7C15, n, 1 << 64) for n in range(1, UNITS + 1)], np.uint64)


class EvaluationSets:
    """The 13-grams of evaluation files: CSV with or without a header, JSON, JSONL, or plain text (its paragraphs are the items).

    A task is a file's last two names, splits aside: `ceval/logic` for ceval/val/logic_val.csv.
    Raises ConfigError where a glob matches nothing, or a file is of no known kind, unreadable, or
    all hold nothing to look for.
    """

    def __init__(self, patterns: list[str]) -> None:
        self.items: collections.Counter[str] = collections.Counter()
        self.short: collections.Counter[str] = (
            collections.Counter()
        )  # items without any text of 13 units, which cannot be found
        texts: list[np.ndarray] = []  # unique 13-grams of each text of an item
        tasks: list[str] = []
        for path in _find_files(patterns):
            task = _task(Path(path))
            for fields in _items(Path(path)):
                found = [np.unique(grams) for field in fields if len(grams := _grams(field))]
                self.items[task] += 1
                self.short[task] += not found
                texts += found
                tasks += [task] * len(found)
        if not texts:
            raise ConfigError(
                f"{patterns} hold no sequence of {UNITS} characters or words to look for"
            )
        self._task = np.array(tasks)
        self._size = np.array([len(grams) for grams in texts])
        order = np.argsort(np.concatenate(texts), kind="stable")
        self._grams = np.concatenate(texts)[order]
        self._text = np.repeat(np.arange(len(texts)), self._size)[order]

    def find(self, text: str) -> np.ndarray:
        """Hashes of the 13-grams that a document and any item share: uint64, sorted, each once."""
        grams = np.unique(_grams(text))
        return grams[self._holds(grams)]

    def judge(self, found: dict[Any, np.ndarray]) -> dict[Any, dict[str, int]]:
        """Of documents that hold an item's text, the tasks, each with a 13-gram that tells; `found`: what `find` gave for each.

        A document holds it where it has a 13-gram of an item that is no formula (at most FORMULA
        documents of the corpus have it), or COVERED of those of a longer question, passage or
        option.
        """
        distinct, counts = np.unique(
            np.concatenate([*found.values(), np.zeros(0, np.uint64)]), return_counts=True
        )
        formulas = distinct[counts > FORMULA]
        leaked = {}
        for key, grams in found.items():
            first, last = (np.searchsorted(self._grams, grams, side) for side in ("left", "right"))
            texts = np.concatenate(
                [np.zeros(0, int), *(self._text[a:b] for a, b in zip(first, last, strict=True))]
            )
            grams = np.repeat(grams, last - first)
            hits = np.bincount(texts, minlength=len(self._size))
            covered = (hits >= COVERED * self._size) & (self._size >= UNITS)
            tells = covered[texts] | ~np.isin(grams, formulas)
            if tells.any():
                leaked[key] = dict(
                    sorted(
                        zip(self._task[texts[tells]].tolist(), grams[tells].tolist(), strict=True)
                    )
                )
        return leaked

    def shared(self, text: str) -> dict[int, str]:
        """The sequences of a document that items hold too, as normalised units joined by spaces, by their hashes."""
        units, grams = _units(text), _grams(text)
        return {
            int(grams[start]): " ".join(units[start : start + UNITS])
            for start in np.flatnonzero(self._holds(grams))
        }

    def _holds(self, grams: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(self._grams, grams), len(self._grams) - 1)
        return self._grams[place] == grams


def _find_files(patterns: list[str]) -> list[str]:
    files: set[str] = set()
    for pattern in patterns:
        matched = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
        if not matched:
            raise ConfigError(
                f"{pattern!r} matches no evaluation file (working directory: {os.getcwd()})"
            )
        files.update(matched)
    return sorted(files)


def _units(text: str) -> list[str]:
    return _UNIT.findall(unicodedata.normalize("NFKC", text).casefold())


@functools.lru_cache(maxsize=1 << 18)
def _hash(unit: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(unit.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def _grams(text: str) -> np.ndarray:
    """Hashes of all sequences of 13 units, in order: uint64 [max(0, units - 12)]. Wrap-around is meant."""
    units = _units(text)
    if len(units) < UNITS:
        return np.zeros(0, np.uint64)
    hashes = np.fromiter(map(_hash, units), np.uint64, len(units))
    size = len(units) - UNITS + 1
    result = np.zeros(size, np.uint64)
    for offset, power in enumerate(_POWERS):
        result += hashes[offset : offset + size] * power
    return result


def _task(path: Path) -> str:
    names = [
        name for name in path.absolute().with_suffix("").parts if name not in ("dev", "val", "test")
    ]
    return "/".join(re.sub(r"_(dev|val|test)$", "", name) for name in names[-2:])


def _items(path: Path) -> Iterator[list[str]]:
    """Items of an evaluation file, each a list of texts."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
            if rows and "question" in rows[0]:  # C-Eval has a header, MMLU none
                wanted = [index for index, name in enumerate(rows[0]) if name in FIELDS]
                rows = [[row[index] for index in wanted if index < len(row)] for row in rows[1:]]
            yield from rows
        elif path.suffix == ".json":
            yield from _objects(json.loads(text))
        elif path.suffix == ".jsonl":
            for line in text.split("\n"):
                if line.strip():
                    yield from _objects(json.loads(line))
        elif path.suffix == ".txt":
            yield from (
                [paragraph] for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()
            )
        else:
            raise ConfigError(
                f"{path}: expected an evaluation file of kind .csv, .json, .jsonl or .txt"
            )
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is no evaluation file that can be read: {error}") from None


def _objects(value: Any) -> list[list[str]]:
    """Items inside parsed JSON: the objects that have a question; where there is none, every text."""
    return list(_questions(value)) or [[text] for text in _strings(value)]


def _questions(value: Any) -> Iterator[list[str]]:
    if isinstance(value, dict) and "question" in value:
        yield [text for name in FIELDS if name in value for text in _strings(value[name])]
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _questions(inner)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def main(words: list[str]) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.data.decontaminate",
        description="Look for text of evaluation sets in a corpus: 13 characters (Chinese) or words that both hold. Removes nothing; "
        "the pipeline does, with --decontaminate.files.",
    )
    parser.add_argument(
        "--evaluation",
        nargs="+",
        required=True,
        metavar="GLOB",
        help="evaluation files: .csv, .json, .jsonl, .txt",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="GLOB",
        help="corpus: JSONL, .txt, also .gz, .zst; or Parquet",
    )
    parser.add_argument(
        "--examples", type=int, default=2, help="documents to show of each task (default: 2)"
    )
    parser.add_argument("--json", metavar="FILE", help="save the figures")
    options = parser.parse_args(words)
    from baichuan_jax.data.corpus.config import (
        ReadConfig,
    )  # with pyarrow, which --help does without
    from baichuan_jax.data.corpus.documents import Record, find_inputs, make_parts, read_records

    sets = EvaluationSets(options.evaluation)
    found: dict[tuple[str, int], np.ndarray] = {}
    shared: dict[tuple[str, int], dict[int, str]] = {}
    documents = 0
    for part in make_parts(find_inputs(options.input)):
        for piece in part:
            for record in read_records(piece, ReadConfig()):
                if record.reason is not None or not isinstance(record, Record):
                    raise ConfigError(
                        f"{record.path}, line {record.line}: {record.reason}: {record.detail}"
                    )
                documents += 1
                grams = sets.find(record.text)
                if len(grams):
                    found[record.path, record.line] = grams
                    shared[record.path, record.line] = sets.shared(record.text)
    leaked = sets.judge(found)
    places = {task: [key for key, tasks in leaked.items() if task in tasks] for task in sets.items}
    table = Table("task", "items", "too short", "documents with its text")
    for task, keys in places.items():
        table.add_row(task, f"{sets.items[task]:,}", f"{sets.short[task]:,}", f"{len(keys):,}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for task, keys in places.items():
        for key in keys[: options.examples]:
            console.print(
                f"{task}: {key[0]}, line {key[1]}: {shared[key][leaked[key][task]]}", markup=False
            )
    formulas = len(found) - len(leaked)
    console.print(
        f"{len(leaked):,} of {documents:,} documents hold text of an evaluation set; {formulas:,} more hold formulas only"
    )
    if options.json:
        figures = {
            "documents": documents,
            "contaminated": len(leaked),
            "formulas_only": formulas,
            "tasks": {
                task: {
                    "items": sets.items[task],
                    "too_short": sets.short[task],
                    "documents": len(keys),
                    "places": [
                        {"file": key[0], "line": key[1], "shared": shared[key][leaked[key][task]]}
                        for key in keys
                    ],
                }
                for task, keys in places.items()
            },
        }
        Path(options.json).write_text(
            json.dumps(figures, indent=1, ensure_ascii=False), encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
