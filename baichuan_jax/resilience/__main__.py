"""Faults and goodput of a run: `python -m baichuan_jax.resilience RUN`."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.resilience.exits import run_command
from baichuan_jax.resilience.goodput import account, show_accounting
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import refuse_inputs, writable_file, write_atomically
from baichuan_jax.runs.folder import Run


def main(argv: list[str]) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.resilience",
        description="List the faults of a run (when, which host, how they were found) and account "
        "for its time: goodput, restarts, steps done twice.",
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    what = "also write the numbers to FILE"
    parser.add_argument("--json", type=writable_file, metavar="FILE", help=what)
    options = parser.parse_args(argv)
    if not (options.run / "events.jsonl").exists():
        raise ConfigError(
            f"{options.run} has no events.jsonl, so it is not a run's folder; "
            "name a folder that training wrote (--run_dir)"
        )
    refuse_inputs({"--json": [options.json]}, {"RUN": Run(options.run).own})
    accounting = account(options.run)
    show_accounting(Display(), accounting)
    if options.json is not None:
        numbers = {**dataclasses.asdict(accounting), "goodput": accounting.goodput}
        write_atomically(Path(options.json), (json.dumps(numbers, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]), result_is_shown=True)
