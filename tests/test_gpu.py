"""The program for ten minutes on a GPU: whatever a stage does, its result and those of the others are kept and told."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
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
import gpu
import numerics
import products
import speed
import stage as stage_module
import step
import training
from stage import SMALL, Stage

from baichuan_jax.config import ConfigError
from baichuan_jax.hardware import HARDWARE
from baichuan_jax.roofline import BOUNDS, read_rates
from baichuan_jax.run import Run

# A stage of each kind of end.
FAKES = {
    "good": "stage.headline('fine'); stage.table('t', ['a|b', 'c'], [['x|y', '1']]); stage.record(value=1)",
    "wrong": "stage.table('kept', ['c'], [['1']]); stage.wrong('2 is not 3'); stage.headline('half')",
    "raises": "stage.headline('begun'); raise ValueError('a reason')",
    "lacks": "import no_such_package",
    "dies": "import os; print('last line', flush=True); os.kill(os.getpid(), 9)",
    "hangs": """stage.record(found=7); stage.say('so far')
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    (stage.output.parent / 'child').write_text(str(child.pid))
    time.sleep(600)""",
    "left_out": "stage.leave_out('torch', 'it is not installed')",
    "lacks_much": "stage.leave_out('cases', 'no time was left', needed=True)",
}


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """benchmarks/gpu.py with these stages instead of its own; returns the folder that it writes into."""
    folder = tmp_path / "stages"
    folder.mkdir()
    for name, body in FAKES.items():
        (folder / f"{name}.py").write_text(f'"""What {name} means."""\n\n\ndef run(stage):\n    {body}\n')
    monkeypatch.setattr(gpu, "FOLDER", folder)
    monkeypatch.setattr(gpu, "LIMITS", dict.fromkeys(FAKES, 60) | {"hangs": 4})
    monkeypatch.setattr(gpu, "LEAST", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return tmp_path / "output"


def run(monkeypatch, output: Path, *argv: str) -> tuple[int, dict, str]:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--output", str(output), *argv])
    before = signal.getsignal(signal.SIGTERM)
    try:
        code = gpu.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    return code, json.loads((output / "results.json").read_text()), (output / "gpu.md").read_text()


def test_every_end_of_a_stage_is_told_and_the_next_one_runs(fakes, monkeypatch, capsys):
    code, results, page = run(monkeypatch, fakes)
    assert code == 1
    stages = results["stages"]
    assert list(stages) == list(FAKES)
    outcomes = {name: result["outcome"] for name, result in stages.items()}
    assert outcomes == {
        "good": "ok", "wrong": "wrong", "raises": "failed", "lacks": "failed", "dies": "failed", "hangs": "timed out",
        "left_out": "ok", "lacks_much": "incomplete",
    }  # fmt: skip
    assert stages["wrong"]["tables"][0]["rows"] == [["1"]]
    assert "ValueError: a reason" in stages["raises"]["error"]
    assert "Traceback" in page
    assert "No module named 'no_such_package'" in stages["lacks"]["headline"]
    assert "ended with -9" in stages["dies"]["headline"]
    assert "last line" in stages["dies"]["error"]
    assert stages["hangs"]["values"] == {"found": 7}
    assert "Left out: torch: it is not installed" in page
    assert "What good means." in page
    assert "| a\\|b | c |" in page
    assert "**Wrong:** 2 is not 3" in page
    assert "a reason" in capsys.readouterr().out
    # What a stage has started ends with it.
    child = int((fakes.parent / "child").read_text())
    assert_ends(child)


def assert_ends(process_id: int) -> None:
    """Within seconds; a zombie that nobody waits for has ended."""
    deadline = time.monotonic() + 10
    status = Path(f"/proc/{process_id}/status")
    while status.exists() and "(zombie)" not in status.read_text():
        assert time.monotonic() < deadline, f"process {process_id} of a stage that was stopped lives on"
        time.sleep(0.05)


def test_only_right_stages_exit_with_0_and_leave_few_files(fakes, monkeypatch):
    code, results, _ = run(monkeypatch, fakes, "--stages", "good", "left_out")
    assert code == 0
    assert list(results["stages"]) == ["good", "left_out"]
    assert len(list(fakes.iterdir())) <= 8


def test_less_time_shrinks_limits_and_skips_what_has_none(fakes, monkeypatch):
    code, results, page = run(monkeypatch, fakes, "--minutes", "0.15", "--stages", "good", "hangs", "left_out")
    assert results["stages"]["good"]["limit"] < 4
    assert results["stages"]["hangs"]["outcome"] in ("timed out", "skipped")
    monkeypatch.setattr(gpu, "LEAST", 1000.0)
    code, results, page = run(monkeypatch, fakes.parent / "other", "--stages", "good")
    assert code == 1
    assert results["stages"]["good"]["outcome"] == "skipped"
    assert "s were left for it" in page


def test_results_of_two_calls_do_not_mix_and_times_make_sense(fakes, monkeypatch):
    fakes.mkdir()
    (fakes / "results.json").write_text("{}")
    with pytest.raises(SystemExit):
        run(monkeypatch, fakes)
    with pytest.raises(SystemExit):
        run(monkeypatch, fakes.parent / "other", "--minutes", "0")
    with pytest.raises(SystemExit):
        run(monkeypatch, fakes.parent / "other", "--stages", "unknown")


def test_without_a_gpu_nothing_is_tried(tmp_path):
    variables = {**os.environ, "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "benchmarks/gpu.py", "--output", str(tmp_path / "output")]
    done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr
    assert not (tmp_path / "output").exists()


def test_where_jax_sees_no_gpu_the_other_stages_are_not_run_at_full_size(fakes, monkeypatch):
    (gpu.FOLDER / "environment.py").write_text('"""Which device."""\n\n\ndef run(stage):\n    stage.record(platform="cpu")\n')
    monkeypatch.setattr(gpu, "LIMITS", {"environment": 60, "good": 60})
    monkeypatch.setattr(gpu.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(fakes)])
    monkeypatch.setenv("PYTHONPATH", f"{gpu.FOLDER}")
    monkeypatch.setattr(gpu, "RUNNER", _runner_that_prefers(gpu.FOLDER))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert gpu.main() == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    stages = json.loads((fakes / "results.json").read_text())["stages"]
    assert (stages["environment"]["outcome"], stages["good"]["outcome"]) == ("ok", "skipped")
    assert "jax sees no GPU" in stages["good"]["headline"]


def _runner_that_prefers(folder: Path) -> Path:
    """stage.py, but for a stage whose name a real one has, the fake one is found first."""
    runner = folder / "runner.py"
    runner.write_text(
        f"import sys\nsys.path.insert(0, {str(STAGES)!r})\nimport stage\nsys.path.insert(0, {str(folder)!r})\n"
        "sys.exit(stage.main(sys.argv[1:]))\n"
    )
    return runner


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stop_at_any_moment_loses_one_stage(fakes, tmp_path, number):
    """A real process is stopped in the second of two stages."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(STAGES.parent)!r})\nimport gpu\n"
        f"gpu.FOLDER = Path({str(gpu.FOLDER)!r})\ngpu.LIMITS = {{'good': 60, 'hangs': 300, 'left_out': 60}}\nsys.exit(gpu.main())\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script), "--rehearse", "--output", str(fakes), "--minutes", "9"], stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "child").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(30)
        assert process.returncode == (143 if number == signal.SIGTERM else -number)
        stages = json.loads((fakes / "results.json").read_text())["stages"]
        assert stages["good"]["outcome"] == "ok"
        assert stages["left_out"]["outcome"] == "not run"
        if number == signal.SIGTERM:  # what the stage had found by then is kept too
            assert (stages["hangs"]["outcome"], stages["hangs"]["values"]) == ("stopped", {"found": 7})
        page = (fakes / "gpu.md").read_text()
        assert "fine" in page
        assert "| left_out | not run |" in page
        assert_ends(int((tmp_path / "child").read_text()))  # also where nobody was left to end it
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)], check=False)
        if (tmp_path / "child").exists():
            subprocess.run(["kill", "-KILL", (tmp_path / "child").read_text()], check=False, stderr=subprocess.DEVNULL)


