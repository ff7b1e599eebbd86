"""The supervisor of a host: `python -m baichuan_jax.launch [OPTIONS] -- --config FILE ...`.

It starts this host's training processes and keeps the run going. One supervisor runs on every host,
spares included; they agree through files in the run's folder (resilience/launch_files.py). A launch
goes through four stations, the same on every host: agree on a plan, run this host's processes to
their end, agree on a verdict, act on it. There is no leader: whoever is first writes plan and
verdict, so any host may be lost at any moment.
"""

import argparse
import contextlib
import math
import os
import signal
import socket
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from baichuan_jax.config.files import make_parser, parse_config
from baichuan_jax.config.parsing import (
    environment_number,
    refuse_credentials,
    whole_number,
)
from baichuan_jax.config.schema import Config, ConfigError, at_least, between
from baichuan_jax.resilience.addresses import (
    BIND_VARIABLE,
    SOCKET,
    is_free,
    join_port,
    own_address,
    refuse_loopback,
)
from baichuan_jax.resilience.causes import Cause, exit_code_table
from baichuan_jax.resilience.exits import run_command, say, say_from_handler, stop_signals
from baichuan_jax.resilience.goodput import account, show_accounting
from baichuan_jax.resilience.heartbeats import BEAT, HostHeartbeats
from baichuan_jax.resilience.host_processes import HostProcesses
from baichuan_jax.resilience.launch_files import (
    Coordinator,
    HostEnd,
    Launches,
    LaunchFolder,
    LaunchPlan,
    VerdictRecord,
)
from baichuan_jax.resilience.ownership import Claim, owned, owner_of
from baichuan_jax.resilience.placement import Placement
from baichuan_jax.resilience.policy import (
    REJOIN_SECONDS,
    choose_hosts,
    conclude,
    history_of,
    hosts_needed,
)
from baichuan_jax.resilience.waiting import Seen, Status, next_action
from baichuan_jax.resilience.waits import wait_until
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.events import (
    LocalCopySaved,
    PortTaken,
    Started,
    VerdictReached,
    append_event,
    latest,
)
from baichuan_jax.runs.folder import Run, refuse_links_in_run
from baichuan_jax.runs.private import trusted_folder

# Seconds between two looks at files and processes.
TICK = 0.2
# Ports that are tried from --port upward.
PORTS = 100
# The exit code of processes that are lost with their host.
KILLED = -signal.SIGKILL


