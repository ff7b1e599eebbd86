"""Spikes, rollbacks and the checkpoint interval, without a model."""

import math

import numpy as np
import pytest

from baichuan_jax.resilience.checkpoint_interval import (
    DEVICE_SECONDS_PER_FAULT,
    FaultHistory,
    fault_history,
    seconds_between_saves,
    seconds_per_fault,
)
from baichuan_jax.resilience.guard import Spikes, Window, plan_rollback
from baichuan_jax.runs.events import (
    CheckpointSaved,
    Completed,
    Corruption,
    Event,
    Interrupted,
    NumericsFault,
    Started,
    WindowSkipped,
    of_kind,
)


def curve(num_steps: int, seed: int = 0) -> list[float]:
    """Losses like those of a run: falling, noisy."""
    rng = np.random.default_rng(seed)
    return [2 + 4 * math.exp(-step / 150) + 0.05 * rng.normal() for step in range(num_steps)]


def test_an_ordinary_curve_has_no_spike():
    spikes = Spikes(20.0, [])
    rng = np.random.default_rng(1)
    for loss in curve(1500):
        assert spikes.check(loss=loss, grad_norm=float(rng.lognormal(0, 0.5))) is None


@pytest.mark.parametrize(
    "values", [{"loss": 5.0, "grad_norm": 1.0}, {"loss": 2.0, "grad_norm": 60.0}]
)
def test_a_spike_is_named_with_its_limit_and_does_not_become_usual(values):
    spikes = Spikes(20.0, [])
    rng = np.random.default_rng(1)
    for loss in curve(1200):
        spikes.check(loss=loss, grad_norm=float(rng.lognormal(0, 0.3)))
    steps = [spikes.check(**values) for _ in range(200)]
    found = [step for step in steps if step is not None]
    first = 0 if values["loss"] > 2 else 2  # one large gradient, or two, are clipped and do no harm
    assert steps[:first] == [None] * first
    assert all("deviations" in spike.reason for spike in found)
    assert [spike.steps for spike in found] == list(range(first + 1, 201))
    assert spikes.check(loss=2.0, grad_norm=1.0) is None
    assert Spikes(0.0, curve(1200)).check(**values) is None


def test_large_gradients_apart_from_each_other_are_no_spike():
    """As in the first minutes of a small model: norms of 0.5, one of 4.6, and ordinary losses."""
    spikes = Spikes(20.0, [])
    for step in range(1000):
        assert (
            spikes.check(
                loss=2.0,
                grad_norm=9.0 if step % 5 in (0, 1) and step > 80 else 0.5 + 0.01 * (step % 7),
            )
            is None
        )


def test_too_few_steps_say_nothing():
    assert Spikes(20.0, curve(63)).check(loss=1e6, grad_norm=1.0) is None
    assert Spikes(20.0, curve(64)).check(loss=1e6, grad_norm=1.0) is not None


def numerics(step: int, begin: int, end: int) -> Event:
    return NumericsFault(step=step, begin=begin, end=end, reason="not finite")


def test_the_first_time_replays_the_second_skips_the_window_and_so_on_until_there_were_enough():
    events: list[Event] = [CheckpointSaved(step=step) for step in (2, 4, 6, 8, 10)]
    events.append(numerics(10, 12, 15))
    plan = plan_rollback(events, 2)
    assert (plan.windows, plan.before, plan.newest) == ((), 10, 9)
    events += plan.events
    # Answered: an ordinary restart changes nothing.
    assert plan_rollback(events, 2).before is None
    events.append(numerics(10, 12, 15))
    plan = plan_rollback(events, 2)
    assert (plan.windows, plan.before, plan.newest) == ((Window(12, 15),), 10, 6)
    events += plan.events
    for begin in (20, 40):
        events.append(numerics(begin, begin, begin + 1))
        events += plan_rollback(events, 2).events
        events.append(numerics(begin, begin, begin + 1))
        if begin == 20:
            events += plan_rollback(events, 2).events
    assert [event.begin for event in of_kind(events, WindowSkipped)] == [12, 20]
    with pytest.raises(RuntimeError, match="2 windows of data have been left out already"):
        plan_rollback(events, 2)


def test_places_are_compared_and_left_out_by_rows_where_the_batch_size_has_changed():
    """The same rows have another position; another fault at the same position is another place."""

    def fault(step: int, begin: int, rows: list[int]) -> Event:
        return NumericsFault(step=step, begin=begin, end=begin + 1, rows=rows, reason="not finite")

    events: list[Event] = [fault(40, 40, [160, 164])]
    events += plan_rollback(events, 2).events
    events.append(fault(40, 40, [200, 208]))
    plan = plan_rollback(events, 2)
    assert plan.windows == ()
    events += [*plan.events, fault(35, 35, [160, 168])]
    plan = plan_rollback(events, 2)
    assert plan.windows == (Window(35, 36, (160, 168)),)
    assert [event.rows for event in plan.events if isinstance(event, WindowSkipped)] == [[160, 168]]
    # Killed before it said that it rolled back.
    assert plan_rollback([*events, plan.events[0]], 2).windows == plan.windows
    # A window that an earlier version recorded, and its rows as they were found later.
    again = [WindowSkipped(begin=1, end=2, reason="r", rows=rows) for rows in (None, [4, 8])]
    assert plan_rollback(list(again), 2).windows == (Window(1, 2, (4, 8)),)


def test_corruption_goes_back_to_before_its_step_and_skips_no_data():
    events: list[Event] = [Corruption(step=7, reason="replicas differ")]
    plan = plan_rollback(events, 0)
    assert (plan.windows, plan.before, plan.newest) == ((), 7, 6)
    assert plan_rollback([*events, *plan.events], 0).before is None


def test_launches_that_did_not_end_as_they_should_are_faults():
    def started(time: float) -> Event:
        return Started(attempt=1, time=time)

    assert fault_history([]) == FaultHistory(0, 0.0)
    events = [started(10.0), started(20.0), Interrupted(step=1, position=1, time=30.0)]
    assert fault_history(events) == FaultHistory(1, 20.0)
    events += [started(40.0), Completed(step=2, time=50.0)]
    assert fault_history(events) == FaultHistory(1, 40.0)
    # A clock that was set back.
    assert fault_history([started(100.0), started(20.0)]) == FaultHistory(2, 0.0)


def test_young_and_daly():
    """A thousand GPUs, a save that blocks for 3 s: sqrt(2 * 3 * 50.7 h) = 17 minutes, by hand."""
    mean = seconds_per_fault(1000, 0.0, 0)
    assert mean == DEVICE_SECONDS_PER_FAULT / 1000
    assert seconds_between_saves(3.0, 20.0, mean) == pytest.approx(
        math.sqrt(6 * 50.7 * 3600), rel=1e-6
    )
    # Never more than a hundredth of the time.
    assert seconds_between_saves(30.0, 20.0, 60.0) == 3000.0
    assert seconds_between_saves(0.01, 90.0, 60.0) == 135.0  # saves do not overlap
    assert seconds_per_fault(1000, 36_000.0, 9) == pytest.approx((50.7 * 3600 + 36_000) / 10)


def test_the_optimum_loses_least():
    """Against the cost itself: time blocked and steps repeated per second, over a grid."""
    blocked, mean = 2.0, 4 * 3600.0
    loss = lambda interval: blocked / interval + interval / 2 / mean
    best = min((float(x) for x in np.geomspace(10, 1e5, 4000)), key=loss)
    assert seconds_between_saves(blocked, 1.0, mean) == pytest.approx(best, rel=0.01)
