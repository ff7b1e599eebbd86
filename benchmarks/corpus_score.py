"""Score a pipeline on a corpus whose truth is known (corpus_truth.py), by kind and language.

    python benchmarks/corpus_score.py --corpus DIR --result PIPELINE_OUTPUT [--json FILE]

Reads PIPELINE_OUTPUT/final/*.parquet (`id, text, ...`) and removed/*.parquet (`id, stage, reason,
duplicate_of`). Uses no code of the pipeline: similarities are computed here, exactly.

- Documents: of a document and its copies, all but one should be removed. A removal as a duplicate
  is right where a kept document has a Jaccard similarity of at least 0.7, with its text as read or
  as in final/, over 5-grams of characters (Chinese) or words (English), letters and digits only.
- Sentences: of the places of a planted sentence, all but one should be removed. The removal of a
  sentence from a kept document is right where final/ has another at least 0.8 alike (1 - insertions
  and deletions / letters of both).
- Garbage should be removed, by whatever stage.
- Clean text should be kept. What the duplicate stage removes of it is scored under documents.
"""

import argparse
import collections
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow.parquet
import rapidfuzz
from rich.console import Console
from rich.table import Table

LANGUAGES = ("zh", "en")
CLEAN = ("clean", "giver", "host")
JACCARD, ALIKE = 0.7, 0.8
# Letters; a shorter sentence is not scored.
SHORT = 10
CLOSING = "”’」』\"')"
SENTENCE_END = re.compile(
    rf"(?<=[。！？!?])(?![。！？!?{CLOSING}])|(?<=[。！？!?.][{CLOSING}])(?![{CLOSING}])"
    r"|(?:(?<=[a-z) ]\.)|(?<=[A-Z0-9]{2}\.))(?= +[\"'“‘(]?[A-Z])|\n"
)


