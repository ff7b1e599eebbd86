"""Chooses which of the clean documents a corpus takes: drawn by quality, within a budget of bytes.

Input: the documents that are left, with quality, frequency and size. Output: the ones left out. A
document is drawn where 1 - quality is below a draw from a Pareto distribution, as GPT-3 did with
web pages (Brown et al. 2020, https://arxiv.org/abs/2005.14165, appendix A): good ones nearly
always, bad ones seldom. Of what is drawn each category takes as many bytes as it may hold, best
quality first.
"""

import hashlib
from typing import Any

import daft  # pyright: ignore[reportMissingImports]
import daft.functions as F  # pyright: ignore[reportMissingImports]
import numpy as np
from daft import DataFrame, DataType, col, lit  # pyright: ignore[reportMissingImports]

from baichuan_jax.data.corpus.config import OTHERS, SelectConfig
from baichuan_jax.data.corpus.effects import Effects
from baichuan_jax.data.corpus.filter import Corpus
from baichuan_jax.data.corpus.tables import Tables, read_stage

# Of quality: budgets are found from sums over bins, so that only one bin's documents are sorted.
BINS = 4096


class Selection:
    """The filter."""

    name = "select"

    def __init__(self, config: SelectConfig) -> None:
        self.config = config

    def run(self, corpus: Corpus) -> Effects:
        if self.config.pareto_alpha is None and not self.config.max_bytes:
            return Effects()
        key = [corpus.documents.key, corpus.scores_key, *corpus.effects.keys, self.config]
        key, found = corpus.make_table(
            "select", key, lambda: select(corpus.tables, _candidates(corpus), self.config)
        )
        return Effects(key, removed=found)


def _candidates(corpus: Corpus) -> DataFrame:
    """(doc, id, source, bytes, frequency, quality) of what is left, bytes as they will be."""
    zero, one = (lit(number).cast(DataType.int64()) for number in (0, 1))
    tables = corpus.effects.tables
    cut = tables["cut"].groupby("doc").agg(col("bytes").sum().alias("cut"))
    copies = tables["copies"].select("doc", col("count").alias("frequency"))
    left = corpus.remaining("id", "source", "clean_bytes")
    # Most documents have neither cuts nor copies.
    left = left.join(cut, on="doc", how="left").join(copies, on="doc", how="left")
    left = left.select(
        "doc",
        "id",
        "source",
        (col("clean_bytes") - F.coalesce(col("cut"), zero)).alias("bytes"),
        F.coalesce(col("frequency"), one).alias("frequency"),
    )
    if corpus.scores is None:
        return left.with_column("quality", lit(0.0))
    return left.join(read_stage(corpus.scores), on="doc")


def select(tables: Tables, documents: DataFrame, config: SelectConfig) -> DataFrame:
    """(doc, reason) of what is left out; `documents` as _candidates gives them."""
    # Kept (`Tables.keep`), since both tables below are made from it.
    is_drawn: Any = _drawn(col("id"), col("quality"), config)
    judged = tables.keep(documents.with_column("drawn", is_drawn))
    refused = judged.where(~col("drawn")).select("doc", lit("not_drawn").alias("reason"))
    if not config.max_bytes:
        return refused
    return refused.concat(_over_budget(judged.where(col("drawn")), config))


@daft.func.batch(return_dtype=DataType.bool())
def _drawn(name: daft.Series, quality: daft.Series, config: SelectConfig) -> Any:
    return drawn(name.to_pylist(), np.array(quality.to_pylist(), float), config)


def drawn(names: list[str], quality: np.ndarray, config: SelectConfig) -> np.ndarray:
    """Whether each document is drawn: bool [documents].

    A function of seed and id, so that a document's draw does not depend on the rest of the corpus.
    """
    if config.pareto_alpha is None:
        return np.ones(len(names), bool)
    # A hash in place of a random generator: it needs no order of documents.
    hashes = [
        hashlib.blake2b(f"{config.seed}:{name}".encode(), digest_size=6).digest() for name in names
    ]
    uniform = np.array([int.from_bytes(digest, "little") / 2**48 for digest in hashes])
    # The inverse of the distribution function of a Pareto distribution that begins at 0 (Lomax).
    pareto = (1 - uniform) ** (-1 / config.pareto_alpha) - 1
    return pareto > 1 - quality


def _over_budget(documents: DataFrame, config: SelectConfig) -> DataFrame:
    """(doc, reason) of documents beyond their category's budget.

    First come those of best quality, then of highest frequency.
    """
    budget: Any = _budget(col("source"), config.max_bytes)
    binned = documents.with_column("budget", budget).where(~col("budget").is_null())
    binned = binned.with_column("bin", (col("quality") * lit(BINS)).cast(DataType.int64()))
    last, left = _last_bins(binned)
    borders = daft.from_pydict({"source": list(last), "last": list(last.values())})
    # An empty list has no type of its own.
    borders = borders.select(
        col("source").cast(DataType.string()), col("last").cast(DataType.int64())
    )
    cut = binned.join(borders, on="source")
    order = cut.where(col("bin") == col("last")).sort(
        ["source", "quality", "frequency", "doc"], desc=[False, True, True, False]
    )
    # In this order until the budget is spent. A document that does not fit is left out, and so are
    # all after it, though a smaller one might fit.
    beyond = []
    for row in order.select("source", "doc", "bytes").to_pylist():
        left[row["source"]] -= row["bytes"]
        if left[row["source"]] < 0:
            beyond.append(row["doc"])
    at_border = daft.from_pydict({"doc": beyond}).select(col("doc").cast(DataType.int64()))
    over = cut.where(col("bin") < col("last")).select("doc").concat(at_border)
    return over.select("doc", lit("over_budget").alias("reason"))


def _last_bins(binned: DataFrame) -> tuple[dict[str, int], dict[str, int]]:
    """The bin in which each category's budget ends, and bytes left of the budget before that bin.

    Categories whose documents all fit have no such bin.
    """
    sums = binned.groupby("source", "budget", "bin").agg(col("bytes").sum().alias("bytes"))
    left: dict[str, int] = {}
    last: dict[str, int] = {}
    # From the best bin downwards.
    for row in sorted(sums.to_pylist(), key=lambda row: (row["source"], -row["bin"])):
        source = row["source"]
        if source not in last:
            left.setdefault(source, row["budget"])
            if row["bytes"] > left[source]:
                last[source] = row["bin"]
            else:
                left[source] -= row["bytes"]
    return last, left


@daft.func.batch(return_dtype=DataType.int64())
def _budget(source: daft.Series, limits: dict[str, int]) -> Any:
    return [limits.get(name, limits.get(OTHERS)) for name in source.to_pylist()]
