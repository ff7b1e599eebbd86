"""Keep what jax compiles in tests, for all their processes and for later calls of pytest.

Half of the tests' time would be compilation, most of it of programs that have been compiled before:
by another test, another process, or an earlier call. jax's persistent cache keeps them, in
cache/tests, with two changes that many processes with short lives need. A program is written whole
or not at all, even where a test kills the process that writes it. Every process of a run writes,
not only process 0.
"""

import hashlib
import os
import shutil
import types
from pathlib import Path

from jax._src import compiler, lru_cache

REPOSITORY = Path(__file__).parents[1]
LIMIT_BYTES = 2 << 30  # of all programs; then all are removed


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
    return REPOSITORY / "cache" / "tests" / f"compiled-{name}"


def limit() -> None:
    """Remove all programs where they have become too many."""
    if sum(path.stat().st_size for path in folder().glob("*")) > LIMIT_BYTES:
        shutil.rmtree(folder())


def make_writes_atomic() -> None:
    """jax writes into the file that others read, and never again where there is one."""

    def put(self: lru_cache.LRUCache, key: str, value: bytes) -> None:
        path = Path(self.path) / f"{key}{lru_cache._CACHE_SUFFIX}"
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(value)
        temporary.replace(path)

    lru_cache.LRUCache.put = put


def let_every_process_write() -> None:
    """On the CPU each process of a run has programs of its own; jax keeps those of process 0."""
    first = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0))
    compiler._cache_write = types.FunctionType(
        compiler._cache_write.__code__, {**vars(compiler), "distributed": first}
    )
