"""`make bench` runs every benchmark, writes each table to its place, and reports failures."""

import importlib.util
import sys

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
