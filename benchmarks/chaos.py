"""Real faults at random moments in a run of several supervised processes.

    python benchmarks/chaos.py --faults 50 --seed 0 --json chaos.json

Input: a small run, a list of kinds of faults, a seed. Output: for each kind, how often the verdict
names the right host, and the seconds until it detects the fault, attributes it and trains again;
then whether every loss equals that of an undisturbed run.

Every "host" is a supervisor on this machine with one training process. Kills and stops are signals
from outside; hangs, exceptions, NaN, flipped bits and quotas happen inside the process
(benchmarks/faults). The moment, the kind and the process of each fault follow from the seed.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from results import Results

from baichuan_jax.runs.console import Display
from baichuan_jax.runs.events import Restored, Started, StragglerFound, of_kind
from baichuan_jax.runs.folder import Run

SETTINGS = {
    # Limits shorter than a cluster's, and longer than the pauses of a busy machine.
    "resilience.hang_seconds": "6",
    "resilience.silence_seconds": "6",
    "resilience.check_every": "5",
    # A model that steps in milliseconds, so that a restart costs more than the steps it repeats.
    "model.hidden_size": "64",
    "model.intermediate_size": "176",
    "model.num_layers": "2",
    "model.num_heads": "4",
    "model.vocab_size": "512",
    "tokenizer.vocab_size": "512",
    "train.context_length": "64",
    "train.global_batch_size": "6",
    # More steps than any call reaches: the run ends when the faults are through.
    "train.num_steps": "1000000",
    "optimizer.warmup_steps": "100",
    "evaluate.every": "1000000",
    "checkpoint.every": "10",
    "metrics.tensorboard": "false",
    "data.validation": "{}",
    "data.train": "{baichuan_jax/data/sample/validation-en.jsonl.gz: 1.0}",
}
KINDS = (
    *("kill", "kill in a save", "kill in a start", "stop", "hang", "exception", "nan", "bits"),
    *("truncate", "port", "slow", "quota"),
)
# One more kind, for root only: checkpoints then lie on a small file system of their own, in memory.
FULL_DISK = "full disk"
DISK_MIB, FILLER = 64, ".filler"
# Kinds that no host caused, and what the verdict's evidence must contain.
STORAGE = {FULL_DISK: "No space left", "quota": "too large"}


def argv_of(folder: Path) -> list[str]:
    """Options of a training run that is small enough to be killed often."""
    settings = {**SETTINGS, "data.cache_dir": str(folder / "cache")}
    return ["--config", "configs/tiny.yaml", *(f"--{key}={settings[key]}" for key in settings)]


class Supervised:
    """A run under supervisors, seen through its folder."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.run = run_dir, Run(run_dir)
        self.faults = run_dir.parent / f"{run_dir.name}-faults"
        self.faults.mkdir(parents=True, exist_ok=True)

    def ended(self) -> bool:
        """Whether no supervisor is left."""
        raise NotImplementedError

    @property
    def variables(self) -> dict[str, str]:
        """Environment of a training process: faults can reach it, and nothing is compiled twice."""
        return {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "FAULTS": str(self.faults),
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'benchmarks' / 'faults'}",
            "JAX_COMPILATION_CACHE_DIR": str(self.run_dir.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            # XLA warns about every program that it takes from the cache.
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }

    @property
    def launch(self) -> int:
        """The number of the newest launch; 0 before the first."""
        launches = (self.run_dir / "attempts").glob("[0-9]*")
        return max((int(path.name) for path in launches), default=0)

    def file(self, name: str, launch: int | None = None) -> Any:
        """The content of a launch's file, or None."""
        path = self.run_dir / "attempts" / str(launch or self.launch) / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def pid(self, process: int) -> int:
        """The process id of a training process of the newest launch."""
        report = self.wait(
            lambda: self.file(f"process-{process}"), f"no heartbeat of process {process}"
        )
        return report["pid"]

    def wait(self, found: Callable[[], Any], message: str, seconds: float = 300) -> Any:
        """Call `found` until it gives a value; that value.

        Raises AssertionError with the message after this time, or when all supervisors have ended.
        """
        deadline = time.monotonic() + seconds
        while not (value := found()):
            if time.monotonic() > deadline or self.ended():
                logs = f"{self.run_dir.parent}/{self.run_dir.name}-*.log"
                raise AssertionError(f"{message}; see {logs}")
            time.sleep(0.05)
        return value

    def steps(self, count: int = 1, after: int = 0) -> tuple[int, float]:
        """Wait until a launch later than `after` has written `count` steps.

        Returns its newest step, and the time at which it wrote its first.
        """

        def written() -> tuple[int, float] | None:
            started = of_kind(self.run.events, Started)
            begun = [event.time for event in started if event.attempt == self.launch > after]
            if not begun:
                return None
            lines = [line for line in self.run.metrics if line["time"] >= begun[-1]]
            found = [line for line in lines if "loss" in line]
            return (found[-1]["step"], found[0]["time"]) if len(found) >= count else None

        return self.wait(written, f"no {count} steps after launch {after}")

    def inject(self, kind: str, process: int) -> float:
        """Cause a fault inside a process (benchmarks/faults); the time at which it began."""
        file = self.faults / f"{kind}-{process}"
        done = file.with_name(f"{file.name}.done")
        done.unlink(missing_ok=True)
        file.touch()
        began = self.wait(
            lambda: done.exists() and done.read_text(), f"process {process} did not take up {kind}"
        )
        return float(began)


