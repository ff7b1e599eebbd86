"""Where a launch begins: at the newest good checkpoint, at `init_from`'s weights, or at fresh ones."""

from pathlib import Path

from baichuan_jax.checkpoint.local_copies import LocalCopies
from baichuan_jax.checkpoint.orbax import Checkpoints, RestoredState, load_params
from baichuan_jax.config.schema import Config, ConfigError, ModelConfig
from baichuan_jax.hf.weights import import_params, read_config
from baichuan_jax.model import Params
from baichuan_jax.resilience.coordination import agree
from baichuan_jax.resilience.guard import Rollback
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.events import CheckpointCorrupt, Initialised, LocalCopyCorrupt, Restored
from baichuan_jax.runs.metrics import Writer
from baichuan_jax.sharding import Layout
from baichuan_jax.step import Steps


def restore_or_start(
    config: Config,
    steps: Steps,
    checkpoints: Checkpoints,
    copies: LocalCopies | None,
    rollback: Rollback,
    writer: Writer,
    display: Display,
) -> RestoredState:
    """The state to go on from, its step and its position in the data. Raises ConfigError where weights do not fit the model."""

    def report(event: CheckpointCorrupt | LocalCopyCorrupt) -> None:
        display.say(
            f"{event.kind}: {event.path}: {event.reason}; trying the one before it",
            style="yellow",
        )
        writer.event(event)

    for event in rollback.events:
        writer.event(event)
        display.say(f"{event.kind.replace('_', ' ')}: {event.reason}", style="yellow")
    if copies is not None and rollback.before is None:
        newest = agree("newest checkpoint", lambda: max(checkpoints.steps(), default=0))
        restored = copies.restore(newest, report)
        if restored is not None:
            display.say(
                f"going on from the copy of step {restored.step} in {config.checkpoint.local_path}",
                style="green",
            )
            writer.event(Restored(step=restored.step, position=restored.position, local=True))
            return restored
    restored = checkpoints.restore(report, rollback.before, rollback.back)
    if restored is not None:
        display.say(
            f"going on from checkpoint {restored.step} in {checkpoints.directory}", style="green"
        )
        writer.event(Restored(step=restored.step, position=restored.position))
        return restored
    if config.init_from is None:
        return RestoredState(steps.init(), 0, 0)
    state = steps.start(_initial_weights(config, config.init_from, steps.layout))
    display.say(f"weights from {config.init_from}, fresh optimiser and schedule", style="green")
    writer.event(Initialised(source=config.init_from))
    return RestoredState(state, 0, 0)


def _initial_weights(config: Config, path: str, layout: Layout) -> Params:
    if (Path(path) / "config.json").exists():
        model = read_config(path)
        _refuse_other_shapes(path, model, config)
        return import_params(path, layout)
    model, params = load_params(path, layout)
    _refuse_other_shapes(path, model, config)
    return params


def _refuse_other_shapes(path: str, found: ModelConfig, config: Config) -> None:
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "rms_norm_eps",
        "rope_theta",
    ):
        theirs, ours = getattr(found, name), getattr(config.model, name)
        if theirs != ours:
            raise ConfigError(
                f"init_from={path} has {name}={theirs} and model.{name}={ours}; set model.{name}={theirs}"
            )
