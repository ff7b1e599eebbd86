"""Checkpoints on storage that all hosts share, written through Orbax beside the training steps.

In: a RunState whose arrays lie on a mesh. Out: `checkpoints/STEP/` with
three items: `params`, `optimizer` (the rest of the state) and `run` (JSON: step, progress,
configuration, tokenizer hash, digests). Orbax copies the shards to the host and writes them from a
thread; each process writes what its devices hold, so a restore may use another mesh or another
number of processes. Two checks find what a disk or a kill has damaged: the sizes of all files, by
process 0 before anything is read, and the digest of every array after it is back on the devices.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import orbax.checkpoint as ocp
import yaml
from jax.experimental import multihost_utils

from baichuan_jax.checkpoint.orbax_workarounds import (
    barrier,
    forget_failed_save,
    quiet_reads,
    quiet_saves,
)
from baichuan_jax.checkpoint.progress import Progress
from baichuan_jax.checkpoint.state import (
    RunState,
    StateTarget,
    as_items,
    from_items,
    identity,
    names_of,
)
from baichuan_jax.config.files import dump_config
from baichuan_jax.config.parsing import Count, build, read_json, require_type
from baichuan_jax.config.schema import (
    CheckpointConfig,
    Config,
    ConfigError,
    ModelConfig,
    require,
)
from baichuan_jax.resilience.causes import PeerFailed, errno_of
from baichuan_jax.resilience.coordination import agree
from baichuan_jax.resilience.exits import say
from baichuan_jax.resilience.waits import announced
from baichuan_jax.runs.events import CheckpointCorrupt
from baichuan_jax.runs.files import write_atomically
from baichuan_jax.runs.folder import refuse_outside

ITEMS = ("params", "optimizer", "run")
# In a checkpoint's folder: its files and their sizes.
SIZES = "sizes.json"


# What a received checkpoint may declare more than its files hold. Trained weights hardly compress:
# zeros do, ten thousand times, and a few kilobytes of them would be terabytes of a model.
MOST_EXPANSION = 100
# Up to here the expansion is of no account: a small model may be all zeros.
FREE_BYTES = 256 << 20
# Chunks of one array: each device's part is one.
MOST_CHUNKS = 1 << 17

# What the JSON item `run` holds; a folder of weights has the last three alone.
_RUN = {
    "step": Count,
    "position": Count,
    # null: weights that were imported without one.
    "tokenizer": str | None,
    "config": dict[str, Any],
    "digest": dict[str, int],
}


class CorruptCheckpoint(RuntimeError):
    """A checkpoint that cannot be read, or whose arrays are not those that were saved.

    `everywhere`: all processes find it, so that they can go on to the checkpoint before together.
    """

    everywhere = False


class Checkpoints:
    """The checkpoints of one run: `save` starts one, `finish` waits for it, `restore` reads one."""

    def __init__(
        self, directory: Path, config: Config, tokenizer_hash: str, target: StateTarget
    ) -> None:
        # Orbax refuses relative paths.
        self.directory = directory.absolute()
        self._config, self._tokenizer, self._target = config, tokenizer_hash, target
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(quiet_saves())
        self._plain = yaml.safe_load(dump_config(config))
        self._manager = ocp.CheckpointManager(
            self.directory, options=_options(config.checkpoint), item_names=ITEMS
        )
        self._saving: int | None = None

    def save(self, state: RunState) -> None:
        """Start saving; returns once the state is copied to the host.

        Raises what the save before failed with.
        """
        # Orbax would wait too, but would not say which save failed.
        self.finish()
        items, step = as_items(state.state), state.step
        run = {
            "step": step,
            # Earlier versions have this alone; here it is for people who read the file.
            "position": state.position,
            "progress": state.progress.to_json(),
            "tokenizer": self._tokenizer,
            # With the arrays, so that `load_params` needs no other file to build the model.
            "config": self._plain,
            "digest": self._target.digest(items),
        }
        try:
            self._manager.save(step, args=save_arguments(items, run))
        except Exception:
            self._forget(step)
            raise
        self._saving = step

    def is_saving(self) -> bool:
        """Whether a save is under way, as far as this process knows."""
        return self._manager.is_saving_in_progress()

    def finish(self) -> int | None:
        """Wait until the save under way is whole; its step, or None. Raises what it failed with."""
        # Forgotten first: a save that failed must not be waited for again.
        step, self._saving = self._saving, None
        if step is None:
            return None
        try:
            self._manager.wait_until_finished()
        except Exception:
            self._forget(step)
            raise
        # After Orbax has renamed the folder: a kill before this leaves a checkpoint without sizes,
        # which is good all the same.
        if jax.process_index() == 0:
            try:
                _write_sizes(self.directory / str(step))
            except OSError as error:
                say(f"checkpoint {step} is saved; its list of sizes is not: {error.strerror}")
        return step

    def _forget(self, step: int) -> None:
        """Leave nothing of a save that failed: half a checkpoint takes room on a full disk."""
        # With several processes the launch ends, and to reload the list would be a barrier.
        if jax.process_count() == 1:
            forget_failed_save(self._manager)
            shutil.rmtree(self.directory / f"{step}.orbax-checkpoint-tmp", ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of the checkpoints on storage, oldest first."""
        return sorted(self._manager.all_steps())

    def roll_back(self, before: int, newest: int) -> None:
        """Delete the checkpoints after step `newest`: they may hold what must not be trained on.

        Where none would be left, the oldest of a step before `before` stays.
        """
        # Process 0's list: others may see its last change late, and each step is deleted together.
        steps = agree("checkpoints before the rollback", self.steps)
        # Better than to begin again, however often numbers broke.
        oldest = [step for step in steps if step < before][:1]
        good = [step for step in steps if step <= newest] or oldest
        # The newest first: a kill in between leaves what the next launch deletes.
        for step in reversed(steps):
            if step not in good:
                self._manager.delete(step)

    def restore(self, report: Callable[[CheckpointCorrupt], None]) -> RunState | None:
        """The newest good checkpoint, on this run's mesh; None where there is none.

        A damaged one is reported and renamed to STEP.corrupt. Damage that process 0 finds by the
        files' sizes, or all find by the digests, leads to the checkpoint before. Damage that one
        process alone meets while it reads ends it with PeerFailed, since the others wait for it
        inside Orbax; the next launch then uses the checkpoint before. Raises ConfigError for a
        checkpoint that is whole but of another configuration, and where all are damaged; OSError
        where the system refuses to read one, which may be whole.
        """
        # Process 0's list: a process that missed the newest step would wait for the others.
        for step in reversed(agree("checkpoints", self.steps)):
            path = self.directory / str(step)
            # Process 0 looks for all: with a thousand hosts each would list every file.
            damage = agree(f"checkpoint {step}", lambda path=path: _find_damage(path))
            try:
                if damage is not None:
                    raise CorruptCheckpoint(damage)
                return self._restore(step)
            except CorruptCheckpoint as error:
                report(CheckpointCorrupt(step=step, path=str(path), reason=str(error)))
                found = error
            corrupt = _unused(self.directory / f"{step}.corrupt")
            if jax.process_count() > 1 and not found.everywhere and damage is None:
                # Several processes may rename it.
                with contextlib.suppress(FileNotFoundError):
                    path.rename(corrupt)
                raise PeerFailed(
                    f"{path} is damaged ({found}) where this process reads it; the next start uses "
                    "the checkpoint before it"
                )
            # Renamed, not deleted: somebody may want to know what happened to it.
            if jax.process_index() == 0:
                path.rename(corrupt)
            if jax.process_count() > 1:
                with announced(f"the other processes to leave checkpoint {step}"):
                    multihost_utils.sync_global_devices(f"corrupt checkpoint {step}")
            # Its list of steps still has the one that was renamed.
            self._manager.reload()
        # Also those of earlier launches: whoever starts again must not lose all steps by that.
        damaged = agree(
            "damaged checkpoints",
            lambda: sorted(path.name for path in self.directory.glob("*.corrupt*")),
        )
        require(
            not damaged,
            f"{self.directory} holds damaged checkpoints only ({', '.join(damaged[:3])}); to begin "
            "again at the first step, delete it, or give another run_dir",
        )
        return None

    def _restore(self, step: int) -> RunState:
        path = self.directory / str(step)
        run = read_run(path)
        if missing := [key for key in _RUN if key not in run]:
            raise CorruptCheckpoint(f"{path / 'run' / 'metadata'} lacks {', '.join(missing)}")
        # Nothing else would notice: rows of another tokenizer have the same shapes.
        if run["tokenizer"] != self._tokenizer:
            raise ConfigError(
                f"{path} was trained with tokenizer {run['tokenizer'][:12]} and this run's is "
                f"{self._tokenizer[:12]}; use the run's own tokenizer, or another run_dir"
            )
        progress = self._progress(run)
        ours = identity(self._config.model)
        for name, value in ours.items():
            saved = run["config"]["model"].get(name, value)
            # A difference that the shapes show is refused below, with both shapes.
            if saved != value and name != "num_heads":
                theirs = "null" if saved is None else saved
                raise ConfigError(
                    f"{path} was trained with model.{name}={theirs} and the settings have {value}: "
                    f"the same weights make another model; set --model.{name} {theirs}, or another "
                    "run_dir"
                )
        items = restore_items(path, self._target.items, run["digest"], self._target.digest)
        return RunState(from_items(items), run["step"], progress)

    def _progress(self, run: dict[str, Any]) -> Progress:
        if "progress" in run:
            try:
                return Progress.from_json(run["progress"])
            except ConfigError:
                raise
            except ValueError as error:
                raise CorruptCheckpoint(str(error)) from None
        length = self._config.train.context_length
        try:
            return Progress.of_position(run["position"], run["config"], length)
        except (ValueError, KeyError) as error:
            raise CorruptCheckpoint(f"no progress in the data: {error!r}") from None

    def close(self) -> None:
        """Wait for the save under way, and stop Orbax's threads."""
        with self._quiet:
            self._manager.close()


