"""Run every benchmark at a small size and write its tables into docs/benchmarks.md: `make bench`.

    python benchmarks/all.py [NAME ...] [--docs FILE]

Takes about ten minutes on two cores. Each benchmark runs alone, and compares with a peer or a limit
that it measures in the same run. With a name only that one runs, and only its table is replaced.
The peers have to be installed: requirements-bench.txt, -eval-bench.txt, -data.txt,
-data-bench.txt and -plan.txt.
"""

import sys
from pathlib import Path

# A script finds the package from any folder.
sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import datetime
import json
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable

from results import machine, markdown_table, version_of

from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import write_atomically

REPOSITORY = Path(__file__).parents[1]
BENCHMARKS = {
    "training": "cpu_training.py --rounds 7",
    "mixed precision": "mixed_precision.py --steps 20",
    "kernels": "kernels.py --rounds 5",
    "checkpoints": "checkpoint.py --gigabytes 1",
    "faults": "chaos.py --faults 3 --kinds kill hang truncate",
    "evaluation": "evaluation.py --questions 8 --repeats 1 --batch_sizes 16",
    "data peers": "data_pipeline.py peers --megabytes 2",
    "data scale": "data_pipeline.py scale --megabytes 2 4 8",
    "data loader": "data_pipeline.py loader",
    "plan": "plan_validation.py --kinds a100 --nodes one",
}
PACKAGES = ("jax", "torch", "transformers", "tokamax", "lm_eval", "datatrove")
BEGIN, END = "<!-- {}: written by make bench -->", "<!-- end -->"


def versions() -> str:
    """The versions of the compared packages, or that one is not installed."""
    return ", ".join(f"{name} {version_of(name)}" for name in PACKAGES)


def markdown(command: str, tables: Iterable[dict], seconds: float) -> str:
    """Tables of one benchmark, with its command, date and seconds."""
    parts = [f"`python benchmarks/{command}` ({datetime.date.today()}, {seconds:.0f} s)"]
    parts += map(markdown_table, tables)
    return "\n\n".join(parts)


def put(text: str, name: str, content: str) -> str:
    """A page with the text between the two comments of a name replaced."""
    begin = BEGIN.format(name)
    found = re.compile(re.escape(begin) + ".*?" + re.escape(END), re.DOTALL)
    if not found.search(text):
        raise SystemExit(f"no place for {name!r}: expected a line {begin!r} and below it {END!r}")
    return found.sub(lambda _: f"{begin}\n\n{content}\n\n{END}", text, count=1)


def run(command: str, folder: Path) -> list[dict]:
    """The tables of one benchmark. Raises RuntimeError with the end of its output."""
    script, *options = command.split()
    file, log = folder / "results.json", folder / "log"
    argv = [sys.executable, str(REPOSITORY / "benchmarks" / script), *options, "--json", str(file)]
    with open(log, "wb") as errors:
        code = subprocess.run(argv, stderr=errors, cwd=REPOSITORY, check=False).returncode
    if code or not file.exists():
        raise RuntimeError(f"ended with {code}:\n{log.read_text(errors='replace')[-2000:]}")
    return json.loads(file.read_text(encoding="utf-8"))["tables"]


def main() -> int:
    """Run the benchmarks; 1 where one of them failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names, docs = f"{', '.join(BENCHMARKS)} (default: all)", REPOSITORY / "docs" / "benchmarks.md"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    parser.add_argument("--docs", type=Path, default=docs, help="page to write into")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    display, failed, began = Display(), [], time.monotonic()
    chosen = options.names or list(BENCHMARKS)
    for number, name in enumerate(chosen, 1):
        command, since = BENCHMARKS[name], time.monotonic()
        line = f"{number}/{len(chosen)} {name}: python benchmarks/{command}"
        display.say(line, style="bold")
        try:
            with tempfile.TemporaryDirectory() as folder:
                tables = run(command, Path(folder))
        except RuntimeError as error:
            failed.append(name)
            display.say(f"{name} {error}", style="red")
            continue
        content = markdown(command, tables, time.monotonic() - since)
        text = put(options.docs.read_text(encoding="utf-8"), name, content)
        here = f"{machine()}; Python {platform.python_version()}, {versions()}."
        write_atomically(options.docs, put(text, "machine", here).encode())
    minutes = (time.monotonic() - began) / 60
    done = f"{len(chosen) - len(failed)} of {len(chosen)} in {minutes:.1f} minutes"
    display.say(f"{done}; see {options.docs}")
    if failed:
        display.say(f"failed: {', '.join(failed)}", style="red")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
