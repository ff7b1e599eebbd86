"""MinHash against true similarities, components against union-find, what of a cluster stays."""

import random

import pytest

pytest.importorskip("daft")
import daft
import numpy as np

from baichuan_jax.data.corpus.components import components
from baichuan_jax.data.corpus.config import DedupConfig
from baichuan_jax.data.corpus.tables import Tables
from baichuan_jax.data.near_duplicates import (
    HASHES,
    SIGNATURES,
    find_duplicates,
    minhash,
    similarity,
    units_of,
)


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Tables:
    return Tables(tmp_path_factory.mktemp("scratch"))


def test_hashes_estimate_the_jaccard_similarity():
    """Within four standard errors of the true similarity of sets of 5-grams, in both languages."""
    rng = random.Random(0)
    for lang, space in (("zh", ""), ("en", " ")):
        words = (
            [chr(0x4E00 + i) for i in range(3000)]
            if lang == "zh"
            else [f"word{i}" for i in range(3000)]
        )
        for share in (0, 0.01, 0.03, 0.1):
            base = rng.choices(words, k=600)
            other = [rng.choice(words) if rng.random() < share else word for word in base]
            grams = [{tuple(text[i : i + 5]) for i in range(596)} for text in (base, other)]
            true = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
            a, b = minhash(
                units_of([space.join(text) for text in (base, other)], [lang] * 2)
            ).astype(np.uint16)
            found = similarity([a.tobytes()], [b.tobytes()])[0]
            assert abs(found - true) <= 4 * (true * (1 - true) / HASHES) ** 0.5 + 1e-9


def test_width_case_and_punctuation_do_not_count():
    texts = ["Ｈｅｌｌｏ,  WORLD! don't", "你好，世界！ＡＢ", "——", "第1章\nABC，（二）", "②", "一"]
    langs = ["en", *["zh"] * 5]
    assert units_of(texts, langs) == [
        "hello world don t",
        "你 好 世 界 a b",
        "",
        "第 1 章 a b c 二",
        "2",
        "一",
    ]
    assert units_of([], []) == []
    plain = "_It's_ 3.14 --\tor so;\n\nTHE END\x0c"
    assert (
        units_of([plain, f"{plain}\u2014"], ["en"] * 2) == ["it s 3 14 or so the end"] * 2
    )  # ASCII alone, and not


@pytest.mark.parametrize("seed", range(3))
def test_components_are_those_of_union_find(tables, seed):
    rng = random.Random(seed)
    edges = {tuple(sorted(rng.sample(range(400), 2))) for _ in range(250)}
    edges |= {(i, i + 1) for i in range(1000, 1100)} | {
        (2000, 2000 + i) for i in range(1, 50)
    }  # a chain and a star
    parent: dict[int, int] = {}

    def find(node: int) -> int:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for low, high in edges:
        a, b = find(low), find(high)
        parent[max(a, b)] = min(a, b)
    low, high = zip(*rng.sample(sorted(edges), len(edges)), strict=True)
    table = daft.from_pydict({"low": list(low), "high": list(high)})
    found = components(tables, table).to_pydict()
    assert len(found["doc"]) == len(set(found["doc"]))
    assert dict(zip(found["doc"], found["component"], strict=True)) == {
        node: find(node) for node in parent
    }


@pytest.mark.parametrize("rows_at_once", [2 << 20, 3])
def test_the_best_of_a_cluster_stays_and_only_what_is_like_it_is_removed(
    tables, monkeypatch, rows_at_once
):
    """A chain of four documents, each like the next only; an exact copy; and one that is alone."""
    # The same in memory and a few rows at a time.
    monkeypatch.setattr("baichuan_jax.data.corpus.tables.ROWS_AT_ONCE", rows_at_once)
    rng = np.random.default_rng(0)
    sketches = [rng.integers(0, 65536, HASHES, dtype=np.uint16)]
    for _ in range(3):
        step = sketches[-1].copy()
        step[rng.choice(HASHES, HASHES // 5, replace=False)] = rng.integers(0, 65536, HASHES // 5)
        sketches.append(step)
    sketches += [sketches[1], rng.integers(0, 65536, HASHES, dtype=np.uint16)]
    ranks = [1, 3, 2, 5, 3, 9]  # the best of the chain is its last; documents 1 and 4 are equal
    rows = [
        {
            "doc": 10 + i,
            "rank": rank,
            "exact": [0, 1, 2, 3, 1, 5][i],
            "bands": [7, i] if i < 5 else [8, i],
            "sketch": sketches[i].tobytes(),
        }
        for i, rank in enumerate(ranks)
    ]
    for order in (rows, rows[::-1]):
        table = daft.from_pydict({name: [row[name] for row in order] for name in SIGNATURES.names})
        pairs = find_duplicates(tables, table, DedupConfig(threshold=0.75)).to_pydict()
        assert dict(zip(pairs["doc"], pairs["kept"], strict=True)) == {12: 13, 10: 11, 14: 11}
