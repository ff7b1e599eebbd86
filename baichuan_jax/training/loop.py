"""The training loop: from a state to the state after the last step, or where a stop was asked for.

In: a `RunState` (arrays on the devices, steps done, progress in the data) and the collaborators of
a launch. Out: the state at the end, and whether the run is complete. The devices never wait for the
host: a step is dispatched before the metrics of the step before it are fetched. Control requests
(save, stop, roll back) are agreed inside the compiled step, by a maximum over all processes, so
that every process acts at the same step.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from baichuan_jax.checkpoint.schedule import Due
from baichuan_jax.checkpoint.state import RunState
from baichuan_jax.checkpoint.store import CheckpointStore
from baichuan_jax.config.schema import Config
from baichuan_jax.data.loader import Loader
from baichuan_jax.resilience.clock import DATA, DISPATCH, EVALUATE, WAIT, Clock
from baichuan_jax.resilience.exits import say_from_handler
from baichuan_jax.resilience.guard import Window
from baichuan_jax.resilience.ownership import Claim
from baichuan_jax.resilience.watch import Watch
from baichuan_jax.runs.console import Progress
from baichuan_jax.runs.events import Compiled, Interrupted, Profiled
from baichuan_jax.runs.metrics import seconds_since_process_start
from baichuan_jax.runs.output import Output
from baichuan_jax.step import Batch, Request, Steps, TrainState
from baichuan_jax.training.evaluator import Evaluator
from baichuan_jax.training.numerics import NumericsGuard
from baichuan_jax.training.profiler import Profiler
from baichuan_jax.training.recorder import Recorder

TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


class StopRequest:
    """Whether a signal has asked this process to stop."""

    def __init__(self, claim: Claim | None = None) -> None:
        self.made, self._claim = False, claim

    def make(self, signal_name: str) -> None:
        """Ask; called from a signal's handler."""
        self.made = True
        # A launch that comes before this one has saved waits for it.
        if self._claim is not None:
            self._claim.stopping()
        then = "; once more quits unsaved" if signal_name == "SIGINT" else ""
        say_from_handler(f"{signal_name}: saving after this step, then stopping{then}")


@dataclass(frozen=True)
class Launch:
    """The collaborators of one launch, all made before its loop begins."""

    config: Config
    steps: Steps
    store: CheckpointStore
    recorder: Recorder
    guard: NumericsGuard
    evaluator: Evaluator
    profiler: Profiler
    clock: Clock
    watch: Watch
    output: Output


class Pending(NamedTuple):
    """A dispatched step whose metrics are still on the devices; `window`: its batch's data."""

    step: int
    window: Window
    metrics: dict[str, jax.Array]


@dataclass(frozen=True)
class Work:
    """What is done between two steps, beside the recording of metrics."""

    save: Due
    evaluate: bool
    compare: bool
    end_trace: bool

    def __bool__(self) -> bool:
        return bool(self.save) or self.evaluate or self.compare or self.end_trace


def train_loop(
    launch: Launch, batches: Loader, start: RunState, stop: StopRequest
) -> tuple[RunState, bool]:
    """Train from `start` to the last step: (its state, True); or (the saved state, False).

    False: the run was asked to stop, and saved. Raises NumericsError, BadHost, SaveFailed.
    """
    clock, num_steps = launch.clock, launch.config.train.num_steps
    launch.watch.reached(start.step)
    # A launch that was killed after its last checkpoint has no step to compile for.
    if start.step >= num_steps:
        return start, True
    train_step = compile_step(launch)
    # Made beforehand: inside the loop a transfer to the devices is an error.
    requests = {request: launch.steps.request(request) for request in Request}
    now, pending = start, None
    progress = launch.output.display.progress(start.step, num_steps)
    launch.recorder.restart_timer()
    with progress, _scheduled_gc() as collect:
        while now.step < num_steps:
            with clock(DATA):
                window, batch = batches.window, next(batches)
            with launch.output.leaving_out("the profile"):
                launch.profiler.before(now.step + 1)
            # An array that is copied to the devices unseen would halt every step.
            with clock(DISPATCH), jax.transfer_guard("disallow"):
                state, metrics = train_step(now.state, batch, requests[_own_request(launch, stop)])
            # The old state is donated to the step: from here on only the new one exists.
            now = RunState(state, now.step + 1, batches.progress, start.skipped)
            launch.watch.reached(now.step, launch.recorder.own_seconds)
            # The step before this one: the devices work on this one meanwhile.
            request = _record(launch, pending, progress)
            pending = Pending(now.step, window, metrics)
            launch.store.poll(recorded=now.step - 1)
            if work := _work(launch, now.step, request):
                # What follows needs this step's metrics, and its numbers checked. They may carry
                # another request: a stop is obeyed here, a save waits for the next step.
                if _record(launch, pending, progress) is Request.STOP:
                    work = _work(launch, now.step, Request.STOP)
                pending = None
                _do(launch, work, now, batch)
                if work.save.must_succeed and now.step < num_steps:
                    return _stopped(launch, now), False
                collect()
                launch.recorder.restart_timer()
    return now, True


