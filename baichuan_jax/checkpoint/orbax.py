"""Checkpoints through Orbax: saved asynchronously, compared and verified on restore, onto any mesh and process count.

A run's `checkpoints/STEP/` holds three items: `params`, `optimizer` (the rest of the state) and
`run` (JSON: step, data position, configuration, tokenizer hash, and a digest of every array). The
digest is computed on the devices from the bits of the array, whatever its sharding, and compared
after a restore: a file that was cut short, lost or changed is found, not trained on.
"""

import contextlib
import dataclasses
import gc
import io
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import yaml
from jax.experimental import multihost_utils

from baichuan_jax.config.files import dump_config
from baichuan_jax.config.schema import CheckpointConfig, Config, ConfigError, ModelConfig
from baichuan_jax.model import Params, abstract_model
from baichuan_jax.resilience.causes import PeerFailed
from baichuan_jax.resilience.coordination import agree
from baichuan_jax.resilience.digests import digest
from baichuan_jax.runs.events import CheckpointCorrupt
from baichuan_jax.runs.files import write_atomically
from baichuan_jax.sharding import Layout


class CorruptCheckpoint(RuntimeError):
    """A checkpoint that cannot be read or whose arrays are not those that were saved; `everywhere`: all processes see it."""

    everywhere = False


@dataclasses.dataclass(frozen=True)
class RestoredState:
    """What a checkpoint gave back. `position` is the data position of the next batch."""

    state: Any
    step: int
    position: int


