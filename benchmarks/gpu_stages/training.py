"""Three runs of `python -m baichuan_jax.train`, from text to the last step.

One run is undisturbed, one is killed with SIGKILL in its middle and started again, one computes in
float32. The losses of the killed run have to equal those of the undisturbed one bit for bit
(`train.deterministic`). The first losses are compared with those that a CPU computed beforehand
(cpu_losses.json; `python benchmarks/gpu_stages/training.py` writes it). bfloat16 beside float32
over all steps tests the original's claim that mixed precision costs no accuracy. The killed and the
float32 run share the device, so speeds are those of the undisturbed run.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from results import machine
from stage import FULL, REPOSITORY, SMALL, Sizes, Stage

from baichuan_jax.runs.events import Completed, Restored, Started, latest, of_kind
from baichuan_jax.runs.folder import Run

RECORDED = Path(__file__).with_name("cpu_losses.json")
# Losses that a CPU computed beforehand.
FIRST = 3
# Relative. Weights and rows are the same; sums are rounded in another order, and in bfloat16 to 8
# bits.
TOLERANCE = {"bfloat16": 5e-3, "float32": 1e-4}
# Seconds before the end of the stage, kept to report a run that is late.
LEFT_TO_END = 5
# Of the last losses in bfloat16 beside float32's.
ACCURACY = 0.01


def settings(sizes: Sizes, folder: Path, dtype: str) -> list[str]:
    """Options of the command line, without the run's folder."""
    found = [
        *sizes.train_settings,
        f"model.dtype={dtype}",
        f"train.num_steps={sizes.train_steps}",
        f"data.cache_dir={folder / 'cache'}",
        "train.deterministic=true",
        f"evaluate.every={sizes.train_steps}",
        "evaluate.num_batches=4",
        "metrics.tensorboard=false",
        "sample.prompts=[]",
    ]
    return [f"--{setting}" for setting in found]


class Training:
    """One run, in a process of its own."""

    def __init__(
        self, sizes: Sizes, folder: Path, name: str, dtype: str, *argv: str, fraction: float = 0.85
    ) -> None:
        """`fraction`: its share of the device's memory."""
        self.run = Run(folder / name)
        self._log = folder / f"{name}.log"
        config = str(REPOSITORY / "configs" / "tiny.yaml")
        options = ["--config", config, "--run_dir", str(self.run.path)]
        options += [*settings(sizes, folder, dtype), *argv]
        self._command = [sys.executable, "-m", "baichuan_jax.train", *options]
        self._fraction = fraction
        self.start()

    def start(self) -> None:
        """Start the process, or start it again."""
        variables = {**os.environ, "XLA_CLIENT_MEM_FRACTION": str(self._fraction)}
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, cwd=REPOSITORY, env=variables
            )

    def wait(self, seconds: float) -> None:
        """Wait for the end. Raises RuntimeError with the end of its output where it failed."""
        name = self.run.path.name
        try:
            code = self.process.wait(max(seconds - LEFT_TO_END, 0.1))
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{name} was not at its end in time\n{self._tail()}") from None
        print(f"==== {name}\n{self._tail()}", flush=True)
        if code:
            lines = self._tail().strip().splitlines() or ["no output"]
            raise RuntimeError(f"{name} ended with {code}: {lines[-1][:200]}\n{self._tail()}")

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def wait_for_step(self, step: int, seconds: float) -> None:
        """Wait until metrics.jsonl has this step or a later one."""
        end = time.monotonic() + seconds
        while not any(line["step"] >= step for line in self.run.metrics):
            if self.process.poll() is not None:
                self.wait(LEFT_TO_END)
                raise RuntimeError(f"{self.run.path.name} ended before step {step}\n{self._tail()}")
            if time.monotonic() > end - LEFT_TO_END:
                raise RuntimeError(f"{self.run.path.name}: no step {step} in time\n{self._tail()}")
            time.sleep(0.02)


