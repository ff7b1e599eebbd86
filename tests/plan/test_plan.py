"""Ahead-of-time compilation for a topology: the real step with the real kernels.

What is reported of the compiled program is compared with formulas and with schedules by hand.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AbstractMesh
from launches import REPOSITORY, environment

from baichuan_jax.config.schema import Config, ConfigError, MeshConfig, ModelConfig
from baichuan_jax.hardware.accelerators import Topology, parse_topology
from baichuan_jax.hardware.flops import flops_per_token
from baichuan_jax.plan import __main__ as plan_command
from baichuan_jax.plan import hlo
from baichuan_jax.plan.ahead_of_time import Compiled
from baichuan_jax.plan.child import child_environment
from baichuan_jax.plan.prediction import STREAMS_FLAG, predict
from baichuan_jax.plan.rates import RATE_NAMES, Rates, assumptions_for, rates_for, read_rates
from baichuan_jax.plan.report import capacity_gib, show
from baichuan_jax.plan.roofline import axes_of
from baichuan_jax.plan.search import candidates, search, states
from baichuan_jax.sharding import AXES
from baichuan_jax.xla_flags import choose_flags

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
CUDA = any(map(importlib.util.find_spec, PLUGINS)) and importlib.util.find_spec("jax_triton")
needs_cuda = pytest.mark.skipif(
    not CUDA, reason="CUDA's compiler is not installed (make plan-deps)"
)
needs_tpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not installed (make plan-deps)"
)
RATES = Rates(
    matmul=0.5,
    kernel=1,
    memory=0.5,
    intra_node=0.5,
    inter_node=0.5,
    contention=0,
    straggler=0,
    launch_us=0,
    intra_latency_us=0,
    inter_latency_us=0,
)
SEVEN_B = ("--config", "configs/baichuan_7b_a800.yaml")
# Three narrow blocks compile in seconds.
NARROW = [
    "--model.num_layers=3",
    "--model.hidden_size=512",
    "--model.intermediate_size=1376",
    "--model.num_heads=4",
    "--model.vocab_size=2048",
    "--train.context_length=1024",
    "--train.loss_chunk_size=512",
]
NARROW_BLOCKS = 3 * (4 * 512**2 + 3 * 512 * 1376)  # their matrices' numbers


def plan(
    tmp_path, *argv: str, config: str = "baichuan_7b_a800"
) -> tuple[subprocess.CompletedProcess, dict]:
    """The command in a process of its own, and its report."""
    left_out = ("JAX_PLATFORMS", "XLA_FLAGS")
    variables = {name: value for name, value in environment().items() if name not in left_out}
    variables["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")
    path = tmp_path / "plan.json"
    options = [f"--config=configs/{config}.yaml", f"--json={path}", f"--output={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "baichuan_jax.plan", *options, *argv],
        env=variables,
        capture_output=True,
        text=True,
        timeout=900,
        cwd=REPOSITORY,
    )
    return done, json.loads(path.read_text()) if path.exists() else {}


def write_rates(folder: Path, **changes: object) -> Path:
    """A file of rates as benchmarks/gpu.py writes it."""
    content = {
        "device": "NVIDIA H100 80GB HBM3",
        "hardware": "h100",
        "date": "2026-11-27",
        "versions": {"jax": "0.11.2"},
        "rates": {"matmul": 0.71, "memory": 0.9, "launch_us": 2.1},
        "measured": {"products": [1, 2]},
    }
    path = folder / "rates.json"
    path.write_text(json.dumps(content | changes), encoding="utf-8")
    return path


@needs_cuda
@pytest.mark.parametrize("loops", [pytest.param("true", marks=pytest.mark.slow), "false"])
def test_sixteen_a800s(tmp_path, loops):
    text = tmp_path / "step.hlo"
    rates = write_rates(
        tmp_path, hardware="a100", rates={"matmul": 0.6, "kernel": 0.7, "launch_us": 4.5}
    )
    done, result = plan(
        tmp_path,
        "--topology=a800:2x8",
        f"--rates_file={rates}",
        "--rates.kernel=0.75",
        "--rates.straggler=0.002",
        "--rates.intra_latency_us=30",
        "--mesh.data=-1",
        "--mesh.state=1",
        "--train.global_batch_size=16",
        f"--hlo={text}",
        f"--model.scan_layers={loops}",
        *NARROW,
    )
    assert done.returncode == 0, done.stderr
    assert "ematerializ" not in done.stderr  # no involuntary full rematerialisation
    assert "cudart" not in done.stderr
    assert not (tmp_path / "compiled").exists()  # jax could not read such a program again
    assert result["num_devices"] == 16
    assert result["fits"]
    assert result["unknown"] == {}
    kernels = {"attention_rope", "attention_forward", "attention_dkv", "attention_dq", "rms_norm"}
    assert set(result["kernels"]) == kernels
    assert "triton_kernel_call" in text.read_text()

    # Counted: the formula, and what FlashAttention's backward pass computes again (9 products of
    # attention where the formula has 6).
    model = ModelConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1376, num_layers=3, num_heads=4
    )
    formula = flops_per_token(model, 1024)
    attention = formula[0] - formula[1]
    assert result["flops_per_token"] == pytest.approx(formula[1] + attention / 2, rel=0.02)

    # A measured rate replaces the default, a given one replaces both, and the report says which.
    defaults = rates_for(parse_topology("a800:2x8"))
    expected = dataclasses.replace(
        defaults,
        matmul=0.6,
        launch_us=4.5,
        kernel=0.75,
        straggler=0.002,
        intra_latency_us=30.0,
    )
    assert result["rates"] == dataclasses.asdict(expected)
    # The shares of the step's time are all of it, the slowest of the 16 devices with them.
    assert result["seconds"]["waiting for the slowest device"] > 0
    assert sum(result["seconds"].values()) == pytest.approx(result["predicted_step_seconds"])
    # The point lies in the interval, which is made of the ranges of all rates and of the network.
    low, high = result["predicted_mfu_interval"]
    assert low < result["predicted_mfu"] < high < low + 0.2
    assert set(result["assumptions"]) == {*RATE_NAMES, "inter_node_gbps", "schedule"}
    assert result["assumptions"]["kernel"] == [0.75, 0.75, 0.75, "given"]
    assert result["network"]["node_gbps"] == 8 * result["network"]["inter_node_gbps"] == 1600
    assert result["network"]["predicted_mfu"]["200"] == pytest.approx(result["predicted_mfu"])
    assert result["rows_per_device"] == 1
    assert "network: 200 Gb/s a GPU, 1,600 Gb/s a node (data sheet" in done.stdout
    sources = dict.fromkeys(("matmul", "launch_us"), "measured")
    sources |= dict.fromkeys(("kernel", "straggler", "intra_latency_us"), "given")
    assert result["rates_from"] == dict.fromkeys(RATE_NAMES, "default") | sources
    assert result["rates_file"]["path"] == str(rates)
    assert f"rates measured on NVIDIA H100 80GB HBM3 (a100), 2026-11-27: {rates}" in done.stdout
    assert "given instead of measured: kernel" in done.stdout

    # Parameters are gathered and gradients scattered inside a node, sums go between nodes, and
    # nothing else of size does.
    large = [item for item in result["collectives"] if item["bytes"] > 2e5]
    assert {(item["axis"], item["link"]) for item in large} == {
        ("fsdp", "intra_node"),
        ("data", "inter_node"),
    }
    assert {item["kind"] for item in large if item["axis"] == "data"} == {"all-reduce"}
    # A sum of several gradients takes them from where they are.
    sums = re.findall(r" all-reduce(?:-start)?\(([^)]*)\)", text.read_text())
    assert any("," in operands for operands in sums)
    assert not [operands for operands in sums if "concatenate" in operands]
    scattered = sum(
        item["bytes"] * item["count"] for item in large if item["kind"] == "reduce-scatter"
    )
    # Three blocks and the head in bfloat16.
    wanted = 2 * NARROW_BLOCKS + 2 * 512 * 2048
    assert scattered == pytest.approx(wanted, rel=0.02)
    assert not [
        item for item in result["collectives"] if item["in_loop"] and not item["asynchronous"]
    ]

    # No stack of gradients is copied into another order.
    if loops == "false":
        assert not re.findall(r"f32\[3,[\d,]*\]\S* copy\(", text.read_text())

    # A network of a tenth makes the same program slower.
    given = dataclasses.replace(parse_topology("a800:2x8").hardware, inter_node_gbps=20.0)
    slow = predict(
        hlo.parse(text.read_text()),
        mesh_of(data=2, fsdp=8),
        Topology(given, (2, 8)),
        Rates(**result["rates"]),
    )
    assert slow.seconds > result["predicted_step_seconds"]


def places(text: str, kind: str, size: int) -> tuple[list[tuple[int, int, list]], list[int]]:
    """In the order of the program: (start, end, arrays) of collectives over groups; products."""
    program, opened, found, products = hlo.parse(text), {}, [], []
    for place, (computation, item, _, depth) in enumerate(program.walk()):
        if item.opcode == f"{kind}-start":
            if hlo.replica_groups(item.attributes, 16).shape[1] == size:
                arrays = hlo.shape_arrays(
                    " ".join(computation.shape_of(name) for name in item.operands)
                )
                opened[item.name] = place, arrays
        elif item.opcode == f"{kind}-done" and item.operands[0] in opened:
            start, arrays = opened[item.operands[0]]
            found.append((start, place, arrays))
        elif depth == 0 and program.flops(computation, item) > 1e8:
            products.append(place)
    return sorted(found), products


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "rows", "dtype"), [(1, 32, None), (2, 16, None), (2, 48, None), (2, 32, "float32")]
)
def test_nodes_exchange_weights_and_gradients_block_by_block(tmp_path, state, rows, dtype):
    """Two nodes, with one copy each or with one together, in one to three micro-batches."""
    text = tmp_path / "step.hlo"
    done, result = plan(
        tmp_path,
        "--topology=a800:2x8",
        "--mesh.data=-1",
        f"--mesh.state={state}",
        f"--train.global_batch_size={rows}",
        *([f"--train.gradient_dtype={dtype}"] if dtype else []),
        f"--hlo={text}",
        *NARROW,
    )
    assert done.returncode == 0, done.stderr
    assert "ematerializ" not in done.stderr
    assert not re.findall(r"f32\[3,[\d,]*\]\S* copy\(", text.read_text())
    check_exchange(text.read_text(), result, state, dtype)


def check_exchange(text: str, result: dict, state: int, dtype: str | None) -> None:
    """Each matrix is gathered once and summed once, the last block's while others run."""
    kind = "reduce-scatter" if state > 1 else "all-reduce"
    between = [item for item in result["collectives"] if item["link"] == "inter_node"]
    large = [item for item in between if item["bytes"] > 2e5]
    matrices = (NARROW_BLOCKS + 2 * 512 * 2048) / 8  # a device's part in its node
    sent = {}
    for item in large:
        sent[item["kind"]] = sent.get(item["kind"], 0) + item["bytes"] * item["count"]
        assert item["axis"] == ("state" if state > 1 else "data")
        assert not item["in_loop"]
    wanted = {kind: (4 if dtype else 2) * matrices}
    if state > 1:
        wanted["all-gather"] = 2 * matrices
    assert sent == pytest.approx(wanted, rel=0.02)
    assert all(item["asynchronous"] for item in large if item["kind"] == kind)
    sums, products = places(text, kind, 2)
    # The head, then the last block alone, whose five matrices are one message.
    blocks = [found for found in sums if len(found[2]) == 5]
    assert blocks
    for start, end, arrays in blocks[:1]:
        assert {name for name, _ in arrays} == {"f32" if dtype else "bf16"}
        assert start < products[-1]
        # The first block's gradient leaves it after that; then the embedding is summed.
        embedding = next(found for found in sums if found[0] > products[-1])
        assert end < embedding[1]
    head = next(found for found in sums if len(found[2]) == 1)
    assert head[0] < products[-6]
    assert head[1] < blocks[0][0] or head[1] < products[-1]