def letters(text: str) -> str:
    """Letters and digits alone, of one width and case."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def shingles(text: str, lang: str) -> set:
    """5-grams of characters (Chinese) or words (English)."""
    if lang == "zh":
        characters = letters(text)
        return {characters[i : i + 5] for i in range(max(1, len(characters) - 4))}
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(a: set, b: set) -> float:
    """The share of what both have in what either has."""
    return len(a & b) / max(1, len(a | b))


def sentences(text: str) -> list[str]:
    """Sentences and lines that are long enough to be scored."""
    return [part for part in SENTENCE_END.split(text) if part and len(letters(part)) >= SHORT]


def read_parquet(folder: Path, columns: list[str]) -> list[dict[str, Any]]:
    """The rows of all files of a folder."""
    rows = []
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise SystemExit(
            f"{folder} holds no .parquet file: the pipeline has not finished; run it again with "
            "the same --output"
        )
    for path in files:
        rows += pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    return rows


class Judge:
    """A corpus, its truth, and a pipeline's output for it."""

    def __init__(self, corpus: Path, result: Path) -> None:
        self.texts: dict[str, str] = {}
        for path in sorted(corpus.glob("corpus-*.jsonl")):
            with path.open(encoding="utf-8") as file:
                records = map(json.loads, file)
                self.texts.update((record["id"], record["text"]) for record in records)
        self.kinds: dict[str, dict] = {}
        self.planted: list[dict] = []
        with (corpus / "truth.jsonl").open(encoding="utf-8") as file:
            for record in map(json.loads, file):
                if "id" in record:
                    self.kinds[record["id"]] = record
                else:
                    self.planted.append(record)
        final = read_parquet(result / "final", ["id", "text"])
        removed = read_parquet(result / "removed", ["id", "stage", "reason", "duplicate_of"])
        self.final = {row["id"]: row["text"] for row in final}
        self.removed = {row["id"]: row for row in removed}
        found = collections.Counter(row["id"] for row in (*final, *removed))
        self.accounts = {
            "documents": len(self.texts),
            "lost": len(self.texts.keys() - found.keys()),
            "unknown": len(found.keys() - self.texts.keys()),
            "more_than_once": sum(count > 1 for count in found.values()),
        }

    def documents(self) -> dict[str, dict]:
        """By kind of copy and language: copies, recall, mean Jaccard similarity to the original."""
        groups = collections.defaultdict(list)
        for name, record in self.kinds.items():
            if record["of"] is not None:
                groups[record["of"]].append(name)
        sums: dict = collections.defaultdict(collections.Counter)
        for original, copies in groups.items():
            record = self.kinds[copies[0]]
            kept = sum(name not in self.removed for name in (original, *copies))
            lang = record["lang"]
            base = shingles(self.texts[original], lang)
            alike = sum(jaccard(base, shingles(self.texts[name], lang)) for name in copies)
            # Removing all of a group is as right as keeping one: it counts no more than that.
            removed = min(len(copies), 1 + len(copies) - kept)
            sums[record["kind"], lang].update(copies=len(copies), removed=removed, jaccard=alike)

        def mean(s: collections.Counter) -> dict[str, float]:
            count = s["copies"]
            return {
                "copies": count,
                "recall": s["removed"] / count,
                "jaccard": s["jaccard"] / count,
            }

        return _by_kind({key: mean(s) for key, s in sums.items()})

    def duplicate_removals(self) -> dict[str, Any]:
        """Documents removed as duplicates, and their precision.

        `precision`: the share for which a kept document is at least JACCARD alike; `wrong`: the
        worst of the others; `of_one_not_kept`: those that name a document that is itself removed as
        a duplicate.
        """
        # Of a planted group.
        kept: dict[str, list[str]] = collections.defaultdict(list)
        for name in self.final:
            kept[self.kinds[name]["of"] or name].append(name)
        removed = {n: row["duplicate_of"] for n, row in self.removed.items() if row["duplicate_of"]}
        wrong = []
        for name, survivor in removed.items():
            kind, lang, of = (self.kinds[name][key] for key in ("kind", "lang", "of"))
            candidates = ({survivor, *kept[of or name]} & self.texts.keys()) - removed.keys()
            # Either as it was read, or as the pipeline wrote it.
            versions = [self.texts[c] for c in candidates]
            versions += [self.final[c] for c in candidates if c in self.final]
            mine = shingles(self.texts[name], lang)
            best = max((jaccard(mine, shingles(text, lang)) for text in versions), default=0.0)
            if best < JACCARD:
                entry = {"id": name, "kind": kind, "lang": lang, "of": survivor, "jaccard": best}
                wrong.append(entry)
        wrong.sort(key=lambda entry: entry["jaccard"])
        return {
            "removed": len(removed),
            "precision": (len(removed) - len(wrong)) / max(1, len(removed)),
            "of_one_not_kept": sum(survivor in removed for survivor in removed.values()),
            "wrong_kinds": dict(collections.Counter(entry["kind"] for entry in wrong)),
            "wrong": wrong[:20],
        }

    def clean(self) -> dict[str, dict]:
        """By language: clean documents, the share removed other than as duplicates, and by what.

        Documents with a copy do not count: of two that share most sentences either may lose them.
        """
        result = {}
        copied = {record["of"] for record in self.kinds.values()}
        for lang in LANGUAGES:
            names = [
                n
                for n, record in self.kinds.items()
                if record["kind"] in CLEAN and record["lang"] == lang and n not in copied
            ]
            rows = [self.removed[name] for name in names if name in self.removed]
            removed = [row for row in rows if row["duplicate_of"] is None]
            why = collections.Counter(f"{row['stage']}: {row['reason']}" for row in removed)
            result[lang] = {
                "documents": len(names),
                "removed": len(removed) / max(1, len(names)),
                "reasons": dict(why.most_common(10)),
            }
        return result

    def garbage(self) -> dict[str, dict]:
        """By kind of garbage and language: documents, share removed, and what removed most."""
        groups = collections.defaultdict(list)
        for name, record in self.kinds.items():
            if record["kind"].startswith("garbage_"):
                groups[record["kind"].removeprefix("garbage_"), record["lang"]].append(name)

        def of(names: list[str]) -> dict[str, Any]:
            rows = [self.removed[name] for name in names if name in self.removed]
            why = collections.Counter(f"{row['stage']}: {row['reason']}" for row in rows)
            return {
                "documents": len(names),
                "recall": len(rows) / len(names),
                "reasons": dict(why.most_common(4)),
            }

        return _by_kind({key: of(names) for key, names in groups.items()})

    def sentence_copies(self) -> dict[str, dict]:
        """By kind of planted sentence and language: places, recall, share lost everywhere."""
        sums: dict = collections.defaultdict(collections.Counter)
        for record in self.planted:
            places = [
                sentence in self.final[name]
                for sentence, name in zip(record["sentences"], record["documents"], strict=True)
                if name in self.final
            ]
            if len(places) > 1:
                removed, most = places.count(False), len(places) - 1
                lost = removed == len(places)
                kind = record["kind"].removeprefix("sentence_")
                sums[kind, record["lang"]].update(
                    places=most, removed=min(removed, most), sentences=1, lost=lost
                )

        def mean(s: collections.Counter) -> dict[str, float]:
            recall, lost = s["removed"] / s["places"], s["lost"] / s["sentences"]
            return {"places": s["places"], "recall": recall, "lost": lost}

        return _by_kind({key: mean(s) for key, s in sums.items()})

    def sentence_removals(self) -> dict[str, dict]:
        """By language: sentences removed from kept documents, and the share without one like it."""
        removed: dict[str, list[str]] = {lang: [] for lang in LANGUAGES}
        for name, text in self.final.items():
            record = self.kinds[name]
            if text != self.texts[name]:
                flat = re.sub(r"\s+", "", text)
                # The pipeline masks addresses: a sentence with one is not looked for.
                missing = [
                    s
                    for s in sentences(self.texts[name])
                    if re.sub(r"\s+", "", s) not in flat and "@" not in s
                ]
                # Its head and foot should be removed.
                if record["kind"] == "boilerplate":
                    missing = [s for s in missing if s in self.texts[record["of"]]]
                removed[record["lang"]] += missing
        left = {letters(s) for text in self.final.values() for s in sentences(text)}
        total = dict.fromkeys(LANGUAGES, 0)
        for name in self.final:
            total[self.kinds[name]["lang"]] += len(sentences(self.texts[name]))
        result = {}
        for lang in LANGUAGES:
            unlike = [s for s in removed[lang] if letters(s) not in left]
            alike = _likeness([letters(s) for s in unlike], left)
            unlike = [s for s, likeness in zip(unlike, alike, strict=True) if likeness < ALIKE]
            result[lang] = {
                "sentences": total[lang],
                "removed": len(removed[lang]),
                "wrong": len(unlike) / max(1, len(removed[lang])),
                "examples": [s[:120] for s in unlike[:20]],
            }
        return result


