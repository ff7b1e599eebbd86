"""Connected components of a graph whose edges are a table, by alternating large and small stars.

Input: pairs of things that are alike. Output: for each thing its component, named by its first
member. Each round replaces a thing's edges by edges to the least of its neighbours, first for the
neighbours that come after it, then for those that come before; until nothing changes every
component becomes a star around its first member. The number of rounds grows with the logarithm of a
component's size, and every round is two joins, so it works on tables of any size (Kiveris et al.
2014, https://doi.org/10.1145/2670979.2670997).
"""

from typing import Any

import daft  # pyright: ignore[reportMissingImports]
import daft.functions as F  # pyright: ignore[reportMissingImports]
import numpy as np
from daft import DataFrame, DataType, col  # pyright: ignore[reportMissingImports]

from baichuan_jax.data.corpus.tables import Tables


def components(tables: Tables, edges: DataFrame) -> DataFrame:
    """(doc, component) of all numbers in edges (low, high), low < high."""
    pairs = edges.select(col("high").alias("doc"), col("low").alias("to"))
    before = None
    while True:
        # Both stars are kept (`Tables.keep`): a lazy plan would hold all rounds before this one and
        # compute them again for every use.
        pairs = _small_star(tables, _large_star(tables, pairs))
        # Two sets of edges with the same count and sum of hashes are the same set.
        mixed = pairs.select(_mixed(col("doc"), col("to")).alias("mixed"))
        count, total = col("mixed").count().alias("count"), col("mixed").sum().alias("sum")
        state = mixed.agg(count, total).to_pylist()
        if state == before:
            break
        before = state
    labels = pairs.select("doc", col("to").alias("component"))
    # A star has no edge from its own centre.
    firsts = pairs.select(col("to").alias("doc"), col("to").alias("component")).distinct()
    return labels.concat(firsts)


def _large_star(tables: Tables, pairs: DataFrame) -> DataFrame:
    """Every neighbour that comes after `doc` is joined to the first of all neighbours and doc."""
    both = pairs.concat(pairs.select(col("to").alias("doc"), col("doc").alias("to")))
    first = both.groupby("doc").agg(col("to").min().alias("first"))
    # The first of the neighbours may come after the document itself.
    least = F.when(col("first") < col("doc"), col("first")).otherwise(col("doc"))
    joined = both.join(first.select("doc", least.alias("first")), on="doc")
    large = joined.where(col("to") > col("doc"))
    return tables.keep(large.select(col("to").alias("doc"), col("first").alias("to")).distinct())


def _small_star(tables: Tables, large: DataFrame) -> DataFrame:
    """`doc`, and its neighbours that come before it, are joined to the first of them."""
    first = large.groupby("doc").agg(col("to").min().alias("first"))
    others = large.join(first, on="doc").where(col("to") != col("first"))
    small = others.select(col("to").alias("doc"), col("first").alias("to"))
    return tables.keep(small.concat(first.select("doc", col("first").alias("to"))).distinct())


@daft.func.batch(return_dtype=DataType.int64())
def _mixed(doc: daft.Series, to: daft.Series) -> Any:
    """A number below 2^31 for each edge, whose sum changes when an edge does."""
    a, b = (np.asarray(side.to_arrow()).astype(np.uint64) for side in (doc, to))
    mixed = (a * np.uint64(0x9E3779B97F4A7C15)) ^ (b * np.uint64(0xBF58476D1CE4E5B9))
    # 31 bits: sums of billions of edges stay within an int64.
    return (mixed >> np.uint64(33)).astype(np.int64)