@needs_cuda
@pytest.mark.slow
def test_a_thousand_a800s_are_as_fast_as_the_original(tmp_path):
    """The whole 7B step fits, computes little again, and hides its collectives."""
    done, result = plan(tmp_path, "--topology", "a800:128x8")
    assert done.returncode == 0, done.stderr
    assert result["num_devices"] == 1024
    assert result["fits"]
    assert result["peak_gib"] < 70
    assert result["recomputation"] == pytest.approx(1.0, abs=0.05)
    assert not [
        item for item in result["collectives"] if item["in_loop"] and not item["asynchronous"]
    ]
    assert result["seconds"]["waiting for collectives"] < 0.05 * result["predicted_step_seconds"]
    assert result["predicted_step_seconds"] <= result["predicted_step_seconds_without_profile"]
    # The original published 58.3 % on 1,000 cards.
    low, high = result["predicted_mfu_interval"]
    assert low < 0.583 < high
    assert result["predicted_mfu"] > 0.57


@pytest.mark.slow
@needs_tpu
def test_eight_v5p_chips_run_splash_attention(tmp_path):
    done, result = plan(
        tmp_path,
        "--topology=v5p:2x2x2",
        "--mesh.fsdp=4",
        "--train.global_batch_size=8",
        "--train.micro_batch_size=1",
        "--model.remat=full",
        *NARROW,
        config="baichuan_7b_v5p",
    )
    assert done.returncode == 0, done.stderr
    assert result["kernels"]["splash_mha_fwd"] > 0
    # remat full, and what splash attention computes again.
    assert result["recomputation"] == pytest.approx(4 / 3, abs=0.15)
    gathers = [
        item for item in result["collectives"] if item["kind"] == "all-gather" and item["in_loop"]
    ]
    assert {item["axis"] for item in gathers} == {"fsdp"}
    # libtpu 0.0.41 leaves some synchronous, 0.0.48 none.
    assert sum(item["asynchronous"] for item in gathers) >= len(gathers) / 2