def run(stage: Stage) -> None:
    """Three runs and their comparisons."""
    sizes, folder = stage.sizes, stage.work / "training"
    folder.mkdir()
    num_steps = sizes.train_steps
    # A CPU computes float32 faster than bfloat16: a rehearsal exchanges the two.
    dtype, other_dtype = ("float32", "bfloat16") if sizes.small else ("bfloat16", "float32")
    at_end = f"--checkpoint.every={num_steps}"
    plain = Training(sizes, folder, "undisturbed", dtype, at_end)
    plain.wait(stage.seconds_left)
    # For the stage `commands`.
    stage.record(run=str(plain.run.path))
    show_speed(stage, plain.run)
    first_losses(stage, plain.run, dtype)
    # The second save waits for the first: at the kill at least one checkpoint is whole.
    often, kill_at = f"--checkpoint.every={num_steps // 4}", round(0.55 * num_steps)
    other = Training(sizes, folder, "other-dtype", other_dtype, at_end, fraction=0.4)
    killed = Training(sizes, folder, "killed", dtype, often, fraction=0.4)
    killed.wait_for_step(kill_at, stage.seconds_left)
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait()
    before, died = len(killed.run.metrics), time.time()
    killed.start()
    killed.wait(stage.seconds_left)
    show_recovery(stage, plain.run, killed.run, before, died)
    other.wait(stage.seconds_left)
    losses = {dtype: plain.run.curve("loss"), other_dtype: other.run.curve("loss")}
    first_losses(stage, other.run, other_dtype)
    show_precision(stage, losses["bfloat16"], losses["float32"])


def show_speed(stage: Stage, run: Run) -> None:
    """Speed, loss and seconds by phase, from the run's own events."""
    started, completed = latest(run.events, Started), latest(run.events, Completed)
    assert started is not None
    assert completed is not None
    share = "-" if completed.mfu is None else f"{completed.mfu:.1%}"
    speed, loss, entropy = completed.tokens_per_second, completed.loss, completed.unigram_entropy
    rows = [
        ["parameters", f"{started.parameters:,}"],
        ["device", started.device],
        ["attention", started.attention or "-"],
        ["RMSNorm", started.rms_norm or "-"],
        ["median step, s", f"{completed.step_seconds:.4f}"],
        ["tokens/s", f"{speed:,.0f}"],
        ["MFU", share if completed.mfu is None else f"{share} ({started.mfu_of})"],
        ["loss, last 20 steps", f"{loss:.4f}"],
        ["unigram entropy of the text", f"{entropy:.4f}"],
    ]
    rows += [[f"seconds of {name}", f"{s:.1f}"] for name, s in completed.seconds.items()]
    stage.table("The undisturbed run", ["", ""], rows)
    stage.record(completed=completed.fields)
    stage.headline(f"{speed:,.0f} tokens/s, MFU {share}")
    if not loss < entropy and not stage.sizes.small:
        stage.wrong(f"the loss {loss:.3f} is not below the unigram entropy {entropy:.3f}")


def show_recovery(stage: Stage, plain: Run, killed: Run, before: int, died: float) -> None:
    """Losses of the killed run beside the undisturbed one, and how long the restart took."""
    wanted, lines = plain.curve("loss"), [line for line in killed.metrics if "loss" in line]
    different = [line["step"] for line in lines if line["loss"] != wanted[line["step"]]]
    again = next(line["time"] for line in killed.metrics[before:] if "loss" in line)
    restored = [event.step for event in of_kind(killed.events, Restored)]
    rows = [
        ["steps written", f"{len(lines)} for {len(wanted)} steps"],
        ["went on from checkpoint", ", ".join(map(str, restored)) or "none"],
        ["from the kill to the next step, s", f"{again - died:.1f}"],
        ["losses that differ", str(len(different))],
    ]
    stage.table("Killed and started again", ["", ""], rows)
    counts = {"losses_compared": len(lines), "losses_different": len(different)}
    stage.record(recovery_seconds=again - died, **counts)
    if not restored:
        stage.wrong("the killed run did not go on from a checkpoint")
    if {line["step"] for line in lines} != set(wanted):
        stage.wrong(f"the killed run has other steps than the undisturbed one: {len(lines)} lines")
    if different:
        worst = max(abs(line["loss"] / wanted[line["step"]] - 1) for line in lines)
        which = f"{len(different)} losses of the killed run differ, from step {different[0]} on"
        stage.wrong(f"{which}, by {worst:.1e} at most")
    else:
        equal = f"All {len(lines)} losses of the killed run equal the undisturbed run's"
        stage.say(f"{equal} bit for bit.")


