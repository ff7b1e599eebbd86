"""The checkpoints of a run in both tiers: storage that all hosts share, and the hosts' own disks.

One store, one schedule: `due` says what to save, `save` starts it beside the next steps, `poll`
notices that it is whole, `finish` waits for it, `restore` takes the newest good state of either
tier. A save that failed does not count and is recorded. On storage it ends the launch only where it
must succeed, or among several processes, since Orbax leaves the others waiting. On a host's own
disk it never does: storage keeps what lasts.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator

import jax

from baichuan_jax.checkpoint.local_copies import LocalCopies
from baichuan_jax.checkpoint.orbax import Checkpoints
from baichuan_jax.checkpoint.schedule import Due, Schedule
from baichuan_jax.checkpoint.state import RunState, StateTarget
from baichuan_jax.resilience.causes import SaveFailed, errno_of, what_to_do
from baichuan_jax.resilience.clock import CHECKPOINT, Clock
from baichuan_jax.resilience.coordination import agree
from baichuan_jax.resilience.exits import say
from baichuan_jax.resilience.guard import Rollback
from baichuan_jax.resilience.waits import announced
from baichuan_jax.runs.events import (
    CheckpointCorrupt,
    CheckpointFailed,
    CheckpointSaved,
    LocalCopyCorrupt,
    LocalCopyFailed,
    LocalCopySaved,
    Restored,
)
from baichuan_jax.runs.output import Output
from baichuan_jax.step import Request, TrainState

# A copy counts once the metrics of this many later steps are here: process 0 took part in those
# steps, so it has written the metrics of all steps up to the copy's, and a restart from the copy
# leaves no hole in metrics.jsonl.
RECORDED = 2


@dataclasses.dataclass
class _Save:
    """A save under way. `blocked`: seconds that the loop stood still for it."""

    step: int
    since_last: float = 0.0
    blocked: float = 0.0
    began: float = dataclasses.field(default_factory=time.monotonic)


class CheckpointStore:
    """Saves and restores a run's state. `local` is None where checkpoint.local_dir is."""

    def __init__(
        self,
        storage: Checkpoints,
        local: LocalCopies | None,
        schedule: Schedule,
        target: StateTarget,
        clock: Clock,
        output: Output,
    ) -> None:
        self._storage, self._local, self._schedule = storage, local, schedule
        self._target, self._clock, self._output = target, clock, output
        # At most one save a tier: the next one waits for it, so that memory holds one copy.
        self._saving: dict[Checkpoints | LocalCopies, _Save] = {}

    def due(self, step: int, request: Request) -> Due:
        """What to save after this step; the same on all processes."""
        return self._schedule.due(step, request)

    def wanted(self) -> bool:
        """Whether this process should request a save, by its clock."""
        return self._schedule.wanted()

    def is_finite(self, state: TrainState) -> bool:
        """Whether every number of a state is finite; the same on all processes."""
        with self._clock(CHECKPOINT):
            return self._target.is_finite(state)

    def save(self, state: RunState, due: Due) -> None:
        """Start what is due; wait for it where it must succeed. Raises SaveFailed."""
        # Storage first: where it fails the launch may end, and a copy would be of no use.
        if due.storage:
            self._finish(self._storage)
            since_last = self._schedule.begin(state.step)
            with self._failing(state.step, due.must_succeed):
                self._start(self._storage, state, since_last)
        if due.local and self._local is not None:
            self._finish(self._local)
            self._start(self._local, state)
        if due.must_succeed:
            self.finish(must_succeed=True)

    def poll(self, recorded: int) -> None:
        """Finish the saves that are whole. `recorded`: the newest step whose metrics are here."""
        for tier, save in list(self._saving.items()):
            counts = tier is self._storage or recorded >= save.step + RECORDED
            if counts and not tier.is_saving():
                self._finish(tier)

    def finish(self, must_succeed: bool = False) -> None:
        """Wait for all saves under way. Raises SaveFailed."""
        for tier in list(self._saving):
            self._finish(tier, must_succeed)

    def roll_back(self, rollback: Rollback) -> None:
        """Delete the checkpoints that the rollback does not allow."""
        if rollback.before is not None:
            self._storage.roll_back(rollback.before, rollback.newest)

    def restore(self, rollback: Rollback) -> RunState | None:
        """The newest good state of either tier; None in a fresh run.

        A copy counts only if it is at least as new as the newest checkpoint on storage. After a
        rollback the copies are not asked: they may hold what the run goes back from.
        """
        if self._local is not None and rollback.before is None:
            newest = agree("newest checkpoint", lambda: max(self._storage.steps(), default=0))
            found = self._local.restore(newest, self._report)
            if found is not None:
                where = f"the copy of step {found.step} in {self._local.folder}"
                return self._restored(found, where, local=True)
        found = self._storage.restore(self._report)
        if found is None:
            return None
        where = f"checkpoint {found.step} in {self._storage.directory}"
        return self._restored(found, where, local=False)

    def close(self) -> None:
        """Wait for what is under way and let go of the tiers' threads."""
        with announced("the end of Orbax's threads"):
            self._storage.close()

    def _restored(self, found: RunState, where: str, local: bool) -> RunState:
        self._output.say(f"going on from {where}", style="green")
        self._output.event(Restored(step=found.step, position=found.position, local=local))
        return found

    def _report(self, event: CheckpointCorrupt | LocalCopyCorrupt) -> None:
        self._output.event(event)
        self._output.say(f"{event.kind}: {event.path}: {event.reason}", style="yellow")

    def _start(
        self, tier: Checkpoints | LocalCopies, state: RunState, since_last: float = 0.0
    ) -> None:
        save = _Save(state.step, since_last)
        with self._blocking(save), announced(f"the save of step {save.step} to begin"):
            tier.save(state)
        self._saving[tier] = save

    def _finish(self, tier: Checkpoints | LocalCopies, must_succeed: bool = False) -> None:
        save = self._saving.pop(tier, None)
        if save is None:
            return
        if tier is self._storage:
            # What the start of the save took. A save is waited for only where the next one is due
            # already or the launch ends, which says nothing about how often to save.
            blocked = save.blocked
            with self._failing(save.step, must_succeed):
                with self._blocking(save), announced(f"checkpoint {save.step} to be written"):
                    tier.finish()
                self._record_checkpoint(save, blocked)
            return
        try:
            with self._blocking(save), announced(f"the copy of step {save.step} to be written"):
                tier.finish()
        except Exception as error:
            reason = _reason(error)
            self._output.event(LocalCopyFailed(step=save.step, reason=reason))
            say(
                f"the copy of step {save.step} in checkpoint.local_dir failed and does not count: "
                f"{reason}"
            )
        else:
            duration = time.monotonic() - save.began
            self._output.event(
                LocalCopySaved(
                    step=save.step,
                    seconds=round(duration, 3),
                    blocked_seconds=round(save.blocked, 4),
                )
            )

    def _record_checkpoint(self, save: _Save, blocked: float) -> None:
        duration = time.monotonic() - save.began
        self._output.event(
            CheckpointSaved(
                step=save.step,
                seconds=round(duration, 3),
                blocked_seconds=round(blocked, 4),
                blocked_share=blocked / max(save.since_last, 1e-9),
                next_in_seconds=self._schedule.took(blocked, duration),
            )
        )

    @contextlib.contextmanager
    def _blocking(self, save: _Save) -> Iterator[None]:
        began = time.perf_counter()
        with self._clock(CHECKPOINT):
            yield
        save.blocked += time.perf_counter() - began

    @contextlib.contextmanager
    def _failing(self, step: int, must_succeed: bool) -> Iterator[None]:
        """Record an error of a save on storage, and end the launch where it must not go on."""
        try:
            yield
        except Exception as error:
            reason = _reason(error)
            self._output.event(CheckpointFailed(step=step, reason=reason))
            self._output.say(f"checkpoint {step} failed and does not count: {reason}", style="red")
            if must_succeed or jax.process_count() > 1:
                raise SaveFailed(
                    f"checkpoint {step} could not be written in {self._storage.directory}: "
                    f"{reason}; {what_to_do(errno_of(error))}"
                ) from error


def _reason(error: Exception) -> str:
    """One line: why a save failed."""
    if (number := errno_of(error)) is not None:
        return os.strerror(number)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
