"""Time saving and restoring a state beside plain writing and reading of as many bytes.

    python benchmarks/checkpoint.py [--gigabytes 2] [--folder DIR] [--json FILE]

The state has parameters and both moments in float32. It is saved through Orbax (`checkpoints/`) and
as a host's local copy, then restored from each; a plain file of the same bytes is written and read
in the same run. The table has seconds, the seconds for which training is blocked, and memory: the
process's peak above what it held before. On a CPU the devices use the host's memory too, so the
restored state itself is subtracted.
"""

import sys
from pathlib import Path

# A script finds the package from any folder.
sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from results import Results

from baichuan_jax.checkpoint.local_copies import RECORD, LocalCopies
from baichuan_jax.checkpoint.orbax import Checkpoints
from baichuan_jax.checkpoint.state import RunState, StateTarget, as_items
from baichuan_jax.config.schema import Config, MeshConfig, ModelConfig, OptimizerConfig
from baichuan_jax.sharding import make_mesh
from baichuan_jax.step import make_steps

# Parameters of a block of the model below.
LAYER = 4 * 1024 * 1024 + 3 * 1024 * 2816


def of_size(gigabytes: float) -> Config:
    """A model whose state takes about this many gigabytes, at 12 bytes a parameter."""
    layers = max(1, round((gigabytes * 1e9 / 12 - 2 * 32_000 * 1024) / LAYER))
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_heads": 8}
    model = ModelConfig(vocab_size=32_000, num_layers=layers, **sizes)
    return Config(model=model, optimizer=OptimizerConfig(warmup_steps=0))


def memory(name: str) -> int:
    """This process's memory in bytes: "VmHWM" is its peak, "VmRSS" its present size."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(name))
    return int(line.split()[1]) * 1024


class Measured:
    """Seconds of a call, and its peak of memory above what the process held before."""

    def __init__(self, call: Callable[[], Any]) -> None:
        # Resets the peak (man 5 proc).
        Path("/proc/self/clear_refs").write_text("5")
        before, began = memory("VmRSS"), time.perf_counter()
        self.value = call()
        self.seconds = time.perf_counter() - began
        self.memory = memory("VmHWM") - before


class Table:
    """The rows of the table, and the numbers behind them. `size`: bytes of the state."""

    def __init__(self, size: int, plain: dict[str, Measured]) -> None:
        self.size, self.plain = size, plain
        self.rows: list[list[str]] = []
        self.numbers: dict[str, dict[str, float | None]] = {}

    def add(
        self, what: str, done: Measured, beside: str, blocked: float | None = None, held: int = 0
    ) -> None:
        """`beside`: "write" or "read"; `held`: bytes of the result that are no extra memory."""
        share, memory = self.plain[beside].seconds / done.seconds, done.memory - held
        numbers = {"seconds": done.seconds, "blocked": blocked, "of_plain": share}
        self.numbers[what] = {**numbers, "memory": memory}
        cells = [f"{done.seconds:.2f}", "-" if blocked is None else f"{blocked:.2f}"]
        self.rows.append([what, *cells, f"{share:.0%}", f"{memory / self.size:.2f}"])


def write(path: Path, state: Any) -> None:
    """Write the bytes of every array, one after the other, and sync: the plain way."""
    with open(path, "wb") as file:
        for leaf in jax.tree.leaves(state):
            np.asarray(leaf).tofile(file)
        file.flush()
        os.fsync(file.fileno())


def fail(event: Any) -> None:
    """A tier reports damage; there is none here."""
    raise AssertionError(event)


def measure(config: Config, folder: Path) -> Table:
    """Save and restore a state of this configuration in both tiers."""
    steps = make_steps(config, make_mesh(config.mesh, jax.devices()[:1]))
    rng = np.random.default_rng(0)
    values = lambda like: rng.integers(0, 99, like.shape).astype(like.dtype)
    put = lambda like, sharding: jax.device_put(values(like), sharding)
    state = jax.tree.map(put, steps.state_shapes, steps.state_shardings)
    target = StateTarget(steps.abstract_state)
    digest = lambda state: target.digest(as_items(state))
    checkpoints = Checkpoints(folder / "checkpoints", config, "", target)
    copies = LocalCopies(folder / "local", folder / RECORD, 0, "here", "", target)
    # Compiles it, before anything is timed.
    digest(state)
    plain = {
        "write": Measured(lambda: write(folder / "plain", state)),
        "read": Measured(lambda: (folder / "plain").read_bytes()),
    }
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    table = Table(size, plain)
    for what, tier in (("checkpoint", checkpoints), ("local copy", copies)):
        blocked = 0.0

        def save(tier: Any = tier) -> None:
            nonlocal blocked
            began = time.perf_counter()
            tier.save(RunState(state, 1, checkpoints.progress_at(1)))
            blocked = time.perf_counter() - began
            tier.finish()

        table.add(f"save a {what}", Measured(save), "write", blocked)
    for what, restore in (
        ("checkpoint", lambda: checkpoints.restore(fail)),
        ("local copy", lambda: copies.restore(0, fail)),
    ):
        done = Measured(lambda restore=restore: jax.block_until_ready(restore().state))
        assert digest(done.value) == digest(state)
        table.add(f"restore a {what}", done, "read", held=size)
        del done
    checkpoints.close()
    return table


def main() -> None:
    """Measure, and show the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the state (default: 2)")
    parser.add_argument("--folder", type=Path, help="to write into (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the numbers")
    options = parser.parse_args()
    config = dataclasses.replace(of_size(options.gigabytes), mesh=MeshConfig(1, 1, 1, 1))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        table = measure(config, Path(folder))
    speed = {name: table.size / done.seconds / 1e9 for name, done in table.plain.items()}
    plain = f"written and synced at {speed['write']:.2f} GB/s, read at {speed['read']:.2f} GB/s"
    title = f"A state of {table.size / 1e9:.2f} GB (plain: {plain})"
    columns = ["", "s", "training is blocked, s", "of the plain speed", "memory, in states"]
    results = Results()
    results.table(title, columns, table.rows)
    results.save(options.json, bytes=table.size, **table.numbers)


if __name__ == "__main__":
    main()