def first_losses(stage: Stage, run: Run, dtype: str) -> None:
    """Compare with a CPU's losses. Rows are the same only if the tokenizer is."""
    what = f"first losses in {dtype} beside a CPU's"
    size = "small" if stage.sizes.small else "full"
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[size].get(dtype)
    if recorded is None:
        stage.leave_out(what, "none were recorded")
        return
    started = latest(run.events, Started)
    assert started is not None
    here, there = started.tokenizer[:12], recorded["tokenizer"][:12]
    if here != there:
        why = f"the tokenizer trained here is another ({here}, the CPU's {there}), so rows differ"
        stage.leave_out(what, why)
        return
    losses = [run.curve("loss")[step] for step in range(1, FIRST + 1)]
    rows, off = [], []
    for step, (a, b) in enumerate(zip(losses, recorded["losses"], strict=True), 1):
        off.append(a / b - 1)
        rows.append([str(step), f"{a:.6f}", f"{b:.6f}", f"{off[-1]:+.1e}"])
    cpu = f"{recorded['machine']}, jax {recorded['jax']}"
    title = f"First losses in {dtype}, beside a CPU's ({cpu})"
    stage.table(title, ["step", "here", "CPU", "off"], rows)
    largest = max(map(abs, off))
    if not largest <= TOLERANCE[dtype]:
        allowed = f"({TOLERANCE[dtype]:.0e} allowed)"
        stage.wrong(f"first losses in {dtype} differ from a CPU's by {largest:.1e} {allowed}")


def show_precision(stage: Stage, half: dict[int, float], full: dict[int, float]) -> None:
    """Losses in bfloat16 (`half`) beside those in float32 (`full`)."""
    row = lambda label, a, b: [label, f"{a:.4f}", f"{b:.4f}", f"{a / b - 1:+.2%}"]
    steps = sorted(half)
    shown = [step for step in steps if step == 1 or step % max(1, len(steps) // 10) == 0]
    rows = [row(str(step), half[step], full[step]) for step in shown]
    last = steps[-20:]
    means = [statistics.fmean(curve[step] for step in last) for curve in (half, full)]
    difference = means[0] / means[1] - 1
    rows.append(row(f"mean of the last {len(last)}", *means))
    columns = ["step", "bfloat16", "float32", "difference"]
    stage.table("Losses in bfloat16 and float32", columns, rows)
    stage.record(losses={"bfloat16": half, "float32": full}, precision_difference=difference)
    if not abs(difference) <= ACCURACY:
        stage.wrong(f"bfloat16 ends {difference:+.2%} beside float32 ({ACCURACY:.0%} allowed)")
    draw(stage, half, full)


def draw(stage: Stage, half: dict[int, float], full: dict[int, float]) -> None:
    """Draw both curves as losses.png, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        stage.leave_out("losses.png", "matplotlib is not installed")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, curve, style in (("float32", full, "-"), ("bfloat16", half, "--")):
        axes.plot(list(curve), list(curve.values()), style, label=name)
    labels = {"xlabel": "step", "ylabel": "training loss (nats per token)"}
    axes.set(**labels, title="The same run in both types")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(stage.output / "losses.png", dpi=120)


def main() -> None:
    """Record the first losses of this CPU, of the sizes named (default: both)."""
    import datetime
    import tempfile

    kept: dict[str, Any] = (
        json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    )
    os.environ["JAX_PLATFORMS"] = "cpu"
    for size in sys.argv[1:] or ["small", "full"]:
        sizes = {"small": SMALL, "full": FULL}[size]
        for dtype in ("float32", "bfloat16"):
            with tempfile.TemporaryDirectory() as folder:
                # With recomputation: with all activations kept, the full size takes more memory
                # than a CPU machine may have.
                training = Training(sizes, Path(folder), "run", dtype, "--model.remat", "full")
                training.wait_for_step(FIRST, 7200)
                training.process.kill()
                training.process.wait()
                losses = training.run.curve("loss")
                started = latest(training.run.events, Started)
                assert started is not None
            kept.setdefault(size, {})[dtype] = {
                "losses": [losses[step] for step in range(1, FIRST + 1)],
                "tokenizer": started.tokenizer,
                "jax": started.jax,
                "machine": machine(),
                "date": str(datetime.date.today()),
            }
            print(size, dtype, kept[size][dtype], flush=True)
            RECORDED.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