def compile_step(launch: Launch) -> TrainStep:
    """Compile the training step for this launch's mesh, before the first batch is read."""
    with launch.clock("compile"):
        compiled = launch.steps.lower().compile()
    seconds = launch.clock.totals()["compile"]
    since_launch = seconds_since_process_start()
    launch.output.event(Compiled(seconds=seconds, since_launch=since_launch))
    return compiled


def _own_request(launch: Launch, stop: StopRequest) -> Request:
    """What this process asks of all; they hear it with the metrics of the step it goes into."""
    if launch.guard.saw_spike:
        return Request.ROLL_BACK
    if stop.made:
        return Request.STOP
    return Request.SAVE if launch.store.wanted() else Request.NONE


def _work(launch: Launch, step: int, request: Request) -> Work:
    """What is due after this step; the same on all processes."""
    config = launch.config
    last, stop = step == config.train.num_steps, request is Request.STOP
    every = config.resilience.check_every
    copies = launch.steps.layout.mesh.shape["data"]
    return Work(
        save=launch.store.due(step, request),
        evaluate=last or step % config.evaluate.every == 0,
        compare=copies > 1 and every > 0 and step % every == 0,
        end_trace=launch.profiler.until is not None and (stop or step == launch.profiler.until),
    )


def _do(launch: Launch, work: Work, now: RunState, batch: Batch) -> None:
    """Do what is due, in this order: nothing is saved that a check has not passed."""
    # The trace ends first, so that it shows steps and not what is done between them.
    if work.end_trace:
        with launch.output.leaving_out("the profile"):
            launch.profiler.stop()
            launch.output.event(Profiled(step=now.step))
            folder = launch.profiler.folder
            launch.output.say(f"profile of the steps up to {now.step} in {folder}")
    if work.compare:
        with launch.clock(EVALUATE):
            launch.guard.compare_replicas(launch.steps, now, batch)
    if work.evaluate:
        with launch.clock(EVALUATE):
            launch.evaluator.evaluate(now.step, now.state.params)
    if work.save:
        launch.guard.check_state(now.step, launch.store.is_finite(now.state))
        launch.store.save(now, work.save)


def _record(launch: Launch, pending: Pending | None, progress: Progress) -> Request:
    """Fetch, write and check the metrics of a step; the largest request of all processes."""
    if pending is None:
        return Request.NONE
    with launch.clock(WAIT):
        values: dict[str, Any] = jax.device_get(pending.metrics)
    launch.recorder.step(pending.step, values, progress)
    for straggler in launch.watch.stragglers():
        launch.output.event(straggler)
        launch.output.say(
            f"process {straggler.process} on {straggler.host} is slow: {straggler.seconds:.3f} s "
            f"of its own a step, the median {straggler.median:.3f} s",
            style="yellow",
        )
    launch.guard.check_step(pending.step, pending.window, values)
    return Request(int(values["request"]))


def _stopped(launch: Launch, now: RunState) -> RunState:
    launch.output.event(Interrupted(step=now.step, position=now.position))
    launch.output.say(
        f"stopped and saved at step {now.step}; the same command goes on from here", style="green"
    )
    return now


@contextlib.contextmanager
def _scheduled_gc() -> Iterator[Callable[[], int]]:
    """No garbage collection inside, except when the loop calls what is yielded.

    Python would collect at another moment on every host, and each time all others would wait.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield lambda: gc.collect(1)
    finally:
        if enabled:
            gc.enable()
