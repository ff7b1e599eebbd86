"""`python -m baichuan_jax.plan`: memory, operations and speed of a training step on a topology.

The step is compiled ahead of time, without the topology's devices. The story of one plan: parse the
options, compile in a child process (child.py), trace and compile the step (ahead_of_time.py),
predict its time (prediction.py), compile again with that prediction, report the faster of the two
(report.py).
"""

import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonargparse

from baichuan_jax.config.files import config_files, make_parser, parse_command
from baichuan_jax.config.parsing import quote_path, read_json
from baichuan_jax.config.schema import Config, ConfigError, MeshConfig, between, require
from baichuan_jax.hardware.accelerators import Hardware, Topology, parse_topology
from baichuan_jax.plan import hlo
from baichuan_jax.plan.ahead_of_time import Compiled, described_devices, missing, trace_step
from baichuan_jax.plan.child import CHILD, run_child
from baichuan_jax.plan.interval import SCHEDULE
from baichuan_jax.plan.prediction import predict, schedule_profile
from baichuan_jax.plan.rates import (
    NETWORK,
    RATE_NAMES,
    Assumption,
    assumptions_for,
    check_rate,
    rates_of,
    read_rates,
)
from baichuan_jax.plan.report import (
    plot,
    report,
    show,
    show_assumptions,
    show_network,
    show_sweep,
    spread_report,
)
from baichuan_jax.plan.search import search
from baichuan_jax.resilience.exits import run_command
from baichuan_jax.runs.files import refuse_inputs, require_writable, writable_file, write_atomically
from baichuan_jax.xla_flags import message_options

# Numbers of the table of accelerators that an option can replace; the network also for a node.
OVERRIDES = [item.name for item in dataclasses.fields(Hardware) if item.type in (float, "float")]
OWN = (
    *("topology", "search", "sweep", "output", "json", "hlo", "rates_file"),
    *(f"hardware.{name}" for name in (*OVERRIDES, "node_gbps")),
    *(f"rates.{name}" for name in RATE_NAMES),
)


def main(argv: list[str]) -> int:
    """Plan one topology, or with --sweep several; see --help. Returns the exit code."""
    config, options = parse_command(_make_parser(), argv, own=OWN)
    # jax's compiler is handed the path of the profile, too.
    require_writable(options["output"], "output")
    topology = _topology(options)
    _refuse_inputs(argv, config, topology, options)
    assumptions, sources = _assumptions(topology, options)
    absent = missing(topology)
    require(
        not absent,
        f"compiling for {topology.hardware.name} needs {', '.join(absent)}: make plan-deps, or "
        "pip install -r requirements-plan.txt",
    )
    # Before anything is compiled, which takes minutes.
    mesh = config.mesh.resolve(topology.num_devices)
    if not options["search"]:  # which leaves out the sizes of mesh.state that cannot be
        config.check_mesh(mesh)
        _check_copies(config, mesh, topology)
    # First, and once: the child that compiles prints the rest. One node uses no network.
    network = assumptions.get(NETWORK)
    several = topology.num_devices > topology.devices_per_node or options["sweep"]
    if network is not None and several and CHILD not in os.environ:
        show_network(topology, assumed=network.low < network.high)
    if options["sweep"]:
        return _sweep(config, topology, argv, options)
    # The flags must be in the environment before jax is imported, which has happened here.
    if CHILD not in os.environ:
        return run_child(argv, config, topology)
    result = _plan(config, topology, assumptions, options) | sources
    show(result)
    _save(result, topology, options)
    return 0


def _check_copies(config: Config, mesh: MeshConfig, topology: Topology) -> None:
    """Refuse what training would: copies on hosts of a state that lies across hosts."""
    whole = mesh.state * mesh.fsdp * mesh.context * mesh.tensor <= topology.devices_per_node
    require(
        config.checkpoint.local_dir is None or whole,
        f"checkpoint.local_dir needs the whole state on each host, and mesh.state={mesh.state} x "
        f"mesh.fsdp={mesh.fsdp} x mesh.tensor={mesh.tensor} lies across several; set mesh.state 1, "
        "or checkpoint.local_dir null",
    )


