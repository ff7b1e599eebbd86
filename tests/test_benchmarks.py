"""`make bench` runs every benchmark, writes each table to its place, and reports failures."""

import functools
import importlib.util
import sys

import ml_dtypes
import numpy as np
import pytest
from launches import REPOSITORY

# Parts of benchmarks, or for a GPU.
HELPERS = {"all", "results", "clock", "corpus_truth", "corpus_score", "garbage"}
HELPERS |= {"gpu", "gpu_bundle"}
PAGE = """before
<!-- machine: written by make bench -->
<!-- end -->
<!-- one: written by make bench -->
old
<!-- end -->
after
"""


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench", REPOSITORY / "benchmarks" / "all.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    spec.loader.exec_module(module)
    return module


def test_every_benchmark_is_run_and_has_a_place_on_the_page(bench):
    run = {command.split(".py")[0] for command in bench.BENCHMARKS.values()}
    assert run == {path.stem for path in (REPOSITORY / "benchmarks").glob("*.py")} - HELPERS
    page = (REPOSITORY / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name in [*bench.BENCHMARKS, "machine"]:
        assert "new words" in bench.put(page, name, "new words")


def test_a_table_takes_the_place_of_its_last_one_alone(bench):
    table = {"title": "a | b", "columns": ["", "s"], "rows": [["x|y", "1"]]}
    text = bench.put(PAGE, "one", bench.markdown("one.py", [table], 1.6))
    assert text.startswith("before\n<!-- machine")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    assert "|  | s |\n|---|---|\n| x\\|y | 1 |" in text
    assert bench.put(text, "one", "old") == PAGE.replace("\nold\n", "\n\nold\n\n")
    with pytest.raises(SystemExit, match="no place for 'two'"):
        bench.put(PAGE, "two", "")


def test_a_failure_is_reported_and_the_others_run(bench, tmp_path, monkeypatch, capfd):
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("one:", "right:"), encoding="utf-8")
    (tmp_path / "benchmarks").mkdir()
    table = {"title": "t", "columns": ["c"], "rows": [["cell"]]}
    good = f"import json, sys; json.dump({{'tables': [{table}]}}, open(sys.argv[2], 'w'))"
    (tmp_path / "benchmarks" / "good.py").write_text(good)
    (tmp_path / "benchmarks" / "bad.py").write_text("raise SystemExit('a reason')")
    monkeypatch.setattr(bench, "REPOSITORY", tmp_path)
    monkeypatch.setattr(bench, "BENCHMARKS", {"wrong": "bad.py", "right": "good.py"})
    monkeypatch.setattr(sys, "argv", ["all.py", "--docs", str(page)])
    assert bench.main() == 1
    said = capfd.readouterr().out
    assert "a reason" in said
    assert "failed: wrong" in said
    assert "| cell |" in page.read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["all.py", "three"])
    with pytest.raises(SystemExit):
        bench.main()


def test_gradients_are_summed_in_the_orders_of_nccl(monkeypatch):
    """Against NumPy's bfloat16: one after the other, in nodes of 8 and between them, in pairs."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import mixed_precision

    parts = np.random.default_rng(0).normal(size=(32, 1000)).astype(np.float32)
    found = mixed_precision.sums(
        {"embedding": a, "lm_head": b, "final_norm": c, "layers": {"w_up": d}}
        for a, b, c, d in (np.split(part, 4) for part in parts)
    )
    ordered = lambda tree: (
        *(tree[n] for n in ("embedding", "lm_head", "final_norm")),
        tree["layers"]["w_up"],
    )
    got = {order: np.concatenate(ordered(tree)) for order, tree in found.items()}
    half = list(parts.astype(ml_dtypes.bfloat16))
    one_by_one = functools.partial(functools.reduce, np.add)
    pairs = half
    while len(pairs) > 1:
        pairs = [a + b for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    wanted = {
        "exact": parts.sum(0, dtype=np.float64),
        "float32": one_by_one(list(parts)),
        "ring": one_by_one(half),
        "nodes": one_by_one([one_by_one(half[i : i + 8]) for i in range(0, 32, 8)]),
        "tree": pairs[0],
    }
    assert got.keys() == wanted.keys()
    for order, total in wanted.items():
        np.testing.assert_array_equal(got[order], total.astype(got[order].dtype), err_msg=order)
    errors = mixed_precision.relative(found["ring"], found["exact"])
    for kind, part in {"all": slice(None), "blocks": slice(750, None)}.items():
        difference = (wanted["ring"].astype(np.float64) - wanted["exact"])[part]
        expected = np.linalg.norm(difference) / np.linalg.norm(wanted["exact"][part])
        assert errors[kind] == pytest.approx(expected)
    # Small angles: half the square of the part of the error across the gradient.
    angle = mixed_precision.one_minus_cosine(found["ring"], found["exact"])
    assert 0 < angle <= errors["all"] ** 2 / 2 * 1.01