def test_a_full_disk_is_told_and_the_next_stage_tries_again(fakes, monkeypatch, capsys):
    write, calls = gpu.write_atomically, []

    def full(path, content):
        calls.append(path)
        if len(calls) < 3:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(gpu, "write_atomically", full)
    code, results, _ = run(monkeypatch, fakes, "--stages", "good", "left_out")
    assert code == 0
    assert list(results["stages"]) == ["good", "left_out"]
    assert "No space left on device; tried again" in capsys.readouterr().out


def test_a_page_is_published_in_its_place(fakes, monkeypatch, tmp_path):
    run(monkeypatch, fakes, "--stages", "good")
    docs = tmp_path / "gpu.md"
    mark = gpu.MARK.format
    docs.write_text(
        f"# GPU\n\n{mark('results')}\n\nNot yet: no GPU has run this.\n\n{mark('end')}\n\n{mark('rehearsal')}\n\nold\n\n"
        f"{mark('end')}\n\nend\n"
    )
    gpu.publish(fakes, docs)
    text = docs.read_text()
    assert "old" not in text
    assert "Not yet" in text
    assert text.endswith("end\n")
    results = json.loads((fakes / "results.json").read_text())
    good = results["stages"]["good"]
    for device in ("H100", "H200"):
        results |= {"rehearsal": False, "stages": {"environment": {**good, "values": {"device": device}}}}
        monkeypatch.setattr(gpu, "explanation", lambda name: name)
        (fakes / "results.json").write_text(json.dumps(results))
        gpu.publish(fakes, docs)
    text = docs.read_text()
    assert "Not yet" not in text
    assert text.index("### H200") < text.index("### H100") < text.index(mark("rehearsal"))
    assert text.count(mark("end")) == 2
    docs.write_text("nothing")
    with pytest.raises(SystemExit, match="has no line"):
        gpu.publish(fakes, docs)


