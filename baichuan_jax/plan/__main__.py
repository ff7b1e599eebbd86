"""`python -m baichuan_jax.plan`: what a training step costs on a topology, without its devices."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from baichuan_jax.config.files import make_parser, parse_command
from baichuan_jax.config.schema import Config, ConfigError, require
from baichuan_jax.hardware.accelerators import Hardware, Topology, parse_topology
from baichuan_jax.plan import hlo
from baichuan_jax.plan.ahead_of_time import (
    CHILD,
    candidates,
    child_environment,
    described_devices,
    missing,
    trace_step,
)
from baichuan_jax.plan.report import Compiled, capacity_gib, plot, report, show, show_rates
from baichuan_jax.plan.roofline import (
    RATE_NAMES,
    Rates,
    check_rate,
    predict,
    rates_for,
    read_rates,
    schedule_profile,
)
from baichuan_jax.resilience.exits import run_command
from baichuan_jax.runs.console import Display

OWN = ("topology", "search", "sweep", "output", "json", "hlo", "rates_file")


OVERRIDES = [item.name for item in dataclasses.fields(Hardware) if item.type in (float, "float")]


def _plan(config: Config, topology: Topology, options: dict[str, Any]) -> dict[str, Any]:
    """Compile and report; with --search the fastest predicted candidate that fits."""
    rates = dataclasses.replace(rates_for(topology), **options["rates"])
    devices = described_devices(topology)
    if not options["search"]:
        return _compile_twice(trace_step(config, devices), topology, rates, options)
    tried, found = [], []
    bar = tqdm(
        list(candidates(config, topology.num_devices)),
        desc="compiling candidates",
        unit="program",
        disable=None,
    )
    for candidate in bar:
        try:
            result = report(trace_step(candidate, devices)(), topology, rates)
            result["config"] = candidate
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            result = {
                "remat": candidate.model.remat,
                "micro_batch_size": candidate.train.micro_batch_size,
                "fits": False,
            }
        tried.append(
            {
                name: result.get(name)
                for name in (
                    "remat",
                    "micro_batch_size",
                    "fits",
                    "peak_gib",
                    "predicted_step_seconds",
                    "predicted_mfu",
                )
            }
        )
        if result["fits"]:
            found.append(result)
    if not found:
        listed = ", ".join(
            f"{item['remat']} x {item['micro_batch_size']}: {item['peak_gib']} GiB"
            for item in tried
        )
        raise ConfigError(
            f"nothing fits into {capacity_gib(topology.hardware):.1f} GiB of {topology.hardware.name} ({listed}); "
            "raise mesh.fsdp or mesh.tensor, or use more devices"
        )
    best = min(found, key=lambda item: item["predicted_step_seconds"])
    return {
        **_compile_twice(trace_step(best["config"], devices), topology, rates, options),
        "search": tried,
    }


def _compile_twice(
    compile_it: Callable[..., Compiled], topology: Topology, rates: Rates, options: dict[str, Any]
) -> dict[str, Any]:
    """Compile, predict each instruction's time, and on GPUs let XLA schedule again with these (kept as a file for training)."""
    compiled = compile_it()
    first = predict(hlo.parse(compiled.text), compiled.mesh, topology, rates)
    added = {}
    if topology.hardware.platform == "gpu" and compiled.config.train.schedule_profile is None:
        path = _output(options, topology, ".pbtxt")
        path.write_text(schedule_profile(first), encoding="utf-8")
        compiled = compile_it(path)
        added = {
            "schedule_profile": str(path),
            "predicted_step_seconds_without_profile": first.seconds,
        }
    if options["hlo"]:
        Path(options["hlo"]).write_text(compiled.text, encoding="utf-8")
    return report(compiled, topology, rates) | added


