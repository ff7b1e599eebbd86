"""Removes near-duplicate documents: MinHash-LSH, every pair verified, the best of a cluster kept.

Input: documents with scores. Output: the removed ones, each with the document that stays in its
place. A document is the set of its 5-grams of characters (Chinese) or words; two documents are as
alike as their sets' Jaccard similarity, which the share of equal MinHashes estimates (Broder 1997,
https://doi.org/10.1109/SEQUEN.1997.666900; for language models: Lee et al. 2022,
https://arxiv.org/abs/2107.06499). Only documents that have all hashes of one band in common are
compared. Pairs at or above the threshold are joined into components (corpus/components.py). Of a
component the best stays, by quality, then length, then place in the input, and removes those that
are like it; then the best of the others, and so on.
"""

import functools
import re
import unicodedata
from typing import Any

import daft  # pyright: ignore[reportMissingImports]
import daft.functions as F  # pyright: ignore[reportMissingImports]
import numpy as np
import pyarrow as pa  # pyright: ignore[reportMissingImports]
from daft import DataFrame, DataType, col, lit  # pyright: ignore[reportMissingImports]
from daft.recordbatch import RecordBatch  # pyright: ignore[reportMissingImports]

from baichuan_jax.data.corpus.components import components
from baichuan_jax.data.corpus.config import DedupConfig
from baichuan_jax.data.corpus.effects import Effects
from baichuan_jax.data.corpus.filter import Corpus
from baichuan_jax.data.corpus.parts import DocumentPart, ParquetFile, hash_of
from baichuan_jax.data.corpus.tables import Tables, read_stage

GRAM = 5  # characters or words
# Compared of each document: a standard error of 0.034 at Jaccard 0.75.
HASHES = 160
SEED = 1
# A row of two sketches takes the memory of this many rows of keys.
SKETCH_ROWS = 4
_NO_LETTERS = re.compile(r"[\W_]+")
_ASCII = "".join(chr(point).lower() if chr(point).isalnum() else " " for point in range(128))
SIGNATURES = pa.schema(
    [
        ("doc", pa.int64()),
        ("rank", pa.int64()),  # quality, then length: the highest of a cluster stays
        ("exact", pa.int64()),  # hash of the letters and digits in order
        ("bands", pa.list_(pa.int64())),
        ("sketch", pa.binary()),  # HASHES times the low 16 bits of a MinHash
    ]
)


class NearDuplicates:
    """The filter, named for what it compares: whole documents."""

    name = "documents"

    def __init__(self, config: DedupConfig) -> None:
        self.config = config

    def run(self, corpus: Corpus) -> Effects:
        if not self.config.enabled:
            return Effects()
        # The scores: the best of a cluster depends on them.
        key = [corpus.documents.key, corpus.scores_key, self.config]
        signatures, _ = corpus.make_parts("signatures", key, self._sign)

        def find() -> DataFrame:
            removed = corpus.effects.removed_documents
            table = read_stage(signatures).join(removed, on="doc", how="anti")
            pairs = find_duplicates(corpus.tables, table, self.config)
            # Ids at the end: until here a document is a number, which takes less memory.
            ids = corpus.ids().select(col("doc").alias("kept"), col("id").alias("kept_id"))
            return pairs.join(ids, on="kept").select("doc", "kept", "kept_id")

        key, found = corpus.make_table("documents", [signatures.key, *corpus.effects.keys], find)
        reason = lit("near_duplicate").alias("reason")
        removed = found.select("doc", reason, col("kept_id").alias("duplicate_of"))
        counts = found.groupby("kept").agg(col("doc").count().alias("count"))
        copies = counts.select(col("kept").alias("doc"), (col("count") + lit(1)).alias("count"))
        return Effects(key, removed=removed, copies=copies)

    def _sign(self, part: DocumentPart, file: ParquetFile) -> int:
        """Write SIGNATURES of a part's documents. Returns how many there are."""
        bands, rows = self.config.bands, self.config.rows
        file.write(SIGNATURES.empty_table())
        number = 0
        for table, scores in part.read_scored(["doc", "lang", "text"]):
            # Removed documents have no text, and must not be the one that stays.
            fit = np.flatnonzero(np.asarray(table["text"].is_valid()))
            if not len(fit):
                continue
            table = table.take(fit)
            texts = table["text"].to_pylist()
            units = units_of(texts, table["lang"].to_pylist())
            hashes = minhash(units)
            columns = [
                table["doc"],
                pa.array(_ranks(scores[fit], texts)),
                pa.array([_hash(unit) for unit in units], pa.int64()),
                pa.array(
                    list(_bands(hashes[:, : bands * rows].reshape(len(fit), bands, rows))),
                    pa.list_(pa.int64()),
                ),
                # 16 bits of each hash: two different documents agree by chance in one of 65,536.
                pa.array([row.tobytes() for row in hashes.astype(np.uint16)], pa.binary()),
            ]
            file.write(pa.table(columns, schema=SIGNATURES))
            number += len(fit)
        return number