class Supervisor:
    """Runs this host's processes of one launch after another, until a verdict says stop."""

    def __init__(self, options: argparse.Namespace, config: Config, argv: list[str]) -> None:
        self.options, self.config, self.argv = options, config, argv
        self.host: str = options.host
        self.run = Run(config.run_path)
        self.launches = Launches(config.run_path.absolute() / "attempts")
        # Twice the processes' own limit: these watch each other, and a late supervisor is no fault.
        patience = 2 * config.resilience.silence_seconds
        self.heartbeats = HostHeartbeats(self.launches, self.host, options.address or "", patience)
        # Of the launch under way.
        self.processes: HostProcesses | None = None
        # Signals so far that ask to stop.
        self.asked = 0
        self._claim: Claim | None = None

    def supervise(self) -> int:
        """Launch after launch. Returns the exit code of the last."""
        refuse_links_in_run(self.run.path)
        self._refuse_unsupervised()
        with owned(
            self.launches.host_lock(self.host),
            f"host {self.host} of run_dir={str(self.run.path)!r}",
            "give each supervisor of a run a name of its own with --host",
            silence=self.config.resilience.silence_seconds,
        ) as claim:
            self._claim = claim
            try:
                return self._supervise()
            finally:
                self.heartbeats.end()

    def _refuse_unsupervised(self) -> None:
        """Raise ConfigError where a process that no supervisor started writes the run."""
        owner = owner_of(self.launches.lock)
        if owner is None or owner.released or owner.launch is not None:
            return
        # It may be dead; one that lives is refused.
        with owned(
            self.launches.lock,
            f"run_dir={str(self.run.path)!r}",
            "give this run a folder of its own with --run_dir",
            silence=2 * self.config.resilience.silence_seconds,
            launch=0,
        ):
            return

    def _supervise(self) -> int:
        for number in stop_signals():
            signal.signal(number, self._on_signal)
        # Before the first heartbeat: once the others see that, they count on this host.
        launch = self._first_launch()
        threading.Thread(target=self._beat, daemon=True).start()
        began = time.monotonic()
        while True:
            plan = self._agree_on_plan(launch, began)
            if plan is None:
                cause = Cause.INTERRUPTED if self.asked else Cause.BAD_HOST
                return cause.exit_code
            self._take_part(launch, plan)
            found = self._agree_on_verdict(launch, plan)
            if not found.restart:
                # Once for the run, not on every host.
                if self.host == plan.hosts[0]:
                    show_accounting(Display(), account(self.run.path))
                return found.code
            launch, began = self.launches[launch.number + 1], time.monotonic()

    def _first_launch(self) -> LaunchFolder:
        """The launch to begin with: the one under way, else the next."""
        launch = self.launches[max(self.launches.latest(), 1)]
        if launch.read(VerdictRecord) is not None or not launch.supervised:
            return self.launches[launch.number + 1]
        plan = launch.read(LaunchPlan)
        mine = plan is not None and self.host in plan.hosts
        if mine and launch.read(HostEnd, self.host) is None:
            # A supervisor of this host took part and was lost: that launch has ended here.
            launch.write(HostEnd(), self.host)
        return launch

    def _on_signal(self, signum: int, frame: Any) -> None:
        """The first signal asks the processes to save and stop; a later SIGINT kills them."""
        # Schedulers send SIGTERM to every process and again later; it must not mean more. Nor must
        # the SIGHUP of a terminal that closes.
        if self.asked and signum != signal.SIGINT:
            return
        self.asked += 1
        if self._claim is not None:
            self._claim.stopping()
        first = self.asked == 1
        what = "saving, then stopping; once more quits unsaved" if first else "quitting"
        say_from_handler(f"{signal.Signals(signum).name}: {what}")
        if self.processes is not None:
            self._pass_on(self.processes)

    def _pass_on(self, processes: HostProcesses) -> None:
        processes.send(signal.SIGTERM if self.asked == 1 else signal.SIGKILL)

    def _beat(self) -> None:
        while True:
            try:
                self.heartbeats.beat()
            except (OSError, ValueError) as error:  # a file system that fails now may work again
                say(f"heartbeat of {self.host}: {error}")
            time.sleep(BEAT)

    def _agree_on_plan(self, launch: LaunchFolder, began: float) -> LaunchPlan | None:
        """The plan of a launch: made here, unless another host was first.

        None where somebody asked to stop, or too few hosts came.
        """
        options, shown = self.options, None
        before = self.launches[launch.number - 1].read(VerdictRecord)
        restart = before is not None and before.restart
        history = history_of(before)
        # After a fault the hosts are all there already; at first some may still be starting.
        patience = REJOIN_SECONDS if restart else options.join_seconds
        while not self.asked:
            plan = launch.read(LaunchPlan)
            if plan is not None:
                return plan
            # In every round anew: another host may have come, or have written the plan.
            alive, waited = self._alive(before, began), time.monotonic() - began
            minimum = options.min_hosts
            hosts = choose_hosts(
                alive,
                wanted=options.hosts,
                at_least=hosts_needed(options.hosts, minimum, len(alive), waited, patience),
                before=history.hosts,
                attributed=history.attributed,
                usable=self._usable,
            )
            if hosts:
                launch.claim(LaunchPlan(tuple(hosts), options.processes))
                continue
            here = ", ".join(sorted(alive)) or "none"
            if waited > options.join_seconds:
                count = min(len(alive), options.hosts)
                why = "" if count < minimum else f"; {count} do not fit: {self._obstacle(count)}"
                say(f"too few hosts within {waited:.0f} s: {here}; --min_hosts is {minimum}{why}")
                return None
            if shown != alive:
                shown = alive
                say(f"waiting for {options.hosts} hosts; ready: {here}")
            time.sleep(TICK)
        return None

    def _alive(self, before: VerdictRecord | None, began: float) -> set[str]:
        """Hosts that the next launch may count on."""
        # A host that the verdict counts as lost must have been heard since: to this host it may
        # look alive for some seconds more.
        lost = set() if before is None else set(before.lost)
        heartbeats = self.heartbeats
        return {h for h in heartbeats.alive() if h not in lost or heartbeats.heard_since(h, began)}

    def _usable(self, hosts: int) -> bool:
        """Whether mesh and batch divide by the devices of so many hosts."""
        return self._obstacle(hosts) is None

    def _obstacle(self, hosts: int) -> ConfigError | None:
        """Why this configuration cannot run on so many hosts.

        The number of their devices is known from the newest launch; before the first one, any
        number of hosts is tried.
        """
        started = latest(self.run.events, Started)
        if started is None:
            return None
        devices = started.devices // started.processes * self.options.processes * hosts
        try:
            self.config.check_mesh(self.config.mesh.resolve(devices))
        except ConfigError as error:
            return error
        return None

    def _take_part(self, launch: LaunchFolder, plan: LaunchPlan) -> None:
        """Run this host's processes of a launch to their end, and write how they ended."""
        if self.host not in plan.hosts:
            hosts = ", ".join(plan.hosts)
            say(f"launch {launch.number} runs on {hosts}; {self.host} is a spare")
            return
        # Its processes ended before this supervisor was started (_first_launch).
        if launch.read(HostEnd, self.host) is not None:
            return
        self.processes = processes = HostProcesses(launch, self.host)
        with self._socket_folder() as sockets:
            coordinator = self._coordinator(launch, plan, sockets)
            # Asked to stop since the plan was made: there is nothing yet to save.
            if coordinator is not None and not self.asked:
                if self.host == plan.hosts[0]:
                    hosts = ", ".join(plan.hosts)
                    say(f"launch {launch.number} on {hosts}; coordinator {coordinator}")
                for process in plan.processes_of(self.host):
                    processes.start(self._placement(launch, plan, process), self.argv, coordinator)
                # A signal that came meanwhile has reached only those that had started.
                if self.asked:
                    self._pass_on(processes)
            self._wait(plan, processes)
        self.processes = None
        launch.write(HostEnd(bool(self.asked), processes.exits), self.host)

    def _socket_folder(self) -> contextlib.AbstractContextManager[str | None]:
        """A new folder of this user alone for process 0's socket; None where other hosts come.

        Every user of this host reaches its ports, and jax's service asks nobody who he is.
        """
        if self.options.address is not None or os.environ.get(BIND_VARIABLE):
            return contextlib.nullcontext()
        parent = trusted_folder(Path(tempfile.gettempdir()), "TMPDIR")
        # The kernel's limit for a socket's path is 107 bytes.
        if len(os.fsencode(parent)) > 80:
            say(f"the path of TMPDIR={parent} is too long for a socket's: process 0's lies in /tmp")
            # Its way is looked at, and the folder in it has a new name and mode 0700.
            parent = trusted_folder(Path("/tmp"), "process 0's socket")  # nosec B108
        return tempfile.TemporaryDirectory(
            prefix="baichuan-socket-", dir=parent, ignore_cleanup_errors=True
        )

    def _coordinator(
        self, launch: LaunchFolder, plan: LaunchPlan, sockets: str | None
    ) -> str | None:
        """Where process 0 listens, which its host chooses and writes down.

        A socket in the folder, or else the first free port of that host. None where that host was
        lost before it did, or took longer than --join_seconds.
        """
        # Only its own host can tell which of its ports are free.
        first = plan.hosts[0]
        if self.host == first:
            address = f"{SOCKET}{sockets}/0" if sockets else self._free_address(launch)
            launch.write(Coordinator(address))
            return address
        found: Coordinator | None = None

        def decided() -> bool:
            nonlocal found
            found = launch.read(Coordinator)
            over = launch.read(VerdictRecord) is not None or self.heartbeats.lost(first)
            return found is not None or bool(self.asked) or over

        limit = self.options.join_seconds
        what = f"host {first} to choose process 0's port ({limit:.0f} s at most: --join_seconds)"
        wait_until(decided, what, limit, TICK)
        return None if found is None else found.address

    def _free_address(self, launch: LaunchFolder) -> str:
        """This host's address with the first free port. Raises ConfigError where there is none."""
        address = (self.options.address or "127.0.0.1").strip("[]")
        # Where process 0 listens is the user's choice then, and there is no other port to try.
        if given := os.environ.get(BIND_VARIABLE):
            return join_port(address, given.rpartition(":")[2])
        begin, end = self.options.port, self.options.port + PORTS
        own = own_address(address)
        for port in range(begin, end):
            if is_free(own, port):
                return join_port(address, port)
            event = PortTaken(attempt=launch.number, host=self.host, port=port)
            append_event(self.run.path, event)
            say(f"port {port} of {self.host} is taken; trying the next")
        raise ConfigError(f"no free port from {begin} to {end} on {self.host}; set --port")

    def _placement(self, launch: LaunchFolder, plan: LaunchPlan, process: int) -> Placement:
        return Placement(
            host=self.host,
            process=process,
            processes=len(plan.host_of),
            folder=launch,
            supervisor=os.getpid(),
            full_processes=self.options.hosts * self.options.processes,
        )

    def _wait(self, plan: LaunchPlan, processes: HostProcesses) -> None:
        """Until all processes of this host have ended. What to do meanwhile: waiting.py."""
        silence = self.config.resilience.silence_seconds
        seen = Seen()
        while True:
            running = processes.poll()
            codes = [end.code for end in processes.exits.values()]
            status = Status(
                running=running,
                silent=processes.silent(silence) if seen.failed is not None else frozenset(),
                codes=(*codes, *self._codes_elsewhere(processes.launch, plan)),
                can_grow=self._can_grow(plan),
            )
            # A process that is killed now has ended by the next round.
            action, seen = next_action(status, seen, time.monotonic())
            processes.kill(action.kill)
            if action.grow:
                say(f"more hosts are ready: saving, then restarting with them ({self.host})")
                processes.send(signal.SIGTERM)
            if action.done:
                return
            time.sleep(TICK)

    def _codes_elsewhere(self, launch: LaunchFolder, plan: LaunchPlan) -> list[int]:
        """Exit codes on other hosts of the launch so far; a lost host counts as killed."""
        codes = []
        for host in set(plan.hosts) - {self.host}:
            ended = launch.read(HostEnd, host)
            if ended is not None:
                # None at all: its supervisor was started again and wrote an empty end.
                codes += [end.code for end in ended.exits.values()] or [KILLED]
            elif self.heartbeats.lost(host):
                codes.append(KILLED)
        return codes

    def _can_grow(self, plan: LaunchPlan) -> bool:
        """Whether ready hosts could enlarge a launch that is too small. Its first host decides."""
        # Saved and restarted, so the run must gain: only counts that divide mesh and batch.
        hosts, wanted = plan.hosts, self.options.hosts
        if self.host != hosts[0] or len(hosts) >= wanted:
            return False
        most = min(len(self.heartbeats.alive() | set(hosts)), wanted)
        return any(self._usable(count) for count in range(len(hosts) + 1, most + 1))

    def _agree_on_verdict(self, launch: LaunchFolder, plan: LaunchPlan) -> VerdictRecord:
        """The verdict once a launch has ended everywhere: made here, unless another was first."""
        found: VerdictRecord | None = None
        ends: dict[str, HostEnd | None] = {}

        def decided() -> bool:
            nonlocal found, ends
            if (found := launch.read(VerdictRecord)) is not None:
                return True
            ends = {host: launch.read(HostEnd, host) for host in plan.hosts}
            if all(end is not None or self.heartbeats.lost(host) for host, end in ends.items()):
                self._conclude(launch, plan, ends)
            return False

        def left() -> str:
            hosts = [host for host in plan.hosts if ends.get(host) is None]
            return f"launch {launch.number} to end on {', '.join(hosts) or 'all hosts'}"

        # No limit of its own: every host that lives ends the launch within its processes' limits
        # (resilience.hang_seconds and so on, EXIT_SECONDS, KILL_SECONDS), and one that is lost is
        # not waited for.
        wait_until(decided, left, math.inf, TICK)
        assert found is not None
        if self.host == plan.hosts[0] or self.host not in plan.hosts:
            then = "restarting" if found.restart else "stopping"
            say(f"launch {launch.number}: {found.verdict}\n{then}: {found.reason}")
        return found

    def _conclude(
        self, launch: LaunchFolder, plan: LaunchPlan, ends: dict[str, HostEnd | None]
    ) -> None:
        """Write the verdict on a launch that has ended everywhere, unless another was first."""
        record = conclude(
            plan,
            {host: end for host, end in ends.items() if end is not None},
            launch.reports(),
            self.launches[launch.number - 1].read(VerdictRecord),
            checkpoint=self._newest_checkpoint(),
            now=time.time(),
        )
        # One line in the events, from the host whose verdict counts.
        if launch.claim(record):
            append_event(self.run.path, _event_of(launch, plan, record))

    def _newest_checkpoint(self) -> int:
        """The newest step from which a launch could go on; 0 where none is saved."""
        names = [path.name for path in (self.run.path / "checkpoints").glob("*")]
        saved = [step for name in names if (step := whole_number(name)) is not None]
        copied = latest(self.run.events, LocalCopySaved)
        return max([*saved, 0 if copied is None else copied.step], default=0)