def _likeness(wanted: list[str], pool: set[str]) -> list[float]:
    """The likeness of each wanted text to the nearest in the pool.

    Compared with the 30 that share most of its 20 rarest runs of four letters: all pairs are too
    many.
    """
    runs = lambda text: {text[i : i + 4] for i in range(len(text) - 3)}
    index: dict[str, list[str]] = {run: [] for text in wanted for run in runs(text)}
    for text in sorted(pool):
        for run in runs(text) & index.keys():
            index[run].append(text)
    best = []
    for text in wanted:
        shared: collections.Counter[str] = collections.Counter()
        found = sorted((len(index[run]), run) for run in runs(text) if index[run])
        for _, run in found[:20]:
            shared.update(index[run])
        near = [other for other, _ in shared.most_common(30)]
        best.append(max((_alike(text, other) for other in near), default=0.0))
    return best


def _alike(text: str, other: str) -> float:
    """Likeness of a text to another, or to the most similar part of a longer one.

    A part, since two splitters may cut differently.
    """
    if len(other) > len(text):
        return rapidfuzz.fuzz.partial_ratio(text, other) / 100
    return rapidfuzz.distance.Indel.normalized_similarity(text, other)


def _by_kind(scores: dict[tuple[str, str], dict]) -> dict[str, dict]:
    """{(kind, language): scores} as {kind: {language: scores}}, sorted."""
    result: dict[str, dict] = {}
    for kind, lang in sorted(scores):
        result.setdefault(kind, {})[lang] = scores[kind, lang]
    return result


def judge(corpus: Path, result: Path) -> dict[str, Any]:
    """All scores of a pipeline's output."""
    found = Judge(corpus, result)
    return {
        "accounts": found.accounts,
        "documents": found.documents(),
        "duplicate_removals": found.duplicate_removals(),
        "sentences": found.sentence_copies(),
        "sentence_removals": found.sentence_removals(),
        "garbage": found.garbage(),
        "clean": found.clean(),
    }


def _show(scores: dict[str, Any]) -> None:
    """Print tables by kind and language, then the totals."""
    console = Console(highlight=False, soft_wrap=True)
    shown = {
        "documents": ["copies", "recall", "jaccard"],
        "sentences": ["places", "recall", "lost"],
        "garbage": ["documents", "recall"],
    }
    for section, names in shown.items():
        columns = [f"{lang} {name}" for lang in LANGUAGES for name in names]
        with_reasons = section == "garbage"
        table = Table(section, *columns, *(["most by"] if with_reasons else []))
        for kind, row in scores[section].items():
            cells = [row.get(lang, {}).get(name) for lang in LANGUAGES for name in names]
            text = list(map(_cell, cells))
            if with_reasons:
                first = [next(iter(row[lang]["reasons"]), "-") for lang in LANGUAGES if lang in row]
                text.append("; ".join(dict.fromkeys(first)))
            table.add_row(kind, *text)
        console.print(table)
    d = scores["duplicate_removals"]
    console.print(
        f"{d['removed']:,} removed as duplicates, {d['precision']:.4f} of them at least {JACCARD} "
        f"alike to a kept one; {d['of_one_not_kept']} name one that is itself removed as a "
        f"duplicate; kinds of the wrong ones: {d['wrong_kinds']}"
    )
    for lang, s in scores["sentence_removals"].items():
        console.print(
            f"{lang}: {s['removed']:,} of {s['sentences']:,} sentences of kept documents removed, "
            f"{s['wrong']:.4f} of them wrongly"
        )
    for lang, s in scores["clean"].items():
        console.print(
            f"{lang}: {s['removed']:.4f} of {s['documents']:,} clean documents removed, duplicates "
            f"aside: {s['reasons']}"
        )
    console.print(f"accounts: {scores['accounts']}")


def _cell(value: float | None) -> str:
    """A count or a share for a table."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def main() -> None:
    """Print the scores, and save them where a file is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    corpus, result = "what corpus_truth.py wrote", "the pipeline's output"
    parser.add_argument("--corpus", required=True, type=Path, metavar="DIR", help=corpus)
    parser.add_argument("--result", required=True, type=Path, metavar="DIR", help=result)
    parser.add_argument("--json", type=Path, metavar="FILE", help="save scores and examples")
    options = parser.parse_args()
    scores = judge(options.corpus, options.result)
    _show(scores)
    if options.json:
        text = json.dumps(scores, indent=1, ensure_ascii=False)
        options.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