def _output(options: dict[str, Any], topology: Topology, suffix: str) -> Path:
    folder = Path(options["output"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{str(topology).replace(':', '-')}{suffix}"


def _hardware(topology: Topology, overrides: dict[str, Any]) -> Topology:
    given = {
        name: overrides[f"hardware.{name}"]
        for name in OVERRIDES
        if overrides.get(f"hardware.{name}") is not None
    }
    return dataclasses.replace(topology, hardware=dataclasses.replace(topology.hardware, **given))


def _rates(topology: Topology, options: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Rates that take the place of the accelerator's own, and for the report where each rate comes from: given on the command line,
    else measured (--rates_file), else the default of roofline.py. Raises ConfigError.
    """
    given = {
        name: options[f"rates.{name}"]
        for name in RATE_NAMES
        if options[f"rates.{name}"] is not None
    }
    for name, value in given.items():
        check_rate(f"--rates.{name}", name, value)
    measured = (
        read_rates(options["rates_file"], topology.hardware) if options["rates_file"] else None
    )
    rates = {**(measured.rates if measured else {}), **given}
    sources = {
        name: "given" if name in given else "measured" if name in rates else "default"
        for name in RATE_NAMES
    }
    return rates, {
        "rates_from": sources,
        "rates_file": dataclasses.asdict(measured) if measured else None,
    }


def main(words: list[str]) -> int:
    """`python -m baichuan_jax.plan`."""
    description = "Compile the training step for a cluster that is not there: memory, operations, collectives, predicted speed."
    parser = make_parser("python -m baichuan_jax.plan", description)
    parser.add_argument(
        "--topology",
        default="a800:128x8",
        help="Cluster: a800:128x8 (nodes x GPUs), v5p:4x4x8 (torus), ...",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="Compile every remat policy and rows a pass; keep the fastest that fits.",
    )
    parser.add_argument(
        "--sweep",
        choices=("data",),
        default=None,
        help="Weak scaling: the same rows a device on 8 to 4,096 devices.",
    )
    parser.add_argument(
        "--output", default="plans", metavar="DIR", help="Folder for the report as JSON and PNG."
    )
    parser.add_argument(
        "--json", default=None, metavar="FILE", help="Write the report here as well."
    )
    parser.add_argument(
        "--hlo", default=None, metavar="FILE", help="Write the compiled program's text here."
    )
    for name in OVERRIDES:
        parser.add_argument(
            f"--hardware.{name}",
            type=float,
            default=None,
            help="Instead of the data sheet's (hardware.py).",
        )
    parser.add_argument(
        "--rates_file",
        default=None,
        metavar="FILE",
        help="Rates measured on one GPU (make gpu), instead of roofline.py's.",
    )
    for name in RATE_NAMES:
        parser.add_argument(
            f"--rates.{name}",
            type=float,
            default=None,
            help="Instead of roofline.py's or the rates file's (a share, or us).",
        )
    own = (
        *OWN,
        *(f"hardware.{name}" for name in OVERRIDES),
        *(f"rates.{name}" for name in RATE_NAMES),
    )
    config, options = parse_command(parser, words, own=own)
    topology = _hardware(parse_topology(options["topology"]), options)
    options["rates"], sources = _rates(topology, options)
    absent = missing(topology)
    require(
        not absent,
        f"compiling for {topology.hardware.name} needs {', '.join(absent)}: make plan-deps, or "
        "pip install -r requirements-plan.txt",
    )
    config.check_mesh(config.mesh.resolve(topology.num_devices))
    if options["sweep"]:
        return _sweep(config, topology, words, options)
    if CHILD not in os.environ:
        return _run_child(words, config, topology)
    result = _plan(config, topology, options) | sources
    show(result)
    target = _output(options, topology, ".json")
    for path in [target, *([Path(options["json"])] if options["json"] else [])]:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print(
            f"saved: {target}; its picture is not drawn: matplotlib is not installed (pip install matplotlib)"
        )
    else:
        plot(result, target.with_suffix(".png"))
        print(f"saved: {target} and .png")
    if "schedule_profile" in result:
        print(f"train with this schedule: --train.schedule_profile {result['schedule_profile']}")
    return 0


# What the compilers say, before they read any setting, of a machine without an accelerator.
_NOISE = (
    "All log messages before absl::InitializeLog()",
    "cudart_stub.cc",
    "cuda_executor.cc",
    "Could not find cuda drivers",
    "TPU_ACCELERATOR_TYPE",
    "Logging before InitGoogle()",
    "TPU_WORKER_HOSTNAMES",
    "Source Location Trace",
    "libtpu_init_utils",
    "Very slow compile?",
    "********************************",
)


def _run_child(words: list[str], config: Config, topology: Topology) -> int:
    """Compile in a process of its own, whose environment is set before jax is imported; its words on missing drivers are dropped."""
    command = [sys.executable, "-m", "baichuan_jax.plan", *words]
    with subprocess.Popen(
        command, env=child_environment(config, topology), stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        try:
            for line in child.stderr:
                if not any(noise in line for noise in _NOISE):
                    sys.stderr.write(line)
            return child.wait()
        except KeyboardInterrupt:
            child.wait()
            raise


def _sweep(config: Config, topology: Topology, words: list[str], options: dict[str, Any]) -> int:
    """One plan for each number of nodes; the rows a device stay as they are."""
    require(
        topology.hardware.platform == "gpu",
        "--sweep data takes a GPU topology: its nodes are replicas",
    )
    per_node = topology.shape[1]
    share = config.train.global_batch_size // topology.num_devices
    results = []
    for nodes in [2**n for n in range(10) if 8 <= per_node * 2**n <= 4096]:
        name = f"{topology.hardware.name}:{nodes}x{per_node}"
        target = Path(options["output"]) / f"sweep-{nodes}x{per_node}.json"
        changed = list(
            _without(words, ("--topology", "--sweep", "--json", "--train.global_batch_size"))
        )
        changed += [
            "--topology",
            name,
            "--json",
            str(target),
            f"--train.global_batch_size={share * nodes * per_node}",
        ]
        target.parent.mkdir(parents=True, exist_ok=True)
        code = _run_child(changed, config, parse_topology(name))
        if code:
            return code
        results.append(json.loads(target.read_text(encoding="utf-8")))
    rows = [
        [
            str(r["num_devices"]),
            f"{r['predicted_step_seconds'] * 1e3:.0f}",
            f"{r['predicted_mfu']:.1%}",
            f"{r['seconds']['waiting for collectives'] * 1e3:.1f}",
            f"{r['peak_gib']:.1f}",
        ]
        for r in results
    ]
    Display().table(
        "Weak scaling, predicted", ["devices", "step ms", "MFU", "waited ms", "peak GiB"], rows
    )
    show_rates(results[0])
    if options["json"]:
        Path(options["json"]).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def _without(words: list[str], names: tuple[str, ...]) -> Iterator[str]:
    """Words less some options and their values."""
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word.split("=")[0] in names:
            skip = "=" not in word
        else:
            yield word


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
