"""Check and measure everything that needs a GPU, in nine minutes at most: `make gpu`.

    python benchmarks/gpu.py [--output DIR] [--minutes 9] [--stages NAME ...] [--rehearse]
    python benchmarks/gpu.py --publish DIR [--docs docs/gpu.md]

Stages run by priority, each in a process of its own with a time limit. The result of each is in DIR
as soon as the stage ends: results.json for programs, gpu.md for people. So a stop at any moment
loses one stage. A stage that fails is recorded with its traceback, and the next one runs.
--rehearse runs all stages at small sizes on a CPU: Triton kernels are interpreted, and compiled for
sm_80 and sm_90. --publish puts the page of a machine into docs/gpu.md.

Exit status: 0 where every stage found its results right, else 1.
"""

import sys
from pathlib import Path

# A script finds the package from any folder.
sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import ast
import contextlib
import datetime
import glob
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from typing import Any

from results import markdown_table
from tqdm import tqdm

from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import write_atomically

REPOSITORY = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "gpu_stages"
RUNNER = FOLDER / "stage.py"
# By priority, with the seconds that each may take of nine minutes. Their sum is more than that: few
# stages need their limit, and the last ones get what is left.
LIMITS = {
    "environment": 40,
    "numerics": 120,
    "speed": 110,
    "products": 60,
    "step": 120,
    "training": 160,
    "commands": 80,
    "costs": 120,
}
MINUTES = 9.0
# Seconds kept for writing the last results.
RESERVE = 5.0
# Seconds below which no stage is started: jax takes longer to start.
LEAST = 10.0
# Bytes kept of each stage's output.
LOG_BYTES = 1 << 20
# Colours of outcomes.
STYLES = {"ok": "green", "skipped": "yellow", "incomplete": "yellow"}
MARK = "<!-- {}: written by benchmarks/gpu.py -->"


def environment(rehearse: bool, work: Path) -> dict[str, str]:
    """The environment of the stages' processes."""
    variables = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "BAICHUAN_JAX_GPU_PARENT": str(os.getpid()),
        # The machine is gone when somebody reads the traceback: keep all of it.
        "JAX_TRACEBACK_FILTERING": "off",
        "PYTHONPATH": str(REPOSITORY) + os.pathsep + os.environ.get("PYTHONPATH", ""),
    }
    # Each stage sets its own share of the memory; jax refuses the old name beside the new one.
    for name in ("PYTHON_CLIENT_MEM_FRACTION", "CLIENT_MEM_FRACTION", "PYTHON_CLIENT_PREALLOCATE"):
        variables.pop(f"XLA_{name}", None)
    if rehearse:
        # jax looks for no device, and CUDA's compiler works without a driver.
        cpu = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        return {**variables, **cpu, "TF_CPP_MIN_LOG_LEVEL": "3"}
    # Stages share compiled programs. "cuda,cpu": where CUDA does not work a stage fails, and does
    # not run on the CPU at full size.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(work / "compiled")}
    return {**variables, **cache, "JAX_PLATFORMS": "cuda,cpu", "TF_CPP_MIN_LOG_LEVEL": "1"}


