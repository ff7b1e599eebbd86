"""How long each phase of a process may last before it counts as a hang.

A step's phases last about the same every time, so a phase hangs when it outlasts its setting and
PATIENCE times its longest so far: one limit serves a step of a second and one of a minute. The
first of its kind compiles, packs or restores, so it has the limit of a start.
"""

from baichuan_jax.config.schema import ResilienceConfig
from baichuan_jax.resilience.clock import CHECKPOINT, EVALUATE, LOOP, WAIT, Clock

# A phase may last this many times its longest so far.
PATIENCE = 5
# Times hang_seconds: a validation is the work of many steps, and a shared disk may be slow.
LONG_PHASES = {CHECKPOINT: 10, EVALUATE: 10}


class PhaseLimits:
    """Limits of phases, from the settings and from what the process's clock has measured."""

    def __init__(self, config: ResilienceConfig, clock: Clock) -> None:
        self._config, self._clock = config, clock

    @property
    def has_stepped(self) -> bool:
        """Whether a step is done. Before it, a long call (tracing) may hold Python's lock."""
        return WAIT in self._clock.longest

    def seconds(self, phase: str) -> float:
        """Seconds that a phase may last."""
        longest = self._clock.longest
        # All phases have the limit of a start until a step is done: a process that takes its
        # programs from the cache waits in its first step for those that compile.
        if phase not in LOOP or phase not in longest or not self.has_stepped:
            return self._config.start_seconds
        limit = self._config.hang_seconds * LONG_PHASES.get(phase, 1)
        return max(limit, PATIENCE * longest[phase])
