"""What choices cost: the same training step as in the stage `step`, with fewer blocks, changed in one thing at a time.

Times are medians, taken in turn; ratios are to the first row. Summing gradients in float32 is not a step of its own here: what the
products of weights' gradients take more with a float32 result is in the stage `products`, and its sum over a step is the last note.
"""

import concurrent.futures
import json
from typing import Any

from stage import Stage

from baichuan_jax.xla_flags import apply_flags

COMPILERS = 4  # programs that are compiled side by side
# Name -> settings, options of the compiler, documents. In the order of their worth.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as configured: nothing recomputed, Triton kernels": ({}, {}),
    "deterministic": ({}, {"xla_gpu_deterministic_ops": True}),
    "document masks": ({"data.document_mask": True}, {}),
    "recompute all but products": ({"model.remat": "matmuls"}, {}),
    "recompute whole blocks": ({"model.remat": "full"}, {}),
    "cuDNN's attention": ({"kernels.attention": "cudnn"}, {}),
    "XLA's attention (blockwise) and RMSNorm": ({"kernels.attention": "blockwise", "kernels.rms_norm": "reference"}, {}),
    "XLA's RMSNorm": ({"kernels.rms_norm": "reference"}, {}),
    "blocks in a loop": ({"model.scan_layers": True}, {}),
    "two micro-batches, sums in float32 (time a row)": ({}, {}),
}
MICRO = "two micro-batches, sums in float32 (time a row)"


def run(stage: Stage) -> None:
    """Compile side by side, then time in turn."""
    from step import make_batch, make_config

    layers = max(2, stage.sizes.layers // 2)
    base = make_config(stage, **{"model.num_layers": layers})
    apply_flags(base)

    import jax

    from baichuan_jax.config import ConfigError
    from baichuan_jax.sharding import make_mesh
    from baichuan_jax.step import make_steps

    device = jax.devices()[0]
    mesh = make_mesh(base.mesh, [device])
    state = make_steps(base, mesh).init()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    jobs: dict[str, tuple[Any, dict[str, jax.Array], Any, float]] = {}
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        for name, (settings, options) in VARIANTS.items():
            changes = {"model.num_layers": layers, **settings}
            rows = 1.0
            if name == MICRO:
                changes["train.global_batch_size"] = 2 * base.train.global_batch_size
                rows = 2.0
            config = make_config(stage, **changes)
            try:
                steps = make_steps(config, mesh)
                batch, wish = make_batch(config, steps, config.data.document_mask), steps.wish(0)
                lowered = steps.train.lower(shapes, batch, wish)
            except ConfigError as error:
                stage.leave_out(name, str(error))
                continue
            jobs[name] = (pool.submit(lowered.compile, options or None), batch, wish, rows)
        programs = {}
        for name, (future, batch, wish, rows) in jobs.items():
            try:
                programs[name] = (future.result(max(stage.seconds_left - 10, 1)), batch, wish, rows)
            except concurrent.futures.TimeoutError:
                stage.leave_out(name, "it was not compiled in time")
            except Exception as error:  # a choice that this device or version cannot serve is a result too
                stage.leave_out(name, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}")
        pool.shutdown(wait=False, cancel_futures=True)
    show(stage, programs, state)


def show(stage: Stage, programs: dict[str, Any], state: Any) -> None:
    """Time all programs in turn; they pass one state on, which each of them donates."""
    import statistics
    import time

    import jax

    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(stage.sizes.rounds + 1):
        for name, (compiled, batch, wish, rows) in programs.items():
            began = time.perf_counter()
            state, metrics = compiled(state, batch, wish)
            jax.block_until_ready(metrics)
            if number or stage.sizes.rounds == 1:  # the first round loads the programs
                seconds[name].append((time.perf_counter() - began) / rows)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = next(iter(VARIANTS))
    if base not in medians:
        raise RuntimeError(f"{base!r}, which all others are compared with, was not compiled: see what was left out")
    first = medians[base]
    memory = {name: compiled.memory_analysis().temp_size_in_bytes / 2**30 for name, (compiled, *_) in programs.items()}
    table = [[name, f"{medians[name] * 1e3:.1f}", f"{medians[name] / first:.3f}", f"{memory[name]:.2f}"] for name in medians]
    stage.table("A step of the 7B's width", ["", "ms", "ratio", "temporaries, GiB"], table)
    stage.record(seconds=medians, temporaries_gib=memory)
    dear = max(medians, key=lambda name: medians[name])
    stage.headline(f"{first * 1e3:.1f} ms; the dearest is {dear!r} with {medians[dear] / first:.2f} times that")
    path = stage.work / "products.json"
    products = json.loads(path.read_text(encoding="utf-8"))["values"].get("products", {}) if path.exists() else {}
    if not products:
        stage.leave_out("float32 results of the weights' gradients", "the stage `products` has no result")
        return
    total = sum(item["seconds"] * item["a_step"] for key, item in products.items() if not key.endswith("float32"))
    pairs = [
        (item, products[f"{key}, float32"])
        for key, item in products.items()
        if key.endswith("/ weight") and f"{key}, float32" in products
    ]
    extra = sum((other["seconds"] - item["seconds"]) * item["a_step"] for item, other in pairs)
    stage.say(f"Weights' gradients with a float32 result take {extra / total:+.1%} of all products of a step of the 7B.")
