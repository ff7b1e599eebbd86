"""Judge a pipeline by a corpus whose truth is known (corpus_truth.py): recall and precision of each kind, in each language.

    python benchmarks/corpus_score.py --corpus DIR --result PIPELINE_OUTPUT [--json FILE]

Reads PIPELINE_OUTPUT/final/*.parquet (`id, text, ...`) and removed/*.parquet (`id, stage, reason,
duplicate_of`). Nothing of the pipeline's own code is used: similarities are computed here, exactly.

- documents: of a document and its copies all but one should be gone. Removed as a duplicate
rightly: a Jaccard similarity of at least
  0.7 to a document that was kept, as it came or as it stands in final/, over 5-grams of characters
  (Chinese) or words (English), letters and digits only.
- sentences: of the places of a planted sentence, all but one should be gone. A sentence that is
gone from a kept document is rightly
  gone where one at least 0.8 alike (1 - insertions and deletions / letters of both) stands
  elsewhere in final/.
- garbage: gone, by whatever stage. Clean text: kept; what the duplicate stage removed is judged
above.
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
SHORT = 10  # letters; a shorter sentence is nobody's duplicate and not judged
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
    units: Any = (
        letters(text)
        if lang == "zh"
        else re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())
    )
    return {
        units[i : i + 5] if lang == "zh" else tuple(units[i : i + 5])
        for i in range(max(1, len(units) - 4))
    }


def jaccard(a: set, b: set) -> float:
    return len(a & b) / max(1, len(a | b))


def sentences(text: str) -> list[str]:
    """Sentences and lines that are long enough to be judged."""
    return [part for part in SENTENCE_END.split(text) if part and len(letters(part)) >= SHORT]


def read_parquet(folder: Path, columns: list[str]) -> list[dict[str, Any]]:
    rows = []
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise SystemExit(f"{folder} holds no .parquet file: the pipeline did not end there")
    for path in files:
        rows += pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    return rows


class Judge:
    """A corpus, its truth, and what a pipeline made of it."""

    def __init__(self, corpus: Path, result: Path) -> None:
        self.texts: dict[str, str] = {}
        for path in sorted(corpus.glob("corpus-*.jsonl")):
            with path.open(encoding="utf-8") as file:
                self.texts.update(
                    (record["id"], record["text"]) for record in map(json.loads, file)
                )
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
        """Of every kind of copy and language: copies, recall, mean Jaccard similarity to the original."""
        groups = collections.defaultdict(list)
        for name, record in self.kinds.items():
            if record["of"] is not None:
                groups[record["of"]].append(name)
        sums: dict = collections.defaultdict(collections.Counter)
        for original, copies in groups.items():
            record = self.kinds[copies[0]]
            kept = sum(name not in self.removed for name in (original, *copies))
            base = shingles(self.texts[original], record["lang"])
            sums[record["kind"], record["lang"]].update(
                copies=len(copies),
                gone=min(len(copies), 1 + len(copies) - kept),
                jaccard=sum(
                    jaccard(base, shingles(self.texts[name], record["lang"])) for name in copies
                ),
            )
        return _by_kind(
            {
                key: {
                    "copies": s["copies"],
                    "recall": s["gone"] / s["copies"],
                    "jaccard": s["jaccard"] / s["copies"],
                }
                for key, s in sums.items()
            }
        )

    def duplicate_removals(self) -> dict[str, Any]:
        """Documents removed as duplicates, and the share with a kept one at least JACCARD alike; the worst ones by name."""
        kept: dict[str, list[str]] = collections.defaultdict(list)  # of a planted group
        for name in self.final:
            kept[self.kinds[name]["of"] or name].append(name)
        total = right = dangling = 0
        wrong = []
        for name, row in self.removed.items():
            if row["duplicate_of"] is None:
                continue
            total += 1
            lang = self.kinds[name]["lang"]
            other = self.removed.get(row["duplicate_of"])
            dangling += other is not None and other["duplicate_of"] is not None
            mine = shingles(self.texts[name], lang)
            candidates = {
                row["duplicate_of"],
                *kept[self.kinds[name]["of"] or name],
            } & self.texts.keys()
            candidates = {
                c
                for c in candidates
                if (self.removed.get(c) or {"duplicate_of": None})["duplicate_of"] is None
            }
            versions = [
                text
                for c in candidates
                for text in (self.texts[c], self.final.get(c))
                if text is not None
            ]
            best = max((jaccard(mine, shingles(text, lang)) for text in versions), default=0.0)
            right += best >= JACCARD
            if best < JACCARD:
                wrong.append(
                    {
                        "id": name,
                        "kind": self.kinds[name]["kind"],
                        "lang": lang,
                        "of": row["duplicate_of"],
                        "jaccard": best,
                    }
                )
        wrong.sort(key=lambda entry: entry["jaccard"])
        return {
            "removed": total,
            "precision": right / max(1, total),
            "of_one_not_kept": dangling,
            "wrong_kinds": dict(collections.Counter(entry["kind"] for entry in wrong)),
            "wrong": wrong[:20],
        }

    def clean(self) -> dict[str, dict]:
        """Of clean documents without a copy by language: how many, the share removed otherwise than as duplicates, and by what."""
        result = {}
        copied = {
            record["of"] for record in self.kinds.values()
        }  # of two that share most sentences, either may lose them
        for lang in LANGUAGES:
            names = [
                n
                for n, record in self.kinds.items()
                if record["kind"] in CLEAN and record["lang"] == lang and n not in copied
            ]
            gone = [
                self.removed[name]
                for name in names
                if name in self.removed and self.removed[name]["duplicate_of"] is None
            ]
            why = collections.Counter(f"{row['stage']}: {row['reason']}" for row in gone)
            result[lang] = {
                "documents": len(names),
                "removed": len(gone) / max(1, len(names)),
                "reasons": dict(why.most_common(10)),
            }
        return result

    def garbage(self) -> dict[str, dict]:
        """Of every kind of garbage and language: documents, share removed, and what removed most."""
        groups = collections.defaultdict(list)
        for name, record in self.kinds.items():
            if record["kind"].startswith("garbage_"):
                groups[record["kind"].removeprefix("garbage_"), record["lang"]].append(name)
        return _by_kind(
            {
                key: {
                    "documents": len(names),
                    "recall": sum(name in self.removed for name in names) / len(names),
                    "reasons": dict(
                        collections.Counter(
                            f"{self.removed[name]['stage']}: {self.removed[name]['reason']}"
                            for name in names
                            if name in self.removed
                        ).most_common(4)
                    ),
                }
                for key, names in groups.items()
            }
        )

    def sentence_copies(self) -> dict[str, dict]:
        """Of every kind of planted sentence and language: places, recall, and sentences of which no place is left."""
        sums: dict = collections.defaultdict(collections.Counter)
        for record in self.planted:
            places = [
                sentence in self.final[name]
                for sentence, name in zip(record["sentences"], record["documents"], strict=True)
                if name in self.final
            ]
            if len(places) > 1:
                gone = places.count(False)
                sums[record["kind"].removeprefix("sentence_"), record["lang"]].update(
                    places=len(places) - 1,
                    gone=min(gone, len(places) - 1),
                    sentences=1,
                    lost=gone == len(places),
                )
        return _by_kind(
            {
                key: {
                    "places": s["places"],
                    "recall": s["gone"] / s["places"],
                    "lost": s["lost"] / s["sentences"],
                }
                for key, s in sums.items()
            }
        )

    def sentence_removals(self) -> dict[str, dict]:
        """By language: sentences gone from kept documents, and the share of them that have no like in final/."""
        gone: dict[str, list[str]] = {lang: [] for lang in LANGUAGES}
        for name, text in self.final.items():
            record = self.kinds[name]
            if text != self.texts[name]:
                flat = re.sub(r"\s+", "", text)
                # An address may have been masked: such a sentence is not looked for.
                missing = [
                    s
                    for s in sentences(self.texts[name])
                    if re.sub(r"\s+", "", s) not in flat and "@" not in s
                ]
                if record["kind"] == "boilerplate":  # its head and foot should go
                    missing = [s for s in missing if s in self.texts[record["of"]]]
                gone[record["lang"]] += missing
        left = {letters(s) for text in self.final.values() for s in sentences(text)}
        total = {
            lang: sum(
                len(sentences(self.texts[name]))
                for name in self.final
                if self.kinds[name]["lang"] == lang
            )
            for lang in LANGUAGES
        }
        result = {}
        for lang in LANGUAGES:
            unlike = [s for s in gone[lang] if letters(s) not in left]
            alike = _likeness([letters(s) for s in unlike], left)
            unlike = [s for s, likeness in zip(unlike, alike, strict=True) if likeness < ALIKE]
            result[lang] = {
                "sentences": total[lang],
                "removed": len(gone[lang]),
                "wrong": len(unlike) / max(1, len(gone[lang])),
                "examples": [s[:120] for s in unlike[:20]],
            }
        return result


def _likeness(wanted: list[str], pool: set[str]) -> list[float]:
    """Of each wanted text how like the nearest of the pool is: of the 30 that share most runs of four letters."""
    index: dict[str, list[str]] = {
        text[i : i + 4]: [] for text in wanted for i in range(len(text) - 3)
    }
    for text in sorted(pool):
        for run in {text[i : i + 4] for i in range(len(text) - 3)} & index.keys():
            index[run].append(text)
    best = []
    for text in wanted:
        shared: collections.Counter[str] = collections.Counter()
        found = sorted(
            (len(index[run]), run)
            for run in {text[i : i + 4] for i in range(len(text) - 3)}
            if index[run]
        )
        for _, run in found[:20]:
            shared.update(index[run])
        near = [other for other, _ in shared.most_common(30)]
        best.append(max((_alike(text, other) for other in near), default=0.0))
    return best


def _alike(text: str, other: str) -> float:
    """Likeness of a text to another, or to the part of a longer one that is most like it: two splitters may cut differently."""
    if len(other) > len(text):
        return rapidfuzz.fuzz.partial_ratio(text, other) / 100
    return rapidfuzz.distance.Indel.normalized_similarity(text, other)


def _by_kind(figures: dict[tuple[str, str], dict]) -> dict[str, dict]:
    """{(kind, language): figures} as {kind: {language: figures}}, sorted."""
    result: dict[str, dict] = {}
    for kind, lang in sorted(figures):
        result.setdefault(kind, {})[lang] = figures[kind, lang]
    return result


def judge(corpus: Path, result: Path) -> dict[str, Any]:
    """All figures of a pipeline's output."""
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


