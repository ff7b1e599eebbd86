"""A supervisor's hold on the processes of its host."""

import dataclasses
import signal
import time
import types

import pytest

from baichuan_jax import launch
from baichuan_jax.config.files import load_config, shipped
from baichuan_jax.config.schema import Config, MeshConfig
from baichuan_jax.resilience import host_processes as module
from baichuan_jax.resilience.causes import BadHost
from baichuan_jax.resilience.host_processes import HostProcesses
from baichuan_jax.resilience.launch_files import HostEnd, LaunchFolder, LaunchPlan
from baichuan_jax.runs.events import Started, append_event


class Child:
    """A process that ends when it is told to, or never."""

    pid = 7

    def __init__(self):
        self.code, self.signals = None, []

    def poll(self):
        """Its exit code once it has ended."""
        return self.code

    def kill(self):
        """SIGKILL, which a process that waits in the kernel does not see."""
        self.signals.append("kill")

    def send_signal(self, number):
        """Any signal."""
        self.signals.append(number)


@pytest.fixture
def clock(monkeypatch):
    found = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: found.now)
    return found


@pytest.fixture
def processes(tmp_path):
    found = HostProcesses(LaunchFolder(tmp_path / "1"), "h")
    found._children = {0: Child(), 1: Child()}
    return found


def test_an_end_says_whether_its_process_was_killed(processes):
    first, second = processes._children.values()
    processes.kill({1})
    first.code, second.code = 0, -9
    assert processes.poll() == frozenset()
    ends = {process: (end.code, end.stopped) for process, end in processes.exits.items()}
    assert ends == {0: (0, False), 1: (-9, True)}
    # Once: its time is when it was seen.
    before = dict(processes.exits)
    processes.poll()
    assert processes.exits == before
    processes.send(15)
    assert first.signals == []


def test_a_process_that_a_kill_does_not_end_makes_its_host_a_bad_one(processes, clock):
    """It waits in the kernel for a device; the supervisor leaves, and the other hosts go on."""
    processes.kill({0})
    clock.now += 59
    # Killed again, it has no more time.
    processes.kill({0})
    assert processes.poll() == {0, 1}
    clock.now += 2
    with pytest.raises(BadHost, match=r"process 0 \(number 7\) on h has not ended 60 s after"):
        processes.poll()


@pytest.mark.parametrize("moment", ["plan", "coordinator", "start", "second start"])
def test_a_signal_before_the_processes_run_stops_them_all_the_same(moment, tmp_path, monkeypatch):
    """It would be kept, and nothing would be stopped until the run's last step."""

    class Ending(Child):
        """It saves and stops when it is asked to, and else trains on for some looks."""

        def poll(self):
            self.looks = getattr(self, "looks", 0) + 1
            return 75 if self.signals else 0 if self.looks > 20 else None

    begun: list[Ending] = []

    class Starting(HostProcesses):
        def start(self, placement, argv, coordinator):
            if moment == ["start", "second start"][placement.process]:
                supervisor._on_signal(signal.SIGTERM, None)
            begun.append(Ending())
            self._children[placement.process] = begun[-1]

    config = Config(run_dir=str(tmp_path / "run"))
    options, _ = launch._parse(["--host", "h", "--address", "127.0.0.1"])
    supervisor = launch.Supervisor(options, config, [])
    monkeypatch.setattr(launch, "HostProcesses", Starting)
    monkeypatch.setattr(launch, "TICK", 0.0)
    if moment == "plan":
        supervisor._on_signal(signal.SIGTERM, None)
    elif moment == "coordinator":
        asks = lambda address, port: supervisor._on_signal(signal.SIGTERM, None) or True
        monkeypatch.setattr(launch, "is_free", asks)
    first = supervisor.launches[1]
    supervisor._take_part(first, LaunchPlan(("h",), 2))
    end = first.read(HostEnd, "h")
    assert end is not None
    assert end.asked
    codes = [] if moment in ("plan", "coordinator") else [75, 75]
    assert [exit.code for exit in end.exits.values()] == codes
    assert len(begun) == len(codes)


def test_numbers_of_hosts_that_do_not_fit_are_passed_over_and_the_reason_is_said(
    tmp_path, monkeypatch, capsys
):
    """Of four hosts of eight devices, which share one copy of the state, one is lost."""
    append_event(tmp_path / "run", Started(attempt=1, devices=32, processes=4))
    settings = ["mesh.state=4", "mesh.fsdp=8", "train.global_batch_size=96"]
    config = load_config(shipped()["tiny"], [f"run_dir={tmp_path}/run", *settings])
    options, _ = launch._parse(["--host", "a", "--address", "127.0.0.1", "--join_seconds", "0"])
    options.hosts, options.min_hosts = 4, 1
    supervisor = launch.Supervisor(options, config, [])
    monkeypatch.setattr(launch.Supervisor, "_alive", lambda *_: {"a", "b", "c"})
    monkeypatch.setattr(launch, "TICK", 0.0)
    assert supervisor._agree_on_plan(supervisor.launches[2], time.monotonic()) is None
    said = capsys.readouterr().err
    assert "a, b, c; --min_hosts is 1; 3 do not fit: mesh (data, state, fsdp, context" in said
    assert "needs a multiple of 32 devices and there are 24" in said
    # One copy over all hosts that are left fits whatever divides batch and model.
    mesh = MeshConfig(data=1, state=-1, fsdp=8)
    supervisor.config = dataclasses.replace(config, mesh=mesh)
    plan = supervisor._agree_on_plan(supervisor.launches[2], time.monotonic())
    assert plan is not None
    assert plan.hosts == ("a", "b", "c")
