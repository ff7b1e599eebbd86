"""`make bench` runs every benchmark, writes each table to its place, and reports failures."""

import functools
import importlib.util
import sys

import ml_dtypes
import numpy as np
import pytest
from launches import REPOSITORY

from baichuan_jax.plan.__main__ import main as plan_main
from baichuan_jax.plan.rates import RATE_NAMES

# Parts of benchmarks, or for a GPU.
HELPERS = {"all", "results", "clock", "corpus_truth", "corpus_score", "garbage"}
HELPERS |= {"gpu", "gpu_bundle", "published_runs"}
PAGE = """before
<!-- machine: written by make bench -->
<!-- end -->
<!-- one: written by make bench -->
old
<!-- end -->
after
"""


def load(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(monkeypatch):
    return load("all", monkeypatch)


@pytest.fixture
def validation(monkeypatch):
    pytest.importorskip("tqdm")
    return load("plan_validation", monkeypatch)


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


def test_published_runs_are_steps_that_can_be_planned(validation, monkeypatch):
    """Their options are valid configurations, which compile one step of them."""
    planned = []

    def step(argv, config, topology):
        mesh = config.mesh.resolve(topology.num_devices)
        config.check_mesh(mesh)
        planned.append((topology, config.accumulation_steps(mesh), mesh.fsdp, mesh.state))
        return 0

    monkeypatch.setattr("baichuan_jax.plan.__main__.run_child", step)
    monkeypatch.setattr("baichuan_jax.plan.__main__.missing", lambda topology: [])
    monkeypatch.chdir(REPOSITORY)
    # Reading a configuration takes most of a second.
    for run in validation.RUNS[::6]:
        assert plan_main(validation.plan_options(run)) == 0
        topology, *ways = planned[-1]
        assert ways == [run.accumulation, run.fsdp, 1]
        assert topology.num_devices == 8 * run.nodes
        for name, value in run.hardware.items():
            assert getattr(topology.hardware, name) == value
    for run in validation.RUNS:
        assert run.settings.get("model.hidden_size", 4096) % run.fsdp == 0
        assert 8 * run.nodes % run.fsdp == 0
        assert run.kind in ("a100", "h100")
    assert len({run.name for run in validation.RUNS}) == len(validation.RUNS)


def test_a_program_of_other_sources_is_not_used(validation, tmp_path):
    """Whatever makes a program is in its name: sources, configuration, and by options the rates."""
    pytest.importorskip("triton")
    pytest.importorskip("jax_triton")
    configuration = tmp_path / "one.yaml"
    (tmp_path / "plan").mkdir()
    for path in (configuration, tmp_path / "step.py", tmp_path / "plan" / "rates.py"):
        path.write_text("before")
    found = []
    for path in (tmp_path / "plan" / "rates.py", tmp_path / "step.py", configuration):
        path.write_text("after")
        validation.makers.cache_clear()
        found.append(validation.makers(tmp_path, configuration))
    path.write_text("before")
    (tmp_path / "step.py").write_text("before")
    validation.makers.cache_clear()
    assert found[0] == validation.makers(tmp_path, configuration)
    assert len(set(found)) == 3
    # The table of rates changes no program, because each rate is given.
    for run in validation.RUNS:
        given = [option.split("=")[0] for option in validation.plan_options(run)]
        assert {f"--rates.{name}" for name in RATE_NAMES} <= set(given)


def test_a_published_runs_seconds_are_of_a_whole_step(validation):
    # llm-foundry: 7B, 8 A100-80GB, micro-batch 6, 2 of them, global batch 96, 37,130 tokens/s.
    (run,) = [r for r in validation.RUNS if r.tokens_per_second == 4641]
    assert run.rows * run.accumulation * 8 == 96
    assert run.seconds == pytest.approx(96 * 2048 / 37130, rel=1e-3)


def test_each_run_is_predicted_by_the_others(validation):
    # Two choices of rates: the first fits the first run alone, the second the others.
    errors = np.array([[0.0, 0.5], [0.1, 0.0], [0.1, 0.01]])
    assert validation.left_out(errors) == [1, 0, 0]
    # One run of far slower software does not decide for the others.
    odd = np.array([[0.9, 0.0], [0.0, 0.2], [0.0, 0.2], [0.0, 0.2], [0.0, 0.2], [0.0, 0.2]])
    assert validation.best(odd) == 0


def test_slower_software_is_not_taken_for_a_slower_network(validation):
    """Of runs of two sources, one with slower kernels, the network's share is found again."""
    matmul, network = np.array([0.5, 0.6, 0.7, 0.8]), np.array([0.4, 0.6, 0.8])
    sources = ["fast", "fast", "slow", "slow"]
    # Compute of 7 s at the whole peak, and so many seconds of the whole network.
    waits = np.array([0.0, 2.0, 0.0, 3.0])

    def seconds(share, network):
        return 7 / share + waits[:, None, None] / network

    own = np.array([0.8 if name == "fast" else 0.5 for name in sources])
    measured = 7 / own + waits / 0.6
    errors = seconds(matmul[None, :, None], network[None, None, :]) / measured[:, None, None] - 1
    left = validation.without_software(errors, sources)
    assert np.abs(left[:, 1]).max() < 1e-12
    assert network[validation.best(left)] == 0.6
    assert validation.as_good(left, network) == (0.6, 0.6)
    # With one share of products for both, no network explains them.
    assert np.abs(errors).mean(axis=0).min() > 0.05
