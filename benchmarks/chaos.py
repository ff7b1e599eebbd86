"""Real faults at random moments in a run of several supervised processes: who is named, does it go on, to the same losses?

    python benchmarks/chaos.py --faults 50 --seed 0 --json chaos.json

Every "host" is a supervisor on this machine with one training process. Kills and stops are signals
from outside; hangs, exceptions, NaN, flipped bits and quotas happen inside the process
(benchmarks/faults). Afterwards an undisturbed run is made, and every loss compared.
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
from baichuan_jax.runs.folder import Run

# Shorter limits than a cluster's, longer than a busy machine's pauses; three replicas; a save every
# few steps.
QUICK = (
    "--resilience.hang_seconds",
    "6",
    "--resilience.silence_seconds",
    "6",
    "--resilience.check_every",
    "5",
)
MODEL = (
    "--model.hidden_size",
    "64",
    "--model.intermediate_size",
    "176",
    "--model.num_layers",
    "2",
    "--model.num_heads",
    "4",
    "--model.vocab_size",
    "512",
    "--tokenizer.vocab_size",
    "512",
    "--train.context_length",
    "64",
    "--train.global_batch_size",
    "6",
    "--train.num_steps",
    "1000000",
    "--optimizer.warmup_steps",
    "100",
    "--evaluate.every",
    "1000000",
    "--checkpoint.every",
    "10",
    "--metrics.tensorboard",
    "false",
    "--data.validation",
    "{}",
    "--data.train",
    "{baichuan_jax/data/sample/validation-en.jsonl.gz: 1.0}",
)
KINDS = (
    "kill",
    "kill in a save",
    "kill in a start",
    "stop",
    "hang",
    "exception",
    "nan",
    "bits",
    "truncate",
    "port",
    "slow",
    "quota",
)
FULL_DISK = "full disk"  # one more kind, where this is root: the checkpoints lie on a small file system of their own, in memory
DISK_MIB, FILLER = 64, ".filler"
STORAGE = {
    FULL_DISK: "No space left",
    "quota": "too large",
}  # kinds that are nobody's fault, and what a verdict must say


class Supervised:
    """A run under supervisors, seen through its folder."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.faults, self.run = (
            run_dir,
            run_dir.parent / f"{run_dir.name}-faults",
            Run(run_dir),
        )
        self.faults.mkdir(parents=True, exist_ok=True)

    def ended(self) -> bool:
        """Whether nobody is left to go on."""
        raise NotImplementedError

    @property
    def variables(self) -> dict[str, str]:
        """The environment of a training process that faults can reach and that compiles nothing twice."""
        return {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "FAULTS": str(self.faults),
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'benchmarks' / 'faults'}",
            "JAX_COMPILATION_CACHE_DIR": str(self.run_dir.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA warns of every program that it takes from there
        }

    @property
    def attempt(self) -> int:
        """The number of the newest launch."""
        return max(
            (int(path.name) for path in (self.run_dir / "attempts").glob("[0-9]*")), default=0
        )

    def file(self, name: str, attempt: int | None = None) -> Any:
        """The content of a launch's file, or None."""
        path = self.run_dir / "attempts" / str(attempt or self.attempt) / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def pid(self, process: int) -> int:
        """The process id of a training process of the newest launch."""
        return self.wait(
            lambda: self.file(f"process-{process}"), f"no heartbeat of process {process}"
        )["pid"]

    def wait(self, found: Callable[[], Any], message: str, seconds: float = 300) -> Any:
        """What `found` gives once it gives anything. Fails where all supervisors end first, or time does."""
        deadline = time.monotonic() + seconds
        while not (value := found()):
            if time.monotonic() > deadline or self.ended():
                raise AssertionError(
                    f"{message}; see {self.run_dir.parent}/{self.run_dir.name}-*.log"
                )
            time.sleep(0.05)
        return value

    def steps(self, count: int = 1, after: int = 0) -> tuple[int, float]:
        """The newest step, once a launch after `after` has written `count` of them; and when it wrote the first."""

        def written() -> tuple[int, float] | None:
            begun = [
                e["time"]
                for e in self.run.events
                if e["kind"] == "started" and e["attempt"] == self.attempt > after
            ]
            found = [
                line
                for line in self.run.metrics
                if begun and line["time"] >= begun[-1] and "loss" in line
            ]
            return (found[-1]["step"], found[0]["time"]) if len(found) >= count else None

        return self.wait(written, f"no {count} steps after launch {after}")

    def inject(self, kind: str, process: int) -> float:
        """A fault inside a process; when it began there."""
        file = self.faults / f"{kind}-{process}"
        done = file.with_name(f"{file.name}.done")
        done.unlink(missing_ok=True)
        file.touch()
        self.wait(
            lambda: done.exists() and done.read_text(), f"process {process} did not take up {kind}"
        )
        return float(done.read_text())


