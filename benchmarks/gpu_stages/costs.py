"""The cost of choices: the training step of the stage `step`, with one change at a time.

It has half as many blocks as there. Times are medians, taken in turn; ratios are to the first row.
Micro-batches are summed in float32 on every device. Sums over devices in float32 need weights'
gradients with a float32 result; the last note, from the stage `products`, is their extra time.
"""

import statistics
import threading
import time
import traceback
from typing import Any

from results import reason
from stage import Stage

from baichuan_jax.xla_flags import apply_flags

# Programs that are compiled at once.
COMPILERS = 4
# Seconds before the end from which no further program is awaited.
LEFT_TO_TIME = 15
BASE = "as configured, nothing recomputed"
MICRO = "two micro-batches, summed in float32 (time of half the rows)"
# Name -> settings, options of the compiler. By priority.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    BASE: ({}, {}),
    "deterministic": ({}, {"xla_gpu_deterministic_ops": True}),
    "document masks": ({"data.document_mask": True}, {}),
    "recompute all but products": ({"model.remat": "matmuls"}, {}),
    "recompute whole blocks": ({"model.remat": "full"}, {}),
    "cuDNN's attention": ({"kernels.attention": "cudnn"}, {}),
    "XLA's attention (blockwise) and RMSNorm": (
        {"kernels.attention": "blockwise", "kernels.rms_norm": "reference"},
        {},
    ),
    "XLA's RMSNorm": ({"kernels.rms_norm": "reference"}, {}),
    "blocks in a loop": ({"model.scan_layers": True}, {}),
    MICRO: ({}, {}),
}


class Variant:
    """One way to run the step, compiled in a daemon thread, which the process does not wait for."""

    def __init__(
        self,
        lowered: Any,
        options: dict[str, Any],
        batch: Any,
        request: Any,
        rows: float,
        free: threading.Semaphore,
    ) -> None:
        self.batch, self.request, self.rows = batch, request, rows
        self.compiled: Any = None
        self.error: str | None = None
        self.seconds: list[float] = []

        def work() -> None:
            with free:
                try:
                    self.compiled = lowered.compile(options or None)
                except Exception as error:
                    # A result too: what this device or version cannot compile is in the report.
                    self.error = f"{type(error).__name__}: {reason(error)}"

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()


def run(stage: Stage) -> None:
    """Compile all variants, several at once, then time them in turn."""
    from step import make_batch, make_config

    layers = max(2, stage.sizes.layers // 2)
    base = make_config(stage, **{"model.num_layers": layers})
    apply_flags(base)

    import jax

    from baichuan_jax.config.schema import ConfigError
    from baichuan_jax.kernels.attention.api import choose_attention
    from baichuan_jax.kernels.rms_norm.api import choose_rms_norm
    from baichuan_jax.sharding import make_mesh
    from baichuan_jax.step import make_steps

    device = jax.devices()[0]
    model, length = base.model, base.train.context_length
    where = {"device": device, "dtype": model.dtype}
    shape = {"head_dim": model.head_dim, "masked": False, "length": length, "context": 1}
    attention, _ = choose_attention("auto", **where, **shape)
    rms_norm, _ = choose_rms_norm("auto", **where, width=model.hidden_size)
    stage.say(f"`auto` takes {attention} for attention and {rms_norm} for RMSNorm.")
    mesh = make_mesh(base.mesh, [device])
    init = make_steps(base, mesh).init
    shape_of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    shapes = jax.tree.map(shape_of, init())
    free, variants = threading.Semaphore(COMPILERS), {}
    for name, (settings, options) in VARIANTS.items():
        changes = {"model.num_layers": layers, **settings}
        if name == MICRO:
            changes["train.global_batch_size"] = 2 * base.train.global_batch_size
        config = make_config(stage, **changes)
        try:
            steps = make_steps(config, mesh)
            batch, request = make_batch(config, steps, config.data.document_mask), steps.request()
            lowered = steps.train.lower(shapes, batch, request)
        except ConfigError as error:
            stage.leave_out(name, str(error))
            continue
        rows = 2.0 if name == MICRO else 1.0
        variants[name] = Variant(lowered, options, batch, request, rows, free)
    for name, variant in list(variants.items()):
        variant.thread.join(max(stage.seconds_left - LEFT_TO_TIME, 0.1))
        if variant.compiled is None:
            late = variant.thread.is_alive()
            why = "it was not compiled in time" if late else str(variant.error)
            stage.leave_out(name, why, needed=late)
            del variants[name]
    if BASE not in variants:
        raise RuntimeError(f"{BASE!r}, with which the others are compared, was not compiled")
    measure(stage, variants, init)
    float32_sums(stage)


def measure(stage: Stage, variants: dict[str, Variant], init: Any) -> None:
    """Time all variants in turn, and show the table after every round.

    They pass one state on: each call donates its input, so there is memory for one state only.
    """
    import jax

    state = init()
    for number in range(stage.sizes.rounds + 1):
        for name, variant in list(variants.items()):
            began = time.perf_counter()
            try:
                state, metrics = variant.compiled(state, variant.batch, variant.request)
                jax.block_until_ready(metrics)
            except Exception as error:  # out of memory, or a kernel that does not start
                traceback.print_exc()
                why = f"{type(error).__name__}: {reason(error)}"
                stage.leave_out(name, why, needed=name == BASE)
                del variants[name]
                # The call may have donated the old one.
                state = init()
                continue
            # The first round loads the programs.
            if number:
                variant.seconds.append((time.perf_counter() - began) / variant.rows)
        if number and BASE in variants:
            show(stage, variants)


def show(stage: Stage, variants: dict[str, Variant]) -> None:
    """The table of the rounds until now."""
    medians = {name: statistics.median(variant.seconds) for name, variant in variants.items()}
    memory = {}
    for name, variant in variants.items():
        memory[name] = variant.compiled.memory_analysis().temp_size_in_bytes / 2**30
    first = medians[BASE]
    rows = []
    for name, seconds in medians.items():
        cells = [f"{seconds * 1e3:.1f}", f"{seconds / first:.3f}", f"{memory[name]:.2f}"]
        rows.append([name, *cells])
    stage.table("A step of the 7B's width", ["", "ms", "ratio", "temporaries, GiB"], rows)
    stage.record(seconds=medians, temporaries_gib=memory)
    slowest = max(medians, key=lambda name: medians[name])
    ratio = f"{medians[slowest] / first:.2f} times that"
    stage.headline(f"{first * 1e3:.1f} ms; the slowest is {slowest!r} with {ratio}")


def float32_sums(stage: Stage) -> None:
    """The extra time of weights' gradients with a float32 result, from the stage `products`."""
    products = stage.values_of("products").get("products", {})
    pairs = [
        (item, products[f"{key}, float32"])
        for key, item in products.items()
        if key.endswith("/ weight") and item["a_step"] and f"{key}, float32" in products
    ]
    if not pairs:
        what = "float32 results of the weights' gradients"
        stage.leave_out(what, "the stage `products` has none")
        return
    plain = [item for key, item in products.items() if not key.endswith("float32")]
    total = sum(item["seconds"] * item["a_step"] for item in plain)
    extra = sum((other["seconds"] - item["seconds"]) * item["a_step"] for item, other in pairs)
    share = f"{extra / total:+.1%} of all products of a step of the 7B"
    stage.say(f"Weights' gradients with a float32 result take {share}.")
