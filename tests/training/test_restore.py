"""What a launch goes on from: after a kill while it rolled back, and where settings differ."""

import contextlib
import dataclasses
import json

import jax
import pytest
from conftest import build, run_state

from baichuan_jax.checkpoint.local_copies import RECORD, LocalCopies
from baichuan_jax.checkpoint.orbax import Checkpoints
from baichuan_jax.checkpoint.schedule import Schedule
from baichuan_jax.checkpoint.state import RunState, StateTarget
from baichuan_jax.checkpoint.store import CheckpointStore
from baichuan_jax.config.schema import ConfigError, DataConfig
from baichuan_jax.data.prepare import Prepared
from baichuan_jax.resilience.clock import Clock
from baichuan_jax.resilience.guard import plan_rollback
from baichuan_jax.runs.events import (
    CheckpointSaved,
    DataChanged,
    Event,
    NumericsFault,
    Restored,
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
        self.said = [*getattr(self, "said", []), text]


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


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows of which nothing is read."""

    identity: str

    def __len__(self) -> int:
        return 100


@pytest.fixture
def launch(tiny_config, tmp_path):
    """Restore as a launch with these settings does; `save` beforehand."""
    _, steps = build(tiny_config, (1, 1, 1, 1))
    target = StateTarget(steps.abstract_state)
    state = jax.tree.map(lambda shape: jax.numpy.ones(shape.shape, shape.dtype), steps.state_shapes)
    state = jax.device_put(state, steps.state_shardings)

    def start(events, corpora, batch_size=16, seed=42, skip=(), save=None, copies=False):
        config = dataclasses.replace(
            tiny_config,
            train=dataclasses.replace(tiny_config.train, global_batch_size=batch_size, seed=seed),
            data=DataConfig(train={name: weight for name, _, weight in corpora}, skip=list(skip)),
        )
        output = Recorded(events, 99)
        storage = Checkpoints(tmp_path / "checkpoints", config, "abc", target)
        local = None
        if copies:
            local = LocalCopies(tmp_path / "local", tmp_path / RECORD, 0, "here", "abc", target)
        store = CheckpointStore(storage, local, Schedule(config, 1e9), target, Clock(), output)
        rows = [(Rows(identity), weight) for _, identity, weight in corpora]
        try:
            rollback = plan_rollback(list(events), max_skips=3)
            found = restore(
                config, Prepared(None, rows, [(Rows("v"), 1.0)]), steps, store, rollback, output
            )
            if save is not None:
                storage.save(RunState(state, save, found.progress.at(save * batch_size)))
                storage.finish()
            if save is not None and local is not None:
                local.save(RunState(state, save, found.progress.at(save * batch_size)))
                local.finish()
            return found, " / ".join(getattr(output, "said", []))
        finally:
            store.close()

    return start


EN, ZH = ("en", "rows of en", 1.0), ("zh", "rows of zh", 1.0)


def test_other_settings_of_the_data_are_said_with_their_rows_and_recorded(launch):
    events: list[Event] = []
    launch(events, [EN, ZH], batch_size=4, save=5)
    assert of_kind(events, DataChanged) == []
    found, said = launch(
        events, [("zh", "rows of zh", 0.1), EN], batch_size=8, skip=[[2, 3], [6, 7]]
    )
    assert found.progress.row == 20
    assert found.position == 5
    # Position 2 had four rows then; position 6 has eight.
    assert found.skipped == ((8, 12), (28, 36))
    assert (
        "data: going on at row 20 of the run (5 batches so far); batches of 8 rows from here, 4 "
        "before; new weights from here: en 1 (10 rows taken), zh 0.1 (10 rows taken); the "
        "validation loss is over 100 rows from here, 64 before; data.skip [6, 7] means rows 28 to "
        "35 from here, 24 to 27 before; rows 28 to 35 are left out by "
        "number, and are other text in this mixture"
    ) in said
    (event,) = of_kind(events, DataChanged)
    assert (event.step, event.position, event.row, len(event.changes)) == (5, 5, 20, 5)


def test_windows_of_an_earlier_version_stay_the_same_rows_when_the_batch_size_changes(launch):
    """Ahead of the run, where nothing but the batch size of their time says which rows they are."""
    events: list[Event] = []
    launch(events, [EN], batch_size=4, save=5)
    events += [WindowSkipped(begin=7, end=9, reason="not finite"), RolledBack(before=9)]
    assert launch(events, [EN], batch_size=4)[0].skipped == ((28, 36),)
    for _ in range(2):
        found, _ = launch(events, [EN], batch_size=8)
        assert found.skipped == ((28, 36),)
    launch(events, [EN], batch_size=8, save=6)
    assert launch(events, [EN], batch_size=8)[0].skipped == ((28, 36),)
    assert [event.rows for event in of_kind(events, WindowSkipped)] == [None, [28, 36]]


@pytest.mark.parametrize("copies", [False, True])
def test_checkpoints_of_an_earlier_version_go_on(launch, tmp_path, capfd, copies):
    """Its copies on hosts' disks do not: the run has no digest of them."""
    launch([], [EN, ZH], batch_size=4, save=5, copies=copies)
    folder = tmp_path / "checkpoints" / "5"
    (folder / "sizes.json").unlink()
    run = json.loads((folder / "run" / "metadata").read_text())
    del run["progress"]
    (folder / "run" / "metadata").write_text(json.dumps(run))
    if copies:
        (tmp_path / RECORD).unlink()
    for batch_size, changed in ((4, 0), (8, 1)):
        events: list[Event] = []
        found, said = launch(events, [EN, ZH], batch_size=batch_size, copies=copies)
        assert (found.position, found.progress.row, found.progress.taken()) == (5, 20, [10, 10])
        assert "earlier version and does not say which rows it read of en, zh" in said
        assert len(of_kind(events, DataChanged)) == changed
        assert [event.local for event in of_kind(events, Restored)] == [False]
        assert ("local_copies.json has no digest of it" in capfd.readouterr().err) == copies


def test_another_seed_is_refused_where_a_checkpoint_is(launch):
    launch([], [EN], save=5)
    with pytest.raises(ConfigError, match=r"train\.seed=43, .* 80 rows in the order of seed 42"):
        launch([], [EN], seed=43)


def test_one_corpus_under_two_names_is_said(launch):
    _, said = launch([], [EN, ("twin", "rows of en", 2.0)])
    assert "twin and en are the same rows: each row is read for both" in said


def test_other_rows_under_the_same_name_are_said_with_their_number(launch):
    launch([], [EN, ZH], save=5)
    found, said = launch([], [("en", "grown", 1.0), ZH])
    assert found.progress.taken() == [40, 40, 0]
    assert "the rows of en are others than those this run has read 40 of" in said
