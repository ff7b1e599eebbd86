"""The supervisor of one host: `python -m baichuan_jax.launch [OPTIONS] -- --config FILE ...` starts training and keeps it going.

One supervisor runs on every host; they agree through the run's folder. Together they start a
launch, wait for its end, find out who caused it, and start the next one without the culprit, on a
spare or on fewer hosts. There is no chief: whoever is first writes.
"""

import argparse
import dataclasses
import errno
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from baichuan_jax.config.files import make_parser, parse_config
from baichuan_jax.config.schema import Config, ConfigError
from baichuan_jax.resilience.attempts import Attempts
from baichuan_jax.resilience.attribution import Exit, Verdict, blame
from baichuan_jax.resilience.clock import WAIT
from baichuan_jax.resilience.exits import BAD_HOST, INTERRUPTED, PREEMPTED, run_command, say
from baichuan_jax.resilience.goodput import read_ledger, say_ledger
from baichuan_jax.resilience.policy import MAX_BLAMES, Decision, choose_hosts, decide
from baichuan_jax.resilience.reports import Folder
from baichuan_jax.resilience.watch import (
    FOLDER_VARIABLE,
    FULL_VARIABLE,
    HOST_VARIABLE,
    SUPERVISOR_VARIABLE,
    UNSUPERVISED,
)
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.folder import Run, append_event

TICK = 0.2  # seconds between two looks at everything
PARTING_SECONDS = 90.0  # that processes wait for each other at a good end
LAST_WORDS_SECONDS = (
    10.0  # that the processes of a failing launch get to find out and leave by themselves
)
REJOIN_SECONDS = 5.0  # that a restart waits for more hosts, once there are enough
PORTS = 100  # tried from --port upward


