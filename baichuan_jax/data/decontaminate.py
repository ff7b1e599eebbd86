"""Finds text of evaluation sets in a corpus: sequences of 13 units that both hold.

Input: documents, and files of test questions. Output: the documents that hold a question's text,
each with the tasks. A unit is a Han character, or a word of another script; case, width,
punctuation and spacing do not count. Question, passage and options are compared each by itself.
Thirteen units, and what counts as a formula that many documents share, follow GPT-3 (Brown et al.
2020, https://arxiv.org/abs/2005.14165, appendix C). The pipeline removes the documents found
(decontaminate.files); the command only reports them:

`python -m baichuan_jax.data.decontaminate --evaluation 'ceval/*/*.csv' --input 'corpus/*.parquet'`
"""

import argparse
import collections
import functools
import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from baichuan_jax.config.parsing import csv_rows, parse_json, read_text, show_path
from baichuan_jax.config.schema import ConfigError, at_least
from baichuan_jax.documents.files import (
    UNREAD,
    Kinds,
    Slice,
    State,
    find_files,
    find_inputs,
    find_unread,
    require_unchanged,
    say_unread,
    states,
)
from baichuan_jax.documents.reader import Document, Fields, read_documents
from baichuan_jax.resilience.exits import run_command, say
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import refuse_inputs, writable_file, write_atomically

if TYPE_CHECKING:
    # At run time these need pyarrow and daft, which the command does without.
    from baichuan_jax.data.corpus.config import DecontaminateConfig
    from baichuan_jax.data.corpus.effects import Effects
    from baichuan_jax.data.corpus.filter import Corpus
    from baichuan_jax.data.corpus.parts import DocumentPart, ParquetFile

UNITS = 13
# A sequence that more documents hold is a formula of laws, forms or prayers, and no leak by itself
# (GPT-3: 10).
FORMULA = 10
# From this share of a text's sequences on it is leaked all the same, where it has as many as UNITS.
COVERED = 0.5
# What the evaluation files are. None is compressed.
EVALUATION = Kinds(
    (".csv", ".json", ".jsonl", ".txt"),
    "expected an evaluation file of kind .csv, .json, .jsonl or .txt, not compressed",
    compressed=False,
)
# Fields of an item that are compared. Answers and explanations are not: they are no questions.
FIELDS = ("passage", "context", "article", "question", "options", "choices", *"ABCDE")
_UNIT = re.compile(
    r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)
_POWERS = np.array([pow(0x9E3779B97F4A7C15, n, 1 << 64) for n in range(1, UNITS + 1)], np.uint64)


# The filter


class Decontaminate:
    """Removes documents that hold text of evaluation sets; the reason names the tasks."""

    name = "decontaminate"

    def __init__(self, config: "DecontaminateConfig") -> None:
        """Raises as find_evaluation_files does."""
        # Once, for all workers and for the key of what they find.
        self._files = states(find_evaluation_files(config.files))

    def run(self, corpus: "Corpus") -> "Effects":
        import daft  # pyright: ignore[reportMissingImports]
        from daft import DataType, col  # pyright: ignore[reportMissingImports]

        from baichuan_jax.data.corpus.effects import Effects
        from baichuan_jax.data.corpus.parts import stage_key
        from baichuan_jax.data.corpus.tables import read_stage

        if not self._files:
            return Effects(notes={"evaluation_sets": {}})
        # A file that changes in place is another evaluation set.
        files_key = stage_key([[path, *state] for path, state in self._files.items()])
        grams, _ = corpus.make_parts(
            "evaluation-grams", [corpus.documents.key, files_key, FIELDS], self._find_grams
        )
        sets = _evaluation_sets(tuple(self._files.items()))
        require_unchanged(self._files)

        def judge() -> Any:
            rows = read_stage(grams).to_pylist()
            found = {row["doc"]: np.array(row["grams"], np.int64).view(np.uint64) for row in rows}
            leaked = sets.judge(found)
            tasks = [" ".join(held) for held in leaked.values()]
            table = daft.from_pydict({"doc": list(leaked), "task": tasks})
            # An empty list has no type of its own.
            return table.select(
                col("doc").cast(DataType.int64()), col("task").cast(DataType.string())
            )

        key, leaked = corpus.make_table("decontaminate", [grams.key], judge)
        items = {task: sets.counts(task) for task in sorted(sets.items)}
        removed = leaked.select("doc", col("task").alias("reason"))
        return Effects(key, removed=removed, notes={"evaluation_sets": items})

    def _find_grams(self, part: "DocumentPart", file: "ParquetFile") -> int:
        """The 13-grams that documents share with evaluation files. Returns how many share any.

        Whether a gram is a formula is known once all parts are counted, so all are kept here.
        """
        import pyarrow as pa  # pyright: ignore[reportMissingImports]

        from baichuan_jax.data.corpus.parts import table_of

        sets = _evaluation_sets(tuple(self._files.items()))
        found = []
        for table in part.read(["doc", "text"]):
            for doc, text in zip(*(column.to_pylist() for column in table.columns), strict=True):
                if text is not None and len(grams := sets.find(text)):
                    found.append((doc, grams.view(np.int64)))
        schema = pa.schema([("doc", pa.int64()), ("grams", pa.list_(pa.int64()))])
        file.write(schema.empty_table())
        file.write(table_of(found, schema))
        return len(found)