@pytest.mark.slow
@needs_tpu
@pytest.mark.parametrize("loops", ["true", "false"])
def test_eight_v5p_chips_share_a_copy_between_replicas(tmp_path, loops):
    done, result = plan(
        tmp_path,
        "--topology=v5p:2x2x2",
        "--mesh.data=-1",
        "--mesh.fsdp=4",
        "--mesh.state=2",
        "--train.global_batch_size=16",
        "--train.micro_batch_size=1",
        f"--model.scan_layers={loops}",
        *NARROW,
        config="baichuan_7b_v5p",
    )
    assert done.returncode == 0, done.stderr
    kinds = {item["kind"] for item in result["collectives"] if item["axis"] == "state"}
    assert "all-gather" in kinds


def test_a_missing_compiler_is_named(tmp_path):
    variables = {**environment(), "PYTHONPATH": str(tmp_path)}
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m\nversion = m.version\n"
        "def hide(name):\n"
        "    if 'jax-cuda1' in name: raise m.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "m.version = hide\n"
    )
    command = [sys.executable, "-m", "baichuan_jax.plan", *SEVEN_B]
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=120, cwd=REPOSITORY
    )
    assert done.returncode == 78
    assert "jax-cuda12-plugin" in done.stderr
    assert "make plan-deps" in done.stderr


