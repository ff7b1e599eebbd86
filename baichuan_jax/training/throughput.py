"""The speed of training: tokens a second, and MFU, from the seconds of a step."""

import statistics

from baichuan_jax.config.schema import Config
from baichuan_jax.hardware.flops import flops_per_token


class Throughput:
    """Tokens a second and MFU of a step from its seconds.

    `peak` is one device's FLOP/s, None where they are not known; `mfu_of` says where they are from.
    """

    def __init__(
        self, config: Config, num_devices: int, peak: float | None, mfu_of: str = ""
    ) -> None:
        self.mfu_of = mfu_of
        context_length = config.train.context_length
        self.tokens = config.train.global_batch_size * context_length
        self._full, self._causal = flops_per_token(config.model, context_length)
        self._peak = None if peak is None else peak * num_devices
        self._seconds: list[float] = []

    def add(self, seconds: float) -> dict[str, float | None]:
        """The speed of a step that took so long."""
        self._seconds.append(seconds)
        return self.speed(seconds)

    def speed(self, seconds: float) -> dict[str, float | None]:
        """step_seconds, tokens_per_second, mfu and mfu_causal.

        mfu counts all pairs of positions, as the original's 58.3 % does; mfu_causal those attended.
        """
        rate = self.tokens / seconds
        share = {"mfu": None, "mfu_causal": None}
        if self._peak is not None:
            share = {
                "mfu": rate * self._full / self._peak,
                "mfu_causal": rate * self._causal / self._peak,
            }
        return {"step_seconds": seconds, "tokens_per_second": rate, **share}

    def median(self) -> dict[str, float | None]:
        """The speed of the median step so far; empty before the first."""
        # Not the mean, which a few slow steps would move.
        return self.speed(statistics.median(self._seconds)) if self._seconds else {}
