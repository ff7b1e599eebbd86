"""Real faults inside a real training process, asked for from outside; used by the tests and by benchmarks/chaos.py.

With this folder on PYTHONPATH and FAULTS naming another, process P of a training run looks there before each batch for a file
`KIND-P`. Where there is one it deletes it, writes the time into `KIND-P.done`, and suffers the fault:

    hang         sleeps for ever in the data phase; its threads live
    exception    raises
    nan          its copy of a parameter becomes NaN
    bits         one exponent bit of one parameter flips in its copy alone
    late         from now on it loses a tenth of a second in every step
"""

import os
import sys
import time
from pathlib import Path


def _find(folder: Path, process: int) -> str | None:
    for path in folder.glob(f"*-{process}"):
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        done = folder / f"{path.name}.done"
        done.write_text(repr(time.time()))
        return path.name.rsplit("-", 1)[0]
    return None


def _changed(state, change):
    """The state with one parameter's copies on this process changed, whatever the others hold."""
    import jax

    leaves, tree = jax.tree.flatten(state.params)
    array = leaves[0]
    copies = [jax.device_put(change(jax.device_get(shard.data).copy()), shard.device) for shard in array.addressable_shards]
    leaves[0] = jax.make_array_from_single_device_arrays(array.shape, array.sharding, copies)
    return state._replace(params=jax.tree.unflatten(tree, leaves))


def _nan(values):
    values[...] = float("nan")
    return values


def _flip(values):
    values.view("uint32")[(0,) * values.ndim] ^= 1 << 29
    return values


def _install(folder: Path) -> None:
    import jax

    from baichuan_jax.data.loader import Loader
    from baichuan_jax.trainer import Trainer

    create, load = Trainer.__init__, Loader.__next__
    trainer, late = None, False

    def remember(self, *arguments):
        nonlocal trainer
        trainer = self
        create(self, *arguments)

    def suffer(self):
        nonlocal late
        kind = _find(folder, jax.process_index())
        if kind == "hang":
            while True:
                time.sleep(1)
        if kind == "exception":
            raise OSError("a fault put into this process from outside")
        if kind in ("nan", "bits"):
            trainer.state = _changed(trainer.state, _nan if kind == "nan" else _flip)
        late = late or kind == "late"
        if late:
            time.sleep(0.1)
        return load(self)

    Trainer.__init__, Loader.__next__ = remember, suffer


if "FAULTS" in os.environ and "baichuan_jax.train" in sys.orig_argv:
    _install(Path(os.environ["FAULTS"]))
