"""What follows when a run goes on with other settings than before.

In: the settings of the run's last launch and of this one, and the step from which it goes on. Out:
a table of what differs, with the consequence of each, and a warning with numbers where the learning
rate bends. What cannot go on is refused elsewhere, by whoever owns it; of a complete run, which
loads nothing, here.
"""

import dataclasses
from typing import Any

import numpy as np

from baichuan_jax.checkpoint.progress import Progress
from baichuan_jax.checkpoint.state import SAME_ARRAYS
from baichuan_jax.config.files import dump_config, flatten
from baichuan_jax.config.parsing import Positive, build, parse_yaml, require_type, show
from baichuan_jax.config.schema import (
    Config,
    ConfigError,
    OptimizerConfig,
    TrainConfig,
    require,
)
from baichuan_jax.optimizer import learning_rate
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.events import DataChanged, Measured, latest
from baichuan_jax.runs.folder import Run
from baichuan_jax.runs.output import Output

# Characters of a value in the table.
VALUE_CHARACTERS = 40
# Fields of ModelConfig that weights are of: with another they do not load, or they load and compute
# or learn something else.
OF_WEIGHTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"),
    *(name for name in SAME_ARRAYS if name != "num_heads"),
)
# Settings on which the learning rate of a step depends.
SCHEDULE = (
    "train.num_steps",
    "optimizer.learning_rate",
    "optimizer.final_learning_rate_ratio",
    "optimizer.warmup_steps",
)
_ROUNDING = "the same sums in another order: losses agree to rounding"
_NO_NUMBER = "no number of the training"
# Of messages about the settings of the run's last launch.
_LAST = "config.yaml in the run's folder"
# Where it is damaged.
REMEDY = "delete it, and the run goes on without a comparison of settings"
_NOT_COMPARABLE = "results before and after cannot be compared"
_FROM_HERE = "acts from here on; the steps before had the other"
# What a change means for the steps to come: of a setting, or of all settings of a section.
CONSEQUENCES = {
    "run_dir": "nothing: the folder has another name now",
    "init_from": "nothing: the run goes on from its own checkpoint",
    "model": "the weights were trained with the one before, and compute something else now",
    "model.initializer_range": "nothing: no weights are drawn any more",
    "model.remat": "memory and speed only",
    "model.scan_layers": "memory and speed only",
    "train.context_length": "other rows, counted from 0: text may be read again",
    "train.global_batch_size": "goes on at the next row; another count of tokens a step",
    "train.micro_batch_size": _ROUNDING,
    "train.loss_chunk_size": _ROUNDING,
    "train.gradient_dtype": "gradients are rounded otherwise: losses agree to that rounding",
    "train.z_loss": "losses before and after cannot be compared",
    "train.seed": "refused once rows are read: their order follows from it",
    "train.deterministic": _ROUNDING,
    "train.schedule_profile": "speed only",
    "optimizer": _FROM_HERE,
    "tokenizer": "a checkpoint of another tokenizer is refused",
    "data.train": "a new mixture; every corpus goes on at its next row",
    "data.validation": _NOT_COMPARABLE,
    "data.text_field": "other rows, counted from 0: text may be read again",
    "data.cache_dir": "nothing: rows are made there where they are missing",
    "data.document_mask": "attention sees other text than in the steps before",
    "data.num_workers": "speed only",
    "data.skip": "other batches are left out",
    "mesh": _ROUNDING,
    "kernels": _ROUNDING,
    "checkpoint": _NO_NUMBER,
    "checkpoint.keep_last": "the next save deletes the checkpoints beyond that number",
    "evaluate.every": _NO_NUMBER,
    "evaluate.num_batches": _NOT_COMPARABLE,
    "evaluate.tasks": "other scores",
    "evaluate.subjects": _NOT_COMPARABLE,
    "evaluate.limit": _NOT_COMPARABLE,
    "sample": "other samples",
    "metrics": _NO_NUMBER,
    "profile": _NO_NUMBER,
    "resilience": "other limits; a spike or a fault may be seen earlier or later",
    "distributed": _NO_NUMBER,
}


