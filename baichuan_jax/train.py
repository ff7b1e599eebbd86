"""Train a model: `python -m baichuan_jax.train --config configs/tiny.yaml`.

In a notebook: `train(load_config("configs/tiny.yaml"))`. `_train` below is the order of a launch,
and `train_loop` in training/loop.py its steps: refuse what cannot work, join the other processes,
prepare tokens, build the step, restore a state, then step, evaluate and save until the end. A
launch that is killed at any moment loses nothing that counts: the next one goes on from the newest
checkpoint.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from baichuan_jax.checkpoint.state import RunState
from baichuan_jax.checkpoint.weights import has_checkpoint
from baichuan_jax.config.files import dump_config, make_parser, parse_config
from baichuan_jax.config.schema import Config, ConfigError
from baichuan_jax.data.prepare import Prepared, prepare
from baichuan_jax.data.rows import unigram_entropy
from baichuan_jax.evaluate.evaluation import Evaluation
from baichuan_jax.hf.source import refuse_weights_folder
from baichuan_jax.resilience.causes import Cause
from baichuan_jax.resilience.checkpoint_interval import fault_history
from baichuan_jax.resilience.clock import Clock
from baichuan_jax.resilience.coordination import agree
from baichuan_jax.resilience.exits import run_command, signals
from baichuan_jax.resilience.processes import initialize_processes
from baichuan_jax.resilience.watch import Watch
from baichuan_jax.runs.console import Display, lasting_streams
from baichuan_jax.runs.events import Completed, Measured, latest
from baichuan_jax.runs.files import require_writable
from baichuan_jax.runs.folder import Run, refuse_other_files
from baichuan_jax.runs.metrics import Writer, seconds_since_process_start
from baichuan_jax.runs.output import Output
from baichuan_jax.training.changes import REMEDY, show_changes, show_other_tests
from baichuan_jax.training.evaluator import Evaluator
from baichuan_jax.training.loop import Launch, StopRequest, train_loop
from baichuan_jax.training.numerics import NumericsGuard
from baichuan_jax.training.profiler import Profiler
from baichuan_jax.training.recorder import Recorder
from baichuan_jax.training.restore import (
    find_initial_weights,
    open_store,
    plan_restore,
    restore,
)
from baichuan_jax.training.setup import (
    join_processes,
    open_loader,
    open_throughput,
    own_run,
    read_tests,
    start_devices,
)
from baichuan_jax.training.summary import (
    close_files,
    conclude,
    explain_failure,
    record_start,
    show_complete,
)


def train(config: Config) -> Run:
    """Train to the end, or until asked to stop (`run.status` says).

    Raises ConfigError for a wrong setting or input, NumericsError, BadHost, SaveFailed, and
    PeerFailed where another process of the run failed.
    """
    run = Run(config.run_path)
    with lasting_streams():
        _train(config, run, Clock())
    return run


def _train(config: Config, run: Run, clock: Clock) -> bool:
    """Whether the run is complete now, by this process's loop: process 0 may still be writing."""
    if _is_complete(config, run):
        return True
    # Before jax starts and anything is packed: what cannot be used or written is found in a second.
    try:
        refuse_weights_folder(run.path)
        refuse_other_files(run.path, config.tokenizer.path, has_checkpoint(run.path))
        require_writable(run.path, "run_dir")
    except ConfigError as error:
        # The run's other processes would wait for this one, so it comes and tells them.
        initialize_processes(config.distributed, config.resilience, error)
        raise
    with (
        Watch(config.resilience, clock, run.path / "attempts") as watch,
        contextlib.ExitStack() as held,
    ):
        with clock("start"):
            flags = join_processes(config)
            # Before anything is written: of two launches in one folder the second is refused.
            claim = held.enter_context(own_run(config, watch))
            number, config, steps, choices, display = start_devices(config, flags, watch)
        with clock("pack"):
            first = display.active
            source = find_initial_weights(config)
            prepared = prepare(config, source, writer=first, progress=first, say=display.say)
            tests = read_tests(config, prepared)
        with clock("start"):
            output, before = _open_run(config, run, display)
            # Before `started` is written: this launch is no fault yet.
            history = fault_history(run.events)
        with _closing(config, run, clock, watch, output) as resources:
            with clock("start"):
                throughput = open_throughput(config, steps)
                choices = dataclasses.replace(choices, mfu_of=throughput.mfu_of)
                record_start(config, steps.layout.mesh, prepared, number, choices, output)
                _keep_tokenizer(run, prepared, output)
            with clock("restore"):
                plan = plan_restore(config, run)
                tokenizer = prepared.tokenizer.hash
                store = open_store(
                    config, run, plan, steps, tokenizer, watch.host, history, clock, output
                )
                resources.callback(store.close)
                start = restore(config, prepared, steps, store, plan.rollback, output)
            with clock("start"):
                batches = open_loader(config, prepared, steps, start)
                resources.callback(batches.close)
                _begin(config, run, before, prepared, tests, start, output)
                # Steps after the restored one are done again and written again.
                losses, eval_loss = run.losses(start.step), run.curve("eval_loss").get(start.step)
                recorder = Recorder(output, clock, throughput, losses, eval_loss)
                guard = NumericsGuard(output, config.resilience, losses, start.step)
                evaluator = Evaluator(config, steps, prepared, tests, recorder, output)
                profiler = Profiler(config.profile, run.path / "profile", config.train.num_steps)
                launch = Launch(
                    config, steps, store, recorder, guard, evaluator, profiler, clock, watch, output
                )
            stop = StopRequest(claim)
            with signals(stop.make, profiler.request):
                end, completed = train_loop(launch, batches, start, stop)
            if completed:
                with clock("finish"):
                    conclude(launch, run, end, unigram_entropy(prepared.train))
    return completed


