"""Keep what jax compiles in tests, for all their processes and for later calls of pytest.

Half of the tests' time would be compilation, most of it of programs that have been compiled before:
by another test, another process, or an earlier call. jax's persistent cache keeps them, with three
changes. A program is written whole, and one that is not whole is compiled again, since tests kill
processes at any moment. Every process of a run writes, not only process 0. A program for several
devices of one process is never kept: read again on a CPU, its collectives wait for each other for
ever (jax 0.10.1; no report of it is known). Such a program is compiled anew in every process that
needs it, so its machine code is made without LLVM's optimisations, in half the time, except in one
test of meshes and in the slow tests. XLA's own passes (partitioning, fusion, buffers) are the same.

Programs lie in ~/.cache/baichuan_jax (or $XDG_CACHE_HOME). `install` makes jax use them.
"""

import hashlib
import os
import shutil
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import compiler, lru_cache

LIMIT_BYTES = 2 << 30  # of all programs; then all are removed
DIGEST_BYTES = 32
_compile_or_get_cached = compiler.compile_or_get_cached
optimise_all = False  # programs that are never kept too, as a user's are
_kept = True  # whether the program that is being compiled may be kept


def folder() -> Path:
    """Where programs are kept.

    jax's key of a program covers all that it is compiled from but the features of the CPU, so the
    folder is named after these.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    name = hashlib.sha256("".join(features).encode()).hexdigest()[:8]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "baichuan_jax" / f"tests-{name}"


def limit() -> None:
    """Remove all programs where they have become too many."""
    programs = folder().glob(f"*{lru_cache._CACHE_SUFFIX}")
    if sum(path.stat().st_size for path in programs) > LIMIT_BYTES:
        shutil.rmtree(folder())


def install() -> None:
    """Read and write kept programs in this process, and in those that are forked from it."""
    jax.config.update("jax_compilation_cache_dir", str(folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    lru_cache.LRUCache.get, lru_cache.LRUCache.put = _get, _put
    compiler.compile_or_get_cached = _compile
    # On the CPU each process of a run has programs of its own, and jax writes those of process 0.
    first = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0))
    compiler._cache_write = types.FunctionType(
        compiler._cache_write.__code__, {**vars(compiler), "distributed": first}
    )


def _compile(
    backend: Any, computation: Any, devices: np.ndarray, options: Any, *rest: Any, **more: Any
) -> Any:
    """jax's own function, beside which it is noted whether the program may be kept."""
    global _kept
    here = sum(device.process_index == jax.process_index() for device in devices.flat)
    _kept = here == 1
    if here > 1 and backend.platform == "cpu" and not optimise_all:
        # What JAX_DISABLE_MOST_OPTIMIZATIONS sets, which a process sets for all its programs.
        debug = options.executable_build_options.debug_options
        debug.xla_backend_optimization_level = 0
        debug.xla_llvm_disable_expensive_passes = True
    return _compile_or_get_cached(backend, computation, devices, options, *rest, **more)


def _get(cache: lru_cache.LRUCache, key: str) -> bytes | None:
    """A program, or None where there is none, its file is damaged, or it is not kept."""
    if not _kept:
        return None
    try:
        content = _file(cache, key).read_bytes()
    except FileNotFoundError:
        return None
    digest, program = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return program if hashlib.sha256(program).digest() == digest else None


def _put(cache: lru_cache.LRUCache, key: str, program: bytes) -> None:
    """Write a program under another name first: jax writes into the file that others read."""
    if not _kept:
        return
    path = _file(cache, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(hashlib.sha256(program).digest() + program)
    temporary.replace(path)


def _file(cache: lru_cache.LRUCache, key: str) -> Path:
    return Path(cache.path) / f"{key}{lru_cache._CACHE_SUFFIX}"