def show_changes(run: Run, before: str | None, config: Config, step: int, output: Output) -> None:
    """Say what differs from the run's last launch, and what follows, before the next step.

    `before`: that launch's config.yaml, None for a fresh run; `step`: how many steps are done.
    """
    changes = compare(before, config)
    if not changes:
        return
    # Every step of the run so far is done again.
    fresh = "nothing: the run begins anew, since no checkpoint is saved"
    follows = {name: consequence(name) if step else fresh for name, _, _ in changes}
    title = f"Settings differ from this run's last launch (step {step})"
    _show_table(output.display, title, changes, follows)
    # Steps that are all done bend nothing any more.
    if before is not None and 0 < step < config.train.num_steps:
        was = _schedule_of(before)
        # A finished run's last: the cosine goes no further.
        rate = was.rate(step + 1) if step < was.num_steps else _rate_of(run, step, was)
        warning = describe_schedules(was, rate, _schedule(config), step)
        if warning is not None:
            output.say(warning, style="yellow")


def show_other_tests(
    run: Run, measured: Measured, step: int, progress: Progress, output: Output
) -> None:
    """Say and record where validation text or tests are others than before, under the same names.

    On process 0; the others say nothing. `measured`: those of this launch, which `step` steps and
    `progress` come before.
    """
    if not output.display.active:
        return
    before = latest(run.events, Measured) or Measured()
    if before.fields == measured.fields:
        return
    changes = []
    # Of step 0 there is nothing to compare: every step so far is done again.
    if step:
        changes += [
            f"data.validation: the rows of {name} are others than before, so {_NOT_COMPARABLE}"
            for name, rows in measured.validation.items()
            if before.validation.get(name, rows) != rows
        ]
        changes += [
            f"evaluate.tasks: the questions of {name} are others than before, so {_NOT_COMPARABLE}"
            for name, files in measured.tasks.items()
            if before.tasks.get(name, files) != files
        ]
    if changes:
        output.say("; ".join(changes), style="yellow")
        output.event(
            DataChanged(step=step, position=progress.position, row=progress.row, changes=changes)
        )
    # Last: a launch that is killed before this says them again.
    output.event(measured)


def show_unused_changes(before: str | None, config: Config, display: Display) -> None:
    """Say what differs from a complete run's settings, none of which acts any more.

    Raises ConfigError where the run would be another one: such settings are refused of a run that
    goes on too.
    """
    # What a launch resolves by its devices stands in config.yaml as a number.
    changes = [
        (name, old, new)
        for name, old, new in compare(before, config)
        if not (name.startswith("mesh.") and new == -1)
        and not (name == "train.micro_batch_size" and new is None)
    ]
    refused = {*(f"model.{name}" for name in OF_WEIGHTS), "train.seed"}
    # Given weights, and a file, bring a tokenizer of whatever size.
    if config.init_from is None and config.tokenizer.path is None:
        refused.add("tokenizer.vocab_size")
    if others := [change for change in changes if change[0] in refused]:
        given = ", ".join(f"{name}={show(new)}" for name, _, new in others)
        own = " ".join(f"--{name} {_option(old)}" for name, old, _ in others)
        raise ConfigError(
            f"run_dir={config.run_dir!r} holds a complete run of other settings than {given}: give "
            f"the new run a folder of its own with --run_dir, or set {own}"
        )
    if changes:
        title = "Settings differ from those of this run, which is complete"
        done = "nothing: all steps are done"
        _show_table(display, title, changes, dict.fromkeys([name for name, _, _ in changes], done))


def _show_table(
    display: Display, title: str, changes: list[tuple[str, Any, Any]], follows: dict[str, str]
) -> None:
    rows = [[name, _shown(old), _shown(new), follows[name]] for name, old, new in changes]
    display.table(title, ["setting", "before", "now", "what follows"], rows)


def compare(before: str | None, config: Config) -> list[tuple[str, Any, Any]]:
    """(setting, old, new) where two configurations differ; of a dict the entries that differ."""
    old = flatten(_tree(before))
    if not old:
        return []
    # A setting that is newer than the run had its default.
    old = flatten(dataclasses.asdict(Config())) | old
    changes = []
    for name, new in flatten(_tree(dump_config(config))).items():
        was = old.get(name)
        if was == new:
            continue
        if isinstance(was, dict) and isinstance(new, dict):
            entries = [key for key in was | new if was.get(key) != new.get(key)]
            changes += [(f"{name}: {key}", was.get(key), new.get(key)) for key in entries]
        else:
            changes.append((name, was, new))
    return changes


