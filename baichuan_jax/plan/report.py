"""What a compiled training step costs: plain values (the JSON of `plan`), tables and a figure."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from baichuan_jax.hardware.accelerators import Hardware, Topology
from baichuan_jax.hardware.flops import flops_per_token
from baichuan_jax.plan import hlo
from baichuan_jax.plan.ahead_of_time import Compiled
from baichuan_jax.plan.interval import PERCENTILES, SAMPLES, SCHEDULE, spread
from baichuan_jax.plan.prediction import Prediction, predict
from baichuan_jax.plan.rates import NETWORK, Assumption, Rates
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import save_figure
from baichuan_jax.xla_flags import GPU_MEMORY_FRACTION

# Of a GPU: CUDA context, cuBLAS's workspaces and NCCL's buffers of some communicators.
RESERVED_GIB = 3.5


def capacity_gib(hardware: Hardware) -> float:
    """Memory of a device that a step may use, in GiB."""
    # On a TPU there is no driver's context and no NCCL to leave room for.
    if hardware.platform == "tpu":
        return hardware.memory_gib
    return min(GPU_MEMORY_FRACTION * hardware.memory_gib, hardware.memory_gib - RESERVED_GIB)


def report(compiled: Compiled, topology: Topology, rates: Rates) -> dict[str, Any]:
    """Everything that the command prints, as plain values."""
    config, hardware = compiled.config, topology.hardware
    prediction = predict(hlo.parse(compiled.text), compiled.mesh, topology, rates)
    tokens = config.train.global_batch_size * config.train.context_length / topology.num_devices
    passes = config.accumulation_steps(config.mesh)
    # Notebooks and the page of a run read these fields by name.
    return {
        "topology": str(topology),
        "num_devices": topology.num_devices,
        "mesh": dict(compiled.mesh.shape),
        "remat": config.model.remat,
        "scan_layers": config.model.scan_layers,
        "micro_batch_size": tokens / config.train.context_length / passes,
        "rows_per_device": tokens / config.train.context_length,
        "global_batch_size": config.train.global_batch_size,
        "compile_seconds": compiled.seconds,
        **_memory(compiled, topology),
        **_speed(compiled, topology, prediction, tokens),
        "rates": dataclasses.asdict(rates),
        "hardware": dataclasses.asdict(hardware),
        "unknown": prediction.unknown,
        "kernels": prediction.kernels,
        "collectives": [_collective(item) for item in prediction.collectives],
    }


def _memory(compiled: Compiled, topology: Topology) -> dict[str, Any]:
    memory, capacity = compiled.memory, capacity_gib(topology.hardware)
    # Aliased outputs take the place of arguments: the state is updated in its own memory.
    peak = memory["arguments"] + memory["temporaries"] + memory["outputs"] - memory["aliased"]
    # A save copies the state of a node's devices to its host, and a restore reads it there first.
    state = sum(compiled.state_bytes.values())
    per_host = min(topology.devices_per_node, topology.num_devices) * state / 2**30
    return {
        "memory_gib": {
            **{name: size / 2**30 for name, size in compiled.state_bytes.items()},
            "activations and temporaries": memory["temporaries"] / 2**30,
        },
        "peak_gib": peak / 2**30,
        "capacity_gib": capacity,
        "fits": peak / 2**30 <= capacity,
        "host_restore_gib": per_host,
        "host_save_gib": per_host,
    }


def _speed(
    compiled: Compiled, topology: Topology, prediction: Prediction, tokens: float
) -> dict[str, Any]:
    """tokens: of a step, on one device."""
    config = compiled.config
    full, causal = flops_per_token(config.model, config.train.context_length)
    # More than the formula: recomputation, and the products of kernels above the minimum.
    counted = (prediction.matmul_flops + prediction.kernel_flops) / tokens
    peak = topology.hardware.peak_tflops * 1e12
    seconds = {
        "matrix products": prediction.matmul_seconds,
        "attention and other kernels": prediction.kernel_seconds,
        "memory-bound": prediction.memory_seconds,
        "slowed by collectives beside": prediction.contention_seconds,
        "waiting for collectives": prediction.exposed_seconds,
    }
    if prediction.straggler_seconds:
        seconds["waiting for the slowest device"] = prediction.straggler_seconds
    return {
        "flops_per_token": counted,
        "flops_per_token_formula": {"full_attention": full, "causal": causal},
        # Of the causal count: the kernels' products are counted so too.
        "recomputation": counted / causal,
        "predicted_step_seconds": prediction.seconds,
        "predicted_tokens_per_second": tokens * topology.num_devices / prediction.seconds,
        # By both counts, since most published ones are of full attention.
        "predicted_mfu": full * tokens / prediction.seconds / peak,
        "predicted_mfu_causal": causal * tokens / prediction.seconds / peak,
        "predicted_tflops": full * tokens / prediction.seconds / 1e12,
        "seconds": seconds,
    }


def spread_report(
    result: dict[str, Any],
    compiled: Compiled,
    topology: Topology,
    assumptions: Mapping[str, Assumption],
) -> dict[str, Any]:
    """What the assumptions' ranges make of a report's MFU: more fields for the report."""
    found = spread(hlo.parse(compiled.text), compiled.mesh, topology, assumptions)
    # Operations and peak are the same for all samples: only the seconds differ.
    operations = result["predicted_mfu"] * result["predicted_step_seconds"]
    low, high = np.percentile(operations / found.samples, PERCENTILES)
    added: dict[str, Any] = {
        "predicted_mfu_interval": [float(low), float(high)],
        "assumptions": {name: list(item) for name, item in assumptions.items()},
        "assumptions_mfu": {
            name: [operations / seconds for seconds in pair] for name, pair in found.alone.items()
        },
    }
    if NETWORK in assumptions:
        mfu = {f"{gbps:g}": operations / seconds for gbps, seconds in found.networks.items()}
        added["network"] = {
            NETWORK: topology.hardware.inter_node_gbps,
            "node_gbps": topology.node_gbps,
            "source": assumptions[NETWORK].source,
            "predicted_mfu": mfu,
        }
    return added


def _collective(item: Any) -> dict[str, Any]:
    values = dataclasses.asdict(item)
    name = values.pop("op_name")
    # The end of a long path says which operation it is; its beginning is the same for all.
    return {**values, "of": name[-60:]}


def show(result: dict[str, Any]) -> None:
    """Print a report as tables."""
    # In the order of the questions: does it fit, how fast is it, and what holds it up.
    display = Display()
    _show_program(result, display)
    _show_memory(result, display)
    _show_speed(result, display)
    columns = ["kind", "axis", "link", "MB", "times", "async", "in loop", "ms", "waited ms"]
    display.table("Collectives", columns, _grouped(result))
    show_assumptions(result)


def _show_program(result: dict[str, Any], display: Display) -> None:
    mesh = ", ".join(f"{name} {size}" for name, size in result["mesh"].items())
    display.say(
        f"{result['topology']}: {result['num_devices']} devices ({mesh}); "
        f"{result['global_batch_size']} rows a step, {result['micro_batch_size']:g} a pass and "
        f"device; remat {result['remat']}, "
        f"{'looped' if result['scan_layers'] else 'unrolled'} blocks; "
        f"compiled in {result['compile_seconds']:.0f} s"
    )
    _show_search(result, display)


def _show_search(result: dict[str, Any], display: Display) -> None:
    """The candidates of --search, and what was not tried."""
    rows = []
    for item in result.get("search", []):
        peak, seconds = item["peak_gib"], item["predicted_step_seconds"]
        step = ["", ""] if seconds is None else [f"{seconds * 1e3:.1f}", ""]
        if item["predicted_mfu"] is not None:
            step[1] = f"{item['predicted_mfu']:.1%}"
        size = "" if peak is None else f"{peak:.1f}"
        named = [item["remat"], f"{item['micro_batch_size']:g}", str(item["state"])]
        fits = "" if item["fits"] else "does not fit"
        rows.append([*named, item["gradient_dtype"], size, *step, fits])
    if rows:
        columns = ["remat", "rows a pass", "mesh.state", "gradient_dtype", "peak GiB", "step ms"]
        display.table("Tried, without a profile", [*columns, "MFU", ""], rows)
        display.say(
            "the last row is for comparison: another train.gradient_dtype changes a run's numbers, "
            "so that it is never chosen"
        )
    for item in result.get("search_left_out", []):
        sizes = ", ".join(map(str, item["sizes"]))
        display.say(
            f"not tried: {len(item['sizes'])} size(s) of mesh.state ({sizes}); {item['setting']} "
            "needs more copies of the state"
        )


def _show_memory(result: dict[str, Any], display: Display) -> None:
    memory = [[name, f"{size:.1f}"] for name, size in result["memory_gib"].items()]
    memory += [["peak", f"{result['peak_gib']:.1f}"], ["capacity", f"{result['capacity_gib']:.1f}"]]
    display.table("Memory of one device", ["", "GiB"], memory)
    if not result["fits"]:
        display.say(
            "does not fit: --search compiles what would (remat, rows a pass, mesh.state); or raise "
            "mesh.fsdp",
            style="red",
        )
    display.say(
        f"host memory of a node: {result['host_save_gib']:.0f} GiB at most to save, "
        f"{result['host_restore_gib']:.0f} to restore"
    )


def _show_speed(result: dict[str, Any], display: Display) -> None:
    formula = result["flops_per_token_formula"]["causal"]
    display.say(
        f"operations a token: {result['flops_per_token'] / 1e9:.2f} G counted, "
        f"{formula / 1e9:.2f} G by the formula (causal): {result['recomputation']:.3f} times"
    )
    total = result["predicted_step_seconds"]
    if "schedule_profile" in result:
        display.say(
            f"scheduled with a profile of predicted times ({result['schedule_profile']}); without "
            f"it {result['predicted_step_seconds_without_profile'] * 1e3:.0f} ms a step"
        )
    elif "predicted_step_seconds_with_profile" in result:
        display.say(
            "scheduled without a profile of predicted times; with one "
            f"{result['predicted_step_seconds_with_profile'] * 1e3:.0f} ms a step"
        )
    rows = [
        [name, f"{value * 1e3:.1f}", f"{value / total:.1%}"]
        for name, value in result["seconds"].items()
    ]
    rows.append(["in all", f"{total * 1e3:.1f}", ""])
    display.table("Predicted step (one device)", ["", "ms", "share"], rows)
    display.say(
        f"predicted: {result['predicted_tokens_per_second']:,.0f} tokens/s, "
        f"{result['predicted_tflops']:.0f} TFLOP/s a device, MFU {result['predicted_mfu']:.1%} "
        f"(full-attention counting; {result['predicted_mfu_causal']:.1%} causal); "
        f"90 % interval of the MFU {_interval(result)}",
        style="bold",
    )
    _show_networks(result, display)
    for what, count in result["unknown"].items():
        display.say(f"not counted: {count} x {what}", style="yellow")


def _interval(result: dict[str, Any]) -> str:
    low, high = result["predicted_mfu_interval"]
    return f"{low * 100:.1f} to {high:.1%}"


def show_network(topology: Topology, assumed: bool) -> None:
    """Print the network between nodes: of a cluster's numbers it moves the prediction most."""
    source = "data sheet; --hardware.node_gbps sets yours" if assumed else "given"
    Display().say(
        f"network: {topology.hardware.inter_node_gbps:,g} Gb/s a GPU, {topology.node_gbps:,g} Gb/s "
        f"a node ({source})",
        style="bold",
    )