@functools.lru_cache(maxsize=1)
def _evaluation_sets(files: tuple[tuple[str, State], ...]) -> "EvaluationSets":
    """Once for all parts that a worker process makes; anew where a file has changed."""
    return EvaluationSets([path for path, _ in files])


# What is looked for


class EvaluationSets:
    """The 13-grams of evaluation files: CSV with or without a header, JSON, JSONL, or plain text.

    Items of plain text are its paragraphs. A task is a file's last two names without the split:
    `ceval/logic` for ceval/val/logic_val.csv. Raises ConfigError where a file is not what its
    name says, or all hold nothing to look for, and OSError.
    """

    def __init__(self, files: list[str]) -> None:
        self.items: collections.Counter[str] = collections.Counter()
        # Items without any text of 13 units, which cannot be found.
        self.short: collections.Counter[str] = collections.Counter()
        # By task, fields that hold text to look for and are not compared.
        self.not_compared: dict[str, set[str]] = {}
        texts: list[np.ndarray] = []  # unique 13-grams of each text of an item
        tasks: list[str] = []
        for path in files:
            task = _task(Path(path))
            # A file without an item is shown too.
            self.items[task] += 0
            ignored = self.not_compared.setdefault(task, set())
            for fields in _items(Path(path), ignored):
                found = [np.unique(grams) for field in fields if len(grams := _grams(field))]
                self.items[task] += 1
                self.short[task] += not found
                texts += found
                tasks += [task] * len(found)
        if not texts:
            named = ", ".join(files[:4])
            raise ConfigError(
                f"{named} hold no sequence of {UNITS} characters or words to look for"
            )
        # By the number of the text.
        self._task = np.array(tasks)
        self._size = np.array([len(grams) for grams in texts])
        # All grams of all texts, sorted, each beside its text: found by bisection.
        order = np.argsort(np.concatenate(texts), kind="stable")
        self._grams = np.concatenate(texts)[order]
        self._text = np.repeat(np.arange(len(texts)), self._size)[order]

    def counts(self, task: str) -> dict[str, Any]:
        """What was read of a task, and what of it is not looked for, for reports."""
        return {
            "items": self.items[task],
            "too_short": self.short[task],
            "not_compared": sorted(self.not_compared[task]),
        }

    def find(self, text: str) -> np.ndarray:
        """Hashes of the 13-grams that a document and any item share: uint64, sorted, each once."""
        grams = np.unique(_grams(text))
        return grams[self._holds(grams)]

    def judge(self, found: dict[Any, np.ndarray]) -> dict[Any, dict[str, int]]:
        """Of documents that hold an item's text, the tasks, each with a 13-gram as evidence.

        `found`: what `find` gave for each document of a whole corpus. A document holds an item's
        text where it has a 13-gram of it that is no formula (at most FORMULA documents of the
        corpus have it), or COVERED of those of a longer question, passage or option.
        """
        everything = np.concatenate([*found.values(), np.zeros(0, np.uint64)])
        distinct, counts = np.unique(everything, return_counts=True)
        formulas = distinct[counts > FORMULA]
        leaked = {}
        for key, grams in found.items():
            # A sequence may be in several texts, of several tasks: its places in the sorted table.
            first, last = (np.searchsorted(self._grams, grams, side) for side in ("left", "right"))
            ranges = [self._text[a:b] for a, b in zip(first, last, strict=True)]
            texts = np.concatenate([np.zeros(0, int), *ranges])
            grams = np.repeat(grams, last - first)
            hits = np.bincount(texts, minlength=len(self._size))
            # A question made of formulas alone is still a question.
            covered = (hits >= COVERED * self._size) & (self._size >= UNITS)
            proves = covered[texts] | ~np.isin(grams, formulas)
            if proves.any():
                pairs = zip(self._task[texts[proves]].tolist(), grams[proves].tolist(), strict=True)
                leaked[key] = dict(sorted(pairs))
        return leaked

    def shared(self, text: str) -> dict[int, str]:
        """The sequences of a document that items hold too, by their hashes.

        Each as normalised units joined by spaces.
        """
        units, grams = _units(text), _grams(text)
        return {
            int(grams[start]): " ".join(units[start : start + UNITS])
            for start in np.flatnonzero(self._holds(grams))
        }

    def _holds(self, grams: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(self._grams, grams), len(self._grams) - 1)
        return self._grams[place] == grams


