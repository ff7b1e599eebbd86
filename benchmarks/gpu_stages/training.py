"""A run from text to the end through `python -m baichuan_jax.train` (grain, Orbax checkpoints, metrics): undisturbed, then the same
killed with SIGKILL in its middle and started again, and the same in float32.

The losses of the killed run have to equal those of the undisturbed one bit for bit
(`train.deterministic`). The first losses stand beside those that a CPU computed beforehand
(cpu_losses.json; `python benchmarks/gpu_stages/training.py` writes them). bfloat16 beside float32
over all steps is the original's claim of mixed precision without loss of accuracy. The killed and
the float32 run share the device, so speeds are those of the undisturbed run.
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

from baichuan_jax.runs.folder import Run

RECORDED = Path(__file__).with_name("cpu_losses.json")
FIRST = 3  # losses that a CPU computed beforehand
# Relative. Weights and rows are the same; products are rounded in another order, and in bfloat16 to
# 8 bits.
TOLERANCE = {"bfloat16": 5e-3, "float32": 1e-4}
LEFT_TO_END = 5  # seconds before the end of the stage in which a run that is late is told, with the end of its output
ACCURACY = 0.01  # of the last losses in bfloat16 beside float32's


def settings(sizes: Sizes, folder: Path, dtype: str) -> list[str]:
    """Words of the command line, without the run's folder."""
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
        self, sizes: Sizes, folder: Path, name: str, dtype: str, *words: str, fraction: float = 0.85
    ) -> None:
        self.run = Run(folder / name)
        self._log = folder / f"{name}.log"
        self._command = [
            sys.executable,
            "-m",
            "baichuan_jax.train",
            "--config",
            str(REPOSITORY / "configs" / "tiny.yaml"),
            "--run_dir",
            str(self.run.path),
            *settings(sizes, folder, dtype),
            *words,
        ]
        self._fraction = fraction
        self.start()

    def start(self) -> None:
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                cwd=REPOSITORY,
                env={**os.environ, "XLA_CLIENT_MEM_FRACTION": str(self._fraction)},
            )

    def wait(self, seconds: float) -> None:
        """To the end. Raises RuntimeError with the end of its output where it failed."""
        try:
            code = self.process.wait(max(seconds - LEFT_TO_END, 0.1))
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"{self.run.path.name} was not at its end in time\n{self._tail()}"
            ) from None
        print(f"==== {self.run.path.name}\n{self._tail()}", flush=True)
        if code:
            lines = self._tail().strip().splitlines() or ["no output"]
            raise RuntimeError(
                f"{self.run.path.name} ended with {code}: {lines[-1][:200]}\n{self._tail()}"
            )

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def wait_for_step(self, step: int, seconds: float) -> None:
        """Until a step at or beyond this one is on the disk."""
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
    plain = Training(
        sizes,
        folder,
        "undisturbed",
        "bfloat16" if not sizes.small else "float32",
        "--checkpoint.every",
        str(num_steps),
    )
    plain.wait(stage.seconds_left)
    stage.record(run=str(plain.run.path))  # for the stage `commands`
    dtype = "bfloat16" if not sizes.small else "float32"
    show_speed(stage, plain.run)
    first_losses(stage, plain.run, dtype)
    # The second save waits for the first, so when the run is killed one checkpoint at least is
    # whole.
    every, kill_at = num_steps // 4, round(0.55 * num_steps)
    other = Training(
        sizes,
        folder,
        "other-dtype",
        "float32" if not sizes.small else "bfloat16",
        "--checkpoint.every",
        str(num_steps),
        fraction=0.4,
    )
    killed = Training(
        sizes, folder, "killed", dtype, "--checkpoint.every", str(every), fraction=0.4
    )
    killed.wait_for_step(kill_at, stage.seconds_left)
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait()
    before, died = len(killed.run.metrics), time.time()
    killed.start()
    killed.wait(stage.seconds_left)
    show_recovery(stage, plain.run, killed.run, before, died)
    other.wait(stage.seconds_left)
    losses = {
        dtype: plain.run.curve("loss"),
        "float32" if dtype == "bfloat16" else "bfloat16": other.run.curve("loss"),
    }
    first_losses(stage, other.run, "float32" if dtype == "bfloat16" else "bfloat16")
    show_precision(stage, losses["bfloat16"], losses["float32"])


def show_speed(stage: Stage, run: Run) -> None:
    """What the undisturbed run says of itself."""
    started = next(event for event in run.events if event["kind"] == "started")
    completed = next(event for event in run.events if event["kind"] == "completed")
    mfu = "-" if completed.get("mfu") is None else f"{completed['mfu']:.1%} ({started['mfu_of']})"
    rows = [
        ["parameters", f"{started['parameters']:,}"],
        ["device", started["device"]],
        ["attention", started["attention"]],
        ["RMSNorm", started["rms_norm"]],
        ["median step, s", f"{completed['step_seconds']:.4f}"],
        ["tokens/s", f"{completed['tokens_per_second']:,.0f}"],
        ["MFU", mfu],
        ["loss, last 20 steps", f"{completed['loss']:.4f}"],
        ["unigram entropy of the text", f"{completed['unigram_entropy']:.4f}"],
    ]
    rows += [
        [f"seconds of {name}", f"{seconds:.1f}"] for name, seconds in completed["seconds"].items()
    ]
    stage.table("The undisturbed run", ["", ""], rows)
    stage.record(completed=completed)
    stage.headline(f"{completed['tokens_per_second']:,.0f} tokens/s, MFU {mfu.split(' (')[0]}")
    if not completed["loss"] < completed["unigram_entropy"] and not stage.sizes.small:
        stage.wrong(
            f"the loss {completed['loss']:.3f} is not below the unigram entropy {completed['unigram_entropy']:.3f}"
        )


