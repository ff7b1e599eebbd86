"""Waiting that is never silent: what is waited for is said after five seconds.

A wait needs a limit with a name, and the caller says what happens then.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from baichuan_jax.resilience.exits import SAY_SECONDS, say

# Between two looks: often enough that nobody notices, seldom enough for a shared file system.
LOOK_SECONDS = 0.2


@contextlib.contextmanager
def announced(what: str | Callable[[], str], after: float | None = None) -> Iterator[None]:
    """Say on stderr what this process waits for, once the block has taken SAY_SECONDS.

    For calls that block by themselves. A callable is asked when it is time to say it. `after`:
    seconds in place of SAY_SECONDS, where something else shows that work goes on.
    """
    timer = threading.Timer(
        SAY_SECONDS if after is None else after,
        lambda: say(f"waiting for {what if isinstance(what, str) else what()}"),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_until(
    holds: Callable[[], bool],
    what: str | Callable[[], str],
    seconds: float,
    every: float = LOOK_SECONDS,
) -> bool:
    """Look until something holds, `seconds` at most. Returns whether it does.

    `what` completes "waiting for ...".
    """
    deadline = time.monotonic() + seconds
    with announced(what):
        while not holds():
            if time.monotonic() >= deadline:
                return False
            time.sleep(every)
    return True
