"""The stages of `make gpu`: wrong numbers are found, and a failure costs as little as possible."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from launches import REPOSITORY

STAGES = REPOSITORY / "benchmarks" / "gpu_stages"
for folder in (STAGES, STAGES.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import checks
import costs
import numerics
import products
import speed
import stage as stage_module
import step
import training
from stage import SMALL, Stage

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.hardware.accelerators import HARDWARE
from baichuan_jax.plan.rates import read_rates
from baichuan_jax.plan.roofline import BOUNDS
from baichuan_jax.runs.events import Event, Restored, Started
from baichuan_jax.runs.folder import Run


@pytest.fixture
def stage(tmp_path) -> Stage:
    (tmp_path / "output").mkdir()
    return Stage(SMALL, tmp_path / "state.json", tmp_path, tmp_path / "output", 60.0)


def report(stage: Stage) -> dict:
    return json.loads(stage._state.read_text())


SMALL_ERRORS = {"largest": 1e-3, "norm": 1e-3, "row": 1e-3}
RIGHT = {
    "largest_error": 1e-3,
    "norm_error": 1e-3,
    "worst": "dq",
    "same_bits": True,
    "poison_works": True,
    "errors": {"out": SMALL_ERRORS, "dq": {**SMALL_ERRORS, "row": 0.3}},
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"largest_error": 0.5}, "largest error 5.0e-01"),
        ({"norm_error": float("nan")}, "norm nan"),
        ({"largest_error": float("nan")}, "largest error nan"),
        ({"same_bits": False}, "different bits"),
        ({"errors": {"out": {**SMALL_ERRORS, "row": 0.02}}}, "a row of out is off by 2.0e-02"),
        ({"errors": {"dk": {**SMALL_ERRORS, "row": 1.0}}}, "a row of dk is off by 1.0e+00"),
        ({"errors": {"dk": {**SMALL_ERRORS, "row": float("nan")}}}, "a row of dk is off by nan"),
        ({"torch_error": 0.3}, "differs from torch"),
        ({"error": "CUDA_ERROR_ILLEGAL_ADDRESS"}, "ILLEGAL_ADDRESS"),
    ],
)
def test_wrong_numbers_are_wrong(stage, change, problem):
    case = checks.Case("attention", "bfloat16", 4096, 128, "causal")
    result = {**RIGHT, **change}
    numerics.judge(stage, case, result)
    numerics.show(stage, {case: result})
    found = report(stage)
    if problem is None:
        assert found["wrong"] == []
        assert found["tables"][0]["rows"][0][-1] == "right"
    else:
        assert problem in found["wrong"][0]
        assert str(case) in found["wrong"][0]
        assert found["tables"][0]["rows"][0][-1] == "1 wrong"


def test_the_cases_are_those_that_a_model_meets():
    found = numerics.cases(stage_module.FULL.lengths, small=False)
    assert len(found) == len(set(found))
    attention = [case for case in found if case.operator == "attention"]
    for dtype in ("bfloat16", "float32"):
        for head in (64, 128):
            for variant in ("causal", "segments"):
                lengths = {
                    case.length
                    for case in attention
                    if (case.dtype, case.size, case.variant) == (dtype, head, variant)
                }
                assert lengths == {1, 127, 4095, 4096, 8192}
            variants = {
                case.variant for case in attention if (case.dtype, case.size) == (dtype, head)
            }
            special = {"unseen query", "offset", "extreme", "scan remat vmap shard_map"}
            special |= {"packed", "packed segments"}
            assert special | {"sm_80 causal", "sm_80 segments"} <= variants


def test_a_worker_that_dies_or_raises_costs_its_case_alone(stage, monkeypatch, tmp_path):
    program = tmp_path / "worker.py"
    program.write_text(
        "import json, os, sys\n"
        "for line in sys.stdin:\n"
        "    case = json.loads(line)\n"
        "    if case[2] == 2: os._exit(11)\n"
        "    found = {'error': 'sticky'} if case[2] == 3 else {'pid': os.getpid()}\n"
        "    print('noise of a library')\n"
        "    print('RESULT ' + json.dumps(found), flush=True)\n"
    )
    start = lambda self: subprocess.Popen(
        [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    monkeypatch.setattr(numerics.Worker, "_start", start)
    todo, done = numerics.queue.Queue(), numerics.queue.Queue()
    for number in (1, 2, 3, 4, 5):
        todo.put(checks.Case("attention", "float32", number, 64, "causal"))
    worker = numerics.Worker(todo, done, SMALL)
    worker.join(60)
    found = {case.length: result for case, result in [done.get_nowait() for _ in range(5)]}
    assert "died with 11" in found[2]["error"]
    assert found[3] == {"error": "sticky"}
    assert len({found[number]["pid"] for number in (1, 4)}) == 2
    assert found[4] == found[5]
    worker.stop()


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (make plan-deps)"
)
def test_a_kernel_that_is_wrong_or_leaves_something_unwritten_is_found():
    """The real check of a kernel: right, scaled by 1.01, and with a row left unwritten.

    In a process in which triton interprets.
    """
    program = f"""
