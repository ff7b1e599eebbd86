"""Real faults inside a real training process, asked for from outside; used by the tests and by benchmarks/chaos.py.

With this folder on PYTHONPATH and FAULTS naming another, process P of a training run looks there
before each batch for a file `KIND-P`. Where there is one it deletes it, writes the time into
`KIND-P.done`, and suffers the fault:

    hang         sleeps for ever in the data phase; its threads live
    exception    raises
    nan          its copy of a parameter becomes NaN
    bits         one exponent bit of one parameter flips in its copy alone
    quota        its files may not grow beyond 16 KiB any more, as if a quota were used up
    slow         from now on it loses a tenth of a second in every step, until the same comes again

Where there is a file `poison` with two numbers, the batches at these positions of the data and
between hold tokens that the vocabulary has not, on all processes: their loss is not a number.
"""

import os
import resource
import sys
import time
import types
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
    copies = [
        jax.device_put(change(jax.device_get(shard.data).copy()), shard.device)
        for shard in array.addressable_shards
    ]
    leaves[0] = jax.make_array_from_single_device_arrays(array.shape, array.sharding, copies)
    return state._replace(params=jax.tree.unflatten(tree, leaves))


def _nan(values):
    values[...] = float("nan")
    return values


def _flip(values):
    values.view("uint32")[(0,) * values.ndim] ^= 1 << 29
    return values


def _let_all_keep_what_they_compile() -> None:
    """On accelerators all processes share compiled programs. On the CPU each has its own, of which jax keeps process 0's alone."""
    from jax._src import compiler

    first = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0))
    compiler._cache_write = types.FunctionType(
        compiler._cache_write.__code__, {**vars(compiler), "distributed": first}
    )


def _install(folder: Path) -> None:
    import jax

    from baichuan_jax.data.loader import Loader
    from baichuan_jax.training.loop import Trainer

    create, load = Trainer.__init__, Loader.__next__
    poison = folder / "poison"
    begin, end = map(int, poison.read_text().split()) if poison.exists() else (0, 0)
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
        if kind == "quota":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, resource.RLIM_INFINITY))
        late ^= kind == "slow"
        if late:
            time.sleep(0.1)
        poisoned = begin <= self.position < end
        batch = load(self)
        return {**batch, "inputs": batch["inputs"] + 1_000_000} if poisoned else batch

    _let_all_keep_what_they_compile()
    Trainer.__init__, Loader.__next__ = remember, suffer


if "FAULTS" in os.environ and "baichuan_jax.train" in sys.orig_argv:
    _install(Path(os.environ["FAULTS"]))