# Signatures of one part


def _ranks(quality: np.ndarray, texts: list[str]) -> np.ndarray:
    """Quality in the upper bits, length in the lower ones: int64 [documents]."""
    # Among equally good copies the longest: it may hold what the others lack.
    lengths = np.array([min(len(text), (1 << 32) - 1) for text in texts])
    return (quality * (1 << 20)).astype(np.int64) << 32 | lengths


def _hash(units: str) -> int:
    """Of the letters and digits alone: where a text is cut into words does not count."""
    return hash_of(units.encode().translate(None, b" "))


def units_of(texts: list[str], langs: list[str]) -> list[str]:
    """Each text's letters and digits, of one width and case, in units with a space between.

    Units are characters (Chinese) or words.
    """
    chinese = iter(_spaced([text for text, lang in zip(texts, langs, strict=True) if lang == "zh"]))
    units = [next(chinese) if lang == "zh" else "" for lang in langs]
    # What is not of one width yet, as Chinese with Latin letters may be, takes the slow way.
    return [
        unit if lang == "zh" and unicodedata.is_normalized("NFKC", unit) else _units_of(text, lang)
        for text, lang, unit in zip(texts, langs, units, strict=True)
    ]


@functools.cache
def _letters() -> np.ndarray:
    """Whether each code point is a letter or digit."""
    return np.array([chr(point).isalnum() for point in range(0x110000)])


def _spaced(texts: list[str]) -> list[str]:
    """Letters and digits of each text in lower case with a space between.

    All texts at once, as an array of code points: a quarter of the time of one after the other.
    """
    if not texts:
        return []
    line, space = ord("\n"), ord(" ")
    # casefold may change a text's length, so texts are found again by the line ends between them.
    joined = "\n".join(text.replace("\n", " ") for text in texts).casefold()
    points = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
    kept = points[_letters()[points] | (points == line)]
    spaced = np.full(2 * len(kept), space, np.uint32)
    spaced[::2] = kept
    return [text.strip(" ") for text in spaced.tobytes().decode("utf-32-le").split("\n")]


def _units_of(text: str, lang: str) -> str:
    # Most English text is ASCII; the same result in a third of the time.
    if text.isascii() and lang != "zh":
        return " ".join(text.translate(_ASCII).split())
    words = _NO_LETTERS.sub(" ", text)
    # A quick test, once the punctuation is removed: Chinese punctuation would fail it.
    if not unicodedata.is_normalized("NFKC", words):
        words = _NO_LETTERS.sub(" ", unicodedata.normalize("NFKC", words))
    words = words.casefold().strip()
    return " ".join(words.replace(" ", "")) if lang == "zh" else words


def minhash(units: list[str]) -> np.ndarray:
    """HASHES MinHashes of each text's GRAM-grams: uint32 [texts, HASHES]."""
    column = F.minhash(
        daft.col("units"), num_hashes=HASHES, ngram_size=GRAM, seed=SEED, hash_function="xxhash64"
    )
    batch = RecordBatch.from_arrow_table(pa.table({"units": pa.array(units, pa.large_string())}))
    expressions: Any = [column]
    result = batch.eval_expression_list(expressions).to_arrow_table().column(0).combine_chunks()
    return result.flatten().to_numpy().reshape(len(units), HASHES)


