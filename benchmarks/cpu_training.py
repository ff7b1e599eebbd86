"""Training speed on this CPU beside transformers' Llama on torch: same sizes, float32, interleaved, medians.

    pip install torch==2.13.0 transformers
    python benchmarks/cpu_training.py [--compiled] [--rounds 5] [--json FILE]

Also: the share of the measured matrix-product peak, and what the training loop adds to its compiled
step.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script, run from anywhere

import argparse
import dataclasses
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
    TokenizerConfig,
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
    rows = (
        np.random.default_rng(0)
        .integers(1, config.model.vocab_size, (1, G, T + 1))
        .astype(np.int32)
    )
    batch = jax.device_put(
        {"inputs": rows[..., :-1], "labels": rows[..., 1:]}, steps.batch_sharding
    )
    state, request = steps.init(), steps.request()

    def step() -> None:
        nonlocal state
        state, metrics = steps.train(state, batch, request)
        jax.block_until_ready(metrics)

    return step


def torch_step(compiled: bool) -> Callable[[], None]:
    """The same step with transformers: forward, backward, clipping, AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    m = CONFIG.model
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=m.vocab_size,
            hidden_size=m.hidden_size,
            intermediate_size=m.intermediate_size,
            num_hidden_layers=m.num_layers,
            num_attention_heads=m.num_heads,
            max_position_embeddings=LENGTH,
        )
    )
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
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began)
    return taken


def loop_overhead(num_steps: int = 300) -> float:
    """Seconds a step that train() adds to its compiled step, with a model so small that little hides it."""
    with tempfile.TemporaryDirectory() as folder:
        configs = Path(__file__).parents[1] / "configs"
        config = load_config(
            configs / "tiny.yaml", [f"run_dir={folder}/run", f"data.cache_dir={folder}/cache"]
        )
        small = dataclasses.replace(
            config,
            model=dataclasses.replace(
                config.model,
                vocab_size=1024,
                hidden_size=32,
                intermediate_size=64,
                num_layers=1,
                num_heads=1,
            ),
            train=dataclasses.replace(config.train, num_steps=num_steps),
            tokenizer=TokenizerConfig(vocab_size=1024),
            checkpoint=dataclasses.replace(config.checkpoint, every=num_steps),
            evaluate=dataclasses.replace(config.evaluate, every=num_steps),
            sample=dataclasses.replace(config.sample, prompts=[]),
        )
        run = train(small)
        looped = statistics.median(
            line["step_seconds"] for line in run.metrics[20:] if "step_seconds" in line
        )
    bare = our_step(small)
    return looped - statistics.median(seconds(bare, num_steps)[20:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="times that each is run in turn (default: 5)"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile too (minutes of compilation)"
    )
    parser.add_argument("--json", metavar="FILE", help="save the figures")
    options = parser.parse_args()
    candidates = {
        "baichuan_jax": our_step(CONFIG),
        "transformers_eager": torch_step(compiled=False),
    }
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
    rows = [
        [name, f"{rate:,.0f}", f"{rate / ours:.2f}"]
        for name, rate in {"baichuan_jax": ours, **rates}.items()
    ]
    of_peak = (
        f"{result['share_of_matmul_peak']:.0%} of the matrix products' {peak / 1e9:.0f} GFLOP/s"
    )
    results.table(
        f"Training steps on this CPU (baichuan_jax: {of_peak})",
        ["", "tokens/s", "of baichuan_jax"],
        rows,
    )
    results.display.say(
        f"the loop adds {1e3 * overhead:.2f} ms to a step: {result['overhead_share']:.2%}"
    )
    results.save(options.json, **result)


if __name__ == "__main__":
    main()
