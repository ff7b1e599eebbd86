"""Which of the clean documents a corpus takes: sampled by quality, and as many bytes of each category as it may hold."""

import hashlib
from typing import Any

import daft  # pyright: ignore[reportMissingImports]
import numpy as np
from daft import DataFrame, DataType, col, lit  # pyright: ignore[reportMissingImports]

from baichuan_jax.data.corpus.config import SelectConfig
from baichuan_jax.data.corpus.engine import Engine

BINS = 4096  # of quality: budgets are found from sums over bins, so that only the last bin's documents are sorted
OTHERS = "*"  # a setting for every category that has none of its own


def select(engine: Engine, documents: DataFrame, config: SelectConfig) -> DataFrame:
    """(doc, reason) of what is left out. `documents`: doc, id, source, quality, frequency, bytes."""
    drawn: Any = _drawn(col("id"), col("quality"), config)
    judged = engine.keep(documents.with_column("drawn", drawn))
    refused = judged.where(~col("drawn")).select("doc", lit("not_drawn").alias("reason"))
    if not config.max_bytes:
        return refused
    return refused.concat(_over_budget(judged.where(col("drawn")), config))


def low_quality(documents: DataFrame, least: dict[str, float]) -> DataFrame:
    """(doc) of documents (doc, source, lang, quality) whose quality is below their category's or language's least."""
    limit: Any = _limit(col("source"), col("lang"), least)
    return documents.where(col("quality") < limit).select("doc")


@daft.func.batch(return_dtype=DataType.float64())
def _limit(source: daft.Series, lang: daft.Series, least: dict[str, float]) -> Any:
    pairs = zip(source.to_pylist(), lang.to_pylist(), strict=True)
    return [
        least.get(name, least.get(language, least.get(OTHERS, 0.0))) for name, language in pairs
    ]


@daft.func.batch(return_dtype=DataType.bool())
def _drawn(name: daft.Series, quality: daft.Series, config: SelectConfig) -> Any:
    return drawn(name.to_pylist(), np.array(quality.to_pylist(), float), config)


def drawn(names: list[str], quality: np.ndarray, config: SelectConfig) -> np.ndarray:
    """Whether each document is drawn: bool [documents]. A function of seed and id, whatever else is in the corpus."""
    if config.pareto_alpha is None:
        return np.ones(len(names), bool)
    hashes = [
        hashlib.blake2b(f"{config.seed}:{name}".encode(), digest_size=6).digest() for name in names
    ]
    uniform = np.array([int.from_bytes(digest, "little") / 2**48 for digest in hashes])
    return (1 - uniform) ** (
        -1 / config.pareto_alpha
    ) - 1 > 1 - quality  # the Pareto (Lomax) distribution by its inverse


def _over_budget(documents: DataFrame, config: SelectConfig) -> DataFrame:
    """(doc, reason) of documents beyond their category's budget; first come those of best quality, then of highest frequency."""
    limits = config.max_bytes
    budget: Any = _budget(col("source"), limits)
    binned = documents.with_column("budget", budget).where(~col("budget").is_null())
    binned = binned.with_column("bin", (col("quality") * lit(BINS)).cast(DataType.int64()))
    sums = (
        binned.groupby("source", "budget", "bin").agg(col("bytes").sum().alias("bytes")).to_pylist()
    )
    left: dict[str, int] = {}
    last: dict[str, int] = {}  # the bin in which a category's budget ends
    for row in sorted(sums, key=lambda row: (row["source"], -row["bin"])):
        source = row["source"]
        if source not in last:
            left.setdefault(source, row["budget"])
            if row["bytes"] > left[source]:
                last[source] = row["bin"]
            else:
                left[source] -= row["bytes"]
    borders = daft.from_pydict({"source": list(last), "last": [last[source] for source in last]})
    borders = borders.select("source", col("last").cast(DataType.int64()))
    cut = binned.join(borders, on="source")
    order = cut.where(col("bin") == col("last")).sort(
        ["source", "quality", "frequency", "doc"], desc=[False, True, True, False]
    )
    beyond = []
    for row in order.select("source", "doc", "bytes").to_pylist():
        left[row["source"]] -= row["bytes"]
        if left[row["source"]] < 0:
            beyond.append(row["doc"])
    at_border = daft.from_pydict({"doc": beyond}).select(col("doc").cast(DataType.int64()))
    over = cut.where(col("bin") < col("last")).select("doc").concat(at_border)
    return over.select("doc", lit("over_budget").alias("reason"))


@daft.func.batch(return_dtype=DataType.int64())
def _budget(source: daft.Series, limits: dict[str, int]) -> Any:
    return [limits.get(name, limits.get(OTHERS)) for name in source.to_pylist()]