class Supervisor:
    """Runs this host's processes of one launch after another, until a verdict says stop."""

    def __init__(self, options: argparse.Namespace, config: Config, words: list[str]) -> None:
        self.options, self.config, self.words = options, config, words
        self.host = options.host
        self.run = Run(config.run_path)
        # Twice the processes' own limit: these watch each other, and a supervisor that is late is
        # no fault.
        self.attempts = Attempts(
            config.run_path.absolute() / "attempts",
            self.host,
            2 * config.resilience.silence_seconds,
        )
        self.children: dict[int, subprocess.Popen] = {}
        self.asked = 0  # times that somebody asked to stop

    def supervise(self) -> int:
        """Launch after launch. Returns the exit code of the last."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)
        number = self._join()  # before the first heartbeat: who sees that counts on this host
        threading.Thread(target=self._beat, daemon=True).start()
        started = time.monotonic()
        while True:
            plan = self._plan(number, started)
            if plan is None:
                return INTERRUPTED if self.asked else BAD_HOST
            self._take_part(number, plan)
            decision = self._conclude(number, plan)
            if not decision.restart:
                if self.host == plan["hosts"][0]:
                    say_ledger(Display(), read_ledger(self.run.path))
                return decision.code
            number, started = number + 1, time.monotonic()

    def _join(self) -> int:
        """The launch to begin with: the one under way, else the next. One that this host was in has ended here."""
        number = max(self.attempts.latest(), 1)
        if self.attempts.read(number, "verdict") is not None:
            return number + 1
        plan = self.attempts.read(number, "plan")
        if (self.attempts.path / str(number) / UNSUPERVISED).exists():
            return number + 1
        if (
            plan is not None
            and self.host in plan["hosts"]
            and self.attempts.read(number, f"ended-{self.host}") is None
        ):
            self.attempts.write(number, f"ended-{self.host}", {"asked": False, "exits": {}})
        return number

    def _ask(self, signum: int, frame: Any) -> None:
        """The first signal asks the processes to save and stop, a later Ctrl-C ends them; a later SIGTERM says nothing new."""
        if self.asked and signum == signal.SIGTERM:
            return
        self.asked += 1
        os.write(2, f"\n{signal.Signals(signum).name}: ".encode())
        os.write(
            2,
            b"saving, then stopping; once more quits unsaved\n"
            if self.asked == 1
            else b"quitting\n",
        )
        self._signal(signal.SIGTERM if self.asked == 1 else signal.SIGKILL)

    def _signal(self, number: int) -> None:
        for child in self.children.values():
            if child.poll() is None:
                child.send_signal(number)

    def _beat(self) -> None:
        while True:
            try:
                self.attempts.beat(self.options.address)
            except OSError as error:
                say(f"heartbeat: {error}")
            time.sleep(1.0)

    def _plan(self, number: int, started: float) -> dict | None:
        """The plan of a launch: made here, unless another host was first. None where somebody asked to stop, or too few hosts came."""
        options = self.options
        before = self.attempts.read(number - 1, "verdict") if number > 1 else None
        again = before is not None and before["restart"]
        history = (
            before["history"]
            if before is not None and again
            else {"blames": {}, "hosts": [], "fruitless": 0}
        )
        lost = set(before["lost"]) if before is not None else set()
        said = None
        while not self.asked:
            plan = self.attempts.read(number, "plan")
            if plan is not None:
                return plan
            # A host that the verdict counts as lost must have been heard since: this one may hold
            # on to its heartbeat for longer.
            alive = {
                host
                for host in self.attempts.alive()
                if host not in lost or self.attempts.heard_since(host, started)
            }
            waited = time.monotonic() - started
            wanted = options.hosts
            if len(alive) < wanted and waited < (REJOIN_SECONDS if again else options.join_seconds):
                at_least = wanted
            else:
                at_least = options.min_hosts
            hosts = choose_hosts(
                alive,
                wanted=wanted,
                at_least=at_least,
                before=history["hosts"],
                blames=history["blames"],
                usable=self._usable,
            )
            if hosts:
                self.attempts.claim(
                    number, "plan", {"hosts": hosts, "processes": options.processes}
                )
                continue
            if waited > options.join_seconds:
                say(f"only {sorted(alive)} of {options.min_hosts} hosts came within {waited:.0f} s")
                return None
            if said != alive:
                said = alive
                say(f"waiting for {wanted} hosts; here: {', '.join(sorted(alive))}")
            time.sleep(TICK)
        return None

    def _usable(self, hosts: int) -> bool:
        """Whether mesh and batch divide by the devices of so many hosts, as far as an earlier launch has shown their number."""
        started = [event for event in self.run.events if event["kind"] == "started"]
        if not started:
            return True
        devices = (
            started[-1]["devices"] // started[-1]["processes"] * self.options.processes * hosts
        )
        try:
            self.config.check_mesh(self.config.mesh.resolve(devices))
        except ConfigError:
            return False
        return True

    def _take_part(self, number: int, plan: dict) -> None:
        """Run this host's processes of a launch to their end, and say how they ended; nothing where the plan goes without it."""
        hosts, processes = plan["hosts"], plan["processes"]
        if self.host not in hosts:
            say(f"launch {number} runs on {', '.join(hosts)}; {self.host} stands ready")
            return
        if self.attempts.read(number, f"ended-{self.host}") is not None:
            return
        coordinator = self._coordinator(number, hosts)
        if coordinator is not None:
            if self.host == hosts[0]:
                say(f"launch {number} on {', '.join(hosts)}; coordinator {coordinator}")
            first = hosts.index(self.host) * processes
            for process in range(first, first + processes):
                self.children[process] = self._start(
                    number, process, processes * len(hosts), coordinator
                )
        exits = self._wait(number, plan)
        self.children = {}
        ended = {
            str(process): {**dataclasses.asdict(end), "time": at}
            for process, (end, at) in exits.items()
        }
        self.attempts.write(
            number, f"ended-{self.host}", {"asked": bool(self.asked), "exits": ended}
        )

    def _coordinator(self, number: int, hosts: list[str]) -> str | None:
        """host:port of process 0: on its host the first free port; elsewhere what that host wrote. None where it died first."""
        if self.host == hosts[0]:
            for port in range(self.options.port, self.options.port + PORTS):
                if _is_free(port):
                    address = f"{self.options.address}:{port}"
                    self.attempts.write(number, "coordinator", {"address": address})
                    return address
                append_event(self.run.path, "port_taken", attempt=number, host=self.host, port=port)
                say(f"port {port} of {self.host} is taken; trying the next")
            raise ConfigError(
                f"no free port from {self.options.port} to {self.options.port + PORTS} on {self.host}; set --port"
            )
        while (found := self.attempts.read(number, "coordinator")) is None:
            if self.asked or self.attempts.read(number, "verdict") or self.attempts.lost(hosts[0]):
                return None
            time.sleep(TICK)
        return found["address"]

    def _start(self, number: int, process: int, count: int, coordinator: str) -> subprocess.Popen:
        """One process; only process 0 writes to this terminal, the others into log-PROCESS.txt of the launch's folder."""
        folder = self.attempts.path / str(number)
        variables = {
            FOLDER_VARIABLE: str(folder),
            HOST_VARIABLE: self.host,
            SUPERVISOR_VARIABLE: str(os.getpid()),
            "JAX_COORDINATOR_ADDRESS": coordinator,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(process),
            FULL_VARIABLE: str(self.options.hosts * self.options.processes),
        }
        command = [sys.executable, "-m", "baichuan_jax.train", *self.words]
        if process == 0:
            return subprocess.Popen(
                command, env={**os.environ, **variables}, start_new_session=True
            )
        with open(folder / f"log-{process}.txt", "wb") as log:
            return subprocess.Popen(
                command,
                env={**os.environ, **variables},
                start_new_session=True,
                stdout=log,
                stderr=log,
            )

    def _wait(self, number: int, plan: dict) -> dict[int, tuple[Exit, float]]:
        """How all processes of this host ended. Once one of the launch has failed, the others get a while to leave by themselves."""
        exits: dict[int, tuple[Exit, float]] = {}
        since: dict[
            str, float
        ] = {}  # when the first process ended well, when the first failed, since when the launch could grow
        stopped: set[int] = set()
        while len(exits) < len(self.children):
            time.sleep(TICK)
            for process, child in self.children.items():
                if process not in exits and (code := child.poll()) is not None:
                    exits[process] = (Exit(code, process in stopped), time.time())
            now = time.monotonic()
            codes = [end.code for end, _ in exits.values()] + self._codes_elsewhere(number, plan)
            if codes:
                since.setdefault("ended", now)
            if any(code not in (0, PREEMPTED) for code in codes):
                since.setdefault("failed", now)
            if (
                now - since.get("failed", now) > LAST_WORDS_SECONDS
                or now - since.get("ended", now) > PARTING_SECONDS
            ):
                useless = set(self.children) - set(exits)
            else:
                useless = self._silent(number) - set(exits) if "failed" in since else set()
            for process in useless:
                stopped.add(process)
                self.children[process].kill()
            if self._could_grow(plan) and not codes:
                if now - since.setdefault("grow", now) > REJOIN_SECONDS:
                    say(f"more hosts are there: saving, then going on with them ({self.host})")
                    self._signal(signal.SIGTERM)
                    since["grow"] = math.inf
            elif since.get("grow") != math.inf:
                since.pop("grow", None)
        return exits

    def _silent(self, number: int) -> set[int]:
        """Processes of this host, past their first step, whose hearts stopped without a last word: none will come."""
        reports = Folder(self.attempts.path / str(number)).read()
        last = time.time() - self.config.resilience.silence_seconds
        found = {p: reports[p] for p in self.children if p in reports}
        return {
            p
            for p, report in found.items()
            if report.cause is None and report.time < last and WAIT in report.seconds
        }

    def _codes_elsewhere(self, number: int, plan: dict) -> list[int]:
        """Exit codes on other hosts of the launch; a host that is dead counts as killed."""
        codes = []
        for host in set(plan["hosts"]) - {self.host}:
            ended = self.attempts.read(number, f"ended-{host}")
            if ended is not None:
                codes += [end["code"] for end in ended["exits"].values()] or [-signal.SIGKILL]
            elif self.attempts.lost(host):
                codes.append(-signal.SIGKILL)
        return codes

    def _could_grow(self, plan: dict) -> bool:
        """Whether hosts stand ready with which a launch that is too small could be larger. Its first host decides."""
        hosts, processes = plan["hosts"], self.options.hosts
        if self.host != hosts[0] or len(hosts) >= processes:
            return False
        ready = self.attempts.alive()
        return any(
            self._usable(count)
            for count in range(len(hosts) + 1, min(len(ready | set(hosts)), processes) + 1)
        )

    def _conclude(self, number: int, plan: dict) -> Decision:
        """The decision on a launch that has ended everywhere: made here, unless another host was first."""
        while (found := self.attempts.read(number, "verdict")) is None:
            ended = {host: self.attempts.read(number, f"ended-{host}") for host in plan["hosts"]}
            if all(end is not None or self.attempts.lost(host) for host, end in ended.items()):
                content = self._judge(
                    number, plan, {host: end for host, end in ended.items() if end is not None}
                )
                if self.attempts.claim(number, "verdict", content):
                    told = {
                        name: value
                        for name, value in content.items()
                        if name not in ("history", "verdict")
                    }
                    append_event(
                        self.run.path,
                        "verdict",
                        attempt=number,
                        hosts=plan["hosts"],
                        **told,
                        **content["verdict"],
                    )
            time.sleep(TICK)
        verdict = Verdict(**{**found["verdict"], "processes": tuple(found["verdict"]["processes"])})
        if self.host == plan["hosts"][0] or self.host not in plan["hosts"]:
            then = "starting again" if found["restart"] else "stopping"
            say(f"launch {number}: {verdict}\n{then}: {found['reason']}")
        return Decision(found["restart"], found["code"], found["reason"])

    def _judge(self, number: int, plan: dict, ended: dict[str, dict]) -> dict[str, Any]:
        """Verdict, decision and what the next plan needs to know."""
        hosts = {
            index * plan["processes"] + local: host
            for index, host in enumerate(plan["hosts"])
            for local in range(plan["processes"])
        }
        exits = {
            int(p): Exit(end["code"], end["stopped"])
            for e in ended.values()
            for p, end in e["exits"].items()
        }
        reports = Folder(self.attempts.path / str(number)).read()
        verdict = blame(hosts, reports, exits)
        times = [report.time for report in reports.values() if report.cause is not None]
        times += [
            end["time"]
            for e in ended.values()
            for end in e["exits"].values()
            if end["code"] != 0 and not end["stopped"]
        ]
        before = self.attempts.read(number - 1, "verdict") if number > 1 else None
        history = (
            before["history"]
            if before is not None and before["restart"]
            else {"blames": {}, "fruitless": 0}
        )
        newest = self._newest_checkpoint()
        fruitless = history["fruitless"] + 1 if newest == history.get("checkpoint") else 1
        last = None
        if before is not None and fruitless > 1:
            last = Verdict(
                **{**before["verdict"], "processes": tuple(before["verdict"]["processes"])}
            )
        decision = decide(
            verdict,
            processes=len(hosts),
            asked=any(e["asked"] for e in ended.values()),
            fruitless=fruitless,
            before=last,
        )
        blames = dict(history["blames"])
        if verdict.host is not None:
            # What a check has found weighs as much as being named twice.
            blames[verdict.host] = blames.get(verdict.host, 0) + (
                MAX_BLAMES if verdict.cause == "bad host" else 1
            )
        return {
            "verdict": dataclasses.asdict(verdict),
            **dataclasses.asdict(decision),
            "detected": min(times, default=time.time()),
            "concluded": time.time(),
            "checkpoint": newest,
            "lost": sorted(set(plan["hosts"]) - set(ended)),
            "history": {
                "blames": blames,
                "hosts": plan["hosts"],
                "fruitless": fruitless,
                "checkpoint": newest,
            },
        }

    def _newest_checkpoint(self) -> int:
        folder = self.run.path / "checkpoints"
        copied = [event["step"] for event in self.run.events if event["kind"] == "local_copy"][-1:]
        return max(
            [int(path.name) for path in folder.glob("*") if path.name.isdigit()] + copied, default=0
        )


