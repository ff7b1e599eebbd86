"""Train a model: `python -m baichuan_jax.train --config configs/tiny.yaml`, or train(load_config(...)) in a notebook.

train() reads from top to bottom: refuse what cannot work, join the other processes, prepare tokens,
build the compiled step, restore or start a state, then step, evaluate and save until the end.
Killed at any moment, the next start goes on from the last checkpoint.
"""

import dataclasses
import os
import sys
from pathlib import Path

import jax

from baichuan_jax.config.files import dump_config, make_parser, parse_config
from baichuan_jax.config.schema import Config, ConfigError
from baichuan_jax.data.prepare import Prepared, prepare
from baichuan_jax.evaluate.evaluation import Evaluation, Plan
from baichuan_jax.hardware.processes import initialize_processes
from baichuan_jax.kernels.attention.api import choose_attention
from baichuan_jax.kernels.rms_norm.api import choose_rms_norm
from baichuan_jax.preflight import preflight
from baichuan_jax.resilience.causes import Cause
from baichuan_jax.resilience.clock import Clock
from baichuan_jax.resilience.exits import run_command, signals
from baichuan_jax.resilience.placement import FULL_VARIABLE
from baichuan_jax.resilience.watch import Watch
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.events import Completed, latest
from baichuan_jax.runs.files import require_writable, write_atomically
from baichuan_jax.runs.folder import Run
from baichuan_jax.runs.metrics import Writer, seconds_since_process_start
from baichuan_jax.sharding import make_mesh
from baichuan_jax.step import make_steps
from baichuan_jax.training.loop import Trainer
from baichuan_jax.training.summary import say_complete
from baichuan_jax.xla_flags import apply_flags, keep_compiled


def train(config: Config) -> Run:
    """Train to the end, or until interrupted (`run.status` tells). Raises ConfigError, NumericsError."""
    return _train(config, Clock())[0]


def _train(config: Config, clock: Clock) -> tuple[Run, bool]:
    """The run, and whether it is complete: so this process knows it, whose word must not wait for process 0's in the run's folder."""
    run = Run(config.run_path)
    if _is_complete(config, run):
        return run, True
    require_writable(run.path, "run_dir")
    with Watch(config.resilience, clock, run.path / "attempts") as watch:
        with clock("start"):
            flags = apply_flags(config)
            initialize_processes(config.distributed, config.resilience)
            mesh = make_mesh(config.mesh)
            keep_compiled(config, mesh.devices.flat[0].platform)
            config = _resolve(config, mesh.size)
            kernels = _choose_kernels(config)
            first = jax.process_index() == 0
            display = Display(active=first)
            steps = make_steps(config, mesh)
            watch.join()
            for warning in preflight(config).warnings:
                display.say(warning, style="yellow")
        with clock("pack"):
            prepared = prepare(config, writer=first, progress=first, say=display.say)
            tests = _read_tests(config, prepared)
        with clock("start"):
            writer = _open_run(config, run, prepared, display, active=first)
            trainer = Trainer(config, run, steps, prepared, tests, clock, watch, writer, display)
        try:
            with clock("start"):
                trainer.describe(flags, kernels)
            with clock("restore"):
                trainer.restore_or_start()
            with signals(trainer.ask_to_stop, trainer.tracer.request):
                completed = trainer.loop()
            with clock("finish"):
                if completed:
                    trainer.conclude()
                trainer.close()
        except BaseException as error:
            watch.fail(error)
            advice = trainer.explain(error)
            trainer.close(failed=True)
            if advice is not None:
                raise ConfigError(advice) from error
            raise
    return run, completed


def _resolve(config: Config, num_devices: int) -> Config:
    """The configuration on these devices. Raises ConfigError where they do not divide mesh or batch."""
    full = (
        num_devices * int(os.environ.get(FULL_VARIABLE, jax.process_count())) // jax.process_count()
    )
    resolved = dataclasses.replace(config, mesh=config.mesh.resolve(num_devices)).on_part(
        config.mesh.resolve(full)
    )
    resolved.check_mesh(resolved.mesh)
    return resolved


def _choose_kernels(config: Config) -> dict[str, tuple[str, str]]:
    """The implementation of each operator that will run, and why. Raises ConfigError where a forced one cannot."""
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


def _is_complete(config: Config, run: Run) -> bool:
    """Whether this run ended before; then say so, without starting jax."""
    completed = latest(run.events, Completed)
    if completed is None or run.status != "completed" or completed.step < config.train.num_steps:
        return False
    say_complete(Display(), run, completed)
    return True


def _read_tests(config: Config, prepared: Prepared) -> list[Evaluation]:
    """The tests that are scored during the run. Raises ConfigError where their files are not as they should be."""
    only, limit = config.evaluate.subjects, config.evaluate.limit
    return [
        Evaluation(Plan(task, folder, subjects=only.get(task), limit=limit), prepared.tokenizer)
        for task, folder in config.evaluate.tasks.items()
    ]


def _open_run(
    config: Config, run: Run, prepared: Prepared, display: Display, active: bool
) -> Writer:
    """Create the run's folder, put configuration and tokenizer into it, say what changed since its last launch."""
    if active:
        run.path.mkdir(parents=True, exist_ok=True)
        file = run.path / "config.yaml"
        now = dump_config(config)
        if file.exists() and (before := file.read_text(encoding="utf-8")) != now:
            changed = [line.strip() for line in now.splitlines() if line not in before.splitlines()]
            display.say(
                f"settings differ from this run's last launch: {', '.join(changed)}", style="yellow"
            )
        write_atomically(file, now.encode())
        write_atomically(run.path / "tokenizer.model", Path(prepared.tokenizer.path).read_bytes())
    writer = Writer(run.path, config, active)
    for warning in writer.warnings:
        display.say(warning, style="yellow")
    return writer


def main(words: list[str]) -> int:
    """The command. Returns its exit code."""
    clock = Clock()
    clock.add("imports", seconds_since_process_start())
    parser = make_parser(
        "python -m baichuan_jax.train",
        "Train a Baichuan model. Started again with the same settings, it goes on where it was: --config configs/tiny.yaml "
        "trains a small model on bundled text in minutes on a CPU.",
    )
    _, completed = _train(parse_config(parser, words), clock)
    return 0 if completed else Cause.PREEMPTED.exit_code


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