def _show_networks(result: dict[str, Any], display: Display) -> None:
    """The same program on other networks."""
    network = result.get("network")
    # A single node uses none.
    if network is None or result["num_devices"] * network[NETWORK] <= network["node_gbps"]:
        return
    others = ", ".join(f"{gbps}: {mfu:.1%}" for gbps, mfu in network["predicted_mfu"].items())
    display.say(
        f"MFU by the network, Gb/s a GPU: {others} (this program, whose schedule was made for "
        f"{network[NETWORK]:g})"
    )


def _grouped(result: dict[str, Any]) -> list[list[str]]:
    """Rows of the table of collectives: those of one kind, axis and size together."""
    # An unrolled program has a collective of each kind for every layer: dozens of equal rows.
    groups: dict[tuple, list[dict[str, Any]]] = {}
    keys = ("kind", "axis", "link", "bytes", "asynchronous", "in_loop")
    for item in result["collectives"]:
        # By the size that is shown: a few bytes more or less make no row of their own.
        megabytes = f"{item['bytes'] / 1e6:,.1f}"
        key = tuple({**item, "bytes": megabytes}[name] for name in keys)
        groups.setdefault(key, []).append(item)
    rows = []
    for (kind, axis, link, size, asynchronous, in_loop), items in groups.items():
        count, seconds, waited = (
            sum(item[name] for item in items) for name in ("count", "seconds", "exposed_seconds")
        )
        flags = ["yes" if flag else "no" for flag in (asynchronous, in_loop)]
        times = [f"{seconds * 1e3:.1f}", f"{waited * 1e3:.1f}"]
        rows.append([kind, axis, link, size, str(count), *flags, *times])
    # The longest first: seconds of all of a row together.
    return sorted(rows, key=lambda row: -float(row[7]))