class Cluster(Supervised):
    """A run under supervisors, one for each host of a cluster whose hosts all lie on this machine."""

    def __init__(
        self,
        run_dir: Path,
        words: list[str],
        *,
        hosts: int = 3,
        spares: int = 0,
        options: tuple[str, ...] = (),
        small_disk: bool = False,
    ) -> None:
        super().__init__(run_dir)
        self._words, self._options = [*words, "--run_dir", str(run_dir)], options
        self._hosts, self._held, self._disk = (
            hosts,
            [],
            run_dir / "checkpoints" if small_disk else None,
        )
        self._kept, self.earlier = run_dir.parent / f"{run_dir.name}-checkpoints", self.attempt
        if self._disk is not None:
            self._kept.mkdir(parents=True, exist_ok=True)
            self._disk.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", self._disk], check=True
            )
            shutil.copytree(self._kept, self._disk, dirs_exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("", 0))
            self.port = probe.getsockname()[1]
        self.supervisors = {name: self.start(name) for name in "abcdefgh"[: hosts + spares]}

    def start(self, name: str) -> subprocess.Popen:
        """The supervisor of one host."""
        options = [
            "--hosts",
            str(self._hosts),
            "--address",
            "127.0.0.1",
            "--port",
            str(self.port),
            *self._options,
        ]
        command = [
            sys.executable,
            "-m",
            "baichuan_jax.launch",
            "--host",
            name,
            *options,
            "--",
            *self._words,
        ]
        with open(self.run_dir.parent / f"{self.run_dir.name}-{name}.log", "a") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=REPOSITORY,
                env={**os.environ, **self.variables},
            )

    def ended(self) -> bool:
        return all(supervisor.poll() is not None for supervisor in self.supervisors.values())

    def fill(self) -> None:
        """Leave no byte free where checkpoints go."""
        with (
            open(self.run_dir / "checkpoints" / FILLER, "wb", buffering=0) as file,
            contextlib.suppress(OSError),
        ):
            while True:
                file.write(bytes(1 << 12))

    def take(self, port: int) -> None:
        """Listen on a port as soon as it is free, as long as the cluster lives."""
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        deadline = time.monotonic() + 10
        while True:
            try:
                held.bind(("0.0.0.0", port))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        held.listen()
        self._held.append(held)

    def stop(self) -> list[int]:
        """Ctrl-C on all hosts; their exit codes."""
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
            shutil.rmtree(self._kept)
            shutil.copytree(self._disk, self._kept)  # for a later call, since memory forgets
            subprocess.run(["umount", "--lazy", self._disk], check=True)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one fault. `culprit` is the host that suffered it, `named` the one that the verdict names (None: nobody).

    `right`: they are the same; NaN may also be nobody's, where they are everywhere before the
    replicas are compared, and so may a disk that takes nothing more, if only the reason is told.
    `lost_steps`: those since the checkpoint that the run went on from, or since the beginning where
    none was finished yet.
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