@pytest.mark.parametrize("name", ["h100", "h800", "h200"])
def test_measured_rates_serve_every_accelerator_of_their_compute_capability(tmp_path, name):
    found = read_rates(write_rates(tmp_path), parse_topology(f"{name}:1x8").hardware)
    assert found.rates == {"matmul": 0.71, "memory": 0.9, "launch_us": 2.1}
    assert (found.device, found.hardware, found.date) == (
        "NVIDIA H100 80GB HBM3",
        "h100",
        "2026-11-27",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": {"matmull": 0.7}}, "'matmull'; did you mean 'matmul'"),
        ({"rates": {"latency_us": 3}}, "did you mean '.*_us'"),
        ({"rates": {"memory": 0}}, "memory=0 must be a number of 1e-06 at least"),
        ({"rates": {"memory": float("nan")}}, "memory=nan must be"),
        ({"rates": {"launch_us": float("inf")}}, "launch_us=inf must be"),
        ({"rates": {"launch_us": 1e300}}, r"launch_us=1e\+300 must be"),
        ({"rates": {"matmul": 10**400}}, "matmul=1000.* must be"),
        ({"rates": {"matmul": True}}, "matmul=True must be"),
        ({"rates": {"matmul": "0.7"}}, "matmul='0.7' must be"),
        ({"rates": {"matmul": 71.0}}, "1.5 at most.*per cent"),
        ({"rates": [0.7]}, "must hold"),
        ({"date": None}, "must state its 'date'"),
        ({"hardware": "h1000"}, "none of a100, a800"),
        (
            {"hardware": "a100"},
            r"a100 \(compute capability 8.0\).* h800 \(compute capability 9.0\)",
        ),
        ({"hardware": "v5p"}, r"v5p .* h800 \(compute"),
    ],
)
def test_rates_that_cannot_be_meant_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=f"rates.json.*{message}"):
        read_rates(write_rates(tmp_path, **changes), parse_topology("h800:2x8").hardware)


def test_a_file_nested_too_deep_and_a_pipe_are_refused(tmp_path):
    deep, pipe = tmp_path / "deep.json", tmp_path / "pipe"
    deep.write_text("[" * 100_000)
    os.mkfifo(pipe)
    for path, words in ((deep, "is no JSON"), (pipe, "is no file")):
        with pytest.raises(ConfigError, match=words):
            read_rates(path, parse_topology("h100:1x8").hardware)


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "1e300"])
def test_a_rate_on_the_command_line_is_checked_too(rate):
    with pytest.raises(ConfigError, match=r"rates\.matmul"):
        plan_command.main([*SEVEN_B, "--topology", "h100:1x8", f"--rates.matmul={rate}"])


