"""A training step with Baichuan-7B's width and few blocks: seconds and memory beside `plan`'s.

It is the real `step.py` with its kernels and flags. `plan` predicts it for this device, with
default and with measured rates. A profiler trace of some steps is summed by instruction and
compared with the roofline's prediction for each. The trace itself is in step.xplane.pb.gz
(TensorBoard's profile plugin or xprof reads it).
"""

import dataclasses
import gzip
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from results import reason
from stage import FULL, REPOSITORY, Sizes, Stage

from baichuan_jax.config.files import load_config
from baichuan_jax.config.schema import Config
from baichuan_jax.xla_flags import apply_flags

STEPS, TRACED = 10, 3
# A rehearsal plans this too, so that the program of the full size is compiled once.
FULL_WIDTH = "of the real step, with the width of the 7B"
# A larger trace is not kept.
TRACE_BYTES = 15 << 20


def overrides(sizes: Sizes, **changes: Any) -> list[str]:
    """Overrides of configs/baichuan_7b_a800.yaml: one device and few blocks, at these sizes."""
    settings = {
        "model.num_layers": sizes.layers,
        "model.hidden_size": sizes.hidden,
        "model.intermediate_size": sizes.intermediate,
        "model.num_heads": sizes.hidden // sizes.head_dim,
        "model.vocab_size": sizes.vocab,
        "tokenizer.vocab_size": sizes.vocab,
        "train.context_length": sizes.length,
        "train.global_batch_size": sizes.batch,
        "train.micro_batch_size": sizes.batch,
        "train.loss_chunk_size": sizes.loss_chunk,
        "mesh.data": 1,
        "mesh.state": 1,
        "mesh.fsdp": 1,
        **changes,
    }
    yaml = lambda value: "null" if value is None else str(value).lower()
    return [f"{name}={yaml(value)}" for name, value in settings.items()]


def make_config(stage: Stage, **changes: Any) -> Config:
    """The configuration of the step that is measured."""
    file = REPOSITORY / "configs" / "baichuan_7b_a800.yaml"
    return load_config(file, overrides(stage.sizes, **changes))


