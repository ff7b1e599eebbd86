"""Where a launch begins: at the newest good checkpoint, at `init_from`'s weights, or at fresh ones.

First all processes agree on a plan, because only process 0 reads the run's events: whether numbers
of the launch before force a rollback, and which windows of the data are left out. Then the store
looks for a checkpoint that the plan allows, in both tiers. Last, its progress in the data follows
the settings of this launch, and what that means is said.
"""

import dataclasses
from typing import Any

from baichuan_jax.checkpoint.local_copies import RECORD, LocalCopies
from baichuan_jax.checkpoint.orbax import Checkpoints
from baichuan_jax.checkpoint.progress import Given, Progress
from baichuan_jax.checkpoint.schedule import Schedule
from baichuan_jax.checkpoint.state import RunState, StateTarget, identity
from baichuan_jax.checkpoint.store import CheckpointStore
from baichuan_jax.checkpoint.weights import has_checkpoint, load_params
from baichuan_jax.config.schema import Config, ConfigError
from baichuan_jax.data.prepare import Prepared
from baichuan_jax.hf.source import Source, is_hf, read_source
from baichuan_jax.hf.weights import import_params
from baichuan_jax.model import Params
from baichuan_jax.resilience.checkpoint_interval import FaultHistory, seconds_per_fault
from baichuan_jax.resilience.clock import Clock
from baichuan_jax.resilience.coordination import agree
from baichuan_jax.resilience.guard import Rollback, Window, plan_rollback
from baichuan_jax.runs.events import (
    DataChanged,
    Initialised,
    RolledBack,
    WindowSkipped,
    of_kind,
    parse_event,
)
from baichuan_jax.runs.folder import Run
from baichuan_jax.runs.output import Output
from baichuan_jax.sharding import Layout
from baichuan_jax.step import Steps, TrainState
from baichuan_jax.training.changes import OF_WEIGHTS


@dataclasses.dataclass(frozen=True)
class RestorePlan:
    """What a launch may restore; the same on all processes.

    `run_name` names this run's folder on the hosts' own disks. `rollbacks`: how often the run has
    rolled back, this launch included; hosts' copies made before the last time do not count.
    """

    rollback: Rollback
    run_name: str
    rollbacks: int


def plan_restore(config: Config, run: Run) -> RestorePlan:
    """Process 0's plan on all processes, from the run's events.

    Raises RuntimeError where resilience.max_skips windows have been left out already.
    """

    def choose() -> dict[str, Any]:
        events = run.events
        rollback = plan_rollback(events, config.resilience.max_skips)
        return {
            **dataclasses.asdict(rollback),
            "events": [event.to_json() for event in rollback.events],
            # The first event's time tells apart two runs of one name on one host's disk.
            "run": f"{run.path.name}-{events[0].time:.3f}",
            "rollbacks": len(of_kind([*events, *rollback.events], RolledBack)),
        }

    # Process 0 writes the events; the others may see its last lines late, by their file system's
    # cache.
    found = agree("rollback", choose)
    rollback = Rollback(
        windows=tuple(
            Window(begin, end, None if rows is None else tuple(rows))
            for begin, end, rows in found["windows"]
        ),
        before=found["before"],
        newest=found["newest"],
        events=tuple(map(parse_event, found["events"])),
    )
    return RestorePlan(rollback, found["run"], found["rollbacks"])


def open_store(
    config: Config,
    run: Run,
    plan: RestorePlan,
    steps: Steps,
    tokenizer_hash: str,
    host: str,
    history: FaultHistory,
    clock: Clock,
    output: Output,
) -> CheckpointStore:
    """Both tiers of the run's checkpoints. Raises ConfigError where local_dir cannot serve.

    `history`: the run's faults before this launch, which decide how often to save.
    """
    target = StateTarget(steps.abstract_state, identity(config.model))
    # Both tiers check the tokenizer: rows of another one have the same shapes and other meanings.
    storage = Checkpoints(run.path / "checkpoints", config, tokenizer_hash, target)
    local = None
    if (folder := config.checkpoint.local_path) is not None:
        own = folder / plan.run_name
        record = run.path / RECORD
        local = LocalCopies(own, record, plan.rollbacks, host, tokenizer_hash, target)
    per_fault = seconds_per_fault(steps.layout.mesh.size, history.run_seconds, history.faults)
    schedule = Schedule(config, per_fault)
    return CheckpointStore(storage, local, schedule, target, clock, output)


def restore(
    config: Config,
    prepared: Prepared,
    steps: Steps,
    store: CheckpointStore,
    rollback: Rollback,
    output: Output,
) -> RunState:
    """The state to go on from, its progress in the data as the settings say.

    Raises ConfigError where given weights do not fit the model, or the order of the data another
    seed.
    """
    # Before the events, which say to later launches that the fault is answered: a launch that is
    # killed in between is followed by one that rolls back again.
    store.roll_back(rollback)
    for event in rollback.events:
        output.event(event)
        output.say(f"{event.kind.replace('_', ' ')}: {event.reason}", style="yellow")
    # A run's own checkpoint comes before init_from, which only its first launch uses.
    found = store.restore(rollback)
    if found is None:
        # Step 0, row 0: weights from elsewhere say nothing about this run's schedule and data.
        state = _initial_state(config, prepared.source, steps, output)
        found = RunState(state, 0, Progress(config.train.seed))
    return _follow(config, prepared, found, rollback, output)


