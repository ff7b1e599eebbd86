"""Silent corruption: replicas that compute other bits than the others."""

from collections import Counter
from collections.abc import Mapping, Sequence

from baichuan_jax.resilience.exits import BadHost


def compare_digests(digests: Sequence[int], processes: Mapping[int, Sequence[int]]) -> None:
    """Raise BadHost where replicas differ: with the processes of the minority's replicas, or of all where there is none.

    `digests` has one number a replica, `processes` the numbers of those whose devices hold it.
    """
    counts = Counter(digests)
    if len(counts) <= 1:
        return
    usual, most = counts.most_common(1)[0]
    odd = [replica for replica, digest in enumerate(digests) if digest != usual]
    if 2 * most <= len(digests):
        odd = list(range(len(digests)))
    named = tuple(sorted({process for replica in odd for process in processes[replica]}))
    shown = ", ".join(
        f"replica {replica}: {digest:08x}" for replica, digest in enumerate(digests[:8])
    )
    which = (
        "no majority: one of them is wrong"
        if len(odd) == len(digests)
        else f"{most} of {len(digests)} agree"
    )
    raise BadHost(
        f"replicas computed other bits of the same loss and gradients ({shown}; {which})", named
    )