def _options(config: CheckpointConfig) -> ocp.CheckpointManagerOptions:
    return ocp.CheckpointManagerOptions(
        max_to_keep=config.keep_last,
        keep_period=config.keep_every,
        # What a killed save left half written would stay for ever.
        cleanup_tmp_directories=True,
        # With Orbax's own barrier, all processes would wait where one cannot write.
        async_options=ocp.AsyncOptions(barrier_sync_fn=barrier()),
    )


def save_arguments(items: dict[str, Any], run: dict[str, Any]) -> ocp.args.Composite:
    """Orbax's arguments for a checkpoint of these arrays and this JSON."""
    arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    return ocp.args.Composite(**arrays, run=ocp.args.JsonSave(run))


def _unused(path: Path) -> Path:
    # A step may be damaged twice: the launch after saves it again.
    candidates = [path, *(path.with_name(f"{path.name}{n}") for n in range(2, 100))]
    return next(candidate for candidate in candidates if not candidate.exists())


def _sizes(path: Path) -> dict[str, int]:
    return {str(file.relative_to(path)): file.stat().st_size for file in _files(path)}


def _files(path: Path) -> list[Path]:
    """All files below a folder. Raises OSError; Path.rglob leaves out what it may not list."""

    def fail(error: OSError) -> NoReturn:
        raise error

    return sorted(
        Path(folder) / name for folder, _, names in os.walk(path, onerror=fail) for name in names
    )


