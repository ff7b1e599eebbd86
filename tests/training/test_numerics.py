"""Which step and which data a launch that bad numbers end names."""

import pytest

from baichuan_jax.config.schema import ResilienceConfig
from baichuan_jax.resilience.causes import NumericsError
from baichuan_jax.resilience.guard import Window
from baichuan_jax.runs.events import Event, NumericsFault, of_kind
from baichuan_jax.step import Request
from baichuan_jax.training.numerics import NumericsGuard

# Before the window [12, 16) that is left out, and behind it.
DATA = [Window(2, 3, (8, 12)), Window(4, 5, (16, 20)), Window(5, 6, (20, 24))]


class Recorded:
    """An output that keeps its events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)

    def say(self, text: str, style: str = "") -> None:
        pass


@pytest.fixture
def guarded():
    """A guard that knows what is usual, and what it records."""
    output = Recorded()
    guard = NumericsGuard(output, ResilienceConfig(), [2.0] * 100, 0)
    for step in range(100):
        guard.check_step(step, Window(0, 1, (0, 4)), values(grad_norm=1.0))
    return guard, output


def values(**changed):
    usual = {"loss": 2.0, "grad_norm": 1.0, "finite": True, "request": Request.NONE}
    return {**usual, "nonfinite": 0, "nonfinite_run": 0, **changed}


def found(output: Recorded) -> list[tuple]:
    faults = of_kind(output.events, NumericsFault)
    return [(fault.step, fault.begin, fault.end, fault.rows) for fault in faults]


def test_steps_that_are_not_finite_name_the_data_of_the_first_to_the_last(guarded):
    guard, output = guarded
    for number, window in enumerate(DATA[:2]):
        guard.check_step(101 + number, window, values(finite=False, nonfinite_run=number + 1))
    with pytest.raises(NumericsError, match="leaves positions 2 to 5 of the data out"):
        guard.check_step(103, DATA[2], values(finite=False, nonfinite_run=3))
    assert found(output) == [(101, 2, 6, [8, 24])]


def test_a_spike_over_three_steps_begins_with_the_data_of_its_first(guarded):
    """Also where a window that is left out lies between them."""
    guard, output = guarded
    for number, window in enumerate(DATA):
        guard.check_step(101 + number, window, values(grad_norm=99.0))
    assert guard.saw_spike
    with pytest.raises(NumericsError):
        guard.check_step(104, Window(6, 7, (24, 28)), values(request=Request.ROLL_BACK))
    assert found(output) == [(101, 2, 6, [8, 24])]


def test_a_state_that_is_not_finite_names_the_data_of_its_last_step(guarded):
    """Not the data of the next one, which no step has seen."""
    guard, output = guarded
    guard.check_step(101, DATA[0], values())
    guard.check_state(101, finite=True)
    with pytest.raises(NumericsError):
        guard.check_state(101, finite=False)
    assert found(output) == [(101, 2, 3, [8, 12])]