def show_assumptions(result: dict[str, Any]) -> None:
    """Print every assumption of a report: its range, its source, and what it alone does."""
    display = Display()
    file = result["rates_file"]
    if file is not None:
        display.say(
            f"rates measured on {file['device']} ({file['hardware']}), {file['date']}: "
            f"{file['path']}"
        )
        unused = [name for name in file["rates"] if result["rates_from"][name] != "measured"]
        if unused:
            display.say(f"given instead of measured: {', '.join(unused)}")
    effects = result["assumptions_mfu"]
    rows = []
    # What widens the interval comes first.
    for name in sorted(effects, key=lambda name: -abs(effects[name][1] - effects[name][0])):
        *numbers, source = result["assumptions"][name]
        unit = " us" if name.endswith("_us") else ""
        value, low, high = (f"{number:.4g}{unit}" for number in numbers)
        ranges = [low, high] if numbers[1] < numbers[2] else ["", ""]
        alone = [f"{mfu:.1%}" for mfu in effects[name]] if ranges[0] else ["", ""]
        rows.append([name, value, *ranges, *alone, source])
    display.table(
        f"Assumptions of {result['topology']} (shares, or as named)",
        ["", "value", "low", "high", "MFU at low", "MFU at high", "from"],
        rows,
    )
    display.say(
        f"the interval: 5th to 95th percentile of {SAMPLES:,} samples; each assumption is drawn by "
        "itself, half of the samples between low and value, half between value and high"
    )
    if SCHEDULE in effects:
        display.say(f"{SCHEDULE}: by which share the step is longer where real times differ")


