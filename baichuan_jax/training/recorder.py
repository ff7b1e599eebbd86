"""What a launch measures: a line of metrics for each step and evaluation, and the progress bar.

In: the metrics of a step, fetched from the devices one step late. Out: a line of metrics.jsonl with
loss, gradient norm, speed and MFU; the progress bar; the process's own seconds, by which slow hosts
are found. It keeps the losses, from which the loop's end and the spike detection read.
"""

import math
import statistics
import time
from collections import deque
from typing import Any

from baichuan_jax.hardware.devices import peak_memory_gib
from baichuan_jax.resilience.clock import DATA, Clock
from baichuan_jax.runs.console import Progress
from baichuan_jax.runs.output import Output
from baichuan_jax.training.throughput import Throughput

# Steps whose median is a process's own time: one slow read does not make a slow host.
OWN_STEPS = 32


class Recorder:
    """Writes and shows what a launch measures. `losses` and `eval_loss`: of the launches before."""

    def __init__(
        self,
        output: Output,
        clock: Clock,
        throughput: Throughput,
        losses: list[float],
        eval_loss: float | None,
    ) -> None:
        self.throughput, self.losses, self.eval_loss = throughput, losses, eval_loss
        self._output, self._clock = output, clock
        # When the metrics of the step before were here.
        self._last = time.perf_counter()
        self._own: deque[float] = deque(maxlen=OWN_STEPS)
        self._own_total = 0.0

    def restart_timer(self) -> None:
        """The next step's seconds count from now: what was done since the last one is no step."""
        self._last = time.perf_counter()

    def step(self, step: int, values: dict[str, Any], progress: Progress) -> None:
        """Write and show the metrics of a step; `values` are those of step.Steps.train."""
        # From metrics to metrics: their arrival is the one moment at which a step is known to be
        # done, since dispatching returns at once.
        now = time.perf_counter()
        speed = self.throughput.add(now - self._last)
        self._last = now
        self._note_own_seconds()
        loss = float(values["loss"])
        self.losses.append(loss)
        line: dict[str, Any] = {
            "loss": loss,
            "perplexity": perplexity(loss),
            "grad_norm": float(values["grad_norm"]),
            "learning_rate": float(values["learning_rate"]),
            **speed,
            "tokens": int(values["tokens"]),
            "data_wait_seconds": self._clock.seconds.get(DATA, 0.0),
            "memory_gib": peak_memory_gib(),
        }
        if not values["finite"]:
            line["skipped"] = True
        self._output.writer.metrics(step, line)
        progress.update(step, loss, line["tokens_per_second"], self.eval_loss)

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Write the metrics of an evaluation."""
        self.eval_loss = values.get("eval_loss", self.eval_loss)
        if values:
            self._output.writer.metrics(step, values)

    @property
    def own_seconds(self) -> float | None:
        """Median of the seconds a step that this process spends on its own, on data and Python.

        A slow host shows in them; in whole steps it does not, since all processes wait for it.
        None before OWN_STEPS steps.
        """
        return statistics.median(self._own) if len(self._own) == OWN_STEPS else None

    def _note_own_seconds(self) -> None:
        # "other" is the loop's Python between the phases. Dispatching and waiting are left out:
        # both may block on what all processes do together.
        totals = self._clock.totals()
        total = sum(totals.get(phase, 0.0) for phase in (DATA, "other"))
        self._own.append(total - self._own_total)
        self._own_total = total


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
