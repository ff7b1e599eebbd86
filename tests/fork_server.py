"""A process that has imported jax, and forks a child of itself for every launch of the program.

Such a child does what `python -m baichuan_jax.train` does, without the second of CPU time that jax,
Flax, Orbax and Grain take to import. It is a process of its own, with its own signals, environment,
working directory and exit code. launches.py starts one server for each process of pytest, and sends
it a message for each launch. No backend of jax is started here, so XLA_FLAGS act in the child, and
no Python thread runs when it forks.

`python fork_server.py FD`: messages come from the inherited socket FD. The server ends when the
other end of it is closed, and its children end with it.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading

PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent ends
MESSAGE_BYTES = 1 << 17
NUMBER = struct.Struct("q")  # what is written to a launch's pipe: its pid, then its wait status
# baichuan_jax, which hides CUDA's compilers from jax, comes before jax. Its modules are left to the
# children: a command must import alone, in its own order.
PRELOADED = (
    "baichuan_jax",
    "jax",
    "jax.experimental.topologies",
    "flax.nnx",
    "grain",
    "jsonargparse",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "orbax.checkpoint",
    "rich.progress",
    "rich.table",
    "sentencepiece",
)


def serve(channel: socket.socket) -> dict | None:
    """Fork a child for every message.

    Returns the message in the child, and None in the server when there will be no more.
    """
    children: dict[int, tuple[int, int]] = {}  # pidfd: (pid, the pipe that takes its exit status)
    while True:
        ready, _, _ = select.select([channel, *children], [], [])
        for pidfd in children.keys() & set(ready):
            pid, pipe = children.pop(pidfd)
            with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                os.write(pipe, NUMBER.pack(os.waitpid(pid, 0)[1]))
            os.close(pipe)
            os.close(pidfd)
        if channel not in ready:
            continue
        content, descriptors, *_ = socket.recv_fds(channel, MESSAGE_BYTES, 3)
        if not content:
            return None
        pipe, *streams = descriptors
        pid = os.fork()
        if pid == 0:
            channel.close()
            for descriptor in [pipe, *children, *(pipe for _, pipe in children.values())]:
                os.close(descriptor)
            for number, descriptor in enumerate(streams, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            return json.loads(content)
        for descriptor in streams:
            os.close(descriptor)
        os.write(pipe, NUMBER.pack(pid))
        children[os.pidfd_open(pid)] = (pid, pipe)


def become(message: dict, server: int) -> None:
    """Run what the message says as `python -m MODULE ARGV` would."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:  # it ended before the line above
        os._exit(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(message["cwd"])
    os.environ.clear()
    os.environ.update(message["environment"])
    sys.path[0] = message["cwd"]
    module, argv = message["module"], message["argv"]
    sys.orig_argv = [sys.executable, "-m", module, *argv]
    sys.argv = ["-m", *argv]
    # What `python -m` itself calls: it runs in the namespace of __main__, which a spawned worker
    # and a traceback look for there.
    runpy._run_module_as_main(module)


def main() -> None:
    """Import, say that all is ready, and serve."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    # The terminal's Ctrl-C means pytest, which ends this process when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in PRELOADED:
        importlib.import_module(name)
    import compile_cache

    compile_cache.install()
    from jax._src import xla_bridge

    assert not xla_bridge._backends, "a backend was started before the environment was known"
    assert threading.active_count() == 1, "a thread runs, which a child would not have"
    # These modules stay as long as a child does. Without this each of its garbage collections would
    # look at all of their objects, and a launch would take a third more time.
    gc.collect()
    gc.freeze()
    channel.send(b"ready")
    server = os.getpid()
    message = serve(channel)
    if message is not None:
        become(message, server)


if __name__ == "__main__":
    main()