def _make_parser() -> jsonargparse.ArgumentParser:
    # Every setting of a run is an option too, so that a plan is made for what would be trained.
    parser = make_parser(
        "python -m baichuan_jax.plan",
        "Ahead-of-time compilation of the training step for a topology: memory, operations, "
        "collectives, predicted speed.",
    )
    add = parser.add_argument
    add("--topology", default="a800:128x8", help="a800:128x8 (nodes x GPUs), v5p:4x4x8 (a torus).")
    add(
        "--search",
        action="store_true",
        help="Compile every remat policy and rows a pass, then sizes of mesh.state; keep the "
        "fastest that fits.",
    )
    add(
        "--sweep",
        choices=("data",),
        default=None,
        help="Weak scaling: the same rows a device on 8 to 4,096 devices.",
    )
    add(
        "--output",
        type=str,
        default="plans",
        metavar="DIR",
        help="Folder for the report as JSON and PNG.",
    )
    file: dict[str, Any] = {"type": writable_file, "default": None, "metavar": "FILE"}
    add("--json", **file, help="Write the report here as well.")
    add("--hlo", **file, help="Write the compiled program's text here.")
    for name in OVERRIDES:
        add(f"--hardware.{name}", type=between(), help="Instead of the data sheet's.")
    network = "The network of a whole node, instead of inter_node_gbps, which is a GPU's share."
    add("--hardware.node_gbps", type=between(), help=network)
    add(
        "--rates_file",
        default=None,
        metavar="FILE",
        help="Rates measured on one GPU (make gpu), instead of the defaults.",
    )
    for name in RATE_NAMES:
        add(
            f"--rates.{name}",
            type=float,
            default=None,
            help="Instead of the default or the rates file's (a share, or us).",
        )
    return parser


def _refuse_inputs(
    argv: list[str], config: Config, topology: Topology, options: dict[str, Any]
) -> None:
    """Raise ConfigError where the report would replace what the plan is made of."""
    suffixes = [".json", ".png"]
    profile, rates = config.train.schedule_profile, options["rates_file"]
    if profile is None:
        suffixes.append(".pbtxt")
    outputs: dict[str, list[Path | str | None]] = {
        "--output": [_output(options, topology, suffix) for suffix in suffixes],
        "--json": [options["json"]],
        "--hlo": [options["hlo"]],
    }
    if options["sweep"]:
        outputs["--output"] = list(_sweep_files(topology, options).values())
    read: dict[str, list[Path | str]] = {
        "--config": [*config_files(argv)],
        "--rates_file": [] if rates is None else [rates],
        "train.schedule_profile": [] if profile is None else [profile],
    }
    refuse_inputs(outputs, read)


def _topology(options: dict[str, Any]) -> Topology:
    """The topology of the options, with the numbers that they replace. Raises ConfigError."""
    topology = parse_topology(options["topology"])
    given = {name: options[f"hardware.{name}"] for name in OVERRIDES if name != NETWORK}
    given = {name: value for name, value in given.items() if value is not None}
    topology = dataclasses.replace(
        topology, hardware=dataclasses.replace(topology.hardware, **given)
    )
    return topology.with_network(options[f"hardware.{NETWORK}"], options["hardware.node_gbps"])


def _assumptions(
    topology: Topology, options: dict[str, Any]
) -> tuple[dict[str, Assumption], dict[str, Any]]:
    """What the prediction assumes, and for the report where each rate comes from.

    A rate is given on the command line, or else measured (--rates_file), or else the default.
    Raises ConfigError.
    """
    # Checked like those of a file: a rate of 0 would divide by zero after minutes of compilation.
    given = {name: options[f"rates.{name}"] for name in RATE_NAMES}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        check_rate(f"--rates.{name}", name, value)
    path = options["rates_file"]
    measured = read_rates(path, topology.hardware) if path else None
    known = measured.rates if measured else {}
    sources = dict.fromkeys(RATE_NAMES, "default")
    sources |= dict.fromkeys(known, "measured") | dict.fromkeys(given, "given")
    if any(options[f"hardware.{name}"] for name in (NETWORK, "node_gbps")):
        given[NETWORK] = topology.hardware.inter_node_gbps
    return assumptions_for(topology, known, given), {
        "rates_from": sources,
        "rates_file": dataclasses.asdict(measured) if measured else None,
    }