def make_batch(config: Config, steps: Any, documents: bool = False) -> dict[str, Any]:
    """Random tokens in the loader's form."""
    import jax
    import numpy as np

    train = config.train
    accumulation = config.accumulation_steps(config.mesh)
    shape = (accumulation, train.global_batch_size // accumulation, train.context_length)
    rng = np.random.default_rng(0)
    tokens = lambda: rng.integers(3, config.model.vocab_size, shape).astype(np.int32)
    batch = {"inputs": tokens(), "labels": tokens()}
    if documents:
        # Documents have a mean length of an eighth of a row.
        starts = rng.random(shape) < 8 / train.context_length
        starts[..., 0] = True
        batch["segment_ids"] = np.cumsum(starts, axis=-1).astype(np.int32)
        place = np.broadcast_to(np.arange(train.context_length), shape)
        first = np.maximum.accumulate(np.where(starts, place, 0), axis=-1)
        batch["positions"] = (place - first).astype(np.int32)
    return jax.device_put(batch, steps.batch_sharding)


def run(stage: Stage) -> None:
    """Measure, predict, trace, compare."""
    config = make_config(stage)
    # Before jax starts.
    apply_flags(config)

    import jax

    from baichuan_jax.hardware.accelerators import hardware_of, parse_topology
    from baichuan_jax.hardware.devices import peak_flops
    from baichuan_jax.plan import hlo, rates
    from baichuan_jax.plan.prediction import predict
    from baichuan_jax.sharding import make_mesh
    from baichuan_jax.step import make_steps
    from baichuan_jax.training.throughput import Throughput

    device = jax.devices()[0]
    hardware = hardware_of(device.device_kind)
    name = f"{hardware.name if hardware else 'h100'}:1x1"
    if hardware is None:
        unknown = f"{device.device_kind} is not in hardware/accelerators.py"
        stage.say(f"{unknown}: the prediction is that of {name}.")
    plans = start_plans(stage, name)
    mesh = make_mesh(config.mesh, [device])
    steps = make_steps(config, mesh)
    state = steps.init()
    batch, request = make_batch(config, steps), steps.request()
    began = time.perf_counter()
    compiled = steps.train.lower(state, batch, request).compile()
    compile_seconds = time.perf_counter() - began
    losses, seconds = [], []
    for _ in range(STEPS):
        began = time.perf_counter()
        state, metrics = compiled(state, batch, request)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds[2:])
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    speed = Throughput(config, 1, peak_flops(config, device)[0]).speed(step)
    mfu = "unknown" if speed["mfu"] is None else f"{speed['mfu']:.1%}"
    parameters = config.model.num_parameters
    stage.headline(f"{step * 1e3:.1f} ms a step, MFU {mfu}")
    stage.record(
        step_seconds=step,
        all_seconds=seconds,
        losses=losses,
        mfu=speed["mfu"],
        mfu_causal=speed["mfu_causal"],
        peak_bytes=peak,
        compile_seconds=compile_seconds,
        parameters=parameters,
    )
    model = f"{config.model.num_layers} blocks, {parameters / 1e9:.2f}B parameters"
    batch_size = f"{config.train.global_batch_size} rows of {config.train.context_length} tokens"
    loss = f"loss {losses[0]:.3f} to {losses[-1]:.3f}"
    stage.say(f"{model}, {batch_size}; compiled in {compile_seconds:.0f} s; {loss}.")
    if not losses[-1] < losses[0]:
        stage.wrong(f"the loss of the same rows does not fall: {losses}")
    try:
        traced = trace(stage, compiled, state, batch, request)
        topology = parse_topology(name)
        shares = rates.rates_for(topology)
        if (path := stage.output / "rates.json").exists():
            measured = rates.read_rates(path, topology.hardware).rates
            shares = dataclasses.replace(shares, **measured)
        program = hlo.parse(compiled.as_text())
        show_trace(stage, traced, program, predict(program, mesh, topology, shares), step)
    except Exception as error:  # the main result, seconds beside the plan, does not depend on it
        traceback.print_exc()
        stage.wrong(f"no trace beside the prediction: {type(error).__name__}: {reason(error)}")
    memory = compiled.memory_analysis()
    planned = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30
    show_plans(stage, plans, step, peak, planned)


def start_plans(stage: Stage, topology: str) -> dict[str, tuple[subprocess.Popen, Path]]:
    """Start `plan` for this device in the background, with default and with measured rates."""
    variants: dict[str, list[str]] = {"default rates": []}
    if (path := stage.output / "rates.json").exists():
        variants["measured rates"] = ["--rates_file", str(path)]
    else:
        why = "there is no rates.json: the stage `products` wrote none"
        stage.leave_out("plan with measured rates", why)
    if stage.sizes.small:
        variants[FULL_WIDTH] = []
    started = {}
    # plan chooses its own flags.
    variables = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    for number, (label, rates) in enumerate(variants.items()):
        settings = overrides(FULL if label == FULL_WIDTH else stage.sizes)
        folder = stage.work / f"plan-{number}"
        what = ["--config", str(REPOSITORY / "configs" / "baichuan_7b_a800.yaml")]
        what += ["--topology", topology, *(f"--{setting}" for setting in settings), *rates]
        where = ["--output", str(folder), "--json", str(folder / "plan.json")]
        command = [sys.executable, "-m", "baichuan_jax.plan", *what, *where]
        folder.mkdir()
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=variables, cwd=REPOSITORY
            )
        started[label] = (process, folder)
    return started


