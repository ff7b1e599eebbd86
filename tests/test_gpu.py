"""`make gpu`: however a stage ends, its results and those of the others are kept and reported."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launches import REPOSITORY

STAGES = REPOSITORY / "benchmarks" / "gpu_stages"
for folder in (STAGES, STAGES.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import gpu
import gpu_bundle

# A stage of each kind of end.
FAKES = {
    "good": """stage.headline('fine')
    stage.table('t', ['a|b', 'c'], [['x|y', '1']])
    stage.record(value=1)""",
    "wrong": """stage.table('kept', ['c'], [['1']])
    stage.wrong('2 is not 3')
    stage.headline('half')""",
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
    """benchmarks/gpu.py with these stages instead of its own; the folder that it writes into."""
    folder = tmp_path / "stages"
    folder.mkdir()
    for name, body in FAKES.items():
        (folder / f"{name}.py").write_text(
            f'"""What {name} means."""\n\n\ndef run(stage):\n    {body}\n'
        )
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


def test_every_end_of_a_stage_is_reported_and_the_next_one_runs(fakes, monkeypatch, capsys):
    code, results, page = run(monkeypatch, fakes)
    assert code == 1
    stages = results["stages"]
    assert list(stages) == list(FAKES)
    outcomes = {name: result["outcome"] for name, result in stages.items()}
    assert outcomes == {
        "good": "ok",
        "wrong": "wrong",
        "raises": "failed",
        "lacks": "failed",
        "dies": "failed",
        "hangs": "timed out",
        "left_out": "ok",
        "lacks_much": "incomplete",
    }
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
        assert time.monotonic() < deadline, (
            f"process {process_id} of a stage that was stopped lives on"
        )
        time.sleep(0.05)


def test_only_right_stages_exit_with_0_and_leave_few_files(fakes, monkeypatch):
    code, results, _ = run(monkeypatch, fakes, "--stages", "good", "left_out")
    assert code == 0
    assert list(results["stages"]) == ["good", "left_out"]
    assert len(list(fakes.iterdir())) <= 8


def test_less_time_shrinks_limits_and_skips_what_has_none(fakes, monkeypatch):
    code, results, page = run(
        monkeypatch, fakes, "--minutes", "0.15", "--stages", "good", "hangs", "left_out"
    )
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
    (gpu.FOLDER / "environment.py").write_text(
        '"""Which device."""\n\n\ndef run(stage):\n    stage.record(platform="cpu")\n'
    )
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
    lines = [
        "import sys",
        f"sys.path.insert(0, {str(STAGES)!r})",
        "import stage",
        f"sys.path.insert(0, {str(folder)!r})",
        "sys.exit(stage.main(sys.argv[1:]))",
    ]
    runner.write_text("\n".join(lines))
    return runner


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stop_at_any_moment_loses_one_stage(fakes, tmp_path, number):
    """A real process is stopped in the second of two stages."""
    script = tmp_path / "script.py"
    lines = [
        "import sys",
        "from pathlib import Path",
        f"sys.path.insert(0, {str(STAGES.parent)!r})",
        "import gpu",
        f"gpu.FOLDER = Path({str(gpu.FOLDER)!r})",
        "gpu.LIMITS = {'good': 60, 'hangs': 300, 'left_out': 60}",
        "sys.exit(gpu.main())",
    ]
    script.write_text("\n".join(lines))
    process = subprocess.Popen(
        [sys.executable, str(script), "--rehearse", "--output", str(fakes), "--minutes", "9"],
        stdout=subprocess.PIPE,
        text=True,
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
            assert (stages["hangs"]["outcome"], stages["hangs"]["values"]) == (
                "stopped",
                {"found": 7},
            )
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
            subprocess.run(
                ["kill", "-KILL", (tmp_path / "child").read_text()],
                check=False,
                stderr=subprocess.DEVNULL,
            )


def test_a_full_disk_is_reported_and_the_next_stage_tries_again(fakes, monkeypatch, capsys):
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
    results = [mark("results"), "Not yet: no GPU has run this.", mark("end")]
    rehearsal = [mark("rehearsal"), "old", mark("end")]
    docs.write_text("\n\n".join(["# GPU", *results, *rehearsal, "end\n"]))
    gpu.publish(fakes, docs)
    text = docs.read_text()
    assert "old" not in text
    assert "Not yet" in text
    assert text.endswith("end\n")
    results = json.loads((fakes / "results.json").read_text())
    good = results["stages"]["good"]
    for device in ("H100", "H200"):
        results |= {
            "rehearsal": False,
            "stages": {"environment": {**good, "values": {"device": device}}},
        }
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
    assert all(
        text.count(gpu.MARK.format(name)) == count
        for name, count in (("results", 1), ("rehearsal", 1), ("end", 2))
    )
    for name in gpu.LIMITS:
        assert gpu.explanation(name)
        assert re.search(rf"\| {name} \|", text), name


def test_a_bare_image_lacks_nothing_that_training_needs():
    """Each package of requirements.txt is in image or bundle, or training works without it."""

    def names(path: Path) -> set[str]:
        lines = path.read_text(encoding="utf-8").splitlines()
        return {
            re.split(r"[\[<>=!;]", line)[0].strip().lower()
            for line in lines
            if line and not line.startswith("#")
        }

    benchmarks = REPOSITORY / "benchmarks"
    there = names(benchmarks / "gpu_image.txt") | names(benchmarks / "gpu_bundle.txt")
    assert names(REPOSITORY / "requirements.txt") - there == {"plotly", "tensorboardx", "zstandard"}
    assert not names(benchmarks / "gpu_image.txt") & names(benchmarks / "gpu_bundle.txt")


def test_a_bundle_replaces_a_bundle_and_nothing_else(tmp_path, monkeypatch):
    def download(folder: Path, *_: str) -> None:
        (folder / "new.whl").write_text("")

    monkeypatch.setattr(gpu_bundle, "download", download)
    monkeypatch.setattr(gpu_bundle, "ptxas_wheel", lambda folder: None)
    output, beside = tmp_path / "bundle", tmp_path / "bundle.tmp"
    beside.mkdir()
    (beside / "notes.txt").write_text("of somebody")
    for _ in range(2):
        gpu_bundle.bundle(output)
        assert [path.name for path in output.iterdir()] == ["new.whl"]
    (output / "notes.txt").write_text("of somebody")
    (tmp_path / "file").write_text("of somebody")
    for path in (output, beside, tmp_path / "file"):
        with pytest.raises(SystemExit, match="other things than wheels"):
            gpu_bundle.bundle(path)
    assert len(list(tmp_path.rglob("*"))) == 6


def test_the_bundles_script_explains_itself(tmp_path):
    for argv in ([], [str(tmp_path)]):
        done = subprocess.run(
            ["bash", str(REPOSITORY / "benchmarks" / "gpu_bundle.sh"), *argv],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "make gpu-bundle" in done.stderr


# Variables that jax and triton set in the process that imports them. The rehearsal has its own.
LEFT_BY_JAX = (
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "PYTHONPATH",
    "CUDA_ROOT",
    "TRITON_PTXAS_PATH",
    "TRITON_PTXAS_BLACKWELL_PATH",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK",
)


def _python312() -> bool:
    folder = Path.home() / ".pyenv" / "versions"
    return any(folder.glob("3.12*/bin/python"))


@pytest.mark.slow
@pytest.mark.skipif(not _python312(), reason="there is no Python 3.12 under ~/.pyenv/versions")
def test_the_rehearsal_passes(tmp_path):
    """`make gpu-rehearse`: the image's environment, the bundle without a network, every stage."""
    done = subprocess.run(
        ["make", "gpu-rehearse", f"REHEARSAL={tmp_path / 'rehearsal'}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in LEFT_BY_JAX},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    output = tmp_path / "rehearsal"
    results = json.loads((output / "results.json").read_text())
    assert {name: result["outcome"] for name, result in results["stages"].items()} == dict.fromkeys(
        gpu.LIMITS, "ok"
    )
    assert results["stages"]["environment"]["values"]["ptxas"] == "13.1.80"  # the bundle's own
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert all(path.stat().st_size < 16 << 20 for path in files)
    assert all(len(path.relative_to(output).parts) <= 3 for path in files)
    bundle = list(Path(f"{output}-bundle").iterdir())
    assert sum(path.stat().st_size for path in bundle) < 45 << 20