def test_one_tpus_rates_are_not_anothers(tmp_path):
    path = write_rates(tmp_path, hardware="v5p")
    assert read_rates(path, parse_topology("v5p:2x2x2").hardware).hardware == "v5p"
    with pytest.raises(ConfigError, match="measured on v5p and the topology is of v4"):
        read_rates(path, parse_topology("v4:2x2x2").hardware)


def test_a_rates_file_that_cannot_be_read_is_named(tmp_path):
    """The command refuses it before it looks for a compiler."""
    broken = tmp_path / "broken.json"
    broken.write_text('{"device": ')
    for path, reason in (
        (broken, "is no JSON"),
        (tmp_path / "none.json", "is no file"),
        (tmp_path, "is no file"),
    ):
        with pytest.raises(ConfigError, match=reason):
            read_rates(path, parse_topology("h100:1x8").hardware)
    done, _ = plan(tmp_path, "--topology", "h100:1x8", "--rates_file", str(broken))
    assert done.returncode == 78
    assert f"rates_file: {broken} is no JSON" in done.stderr


def test_a_sweep_passes_measured_rates_on(tmp_path, monkeypatch, capsys):
    report = {
        "num_devices": 8,
        "predicted_step_seconds": 1.0,
        "predicted_mfu": 0.5,
        "predicted_mfu_interval": [0.45, 0.55],
        "topology": "h100:512x8",
        "assumptions": {"matmul": [0.71, 0.68, 0.74, "measured"]},
        "assumptions_mfu": {"matmul": [0.48, 0.52]},
        "seconds": {"waiting for collectives": 0.0},
        "peak_gib": 1.0,
        "rates": {"matmul": 0.71},
        "rates_from": {"matmul": "measured"},
        "rates_file": {
            "device": "card",
            "hardware": "h100",
            "date": "today",
            "path": "rates.json",
            "rates": {"matmul": 0.71},
        },
    }
    given = []

    def child(argv, config, topology):
        given.append(argv[argv.index("--rates_file") + 1])
        Path(argv[argv.index("--json") + 1]).write_text(json.dumps(report))
        return 0

    monkeypatch.setattr(plan_command, "missing", lambda topology: [])
    monkeypatch.setattr(plan_command, "run_child", child)
    path = str(write_rates(tmp_path))
    argv = [*SEVEN_B, "--topology=h100:128x8", "--sweep=data", f"--output={tmp_path}"]
    assert plan_command.main([*argv, "--rates_file", path]) == 0
    assert given == [path] * 10
    printed = capsys.readouterr().out
    assert "rates measured on card (h100), today: rates.json" in printed
    assert "45.0 to 55.0%" in printed
    assert printed.startswith("network: 400 Gb/s a GPU, 3,200 Gb/s a node (data sheet")


def test_candidates_keep_the_batch_and_divide_it(tiny_config):
    found = list(candidates(tiny_config, 4))
    assert {item.model.remat for item in found} == {"none", "matmuls", "full"}
    assert {item.train.micro_batch_size for item in found} == {1, 2, 4}
    assert {item.train.global_batch_size for item in found} == {16}
    # Replicas that share a copy of the state have rows of their own.
    shared = dataclasses.replace(tiny_config, mesh=MeshConfig(data=2, state=2))
    assert {item.train.micro_batch_size for item in candidates(shared, 4)} == {1, 2, 4}


CHECKED = {"resilience": {"check_every": 5}}
COPIED = {"checkpoint": {"local_dir": "here", "local_every": 5}}


@pytest.mark.parametrize(
    ("devices", "changes", "sizes", "left"),
    [
        (8, {}, [1, 2, 4, 8], []),
        (6, {}, [1, 2], []),
        (8, CHECKED, [1, 2, 4], [([8], "resilience.check_every")]),
        (8, COPIED, [1], [([2, 4, 8], "checkpoint.local_dir")]),
        (1, CHECKED | COPIED, [1], []),
    ],
)
def test_the_state_is_shared_as_far_as_model_and_settings_allow(
    tiny_config, devices, changes, sizes, left
):
    for section, values in changes.items():
        part = dataclasses.replace(getattr(tiny_config, section), **values)
        tiny_config = dataclasses.replace(tiny_config, **{section: part})
    assert states(tiny_config, devices) == (sizes, left)


# By remat, rows a pass and mesh.state: milliseconds and GiB.
TIMES = {("none", 1): (100, 90), ("none", 4): (95, 120), ("matmuls", 1): (104, 50)}
BY_STATE = {1: 1.001, 2: 1.03, 4: 1.0}


