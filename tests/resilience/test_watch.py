"""The watch over one process: what it costs, its limits, and what it does alone."""

import os
import time

import pytest

from baichuan_jax.config.schema import ResilienceConfig
from baichuan_jax.resilience.causes import Cause
from baichuan_jax.resilience.clock import Clock
from baichuan_jax.resilience.heartbeats import BEAT
from baichuan_jax.resilience.launch_files import Launches, Report
from baichuan_jax.resilience.limits import PhaseLimits
from baichuan_jax.resilience.placement import Placement
from baichuan_jax.resilience.stragglers import ROUNDS, Stragglers
from baichuan_jax.resilience.watch import Watch
from baichuan_jax.runs.events import StragglerFound


def test_heartbeats_cost_less_than_a_thousandth(tmp_path):
    watch = Watch(ResilienceConfig(), Clock(), tmp_path / "attempts")
    with watch:
        watch.join()
        (channel,) = watch._channels
        began = time.thread_time()
        for _ in range(200):
            channel.publish(watch.report())
        assert (time.thread_time() - began) / 200 < 0.001 * BEAT
    assert not watch.report().cause


def test_heartbeats_lie_in_the_folder_of_a_new_launch(tmp_path):
    for number in (1, 2):
        clock = Clock()
        with Watch(ResilienceConfig(), clock, tmp_path / "attempts") as watch, clock("data"):
            found = watch.join()
            watch.reached(7)
            launch = Launches(tmp_path / "attempts")[number]
            assert (found, launch.supervised) == (number, False)
            deadline = time.monotonic() + 20
            while not (reports := launch.reports()):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert (reports[0].step, reports[0].phase, reports[0].cause) == (7, "data", None)


def test_who_has_compiled_first_waits_for_the_others():
    clock = Clock()
    limits = PhaseLimits(ResilienceConfig(hang_seconds=5, start_seconds=50), clock)
    for phase in ("data", "dispatch"):
        with clock(phase):
            pass
    assert limits.seconds("dispatch") == 50
    with clock("wait"):
        pass
    assert [limits.seconds(phase) for phase in ("dispatch", "wait", "evaluate")] == [5, 5, 50]


def test_a_phase_may_last_five_times_its_longest_and_a_checkpoint_ten_times_the_setting():
    clock = Clock()
    limits = PhaseLimits(ResilienceConfig(hang_seconds=5, start_seconds=50), clock)
    clock.longest = {"wait": 3.0, "data": 0.1, "checkpoint": 0.1}
    assert limits.seconds("wait") == 15.0
    assert limits.seconds("data") == 5
    assert limits.seconds("checkpoint") == 50
    assert limits.seconds("compile") == 50


def test_alone_a_standstill_is_reported_and_nothing_is_ended(tmp_path, capfd):
    clock = Clock()
    config = ResilienceConfig(hang_seconds=0.5, start_seconds=0.5)
    with Watch(config, clock, tmp_path / "attempts"), clock("data"):
        time.sleep(2.5)
    said = capfd.readouterr().err
    assert said.count("nothing has happened for") == 1
    assert "in test_alone_a_standstill" in said


def test_an_error_alone_passes_and_leaves_no_exit_report(tmp_path):
    def command() -> None:
        with Watch(ResilienceConfig(), Clock(), tmp_path / "attempts") as watch:
            watch.join()
            raise ValueError("UNAVAILABLE: x")

    with pytest.raises(ValueError, match="UNAVAILABLE: x"):
        command()
    reports = Launches(tmp_path / "attempts")[1].reports().values()
    assert [report for report in reports if report.cause is not None] == []


def test_under_a_supervisor_an_error_is_the_exit_report(tmp_path, monkeypatch):
    launch = Launches(tmp_path / "attempts")[4]
    placement = Placement("b", 1, 3, launch, supervisor=os.getppid(), full_processes=3)
    for name, value in placement.to_environment("a:1").items():
        monkeypatch.setenv(name, value)

    def command() -> None:
        with Watch(ResilienceConfig(), Clock(), tmp_path / "elsewhere") as watch:
            watch.reached(3)
            raise OSError("own fault")

    with pytest.raises(OSError, match="own fault"):
        command()
    report = launch.reports()[1]
    assert (report.cause, report.error, report.host) == (Cause.EXCEPTION, "OSError: own fault", "b")
    assert (report.step, report.phase) == (3, "other")
    assert "test_watch.py:test_under_a_supervisor_an_error_is_the_exit_report" in report.stack
    assert "in test_under_a_supervisor" in (launch.path / "stacks-1.txt").read_text()


def test_stragglers_are_handed_to_the_loop_once(tmp_path):
    watch = Watch(ResilienceConfig(), Clock(), tmp_path / "attempts")
    watch.reached(40)
    launch = Launches(tmp_path / "attempts")[1]
    for process, own in enumerate((0.02, 0.02, 0.12)):
        launch.publish(Report(process, f"h{process}", own_seconds=own))
    stragglers = Stragglers()
    for _ in range(ROUNDS + 1):
        watch._look_for_stragglers(stragglers, launch)
    (found,) = watch.stragglers()
    expected = StragglerFound(
        step=40, host="h2", process=2, seconds=0.12, median=0.02, time=found.time
    )
    assert found == expected
    assert watch.stragglers() == []


def test_a_placement_survives_the_environment(tmp_path, monkeypatch):
    launch = Launches(tmp_path)[2]
    placement = Placement("b", 5, 8, launch, supervisor=77, full_processes=16)
    for name, value in placement.to_environment("a:1").items():
        monkeypatch.setenv(name, value)
    found = Placement.from_environment()
    assert (found.host, found.process, found.supervisor, found.full_processes) == ("b", 5, 77, 16)
    assert found.folder is not None
    assert found.folder.path == launch.path
    assert not found.alone