def find_evaluation_files(patterns: list[str]) -> list[str]:
    """Files that globs name, sorted, each once. Says how many hidden files they leave out.

    Raises as find_files does, and ConfigError where a glob matches a folder that holds more of
    them: a corpus would be called clean of questions that nobody looked for.
    """
    files = find_files(patterns, EVALUATION)
    hidden, inside = find_unread(patterns, EVALUATION)
    if inside:
        raise ConfigError(
            f"{show_path(inside[0])} is in a folder that a glob matches, and no glob matches it "
            f"({len(inside):,} such files): its questions would not be looked for; name it too, "
            "such as 'FOLDER/*/*.csv'"
        )
    if hidden:
        say(f"{len(hidden):,} {UNREAD['hidden_files']} among the evaluation files")
    return files


def _units(text: str) -> list[str]:
    return _UNIT.findall(unicodedata.normalize("NFKC", text).casefold())


@functools.lru_cache(maxsize=1 << 18)
def _hash(unit: str) -> int:
    # Evaluation files may hold half of a surrogate pair.
    digest = hashlib.blake2b(unit.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _grams(text: str) -> np.ndarray:
    """Hashes of all sequences of 13 units, in order: uint64 [max(0, units - 12)].

    A sum of the units' hashes, each times a power that depends on its place. Wrap-around is meant.
    """
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
    parts = path.absolute().with_suffix("").parts
    # The split says nothing about the task.
    names = [name for name in parts if name not in ("dev", "val", "test")]
    return "/".join(re.sub(r"_(dev|val|test)$", "", name) for name in names[-2:])


def _items(path: Path, ignored: set[str]) -> Iterator[list[str]]:
    """Items of an evaluation file, each a list of texts.

    Adds to `ignored` the names of fields that hold other text, which could be looked for too.
    """
    text = read_text(path)
    if path.suffix == ".csv":
        rows = [row for _, row in csv_rows(text, str(path))]
        if rows and "question" in rows[0]:  # C-Eval has a header, MMLU none
            header, *rows = rows
            rows = [_question(zip(header, row, strict=False), ignored) for row in rows]
        yield from rows
    elif path.suffix == ".json":
        yield from _objects(parse_json(text, str(path)), ignored)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield from _objects(parse_json(line, f"{path}, line {number}"), ignored)
    else:
        paragraphs = re.split(r"\n\s*\n", text)
        yield from ([paragraph] for paragraph in paragraphs if paragraph.strip())


def _objects(value: Any, ignored: set[str]) -> list[list[str]]:
    """Items inside parsed JSON: the objects that have a question; where none has, every text."""
    if not _has_question(value):
        return [[text] for text in _strings(value)]
    return list(_questions(value, "", ignored))


def _has_question(value: Any) -> bool:
    if isinstance(value, dict) and "question" in value:
        return True
    # A loop: what is nested deeply would take two levels of Python's stack for each of its own.
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            if _has_question(inner):
                return True
    return False


def _questions(value: Any, name: str, ignored: set[str]) -> Iterator[list[str]]:
    # Not searched further: what lies inside an item is part of it.
    if isinstance(value, dict) and "question" in value:
        yield _question(value.items(), ignored)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _questions(inner, key, ignored)
    elif isinstance(value, list):
        for inner in value:
            yield from _questions(inner, name, ignored)
    elif isinstance(value, str) and name in FIELDS:
        # A passage that lies around its questions.
        yield [value]
    else:
        _note(name, value, ignored)


def _question(fields: Iterable[tuple[str, Any]], ignored: set[str]) -> list[str]:
    """The texts of an item that are compared."""
    texts: list[str] = []
    for name, value in fields:
        if name in FIELDS:
            texts += _strings(value)
        else:
            _note(name, value, ignored)
    return texts


def _note(name: str, value: Any, ignored: set[str]) -> None:
    """Add to `ignored` a field's name where a text of it is long enough to be found."""
    if name not in ignored and any(len(_units(text)) >= UNITS for text in _strings(value)):
        ignored.add(name)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


# The command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.data.decontaminate",
        description="Look for text of evaluation sets in a corpus: 13 characters (Chinese) or words"
        " that both hold. Removes nothing; the pipeline does, with --decontaminate.files.",
    )
    add = parser.add_argument
    sets = "evaluation files: .csv, .json, .jsonl, .txt"
    add("--evaluation", nargs="+", required=True, metavar="GLOB", help=sets)
    corpus = "corpus: JSONL, .txt, also .gz, .zst; or Parquet"
    add("--input", nargs="+", required=True, metavar="GLOB", help=corpus)
    shown = "documents to show of each task (default: 2)"
    add("--examples", type=at_least(0), default=2, help=shown)
    add("--json", type=writable_file, metavar="FILE", help="save the results")
    return parser


