"""The command: `python -m baichuan_jax.report RUN [RUN ...] -o report.html`."""

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

from baichuan_jax.resilience.exits import run_command
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import refuse_inputs, writable_file, write_atomically
from baichuan_jax.runs.folder import Run


def main(argv: list[str]) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.report",
        description="One HTML page of a run, or of several side by side: loss, speed, faults, "
        "memory, tests, samples, settings. It needs no network and no server. It also shows what "
        "is in RUN/evaluations/NAME (evaluate --output) and RUN/plans (plan --output).",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the run's folder")
    # Looked at before the runs are read, which may take a while.
    file: dict[str, Any] = {"type": writable_file, "default": "report.html", "metavar": "FILE"}
    parser.add_argument("-o", "--output", **file, help="default: %(default)s")
    options = parser.parse_args(argv)
    # Imported late: plotly takes half a second, which --help need not wait for.
    from baichuan_jax.report.page import make_page
    from baichuan_jax.report.recorded import PLANS, TESTS, read_runs

    read = [file for run in options.runs for file in Run(run).own]
    # What `evaluate` and `plan` left there.
    read += [file for run in options.runs for kind in (TESTS, PLANS) for file in run.glob(kind)]
    refuse_inputs({"--output": [options.output]}, {"RUN": read})
    text = make_page(read_runs(options.runs), datetime.datetime.now())
    write_atomically(Path(options.output), text.encode())
    Display().say(f"{options.output} ({len(text) / 1e6:.1f} MB): open it in a browser")
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
