"""What a compiled training step costs, as plain values (the JSON of `plan`), as tables and as a picture."""

import dataclasses
from pathlib import Path
from typing import Any

from baichuan_jax.config.schema import Config
from baichuan_jax.hardware.accelerators import Hardware, Topology
from baichuan_jax.hardware.flops import flops_per_token
from baichuan_jax.plan import hlo, roofline
from baichuan_jax.runs.console import Display
from baichuan_jax.xla_flags import GPU_MEMORY_FRACTION

RESERVED_GIB = (
    3.5  # of a GPU: CUDA context, cuBLAS's workspaces and NCCL's buffers of some communicators
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A training step compiled for a mesh of described devices."""

    config: Config
    mesh: Any
    text: str
    memory: dict[str, int]
    """Bytes on one device: arguments, outputs, aliased (outputs in place of arguments), temporaries."""
    state_bytes: dict[str, int]
    """Of the arguments on one device: parameters, optimiser."""
    seconds: float


def capacity_gib(hardware: Hardware) -> float:
    """Memory of a device that a step may use."""
    if hardware.platform == "tpu":
        return hardware.memory_gib
    return min(GPU_MEMORY_FRACTION * hardware.memory_gib, hardware.memory_gib - RESERVED_GIB)


def report(compiled: Compiled, topology: Topology, rates: Any) -> dict[str, Any]:
    """Everything that the command prints, as plain values."""
    config, hardware = compiled.config, topology.hardware
    program = hlo.parse(compiled.text)
    prediction = roofline.predict(program, compiled.mesh, topology, rates)
    tokens = config.train.global_batch_size * config.train.context_length / topology.num_devices
    full, causal = flops_per_token(config.model, config.train.context_length)
    counted = (prediction.matmul_flops + prediction.kernel_flops) / tokens
    peak = hardware.peak_tflops * 1e12
    memory = compiled.memory
    peak_gib = (
        memory["arguments"] + memory["temporaries"] + memory["outputs"] - memory["aliased"]
    ) / 2**30
    state = sum(compiled.state_bytes.values())
    per_host = min(topology.devices_per_node, topology.num_devices) * state / 2**30
    seconds = {
        "matrix products": prediction.matmul_seconds,
        "attention and other kernels": prediction.kernel_seconds,
        "memory-bound": prediction.memory_seconds,
        "slowed by collectives beside": prediction.contention_seconds,
        "waiting for collectives": prediction.exposed_seconds,
    }
    return {
        "topology": str(topology),
        "num_devices": topology.num_devices,
        "mesh": dict(compiled.mesh.shape),
        "remat": config.model.remat,
        "scan_layers": config.model.scan_layers,
        "micro_batch_size": tokens
        / config.train.context_length
        / config.accumulation_steps(config.mesh),
        "global_batch_size": config.train.global_batch_size,
        "compile_seconds": compiled.seconds,
        "memory_gib": {
            **{name: size / 2**30 for name, size in compiled.state_bytes.items()},
            "activations and temporaries": memory["temporaries"] / 2**30,
        },
        "peak_gib": peak_gib,
        "capacity_gib": capacity_gib(hardware),
        "fits": peak_gib <= capacity_gib(hardware),
        "host_restore_gib": per_host,
        "host_save_gib": per_host,
        "flops_per_token": counted,
        "flops_per_token_formula": {"full_attention": full, "causal": causal},
        "recomputation": counted / causal,
        "predicted_step_seconds": prediction.seconds,
        "predicted_tokens_per_second": tokens * topology.num_devices / prediction.seconds,
        "predicted_mfu": full * tokens / prediction.seconds / peak,
        "predicted_mfu_causal": causal * tokens / prediction.seconds / peak,
        "predicted_tflops": full * tokens / prediction.seconds / 1e12,
        "seconds": seconds,
        "rates": dataclasses.asdict(rates),
        "hardware": dataclasses.asdict(hardware),
        "unknown": prediction.unknown,
        "kernels": prediction.kernels,
        "collectives": [_collective(item) for item in prediction.collectives],
    }


def _collective(item: Any) -> dict[str, Any]:
    return {
        name: value for name, value in dataclasses.asdict(item).items() if name != "op_name"
    } | {"of": item.op_name[-60:]}


def show(result: dict[str, Any]) -> None:
    """Print a report as tables."""
    display = Display()
    mesh = ", ".join(f"{name} {size}" for name, size in result["mesh"].items())
    display.say(
        f"{result['topology']}: {result['num_devices']} devices ({mesh}); {result['global_batch_size']} rows a step, "
        f"{result['micro_batch_size']:g} a pass and device; remat {result['remat']}, "
        f"{'looped' if result['scan_layers'] else 'unrolled'} blocks; compiled in {result['compile_seconds']:.0f} s"
    )
    for item in result.get("search", []):
        peak = "-" if item["peak_gib"] is None else f"{item['peak_gib']:.1f} GiB"
        speed = "" if item["predicted_mfu"] is None else f", MFU {item['predicted_mfu']:.1%}"
        fits = "" if item["fits"] else ", does not fit"
        display.say(
            f"  tried remat {item['remat']}, {item['micro_batch_size']:g} row(s): {peak}{speed}{fits}"
        )
    memory = [[name, f"{size:.1f}"] for name, size in result["memory_gib"].items()]
    memory += [["peak", f"{result['peak_gib']:.1f}"], ["capacity", f"{result['capacity_gib']:.1f}"]]
    display.table("Memory of one device", ["", "GiB"], memory)
    if not result["fits"]:
        display.say(
            "does not fit: --search compiles what would (remat, rows a pass); or raise mesh.fsdp",
            style="red",
        )
    display.say(
        f"host memory of a node: {result['host_save_gib']:.0f} GiB at most to save, {result['host_restore_gib']:.0f} to restore"
    )
    formula = result["flops_per_token_formula"]
    display.say(
        f"operations a token: {result['flops_per_token'] / 1e9:.2f} G counted, {formula['causal'] / 1e9:.2f} G by the formula "
        f"(causal): {result['recomputation']:.3f} times"
    )
    total = result["predicted_step_seconds"]
    if "schedule_profile" in result:
        display.say(
            f"scheduled with a profile of predicted times ({result['schedule_profile']}); without it "
            f"{result['predicted_step_seconds_without_profile'] * 1e3:.0f} ms a step"
        )
    display.table(
        "Predicted step (one device)",
        ["", "ms", "share"],
        [
            [name, f"{value * 1e3:.1f}", f"{value / total:.1%}"]
            for name, value in result["seconds"].items()
        ]
        + [["in all", f"{total * 1e3:.1f}", ""]],
    )
    display.say(
        f"predicted: {result['predicted_tokens_per_second']:,.0f} tokens/s, {result['predicted_tflops']:.0f} TFLOP/s a device, MFU "
        f"{result['predicted_mfu']:.1%} (full-attention counting; {result['predicted_mfu_causal']:.1%} causal)",
        style="bold",
    )
    for what, count in result["unknown"].items():
        display.say(f"not counted: {count} x {what}", style="yellow")
    display.table(
        "Collectives",
        ["kind", "axis", "link", "MB", "times", "async", "in loop", "ms", "waited ms"],
        _grouped(result),
    )
    show_rates(result)


def show_rates(result: dict[str, Any]) -> None:
    """Print every rate of a report and where it comes from: measured, given, or the default."""
    display = Display()
    file = result["rates_file"]
    if file is not None:
        display.say(
            f"rates measured on {file['device']} ({file['hardware']}), {file['date']}: {file['path']}"
        )
        unused = [name for name in file["rates"] if result["rates_from"][name] != "measured"]
        if unused:
            display.say(f"given instead of measured: {', '.join(unused)}")
    rows = [
        [name, f"{value:g}{' us' if name.endswith('_us') else ''}", result["rates_from"][name]]
        for name, value in result["rates"].items()
    ]
    display.table("Rates (shares of the data sheet)", ["", "value", "from"], rows)


def _grouped(result: dict[str, Any]) -> list[list[str]]:
    """Collectives of one kind, axis and size together."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for item in result["collectives"]:
        key = (
            item["kind"],
            item["axis"],
            item["link"],
            f"{item['bytes'] / 1e6:,.1f}",
            item["asynchronous"],
            item["in_loop"],
        )
        groups.setdefault(key, []).append(item)
    rows = []
    for (kind, axis, link, size, asynchronous, in_loop), items in groups.items():
        total = {
            name: sum(item[name] for item in items)
            for name in ("count", "seconds", "exposed_seconds")
        }
        rows.append(
            [
                kind,
                axis,
                link,
                size,
                str(total["count"]),
                "yes" if asynchronous else "no",
                "yes" if in_loop else "no",
                f"{total['seconds'] * 1e3:.1f}",
                f"{total['exposed_seconds'] * 1e3:.1f}",
            ]
        )
    return sorted(rows, key=lambda row: -float(row[7]))


def plot(result: dict[str, Any], path: Path) -> None:
    """A picture of the report: where the step's time and the device's memory go."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 3.6), layout="constrained")
    for axes, parts, unit, scale in (
        (above, result["seconds"], "ms", 1e3),
        (below, result["memory_gib"], "GiB", 1.0),
    ):
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
    figure.suptitle(
        f"{result['topology']}: predicted MFU {result['predicted_mfu']:.1%}, peak {result['peak_gib']:.1f} GiB"
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