def _write_sizes(path: Path) -> None:
    write_atomically(path / SIZES, json.dumps(_sizes(path)).encode())


def _refuse_links_in_checkpoint(path: Path) -> None:
    """Raise ConfigError where a link leads out of a checkpoint."""
    for folder, folders, names in os.walk(path):
        for name in (*folders, *names):
            refuse_outside(path, Path(folder) / name)


def _find_damage(path: Path) -> str | None:
    """The first file of a checkpoint whose size is not the one noted after the save.

    None where all are right, or where a kill came before the sizes were noted: the digests decide.
    """
    # Before their sizes: a link is no damage, and its checkpoint keeps its name.
    _refuse_links_in_checkpoint(path)
    try:
        wanted = require_type(read_json(path / SIZES), dict[str, int], SIZES)
    except ConfigError as error:
        if (path / SIZES).exists():
            say(f"{path / SIZES} is damaged, and the digests decide: {error}")
        return None
    found = _sizes(path)
    # Files that came later do no harm: the list itself is one.
    for name, size in wanted.items():
        if found.get(name) != size:
            return f"{name} has {found.get(name, 'no')} bytes of {size}"
    return None


def read_run(path: Path) -> dict[str, Any]:
    """The JSON item of a checkpoint, with all that its readers take from it checked.

    Raises CorruptCheckpoint, and OSError where the system refuses to read it.
    """
    file = path / "run" / "metadata"
    refuse_outside(path, file)
    try:
        run = require_type(read_json(file), dict, "it")
        for key, kind in _RUN.items():
            if key in run or key in ("config", "digest"):
                require_type(run.get(key), kind, f"its {key}")
        model = require_type(run["config"].get("model"), dict, "its config.model")
        names = {item.name for item in dataclasses.fields(ModelConfig)}
        if unknown := sorted(set(model) - names):
            raise ConfigError(f"its config.model has {', '.join(unknown)}, which no model has here")
        build(ModelConfig, model, "its config.model")
    except (OSError, ConfigError) as error:
        raise _failed_read(path, f"{file}: {error}", error) from None
    return run


# The system's errors that are damage: a file is gone, no file, or on a bad sector.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)


