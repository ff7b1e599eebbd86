"""What a launch needs before its first step. train.py calls these functions in this order.

Devices are joined to a mesh and checked, the kernels are chosen, the step functions are made; the
tests that are scored during the run are read; speed and MFU get their peak; batches begin where the
restored state is in its data.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from baichuan_jax.checkpoint.local_copies import require_whole
from baichuan_jax.checkpoint.state import RunState
from baichuan_jax.config.schema import Config
from baichuan_jax.data.loader import Loader
from baichuan_jax.data.prepare import Prepared
from baichuan_jax.evaluate.evaluation import Evaluation, Plan
from baichuan_jax.hardware.devices import peak_flops, require_memory
from baichuan_jax.kernels.attention.api import choose_attention
from baichuan_jax.kernels.rms_norm.api import choose_rms_norm
from baichuan_jax.preflight import preflight
from baichuan_jax.resilience.coordination import agree, report_service, require_same
from baichuan_jax.resilience.heartbeats import refuse_beside_supervisors
from baichuan_jax.resilience.launch_files import Launches
from baichuan_jax.resilience.ownership import LEAVING_SECONDS, Claim, owned_together
from baichuan_jax.resilience.placement import Placement
from baichuan_jax.resilience.processes import initialize_processes
from baichuan_jax.resilience.watch import Watch
from baichuan_jax.runs.console import Display
from baichuan_jax.sharding import make_mesh
from baichuan_jax.step import Steps, make_steps
from baichuan_jax.training.summary import Choices, Kernels
from baichuan_jax.training.throughput import Throughput
from baichuan_jax.xla_flags import apply_flags, keep_compiled


@contextlib.contextmanager
def own_run(config: Config, watch: Watch) -> Iterator[Claim | None]:
    """Own the run's folder on behalf of all its processes; see resilience/ownership.py.

    Raises ConfigError, on all of them, where another launch or a supervisor is at work there.
    """
    folder = config.run_path
    launches = Launches(folder.absolute() / "attempts")
    if watch.launch is None:
        # Between two launches of a supervisor no process of it owns the folder.
        agree("supervisors", lambda: refuse_beside_supervisors(launches, str(folder)))
    with owned_together(
        launches.lock,
        f"run_dir={str(folder)!r}",
        "give this run a folder of its own with --run_dir",
        silence=2 * config.resilience.silence_seconds,
        launch=watch.launch,
        tolerance=LEAVING_SECONDS if report_service() is not None else 0.0,
    ) as claim:
        yield claim


def join_processes(config: Config) -> dict[str, str]:
    """Connect the processes of the run. Returns the flags of XLA that were added, and why."""
    # Before jax starts, which reads them once.
    flags = apply_flags(config)
    # Before anything asks for devices: from here on jax knows those of all processes.
    initialize_processes(config.distributed, config.resilience)
    return flags


def start_devices(
    config: Config, flags: dict[str, str], watch: Watch
) -> tuple[int, Config, Steps, Choices, Display]:
    """Make the mesh and the steps on it, and check the hosts.

    Returns the number of this launch, and the configuration with its mesh resolved. Raises
    ConfigError where the devices, a forced kernel or local_dir do not fit it, and what preflight
    finds wrong.
    """
    mesh = make_mesh(config.mesh)
    # Only now is the platform known, and a CPU keeps no programs.
    not_kept = keep_compiled(config, mesh.devices.flat[0].platform)
    # Before the kernels are chosen, which depends on the size of the context axis.
    config = _resolve(config, mesh.size)
    # Before any step is traced, which takes minutes where there are many blocks.
    require_memory(config, config.mesh, jax.local_devices()[0])
    # Chosen here for the messages; each operator chooses again by itself, with the same answer.
    choices = Choices(_choose_kernels(config), flags)
    display = Display(active=jax.process_index() == 0)
    steps = make_steps(config, mesh)
    # Before text is packed, which may take hours.
    if config.checkpoint.local_dir is not None:
        require_whole(steps.abstract_state)
    # From here on the other processes are watched: the checks below are the first collectives.
    number = watch.join()
    _refuse_other_settings(config)
    for warning in [*filter(None, [not_kept]), *preflight(config).warnings]:
        display.say(warning, style="yellow")
    return number, config, steps, choices, display


def _refuse_other_settings(config: Config) -> None:
    """Raise ConfigError where this host was given other settings than process 0's.

    Of what decides the program and the batches; folders and numbers of workers may differ.
    """
    sections = dataclasses.asdict(config)
    own = {
        f"{section}.{name}": value
        for section in ("model", "train", "optimizer", "mesh", "kernels")
        for name, value in sections[section].items()
    }
    own["data.train"] = list(config.data.train.values())
    own["data.validation"] = list(config.data.validation.values())
    own["data.document_mask"] = config.data.document_mask
    require_same("settings", own, "give all hosts the same configuration file and options")


def _resolve(config: Config, num_devices: int) -> Config:
    """The configuration on these devices. Raises ConfigError where they do not divide it.

    `full` is the mesh that the run would have on all its hosts: on fewer, each device takes more
    micro-batches instead of more rows in one.
    """
    processes = Placement.from_environment().full_processes or jax.process_count()
    full = config.mesh.resolve(num_devices * processes // jax.process_count())
    resolved = dataclasses.replace(config, mesh=config.mesh.resolve(num_devices)).on_part(full)
    resolved.check_mesh(resolved.mesh)
    return resolved


def _choose_kernels(config: Config) -> Kernels:
    """The implementation of each operator. Raises ConfigError where a forced one cannot serve."""
    # All devices of a mesh are of one kind: preflight has compared them.
    model, device = config.model, jax.devices()[0]
    return {
        "attention": choose_attention(
            config.kernels.attention,
            device=device,
            dtype=model.dtype,
            head_dim=model.head_dim,
            masked=config.data.document_mask,
            length=config.train.context_length,
            context=config.mesh.context,
        ),
        "rms_norm": choose_rms_norm(
            config.kernels.rms_norm, device=device, dtype=model.dtype, width=model.hidden_size
        ),
    }


def read_tests(config: Config, prepared: Prepared) -> list[Evaluation]:
    """The tests that are scored during the run. Raises ConfigError for files that are not right."""
    # Read now and not at the first evaluation: a wrong file ends the launch before its first step.
    only, limit = config.evaluate.subjects, config.evaluate.limit
    tests = [
        Evaluation(Plan(task, folder, subjects=only.get(task), limit=limit), prepared.tokenizer)
        for task, folder in config.evaluate.tasks.items()
    ]
    # Other questions would make other batches, and the processes would wait for each other.
    require_same("evaluate.tasks", [test.settings["data_sha256"] for test in tests])
    return tests


def open_throughput(config: Config, steps: Steps) -> Throughput:
    """Speed and MFU on these devices; on a CPU their peak is measured, which takes 0.3 s."""
    peak, mfu_of = peak_flops(config, jax.devices()[0])
    return Throughput(config, steps.layout.mesh.size, peak, mfu_of)


def open_loader(config: Config, prepared: Prepared, steps: Steps, start: RunState) -> Loader:
    """The batches from the state's progress on."""
    rows = [rows for rows, _ in prepared.train]
    return Loader(
        dict(zip(config.data.train, rows, strict=True)),
        progress=start.progress,
        accumulation_steps=config.accumulation_steps(config.mesh),
        eos_id=prepared.tokenizer.eos_id,
        document_mask=config.data.document_mask,
        sharding=steps.batch_sharding,
        skip=start.skipped,
    )
