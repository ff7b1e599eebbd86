"""benchmarks/kernels.py leaves no implementation out and times none that is wrong."""

import importlib.util
import json
import sys

import pytest
from launches import REPOSITORY

SIZES = ["--length=40", "--heads=2", "--head-size=8", "--rows=9", "--width=24", "--rounds=1"]


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """The benchmark as a module, its command line set."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    spec = importlib.util.spec_from_file_location(
        "kernels_benchmark", REPOSITORY / "benchmarks" / "kernels.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    monkeypatch.setattr(
        sys, "argv", ["kernels.py", *SIZES, "--json", str(tmp_path / "results.json")]
    )
    return module


def saved_results(tmp_path):
    """Implementations and their results: of attention, RMSNorm without and with a residual."""
    saved = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    return [result["implementations"] for result in saved["results"]]


def test_every_implementation_is_timed_or_has_a_reason(benchmark, tmp_path):
    benchmark.main()
    attention, *norms = saved_results(tmp_path)
    timed = {"reference", "blockwise", "jax.nn xla"}
    missing = {"triton", "cudnn", "pallas"}
    (timed if importlib.util.find_spec("torch") else missing).add("torch sdpa")
    assert timed | missing == {name for name in attention if not name.startswith("tokamax")}
    assert all(
        {"reference", "triton", "pallas"}
        == {name for name in norm if not name.startswith("tokamax")}
        for norm in norms
    )
    assert "tokamax triton" in attention
    for name in missing:
        assert attention[name]["why_not"]
    for name in timed:
        assert attention[name]["forward"]["seconds"] > 0
        assert attention[name]["both"]["seconds"] > 0
    assert "GPU" in attention["triton"]["why_not"]
    assert "TPU" in norms[1]["pallas"]["why_not"]


def test_a_wrong_implementation_is_not_timed(benchmark, tmp_path, monkeypatch):
    right = benchmark.attention

    def wrong(qkv, rope, implementation):
        out = right(qkv, rope, implementation=implementation)
        return out * 1.05 if implementation == "blockwise" else out

    monkeypatch.setattr(benchmark, "attention", wrong)
    with pytest.raises(SystemExit, match="blockwise"):
        benchmark.main()
    attention = saved_results(tmp_path)[0]
    assert attention["blockwise"]["why_not"].startswith("WRONG")
    assert "forward" not in attention["blockwise"]
    assert "forward" in attention["reference"]