def fake_report(config):
    remat, rows, state = config.model.remat, config.train.micro_batch_size, config.mesh.state
    milliseconds, gib = TIMES.get((remat, rows), (130, 40))
    seconds, peak = milliseconds * BY_STATE[state] / 1e3, gib * (2 if state == 1 else 1)
    wide = config.train.gradient_dtype == "bfloat16"
    named = {"remat": remat, "micro_batch_size": rows, "fits": peak <= 100, "peak_gib": peak}
    return named | {"predicted_step_seconds": seconds - wide * 0.05, "predicted_mfu": 0.5}


def test_the_search_tries_sizes_of_the_state_for_the_best_way_to_compute(tiny_config, monkeypatch):
    compiled = []

    def fake(config, *_):
        compiled.append(config)
        return fake_report(config)

    monkeypatch.setattr("baichuan_jax.plan.search._try", fake)
    cluster = parse_topology("a800:2x2")
    best, found = search(tiny_config, cluster, [], RATES)
    # 9 ways to compute, 2 more sizes of the state, another type of the gradients' sum.
    assert len(compiled) == len(found["search"]) == 12
    assert {item.train.global_batch_size for item in compiled} == {16}
    assert {item.mesh.data * item.mesh.state for item in compiled} == {4}
    # With the state in four parts `none` fits; in one part it does not, though as fast.
    assert (best.model.remat, best.train.micro_batch_size, best.mesh.state) == ("none", 1, 4)
    assert [item["state"] for item in found["search"]] == [4] * 9 + [1, 2, 4]
    # The faster sum is shown, and not chosen.
    assert [item["gradient_dtype"] for item in found["search"]][-2:] == ["float32", "bfloat16"]
    assert best.train.gradient_dtype is None
    assert found["search_left_out"] == []
    # Of equally fast ones the simpler.
    monkeypatch.setitem(TIMES, ("none", 1), (100, 50))
    assert search(tiny_config, cluster, [], RATES)[0].mesh.state == 1


def test_a_search_in_which_nothing_fits_says_what_each_takes(tiny_config, monkeypatch):
    cost = {"none": None, "matmuls": 90.0, "full": 80.0}

    def fake(config, *_):
        named = {"remat": config.model.remat, "micro_batch_size": config.train.micro_batch_size}
        return named | {"fits": False, "peak_gib": cost[config.model.remat]}

    monkeypatch.setattr("baichuan_jax.plan.search._try", fake)
    with pytest.raises(ConfigError, match=r"none x 1: too large.*full x 1: 80\.0 GiB") as error:
        search(tiny_config, parse_topology("a800:2x2"), [], RATES)
    assert "mesh.state=4" in str(error.value)


def test_a_gpu_keeps_room_for_nccl_and_context():
    assert capacity_gib(parse_topology("a800:1x8").hardware) == pytest.approx(0.92 * 79.25)


def mesh_of(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(name, 1) for name in AXES), AXES)


def test_groups_of_devices_are_named_by_their_axes():
    mesh = mesh_of(data=2, fsdp=4, tensor=2)
    numbers = np.arange(16).reshape(2, 4, 2)
    assert axes_of(numbers.transpose(1, 2, 0).reshape(-1, 2), mesh) == "data"
    assert axes_of(numbers.transpose(0, 2, 1).reshape(-1, 4), mesh) == "fsdp"
    assert axes_of(numbers.reshape(-1, 16), mesh) == "data+fsdp+tensor"
    assert axes_of(np.array([[0, 3], [1, 2]]), mesh) == "?"
    # Of a permute around a ring of fsdp the pairs are parts of its lines.
    ring = np.array([[0, 2], [2, 4], [4, 6], [6, 0], [9, 11]])
    assert axes_of(ring, mesh, pairs=True) == "fsdp"
    assert axes_of(np.array([[0, 3]]), mesh, pairs=True) == "fsdp+tensor"


def with_bandwidth(name: str, gigabytes: float) -> Topology:
    """A topology with other links inside its nodes."""
    topology = parse_topology(name)
    hardware = dataclasses.replace(topology.hardware, intra_node_bandwidth=gigabytes)
    return dataclasses.replace(topology, hardware=hardware)