def show_plans(
    stage: Stage,
    plans: dict[str, tuple[subprocess.Popen, Path]],
    step: float,
    peak: int | None,
    planned: float,
) -> None:
    """Measured beside predicted: seconds, and the process's peak of memory."""
    rows = [["measured", f"{step * 1e3:.1f}", "", "-" if peak is None else f"{peak / 2**30:.1f}"]]
    rows.append(["the program that ran, as compiled", "", "", f"{planned:.1f}"])
    for label, (process, folder) in plans.items():
        try:
            code = process.wait(max(1.0, stage.seconds_left - 3))
        except subprocess.TimeoutExpired:
            process.kill()
            why = "it had not ended when the stage's time was up"
            stage.leave_out(f"plan, {label}", why, needed=True)
            continue
        if code:
            end = (folder / "log").read_text(errors="replace").strip()[-300:]
            stage.wrong(f"plan, {label}, ended with {code}: {end}")
            continue
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        predicted = plan["predicted_step_seconds"]
        off = "-" if label == FULL_WIDTH else f"{predicted / step - 1:+.1%}"
        rows.append([f"plan, {label}", f"{predicted * 1e3:.1f}", off, f"{plan['peak_gib']:.1f}"])
        kept = ("predicted_step_seconds", "peak_gib", "seconds", "rates")
        stage.record(**{f"plan, {label}": {key: plan[key] for key in kept}})
    stage.table("A step, measured and predicted", ["", "ms", "off by", "peak GiB"], rows)


def trace(stage: Stage, compiled: Any, state: Any, batch: Any, request: Any) -> Any:
    """Trace some steps, and read the trace (device_trace.read_trace)."""
    import jax
    from device_trace import read_trace

    folder = stage.work / "trace"
    jax.profiler.start_trace(str(folder))
    for _ in range(TRACED):
        state, metrics = compiled(state, batch, request)
    jax.block_until_ready(metrics)
    jax.profiler.stop_trace()
    for path in folder.rglob("*.xplane.pb"):
        content = gzip.compress(path.read_bytes(), 6)
        if len(content) <= TRACE_BYTES:
            (stage.output / "step.xplane.pb.gz").write_bytes(content)
        else:
            stage.leave_out("step.xplane.pb.gz", f"{len(content) >> 20} MiB are too many to keep")
    return read_trace(folder)


def show_trace(stage: Stage, traced: Any, program: Any, prediction: Any, step: float) -> None:
    """Measurement beside prediction: by group, and the instructions that differ most."""
    import jax
    from device_trace import by_group, compare, largest_differences

    if traced.platform != jax.default_backend():
        which = f"no activity of the {jax.default_backend()}, only of the {traced.platform}"
        stage.wrong(f"the trace holds {which}: check that CUPTI is installed")
        return
    rows = compare(traced.instructions, TRACED, program, prediction)

    def milliseconds(row: Any) -> list[str]:
        measured, predicted = row.measured_seconds, row.predicted_seconds
        ratio = f"{measured / predicted:.2f}" if predicted else "-"
        return [f"{measured * 1e3:.2f}", f"{predicted * 1e3:.2f}", ratio]

    groups = by_group(rows)
    title = "A step by kind of kernel, traced and predicted for this program"
    times = ["measured ms", "predicted ms", "ratio"]
    cells = [[row.name, *milliseconds(row), f"{row.measured_count:.0f}"] for row in groups]
    stage.table(title, ["", *times, "instructions"], cells)
    cells = [
        [row.name, row.op_name[-60:], *milliseconds(row), f"{row.measured_count:g}"]
        for row in largest_differences(rows)
    ]
    stage.table("The largest differences", ["instruction", "of", *times, "times"], cells)
    unnamed = sum(item.seconds for item in traced.unnamed.values()) / TRACED
    others = sum(item.seconds for item in traced.other_modules.values()) / TRACED
    busy, span = traced.busy_seconds / TRACED, traced.span_seconds / TRACED
    stage.say(
        f"Traced, a step: {busy * 1e3:.1f} ms busy of {span * 1e3:.1f} ms (untraced: "
        f"{step * 1e3:.1f} ms); {unnamed * 1e3:.2f} ms of kernels carry no instruction's name, "
        f"{others * 1e3:.2f} ms are of other programs."
    )
    seconds = {"busy_seconds": busy, "span_seconds": span}
    seconds |= {"unnamed_seconds": unnamed, "other_seconds": others}
    found = {
        "groups": [dataclasses.asdict(row) for row in groups],
        "instructions": [dataclasses.asdict(row) for row in rows[:200]],
        "kernels": {row.name: traced.kernels.get(row.name) for row in rows[:40]},
        "lines": traced.lines,
    }
    stage.record(trace={**seconds, **found})
