"""Cuts out sentences that occurred before, equal or nearly equal; of those alike the first stays.

Input: documents. Output: the characters to cut out of each, and the documents to remove because too
little of them is left. Equal sentences have the same letters and digits in the same order. Nearly
equal ones have nearly the same letters in the same order, and the same digits: "Article 12" is not
"Article 13". To find them without comparing each with each, a sentence is known by anchors: hashes
of short runs of its letters, and of these the lowest, so that two sentences that are alike keep the
same ones (winnowing, Schleimer et al. 2003, https://doi.org/10.1145/872757.872770). Sentences that
share anchors are compared letter by letter, by their distance in insertions and deletions
(rapidfuzz).
"""

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

from baichuan_jax.data.corpus.components import components
from baichuan_jax.data.corpus.config import SentencesConfig
from baichuan_jax.data.corpus.effects import SPACE, Effects
from baichuan_jax.data.corpus.filter import Corpus
from baichuan_jax.data.corpus.parts import ROW_BITS, DocumentPart, ParquetFile, hash_of, table_of
from baichuan_jax.data.corpus.tables import Tables, read_stage

# Letters of a run. A sentence with one letter of ten replaced keeps a run of 5 Chinese characters,
# and nearly always one of 12 Latin letters.
RUN = {"zh": 4, "en": 8}
# Runs kept of each sentence, by hash: so many that alike sentences share some, few enough to join.
ANCHORS = 20
# Anchors that two sentences must share to be compared. One may be a common phrase.
SHARED = 2
# The sentences of an anchor are compared each with each up to this number; of more, each with the
# first and the last, since their pairs would grow with the square.
FEW = 8
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
    # Always an end.
    rf"[。！？…]+[{_CLOSING}]*"
    # An end where a space follows, and then no small letter.
    rf"|[.!?]+[{_CLOSING}]*(?=[ \t\u3000]+[^\s a-z])"
    r"|\s*\n\s*"
)
# A full stop after one of these, or after an initial, ends no sentence.
_ABBREVIATION = re.compile(
    r"(?<![^\s(\"'“‘])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Rev|Hon|Gen|Col|Capt|Lt|Sgt|Messrs|Mme"
    r"|Mlle|vs|cf|viz|No|Nos|Vol|Fig|Figs|Eq|Sec|Ch|pp|Inc|Ltd|Co|Corp|e\.g|i\.e|etc|al|approx|Jan"
    r"|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|U\.S|a\.m|p\.m)\.$"
)


class Sentences:
    """The filter."""

    name = "sentences"

    def __init__(self, config: SentencesConfig) -> None:
        self.config = config

    def run(self, corpus: Corpus) -> Effects:
        if not self.config.enabled:
            return Effects()
        key = [corpus.documents.key, *corpus.effects.keys, self.config]
        sentences, counts = corpus.make_parts(
            "sentence-keys", key, self._find_sentences, with_effects=True
        )
        # How many rows will meet decides into how many buckets the tables are cut.
        compared, anchors = (
            sum(count[name] for count in counts) for name in ("compared", "anchors")
        )

        def find() -> DataFrame:
            table = read_stage(sentences)
            cuts, emptied = find_repeated(corpus.tables, table, compared, anchors, self.config)
            # One table holds both: of an emptied document the place is null.
            none = lit(None).cast(DataType.int64())
            places = (none.alias(name) for name in ("start", "stop", "bytes"))
            return cuts.concat(emptied.select("doc", *places))

        key, found = corpus.make_table("sentences", [sentences.key], find)
        emptied = found.where(col("start").is_null()).select("doc")
        removed = emptied.with_column("reason", lit("too_little_left"))
        return Effects(key, removed=removed, cut=found.where(~col("start").is_null()))

    def _find_sentences(self, part: DocumentPart, file: ParquetFile) -> dict[str, int]:
        """Write SENTENCES: those of documents still here that are long enough to be duplicates."""
        file.write(SENTENCES.empty_table())
        # Their sentences do not count: what only they have is no repetition elsewhere.
        removed = {row["doc"] for row in part.effect("removed")}
        counts = {"sentences": 0, "compared": 0, "anchors": 0}
        least = {"zh": self.config.min_letters_zh, "en": self.config.min_letters_en}
        for table in part.read(["doc", "lang", "text"]):
            rows, letters, langs = [], [], []
            columns = (column.to_pylist() for column in table.columns)
            for doc, lang, text in zip(*columns, strict=True):
                if text is None or doc in removed:
                    continue
                for start, stop in spans(text):
                    counts["sentences"] += 1
                    # The first test is the cheap one: letters are no more than characters.
                    if stop - start < least[lang]:
                        continue
                    found = letters_of(text[start:stop])
                    if len(found) >= least[lang]:
                        rows.append((doc, start, stop, len(text[start:stop].encode()), len(text)))
                        letters.append(found)
                        langs.append(lang)
            if not rows:
                continue
            first = (part.number << ROW_BITS) + counts["compared"]
            runs = [RUN[lang] for lang in langs]
            anchors = _anchors(letters, runs) if self.config.near else [[]] * len(letters)
            numbered = zip(itertools.count(first), rows, letters, anchors, strict=False)
            file.write(
                table_of(
                    [(n, *row, hash_of(x.encode()), a, x) for n, row, x, a in numbered], SENTENCES
                )
            )
            counts["compared"] += len(rows)
            counts["anchors"] += sum(map(len, anchors))
        return counts


