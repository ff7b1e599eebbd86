"""Sentences that occur again: where sentences are, which are equal or nearly so, and documents without them.

Equal: the same letters and digits in the same order. Nearly equal: two sentences that share runs of
letters are compared letter by letter (rapidfuzz), and must have the same digits: "Article 12" is
not "Article 13". Of sentences that are alike the first of the input stays.
"""

import hashlib
import itertools
import re
import unicodedata
from typing import Any

import daft  # pyright: ignore[reportMissingImports]
import daft.functions as F  # pyright: ignore[reportMissingImports]
import numpy as np
import pyarrow as pa  # pyright: ignore[reportMissingImports]
from daft import DataFrame, DataType, col, lit  # pyright: ignore[reportMissingImports]
from rapidfuzz.distance import Indel  # pyright: ignore[reportMissingImports]
from rapidfuzz.process import cpdist  # pyright: ignore[reportMissingImports]

from baichuan_jax.data.corpus.config import SentencesConfig
from baichuan_jax.data.corpus.engine import ROW_BITS, Engine, ParquetFile, Stage, read_part
from baichuan_jax.data.near_duplicates import components

# A sentence with one letter of ten replaced keeps a run of 5 Chinese characters, and nearly always
# one of 12 Latin letters.
RUN = {"zh": 4, "en": 8}
ANCHORS = (
    20  # runs kept of each sentence, by hash, so that sentences that are alike keep the same ones
)
SHARED = 2  # anchors that two sentences must share to be compared
FEW = 8  # an anchor of so many sentences has each compared with each; of more, each with the first and the last
SENTENCES = pa.schema(
    [
        ("sentence", pa.int64()),  # part << ROW_BITS | number: in the order of the input
        ("doc", pa.int64()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("bytes", pa.int64()),  # of the sentence
        ("size", pa.int64()),  # of the document, in characters
        ("exact", pa.int64()),  # hash of the letters
        ("anchors", pa.list_(pa.int64())),
        ("letters", pa.string()),
    ]
)

_CLOSING = "”’」』》）)\\]\"'"
_END = re.compile(
    rf"[。！？…]+[{_CLOSING}]*"  # always an end
    rf"|[.!?]+[{_CLOSING}]*(?=[ \t\u3000]+[^\s a-z])"  # an end where a space follows, and then no small letter
    r"|\s*\n\s*"
)
_ABBREVIATION = re.compile(
    r"(?<![^\s(\"'“‘])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Rev|Hon|Gen|Col|Capt|Lt|Sgt|Messrs|Mme|Mlle|vs|cf|viz|No|Nos|Vol|Fig|Figs|Eq"
    r"|Sec|Ch|pp|Inc|Ltd|Co|Corp|e\.g|i\.e|etc|al|approx|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|U\.S|a\.m|p\.m)\.$"
)
_SPACE = " \t\u3000"


def spans(text: str) -> list[tuple[int, int]]:
    """(start, stop) of each sentence, without the white space around it; a line ends a sentence too."""
    found = []
    start = len(text) - len(text.lstrip())
    for match in _END.finditer(text):
        line = "\n" in match[0]
        stop = match.start() if line else match.end()
        if match[0][0] == "." and _ABBREVIATION.search(
            text, max(start, match.start() - 12), match.start() + 1
        ):
            continue
        if stop > start:
            found.append((start, stop))
        start = match.end()
        while start < len(text) and text[start] in _SPACE:
            start += 1
    end = len(text.rstrip())
    return [*found, (start, end)] if end > start else found


def cut(text: str, removed: list[tuple[int, int]]) -> str:
    """A text without the sentences at these (start, stop); the others keep their spaces, lines and indentation.

    A line that loses all its sentences goes with its end, and a blank line where two would meet.
    """
    merged: list[list[int]] = []
    for start, stop in sorted(removed):
        while stop < len(text) and text[stop] in _SPACE:
            stop += 1
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(stop, merged[-1][1])
        else:
            merged.append([start, stop])
    kept = []
    place = 0
    for start, stop in merged:
        if stop == len(text) or text[stop] == "\n":
            while start > place and text[start - 1] in _SPACE:
                start -= 1
            if start == 0 or text[start - 1] == "\n":
                stop = min(stop + 1, len(text))
                if (
                    text[max(start - 2, 0) : start] in ("", "\n", "\n\n")
                    and text[stop : stop + 1] == "\n"
                ):
                    stop += 1
        kept.append(text[place:start])
        place = stop
    return "".join([*kept, text[place:]])


def letters_of(text: str) -> str:
    """Letters and digits alone, of one width and case."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))


def find_sentences(
    part: int, given: dict[str, Any], file: ParquetFile, documents: Stage, config: SentencesConfig
) -> dict[str, int]:
    """Sentences of a part's documents that are long enough to be duplicates, those of documents in given["gone"] left out."""
    file.write(SENTENCES.empty_table())
    gone = set(given["gone"] or ())
    counts = {"sentences": 0, "compared": 0, "anchors": 0}
    least = {"zh": config.min_letters_zh, "en": config.min_letters_en}
    for table in read_part(documents, part, ["doc", "lang", "text"]):
        rows, letters, langs = [], [], []
        for doc, lang, text in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if text is None or doc in gone:
                continue
            for start, stop in spans(text):
                counts["sentences"] += 1
                if (
                    stop - start >= least[lang]
                    and len(found := letters_of(text[start:stop])) >= least[lang]
                ):
                    rows.append((doc, start, stop, len(text[start:stop].encode()), len(text)))
                    letters.append(found)
                    langs.append(lang)
        if not rows:
            continue
        first = (part << ROW_BITS) + counts["compared"]
        exact = [
            int.from_bytes(
                hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True
            )
            for text in letters
        ]
        anchors = (
            _anchors(letters, [RUN[lang] for lang in langs])
            if config.near
            else [[] for _ in letters]
        )
        columns = [
            range(first, first + len(rows)),
            *zip(*rows, strict=True),
            exact,
            anchors,
            letters,
        ]
        file.write(
            pa.table(
                [pa.array(c, field.type) for c, field in zip(columns, SENTENCES, strict=True)],
                schema=SENTENCES,
            )
        )
        counts["compared"] += len(rows)
        counts["anchors"] += sum(map(len, anchors))
    return counts


def _anchors(letters: list[str], runs: list[int]) -> list[np.ndarray]:
    """Hashes of about ANCHORS runs of each text: those whose hash is low, so that texts that are alike keep the same ones."""
    points = np.frombuffer("".join(letters).encode("utf-32-le"), np.uint32).astype(np.uint64)
    lengths = np.fromiter(map(len, letters), np.int64, len(letters))
    run = np.array(runs)
    ends = np.repeat(np.cumsum(lengths), lengths)
    place = np.arange(len(points))
    hashes = np.zeros(len(points), np.uint64)
    runs_there = np.repeat(run, lengths)
    for offset in range(max(runs)):
        inside = (offset < runs_there) & (place + offset < len(points))
        shifted = np.roll(points, -offset)
        hashes = np.where(inside, (hashes ^ shifted) * np.uint64(0x9E3779B97F4A7C15), hashes)
        hashes ^= hashes >> np.uint64(32)
    number = np.maximum(lengths - run + 1, 1)
    limit = np.repeat(np.minimum(1.0, ANCHORS / number), lengths)
    chosen = (place + runs_there <= ends) & (hashes < limit * (1 << 63) * 2)
    borders = np.cumsum(
        np.bincount(np.repeat(np.arange(len(letters)), lengths)[chosen], minlength=len(letters))
    )
    return np.split(hashes[chosen].view(np.int64), borders[:-1])


def find_repeated(
    engine: Engine, table: DataFrame, compared: int, anchors: int, config: SentencesConfig
) -> tuple[DataFrame, DataFrame]:
    """What goes: (doc, start, stop, bytes) of sentences, and (doc) of documents of which too little would be left."""
    groups = engine.in_buckets(compared, _equal, (table.select("sentence", "exact"), "exact"))
    if config.near:
        repeated = groups.where(col("sentence") != col("kept")).select("sentence")
        near = _nearly_equal(
            engine, table.join(repeated, on="sentence", how="anti"), anchors, config
        )
        onward = near.select(col("sentence").alias("kept"), col("kept").alias("onward"))
        groups = groups.join(onward, on="kept", how="left").select(
            "sentence", F.coalesce(col("onward"), col("kept")).alias("kept")
        )
        alone = near.join(groups.select("sentence"), on="sentence", how="anti")
        groups = groups.concat(alone)
    places = table.select("sentence", "doc", "start", "stop", "bytes", "size")
    groups = engine.in_buckets(compared, _placed, (groups, "sentence"), (places, "sentence"))
    emptied = engine.keep(_emptied(_all_but_first(groups), config))
    # What stayed in a document that goes now makes way for the next one like it. Other documents
    # only gain, so none goes after that.
    return _all_but_first(groups.join(emptied, on="doc", how="anti")).select(
        "doc", "start", "stop", "bytes"
    ), emptied


def _equal(table: DataFrame) -> DataFrame:
    """(sentence, kept) of all sentences whose letters occur more than once; kept is the first of them."""
    several = table.groupby("exact").agg(
        col("sentence").min().alias("kept"), col("sentence").max().alias("last")
    )
    several = several.where(col("kept") < col("last")).select("exact", "kept")
    return table.join(several, on="exact").select("sentence", "kept")


def _placed(groups: DataFrame, places: DataFrame) -> DataFrame:
    return groups.join(places, on="sentence")


def _all_but_first(groups: DataFrame) -> DataFrame:
    first = groups.groupby("kept").agg(col("sentence").min().alias("first"))
    return groups.join(first, on="kept").where(col("sentence") != col("first"))


def _emptied(removed: DataFrame, config: SentencesConfig) -> DataFrame:
    """(doc) of documents of which less than the share min_left is left."""
    length = (col("stop") - col("start")).alias("length")
    sums = (
        removed.select("doc", "size", length)
        .groupby("doc")
        .agg(col("length").sum().alias("gone"), col("size").max().alias("size"))
    )
    return sums.where(col("gone") > col("size") * lit(1 - config.min_left)).select("doc")


def _nearly_equal(
    engine: Engine, table: DataFrame, anchors: int, config: SentencesConfig
) -> DataFrame:
    """(sentence, kept) of sentences that are nearly equal to others, and of those that they are like."""
    exploded = table.select("sentence", col("anchors").alias("anchor")).explode("anchor")
    found = engine.in_buckets(anchors, _pairs, (exploded, "anchor"))
    rows = found.count_rows()
    pairs = engine.in_buckets(rows, _several, (found, "low"))
    letters = table.select("sentence", "letters")

    def of_low(pairs: DataFrame, letters: DataFrame) -> DataFrame:
        return pairs.join(
            letters.select(col("sentence").alias("low"), col("letters").alias("a")), on="low"
        )

    def of_high(pairs: DataFrame, letters: DataFrame) -> DataFrame:
        pairs = pairs.join(
            letters.select(col("sentence").alias("high"), col("letters").alias("b")), on="high"
        )
        alike: Any = _alike(col("a"), col("b"), config.threshold)
        return pairs.where(alike).select("low", "high")

    pairs = engine.in_buckets(rows, of_low, (pairs, "low"), (letters, "sentence"))
    edges = engine.keep(engine.in_buckets(rows, of_high, (pairs, "high"), (letters, "sentence")))
    labels = components(engine, edges).select(col("doc").alias("sentence"), "component")
    member = F.to_struct(col("sentence"), col("letters")).alias("members")
    clusters = (
        labels.join(letters, on="sentence")
        .select("component", member)
        .groupby("component")
        .agg(col("members").list_agg())
    )
    kept: Any = _keep_first(col("members"), lit(config.threshold))
    result = clusters.select(kept.alias("pair")).explode("pair")
    return engine.keep(
        result.select(
            col("pair").get("sentence").alias("sentence"), col("pair").get("kept").alias("kept")
        )
    )


def _several(found: DataFrame) -> DataFrame:
    """(low, high) of sentences that share anchors enough to be compared."""
    counted = found.groupby("low", "high").agg(col("low").count().alias("count"))
    return counted.where(col("count") >= lit(SHARED)).select("low", "high")


def _pairs(anchors: DataFrame) -> DataFrame:
    """(low, high), once for every anchor that two sentences share."""
    # The number is counted beside the list: daft's list_count imports every array library that is
    # installed.
    lists = anchors.groupby("anchor").agg(
        col("sentence").list_agg().alias("members"), col("sentence").count().alias("count")
    )
    pairs: Any = _pairs_of(col("members"))
    pairs = lists.where(col("count") > lit(1)).select(pairs.alias("pair")).explode("pair")
    pairs = pairs.where(~col("pair").is_null())
    return pairs.select(col("pair").get("low").alias("low"), col("pair").get("high").alias("high"))


PAIR = DataType.struct({"low": DataType.int64(), "high": DataType.int64()})


@daft.func.batch(return_dtype=DataType.list(PAIR))
def _pairs_of(members: daft.Series) -> Any:
    """Pairs (low, high), low < high, of each list: all of FEW members; of more, each with the first and with the last."""
    lists = members.to_arrow()
    sizes = np.diff(lists.offsets.to_numpy())
    value, owner = lists.flatten().to_numpy(), np.repeat(np.arange(len(sizes)), sizes)
    value = value[np.lexsort((value, owner))]  # the owners are in order already
    new = np.append(True, (value[1:] != value[:-1]) | (owner[1:] != owner[:-1]))[: len(value)]
    value, owner = value[new], owner[new]  # a sentence may have a run twice
    number = np.bincount(owner, minlength=len(sizes))
    start = np.cumsum(number) - number
    few = number[owner] <= FEW
    place = np.arange(len(value))
    found = []  # (places of low, places of high)
    for gap in range(1, FEW):
        low = np.flatnonzero(few[:-gap] & (owner[gap:] == owner[:-gap]))
        found.append((low, low + gap))
    first, last = start[owner], (start + number - 1)[owner]
    found.append((first[~few & (place > first)], place[~few & (place > first)]))
    inside = ~few & (place > first) & (place < last)
    found.append((place[inside], last[inside]))
    low, high = (np.concatenate(side) for side in zip(*found, strict=True))
    order = np.argsort(owner[low], kind="stable")
    pairs = pa.StructArray.from_arrays(
        [pa.array(value[side[order]]) for side in (low, high)], ["low", "high"]
    )
    offsets = np.append(0, np.cumsum(np.bincount(owner[low], minlength=len(sizes))))
    return daft.Series.from_arrow(
        pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pairs)
    )