class Cluster(Supervised):
    """A run under one supervisor for each host, all hosts on this machine."""

    def __init__(
        self,
        run_dir: Path,
        argv: list[str],
        *,
        hosts: int = 3,
        spares: int = 0,
        options: tuple[str, ...] = (),
        small_disk: bool = False,
    ) -> None:
        """`argv`: options of training; `options`: those of the supervisors."""
        super().__init__(run_dir)
        self._argv, self._options = [*argv, "--run_dir", str(run_dir)], options
        self._hosts, self._held = hosts, []
        self._disk = run_dir / "checkpoints" if small_disk else None
        self._kept, self.earlier = run_dir.parent / f"{run_dir.name}-checkpoints", self.launch
        if self._disk is not None:
            self._kept.mkdir(parents=True, exist_ok=True)
            self._disk.mkdir(parents=True, exist_ok=True)
            tmpfs = ["-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs"]
            subprocess.run(["mount", *tmpfs, self._disk], check=True)
            shutil.copytree(self._kept, self._disk, dirs_exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("", 0))
            self.port = probe.getsockname()[1]
        self.supervisors = {name: self.start(name) for name in "abcdefgh"[: hosts + spares]}

    def start(self, name: str) -> subprocess.Popen:
        """Start the supervisor of one host."""
        cluster = ["--hosts", str(self._hosts), "--address", "127.0.0.1", "--port", str(self.port)]
        options = ["--host", name, *cluster, *self._options]
        command = [sys.executable, "-m", "baichuan_jax.launch", *options, "--", *self._argv]
        variables = {**os.environ, **self.variables}
        with open(self.run_dir.parent / f"{self.run_dir.name}-{name}.log", "a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=REPOSITORY, env=variables)

    def ended(self) -> bool:
        return all(supervisor.poll() is not None for supervisor in self.supervisors.values())

    def fill(self) -> None:
        """Leave no byte free where checkpoints go."""
        filler = self.run_dir / "checkpoints" / FILLER
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 12))

    def take(self, port: int) -> None:
        """Listen on a port as soon as it is free, until the cluster ends."""
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        deadline = time.monotonic() + 10
        while True:
            try:
                # In the way of whoever wants this port, on whatever address.
                held.bind(("0.0.0.0", port))  # nosec B104
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        held.listen()
        self._held.append(held)

    def stop(self) -> list[int]:
        """Send Ctrl-C to all hosts; their exit codes."""
        for supervisor in self.supervisors.values():
            supervisor.send_signal(signal.SIGINT)
        return [supervisor.wait(300) for supervisor in self.supervisors.values()]

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        for supervisor in self.supervisors.values():
            supervisor.kill()
            supervisor.wait()
        for held in self._held:
            held.close()
        if self._disk is not None:
            # A later call goes on from these; the file system in memory ends here.
            shutil.rmtree(self._kept)
            shutil.copytree(self._disk, self._kept)
            subprocess.run(["umount", "--lazy", self._disk], check=True)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The consequences of one fault.

    `culprit`: the host that suffered it; `named`: the host in the verdict, or None. `right`: they
    are the same, or rightly None. NaN reach all replicas where the gradients are reduced before the
    replicas are compared, and storage belongs to all hosts; there no host is named.
    `lost_steps`: steps since the checkpoint from which the run continued, or since the beginning.
    """

    kind: str
    culprit: str
    named: str | None
    right: bool
    cause: str
    rule: str
    detect_seconds: float
    localise_seconds: float
    recover_seconds: float
    lost_steps: int
    recovered: bool

    @property
    def line(self) -> str:
        """For the console."""
        seconds = f"{self.detect_seconds:.1f} + {self.localise_seconds:.1f} s"
        return (
            f"{self.kind} on {self.culprit}: {self.cause}, named {self.named} ({self.rule}) in "
            f"{seconds}, running after {self.recover_seconds:.1f} s"
        )


def inflict(cluster: Cluster, kind: str, process: int) -> float:
    """Cause a fault in a process; the time at which it began."""
    checkpoints = cluster.run_dir / "checkpoints"
    if kind == "kill in a save":
        cluster.wait(lambda: list(checkpoints.glob("*.orbax-checkpoint-tmp*")), "no save")
    if kind == "truncate":
        _truncate_the_newest(checkpoints)
    now = time.time()
    if kind == "stop":
        os.kill(cluster.pid(process), signal.SIGSTOP)
    elif kind == FULL_DISK:
        cluster.fill()
    elif kind in ("kill", "kill in a save", "kill in a start", "truncate", "port"):
        # Only a new launch notices a truncated file or a port that is in use, hence the kill.
        # None where a launch has only begun.
        coordinator = cluster.file("coordinator")
        os.kill(cluster.pid(process), signal.SIGKILL)
        # Another program takes process 0's port before the next launch does.
        if kind == "port":
            cluster.take(int(coordinator["address"].rsplit(":", 1)[1]))
    else:
        now = cluster.inject(kind, process)
    return now


def _truncate_the_newest(checkpoints: Path) -> None:
    """Cut the largest file of the newest checkpoint to half of its size."""
    steps = [path for path in checkpoints.glob("*") if path.name.isdigit()]
    newest = max(steps, key=lambda path: int(path.name))
    files = [path for path in newest.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def suffer(cluster: Cluster, kind: str, process: int) -> Outcome:
    """Inflict a fault and wait until the run trains again."""
    cluster.steps()
    if kind == "kill in a start":
        # In the launch that follows another kill, before its first step.
        before = cluster.launch
        os.kill(cluster.pid(process), signal.SIGKILL)
        cluster.wait(
            lambda: cluster.launch > before and cluster.file("plan"), "no launch after a kill"
        )
    launch = cluster.launch
    culprit = cluster.file("plan")["hosts"][process]
    began = inflict(cluster, kind, process)
    if kind == "slow":
        return _suffer_slowness(cluster, process, culprit, began)
    found = cluster.wait(lambda: cluster.file("verdict", launch), f"no verdict on {kind}")
    if kind == FULL_DISK:
        (cluster.run_dir / "checkpoints" / FILLER).unlink()
    reached = max(line["step"] for line in cluster.run.metrics)
    _, again = cluster.steps(after=launch)
    restored = [e.step for e in of_kind(cluster.run.events, Restored) if e.time > began]
    verdict = found["verdict"]
    named = verdict["host"]
    right = named == culprit or (kind == "nan" and named is None)
    if kind in STORAGE:
        right = named in (None, culprit) and STORAGE[kind] in verdict["evidence"]
    return Outcome(
        kind=kind,
        culprit=culprit,
        named=named,
        right=right,
        cause=verdict["cause"],
        rule=verdict["rule"],
        detect_seconds=found["detected"] - began,
        localise_seconds=found["concluded"] - found["detected"],
        recover_seconds=again - began,
        lost_steps=reached - (restored or [0])[-1],
        recovered=again > began,
    )


def _suffer_slowness(cluster: Cluster, process: int, culprit: str, began: float) -> Outcome:
    """Wait for the event that names the slow host, then end the slowness. The run goes on."""

    def reported() -> StragglerFound | None:
        events = of_kind(cluster.run.events, StragglerFound)
        return next((event for event in events if event.time > began), None)

    found = cluster.wait(reported, "no slow host was reported")
    cluster.inject("slow", process)
    return Outcome(
        kind="slow",
        culprit=culprit,
        named=found.host,
        right=found.host == culprit,
        cause="slow",
        rule="own time",
        detect_seconds=found.time - began,
        localise_seconds=0.0,
        recover_seconds=0.0,
        lost_steps=0,
        recovered=True,
    )


def undisturbed(folder: Path, argv: list[str], steps: int, hosts: int) -> dict[int, float]:
    """The losses of a run without faults, up to a step."""
    with Cluster(folder, argv, hosts=hosts) as cluster:

        def reached() -> bool:
            return max((line["step"] for line in cluster.run.metrics), default=0) >= steps

        cluster.wait(reached, "too slow", 3600)
        cluster.stop()
        return cluster.run.curve("loss")


def _harm(
    cluster: Cluster, options: argparse.Namespace, display: Display, kept: Path
) -> list[Outcome]:
    """Inflict fault after fault until there are enough or the time is up.

    `kept` holds the outcomes of earlier calls; those of this call are added after each fault.
    """
    outcomes = []
    if kept.exists():
        outcomes = [Outcome(**fields) for fields in json.loads(kept.read_text())]
    deadline = time.monotonic() + 60 * options.minutes
    while len(outcomes) < options.faults and time.monotonic() < deadline:
        # From the number of the fault: a call that continues draws what one long call would draw.
        rng = random.Random(f"{options.seed} {len(outcomes)}")
        # 12 steps, with saves 10 apart: each launch reaches a new checkpoint.
        cluster.steps(12, after=max(cluster.earlier, cluster.launch - 1))
        time.sleep(rng.uniform(0, 2))
        kind = rng.choice(options.kinds)
        outcomes.append(suffer(cluster, kind, rng.randrange(options.hosts)))
        content = json.dumps([dataclasses.asdict(each) for each in outcomes])
        kept.write_text(content, encoding="utf-8")
        display.say(f"{len(outcomes)}/{options.faults}  {outcomes[-1].line}")
    return outcomes


def _rows(outcomes: list[Outcome], kinds: list[str]) -> list[list[str]]:
    """The table of median and worst seconds by kind."""
    rows = []
    for kind in kinds:
        of = [outcome for outcome in outcomes if outcome.kind == kind]
        if not of:
            continue
        cells = [
            [getattr(outcome, f"{name}_seconds") for outcome in of]
            for name in ("detect", "localise", "recover")
        ]
        seconds = [f"{statistics.median(values):.1f} / {max(values):.1f}" for values in cells]
        rows.append([kind, f"{sum(outcome.right for outcome in of)}/{len(of)}", *seconds])
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    kinds = [*KINDS, FULL_DISK] if os.geteuid() == 0 else list(KINDS)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of moments, kinds and processes")
    parser.add_argument("--hosts", type=int, default=3, help="(default: 3)")
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="(default: all)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="stop after this time; the same --folder goes on from there",
    )
    parser.add_argument("--folder", type=Path, help="of the runs (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    return parser.parse_args(argv)


def main() -> int:
    """Run the benchmark; 1 where a host is wrongly named, a loss differs or a run stays down."""
    options = parse()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    display = Display()
    small_disk = FULL_DISK in options.kinds
    argv = argv_of(folder)
    with Cluster(folder / "run", argv, hosts=options.hosts, small_disk=small_disk) as cluster:
        outcomes = _harm(cluster, options, display, folder / "faults.json")
        last, _ = cluster.steps(3, after=cluster.launch - 1)
        cluster.stop()
        disturbed = cluster.run.curve("loss")
    if len(outcomes) < options.faults:
        display.say(f"the same command with --folder {folder} goes on")
        return 0
    display.say("the same without faults ...")
    straight = undisturbed(folder / "undisturbed", argv, last, options.hosts)
    common = set(disturbed) & set(straight)
    equal = len(common) >= last and all(disturbed[step] == straight[step] for step in common)
    results = Results()
    recovered = f"{sum(outcome.recovered for outcome in outcomes)} of {len(outcomes)} recovered"
    losses = f"losses of {len(common)} steps {'equal' if equal else 'NOT EQUAL'}"
    results.table(
        f"Faults, {recovered}, {losses}: median / worst seconds",
        ["kind", "rightly named", "detect", "localise", "recover"],
        _rows(outcomes, options.kinds),
    )
    faults = [dataclasses.asdict(outcome) for outcome in outcomes]
    results.save(options.json, losses_equal=equal, steps=last, faults=faults)
    wrong = [o for o in outcomes if not o.right and o.named is not None]
    return 0 if equal and not wrong and all(o.recovered for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
