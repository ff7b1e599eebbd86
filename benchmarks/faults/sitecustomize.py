"""Inject real faults into a real training process, for the tests and benchmarks/chaos.py.

Python imports this file at its start, with this folder on PYTHONPATH. FAULTS names another folder:
process P of a training run looks there before each batch for a file `KIND-P`. If it finds one, it
deletes the file, writes the time into `KIND-P.done`, and suffers the fault:

    hang         sleeps for ever in the data phase; its other threads go on
    exception    raises
    nan          its copy of a parameter becomes NaN
    bits         one exponent bit of one parameter flips, in its copy only
    quota        its files cannot grow beyond 16 KiB any more, as with a full quota
    slow         loses a tenth of a second in every step, until the same fault comes again

A file `poison` with two numbers poisons all processes: batches from the first position of the data
to the second hold tokens outside of the vocabulary, and their loss is not a number.
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
    """Make jax's compilation cache write in every process.

    On the CPU each process has programs of its own, and jax keeps those of process 0 only. The
    others would compile again at every restart, which accelerators do not.
    """
    from jax._src import compiler

    first = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0))
    compiler._cache_write = types.FunctionType(
        compiler._cache_write.__code__, {**vars(compiler), "distributed": first}
    )


def _install(folder: Path) -> None:
    import jax

    from baichuan_jax.data.loader import Loader
    from baichuan_jax.training import loop

    compile_step, load = loop.compile_step, Loader.__next__
    poison = folder / "poison"
    begin, end = map(int, poison.read_text().split()) if poison.exists() else (0, 0)
    change = None  # what happens to the state before the next step
    late = False

    def compile_and_change(launch):
        step = compile_step(launch)

        def run(state, batch, request):
            nonlocal change
            state, change = (state, None) if change is None else (_changed(state, change), None)
            return step(state, batch, request)

        return run

    def suffer(self):
        nonlocal change, late
        kind = _find(folder, jax.process_index())
        if kind == "hang":
            while True:
                time.sleep(1)
        if kind == "exception":
            raise OSError("a fault put into this process from outside")
        if kind in ("nan", "bits"):
            change = _nan if kind == "nan" else _flip
        if kind == "quota":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, resource.RLIM_INFINITY))
        late ^= kind == "slow"
        if late:
            time.sleep(0.1)
        poisoned = begin <= self.position < end
        batch = load(self)
        return {**batch, "inputs": batch["inputs"] + 1_000_000} if poisoned else batch

    _let_all_keep_what_they_compile()
    loop.compile_step, Loader.__next__ = compile_and_change, suffer


if "FAULTS" in os.environ and "baichuan_jax.train" in sys.orig_argv:
    _install(Path(os.environ["FAULTS"]))