class Checkpoints:
    """The checkpoints of one run: `save` starts one, `finish` waits for it, `restore` takes the newest good one.

    `state_shapes` and `state_shardings` are a TrainState of what the configuration makes, and where
    it belongs.
    """

    def __init__(
        self,
        directory: Path,
        config: Config,
        tokenizer_hash: str,
        state_shapes: Any,
        state_shardings: Any,
    ) -> None:
        self.directory = directory.absolute()
        self._config = config
        self.tokenizer = tokenizer_hash
        self.target = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=sharding
            ),
            state_shapes,
            state_shardings,
        )
        self._digest = jax.jit(digest)
        self._all_finite = jax.jit(
            lambda tree: jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=_options(config.checkpoint), item_names=_ITEMS
        )
        self._saving: int | None = None

    def save(self, state: Any, step: int, position: int) -> None:
        """Start saving; returns once the state is copied to the host. Raises where the previous save failed."""
        self.finish()
        run = {
            "step": step,
            "position": position,
            "tokenizer": self.tokenizer,
            "config": yaml.safe_load(dump_config(self._config)),
            "digest": self.digest(state),
        }
        self._manager.save(step, args=_save_arguments(as_items(state), run))
        self._saving = step

    def finish(self) -> int | None:
        """Wait until the save under way is whole on disk; its step, or None where there was none. Raises where it failed."""
        step, self._saving = self._saving, None
        if step is not None:
            try:
                self._manager.wait_until_finished()
            except Exception:
                if jax.process_count() == 1:  # else a barrier, and nobody else comes to it
                    self._manager.reload()  # a failed save would stay in the list of steps
                raise
            if jax.process_index() == 0:
                _write_sizes(self.directory / str(step))
        return step

    def digest(self, state: Any) -> dict[str, int]:
        """A number of every array's bits by its name; all processes must call this together."""
        return _named_digest(self._digest, as_items(state))

    def finite(self, state: Any) -> bool:
        """Whether every number of a state is finite; the same on all processes."""
        return bool(jax.device_get(self._all_finite(state)))

    def is_saving(self) -> bool:
        """Whether a save is still under way, or was when the last word of it was heard."""
        return self._manager.is_saving_in_progress()

    @property
    def saving(self) -> int | None:
        """The step whose save has not been waited for."""
        return self._saving

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, oldest first."""
        return sorted(self._manager.all_steps())

    def restore(
        self, report: Callable[..., None], before: int | None = None, back: int = 0
    ) -> RestoredState | None:
        """The newest good checkpoint on this run's mesh, or None. Calls report(event) for each bad one passed.

        Those of steps from `before` on are deleted, and so are `back` more as long as one remains.
        A bad one is renamed to STEP.corrupt. Files that are missing or cut short are found by
        process 0 for all; what one process alone meets while it reads ends it with PeerFailed, as
        the others wait for it, and the next start uses the checkpoint before. Raises ConfigError
        where one is whole but is not of this configuration.
        """
        self._roll_back(before, back)
        for step in reversed(self.steps()):
            path = self.directory / str(step)
            damage = agree(f"checkpoint {step}", lambda path=path: _find_damage(path))
            try:
                if damage is not None:
                    raise CorruptCheckpoint(damage)
                return self._restore(step)
            except CorruptCheckpoint as error:
                report(CheckpointCorrupt(step=step, path=str(path), reason=str(error)))
                found = error
            if jax.process_count() > 1 and not found.everywhere and damage is None:
                with contextlib.suppress(FileNotFoundError):  # several processes may have met it
                    path.rename(_unused(self.directory / f"{step}.corrupt"))
                raise PeerFailed(
                    f"{path} is damaged ({found}) where this process reads it; the next start uses the one before"
                )
            if jax.process_index() == 0:
                path.rename(_unused(self.directory / f"{step}.corrupt"))
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(f"corrupt checkpoint {step}")
            self._manager.reload()
        return None

    def _roll_back(self, before: int | None, back: int) -> None:
        """Delete the checkpoints that may hold what must not be trained on."""
        steps = self.steps()
        good = [step for step in steps if before is None or step < before]
        good = good[: max(len(good) - back, 1)]
        if len(good) == len(steps):
            return
        for step in set(steps) - set(good):
            self._manager.delete(step)

    def _restore(self, step: int) -> RestoredState:
        path = self.directory / str(step)
        run = _read_run(path)
        if run["tokenizer"] != self.tokenizer:
            raise ConfigError(
                f"{path} was trained with tokenizer {run['tokenizer'][:12]} and this run's is {self.tokenizer[:12]}; "
                "use the run's own tokenizer, or another run_dir"
            )
        items = _restore_items(path, as_items(self.target), run["digest"], self._digest)
        return RestoredState(as_state(self.target, items), run["step"], run["position"])

    def close(self) -> None:
        self._manager.close()


_ITEMS = ("params", "optimizer", "run")


def _options(config: CheckpointConfig) -> ocp.CheckpointManagerOptions:
    return ocp.CheckpointManagerOptions(
        max_to_keep=config.keep_last,
        keep_period=config.keep_every,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier()),
    )


def _barrier() -> Callable[..., None]:
    """Orbax's barrier between processes, which a thread that failed does not enter.

    On its way out of a failure Orbax's saving thread waits for the others, who wait for its files:
    nobody would hear of the failure.
    """
    wait = ocp.multihost.get_barrier_sync_fn()

    def barrier(*, key: str, timeout_ms: int) -> None:
        failure = sys.exc_info()[1]
        if failure is not None and threading.current_thread() is not threading.main_thread():
            raise failure
        wait(key=key, timeout_ms=timeout_ms)

    return barrier


def as_items(state: Any) -> dict[str, Any]:
    """A TrainState in the parts that are saved."""
    fields = state._asdict()
    return {"params": fields.pop("params"), "optimizer": fields}


def as_state(like: Any, items: dict[str, Any]) -> Any:
    """The TrainState of saved parts."""
    return type(like)(params=items["params"], **items["optimizer"])


def _save_arguments(items: dict[str, Any], run: dict[str, Any]) -> ocp.args.Composite:
    arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    return ocp.args.Composite(**arrays, run=ocp.args.JsonSave(run))


def _unused(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}{n}") for n in range(2, 100))]
    return next(candidate for candidate in candidates if not candidate.exists())


SIZES = "sizes.json"  # in a checkpoint's folder: its files and their sizes


def _sizes(path: Path) -> dict[str, int]:
    return {
        str(file.relative_to(path)): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def _write_sizes(path: Path) -> None:
    write_atomically(path / SIZES, json.dumps(_sizes(path)).encode())


def _find_damage(path: Path) -> str | None:
    """What files of a checkpoint lack, by their sizes; None where nothing, or where a kill came before the sizes were written."""
    try:
        wanted = json.loads((path / SIZES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    found = _sizes(path)
    for name, size in wanted.items():
        if found.get(name) != size:
            return f"{name} has {found.get(name, 'no')} bytes of {size}"
    return None


def names_of(tree: Any) -> list[str]:
    """A name of every leaf of a tree: layers/w_qkv."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(tree)
    ]


def _named_digest(function: Callable, items: dict[str, Any]) -> dict[str, int]:
    values = jax.device_get(function(items))
    return {name: int(value) for name, value in zip(names_of(items), values, strict=True)}


def _read_run(path: Path) -> dict[str, Any]:
    file = path / "run" / "metadata"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{file}: {error}") from None


