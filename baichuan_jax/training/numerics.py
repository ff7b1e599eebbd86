"""Wrong numbers end the launch: updates that are not finite, spikes, replicas that differ.

A step whose loss or gradient norm is not finite changes nothing (step.py); three in a row end the
launch, and so does a spike, and a state that is not finite and would be saved. The launch after it
rolls back (resilience/guard.py plans that from the NumericsFault). Process 0 alone sees spikes: it
asks all processes to roll back by a control request, so that they leave at the same step.
"""

import dataclasses
from typing import Any, NoReturn

import jax

from baichuan_jax.checkpoint.state import RunState
from baichuan_jax.config.schema import ResilienceConfig
from baichuan_jax.resilience.causes import BadHost, NumericsError
from baichuan_jax.resilience.digests import compare_digests
from baichuan_jax.resilience.guard import Spikes
from baichuan_jax.runs.events import Corruption, NumericsFault, UpdateSkipped
from baichuan_jax.runs.output import Output
from baichuan_jax.step import Request, Steps

# Skipped updates in a row that end the launch: they will not mend themselves.
MAX_NONFINITE_RUN = 3


@dataclasses.dataclass(frozen=True)
class _Fault:
    """Why numbers are wrong, since which step, and its window [begin, end) of data positions."""

    reason: str
    step: int
    begin: int
    end: int


class NumericsGuard:
    """Watches the numbers of one launch, which begins after `start_step` steps.

    `losses`: those of the steps before, which say what is usual.
    """

    def __init__(
        self, output: Output, config: ResilienceConfig, losses: list[float], start_step: int
    ) -> None:
        self._output, self._spikes = output, Spikes(config.spike_deviations, losses)
        self._spike: _Fault | None = None
        # Step and position of the first skipped update of a row.
        self._nonfinite_since: tuple[int, int] | None = None
        # Step of the last comparison of replicas that went well.
        self._compared = start_step

    @property
    def saw_spike(self) -> bool:
        """Whether this process must ask the others to roll back."""
        return self._spike is not None

    def check_step(self, step: int, position: int, values: dict[str, Any]) -> None:
        """Check the metrics of a step whose batch lies at `position`. Raises NumericsError."""
        if not values["finite"]:
            self._count_skipped(step, position, values)
        # Heard by all processes with the same step, also by process 0, whose request it was.
        if values["request"] == Request.ROLL_BACK:
            seen = _Fault("process 0 saw a spike", step, position, position + 1)
            self._end_launch(self._spike or seen)
        if self._spike is None:
            found = self._spikes.check(loss=values["loss"], grad_norm=values["grad_norm"])
            if found is not None:
                reason, steps = found
                begin = position - steps + 1
                self._spike = _Fault(
                    f"step {step}: {reason}", step - steps + 1, begin, position + 1
                )

    def check_state(self, run_state: RunState, finite: bool) -> None:
        """Refuse to save a state that is not finite. Raises NumericsError."""
        if not finite:
            step, position = run_state.step, run_state.position
            reason = f"the state after step {step} is not finite"
            self._end_launch(_Fault(reason, step, position, position + 1))

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

    def _count_skipped(self, step: int, position: int, values: dict[str, Any]) -> None:
        in_a_row = int(values["nonfinite_run"])
        shown = {
            "loss": str(values["loss"]),
            "grad_norm": str(values["grad_norm"]),
            "in_a_row": in_a_row,
        }
        total = int(values["nonfinite"])
        self._output.event(UpdateSkipped(step=step, position=position, total=total, **shown))
        self._output.say(f"step {step}: not finite, its update is skipped: {shown}", style="red")
        if in_a_row == 1 or self._nonfinite_since is None:
            self._nonfinite_since = (step, position)
        if in_a_row >= MAX_NONFINITE_RUN:
            first, begin = self._nonfinite_since
            reason = (
                f"{in_a_row} steps in a row up to step {step} were not finite (loss "
                f"{values['loss']}, gradient norm {values['grad_norm']})"
            )
            self._end_launch(_Fault(reason, first, begin, position + 1))

    def _end_launch(self, fault: _Fault) -> NoReturn:
        self._output.event(NumericsFault(**dataclasses.asdict(fault)))
        raise NumericsError(
            f"{fault.reason}; the next start goes back to a checkpoint before step {fault.step}, "
            f"and leaves positions {fault.begin} to {fault.end - 1} of the data out if it happens "
            "there again"
        )