def _look(sets: EvaluationSets, files: Iterable[str]) -> tuple[int, dict, dict]:
    """How many documents there are; by (file, line) the grams that are shared, and their texts.

    Raises ConfigError at the first problem: a count that leaves documents out would look like a
    clean corpus.
    """
    documents = 0
    found: dict[tuple[str, int], np.ndarray] = {}
    shared: dict[tuple[str, int], dict[int, str]] = {}
    for path in files:
        for entry in read_documents(Slice(path), Fields()):
            if not isinstance(entry, Document):
                raise ConfigError(str(entry))
            documents += 1
            grams = sets.find(entry.text)
            if len(grams):
                found[entry.path, entry.line] = grams
                shared[entry.path, entry.line] = sets.shared(entry.text)
    return documents, found, shared


def main(argv: list[str]) -> int:
    """The command. Returns its exit code."""
    options = _parser().parse_args(argv)
    evaluation, files = find_evaluation_files(options.evaluation), find_inputs(options.input)
    refuse_inputs({"--json": [options.json]}, {"--evaluation": evaluation, "--input": files})
    say_unread(options.input)
    sets = EvaluationSets(evaluation)
    documents, found, shared = _look(sets, files)
    # After all documents are read: only then is it known what is a formula.
    leaked = sets.judge(found)
    places = {task: [key for key, tasks in leaked.items() if task in tasks] for task in sets.items}
    display = Display()
    rows = [
        [task, f"{sets.items[task]:,}", f"{sets.short[task]:,}", f"{len(keys):,}"]
        for task, keys in places.items()
    ]
    display.table(None, ["task", "items", "too short", "documents with its text"], rows)
    for task in places:
        if names := sets.counts(task)["not_compared"]:
            fields = f"fields with text that are not compared: {', '.join(names)}"
            display.say(f"{task}: {fields} (compared: {', '.join(FIELDS)})")
    evidence = lambda key, task: shared[key][leaked[key][task]]
    for task, keys in places.items():
        for file, line in keys[: options.examples]:
            text = evidence((file, line), task)
            display.say(f"{task}: {file}, line {line}: {text}")
    formulas = len(found) - len(leaked)
    display.say(
        f"{len(leaked):,} of {documents:,} documents hold text of an evaluation set; "
        f"{formulas:,} more hold formulas only"
    )
    if options.json:
        tasks = {
            task: {
                **sets.counts(task),
                "documents": len(keys),
                "places": [
                    {"file": key[0], "line": key[1], "shared": evidence(key, task)} for key in keys
                ],
            }
            for task, keys in places.items()
        }
        results = {"documents": documents, "contaminated": len(leaked), "formulas_only": formulas}
        content = json.dumps({**results, "tasks": tasks}, indent=1, ensure_ascii=False)
        write_atomically(Path(options.json), content.encode())
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]), result_is_shown=True)