def _restore_items(
    path: Path, targets: dict[str, Any], digests: dict[str, int], digest_function: Callable
) -> dict[str, Any]:
    """Compare names, shapes and dtypes with what is saved, restore, compare digests."""
    items = {}
    with _quiet_reads(), ocp.StandardCheckpointer() as checkpointer:
        for name, target in targets.items():
            damage = None
            try:
                _compare(path / name, checkpointer.metadata(path / name), target)
                items[name] = checkpointer.restore(path / name, target)
            except ConfigError:
                raise
            except (
                Exception
            ) as error:  # Orbax and TensorStore raise what they will for a damaged file
                damage = f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
            if damage is not None:  # raised here, where it no longer holds on to the failed reads
                raise CorruptCheckpoint(damage)
    changed = [
        name
        for name, value in _named_digest(digest_function, items).items()
        if digests.get(name) != value
    ]
    if changed:
        error = CorruptCheckpoint(
            f"the bits of {', '.join(changed[:3])} are not those that were saved ({len(changed)} arrays)"
        )
        error.everywhere = True  # the digest is one sum over all devices
        raise error
    return items


def _compare(path: Path, metadata: Any, target: Any) -> None:
    tree = metadata.item_metadata.tree
    saved = dict(zip(names_of(tree), jax.tree.leaves(tree), strict=True))
    wanted = dict(zip(names_of(target), jax.tree.leaves(target), strict=True))
    differences = [f"{name} is missing" for name in wanted.keys() - saved.keys()]
    differences += [f"{name} is not in the model" for name in saved.keys() - wanted.keys()]
    for name in wanted.keys() & saved.keys():
        have, want = saved[name], wanted[name]
        if tuple(have.shape) != want.shape or have.dtype != want.dtype:
            differences.append(
                f"{name} is {tuple(have.shape)} {have.dtype}, the configuration makes {want.shape} {want.dtype}"
            )
    if differences:
        raise ConfigError(
            f"{path} does not fit the configuration: {'; '.join(sorted(differences)[:4])} ({len(differences)} in all); "
            "use the configuration it was trained with, or another run_dir"
        )


@contextlib.contextmanager
def _quiet_reads() -> Iterator[None]:
    """Keep Orbax's chatter about a damaged file off the screen; what it says otherwise is passed on.

    When one read fails, the others go on and print pages of tracebacks as they find their event
    loop closed. The failure itself is raised and reported.
    """
    hook, level, printed = sys.unraisablehook, logging.getLogger("absl").level, io.StringIO()
    sys.unraisablehook = lambda _: None
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(printed):
            try:
                yield
            except CorruptCheckpoint:
                time.sleep(0.5)  # the reads that still go on
                gc.collect()  # and the coroutines that never started
                raise
        sys.stderr.write(printed.getvalue())
    finally:
        sys.unraisablehook = hook
        logging.getLogger("absl").setLevel(level)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder meant by a path: itself, or the newest of a run's folder. Raises ConfigError."""
    for folder in (path / "checkpoints", path):
        if (folder / "params").is_dir():
            return folder
        steps = (
            [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()]
            if folder.is_dir()
            else []
        )
        if steps:
            return folder / str(max(steps))
    raise ConfigError(
        f"{path} is neither a run's folder with checkpoints nor a checkpoint (a folder with params/)"
    )


def describe(path: Path | str) -> dict[str, Any]:
    """What a checkpoint says of itself: `config`, `digest` of every array and, in a run's, `step` and the `tokenizer`'s hash."""
    folder = find_checkpoint(Path(path).absolute())
    try:
        return _read_run(folder)
    except CorruptCheckpoint as error:
        raise ConfigError(
            f"{folder} is damaged: {error}; choose another checkpoint of the run"
        ) from None


def load_params(path: Path | str, layout: Layout | None = None) -> tuple[ModelConfig, Params]:
    """Weights alone, float32, of a run's newest checkpoint or of one checkpoint folder. Raises ConfigError."""
    folder = find_checkpoint(Path(path).absolute())
    try:
        run = _read_run(folder)
        config = ModelConfig(**run["config"]["model"])
        _, shapes, axes = abstract_model(config)
        if layout is None:
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shardings = jax.tree.map(lambda _: sharding, shapes)
        else:
            shardings = jax.tree.map(lambda _, names: layout.sharding(*names), shapes, axes)
        target = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=sharding
            ),
            shapes,
            shardings,
        )
        params = _restore_items(folder, {"params": target}, run["digest"], jax.jit(digest))[
            "params"
        ]
    except CorruptCheckpoint as error:
        raise ConfigError(
            f"{folder} is damaged: {error}; choose another checkpoint of the run"
        ) from None
    return config, params


def save_params(path: Path | str, config: ModelConfig, params: Params) -> None:
    """Write weights alone as a checkpoint folder that `init_from` and load_params read."""
    run = {
        "config": {"model": dataclasses.asdict(config)},
        "digest": _named_digest(jax.jit(digest), {"params": params}),
    }
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(Path(path).absolute(), args=_save_arguments({"params": params}, run))