@daft.func.batch(return_dtype=DataType.bool())
def _alike(left: daft.Series, right: daft.Series, threshold: float) -> Any:
    return alike(left.to_pylist(), right.to_pylist(), threshold)


def alike(left: list[str], right: list[str], threshold: float) -> np.ndarray:
    """Whether each pair of texts, of letters and digits alone, is nearly equal: bool [pairs].

    Their digits are the same, and so is the share `threshold` of their letters, in order; or all
    but two letters of short ones.
    """
    lengths = np.array(
        [[len(x), len(y)] for x, y in zip(left, right, strict=True)], np.int64
    ).reshape(-1, 2)
    limit = np.maximum((1 - threshold) * lengths.sum(axis=1), 4)
    result = (
        np.abs(lengths[:, 0] - lengths[:, 1]) <= limit
    )  # the distance is at least this difference
    some = np.flatnonzero(result)
    distance = cpdist(
        [left[i] for i in some], [right[i] for i in some], scorer=Indel.distance, dtype=np.int64
    )
    result[some] = distance <= limit[some]
    for index in np.flatnonzero(result):
        result[index] = _digits(left[index]) == _digits(right[index])
    return result


def _digits(letters: str) -> str:
    return re.sub(r"\D+", " ", letters)


@daft.func(
    return_dtype=DataType.list(
        DataType.struct({"sentence": DataType.int64(), "kept": DataType.int64()})
    )
)
def _keep_first(members: list, threshold: float) -> list[dict[str, int]]:
    left = sorted(members, key=lambda member: member["sentence"])
    result = []
    while left:
        first, rest = left[0], left[1:]
        near = alike(
            [first["letters"]] * len(rest), [member["letters"] for member in rest], threshold
        )
        like = [first, *itertools.compress(rest, near)]
        left = list(itertools.compress(rest, ~near))
        if len(like) > 1:
            result += [
                {"sentence": member["sentence"], "kept": first["sentence"]} for member in like
            ]
    return result