STEP = """HloModule step, is_scheduled=true

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

ENTRY %main (a: f32[1000,1000], b: f32[1000,1000]) -> f32[1000,1000] {
  %a = f32[1000,1000]{1,0} parameter(0)
  %b = f32[1000,1000]{1,0} parameter(1)
  %start = f32[1000,1000]{1,0} all-reduce-start(%a), replica_groups={{0,1},{2,3}}, to_apply=%sum
  %product = f32[1000,1000]{1,0} dot(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %done = f32[1000,1000]{1,0} all-reduce-done(%start)
}
"""


@pytest.mark.parametrize("bandwidth", [0.1, 1000.0])
def test_a_collective_costs_what_the_compute_beside_it_does_not_hide(bandwidth):
    """By hand: the product takes 2e9 / (312e12/2) s, the sum of 4 MB 4e6 / (bandwidth/2) s."""
    topology = with_bandwidth("a800:1x4", bandwidth)
    prediction = predict(hlo.parse(STEP), mesh_of(data=2, fsdp=2), topology, RATES)
    product = max(2e9 / (312e12 / 2), 12e6 / (2039e9 / 2))
    collective = 4e6 / (bandwidth * 1e9 / 2)
    assert prediction.seconds == pytest.approx(max(product, collective))
    assert prediction.exposed_seconds == pytest.approx(max(collective - product, 0))
    (found,) = prediction.collectives
    assert (found.axis, found.link, found.count) == ("fsdp", "intra_node", 1)
    assert found.asynchronous


BOTH_LINKS = """HloModule step, is_scheduled=true

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

ENTRY %main (a: f32[1000,1000]) -> (f32[1000,1000], f32[2000,1000]) {
  %a = f32[1000,1000]{1,0} parameter(0)
  %sum-start = f32[1000,1000]{1,0} all-reduce-start(%a), replica_groups={{0,2},{1,3}}, to_apply=%sum
  %gather-start = f32[2000,1000]{1,0} all-gather-start(%a), replica_groups={{0,1},{2,3}}
  %gather-done = f32[2000,1000]{1,0} all-gather-done(%gather-start)
  %sum-done = f32[1000,1000]{1,0} all-reduce-done(%sum-start)
  ROOT %both = (f32[1000,1000]{1,0}, f32[2000,1000]{1,0}) tuple(%sum-done, %gather-done)
}
"""


@pytest.mark.parametrize("streams", [1, 2])
def test_a_gather_inside_a_node_waits_for_a_sum_over_nodes_on_the_same_stream(streams, monkeypatch):
    """By hand: the sum passes 4 MB at 12.5 GB/s, the gather behind it 4 MB at 100 GB/s."""
    monkeypatch.setenv("XLA_FLAGS", STREAMS_FLAG if streams == 2 else "")
    mesh = mesh_of(data=2, fsdp=2)
    found = predict(hlo.parse(BOTH_LINKS), mesh, parse_topology("a800:2x2"), RATES)
    total, gather = 4e6 / 12.5e9, 4e6 / 100e9
    assert found.seconds == pytest.approx(total + gather if streams == 1 else total)
    waited = {item.kind: item.exposed_seconds for item in found.collectives}
    assert waited["all-gather"] == pytest.approx(total + gather if streams == 1 else gather)


def test_the_flags_keep_collectives_on_one_stream(tiny_config):
    """The prediction reads the flag of the environment, which the flags then have to be in."""
    flags = choose_flags(tiny_config, parse_topology("a800:2x8")).xla
    assert not any("multi_streaming" in flag for flag in flags)


SPARSE_CORES = """HloModule step, is_scheduled=true

%gather (shard: f32[500,1000]) -> f32[1000,1000] {
  %shard = f32[500,1000]{1,0} parameter(0)
  ROOT %gathered = f32[1000,1000]{1,0} all-gather(%shard), replica_groups={{0,1},{2,3}}
}, execution_thread="sparsecore"

ENTRY %main (a: f32[500,1000], b: f32[1000,1000]) -> f32[1000,1000] {
  %a = f32[500,1000]{1,0} parameter(0)
  %b = f32[1000,1000]{1,0} parameter(1)
CALL
  %product = f32[1000,1000]{1,0} dot(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %done = f32[1000,1000]{1,0} call-done(%AWAITED)
}
"""
THREAD = 'async_execution_thread="sparsecore", to_apply=%gather'
CALL_WITH_OPERAND = f"""\
  %start = ((f32[500,1000]), f32[1000,1000]) call-start(%a), {THREAD}"""
PRODUCT = "dot(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
CALL_THEN_OPERAND = f"""\
  %start = ((), (), s32[]) call-start(), {THREAD}
  %before = f32[1000,1000]{{1,0}} {PRODUCT}
  %update = ((f32[500,1000]), f32[1000,1000]) call-update(%start, %a)"""


