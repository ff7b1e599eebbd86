"""Losses in bfloat16 beside float32: 60 steps of the tiny configuration in both types.

    python benchmarks/mixed_precision.py [--steps 60] [--plot FILE] [--json FILE]

Both runs start from the same weights and read the same rows, so the difference of their losses is
what mixed precision costs. The original reports that it costs no accuracy.
"""

import sys
from pathlib import Path

# A script finds the package from any folder.
sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import statistics
import tempfile

from matplotlib.figure import Figure
from results import Results

from baichuan_jax.config.files import load_config
from baichuan_jax.train import train


def losses(dtype: str, steps: int, folder: str) -> tuple[dict[int, float], float]:
    """Step -> training loss of one run, and its final validation loss."""
    overrides = [
        f"run_dir={folder}/{dtype}",
        f"data.cache_dir={folder}/cache",
        f"model.dtype={dtype}",
        f"train.num_steps={steps}",
        f"optimizer.warmup_steps={steps // 6}",
        f"evaluate.every={steps}",
        f"checkpoint.every={steps}",
        "sample.prompts=[]",
    ]
    run = train(load_config(Path(__file__).parents[1] / "configs" / "tiny.yaml", overrides))
    return run.curve("loss"), run.curve("eval_loss")[steps]


def main() -> None:
    """Train in both types, and show their losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="(default: 60)")
    parser.add_argument("--plot", metavar="FILE", help="draw both curves as PNG")
    parser.add_argument("--json", metavar="FILE", help="save both curves")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {dtype: losses(dtype, options.steps, folder) for dtype in ("float32", "bfloat16")}
    curves = {dtype: curve for dtype, (curve, _) in found.items()}
    ends = {dtype: validation for dtype, (_, validation) in found.items()}
    difference = ends["bfloat16"] / ends["float32"] - 1
    last = {dtype: statistics.fmean(list(curve.values())[-5:]) for dtype, curve in curves.items()}
    results = Results()
    rows = []
    for name, values in {
        "validation loss": ends,
        "training loss, mean of the last 5 steps": last,
    }.items():
        full, half = values["float32"], values["bfloat16"]
        rows.append([name, f"{full:.4f}", f"{half:.4f}", f"{half / full - 1:+.2%}"])
    title = f"{options.steps} steps of configs/tiny.yaml from the same weights on the same rows"
    results.table(title, ["", "float32", "bfloat16", "difference"], rows)
    if options.plot:
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for (dtype, curve), style in zip(curves.items(), ("-", "--"), strict=True):
            label = f"{dtype}, validation at the end {ends[dtype]:.4f}"
            axes.plot(list(curve), list(curve.values()), style, label=label)
        axes.set(xlabel="step", ylabel="training loss (nats per token)", title="tiny configuration")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(options.plot, dpi=120)
    results.save(options.json, difference=difference, curves=curves)


if __name__ == "__main__":
    main()