@contextlib.contextmanager
def _closing(
    config: Config, run: Run, clock: Clock, watch: Watch, output: Output
) -> Iterator[contextlib.ExitStack]:
    """Close what is given to the stack at the end; record and report an error that ends the launch.

    After an error among several processes only files are closed: Orbax and the loader would wait
    for the other processes.
    """
    resources, ended_well = contextlib.ExitStack(), False
    try:
        yield resources
        # Everything is saved by now.
        with clock("finish"), output.leaving_out("the end of the run's threads"):
            resources.close()
        ended_well = True
    except BaseException as error:
        # Before anything else: the other processes wait for this one until they hear of it.
        watch.fail(error)
        advice = explain_failure(error, config, run, watch.step, output)
        if jax.process_count() == 1:
            # What fails in them now is a consequence.
            with contextlib.suppress(Exception):
                resources.close()
        if advice is not None:
            raise ConfigError(advice) from error
        raise
    finally:
        close_files(output, ended_well)


def _is_complete(config: Config, run: Run) -> bool:
    """Whether the run has all its steps; then say so, without starting jax.

    Raises ConfigError where the settings are of another run.
    """
    completed = latest(run.events, Completed)
    if completed is None or run.status != "completed" or completed.step < config.train.num_steps:
        return False
    show_complete(Display(), run, completed, _settings_before(run), config)
    return True


def _settings_before(run: Run) -> str | None:
    """The settings of the run's last launch, as YAML; None for a fresh run."""
    try:
        return run.settings
    except ConfigError as error:
        raise ConfigError(f"{error}; {REMEDY}") from None


def _open_run(config: Config, run: Run, display: Display) -> tuple[Output, str | None]:
    """Make the run's folder; also the settings of its last launch, as YAML, for process 0.

    Raises ConfigError on all processes where process 0 cannot write or read its records.
    """
    warn, before = lambda text: display.say(text, "yellow"), None
    writer = Writer(run.path, config, warn, active=False)

    def begin() -> None:
        nonlocal before, writer
        run.path.mkdir(parents=True, exist_ok=True)
        writer, before = Writer(run.path, config, warn), _settings_before(run)

    agree("the run's records", begin)
    return Output(writer, display), before


def _keep_tokenizer(run: Run, prepared: Prepared, output: Output) -> None:
    """The run's own copy: generate and export need no other folder, whatever becomes of the cache.

    After `started`: a file of this name in a folder without that event is none of the run's.
    """
    if output.display.active:
        content = Path(prepared.tokenizer.path).read_bytes()
        output.writer.file(run.path / "tokenizer.model", content)


def _begin(
    config: Config,
    run: Run,
    before: str | None,
    prepared: Prepared,
    tests: list[Evaluation],
    start: RunState,
    output: Output,
) -> None:
    """Open the trackers behind `start`; say what differs from `before`, then keep the settings."""
    output.writer.begin(start.step + 1)
    show_changes(run, before, config, start.step, output)
    validation = zip(config.data.validation, prepared.validation, strict=True)
    measured = Measured(
        validation={name: rows.identity for name, (rows, _) in validation},
        tasks={test.plan.task: test.settings["data_sha256"] for test in tests},
    )
    show_other_tests(run, measured, start.step, start.progress, output)
    # Only now: a launch that is killed before this says them again.
    output.writer.file(run.path / "config.yaml", dump_config(config).encode())


def main(argv: list[str]) -> int:
    """The command. Returns its exit code."""
    clock = Clock()
    clock.add("imports", seconds_since_process_start())
    parser = make_parser(
        "python -m baichuan_jax.train",
        "Train a Baichuan model. Started again with the same settings, it goes on where it was: "
        "--config configs/tiny.yaml trains a small model on bundled text in minutes on a CPU.",
    )
    config = parse_config(parser, argv)
    completed = _train(config, Run(config.run_path), clock)
    return (Cause.COMPLETED if completed else Cause.PREEMPTED).exit_code


if __name__ == "__main__":
    run_command(
        lambda: main(sys.argv[1:]),
        interrupted="nothing was saved after the last checkpoint",
        joins=True,
    )
