"""What a launch goes on from, where the launch before it was killed while it rolled back."""

import contextlib

import jax
import pytest
from conftest import build, run_state

from baichuan_jax.checkpoint.orbax import Checkpoints
from baichuan_jax.checkpoint.schedule import Schedule
from baichuan_jax.checkpoint.state import StateTarget
from baichuan_jax.checkpoint.store import CheckpointStore
from baichuan_jax.data.prepare import Prepared
from baichuan_jax.resilience.clock import Clock
from baichuan_jax.resilience.guard import plan_rollback
from baichuan_jax.runs.events import (
    CheckpointSaved,
    Event,
    NumericsFault,
    RolledBack,
    WindowSkipped,
    of_kind,
)
from baichuan_jax.training.restore import restore


class Killed(BaseException):
    """The end of a launch at any place."""


class Recorded:
    """An output that keeps so many events; right after them the launch is killed."""

    def __init__(self, events: list[Event], lifetime: int) -> None:
        self.events, self._left = events, lifetime

    def event(self, event: Event) -> None:
        if self._left > 0:
            self.events.append(event)
        self._left -= 1
        if self._left <= 0:
            raise Killed

    def say(self, text: str, style: str = "") -> None:
        pass


def prepared(train: list) -> Prepared:
    """Rows and their weights, as data.train names them; no other part is looked at."""
    return Prepared(None, train, [])


@pytest.mark.parametrize("lifetime", [0, 1, 2])
@pytest.mark.parametrize("repeated", [False, True])
def test_a_rollback_that_was_killed_is_done_by_the_next_launch(
    tiny_config, tmp_path, lifetime, repeated
):
    """No launch goes on from a checkpoint of the fault's step or later, and no window is lost."""
    config, steps = build(tiny_config, (1, 1, 1, 1))
    target = StateTarget(steps.abstract_state)
    state = jax.tree.map(lambda shape: jax.numpy.ones(shape.shape, shape.dtype), steps.state_shapes)
    state = jax.device_put(state, steps.state_shardings)
    fault = NumericsFault(step=4, begin=40, end=50, reason="not finite")
    saved = [CheckpointSaved(step=step) for step in (1, 2, 3, 5)]
    events: list[Event] = [*saved, fault]
    if repeated:
        events += [RolledBack(before=4), fault]

    def launch(lifetime: int):
        checkpoints = Checkpoints(tmp_path / "checkpoints", config, "abc", target)
        output = Recorded(events, lifetime)
        store = CheckpointStore(checkpoints, None, Schedule(config, 1e9), target, Clock(), output)
        try:
            for save in saved if not checkpoints.steps() else ():
                checkpoints.save(run_state(state, save.step, save.step * 10, batch_size=16))
                checkpoints.finish()
            rollback = plan_rollback(list(events), max_skips=1)
            return restore(config, prepared([]), steps, store, rollback, output)
        finally:
            store.close()

    for _ in range(2):
        with contextlib.suppress(Killed):
            launch(lifetime)
    found = launch(9)
    assert found.step == (2 if repeated else 3)
    assert found.skipped == (((640, 800),) if repeated else ())  # rows
    assert 5 not in {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert plan_rollback(events, max_skips=1).before is None
    assert len(of_kind(events, RolledBack)) == 1 + repeated
    assert len(of_kind(events, WindowSkipped)) == repeated