def _show(figures: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    shown = {
        "documents": ["copies", "recall", "jaccard"],
        "sentences": ["places", "recall", "lost"],
        "garbage": ["documents", "recall"],
    }
    for section, names in shown.items():
        table = Table(
            section,
            *(f"{lang} {name}" for lang in LANGUAGES for name in names),
            *(["most by"] if section == "garbage" else []),
        )
        for kind, row in figures[section].items():
            cells = [
                row[lang][name] if lang in row else None for lang in LANGUAGES for name in names
            ]
            text = [
                "-" if c is None else f"{c:,}" if isinstance(c, int) else f"{c:.3f}" for c in cells
            ]
            reasons = (
                [next(iter(row[lang]["reasons"]), "-") for lang in LANGUAGES if lang in row]
                if section == "garbage"
                else []
            )
            table.add_row(
                kind, *text, *(["; ".join(dict.fromkeys(reasons))] if section == "garbage" else [])
            )
        console.print(table)
    d = figures["duplicate_removals"]
    console.print(
        f"{d['removed']:,} removed as duplicates, {d['precision']:.4f} of them at least {JACCARD} alike to a kept one; "
        f"{d['of_one_not_kept']} name one that is itself removed as a duplicate; kinds of the wrong ones: {d['wrong_kinds']}"
    )
    for lang, f in figures["sentence_removals"].items():
        console.print(
            f"{lang}: {f['removed']:,} of {f['sentences']:,} sentences of kept documents gone, {f['wrong']:.4f} of them wrongly"
        )
    for lang, f in figures["clean"].items():
        console.print(
            f"{lang}: {f['removed']:.4f} of {f['documents']:,} clean documents removed, duplicates aside: {f['reasons']}"
        )
    console.print(f"accounts: {figures['accounts']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", required=True, type=Path, metavar="DIR", help="what corpus_truth.py wrote"
    )
    parser.add_argument(
        "--result", required=True, type=Path, metavar="DIR", help="the pipeline's output"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the figures, with examples")
    options = parser.parse_args()
    figures = judge(options.corpus, options.result)
    _show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