def _plan(
    config: Config,
    topology: Topology,
    assumptions: dict[str, Assumption],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Compile and report; with --search the fastest predicted candidate that fits."""
    devices = described_devices(topology)
    # The search compiles each candidate once; the best one is compiled again, with its profile.
    tried = {}
    if options["search"]:
        config, tried = search(config, topology, devices, rates_of(assumptions))
    traced = trace_step(config, devices, message_options(config, topology))
    return _compile_twice(traced, topology, assumptions, options) | tried


# By which share a profile must shorten the step: less is not worth a file that belongs to one
# version of XLA.
PROFILE_GAIN = 0.002


def _compile_twice(
    compile_step: Callable[..., Compiled],
    topology: Topology,
    assumptions: dict[str, Assumption],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Compile, and on GPUs compile again with the predicted time of each instruction.

    XLA's scheduler then knows how long each collective takes, which need not make a faster program.
    The faster one is reported, and the predicted times are kept as a file, for training, only where
    theirs is.
    """
    compiled, rates = compile_step(), rates_of(assumptions)
    result = report(compiled, topology, rates)
    # Only XLA's GPU scheduler reads such a profile; a given one is in the flags already.
    if topology.hardware.platform == "gpu" and compiled.config.train.schedule_profile is None:
        times = schedule_profile(predict(hlo.parse(compiled.text), compiled.mesh, topology, rates))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "profile.pbtxt"
            path.write_text(times)
            with_profile = compile_step(path)
        second = report(with_profile, topology, rates)
        without, seconds = (each["predicted_step_seconds"] for each in (result, second))
        both = {
            "predicted_step_seconds_without_profile": without,
            "predicted_step_seconds_with_profile": seconds,
        }
        kept = _output(options, topology, ".pbtxt")
        if seconds * (1 + PROFILE_GAIN) < without and second["fits"] >= result["fits"]:
            write_atomically(kept, times.encode())
            compiled, result = with_profile, second | both | {"schedule_profile": str(kept)}
            # A profile of wrong times may help as little as none.
            source = "this program compiled without its profile"
            lost = Assumption(0.0, 0.0, without / seconds - 1, source)
            assumptions = assumptions | {SCHEDULE: lost}
        else:
            # An earlier plan's would look like this one's.
            kept.unlink(missing_ok=True)
            result = result | both
    if options["hlo"]:
        write_atomically(Path(options["hlo"]), compiled.text.encode())
    return result | spread_report(result, compiled, topology, assumptions)


def _output(options: dict[str, Any], topology: Topology, suffix: str) -> Path:
    # A colon is not allowed in file names everywhere.
    folder = Path(options["output"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{str(topology).replace(':', '-')}{suffix}"


def _save(result: dict[str, Any], topology: Topology, options: dict[str, Any]) -> None:
    """Write the report as JSON and, with matplotlib, as a figure."""
    target = _output(options, topology, ".json")
    for path in [target, *([Path(options["json"])] if options["json"] else [])]:
        write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    if importlib.util.find_spec("matplotlib") is None:
        why = "matplotlib is not installed (pip install matplotlib)"
        print(f"saved: {target}; its figure is not drawn: {why}")
    else:
        plot(result, target.with_suffix(".png"))
        print(f"saved: {target} and .png")
    if "schedule_profile" in result:
        profile = quote_path(result["schedule_profile"])
        print(f"train with this schedule: --train.schedule_profile {profile}")


def _sweep(config: Config, topology: Topology, argv: list[str], options: dict[str, Any]) -> int:
    """One plan for each number of nodes; the rows a device stay as they are."""
    require(
        topology.hardware.platform == "gpu",
        "--sweep data takes a GPU topology: its nodes are replicas",
    )
    # Weak scaling: the batch grows with the devices, and with it the data axis.
    per_node = topology.shape[1]
    share = config.train.global_batch_size // topology.num_devices
    replaced = ("--topology", "--sweep", "--json", "--train.global_batch_size")
    kept = list(_without(argv, replaced))
    results = []
    # Each size in its own child: the flags depend on the number of nodes.
    # A file for each size: the user's --json gets all of them, once they are there.
    for nodes, target in _sweep_files(topology, options).items():
        name = f"{topology.hardware.name}:{nodes}x{per_node}"
        try:
            config.mesh.resolve(nodes * per_node)
        except ConfigError as error:
            print(f"{name} is left out: {error}")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        rows = f"--train.global_batch_size={share * nodes * per_node}"
        changed = [*kept, "--topology", name, "--json", str(target), rows]
        code = run_child(changed, config, parse_topology(name))
        if code:
            return code
        results.append(read_json(target))
    show_sweep(results)
    # Of one for all, the largest: the accelerator and the options are the same.
    show_assumptions(results[-1])
    if options["json"]:
        write_atomically(Path(options["json"]), (json.dumps(results, indent=1) + "\n").encode())
    return 0


def _sweep_files(topology: Topology, options: dict[str, Any]) -> dict[int, Path]:
    """The report of each number of nodes, for 8 to 4,096 devices."""
    per_node = topology.shape[1]
    return {
        2**n: Path(options["output"]) / f"sweep-{2**n}x{per_node}.json"
        for n in range(10)
        if 8 <= per_node * 2**n <= 4096
    }


def _without(argv: list[str], names: tuple[str, ...]) -> Iterator[str]:
    """argv without some options and their values."""
    # An option's value is joined by "=" or is the next argument.
    skip = False
    for argument in argv:
        if skip:
            skip = False
        elif argument.split("=")[0] in names:
            skip = "=" not in argument
        else:
            yield argument


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
