"""Everything that must be seen on a GPU, in one program of at most nine minutes: `make gpu`.

    python benchmarks/gpu.py [--output DIR] [--minutes 9] [--stages NAME ...] [--rehearse]
    python benchmarks/gpu.py --publish DIR [--docs docs/gpu.md]

Stages run in the order of their worth, each in a process of its own with a time limit. The result
of each is in DIR the moment it ends: results.json, and gpu.md for people; so a stop at any moment
loses one stage. A stage that fails is recorded with its traceback, and the next one runs.
--rehearse runs all stages at small sizes on a CPU: Triton kernels interpreted, and compiled for
sm_80 and sm_90. --publish puts the page of a machine into docs/gpu.md.

Exit status: 0 where every stage was right, else 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script, run from anywhere

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
# In the order of their worth, with the seconds that each may take of nine minutes. Together they
# are more than that: few stages need their limit, and the last ones give way.
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
RESERVE = 5.0  # seconds kept for writing the last results
LEAST = 10.0  # seconds below which no stage is started
LOG_BYTES = 1 << 20  # of each stage's output that is kept
MARK = "<!-- {}: written by benchmarks/gpu.py -->"


def environment(rehearse: bool, work: Path) -> dict[str, str]:
    """Of the stages' processes."""
    variables = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "BAICHUAN_JAX_GPU_PARENT": str(os.getpid()),
        "JAX_TRACEBACK_FILTERING": "off",  # a traceback is all that is left of a machine that is gone
        "PYTHONPATH": str(REPOSITORY) + os.pathsep + os.environ.get("PYTHONPATH", ""),
    }
    # Stages say themselves what they take of the memory; jax refuses the old name beside the new
    # one.
    for name in (
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "XLA_CLIENT_MEM_FRACTION",
        "XLA_PYTHON_CLIENT_PREALLOCATE",
    ):
        variables.pop(name, None)
    if rehearse:
        # No device is looked for, and CUDA's compiler serves without a driver.
        return {
            **variables,
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
    # A program that one stage has compiled costs the next one nothing. Without a working CUDA a
    # stage fails, instead of running on the CPU at full size.
    return {
        **variables,
        "JAX_PLATFORMS": "cuda,cpu",
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
        "TF_CPP_MIN_LOG_LEVEL": "1",
    }


class Session:
    """One call of the program: runs the stages and keeps the output folder up to date."""

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
        return self.options.minutes * 60 - RESERVE - (time.monotonic() - self.began)

    def run(self) -> int:
        """Run the stages one after the other. Returns the exit status."""
        stages = self.results["stages"]
        seconds = round(self.options.minutes * 60)
        with tqdm(
            total=seconds, unit="s", disable=None, bar_format="{l_bar}{bar}| {n}/{total} s"
        ) as bar:
            for number, name in enumerate(stages, 1):
                # Less time shrinks the limits, but none below what a start of jax takes.
                limit = min(
                    max(LIMITS[name] * self.options.minutes / MINUTES, LEAST), self.seconds_left
                )
                bar.set_description(name)
                if not self.options.rehearse and (backend := self._platform()) not in (None, "gpu"):
                    stages[name] = _result(
                        "skipped", headline=f"jax sees no GPU: its backend is {backend}"
                    )
                elif limit < LEAST:
                    stages[name] = _result(
                        "skipped", headline=f"{max(limit, 0):.0f} s were left for it"
                    )
                else:
                    self.display.say(
                        f"{number}/{len(stages)} {name}, {limit:.0f} s at most", style="bold"
                    )
                    self._run_stage(name, limit, bar)
                self.write()
                outcome = stages[name]["outcome"]
                style = {"ok": "green", "skipped": "yellow", "incomplete": "yellow"}.get(
                    outcome, "red"
                )
                self.display.say(
                    f"  {outcome} after {stages[name]['seconds']:.0f} s: {stages[name]['headline']}",
                    style=style,
                )
        outcomes = [result["outcome"] for result in stages.values()]
        good = outcomes.count("ok")
        self.display.say(
            f"{good} of {len(outcomes)} stages are right, {time.monotonic() - self.began:.0f} s; read {self.output / 'gpu.md'}"
        )
        if not self.options.rehearse:
            self.display.say(
                f"keep it: python benchmarks/gpu.py --publish {shlex.quote(str(self.output))}"
            )
        return 0 if good == len(outcomes) else 1

    def _platform(self) -> str | None:
        """What jax runs on, as the stage `environment` saw it; None: it has not run, or did not come so far."""
        return self.results["stages"].get("environment", {}).get("values", {}).get("platform")

    def _run_stage(self, name: str, limit: float, bar: Any) -> None:
        """Run one stage to its end or limit. Its result is in results.json every few seconds, also if this process is killed."""
        stages, state, log = (
            self.results["stages"],
            self.work / f"{name}.json",
            self.work / f"{name}.log",
        )
        size = "small" if self.options.rehearse else "full"
        command = [
            sys.executable,
            str(RUNNER),
            name,
            str(state),
            str(self.work),
            str(self.output),
            f"{limit:.1f}",
            size,
        ]
        began = written = time.monotonic()
        outcome, code = "stopped", None  # unless it ends by itself
        with open(log, "wb") as out:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
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
                        stages[name] = _result(
                            "running", seconds=written - began, limit=limit, **_read_state(state)
                        )
                        self.write()
                outcome = "ended" if process.poll() is not None else "timed out"
            finally:  # and whatever the stage has started
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
                self._append_log(name, log)
                found = _result(
                    outcome, seconds=time.monotonic() - began, limit=limit, **_read_state(state)
                )
                stages[name] = _judge(
                    found, code, log.read_bytes()[-2000:].decode(errors="replace")
                )

    def _append_log(self, name: str, log: Path) -> None:
        content = log.read_bytes()
        cut = (
            f"[the first {len(content) - LOG_BYTES} bytes are left out]\n"
            if len(content) > LOG_BYTES
            else ""
        )
        try:
            with open(self.output / "log.txt", "ab") as file:
                file.write(f"==== {name}\n{cut}".encode() + content[-LOG_BYTES:] + b"\n")
        except OSError as error:
            self.display.say(f"log.txt cannot be written: {error}", style="red")

    def write(self) -> None:
        """results.json and gpu.md, whole at any moment. Where the disk is full the next stage tries again."""
        try:
            write_atomically(
                self.output / "results.json", json.dumps(self.results, indent=1).encode()
            )
            write_atomically(self.output / "gpu.md", page(self.results).encode())
        except OSError as error:
            self.display.say(
                f"results cannot be written to {self.output}: {error}; tried again after the next stage",
                style="red",
            )
            for path in self.output.glob("*.tmp"):
                path.unlink(missing_ok=True)


def _result(outcome: str, **found: Any) -> dict[str, Any]:
    """The result of a stage, with all that the page reads."""
    empty: dict[str, Any] = {
        "seconds": 0.0,
        "headline": "",
        "notes": [],
        "tables": [],
        "values": {},
        "wrong": [],
        "left_out": [],
        "lacking": False,
        "error": None,
        "finished": False,
    }
    return {**empty, **found, "outcome": outcome}


def _judge(result: dict[str, Any], code: int, tail: str) -> dict[str, Any]:
    """The result of a stage whose process has ended with `code`: its outcome, and what went wrong before its headline."""
    what = None
    if result["outcome"] == "timed out":
        what = result["error"] = (
            f"stopped after {result['limit']:.0f} s; what it had found by then stands here"
        )
    elif result["outcome"] == "stopped":
        what = result["error"] = (
            f"the program was stopped after {result['seconds']:.0f} s of this stage"
        )
    elif result["error"]:
        result["outcome"], what = "failed", result["reason"]
    elif not result["finished"]:
        what = f"the process ended with {code}"
        result |= {"outcome": "failed", "error": f"{what}:\n{tail}"}
    else:
        result["outcome"] = (
            "wrong" if result["wrong"] else "incomplete" if result["lacking"] else "ok"
        )
    if result["wrong"]:
        what = f"{len(result['wrong'])} wrong, first: {result['wrong'][0]}" + (
            f"; {what}" if what else ""
        )
    result["headline"] = "; ".join(
        part for part in (what and what[:300], result["headline"]) if part
    )
    return result


def _read_state(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def page(results: dict[str, Any], level: int = 1) -> str:
    """The results as Markdown, for someone who was not there; `level` of its first heading."""
    head = "#" * level
    stages = results["stages"]
    device = stages.get("environment", {}).get("values", {}).get("device", "device not known")
    title = f"{'Rehearsal: ' if results['rehearsal'] else ''}{device}, {results['date']}"
    lines = [f"{head} {title}", "", f"`{results['command']}`", ""]
    if results["rehearsal"]:
        lines += [
            "**No GPU was used.** Sizes are small, Triton kernels are interpreted, and times mean nothing.",
            "",
        ]
    rows = [
        [name, result["outcome"], f"{result['seconds']:.0f}", result["headline"]]
        for name, result in stages.items()
    ]
    lines.append(
        markdown_table(
            {
                "title": "All stages",
                "columns": ["stage", "outcome", "s", "in one line"],
                "rows": rows,
            }
        )
    )
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
    """What a stage does and what its numbers mean: its module's docstring."""
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")))
    assert text is not None
    return text


def publish(folder: Path, docs: Path) -> None:
    """Put a page into docs/gpu.md: a rehearsal in the place of the last one, a machine's results above those of earlier dates."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} holds no results of an earlier call: {error}") from None
    content, text = page(results, level=3), docs.read_text(encoding="utf-8")
    begin, end = MARK.format("rehearsal" if results["rehearsal"] else "results"), MARK.format("end")
    if begin not in text or end not in text.split(begin, 1)[1]:
        raise SystemExit(
            f"{docs} has no line {begin!r}, or below it none {end!r}: this belongs between them"
        )
    before, after = text.split(begin, 1)
    kept, rest = after.split(end, 1)
    kept = "" if results["rehearsal"] else kept.replace("Not yet: no GPU has run this.", "").strip()
    write_atomically(
        docs,
        f"{before}{begin}\n\n{content}\n{kept}{chr(10) * 2 if kept else chr(10)}{end}{rest}".encode(),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("gpu-results"),
        metavar="DIR",
        help="default: gpu-results; must be new or empty",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help="at most so many, 9 by default; limits of stages shrink with it",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=list(LIMITS),
        metavar="NAME",
        help=f"only these: {', '.join(LIMITS)}",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="all stages at small sizes on a CPU"
    )
    parser.add_argument(
        "--publish", type=Path, metavar="DIR", help="put the page of an earlier call into --docs"
    )
    parser.add_argument(
        "--docs",
        type=Path,
        default=REPOSITORY / "docs" / "gpu.md",
        metavar="FILE",
        help="default: docs/gpu.md",
    )
    options = parser.parse_args()
    if options.publish:
        publish(options.publish, options.docs)
        return 0
    if not 0 < options.minutes <= 600:
        parser.error(f"--minutes {options.minutes} must be greater than 0 and at most 600")
    if not options.rehearse and not (glob.glob("/dev/nvidia*") or shutil.which("nvidia-smi")):
        parser.error(
            "no NVIDIA GPU is seen here (no /dev/nvidia*, no nvidia-smi); --rehearse runs all stages on a CPU"
        )
    options.output = options.output.absolute()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / ".tmp").touch()
        (options.output / ".tmp").unlink()
    except OSError as error:
        parser.error(f"--output {options.output} cannot be written: {error.strerror}")
    if any(options.output.iterdir()):
        parser.error(
            f"--output {options.output} is not empty: results of two calls must not mix; name another folder"
        )
    work = Path(tempfile.mkdtemp(prefix="gpu-"))
    session = Session(options, work)
    before = signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that the stage is ended and the folder removed
    try:
        return session.run()
    except KeyboardInterrupt:
        session.display.say(
            f"stopped; what was found by then: {options.output / 'gpu.md'}", style="yellow"
        )
        return 130
    finally:
        session.write()
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