class Program:
    """One call: runs the stages and keeps the output folder up to date."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work, self.output = options, work, options.output
        self.display = Display()
        self.began = time.monotonic()
        self.results: dict[str, Any] = {
            "date": str(datetime.date.today()),
            "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
            "rehearsal": options.rehearse,
            "minutes": options.minutes,
            "machine": platform.machine(),
            "stages": {name: _result("not run") for name in options.stages or LIMITS},
        }

    @property
    def seconds_left(self) -> float:
        """Until the time of this call is up."""
        return self.options.minutes * 60 - RESERVE - (time.monotonic() - self.began)

    def run(self) -> int:
        """Run the stages one after the other. Returns the exit status."""
        stages = self.results["stages"]
        bar = tqdm(
            total=round(self.options.minutes * 60),
            unit="s",
            disable=None,
            bar_format="{l_bar}{bar}| {n}/{total} s",
        )
        with bar:
            for number, name in enumerate(stages, 1):
                bar.set_description(name)
                self._run_or_skip(name, f"{number}/{len(stages)}", bar)
                self.write()
                outcome, seconds = stages[name]["outcome"], stages[name]["seconds"]
                style = STYLES.get(outcome, "red")
                line = f"  {outcome} after {seconds:.0f} s: {stages[name]['headline']}"
                self.display.say(line, style=style)
        outcomes = [result["outcome"] for result in stages.values()]
        good = outcomes.count("ok")
        seconds = time.monotonic() - self.began
        right = f"{good} of {len(outcomes)} stages are right, {seconds:.0f} s"
        self.display.say(f"{right}; read {self.output / 'gpu.md'}")
        if not self.options.rehearse:
            publish = f"python benchmarks/gpu.py --publish {shlex.quote(str(self.output))}"
            self.display.say(f"keep it: {publish}")
        return 0 if good == len(outcomes) else 1

    def _run_or_skip(self, name: str, number: str, bar: Any) -> None:
        """Run a stage, unless there is no GPU or no time for it."""
        stages = self.results["stages"]
        # Less time shrinks the limits, but none below what a start of jax takes.
        share = LIMITS[name] * self.options.minutes / MINUTES
        limit = min(max(share, LEAST), self.seconds_left)
        backend = self._platform()
        if not self.options.rehearse and backend not in (None, "gpu"):
            headline = f"jax sees no GPU: its backend is {backend}"
            stages[name] = _result("skipped", headline=headline)
        elif limit < LEAST:
            stages[name] = _result("skipped", headline=f"{max(limit, 0):.0f} s were left for it")
        else:
            self.display.say(f"{number} {name}, {limit:.0f} s at most", style="bold")
            self._run_stage(name, limit, bar)

    def _platform(self) -> str | None:
        """The backend that the stage `environment` found; None where it found none."""
        return self.results["stages"].get("environment", {}).get("values", {}).get("platform")

    def _run_stage(self, name: str, limit: float, bar: Any) -> None:
        """Run one stage to its end or limit.

        results.json has its state every few seconds, in case this process is killed.
        """
        stages, state = self.results["stages"], self.work / f"{name}.json"
        log = self.work / f"{name}.log"
        size = "small" if self.options.rehearse else "full"
        folders = [str(state), str(self.work), str(self.output)]
        command = [sys.executable, str(RUNNER), name, *folders, f"{limit:.1f}", size]
        began = written = time.monotonic()
        # Unless it ends by itself.
        outcome, code = "stopped", None
        with open(log, "wb") as out:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # A process group, to end the stage with its children.
                start_new_session=True,
                env=environment(self.options.rehearse, self.work),
                cwd=REPOSITORY,
            )
            try:
                while process.poll() is None and time.monotonic() - began <= limit:
                    time.sleep(0.1)
                    bar.update(int(time.monotonic() - self.began) - bar.n)
                    if time.monotonic() - written > 3:
                        written = time.monotonic()
                        so_far = {"seconds": written - began, "limit": limit, **_read_state(state)}
                        stages[name] = _result("running", **so_far)
                        self.write()
                outcome = "ended" if process.poll() is not None else "timed out"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
                self._append_log(name, log)
                seconds = time.monotonic() - began
                found = _result(outcome, seconds=seconds, limit=limit, **_read_state(state))
                end = log.read_bytes()[-2000:].decode(errors="replace")
                stages[name] = _judge(found, code, end)

    def _append_log(self, name: str, log: Path) -> None:
        content = log.read_bytes()
        left_out = max(0, len(content) - LOG_BYTES)
        cut = f"[the first {left_out} bytes are left out]\n" if left_out else ""
        try:
            with open(self.output / "log.txt", "ab") as file:
                file.write(f"==== {name}\n{cut}".encode() + content[-LOG_BYTES:] + b"\n")
        except OSError as error:
            self.display.say(f"log.txt cannot be written: {error}", style="red")

    def write(self) -> None:
        """Write results.json and gpu.md atomically. On a full disk the next stage tries again."""
        try:
            content = json.dumps(self.results, indent=1).encode()
            write_atomically(self.output / "results.json", content)
            write_atomically(self.output / "gpu.md", page(self.results).encode())
        except OSError as error:
            what = f"results cannot be written to {self.output}: {error}"
            self.display.say(f"{what}; tried again after the next stage", style="red")
            for path in self.output.glob("*.tmp"):
                path.unlink(missing_ok=True)


def _result(outcome: str, **found: Any) -> dict[str, Any]:
    """The result of a stage, with every key that the page reads."""
    empty: dict[str, Any] = {name: [] for name in ("notes", "tables", "wrong", "left_out")}
    empty |= {"seconds": 0.0, "headline": "", "values": {}, "error": None}
    empty |= {"lacking": False, "finished": False}
    return {**empty, **found, "outcome": outcome}


def _judge(result: dict[str, Any], code: int, tail: str) -> dict[str, Any]:
    """The result of a stage whose process ended with `code`.

    Sets its outcome, and puts what went wrong in front of its headline.
    """
    what = None
    if result["outcome"] == "timed out":
        what = f"stopped after {result['limit']:.0f} s; its results until then are below"
        result["error"] = what
    elif result["outcome"] == "stopped":
        what = f"the program was stopped after {result['seconds']:.0f} s of this stage"
        result["error"] = what
    elif result["error"]:
        result["outcome"], what = "failed", result["reason"]
    elif not result["finished"]:
        what = f"the process ended with {code}"
        result |= {"outcome": "failed", "error": f"{what}:\n{tail}"}
    elif result["wrong"]:
        result["outcome"] = "wrong"
    else:
        result["outcome"] = "incomplete" if result["lacking"] else "ok"
    if result["wrong"]:
        first = f"{len(result['wrong'])} wrong, first: {result['wrong'][0]}"
        what = f"{first}; {what}" if what else first
    parts = (what and what[:300], result["headline"])
    result["headline"] = "; ".join(part for part in parts if part)
    return result


def _read_state(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def page(results: dict[str, Any], level: int = 1) -> str:
    """The results as Markdown; `level` is that of its first heading."""
    head = "#" * level
    stages = results["stages"]
    device = stages.get("environment", {}).get("values", {}).get("device", "device not known")
    title = f"{'Rehearsal: ' if results['rehearsal'] else ''}{device}, {results['date']}"
    lines = [f"{head} {title}", "", f"`{results['command']}`", ""]
    if results["rehearsal"]:
        caution = "Sizes are small, Triton kernels are interpreted, and times mean nothing."
        lines += [f"**No GPU was used.** {caution}", ""]
    rows = [
        [name, result["outcome"], f"{result['seconds']:.0f}", result["headline"]]
        for name, result in stages.items()
    ]
    columns = ["stage", "outcome", "s", "in one line"]
    lines.append(markdown_table({"title": "All stages", "columns": columns, "rows": rows}))
    for name, result in stages.items():
        lines += ["", f"{head}# {name.capitalize()}: {result['outcome']}", "", explanation(name)]
        for table in result.get("tables", []):
            lines += ["", markdown_table(table)]
        lines += ["", *(f"- {note}" for note in result.get("notes", []))]
        lines += [f"- **Wrong:** {what}" for what in result.get("wrong", [])]
        lines += [f"- Left out: {what}" for what in result.get("left_out", [])]
        if result.get("error"):
            lines += ["", "```text", result["error"].strip().replace("```", "'''"), "```"]
    return "\n".join(lines).rstrip() + "\n"


def explanation(name: str) -> str:
    """What a stage does and what its numbers mean: the docstring of its module."""
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")))
    assert text is not None
    return text


def publish(folder: Path, docs: Path) -> None:
    """Put a page into docs/gpu.md.

    A rehearsal replaces the last one; a machine's results go above those of earlier dates.
    """
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} holds no results of an earlier call: {error}") from None
    content, text = page(results, level=3), docs.read_text(encoding="utf-8")
    begin, end = MARK.format("rehearsal" if results["rehearsal"] else "results"), MARK.format("end")
    if begin not in text or end not in text.split(begin, 1)[1]:
        raise SystemExit(
            f"{docs} has no line {begin!r}, or below it none {end!r}: the page belongs between them"
        )
    before, after = text.split(begin, 1)
    kept, rest = after.split(end, 1)
    kept = "" if results["rehearsal"] else kept.replace("Not yet: no GPU has run this.", "").strip()
    kept = f"{kept}\n\n" if kept else "\n"
    write_atomically(docs, f"{before}{begin}\n\n{content}\n{kept}{end}{rest}".encode())


def parse() -> argparse.Namespace:
    """The options of the command line. Exits with 2 where they cannot serve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, what: str, **options: Any) -> None:
        parser.add_argument(name, help=what, **options)

    output, docs = Path("gpu-results"), REPOSITORY / "docs" / "gpu.md"
    folder = {"type": Path, "metavar": "DIR"}
    add("--output", "new or empty (default: gpu-results)", default=output, **folder)
    add("--minutes", "at most (default: 9); stages get less", type=float, default=MINUTES)
    names = ", ".join(LIMITS)
    add("--stages", f"only these: {names}", nargs="+", choices=list(LIMITS), metavar="NAME")
    add("--rehearse", "all stages at small sizes on a CPU", action="store_true")
    add("--publish", "put the page of an earlier call into --docs", **folder)
    add("--docs", "(default: docs/gpu.md)", type=Path, default=docs, metavar="FILE")
    options = parser.parse_args()
    if options.publish:
        return options
    if not 0 < options.minutes <= 600:
        parser.error(f"--minutes {options.minutes} must be greater than 0 and at most 600")
    if not options.rehearse and not (glob.glob("/dev/nvidia*") or shutil.which("nvidia-smi")):
        parser.error(
            "no NVIDIA GPU is seen here (no /dev/nvidia*, no nvidia-smi); --rehearse runs all "
            "stages on a CPU"
        )
    options.output = options.output.absolute()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.output):
            pass
    except OSError as error:
        parser.error(f"--output {options.output} cannot be written: {error.strerror}")
    if any(options.output.iterdir()):
        parser.error(
            f"--output {options.output} is not empty, and results of two calls must not mix: name "
            "another folder"
        )
    return options


def main() -> int:
    """Run the stages, or publish the page of an earlier call."""
    options = parse()
    if options.publish:
        publish(options.publish, options.docs)
        return 0
    work = Path(tempfile.mkdtemp(prefix="gpu-"))
    program = Program(options, work)
    # As an exception, so that the stage ends and the folder is removed.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return program.run()
    except KeyboardInterrupt:
        so_far = f"stopped; the results until then: {options.output / 'gpu.md'}"
        program.display.say(so_far, style="yellow")
        return 130
    finally:
        program.write()
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