import json, sys
sys.path[:0] = [{str(STAGES)!r}, {str(REPOSITORY)!r}]
import checks
from baichuan_jax.kernels.attention import triton as attention
from baichuan_jax.kernels import triton_interpreter as interpreter
case = checks.Case("attention", "float32", 40, 64, "causal")
packed = checks.check(checks.Case("attention", "float32", 40, 64, "packed segments"))
right = attention.attention
def scaled(*arguments):
    return 1.01 * right(*arguments)
interpret = interpreter.interpret
def lazy(launch):
    outputs = interpret(launch)
    if launch.name == "attention_dq":
        import jax.numpy as jnp
        # What the memory held before: the kernel did not write this row.
        outputs = [outputs[0], outputs[1].at[:, -1].set(jnp.nan)]
    return outputs
found = [packed, checks.check(case)]
attention.attention = scaled
found.append(checks.check(case))
attention.attention = right
interpreter.interpret = lazy
found.append(checks.check(case))
print("FOUND " + json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    packed, right, scaled, unwritten = json.loads(done.stdout.split("FOUND ")[1])
    assert packed["norm_error"] < 2e-6
    assert right["norm_error"] < 2e-6
    assert right["same_bits"]
    assert scaled["norm_error"] == pytest.approx(0.01, rel=0.05)
    assert unwritten["norm_error"] != unwritten["norm_error"]
    assert unwritten["worst"] == "dq"


def test_measured_rates_are_what_plan_reads(stage, tmp_path):
    """plan reads the file; the file of a device that is not known describes a rehearsal."""
    rates = {"matmul": 0.7, "memory": 0.9, "launch_us": 2.0}
    products.write_rates(stage, "NVIDIA H100 80GB HBM3", HARDWARE["h100"], rates)
    path = stage.output / "rates.json"
    found = read_rates(path, HARDWARE["h800"])
    assert found.rates == rates
    assert found.device == "NVIDIA H100 80GB HBM3"
    with pytest.raises(ConfigError, match="a800"):
        read_rates(path, HARDWARE["a800"])
    products.write_rates(stage, "cpu", None, rates)
    assert "rehearsal" in read_rates(path, HARDWARE["h100"]).device


def test_products_without_time_are_reported_and_the_rest_is_there(tmp_path):
    (tmp_path / "output").mkdir()
    stage = Stage(
        SMALL, tmp_path / "state.json", tmp_path, tmp_path / "output", products.LEFT_TO_TIME - 1.0
    )
    products.run(stage)
    found = report(stage)
    assert found["lacking"]
    assert any("QKV / forward" in what and "no time was left" in what for what in found["left_out"])
    assert set(found["values"]["rates"]) == {"launch_us"}
    assert found["values"]["copy_bandwidth"] > 0


def test_a_kernel_that_is_wrong_at_the_timed_sizes_is_wrong(stage):
    wrong = {"why_not": "WRONG: differs by 5.0e-01 from the plain operator in float32"}
    speed.report_wrong(
        stage,
        {
            "title": "attention",
            "implementations": {"triton": wrong, "torch sdpa": wrong, "cudnn": {}},
        },
    )
    assert report(stage)["wrong"] == [
        "attention: triton: differs by 5.0e-01 from the plain operator in float32"
    ]


def test_cases_that_were_not_checked_are_all_named_and_the_stage_is_incomplete(stage):
    everything = numerics.cases(SMALL.lengths, small=True)
    numerics.conclude(stage, everything, {everything[0]: dict(RIGHT)})
    found = report(stage)
    assert found["lacking"]
    assert all(str(case) in found["left_out"][0] for case in everything[1:])
    assert found["headline"].startswith(f"1 of {len(everything)} cases right")


def test_a_step_keeps_its_result_where_the_profiler_fails(stage, monkeypatch):
    def no_profiler(*_):
        raise RuntimeError("CUPTI_ERROR_NOT_INITIALIZED")

    monkeypatch.setattr(step, "trace", no_profiler)
    monkeypatch.setattr(step, "start_plans", lambda *_: {})
    step.run(stage)
    found = report(stage)
    assert "CUPTI_ERROR_NOT_INITIALIZED" in found["wrong"][0]
    assert found["values"]["step_seconds"] > 0
    assert found["tables"][-1]["rows"][0][0] == "measured"


def test_a_variant_that_fails_costs_its_row_alone(stage):
    class Fake:
        rows, batch, request = 1.0, None, None

        def __init__(self, error=None):
            self.seconds, self.error, self.compiled = [], error, self

        def __call__(self, state, batch, request):
            assert state == "state"
            if self.error:
                raise self.error
            return state, {}

        def memory_analysis(self):
            return types.SimpleNamespace(temp_size_in_bytes=1 << 30)

    variants = {
        costs.BASE: Fake(),
        "deterministic": Fake(RuntimeError("RESOURCE_EXHAUSTED")),
        "other": Fake(NotImplementedError()),
    }
    costs.measure(stage, variants, lambda: "state")
    found = report(stage)
    assert [row[0] for row in found["tables"][0]["rows"]] == [costs.BASE]
    assert found["left_out"] == [
        "deterministic: RuntimeError: RESOURCE_EXHAUSTED",
        "other: NotImplementedError: NotImplementedError",
    ]


def test_a_run_that_fails_says_why_in_a_line(tmp_path):
    run = training.Training(SMALL, tmp_path, "broken", "float32", "--train.num_steps", "many")
    with pytest.raises(RuntimeError, match=r"broken ended with \d+: .*num_steps"):
        run.wait_for_step(1, 60)


def test_the_kernels_rate_gives_back_the_seconds_that_were_measured(stage):
    """Through the bounds that plan multiplies it with."""
    bounds, peak = BOUNDS[90], HARDWARE["h100"].peak_tflops * 1e12
    flops = {name: 1e12 * (index + 1) for index, name in enumerate(bounds)}
    seconds = {name: flops[name] / peak / bound / 0.6 for name, bound in bounds.items()}
    (stage.work / "speed.json").write_text(
        json.dumps({"values": {"kernels_alone": seconds, "kernel_flops": flops}})
    )
    assert products.kernel_rate(stage, HARDWARE["h100"]) == {"kernel": pytest.approx(0.6)}
    (stage.work / "speed.json").unlink()
    assert products.kernel_rate(stage, HARDWARE["h100"]) == {}
    assert "speed" in report(stage)["left_out"][0]


def write_run(folder: Path, losses: list[tuple[int, float]], *events: Event) -> Run:
    folder.mkdir()
    lines = [
        json.dumps({"step": step, "loss": loss, "time": 100.0 + index})
        for index, (step, loss) in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "events.jsonl").write_bytes(b"".join(event.to_line() for event in events))
    return Run(folder)


def test_a_killed_run_that_does_not_go_on_as_the_other_is_wrong(stage, tmp_path):
    plain = write_run(tmp_path / "plain", [(1, 3.0), (2, 2.0), (3, 1.0)])
    restored = Restored(step=1, position=1)
    same = write_run(tmp_path / "same", [(1, 3.0), (2, 2.0), (2, 2.0), (3, 1.0)], restored)
    training.show_recovery(stage, plain, same, before=2, died=101.5)
    assert report(stage)["wrong"] == []
    assert report(stage)["values"]["recovery_seconds"] == pytest.approx(0.5)
    other = write_run(tmp_path / "other", [(1, 3.0), (2, 2.0), (2, 2.1)])
    training.show_recovery(stage, plain, other, before=2, died=101.5)
    wrong = "; ".join(report(stage)["wrong"])
    assert "did not go on from a checkpoint" in wrong
    assert "other steps" in wrong
    assert "1 losses of the killed run differ, from step 2 on, by 5.0e-02" in wrong


def test_losses_beside_a_cpu_and_between_types(stage, tmp_path):
    recorded = json.loads(training.RECORDED.read_text(encoding="utf-8"))
    for size in ("small", "full"):
        assert {"float32", "bfloat16"} == set(recorded[size])
    small = recorded["small"]["float32"]
    started = Started(attempt=1, tokenizer=small["tokenizer"])
    close = [(step, loss * (1 + 1e-6)) for step, loss in enumerate(small["losses"], 1)]
    training.first_losses(stage, write_run(tmp_path / "close", close, started), "float32")
    assert report(stage)["wrong"] == []
    off = [(step, loss * 1.001) for step, loss in enumerate(small["losses"], 1)]
    training.first_losses(stage, write_run(tmp_path / "off", off, started), "float32")
    assert "differ from a CPU's by 1.0e-03" in report(stage)["wrong"][0]
    training.first_losses(
        stage,
        write_run(tmp_path / "rows", off, Started(attempt=1, tokenizer="another")),
        "float32",
    )
    assert "the tokenizer trained here is another" in report(stage)["left_out"][0]
    curve = dict.fromkeys(range(1, 41), 3.0)
    training.show_precision(stage, {**curve, 40: 3.2}, curve)
    assert len(report(stage)["wrong"]) == 1
    training.show_precision(stage, {**curve, 40: 4.0}, curve)
    assert "bfloat16 ends" in report(stage)["wrong"][1]