def _event_of(launch: LaunchFolder, plan: LaunchPlan, record: VerdictRecord) -> VerdictReached:
    verdict = record.verdict
    return VerdictReached(
        attempt=launch.number,
        hosts=list(plan.hosts),
        cause=verdict.cause,
        rule=verdict.rule,
        evidence=verdict.evidence,
        host=verdict.host,
        processes=list(verdict.processes),
        restart=record.restart,
        code=record.code,
        reason=record.reason,
        detected=record.detected,
        concluded=record.concluded,
        checkpoint=record.checkpoint,
        lost=list(record.lost),
    )


DESCRIPTION = """Run training on this host and keep it going: start its processes, find out which
host caused a fault, restart without it. Run this on every host of the run, and on spare ones. What
follows -- goes to baichuan_jax.train."""


def _epilog() -> str:
    rows = [(code, restart, meaning) for code, _, restart, meaning in exit_code_table()]
    lines = [f"  {code:>4}  {restart:<7}  {meaning}" for code, restart, meaning in rows]
    wrapped = [textwrap.fill(line, 100, subsequent_indent=" " * 17) for line in lines]
    header = "exit codes:\n  code  restart  meaning"
    return "\n".join([header, *wrapped, "", "See docs/operations.md."])


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's options, and the arguments of the training processes."""
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.launch",
        usage="python -m baichuan_jax.launch [OPTIONS] -- --config FILE [--SETTING VALUE ...]",
        description=textwrap.fill(" ".join(DESCRIPTION.split()), 100),
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, text: str, kind: Callable = str, default: Any = None) -> None:
        parser.add_argument(name, type=kind, default=default, help=text)

    one = at_least(1)
    nodes = environment_number("SLURM_NNODES") or 1
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    add("--hosts", "hosts that train; more are spares (default: 1; in Slurm all nodes)", one, nodes)
    add("--min_hosts", "go on with this many where no spare is left (default: --hosts)", one)
    add("--processes", "training processes on each host (default: 1)", one, 1)
    add("--host", "this host's name in plans and reports (default: its host name)", str, name)
    add(
        "--address",
        "where other hosts reach this one; process 0 listens there alone (default: --host; for one "
        "host a socket that only this user reaches)",
    )
    add(
        "--port", "process 0's port, or the next free one (default: 7733)", at_least(1, 65535), 7733
    )
    add(
        "--join_seconds",
        "the first launch waits this long for hosts (default: 600)",
        between(0, 1e8),
        600.0,
    )
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:cut])
    # They name files of the run.
    for option in ("host", "address"):
        refuse_credentials(getattr(options, option) or "", f"--{option}")
    options.min_hosts = options.min_hosts or options.hosts
    if options.hosts > 1:
        options.address = options.address or options.host
    if not 1 <= options.min_hosts <= options.hosts:
        parser.error(
            f"--min_hosts {options.min_hosts} must lie between 1 and --hosts {options.hosts}"
        )
    if options.hosts > 1:
        refuse_loopback(options.address, "give this host's address with --address")
    return options, argv[cut + 1 :]


def main(argv: list[str]) -> int:
    """The command. Returns its exit code."""
    options, train_argv = _parse(argv)
    config = parse_config(make_parser("python -m baichuan_jax.train", ""), train_argv)
    return Supervisor(options, config, train_argv).supervise()


if __name__ == "__main__":
    run_command(
        lambda: main(sys.argv[1:]), interrupted="nothing was saved after the last checkpoint"
    )