# Sentences of one text


def spans(text: str) -> list[tuple[int, int]]:
    """(start, stop) of each sentence, without the white space around it; a line ends one too."""
    found = []
    start = len(text) - len(text.lstrip())
    for match in _END.finditer(text):
        line = "\n" in match[0]
        stop = match.start() if line else match.end()
        # Looked for in the last 12 characters: no abbreviation is longer.
        if match[0][0] == "." and _ABBREVIATION.search(
            text, max(start, match.start() - 12), match.start() + 1
        ):
            continue
        if stop > start:
            found.append((start, stop))
        start = match.end()
        while start < len(text) and text[start] in SPACE:
            start += 1
    end = len(text.rstrip())
    return [*found, (start, end)] if end > start else found


def letters_of(text: str) -> str:
    """Letters and digits alone, of one width and case."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))


def _anchors(letters: list[str], runs: list[int]) -> list[np.ndarray]:
    """Hashes of about ANCHORS runs of each text: those whose hash is low.

    All texts at once, as one array of code points; a run that reaches into the next text is left
    out at the end.
    """
    points = np.frombuffer("".join(letters).encode("utf-32-le"), np.uint32).astype(np.uint64)
    lengths = np.fromiter(map(len, letters), np.int64, len(letters))
    run = np.array(runs)
    ends = np.repeat(np.cumsum(lengths), lengths)
    place = np.arange(len(points))
    hashes = np.zeros(len(points), np.uint64)
    runs_there = np.repeat(run, lengths)
    # A run's hash: its letters mixed in, one after the other, for all runs of all texts together.
    for offset in range(max(runs)):
        inside = (offset < runs_there) & (place + offset < len(points))
        shifted = np.roll(points, -offset)
        hashes = np.where(inside, (hashes ^ shifted) * np.uint64(0x9E3779B97F4A7C15), hashes)
        hashes ^= hashes >> np.uint64(32)
    number = np.maximum(lengths - run + 1, 1)
    # The limit falls with a text's length, so that long texts keep no more than short ones.
    limit = np.repeat(np.minimum(1.0, ANCHORS / number), lengths)
    chosen = (place + runs_there <= ends) & (hashes < limit * (1 << 63) * 2)
    owner = np.repeat(np.arange(len(letters)), lengths)[chosen]
    borders = np.cumsum(np.bincount(owner, minlength=len(letters)))
    return np.split(hashes[chosen].view(np.int64), borders[:-1])


def alike(left: list[str], right: list[str], threshold: float) -> np.ndarray:
    """Whether each pair of texts, of letters and digits alone, is nearly equal: bool [pairs].

    Their digits are the same, and so is the share `threshold` of their letters, in order; or all
    but two letters of short ones.
    """
    pairs = [[len(x), len(y)] for x, y in zip(left, right, strict=True)]
    lengths = np.array(pairs, np.int64).reshape(-1, 2)
    limit = np.maximum((1 - threshold) * lengths.sum(axis=1), 4)
    # The distance is at least the difference of the lengths: most pairs need no comparison.
    result = np.abs(lengths[:, 0] - lengths[:, 1]) <= limit
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


# Repeated sentences of the whole corpus


def find_repeated(
    tables: Tables, table: DataFrame, compared: int, anchors: int, config: SentencesConfig
) -> tuple[DataFrame, DataFrame]:
    """(doc, start, stop, bytes) of sentences to cut, and (doc) of documents to remove.

    `table` has the columns of SENTENCES, `compared` rows with `anchors` anchors. A removed document
    is one of which too little would be left.
    """
    # Equal sentences first, by one hash each: most repetitions are exact and need no comparison.
    groups = tables.in_buckets(compared, _equal, (table.select("sentence", "exact"), "exact"))
    if config.near:
        # Of equal sentences only the first is compared with others.
        repeated = groups.where(col("sentence") != col("kept")).select("sentence")
        distinct = table.join(repeated, on="sentence", how="anti")
        near = _nearly_equal(tables, distinct, anchors, config)
        groups = _merged(groups, near)
    places = table.select("sentence", "doc", "start", "stop", "bytes", "size")
    groups = tables.in_buckets(compared, _placed, (groups, "sentence"), (places, "sentence"))
    emptied = tables.keep(_emptied(_all_but_first(groups), config))
    # A sentence that would have stayed in a removed document stays in the next one that has it.
    # Documents only gain by that, so none has to be removed after it.
    remaining = groups.join(emptied, on="doc", how="anti")
    return _all_but_first(remaining).select("doc", "start", "stop", "bytes"), emptied


def _equal(table: DataFrame) -> DataFrame:
    """(sentence, kept) of sentences whose letters occur more than once; kept: the first of them."""
    kept, last = col("sentence").min().alias("kept"), col("sentence").max().alias("last")
    several = table.groupby("exact").agg(kept, last).where(col("kept") < col("last"))
    return table.join(several.select("exact", "kept"), on="exact").select("sentence", "kept")


def _merged(groups: DataFrame, near: DataFrame) -> DataFrame:
    """Groups (sentence, kept) of equal sentences, joined where their first ones are alike."""
    onward = near.select(col("sentence").alias("kept"), col("kept").alias("onward"))
    kept = F.coalesce(col("onward"), col("kept")).alias("kept")
    merged = groups.join(onward, on="kept", how="left").select("sentence", kept)
    alone = near.join(merged.select("sentence"), on="sentence", how="anti")
    return merged.concat(alone)


def _placed(groups: DataFrame, places: DataFrame) -> DataFrame:
    return groups.join(places, on="sentence")


def _all_but_first(groups: DataFrame) -> DataFrame:
    first = groups.groupby("kept").agg(col("sentence").min().alias("first"))
    return groups.join(first, on="kept").where(col("sentence") != col("first"))


def _emptied(removed: DataFrame, config: SentencesConfig) -> DataFrame:
    """(doc) of documents of which less than the share min_left is left."""
    lengths = removed.select("doc", "size", (col("stop") - col("start")).alias("length"))
    total, size = col("length").sum().alias("removed"), col("size").max().alias("size")
    sums = lengths.groupby("doc").agg(total, size)
    return sums.where(col("removed") > col("size") * lit(1 - config.min_left)).select("doc")


def _nearly_equal(
    tables: Tables, table: DataFrame, anchors: int, config: SentencesConfig
) -> DataFrame:
    """(sentence, kept) of sentences nearly equal to others, and of those that they are like."""
    # A sentence becomes a row for each anchor; sentences with an anchor in common then meet.
    exploded = table.select("sentence", col("anchors").alias("anchor")).explode("anchor")
    found = tables.in_buckets(anchors, _pairs, (exploded, "anchor"))
    rows = found.count_rows()
    pairs = tables.in_buckets(rows, _several, (found, "low"))
    letters = table.select("sentence", "letters")

    def of_low(pairs: DataFrame, letters: DataFrame) -> DataFrame:
        low = letters.select(col("sentence").alias("low"), col("letters").alias("a"))
        return pairs.join(low, on="low")

    def of_high(pairs: DataFrame, letters: DataFrame) -> DataFrame:
        high = letters.select(col("sentence").alias("high"), col("letters").alias("b"))
        near: Any = _alike(col("a"), col("b"), config.threshold)
        return pairs.join(high, on="high").where(near).select("low", "high")

    pairs = tables.in_buckets(rows, of_low, (pairs, "low"), (letters, "sentence"))
    edges = tables.keep(tables.in_buckets(rows, of_high, (pairs, "high"), (letters, "sentence")))
    labels = components(tables, edges).select(col("doc").alias("sentence"), "component")
    member = F.to_struct(col("sentence"), col("letters")).alias("members")
    members = labels.join(letters, on="sentence").select("component", member)
    clusters = members.groupby("component").agg(col("members").list_agg())
    kept: Any = _keep_first(col("members"), lit(config.threshold))
    result = clusters.select(kept.alias("pair")).explode("pair")
    names = ("sentence", "kept")
    return tables.keep(result.select(*(col("pair").get(name).alias(name) for name in names)))


def _several(found: DataFrame) -> DataFrame:
    """(low, high) of sentences that share anchors enough to be compared."""
    counted = found.groupby("low", "high").agg(col("low").count().alias("count"))
    return counted.where(col("count") >= lit(SHARED)).select("low", "high")


def _pairs(anchors: DataFrame) -> DataFrame:
    """(low, high), once for every anchor that two sentences share."""
    # The number is counted beside the list: daft's list_count imports every array library that is
    # installed.
    members, count = col("sentence").list_agg().alias("members"), col("sentence").count()
    lists = anchors.groupby("anchor").agg(members, count.alias("count"))
    pairs: Any = _pairs_of(col("members"))
    pairs = lists.where(col("count") > lit(1)).select(pairs.alias("pair")).explode("pair")
    pairs = pairs.where(~col("pair").is_null())
    return pairs.select(*(col("pair").get(name).alias(name) for name in ("low", "high")))


PAIR = DataType.struct({"low": DataType.int64(), "high": DataType.int64()})


@daft.func.batch(return_dtype=DataType.list(PAIR))
def _pairs_of(members: daft.Series) -> Any:
    """Pairs (low, high), low < high, of each list of sentences.

    Of lists of up to FEW each with each; of longer ones each with the first and with the last. All
    lists at once: `value` holds the sentences of all, `owner` the list that each is of.
    """
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
    # Back to one list for each list given.
    order = np.argsort(owner[low], kind="stable")
    sides = [pa.array(value[side[order]]) for side in (low, high)]
    pairs = pa.StructArray.from_arrays(sides, ["low", "high"])
    offsets = np.append(0, np.cumsum(np.bincount(owner[low], minlength=len(sizes))))
    result = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pairs)
    return daft.Series.from_arrow(result)


@daft.func.batch(return_dtype=DataType.bool())
def _alike(left: daft.Series, right: daft.Series, threshold: float) -> Any:
    return alike(left.to_pylist(), right.to_pylist(), threshold)


@daft.func(
    return_dtype=DataType.list(
        DataType.struct({"sentence": DataType.int64(), "kept": DataType.int64()})
    )
)
def _keep_first(members: list, threshold: float) -> list[dict[str, int]]:
    """The first of a component stays with what is like it, then the first of the others.

    As with documents, a chain of likenesses is no likeness of its ends.
    """
    left = sorted(members, key=lambda member: member["sentence"])
    result = []
    while left:
        first, rest = left[0], left[1:]
        letters = [member["letters"] for member in rest]
        near = alike([first["letters"]] * len(rest), letters, threshold)
        like = [first, *itertools.compress(rest, near)]
        left = list(itertools.compress(rest, ~near))
        if len(like) > 1:
            kept = first["sentence"]
            result += [{"sentence": member["sentence"], "kept": kept} for member in like]
    return result