def show_recovery(stage: Stage, plain: Run, killed: Run, before: int, died: float) -> None:
    """Losses of the killed run beside the undisturbed one, and how long the restart took."""
    wanted, lines = plain.curve("loss"), [line for line in killed.metrics if "loss" in line]
    different = [line["step"] for line in lines if line["loss"] != wanted[line["step"]]]
    again = next(line["time"] for line in killed.metrics[before:] if "loss" in line)
    restored = [event["step"] for event in killed.events if event["kind"] == "restored"]
    stage.table(
        "Killed and started again",
        ["", ""],
        [
            ["steps written", f"{len(lines)} for {len(wanted)} steps"],
            ["went on from checkpoint", ", ".join(map(str, restored)) or "none"],
            ["from the kill to the next step, s", f"{again - died:.1f}"],
            ["losses that differ", str(len(different))],
        ],
    )
    stage.record(
        recovery_seconds=again - died, losses_compared=len(lines), losses_different=len(different)
    )
    if not restored:
        stage.wrong("the killed run did not go on from a checkpoint")
    if {line["step"] for line in lines} != set(wanted):
        stage.wrong(f"the killed run has other steps than the undisturbed one: {len(lines)} lines")
    if different:
        worst = max(abs(line["loss"] / wanted[line["step"]] - 1) for line in lines)
        stage.wrong(
            f"{len(different)} losses of the killed run differ, from step {different[0]} on, by {worst:.1e} at most"
        )
    else:
        stage.say(
            f"All {len(lines)} losses of the killed run equal the undisturbed run's bit for bit."
        )


def first_losses(stage: Stage, run: Run, dtype: str) -> None:
    """Beside a CPU's, where tokenizer and so rows are the same."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[
        "small" if stage.sizes.small else "full"
    ].get(dtype)
    if recorded is None:
        stage.leave_out(f"first losses in {dtype} beside a CPU's", "none were recorded")
        return
    tokenizer = next(event for event in run.events if event["kind"] == "started")["tokenizer"]
    if tokenizer != recorded["tokenizer"]:
        stage.leave_out(
            f"first losses in {dtype} beside a CPU's",
            f"the tokenizer trained here is another ({tokenizer[:12]}, the CPU's {recorded['tokenizer'][:12]}), so rows differ",
        )
        return
    here = [run.curve("loss")[step] for step in range(1, FIRST + 1)]
    off = [a / b - 1 for a, b in zip(here, recorded["losses"], strict=True)]
    rows = [
        [str(step + 1), f"{here[step]:.6f}", f"{recorded['losses'][step]:.6f}", f"{off[step]:+.1e}"]
        for step in range(FIRST)
    ]
    stage.table(
        f"First losses in {dtype}, beside a CPU's ({recorded['machine']}, jax {recorded['jax']})",
        ["step", "here", "CPU", "off"],
        rows,
    )
    if not max(map(abs, off)) <= TOLERANCE[dtype]:
        stage.wrong(
            f"first losses in {dtype} differ from a CPU's by {max(map(abs, off)):.1e} ({TOLERANCE[dtype]:.0e} allowed)"
        )


def show_precision(stage: Stage, half: dict[int, float], full: dict[int, float]) -> None:
    """bfloat16 beside float32."""
    steps = sorted(half)
    shown = [step for step in steps if step == 1 or step % max(1, len(steps) // 10) == 0]
    rows = [
        [str(step), f"{half[step]:.4f}", f"{full[step]:.4f}", f"{half[step] / full[step] - 1:+.2%}"]
        for step in shown
    ]
    last = steps[-20:]
    means = [statistics.fmean(curve[step] for step in last) for curve in (half, full)]
    difference = means[0] / means[1] - 1
    rows.append(
        [
            f"mean of the last {len(last)}",
            f"{means[0]:.4f}",
            f"{means[1]:.4f}",
            f"{difference:+.2%}",
        ]
    )
    stage.table(
        "Losses in bfloat16 and float32", ["step", "bfloat16", "float32", "difference"], rows
    )
    stage.record(losses={"bfloat16": half, "float32": full}, precision_difference=difference)
    if not abs(difference) <= ACCURACY:
        stage.wrong(f"bfloat16 ends {difference:+.2%} beside float32 ({ACCURACY:.0%} allowed)")
    draw(stage, half, full)


def draw(stage: Stage, half: dict[int, float], full: dict[int, float]) -> None:
    """Both curves as losses.png, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        stage.leave_out("losses.png", "matplotlib is not installed")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, curve, style in (("float32", full, "-"), ("bfloat16", half, "--")):
        axes.plot(list(curve), list(curve.values()), style, label=name)
    axes.set(
        xlabel="step", ylabel="training loss (nats per token)", title="The same run in both types"
    )
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
                # Recomputed blocks: with all activations kept, the full size takes more memory than
                # a CPU machine may have.
                training = Training(sizes, Path(folder), "run", dtype, "--model.remat", "full")
                training.wait_for_step(FIRST, 7200)
                training.process.kill()
                training.process.wait()
                losses = training.run.curve("loss")
                started = training.run.events[0]
            kept.setdefault(size, {})[dtype] = {
                "losses": [losses[step] for step in range(1, FIRST + 1)],
                "tokenizer": started["tokenizer"],
                "jax": started["jax"],
                "machine": machine(),
                "date": str(datetime.date.today()),
            }
            print(size, dtype, kept[size][dtype], flush=True)
            RECORDED.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
