"""The state of a run as a value, and as the named arrays that a checkpoint holds.

Both tiers of checkpoints (orbax.py, local_copies.py) save a `TrainState` in the same parts under
the same names, and prove after a restore that every array has the bits that were saved: a digest
of each is computed on the devices before the save, written beside the arrays, and compared.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from baichuan_jax.checkpoint.progress import Progress
from baichuan_jax.config.schema import ModelConfig
from baichuan_jax.resilience.digests import digest
from baichuan_jax.step import TrainState

# Settings of a model that change no name and no size of its arrays: others compute, or learn,
# something else with the same numbers. num_heads is one for a copy that has no shapes.
SAME_ARRAYS = ("num_heads", "rms_norm_eps", "rope_theta", "pad_token_id")


def identity(model: ModelConfig) -> dict[str, Any]:
    """The values of SAME_ARRAYS, to be saved with a model's arrays."""
    return {name: getattr(model, name) for name in SAME_ARRAYS}


@dataclasses.dataclass(frozen=True)
class RunState:
    """A run between two steps: what `restore` returns and the loop passes on.

    `step` counts the steps done. `progress` is where the next batch's data begin. `skipped` are the
    windows [begin, end) of the run's rows that are left out.
    """

    state: TrainState
    step: int
    progress: Progress
    skipped: tuple[tuple[int, int], ...] = ()

    @property
    def position(self) -> int:
        """The data position of the next batch: a count of batches."""
        return self.progress.position


class StateTarget:
    """The arrays that a configuration makes: names, shapes and shardings to restore into.

    `tree`: a TrainState of shapes with shardings (step.Steps.abstract_state). `model`: its
    `identity`, for copies that hold arrays without shapes.
    """

    def __init__(self, tree: TrainState, model: dict[str, Any] | None = None) -> None:
        self.tree, self.model = tree, model or {}
        # Compiled once for all saves and restores: the shapes never change within a launch.
        self._digest = jax.jit(digest)
        self._all_finite = jax.jit(
            lambda tree: jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
        )

    @property
    def items(self) -> dict[str, Any]:
        """The arrays by the parts that are saved."""
        return as_items(self.tree)

    def digest(self, items: dict[str, Any]) -> dict[str, int]:
        """A digest of every array by its name. All processes must call this together."""
        return named_digest(self._digest, items)

    def is_finite(self, state: TrainState) -> bool:
        """Whether every number of a state is finite; the same on all processes."""
        return bool(jax.device_get(self._all_finite(state)))


def as_items(state: TrainState) -> dict[str, Any]:
    """A TrainState in the parts that are saved: `params` apart, so that they load alone."""
    # Everything but the parameters is one item: generate, evaluate and init_from read `params`
    # alone, a third of the bytes.
    fields = state._asdict()
    return {"params": fields.pop("params"), "optimizer": fields}


def from_items(items: dict[str, Any]) -> TrainState:
    """The TrainState of saved parts."""
    return TrainState(params=items["params"], **items["optimizer"])


def names_of(tree: Any) -> list[str]:
    """A name of every leaf of a tree: layers/w_qkv."""
    paths = jax.tree.leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def named_digest(function: Callable, items: dict[str, Any]) -> dict[str, int]:
    """What a compiled `digest` gives, by the arrays' names."""
    # One transfer for all arrays, not one for each.
    values = jax.device_get(function(items))
    return {name: int(value) for name, value in zip(names_of(items), values, strict=True)}