def _bands(hashes_NBR: np.ndarray) -> np.ndarray:
    """One key for each document and band, of the band's R hashes: int64 [N, B].

    Each band begins with a number of its own, so equal hashes in different bands do not meet.
    """
    key = np.arange(1, hashes_NBR.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    key = np.broadcast_to(key, hashes_NBR.shape[:2])
    for row in range(hashes_NBR.shape[2]):
        key = (key ^ hashes_NBR[:, :, row]) * np.uint64(0xBF58476D1CE4E5B9)
        key = key ^ (key >> np.uint64(29))
    return key.view(np.int64)


def similarity(left: list[bytes], right: list[bytes]) -> np.ndarray:
    """Estimated Jaccard similarity of each pair of sketches."""
    a, b = (
        np.frombuffer(b"".join(side), np.uint16).reshape(len(side), HASHES)
        for side in (left, right)
    )
    return (a == b).mean(axis=1)


# Duplicates in the whole corpus


def find_duplicates(tables: Tables, table: DataFrame, config: DedupConfig) -> DataFrame:
    """(doc, kept) of every document to remove, and the one that stays in its place.

    `table` has the columns of SIGNATURES.
    """
    # Exact copies first: without them clusters stay small, and popular pages have thousands.
    exact = tables.keep(_exact_duplicates(table))
    unique = table.join(exact.select("doc"), on="doc", how="anti")
    edges = tables.keep(_similar_pairs(tables, unique, config))
    labels = components(tables, edges)
    ranked = labels.join(unique.select("doc", "rank", "sketch"), on="doc")
    near = tables.keep(_resolve(ranked, config))
    # Exact copies of a removed document point to its survivor, which is in final/.
    survivors = near.select(col("doc").alias("kept"), col("kept").alias("survivor"))
    onward = exact.join(survivors, on="kept", how="left")
    return near.concat(onward.select("doc", F.coalesce(col("survivor"), col("kept")).alias("kept")))


def _exact_duplicates(table: DataFrame) -> DataFrame:
    """(doc, kept) of documents whose letters and digits equal those of a better one."""
    keys = table.select("doc", "rank", "exact")
    top, count = col("rank").max().alias("top"), col("doc").count().alias("count")
    several = keys.groupby("exact").agg(top, count).where(col("count") > lit(1))
    members = keys.join(several, on="exact")
    best = members.where(col("rank") == col("top"))
    kept = best.groupby("exact").agg(col("doc").min().alias("kept"))
    return members.join(kept, on="exact").where(col("doc") != col("kept")).select("doc", "kept")


def _similar_pairs(tables: Tables, table: DataFrame, config: DedupConfig) -> DataFrame:
    """(low, high) of documents that share a band and whose sketches are alike."""
    bands = table.select("doc", col("bands").alias("band")).explode("band")
    pairs = tables.in_buckets(bands.count_rows(), _pairs, (bands, "band"))
    sketch = table.select("doc", "sketch")

    def of_low(pairs: DataFrame, sketch: DataFrame) -> DataFrame:
        low = sketch.select(col("doc").alias("low"), col("sketch").alias("a"))
        return pairs.distinct().join(low, on="low")

    def of_high(pairs: DataFrame, sketch: DataFrame) -> DataFrame:
        high = sketch.select(col("doc").alias("high"), col("sketch").alias("b"))
        alike = _similarity(col("a"), col("b")) >= lit(config.threshold)
        return pairs.join(high, on="high").where(alike).select("low", "high")

    # One side after the other: a pair with both sketches takes 640 bytes.
    rows = SKETCH_ROWS * pairs.count_rows()
    pairs = tables.in_buckets(rows, of_low, (pairs, "low"), (sketch, "doc"))
    return tables.in_buckets(rows, of_high, (pairs, "high"), (sketch, "doc"))


def _pairs(bands: DataFrame) -> DataFrame:
    """(low, high) of documents with those that have a band first and last.

    Not of all with all: a band of a thousand documents would give half a million pairs. Two that
    are like each other, but like neither of those, have the other bands to meet in.
    """
    first, last = col("doc").min().alias("first"), col("doc").max().alias("last")
    ends = bands.groupby("band").agg(first, last)
    # Most bands have one document only: their first is their last.
    members = bands.join(ends.where(col("first") < col("last")), on="band")
    with_first = members.select(col("first").alias("low"), col("doc").alias("high"))
    with_last = members.select(col("doc").alias("low"), col("last").alias("high"))
    return with_first.concat(with_last).where(col("low") < col("high"))


@daft.func.batch(return_dtype=DataType.float64())
def _similarity(left: daft.Series, right: daft.Series) -> Any:
    return similarity(left.to_pylist(), right.to_pylist())


def _resolve(members: DataFrame, config: DedupConfig) -> DataFrame:
    """(doc, kept) within components (doc, component, rank, sketch)."""
    member = F.to_struct(col("doc"), col("rank"), col("sketch")).alias("members")
    # All of a component at once: it is small, since exact copies are removed.
    grouped = members.select("component", member).groupby("component")
    clusters = grouped.agg(col("members").list_agg())
    removed: Any = _keep_best(col("members"), lit(config.threshold))
    pairs = clusters.select(removed.alias("pair")).explode("pair").where(~col("pair").is_null())
    return pairs.select(col("pair").get("doc").alias("doc"), col("pair").get("kept").alias("kept"))


@daft.func(
    return_dtype=DataType.list(DataType.struct({"doc": DataType.int64(), "kept": DataType.int64()}))
)
def _keep_best(members: list, threshold: float) -> list[dict[str, int]]:
    """The best stays and removes what is like it, then the best of the others.

    A component is a chain of likenesses, whose ends may be quite different: so a document is
    removed only where it is itself like one that stays.
    """
    members = sorted(members, key=lambda member: (-member["rank"], member["doc"]))
    joined = b"".join(member["sketch"] for member in members)
    sketches = np.frombuffer(joined, np.uint16).reshape(len(members), HASHES)
    # Numbers of members that nothing has removed or kept yet.
    left = np.arange(len(members))
    removed = []
    while len(left):
        best, left = left[0], left[1:]
        alike = (sketches[left] == sketches[best]).mean(axis=1) >= threshold
        kept = members[best]["doc"]
        removed += [{"doc": members[index]["doc"], "kept": kept} for index in left[alike]]
        left = left[~alike]
    return removed
