"""Wrong numbers end the launch: updates that are not finite, spikes, replicas that differ.

A step whose loss or gradient norm is not finite changes nothing (step.py); three in a row end the
launch, and so does a spike, and a state that is not finite and would be saved. The launch after it
rolls back (resilience/guard.py plans that from the NumericsFault). Process 0 alone sees spikes: it
asks all processes to roll back by a control request, so that they leave at the same step.
"""

import dataclasses
from collections import deque
from typing import Any, NoReturn

import jax

from baichuan_jax.checkpoint.state import RunState
from baichuan_jax.config.schema import ResilienceConfig
from baichuan_jax.resilience.causes import BadHost, NumericsError
from baichuan_jax.resilience.digests import compare_digests
from baichuan_jax.resilience.guard import IN_A_ROW, Spikes, Window
from baichuan_jax.runs.events import Corruption, NumericsFault, UpdateSkipped
from baichuan_jax.runs.output import Output
from baichuan_jax.step import Request, Steps

# Skipped updates in a row that end the launch: they will not mend themselves.
MAX_NONFINITE_RUN = 3


@dataclasses.dataclass(frozen=True)
class _Fault:
    """Why numbers are wrong, since which step, and the data from there on."""

    reason: str
    step: int
    window: Window


class NumericsGuard:
    """Watches the numbers of one launch, which begins after `start_step` steps.

    `losses`: those of the steps before, which say what is usual.
    """

    def __init__(
        self, output: Output, config: ResilienceConfig, losses: list[float], start_step: int
    ) -> None:
        self._output, self._spikes = output, Spikes(config.spike_deviations, losses)
        self._spike: _Fault | None = None
        # Step and data of the first skipped update of a row.
        self._nonfinite_since: tuple[int, Window] | None = None
        # The data of the newest steps, as many as a spike may have lasted.
        self._recent: deque[Window] = deque(maxlen=max(IN_A_ROW.values()))
        # Step of the last comparison of replicas that went well.
        self._compared = start_step

    @property
    def saw_spike(self) -> bool:
        """Whether this process must ask the others to roll back."""
        return self._spike is not None

    def check_step(self, step: int, window: Window, values: dict[str, Any]) -> None:
        """Check the metrics of a step whose batch is the data of `window`. Raises NumericsError."""
        self._recent.append(window)
        if not values["finite"]:
            self._count_skipped(step, window, values)
        # Heard by all processes with the same step, also by process 0, whose request it was.
        if values["request"] == Request.ROLL_BACK:
            self._end_launch(self._spike or _Fault("process 0 saw a spike", step, window))
        if self._spike is None:
            found = self._spikes.check(loss=values["loss"], grad_norm=values["grad_norm"])
            if found is not None:
                reason, steps = found
                data = self._recent[-steps].until(window)
                self._spike = _Fault(f"step {step}: {reason}", step - steps + 1, data)

    def check_state(self, step: int, finite: bool) -> None:
        """Refuse to save a state that is not finite after `step`, which was the last one checked.

        Raises NumericsError.
        """
        if not finite:
            reason = f"the state after step {step} is not finite"
            self._end_launch(_Fault(reason, step, self._recent[-1]))

    def compare_replicas(self, steps: Steps, run_state: RunState, batch: dict) -> None:
        """Raise BadHost, on all processes, where replicas compute different bits of one batch."""
        # One number a replica, on all processes: so all raise, or none.
        digests = jax.device_get(steps.check(run_state.state.params, batch))
        owners = {
            replica: [device.process_index for device in devices.flat]
            for replica, devices in enumerate(steps.layout.mesh.devices)
        }
        try:
            compare_digests([int(digest) for digest in digests], owners)
        except BadHost as error:
            # Any step since the last good comparison may be wrong: the rollback goes to before all.
            self._output.event(Corruption(step=self._compared + 1, reason=str(error)))
            raise
        self._compared = run_state.step

    def _count_skipped(self, step: int, window: Window, values: dict[str, Any]) -> None:
        in_a_row = int(values["nonfinite_run"])
        shown = {
            "loss": str(values["loss"]),
            "grad_norm": str(values["grad_norm"]),
            "in_a_row": in_a_row,
        }
        total = int(values["nonfinite"])
        self._output.event(UpdateSkipped(step=step, position=window.begin, total=total, **shown))
        self._output.say(f"step {step}: not finite, its update is skipped: {shown}", style="red")
        if in_a_row == 1 or self._nonfinite_since is None:
            self._nonfinite_since = (step, window)
        if in_a_row >= MAX_NONFINITE_RUN:
            first, since = self._nonfinite_since
            reason = (
                f"{in_a_row} steps in a row up to step {step} were not finite (loss "
                f"{values['loss']}, gradient norm {values['grad_norm']})"
            )
            self._end_launch(_Fault(reason, first, since.until(window)))

    def _end_launch(self, fault: _Fault) -> NoReturn:
        begin, end, rows = fault.window
        event = NumericsFault(
            step=fault.step,
            begin=begin,
            end=end,
            reason=fault.reason,
            rows=None if rows is None else list(rows),
        )
        self._output.event(event)
        raise NumericsError(
            f"{fault.reason}; the next start goes back to a checkpoint before step {fault.step}, "
            f"and leaves positions {begin} to {end - 1} of the data out if it happens there again"
        )