def _is_free(port: int) -> bool:
    """Whether process 0 could listen on a port of this host, as jax does: on all addresses."""
    for family, address in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
    return True


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.launch",
        usage="python -m baichuan_jax.launch [OPTIONS] -- --config FILE [--SETTING VALUE ...]",
        description="Run training on this host and keep it going: start its processes, find out who caused a fault, start again "
        "without the culprit. Run it on every host of the run, and on spare ones; what follows -- goes to baichuan_jax.train.",
        epilog="Exit codes: 0 complete, 70 bug, 74 checkpoints cannot be written, 75 asked to stop, 76 faults without progress, "
        "77 numerics, 78 configuration, 79 too few hosts. See docs/operations.md.",
    )
    slurm = int(os.environ.get("SLURM_NNODES", "1"))
    parser.add_argument(
        "--hosts",
        type=int,
        default=slurm,
        help="hosts that train; further ones are spares (Slurm: all nodes)",
    )
    parser.add_argument(
        "--min_hosts",
        type=int,
        help="go on with so few where no spare is left (default: all of --hosts)",
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="training processes on each host (default: 1)"
    )
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    parser.add_argument(
        "--host",
        default=name,
        help="this host's name in reports and plans (default: its host name)",
    )
    parser.add_argument(
        "--address",
        help="where other hosts reach this one (default: its name; 127.0.0.1 with one host)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=7733,
        help="of process 0's coordinator; a taken one is passed over (7733)",
    )
    parser.add_argument(
        "--join_seconds",
        type=float,
        default=600.0,
        help="that the first launch waits for its hosts (600)",
    )
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    options.min_hosts = options.min_hosts or options.hosts
    options.address = options.address or ("127.0.0.1" if options.hosts == 1 else options.host)
    if not 1 <= options.min_hosts <= options.hosts:
        parser.error(
            f"--min_hosts {options.min_hosts} must lie between 1 and --hosts {options.hosts}"
        )
    return options, words[cut + 1 :]


def main(words: list[str]) -> int:
    """The command. Returns its exit code."""
    options, train_words = _parse(words)
    config = parse_config(make_parser("python -m baichuan_jax.train", ""), train_words)
    return Supervisor(options, config, train_words).supervise()


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