@pytest.mark.parametrize(
    ("call", "awaited", "products_before"),
    [(CALL_WITH_OPERAND, "start", 0), (CALL_THEN_OPERAND, "update", 1)],
    ids=["libtpu 0.0.41", "libtpu 0.0.48"],
)
@pytest.mark.parametrize("bandwidth", [0.1, 1000.0])
def test_a_gather_on_sparse_cores_runs_beside_what_follows_its_operand(
    call, awaited, products_before, bandwidth
):
    """By hand: the gather passes half of 4 MB, beside the product that follows its operand."""
    topology = with_bandwidth("v5p:2x2x1", bandwidth)
    text = SPARSE_CORES.replace("CALL", call).replace("AWAITED", awaited)
    prediction = predict(hlo.parse(text), mesh_of(data=2, fsdp=2), topology, RATES)
    product = max(2e9 / (459e12 / 2), 12e6 / (2765e9 / 2))
    gather = 2e6 / (bandwidth * 1e9 / 2)
    assert prediction.seconds == pytest.approx(products_before * product + max(product, gather))
    (found,) = prediction.collectives
    assert (found.kind, found.axis, found.count) == ("all-gather", "fsdp", 1)
    assert found.asynchronous
    assert found.exposed_seconds == pytest.approx(max(gather - product, 0))


@pytest.mark.parametrize(("share", "used"), [(0.9, True), (0.999, False), (1.1, False)])
def test_the_faster_of_two_schedules_is_kept(tiny_config, tmp_path, capsys, share, used):
    """The program by hand is its sum; with a profile the sum is `share` as long."""
    profiles, sizes = [], []

    def compile_step(profile=None):
        profiles.append(profile and profile.read_text())
        sizes.append(f"{1000 * (share if profile else 1):.0f},1000")
        text = STEP.replace("1000,1000", sizes[-1])
        memory: dict[str, int] = dict.fromkeys(
            ("arguments", "temporaries", "outputs", "aliased"), 0
        )
        config = dataclasses.replace(tiny_config, mesh=MeshConfig(data=2, fsdp=2))
        state = {"parameters": 0, "optimiser": 0}
        return Compiled(config, mesh_of(data=2, fsdp=2), text, memory, state, 0.0)

    topology = with_bandwidth("a800:1x4", 0.1)
    kept, text = tmp_path / "a800-1x4.pbtxt", tmp_path / "step.hlo"
    kept.write_text("of an earlier plan")
    options = {"output": str(tmp_path), "hlo": str(text)}
    result = plan_command._compile_twice(compile_step, topology, assumptions_for(topology), options)
    times = [result[f"predicted_step_seconds_{way}_profile"] for way in ("without", "with")]
    assert times[1] / times[0] == pytest.approx(share, rel=0.005)
    assert result["predicted_step_seconds"] == times[used]
    assert profiles[0] is None
    assert 'name: "start"' in profiles[1]
    assert sizes[used] in text.read_text()
    # Only a profile that is used is offered, and may be wrong.
    assert ("schedule_profile" in result) == ("schedule" in result["assumptions"]) == used
    assert kept.exists() == used
    assert not used or kept.read_text() == profiles[1]
    show(result | {"rates_file": None})
    words = "scheduled with a profile" if used else "scheduled without a profile"
    assert words in capsys.readouterr().out


@needs_tpu
def test_replicas_that_share_a_copy_are_neighbours_on_a_torus():
    """Data and state divide one axis of the torus, which jax gives to one axis of a mesh."""
    code = (
        "import json\n"
        "from baichuan_jax.config.schema import MeshConfig\n"
        "from baichuan_jax.hardware.accelerators import parse_topology\n"
        "from baichuan_jax.plan.ahead_of_time import described_devices\n"
        "from baichuan_jax.sharding import make_mesh\n"
        "devices = described_devices(parse_topology('v5p:4x4x8'))\n"
        "mesh = make_mesh(MeshConfig(data=4, state=2, fsdp=16), devices)\n"
        "print(json.dumps([[d.coords for d in ds] for ds in mesh.devices[:, :, 0, 0, 0]]))\n"
    )
    variables = child_environment(Config(), parse_topology("v5p:4x4x8"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    for one, other in json.loads(done.stdout):
        apart = [
            min(abs(a - b), n - abs(a - b)) for a, b, n in zip(one, other, (4, 4, 8), strict=True)
        ]
        assert sorted(apart) == [0, 0, 1]
