"""Training speed on this CPU beside transformers' Llama on torch, at the same sizes in float32.

    pip install torch==2.13.0 transformers
    python benchmarks/cpu_training.py [--compiled] [--rounds 5] [--json FILE]

Both take the same step (forward, backward, clipping, AdamW) in turn; medians are compared. The
table also has the share of the measured matrix-product peak, and the milliseconds that the training
loop adds to its compiled step.
"""

import sys
from pathlib import Path

# A script finds the package from any folder.
sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from results import Results

from baichuan_jax.config.files import load_config
from baichuan_jax.config.schema import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from baichuan_jax.hardware.devices import measure_matmul_flops
from baichuan_jax.hardware.flops import flops_per_token
from baichuan_jax.sharding import make_mesh
from baichuan_jax.step import make_steps
from baichuan_jax.train import train

ROWS, LENGTH = 4, 512
CONFIG = Config(
    model=ModelConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=688,
        num_layers=4,
        num_heads=4,
        dtype="float32",
        remat="none",
        scan_layers=False,
    ),
    train=TrainConfig(
        num_steps=10**6, context_length=LENGTH, global_batch_size=ROWS, loss_chunk_size=256
    ),
    optimizer=OptimizerConfig(warmup_steps=0),
)


def our_step(config: Config) -> Callable[[], None]:
    """A function that runs one compiled step and waits for it."""
    steps = make_steps(config, make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1]))
    G, T = config.train.global_batch_size, config.train.context_length
    rows = np.random.default_rng(0).integers(1, config.model.vocab_size, (1, G, T + 1), np.int32)
    batch = {"inputs": rows[..., :-1], "labels": rows[..., 1:]}
    batch = jax.device_put(batch, steps.batch_sharding)
    state, request = steps.init(), steps.request()

    def step() -> None:
        nonlocal state
        state, metrics = steps.train(state, batch, request)
        jax.block_until_ready(metrics)

    return step


def torch_step(compiled: bool) -> Callable[[], None]:
    """The same step with transformers on torch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    m = CONFIG.model
    config = LlamaConfig(
        vocab_size=m.vocab_size,
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_heads,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.randint(1, m.vocab_size, (ROWS, LENGTH))
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        forward(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def seconds(step: Callable[[], None], count: int) -> list[float]:
    """Seconds of each of `count` steps."""
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began)
    return taken


def loop_overhead(num_steps: int = 300) -> float:
    """Seconds that train() adds to its compiled step.

    With a model so small that the step does not hide the loop; the first 20 steps do not count.
    """
    settings = {
        "model.vocab_size": 1024,
        "tokenizer.vocab_size": 1024,
        "model.hidden_size": 32,
        "model.intermediate_size": 64,
        "model.num_layers": 1,
        "model.num_heads": 1,
        "train.num_steps": num_steps,
        "checkpoint.every": num_steps,
        "evaluate.every": num_steps,
        "sample.prompts": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"run_dir": f"{folder}/run", "data.cache_dir": f"{folder}/cache"}
        file = Path(__file__).parents[1] / "configs" / "tiny.yaml"
        config = load_config(file, [f"{name}={value}" for name, value in settings.items()])
        lines = train(config).metrics[20:]
        looped = statistics.median(line["step_seconds"] for line in lines if "step_seconds" in line)
    bare = our_step(config)
    return looped - statistics.median(seconds(bare, num_steps)[20:])


def main() -> None:
    """Time both, and show tokens a second."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rounds, compiled = "of four steps each (default: 5)", "torch.compile too (takes minutes)"
    parser.add_argument("--rounds", type=int, default=5, help=rounds)
    parser.add_argument("--compiled", action="store_true", help=compiled)
    parser.add_argument("--json", metavar="FILE", help="save the numbers")
    options = parser.parse_args()
    eager = torch_step(compiled=False)
    candidates = {"baichuan_jax": our_step(CONFIG), "transformers_eager": eager}
    if options.compiled:
        candidates["transformers_compiled"] = torch_step(compiled=True)
    for step in candidates.values():
        seconds(step, 2)
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    peaks = []
    for _ in range(options.rounds):
        for name, step in candidates.items():
            taken[name] += seconds(step, 4)
        peaks.append(measure_matmul_flops())
    rates = {name: ROWS * LENGTH / statistics.median(values) for name, values in taken.items()}
    peak = statistics.median(peaks)
    overhead = loop_overhead()
    ours = rates.pop("baichuan_jax")
    result = {
        "tokens_per_second": ours,
        "peers": {name: {"tokens_per_second": rate} for name, rate in rates.items()},
        "share_of_matmul_peak": ours * flops_per_token(CONFIG.model, LENGTH)[1] / peak,
        "matmul_peak_gflops": peak / 1e9,
        "overhead_seconds": overhead,
        "overhead_share": overhead / (ROWS * LENGTH / ours),
    }
    results = Results()
    every = {"baichuan_jax": ours, **rates}
    rows = [[name, f"{rate:,.0f}", f"{rate / ours:.2f}"] for name, rate in every.items()]
    share = f"{result['share_of_matmul_peak']:.0%}"
    title = f"{share} of the matrix products' {peak / 1e9:.0f} GFLOP/s"
    columns = ["", "tokens/s", "of baichuan_jax"]
    results.table(f"Training steps on this CPU (baichuan_jax: {title})", columns, rows)
    added = f"{1e3 * overhead:.2f} ms to a step: {result['overhead_share']:.2%}"
    results.say(f"the loop adds {added}")
    results.save(options.json, **result)


if __name__ == "__main__":
    main()