def _initial_state(
    config: Config, source: Source | None, steps: Steps, output: Output
) -> TrainState:
    if config.init_from is None:
        return steps.init()
    # It has not been looked at where all checkpoints of the run turned out to be damaged.
    source = read_source(config.init_from) if source is None else source
    state = steps.start(_initial_weights(config, source, steps.layout))
    output.say(f"weights from {source.path}, fresh optimiser and schedule", style="green")
    ours = config.train.context_length
    if source.context_length not in (None, ours):
        # Legal: to train on at another length is how a model learns it.
        output.say(
            f"these weights were trained on rows of {source.context_length} tokens and "
            f"train.context_length is {ours}",
            style="yellow",
        )
    output.event(Initialised(source=str(source.path)))
    return state


def _follow(
    config: Config, prepared: Prepared, found: RunState, rollback: Rollback, output: Output
) -> RunState:
    """A restored state whose data go on as the settings say; what changes is said and recorded."""
    given = [
        Given(name, rows.identity, weight)
        for name, (rows, weight) in zip(config.data.train, prepared.train, strict=True)
    ]
    before = found.progress
    progress = before.follow(config.train.seed, given, config.train.global_batch_size)
    for note in _notes(given, before):
        output.say(f"data.train: {note}", style="yellow")
    # Those of the settings by the positions of today; recorded ones by those of their own time.
    history = before if before.pieces else progress
    windows = [(window, history.rows_of(window)) for window in rollback.windows]
    skipped = [rows for _, rows in windows]
    skipped += [progress.rows_of(Window(begin, end)) for begin, end in config.data.skip]
    if before.pieces and (changes := progress.changes(before)):
        changes += _changed_meanings(config, prepared, before, progress, skipped)
        _record_changes(found.step, progress, changes, windows, output)
    return dataclasses.replace(found, progress=progress, skipped=tuple(skipped))


def _notes(given: list[Given], before: Progress) -> list[str]:
    """What a launch should know of its corpora, changed or not."""
    notes, first = [], {}
    for name, rows, _ in given:
        if first.setdefault(rows, name) != name:
            notes.append(
                f"{name} and {first[rows]} are the same rows: each row is read for both, in two "
                "orders; if that is not meant, leave one of them out"
            )
    unknown = [corpus.name for corpus in before.corpora if corpus.rows is None]
    if unknown:
        notes.append(
            f"the checkpoint is of an earlier version and does not say which rows it read of "
            f"{', '.join(unknown)}: they are taken to be today's"
        )
    return notes


def _changed_meanings(
    config: Config,
    prepared: Prepared,
    before: Progress,
    progress: Progress,
    skipped: list[tuple[int, int]],
) -> list[str]:
    """What counts batches or rows elsewhere, and means other text from here on."""
    found = []
    # Rows of the validation loss, by the size of a batch.
    rows = sum(len(rows) for rows, _ in prepared.validation)
    now, then = (
        min(rows, config.evaluate.num_batches * size)
        for size in (progress.batch_size, before.batch_size)
    )
    if now != then:
        found.append(f"the validation loss is over {now} rows from here, {then} before")
    for begin, end in config.data.skip:
        (first, last), (old_first, old_last) = (
            moment.rows_of(Window(begin, end)) for moment in (progress, before)
        )
        if (first, last) != (old_first, old_last):
            found.append(
                f"data.skip [{begin}, {end}] means rows {first} to {last - 1} from here, "
                f"{old_first} to {old_last - 1} before"
            )
    ahead = [(begin, end) for begin, end in skipped if end > progress.row]
    if ahead and progress.since != before.since:
        listed = ", ".join(f"{begin} to {end - 1}" for begin, end in ahead)
        found.append(f"rows {listed} are left out by number, and are other text in this mixture")
    return found


def _record_changes(
    step: int,
    progress: Progress,
    changes: list[str],
    windows: list[tuple[Window, tuple[int, int]]],
    output: Output,
) -> None:
    for window, (begin, end) in windows:
        # A window with positions alone would mean other rows to the next launch.
        if window.rows is None:
            reason = "its rows, before the size of a batch changed"
            event = WindowSkipped(
                begin=window.begin, end=window.end, rows=[begin, end], reason=reason
            )
            output.event(event)
    row, position = progress.row, progress.position
    output.say(
        f"data: going on at row {row} of the run ({position} batches so far); {'; '.join(changes)}",
        style="yellow",
    )
    output.event(DataChanged(step=step, position=position, row=row, changes=changes))


def find_initial_weights(config: Config) -> Source | None:
    """The weights that this launch begins at; None: init_from names none, or has had its turn.

    Only the first launch of a run begins there. Raises ConfigError for weights of another model,
    before anything is prepared for them.
    """
    if config.init_from is None:
        return None
    if agree("whether the run has begun", lambda: has_checkpoint(config.run_path)):
        return None
    source = read_source(config.init_from)
    _refuse_other_model(source, config)
    return source


def _initial_weights(config: Config, source: Source, layout: Layout) -> Params:
    # Before the weights are read: they may be of a much larger model.
    _refuse_other_model(source, config)
    if is_hf(source.path):
        return import_params(source.path, layout)
    return load_params(source.path, layout)[1]


def _refuse_other_model(source: Source, config: Config) -> None:
    # All at once: a user who is told of one sets it and is refused for the next.
    theirs, ours = (
        {name: getattr(model, name) for name in OF_WEIGHTS}
        for model in (source.model, config.model)
    )
    shown = {
        name: "null" if value is None else value
        for name, value in theirs.items()
        if value != ours[name]
    }
    if shown:
        given = ", ".join(f"model.{name}={ours[name]}" for name in shown)
        raise ConfigError(
            f"init_from={source.path} has {', '.join(f'{n}={v}' for n, v in shown.items())} and "
            f"this run has {given}; set {' '.join(f'--model.{n} {v}' for n, v in shown.items())}"
        )