def inflict(cluster: Cluster, kind: str, process: int) -> float:
    """Let a process suffer a fault; when it began. A kill follows what only a new launch would notice."""
    checkpoints = cluster.run_dir / "checkpoints"
    if kind == "kill in a save":
        cluster.wait(lambda: list(checkpoints.glob("*.orbax-checkpoint-tmp*")), "no save")
    if kind == "truncate":
        newest = max(
            (path for path in checkpoints.glob("*") if path.name.isdigit()),
            key=lambda path: int(path.name),
        )
        largest = max(
            (path for path in newest.rglob("*") if path.is_file()),
            key=lambda path: path.stat().st_size,
        )
        os.truncate(largest, largest.stat().st_size // 2)
    now = time.time()
    if kind == "stop":
        os.kill(cluster.pid(process), signal.SIGSTOP)
    elif kind == FULL_DISK:
        cluster.fill()
    elif kind in ("kill", "kill in a save", "kill in a start", "truncate", "port"):
        coordinator = cluster.file("coordinator")  # None where a launch has only begun
        os.kill(cluster.pid(process), signal.SIGKILL)
        if (
            kind == "port"
        ):  # another program has taken process 0's port by the time that the next launch wants it
            cluster.take(int(coordinator["address"].rsplit(":", 1)[1]))
    else:
        now = cluster.inject(kind, process)
    return now


def suffer(cluster: Cluster, kind: str, process: int) -> Outcome:
    """Inflict a fault and wait until the run goes on."""
    cluster.steps()
    if (
        kind == "kill in a start"
    ):  # of the launch that follows another kill, before it has done a step
        before = cluster.attempt
        os.kill(cluster.pid(process), signal.SIGKILL)
        cluster.wait(
            lambda: cluster.attempt > before and cluster.file("plan"), "no launch after a kill"
        )
    attempt = cluster.attempt
    culprit = cluster.file("plan")["hosts"][process]
    began = inflict(cluster, kind, process)
    if kind == "slow":
        return _suffer_slowness(cluster, process, culprit, began)
    found = cluster.wait(lambda: cluster.file("verdict", attempt), f"no verdict on {kind}")
    if kind == FULL_DISK:
        (cluster.run_dir / "checkpoints" / FILLER).unlink()
    reached = max(line["step"] for line in cluster.run.metrics)
    _, again = cluster.steps(after=attempt)
    restored = [
        event["step"]
        for event in cluster.run.events
        if event["kind"] == "restored" and event["time"] > began
    ]
    named = found["verdict"]["host"]
    right = named == culprit or (kind == "nan" and named is None)
    if kind in STORAGE:
        right = named in (None, culprit) and STORAGE[kind] in found["verdict"]["evidence"]
    return Outcome(
        kind,
        culprit,
        named,
        right,
        found["verdict"]["cause"],
        found["verdict"]["rule"],
        found["detected"] - began,
        found["concluded"] - found["detected"],
        again - began,
        reached - (restored or [0])[-1],
        again > began,
    )


def _suffer_slowness(cluster: Cluster, process: int, culprit: str, began: float) -> Outcome:
    """Wait until the slow host is told; the run goes on meanwhile, and afterwards without slowness."""

    def told() -> dict[str, Any] | None:
        return next(
            (e for e in cluster.run.events if e["kind"] == "straggler" and e["time"] > began), None
        )

    found = cluster.wait(told, "no slow host was told")
    cluster.inject("slow", process)
    named = found["host"]
    return Outcome(
        "slow",
        culprit,
        named,
        named == culprit,
        "slow",
        "own time",
        found["time"] - began,
        0.0,
        0.0,
        0,
        True,
    )


def undisturbed(folder: Path, words: list[str], steps: int, hosts: int) -> dict[int, float]:
    """The losses of a run without faults, up to a step."""
    with Cluster(folder, words, hosts=hosts) as cluster:
        cluster.wait(
            lambda: max((line["step"] for line in cluster.run.metrics), default=0) >= steps,
            "too slow",
            3600,
        )
        cluster.stop()
        return cluster.run.curve("loss")


def words_of(folder: Path) -> list[str]:
    """The settings of a run that is small enough to be killed often."""
    return [
        "--config",
        "configs/tiny.yaml",
        *MODEL,
        *QUICK,
        "--data.cache_dir",
        str(folder / "cache"),
    ]


def _harm(
    cluster: Cluster, options: argparse.Namespace, display: Display, kept: Path
) -> list[Outcome]:
    """Fault after fault, until there were enough or the time is up. Those of earlier calls are in `kept`, and so will be these."""
    outcomes = (
        [Outcome(**fields) for fields in json.loads(kept.read_text())] if kept.exists() else []
    )
    deadline = time.monotonic() + 60 * options.minutes
    while len(outcomes) < options.faults and time.monotonic() < deadline:
        rng = random.Random(f"{options.seed} {len(outcomes)}")
        cluster.steps(
            12, after=max(cluster.earlier, cluster.attempt - 1)
        )  # so that each launch reaches a new checkpoint
        time.sleep(rng.uniform(0, 2))
        kind = rng.choice(options.kinds)
        outcomes.append(outcome := suffer(cluster, kind, rng.randrange(options.hosts)))
        kept.write_text(
            json.dumps([dataclasses.asdict(each) for each in outcomes]), encoding="utf-8"
        )
        seconds = f"{outcome.detect_seconds:.1f} + {outcome.localise_seconds:.1f} s, running after {outcome.recover_seconds:.1f} s"
        said = f"{kind} on {outcome.culprit}: {outcome.cause}, named {outcome.named} ({outcome.rule}) in {seconds}"
        display.say(f"{len(outcomes)}/{options.faults}  {said}")
    return outcomes


def _rows(outcomes: list[Outcome], kinds: list[str]) -> list[list[str]]:
    """Table of median and worst seconds by kind."""
    rows = []
    for kind in kinds:
        of = [outcome for outcome in outcomes if outcome.kind == kind]
        if of:
            cells = [
                [getattr(outcome, f"{name}_seconds") for outcome in of]
                for name in ("detect", "localise", "recover")
            ]
            right = f"{sum(outcome.right for outcome in of)}/{len(of)}"
            rows.append(
                [
                    kind,
                    right,
                    *[f"{statistics.median(values):.1f} / {max(values):.1f}" for values in cells],
                ]
            )
    return rows


def main() -> int:
    """The command."""
    kinds = [*KINDS, FULL_DISK] if os.geteuid() == 0 else list(KINDS)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="stop then; the same --folder goes on from there",
    )
    parser.add_argument(
        "--folder", type=Path, help="where the runs lie (default: a temporary folder)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    display = Display()
    with Cluster(
        folder / "run", words_of(folder), hosts=options.hosts, small_disk=FULL_DISK in options.kinds
    ) as cluster:
        outcomes = _harm(cluster, options, display, folder / "faults.json")
        last, _ = cluster.steps(3, after=cluster.attempt - 1)
        cluster.stop()
        disturbed = cluster.run.curve("loss")
    if len(outcomes) < options.faults:
        display.say(f"the same command with --folder {folder} goes on")
        return 0
    display.say("the same without faults ...")
    straight = undisturbed(folder / "undisturbed", words_of(folder), last, options.hosts)
    common = set(disturbed) & set(straight)
    equal = len(common) >= last and all(disturbed[step] == straight[step] for step in common)
    results = Results()
    recovered = f"{sum(outcome.recovered for outcome in outcomes)} of {len(outcomes)} recovered"
    results.table(
        f"Faults, {recovered}, losses of {len(common)} steps {'equal' if equal else 'NOT EQUAL'}: median / worst seconds",
        ["kind", "rightly named", "detect", "localise", "recover"],
        _rows(outcomes, options.kinds),
    )
    results.save(
        options.json,
        losses_equal=equal,
        steps=last,
        faults=[dataclasses.asdict(outcome) for outcome in outcomes],
    )
    wrong = [o for o in outcomes if not o.right and o.named is not None]
    return 0 if equal and not wrong and all(o.recovered for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
