"""`python tests/fuzz`: the fuzzer by itself, for as long as wanted, with random seeds.

Prints the number of examples by format, and for each finding the smallest example, as a folder, and
the command that reads it again. Exits with 1 where there is one.
"""

import argparse
import contextlib
import random
import shutil
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from hypothesis import HealthCheck, given, seed, settings
from targets import TARGETS, judge, target, try_example, write

# Between two looks at the clock.
BATCH = 200
# For a smaller example of a finding.
SHRINK_SECONDS = 20.0


def fuzz(name: str, seconds: float, output: Path) -> tuple[int, list[Path]]:
    """Try one format. Returns the number of examples, and the folders of findings."""
    subject, count, found, kinds = target(name), 0, [], set()
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        last: dict[str, bytes] = {}
        first: float | None = None
        error: BaseException | None = None

        @seed(random.getrandbits(64))
        @settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(subject.examples)
        def run(files: dict[str, bytes]) -> None:
            nonlocal count, first, last, error
            # Hypothesis would look for a smaller example for five minutes.
            late = time.monotonic() > (ends if first is None else first + SHRINK_SECONDS)
            if late:
                if error is not None and files == last:
                    raise error
                return
            count += 1
            try:
                try_example(name, files)
            except BaseException as found:
                first, last, error = first or time.monotonic(), files, found
                raise

        with contextlib.suppress(BaseException):
            run()
        if isinstance(error, KeyboardInterrupt):
            raise error
        if error is not None:
            # The same line of the program is the same finding.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            kind = (type(error), frame.filename, frame.lineno)
            if kind not in kinds:
                kinds.add(kind)
                found.append(_keep(name, last, error, output))
    return count, found


def _keep(name: str, files: dict[str, bytes], error: BaseException, output: Path) -> Path:
    """Write the smallest example and what it led to."""
    number = len(list(output.glob(f"{name}-*[0-9]"))) + 1
    folder = output / f"{name}-{number}"
    write(folder, files)
    text = "".join(traceback.format_exception(error))
    Path(f"{folder}.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
    shown = repr(str(error).split("\n")[0][:200])
    print(f"FINDING {type(error).__name__}: {shown}\n  again: python tests/fuzz --again {folder}")
    return folder


def main() -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="in all (default: 60)")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), help="these formats alone")
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"), help="for findings")
    parser.add_argument("--again", type=Path, help="read the folder of a finding again")
    options = parser.parse_args()
    if options.again is not None:
        name = options.again.name.rpartition("-")[0]
        copy = options.again.with_name(options.again.name + ".copy")
        # A reader may write beside what it reads.
        shutil.copytree(options.again, copy)
        try:
            print(judge(target(name), copy))
        finally:
            shutil.rmtree(copy)
        return 0
    names = options.only or list(TARGETS)
    findings: list[Path] = []
    for number, name in enumerate(names, 1):
        count, found = fuzz(name, 60 * options.minutes / len(names), options.output)
        findings += found
        print(
            f"{number}/{len(names)} {name}: {count:,} examples, {len(found)} findings", flush=True
        )
    print(f"{len(findings)} findings{f' in {options.output}' if findings else ''}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