def _failed_read(path: Path, what: str, error: Exception) -> Exception:
    """What a failed read is: damage, or an error of the system, behind which all may be whole.

    Nothing is renamed and no older checkpoint used for want of a right, of memory, of a server.
    """
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return error.with_traceback(None)
    number = errno_of(error)
    if number is not None and number not in _DAMAGE:
        # A new one, as below: the other holds on to the reads that failed.
        return OSError(number, os.strerror(number), getattr(error, "filename", None) or str(path))
    try:
        # Looked at again: Orbax puts errors of its own in the place of the system's.
        for file in _files(path):
            with open(file, "rb") as content:
                content.read(1)
    except OSError as refused:
        if refused.errno not in _DAMAGE:
            return OSError(refused.errno, refused.strerror, refused.filename)
    return CorruptCheckpoint(what)


def restore_items(
    path: Path,
    targets: dict[str, Any],
    digests: dict[str, int],
    digest_of: Callable[[dict[str, Any]], dict[str, int]],
) -> dict[str, Any]:
    """The arrays of a checkpoint. Raises ConfigError for another model, CorruptCheckpoint, OSError.

    Names, shapes, dtypes and bytes are compared before anything is read, digests after. ConfigError
    too for a file that is a link out of the checkpoint.
    """
    # Process 0 looks for all: with a thousand hosts each would list every file.
    agree(f"the files of {path}", lambda: _require_own_files(path, targets))
    items = {}
    with quiet_reads(), ocp.StandardCheckpointer() as checkpointer:
        for name, target in targets.items():
            failed = None
            try:
                _compare(path / name, checkpointer.metadata(path / name), target)
                with announced(f"{path / name} to be read"):
                    items[name] = checkpointer.restore(path / name, target)
            except ConfigError:
                raise
            except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
                text = " ".join(str(error).split())[:200]
                failed = _failed_read(path, f"{name}: {type(error).__name__}: {text}", error)
            # Raised here: inside `except` it would keep the failed reads alive through __context__.
            if failed is not None:
                raise failed
    changed = [name for name, value in digest_of(items).items() if digests.get(name) != value]
    if changed:
        error = CorruptCheckpoint(
            f"the bits of {', '.join(changed[:3])} are not those that were saved "
            f"({len(changed)} arrays)"
        )
        # A digest is a sum over all devices: all processes see the same.
        error.everywhere = True
        raise error
    return items


def _require_own_files(path: Path, targets: dict[str, Any]) -> None:
    """Raise ConfigError where files lie elsewhere, or hold far less than the arrays to be read.

    TensorStore itself refuses the names in its manifests that leave the folder.
    """
    _refuse_links_in_checkpoint(path)
    wanted = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(targets))
    try:
        there = sum(file.stat().st_size for name in targets for file in _files(path / name))
    # What is missing is named where it is read.
    except OSError:
        return
    if wanted > max(FREE_BYTES, MOST_EXPANSION * there):
        raise ConfigError(
            f"{path} has {there:,} bytes of arrays, and its configuration makes them {wanted:,}: "
            "these are no trained weights"
        )


def _compare(path: Path, metadata: Any, target: Any) -> None:
    # Orbax would load arrays of another model without an error (orbax#2972).
    if metadata.item_metadata is None:
        raise FileNotFoundError("no arrays that Orbax finds")
    tree = metadata.item_metadata.tree
    saved = dict(zip(names_of(tree), jax.tree.leaves(tree), strict=True))
    wanted = dict(zip(names_of(target), jax.tree.leaves(target), strict=True))
    differences = [f"{name} is missing" for name in wanted.keys() - saved.keys()]
    differences += [f"{name} is not in the model" for name in saved.keys() - wanted.keys()]
    for name in wanted.keys() & saved.keys():
        have, want = saved[name], wanted[name]
        if tuple(have.shape) != want.shape or have.dtype != want.dtype:
            differences.append(
                f"{name} is {tuple(have.shape)} {have.dtype}, the configuration makes "
                f"{want.shape} {want.dtype}"
            )
        elif (chunks := getattr(have.storage, "chunk_shape", None)) is not None:
            # A chunk is read whole, whatever its array needs of it: TensorStore would ask for the
            # memory of a larger one, and end the process without it.
            sizes = list(zip(want.shape, chunks, strict=True))
            inside = all(0 < chunk <= max(size, 1) for size, chunk in sizes)
            if not inside or math.prod(-(-size // c) for size, c in sizes) > MOST_CHUNKS:
                differences.append(f"{name} is {want.shape} in chunks of {tuple(chunks)}")
    # Sorted below: a set has another order in every process.
    if differences:
        raise ConfigError(
            f"{path} does not fit the configuration: {'; '.join(sorted(differences)[:4])} "
            f"({len(differences)} in all); use the configuration it was trained with, or another "
            "run_dir"
        )
