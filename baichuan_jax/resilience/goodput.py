"""The ledger of a run: where its time went, over all launches, and what every fault cost. Read from the run's folder alone."""

import dataclasses
import datetime
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from baichuan_jax.resilience.attempts import read
from baichuan_jax.resilience.clock import CHECKPOINT, DATA, DISPATCH, EVALUATE, WAIT
from baichuan_jax.resilience.reports import HANG, PEER, Folder, Report
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.events import Completed, Event, Interrupted, Started, of_kind
from baichuan_jax.runs.folder import Run

CAUSES = (
    "steps",
    "data",
    "imports and start",
    "pack",
    "compile",
    "restore",
    "save",
    "evaluate",
    "finish",
    "lost steps",
    "hang",
    "restart",
)
_CAUSE_OF = {
    DATA: "data",
    DISPATCH: "steps",
    WAIT: "steps",
    CHECKPOINT: "save",
    EVALUATE: "evaluate",
    "pack": "pack",
    "compile": "compile",
    "restore": "restore",
    "finish": "finish",
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One launch that ended in a fault. Seconds are None where something did not happen or is not known.

    `detect`: from its last sign of good life to the first that noticed; `localise`: from there to
    the verdict; `recover`: from the noticing to the first step of the next launch.
    """

    attempt: int
    time: float
    cause: str
    host: str | None
    processes: tuple[int, ...]
    rule: str
    evidence: str
    detect: float | None
    localise: float
    recover: float | None


@dataclasses.dataclass(frozen=True)
class Ledger:
    """`seconds` by CAUSES, which add up to `total`; `goodput` is the share of `steps` in it."""

    launches: int
    total: float
    seconds: dict[str, float]
    lost_steps: int
    faults: list[Fault]
    saves: int
    blocked_seconds: float
    own_seconds: dict[int, float]

    @property
    def goodput(self) -> float:
        return self.seconds["steps"] / self.total if self.total else 0.0

    @property
    def slowest(self) -> tuple[int, float] | None:
        """The process whose own work takes longest, and how many times the median's, of the newest launch."""
        if len(self.own_seconds) < 2:
            return None
        process = max(self.own_seconds, key=lambda process: self.own_seconds[process])
        return process, self.own_seconds[process] / max(
            statistics.median(self.own_seconds.values()), 1e-9
        )


def read_ledger(path: Path | str) -> Ledger:
    """The ledger of a run's folder."""
    run = Run(path)
    events, steps = run.events, [line for line in run.metrics if "loss" in line]
    launches = _launches(run.path / "attempts")
    seconds: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
    for report in launches.values():
        for phase, spent in report.seconds.items():
            seconds[_CAUSE_OF.get(phase, "imports and start")] += spent
        if report.cause in (HANG, PEER):
            seconds["hang"] += report.age
            seconds[_CAUSE_OF.get(report.phase, "imports and start")] -= report.age
    times = list(launch_spans(run.path).values())
    total = times[-1][1] - times[0][0] if times else 0.0
    seconds["restart"] = max(0.0, total - sum(end - begin for begin, end in times))
    newest = {line["step"]: index for index, line in enumerate(steps)}
    lost = [line for index, line in enumerate(steps) if newest[line["step"]] != index]
    seconds["lost steps"] = min(sum(line["step_seconds"] for line in lost), seconds["steps"])
    seconds["steps"] -= seconds["lost steps"]
    saves = [event for event in events if event["kind"] == "checkpoint"]
    return Ledger(
        launches=len(launches),
        total=total,
        seconds=seconds,
        lost_steps=len(lost),
        faults=_faults(run.path, events, steps),
        saves=len(saves),
        blocked_seconds=sum(event.get("blocked_seconds", 0.0) for event in saves),
        own_seconds=_own_seconds(run.path / "attempts", max(launches, default=0)),
    )


def history(events: list[Event]) -> dict[str, Any]:
    """`faults` of a run so far and the `run_seconds` they came in: for the checkpoint interval."""
    begun = of_kind(events, Started)
    good = sum(isinstance(event, Interrupted | Completed) for event in events)
    return {
        "faults": max(0, len(begun) - good),
        "run_seconds": events[-1].time - begun[0].time if begun else 0.0,
    }


def launch_spans(path: Path | str) -> dict[int, tuple[float, float]]:
    """Launch -> when its process 0 began, and when it was last heard (seconds since the epoch)."""
    launches = sorted(_launches(Path(path) / "attempts").items())
    return {
        number: (report.time - sum(report.seconds.values()), report.time)
        for number, report in launches
    }


def _launches(attempts: Path) -> dict[int, Report]:
    """The last report of process 0 of every launch."""
    found = {}
    for folder in attempts.glob("*"):
        report = read(folder / "process-0.json") if folder.name.isdigit() else None
        if report is not None:
            found[int(folder.name)] = Report.of(report)
    return found


def _own_seconds(attempts: Path, number: int) -> dict[int, float]:
    reports = Folder(attempts / str(number)).read()
    return {
        process: report.own_seconds
        for process, report in reports.items()
        if report.own_seconds is not None
    }


def _faults(path: Path, events: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[Fault]:
    faults = []
    for event in events:
        if event["kind"] != "verdict" or event["cause"] in ("completed", "preempted"):
            continue
        reports = Folder(path / "attempts" / str(event["attempt"])).read()
        again = [line["time"] for line in steps if line["time"] > event["concluded"]]
        signs = [
            _last_good(reports[process]) for process in event["processes"] if process in reports
        ]
        faults.append(
            Fault(
                event["attempt"],
                event["detected"],
                event["cause"],
                event["host"],
                tuple(event["processes"]),
                event["rule"],
                event["evidence"],
                max(0.0, event["detected"] - min(signs)) if signs else None,
                event["concluded"] - event["detected"],
                again[0] - event["detected"] if again and event["restart"] else None,
            )
        )
    return faults


def _last_good(report: Report) -> float:
    """When a process last did something right: it entered the phase in which it hung, or its heart beat."""
    return report.time - report.age if report.cause == HANG else report.time


def say_ledger(display: Display, ledger: Ledger) -> None:
    """Faults, and where the time went."""

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    if ledger.faults:
        rows = []
        for fault in ledger.faults:
            when = datetime.datetime.fromtimestamp(fault.time).strftime("%m-%d %H:%M:%S")
            who = (
                "unknown"
                if fault.host is None
                else f"{fault.host}: {', '.join(map(str, fault.processes))}"
            )
            figures = [seconds(fault.detect), seconds(fault.localise), seconds(fault.recover)]
            rows.append([when, str(fault.attempt), fault.cause, who, fault.rule, *figures])
        columns = [
            "time",
            "launch",
            "what",
            "host: process",
            "rule",
            "detect s",
            "localise s",
            "recover s",
        ]
        display.table("Faults", columns, rows)
        display.say(f"restarts: {_reasons(ledger)}")
    display.table(
        f"Where the time of {ledger.launches} launch(es) went",
        ["", "seconds", "share"],
        _rows(ledger),
    )
    share = f", {ledger.blocked_seconds / ledger.total:.2%} of the time" if ledger.total else ""
    display.say(
        f"goodput {ledger.goodput:.1%}; {ledger.lost_steps} steps done twice; {ledger.saves} checkpoints blocked the loop for "
        f"{ledger.blocked_seconds:.2f} s{share}"
    )
    if ledger.slowest is not None:
        process, ratio = ledger.slowest
        display.say(f"slowest in its own work: process {process}, {ratio:.2f} times the median")


def _rows(ledger: Ledger) -> list[list[str]]:
    """Table of the time by cause, largest first."""
    shown = sorted(
        (item for item in ledger.seconds.items() if item[1] >= 0.05), key=lambda item: -item[1]
    )
    rows = [[cause, f"{seconds:.1f}", f"{seconds / ledger.total:.1%}"] for cause, seconds in shown]
    return [*rows, ["in all", f"{ledger.total:.1f}", "100.0%"]]


def _reasons(ledger: Ledger) -> str:
    """Restarts by cause and host."""
    counts = Counter(
        f"{fault.cause}{f' on {fault.host}' if fault.host else ''}" for fault in ledger.faults
    )
    return ", ".join(f"{count} x {reason}" for reason, count in counts.most_common())