def show_sweep(results: list[dict[str, Any]]) -> None:
    """Print the reports of growing clusters, one a row."""
    rows = [
        [
            str(result["num_devices"]),
            f"{result['predicted_step_seconds'] * 1e3:.0f}",
            f"{result['predicted_mfu']:.1%}",
            _interval(result),
            f"{result['seconds']['waiting for collectives'] * 1e3:.1f}",
            f"{result['peak_gib']:.1f}",
        ]
        for result in results
    ]
    columns = ["devices", "step ms", "MFU", "90 % interval", "waited ms", "peak GiB"]
    Display().table("Weak scaling, predicted", columns, rows)


def plot(result: dict[str, Any], path: Path) -> None:
    """A figure of the report: where the step's time and the device's memory go."""
    # Late: a plan needs no matplotlib, and the command says where it is missing.
    import matplotlib

    # Files only: without it matplotlib looks for a window system.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 3.6), layout="constrained")
    for axes, parts, unit, scale in (
        (above, result["seconds"], "ms", 1e3),
        (below, result["memory_gib"], "GiB", 1.0),
    ):
        # One bar of parts side by side, each with its number in the legend.
        left = 0.0
        for name, value in parts.items():
            axes.barh(0, value * scale, left=left, label=f"{name} ({value * scale:.1f} {unit})")
            left += value * scale
        axes.set_yticks([])
        axes.set_xlabel(unit)
        axes.legend(
            fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.45), frameon=False
        )
    below.axvline(result["capacity_gib"], color="black", linestyle="--")
    mfu, peak = f"MFU {result['predicted_mfu']:.1%}", f"peak {result['peak_gib']:.1f} GiB"
    title = f"{result['topology']}: predicted {mfu} (90 %: {_interval(result)}), {peak}"
    figure.suptitle(title)
    save_figure(figure, path, dpi=150)
    pyplot.close(figure)