def test_the_page_has_its_places_and_names_every_stage():
    text = (REPOSITORY / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert all(text.count(gpu.MARK.format(name)) == count for name, count in (("results", 1), ("rehearsal", 1), ("end", 2)))
    for name in gpu.LIMITS:
        assert gpu.explanation(name)
        assert re.search(rf"\| {name} \|", text), name


# Numbers.


@pytest.fixture
def stage(tmp_path) -> Stage:
    (tmp_path / "output").mkdir()
    return Stage(SMALL, tmp_path / "state.json", tmp_path, tmp_path / "output", 60.0)


def report(stage: Stage) -> dict:
    return json.loads(stage._state.read_text())


SMALL_ERRORS = {"largest": 1e-3, "norm": 1e-3, "row": 1e-3}
RIGHT = {
    "largest_error": 1e-3, "norm_error": 1e-3, "worst": "dq", "same_bits": True, "poison_works": True,
    "errors": {"out": SMALL_ERRORS, "dq": {**SMALL_ERRORS, "row": 0.3}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
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
def test_wrong_numbers_are_wrong(stage, change, words):
    case = checks.Case("attention", "bfloat16", 4096, 128, "causal")
    result = {**RIGHT, **change}
    numerics.judge(stage, case, result)
    numerics.show(stage, {case: result})
    found = report(stage)
    if words is None:
        assert found["wrong"] == []
        assert found["tables"][0]["rows"][0][-1] == "right"
    else:
        assert words in found["wrong"][0]
        assert str(case) in found["wrong"][0]
        assert found["tables"][0]["rows"][0][-1] == "1 wrong"


def test_the_cases_are_those_that_a_model_meets():
    found = numerics.cases(stage_module.FULL.lengths, small=False)
    assert len(found) == len(set(found))
    attention = [case for case in found if case.operator == "attention"]
    for dtype in ("bfloat16", "float32"):
        for head in (64, 128):
            for variant in ("causal", "segments"):
                lengths = {case.length for case in attention if (case.dtype, case.size, case.variant) == (dtype, head, variant)}
                assert lengths == {1, 127, 4095, 4096, 8192}
            variants = {case.variant for case in attention if (case.dtype, case.size) == (dtype, head)}
            assert {
                "unseen query",
                "offset",
                "extreme",
                "scan remat vmap shard_map",
                "sm_80 causal",
                "sm_80 segments",
            } <= variants


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
    start = lambda self: subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
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


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (make plan-deps)")
def test_a_kernel_that_is_wrong_or_leaves_something_unwritten_is_found():
    """In a process whose triton interprets: the real check of a real kernel, right, scaled by 1.01 and with rows left out."""
    program = f"""
import json, sys
sys.path[:0] = [{str(STAGES)!r}, {str(REPOSITORY)!r}]
import checks
from baichuan_jax.kernels.triton import attention, interpreter
case = checks.Case("attention", "float32", 40, 64, "causal")
right = attention.attention
def scaled(*arguments):
    return 1.01 * right(*arguments)
interpret = interpreter.interpret
def lazy(launch):
    outputs = interpret(launch)
    if launch.name == "attention_dq":
        import jax.numpy as jnp
        outputs = [outputs[0].at[:, -1].set(jnp.nan)]  # what it had before: the kernel left these rows out
    return outputs
found = [checks.check(case)]
attention.attention = scaled
found.append(checks.check(case))
attention.attention = right
interpreter.interpret = lazy
found.append(checks.check(case))
print("FOUND " + json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    right, scaled, unwritten = json.loads(done.stdout.split("FOUND ")[1])
    assert right["norm_error"] < 2e-6
    assert right["same_bits"]
    assert scaled["norm_error"] == pytest.approx(0.01, rel=0.05)
    assert unwritten["norm_error"] != unwritten["norm_error"]
    assert unwritten["worst"] == "dq"


def test_measured_rates_are_what_plan_reads(stage, tmp_path):
    """The file that is written is read by plan's own reader; an unknown device has none, in a rehearsal it says so."""
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


def test_products_without_time_are_told_and_the_rest_is_there(tmp_path):
    (tmp_path / "output").mkdir()
    stage = Stage(SMALL, tmp_path / "state.json", tmp_path, tmp_path / "output", products.LEFT_TO_TIME - 1.0)
    products.run(stage)
    found = report(stage)
    assert found["lacking"]
    assert any("QKV / forward" in what and "no time was left" in what for what in found["left_out"])
    assert set(found["values"]["rates"]) == {"launch_us"}
    assert found["values"]["copy_bandwidth"] > 0


def test_a_kernel_that_is_wrong_at_the_timed_sizes_is_wrong(stage):
    wrong = {"why_not": "WRONG: differs by 5.0e-01 from the plain operator in float32"}
    speed.report_wrong(stage, {"title": "attention", "implementations": {"triton": wrong, "torch sdpa": wrong, "cudnn": {}}})
    assert report(stage)["wrong"] == ["attention: triton: differs by 5.0e-01 from the plain operator in float32"]


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
        rows, batch, wish = 1.0, None, None

        def __init__(self, error=None):
            self.seconds, self.error, self.compiled = [], error, self

        def __call__(self, state, batch, wish):
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
        "deterministic: RuntimeError: RESOURCE_EXHAUSTED", "other: NotImplementedError: NotImplementedError"
    ]  # fmt: skip


def test_a_run_that_fails_says_why_in_a_line(tmp_path):
    run = training.Training(SMALL, tmp_path, "broken", "float32", "--train.num_steps", "many")
    with pytest.raises(RuntimeError, match=r"broken ended with \d+: .*num_steps"):
        run.wait_for_step(1, 60)


def test_the_kernels_rate_gives_back_the_seconds_that_were_measured(stage):
    """Through the bounds that plan multiplies it with."""
    bounds, peak = BOUNDS[90], HARDWARE["h100"].peak_tflops * 1e12
    flops = {name: 1e12 * (index + 1) for index, name in enumerate(bounds)}
    seconds = {name: flops[name] / peak / bound / 0.6 for name, bound in bounds.items()}
    (stage.work / "speed.json").write_text(json.dumps({"values": {"kernels_alone": seconds, "kernel_flops": flops}}))
    assert products.kernel_rate(stage, HARDWARE["h100"]) == {"kernel": pytest.approx(0.6)}
    (stage.work / "speed.json").unlink()
    assert products.kernel_rate(stage, HARDWARE["h100"]) == {}
    assert "speed" in report(stage)["left_out"][0]


def write_run(folder: Path, losses: list[tuple[int, float]], *events: dict) -> Run:
    folder.mkdir()
    lines = [json.dumps({"step": step, "loss": loss, "time": 100.0 + index}) for index, (step, loss) in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "events.jsonl").write_text("".join(json.dumps({"time": 1.0, **event}) + "\n" for event in events))
    return Run(folder)


def test_a_killed_run_that_does_not_go_on_as_the_other_is_wrong(stage, tmp_path):
    plain = write_run(tmp_path / "plain", [(1, 3.0), (2, 2.0), (3, 1.0)])
    restored = {"kind": "restored", "step": 1}
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
    started = {"kind": "started", "tokenizer": small["tokenizer"]}
    close = [(step, loss * (1 + 1e-6)) for step, loss in enumerate(small["losses"], 1)]
    training.first_losses(stage, write_run(tmp_path / "close", close, started), "float32")
    assert report(stage)["wrong"] == []
    off = [(step, loss * 1.001) for step, loss in enumerate(small["losses"], 1)]
    training.first_losses(stage, write_run(tmp_path / "off", off, started), "float32")
    assert "differ from a CPU's by 1.0e-03" in report(stage)["wrong"][0]
    training.first_losses(stage, write_run(tmp_path / "rows", off, {"kind": "started", "tokenizer": "another"}), "float32")
    assert "the tokenizer trained here is another" in report(stage)["left_out"][0]
    curve = dict.fromkeys(range(1, 41), 3.0)
    training.show_precision(stage, {**curve, 40: 3.2}, curve)
    assert len(report(stage)["wrong"]) == 1
    training.show_precision(stage, {**curve, 40: 4.0}, curve)
    assert "bfloat16 ends" in report(stage)["wrong"][1]


def test_a_bare_image_lacks_nothing_that_training_needs():
    """Every package of requirements.txt is in the image, in the bundle, or is one that training does without."""

    def names(path: Path) -> set[str]:
        lines = path.read_text(encoding="utf-8").splitlines()
        return {re.split(r"[\[<>=!;]", line)[0].strip().lower() for line in lines if line and not line.startswith("#")}

    benchmarks = REPOSITORY / "benchmarks"
    there = names(benchmarks / "gpu_image.txt") | names(benchmarks / "gpu_bundle.txt")
    assert names(REPOSITORY / "requirements.txt") - there == {"plotly", "tensorboardx", "zstandard"}
    assert not names(benchmarks / "gpu_image.txt") & names(benchmarks / "gpu_bundle.txt")


def test_the_bundles_script_explains_itself(tmp_path):
    for words in ([], [str(tmp_path)]):
        done = subprocess.run(["bash", str(REPOSITORY / "benchmarks" / "gpu_bundle.sh"), *words], capture_output=True, text=True)
        assert done.returncode == 2
        assert "make gpu-bundle" in done.stderr


# What jax and triton put into the environment of the process that imports them: the tests' own compiler is another one.
LEFT_BY_JAX = (
    "JAX_PLATFORMS", "XLA_FLAGS", "PYTHONPATH", "CUDA_ROOT", "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK",
)  # fmt: skip


def _python312() -> bool:
    folder = Path.home() / ".pyenv" / "versions"
    return any(folder.glob("3.12*/bin/python"))


@pytest.mark.slow
@pytest.mark.skipif(not _python312(), reason="there is no Python 3.12 under ~/.pyenv/versions")
def test_the_rehearsal_passes(tmp_path):
    """`make gpu-rehearse`: the image's environment, the bundle installed without a network, every stage."""
    done = subprocess.run(
        ["make", "gpu-rehearse", f"REHEARSAL={tmp_path / 'rehearsal'}"], cwd=REPOSITORY, capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if name not in LEFT_BY_JAX},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    output = tmp_path / "rehearsal"
    results = json.loads((output / "results.json").read_text())
    assert {name: result["outcome"] for name, result in results["stages"].items()} == dict.fromkeys(gpu.LIMITS, "ok")
    assert results["stages"]["environment"]["values"]["ptxas"] == "13.1.80"  # the bundle's own
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert all(path.stat().st_size < 16 << 20 for path in files)
    assert all(len(path.relative_to(output).parts) <= 3 for path in files)
    bundle = list(Path(f"{output}-bundle").iterdir())
    assert sum(path.stat().st_size for path in bundle) < 45 << 20
