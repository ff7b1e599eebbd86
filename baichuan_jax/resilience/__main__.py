"""What happened in a run, when, to whom, and what it cost: `python -m baichuan_jax.resilience RUN`."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.resilience.exits import run_command
from baichuan_jax.resilience.goodput import read_ledger, say_ledger
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import write_atomically


def main(words: list[str]) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.resilience",
        description="What happened in a run, when, to whom, and what it cost.",
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(words)
    if not (options.run / "events.jsonl").exists():
        raise ConfigError(f"{options.run} is no run's folder: it has no events.jsonl")
    ledger = read_ledger(options.run)
    say_ledger(Display(), ledger)
    if options.json is not None:
        figures = {**dataclasses.asdict(ledger), "goodput": ledger.goodput}
        write_atomically(options.json, (json.dumps(figures, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