def consequence(name: str) -> str:
    """What a change of a setting means for the steps to come."""
    setting = name.split(":")[0]
    if setting in SCHEDULE:
        return "another learning rate, see below"
    return CONSEQUENCES.get(setting) or CONSEQUENCES[setting.split(".")[0]]


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """The learning rate of every step of a run of `num_steps`."""

    optimizer: OptimizerConfig
    num_steps: int

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 1."""
        # numpy: a finished run says this without starting jax.
        return float(learning_rate(self.optimizer, self.num_steps, step - 1, np))


def _schedule(config: Config) -> _Schedule:
    return _Schedule(config.optimizer, config.train.num_steps)


def _schedule_of(text: str) -> _Schedule:
    """The schedule of a config.yaml, which another version may have written."""
    tree = _tree(text)
    try:
        optimizer = build(OptimizerConfig, tree.get("optimizer", {}), f"{_LAST}: optimizer")
        train = require_type(tree.get("train", {}), dict, f"{_LAST}: train")
        steps = train.get("num_steps", TrainConfig.num_steps)
        require_type(steps, Positive, f"{_LAST}: train.num_steps")
    except ConfigError as error:
        raise ConfigError(f"{error}; {REMEDY}") from None
    return _Schedule(optimizer, steps)


def describe_schedules(before: _Schedule, rate: float, now: _Schedule, step: int) -> str | None:
    """Both learning rates after `step` steps and at the end; None where they are the same.

    `rate`: that of the next step before.
    """
    first, last = step + 1, now.num_steps
    rates = rate, now.rate(first)
    end = max(step, before.num_steps)
    ends = rate if step == end else before.rate(end), now.rate(last)
    # Options hold six digits of a rate.
    if np.allclose(rates, rates[0], 1e-5) and np.allclose(ends, ends[0], 1e-5):
        return None
    reason = ""
    if before.num_steps != last:
        bent = "stretches" if last > before.num_steps else "shortens"
        reason = f" (train.num_steps {before.num_steps} -> {last} {bent} the cosine)"
    text = (
        f"learning rate at step {first}: {rates[0]:.6g} before, {rates[1]:.6g} now{reason}; at the "
        f"last step: {ends[0]:.6g} before, at step {end}, {ends[1]:.6g} now, at {last}"
    )
    if rates[1] <= rates[0] * (1 + 1e-5):
        return text
    return f"{text}. To keep it at {rates[0]:.6g}: {_constant(rates[0])}"


def more_steps(run: Run, config: Config, done: int, before: str | None = None) -> str:
    """What a larger train.num_steps does to the learning rate of a finished run, in numbers.

    `done`: its steps; `before`: the run's own config.yaml, where this launch's settings may be
    others.
    """
    now = _schedule(config) if before is None else _schedule_of(before)
    rate = _rate_of(run, done, now)
    longer = dataclasses.replace(now, num_steps=2 * done).rate(done + 1)
    return (
        f"A larger --train.num_steps stretches the learning rate's cosine: with {2 * done} steps "
        f"it goes from {rate:.6g} to {longer:.6g} at step {done + 1}. To keep it, add "
        f"{_constant(rate)}"
    )


def _rate_of(run: Run, step: int, schedule: _Schedule) -> float:
    """The learning rate of a step that is done, and the last of the run's last launch or beyond."""
    if step > schedule.num_steps:
        # That launch asked for fewer steps than were done: an earlier one had another schedule.
        recorded = run.curve("learning_rate").get(step)
        if recorded is not None:
            return recorded
    return schedule.rate(min(step, schedule.num_steps))


def _constant(rate: float) -> str:
    """Options that hold the learning rate at a value."""
    return (
        f"--optimizer.learning_rate {rate:.6g} --optimizer.final_learning_rate_ratio 1 "
        "--optimizer.warmup_steps 0"
    )


def _tree(text: str | None) -> dict[str, Any]:
    try:
        tree = {} if text is None else parse_yaml(text, _LAST)
        require(
            isinstance(tree, dict), f"{_LAST} holds {show(tree)} and must hold settings by name"
        )
    except ConfigError as error:
        raise ConfigError(f"{error}; {REMEDY}") from None
    return tree


def _option(value: Any) -> str:
    """A value as an option takes it."""
    return "null" if value is None else str(value)


def _shown(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= VALUE_CHARACTERS else f"{text[: VALUE_CHARACTERS - 3]}..."
