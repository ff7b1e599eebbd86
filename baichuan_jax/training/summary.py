"""What a launch shows: devices and choices at its start, result and next commands at its end."""

import dataclasses
import importlib.util
import math
import statistics

import jax
from jax.sharding import Mesh

from baichuan_jax.checkpoint.state import RunState
from baichuan_jax.config.messages import hide_secrets
from baichuan_jax.config.parsing import quote_path
from baichuan_jax.config.schema import Config
from baichuan_jax.data.prepare import Prepared, shared_in_training, validation_in_training
from baichuan_jax.data.rows import unigram_entropy
from baichuan_jax.resilience.causes import SaveFailed
from baichuan_jax.resilience.clock import EVALUATE
from baichuan_jax.resilience.waits import announced
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.events import Completed, Failed, Sampled, Started
from baichuan_jax.runs.files import write_atomically
from baichuan_jax.runs.folder import Run
from baichuan_jax.runs.metrics import WANDB_SECONDS
from baichuan_jax.runs.output import Output
from baichuan_jax.sharding import crosses_nodes
from baichuan_jax.training.changes import more_steps, show_unused_changes
from baichuan_jax.training.loop import Launch

# Steps whose mean loss is the result: single steps differ by their data.
LAST_LOSSES = 20
# Operator -> the implementation that was chosen, and why.
Kernels = dict[str, tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a launch chose: kernels, flags with their reasons, and what MFU is a share of."""

    kernels: Kernels
    flags: dict[str, str]
    mfu_of: str = ""


def record_start(
    config: Config,
    mesh: Mesh,
    prepared: Prepared,
    number: int,
    choices: Choices,
    output: Output,
) -> None:
    """Show and record what launch `number` runs on, and every choice with its reason."""
    rows = {str(rows.path): len(rows) for rows, _ in prepared.train}
    display, kernels = output.display, choices.kernels
    _show_start(display, config, mesh, sum(rows.values()) * config.train.context_length)
    _show_left_out(display, config, prepared)
    for operator, (name, reason) in kernels.items():
        display.say(f"{operator}: {name} ({reason})")
    display.say(f"MFU: {choices.mfu_of}")
    for flag, reason in choices.flags.items():
        display.say(f"{flag}: {reason}")
    for axis in crosses_nodes(mesh):
        display.say(
            f"mesh axis {axis} crosses processes: its collectives leave the node", style="yellow"
        )
    event = Started(
        attempt=number,
        jax=jax.__version__,
        device=mesh.devices.flat[0].device_kind,
        devices=mesh.size,
        processes=jax.process_count(),
        mesh=dict(mesh.shape),
        attention=kernels["attention"][0],
        attention_reason=kernels["attention"][1],
        rms_norm=kernels["rms_norm"][0],
        rms_norm_reason=kernels["rms_norm"][1],
        xla_flags=list(choices.flags),
        mfu_of=choices.mfu_of,
        parameters=config.model.num_parameters,
        tokenizer=prepared.tokenizer.hash,
        tokenizer_loses=list(prepared.tokenizer.losses),
        rows=rows,
        unigram_entropy=unigram_entropy(prepared.train),
    )
    output.event(event)
    # Nothing is lost yet, and the run's name on hosts' disks is its first event's time.
    output.writer.require_events()


def _show_start(display: Display, config: Config, mesh: Mesh, text_tokens: int) -> None:
    train, device = config.train, mesh.devices.flat[0]
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    display.say(
        f"{config.model.num_parameters:,} parameters, {config.model.dtype}; {mesh.size} x "
        f"{device.device_kind} in {jax.process_count()} process(es): {axes}"
    )
    accumulation = config.accumulation_steps(config.mesh)
    micro = f" in {accumulation} micro-batches" if accumulation > 1 else ""
    tokens = train.num_steps * train.global_batch_size * train.context_length
    display.say(
        f"batch of {train.global_batch_size} x {train.context_length} tokens{micro}; "
        f"{train.num_steps} such steps = {tokens:,} tokens, {tokens / text_tokens:.2f} times the "
        f"text's {text_tokens:,}"
    )
    # One copy over several nodes is refused (Config.check_mesh). A run may shrink to one replica.
    if config.resilience.check_every > 0 and mesh.shape["data"] == 1:
        display.say(
            f"resilience.check_every={config.resilience.check_every}: nothing is compared, since "
            "there is one replica",
            style="yellow",
        )


def _show_left_out(display: Display, config: Config, prepared: Prepared) -> None:
    """Text that is not trained on or not validated on, and text that should not be both."""
    # Every host would look at every file of the text, on storage that they share.
    if not display.active:
        return
    for rows, _ in [*prepared.train, *prepared.validation]:
        if rows.warning:
            display.say(rows.warning, style="yellow")
    there = sum(len(rows) for rows, _ in prepared.validation)
    read = config.evaluate.num_batches * config.train.global_batch_size
    if read < there:
        display.say(
            f"validation reads the first {read:,} of {there:,} rows, in turn from every corpus: "
            f"evaluate.num_batches={config.evaluate.num_batches}"
        )
    if both := validation_in_training(config, prepared.text):
        display.say(
            f"{len(both)} files or folders are both in data.train and in data.validation, such as "
            f"{both[0]}: the validation loss is partly of text that was trained on",
            style="yellow",
        )
    if shared := shared_in_training(config, prepared.text):
        display.say(
            f"{len(shared)} files or folders are in more than one corpus of data.train, such as "
            f"{shared[0]}: their text is read for each; if that is not meant, name them once",
            style="yellow",
        )


def conclude(launch: Launch, run: Run, end: RunState, entropy: float) -> None:
    """After the last step: the Completed event, loss curve, samples, and what to do next.

    The run is complete first. Whatever fails after that is said, recorded and left out.
    """
    recorder, output = launch.recorder, launch.output
    # A launch that was killed after its last checkpoint and before its evaluation.
    if recorder.eval_loss is None and launch.evaluator.validates:
        with launch.clock(EVALUATE):
            launch.evaluator.evaluate(end.step, end.state.params)
    # The loss of a skipped step may be NaN, and so would be the mean.
    finite = [loss for loss in recorder.losses if math.isfinite(loss)]
    completed = Completed(
        step=end.step,
        # None where no line of metrics is left to read a loss from.
        loss=statistics.fmean(finite[-LAST_LOSSES:]) if finite else None,
        eval_loss=recorder.eval_loss,
        unigram_entropy=entropy,
        seconds=launch.clock.totals(),
        **recorder.throughput.median(),
    )
    output.event(completed)
    if jax.process_index() == 0:
        with output.leaving_out(f"{run.path / 'loss.png'}"):
            _draw(run, output)
    with output.leaving_out("the samples"):
        _sample(launch, end)
    with output.leaving_out("the summary"):
        _show_result(output.display, run, completed, recorder.throughput.mfu_of, launch.config)


def _draw(run: Run, output: Output) -> None:
    """Draw the loss curve, where matplotlib is installed: a run must not fail for a picture."""
    if importlib.util.find_spec("matplotlib") is not None:
        run.plot()
        return
    output.say(
        f"{run.path / 'loss.png'} is not drawn: matplotlib is not installed; pip install "
        "matplotlib, then in Python: from baichuan_jax.runs.folder import Run; "
        f"Run({str(run.path)!r}).plot()",
        style="yellow",
    )


def _sample(launch: Launch, end: RunState) -> None:
    """Let the finished model write, as the settings say."""
    samples = launch.evaluator.sample(end.state.params)
    if samples:
        launch.output.event(Sampled(step=end.step, samples=samples))
    for prompt, text in samples.items():
        launch.output.say(f"\n{prompt!r} continues:", style="bold")
        launch.output.say(text)


def _show_result(
    display: Display, run: Run, completed: Completed, mfu_of: str, config: Config
) -> None:
    """Losses, where the time went, speed, and the next commands."""
    rows = [[f"training loss, mean of the last {LAST_LOSSES} steps", _loss(completed.loss)]]
    if completed.eval_loss is not None:
        rows.append(["validation loss", _loss(completed.eval_loss)])
    rows.append(["unigram entropy of the training tokens", _loss(completed.unigram_entropy)])
    display.table("Result (nats per token)", ["", "loss"], rows)
    total = sum(completed.seconds.values())
    phases = [*sorted(completed.seconds.items(), key=lambda item: -item[1]), ("in all", total)]
    rows = [[name, f"{spent:.1f}", f"{spent / total:.1%}"] for name, spent in phases]
    display.table("Where the time went", ["", "seconds", "share"], rows)
    if completed.tokens_per_second is not None:
        mfu = "" if completed.mfu is None else f", {completed.mfu:.1%} of {mfu_of}"
        display.say(
            f"median step {completed.step_seconds:.3f} s, "
            f"{completed.tokens_per_second:,.0f} tokens/s{mfu}"
        )
    if (run.path / "loss.png").exists():
        display.say(f"\nloss curve: {run.path / 'loss.png'}")
    _show_next(display, run, config, completed.step)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def show_complete(
    display: Display, run: Run, completed: Completed, before: str | None, config: Config
) -> None:
    """That a run has all its steps and needs no further launch.

    `before`: its config.yaml. Raises ConfigError where this launch's settings are of another run.
    """
    show_unused_changes(before, config, display)
    validation = "" if completed.eval_loss is None else f", validation {completed.eval_loss:.3f}"
    display.say(
        f"{run.path} is complete: {completed.step} steps, loss {_loss(completed.loss)}{validation}."
    )
    _show_next(display, run, config, completed.step, before)


def _show_next(
    display: Display, run: Run, config: Config, step: int, before: str | None = None
) -> None:
    """The run's folder, and the commands to try, quoted so that they can be pasted."""
    path, page = quote_path(run.path), quote_path(run.path / "report.html")
    has_curves = (run.path / "tensorboard").exists()
    curves = f"  (curves: tensorboard --logdir {path})" if has_curves else ""
    display.say(f"the run's folder: {run.path}{curves}")
    display.say("next: look at it in a browser:")
    display.say(f"  python -m baichuan_jax.report {path} -o {page}", style="bold")
    display.say("or let it write:")
    display.say(
        f"  python -m baichuan_jax.generate --checkpoint {path} --prompt '春' --max_new_tokens 48",
        style="bold",
    )
    display.say("or train on with more steps. " + more_steps(run, config, step, before))


def close_files(output: Output, ended_well: bool) -> None:
    """Write what still waits for the disk. Raises SaveFailed where something is lost for good."""
    with announced(f"Weights & Biases and the disk ({WANDB_SECONDS:.0f} s at most)"):
        lost = output.writer.close()
    if not lost:
        return
    what = f"lost, since the disk refused it to the end: {'; '.join(lost)}"
    # After an error, that error is what the launch ends with.
    if ended_well:
        raise SaveFailed(f"{what}; make room, and start the same command again")
    output.say(what, style="red")


def explain_failure(
    error: BaseException, config: Config, run: Run, step: int, output: Output
) -> str | None:
    """Record the exception that ended a launch; where memory ran out, what would make it fit.

    Then a profile of the devices' memory is written too. None for all other errors.
    """
    # A second Ctrl-C: the user knows why the launch ended.
    if isinstance(error, KeyboardInterrupt):
        return None
    # Cut: XLA's messages about memory list buffers for pages.
    output.event(Failed(step=step, error=hide_secrets(f"{type(error).__name__}: {error}")[:2000]))
    text = str(error)
    memory = "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
    # TensorStore says RESOURCE_EXHAUSTED for a full disk.
    if isinstance(error, SaveFailed) or not memory:
        return None
    reason, where = text.splitlines()[0][:200], ""
    with output.leaving_out("the profile of the memory"):
        profile = run.path / "memory.prof"
        write_atomically(profile, jax.profiler.device_memory_profile())
        where = f"; profile in {profile}"
    return f"out of memory at step {step} ({reason}){where}. {_what_would_fit(config)}"


def _what_would_fit(config: Config) -> str:
    """Settings that need less memory than these, most useful first."""
    # In the order of their price: a smaller micro-batch costs a little speed, more recomputation a
    # third of the forward pass, fewer copies of the state cannot be compared, a larger fsdp has
    # other collectives.
    ideas = []
    train, mesh = config.train, config.mesh
    # Without the setting, a device takes its whole share in one pass.
    micro = train.micro_batch_size or train.global_batch_size // mesh.batch_shards
    if micro > 1:
        ideas.append(f"--train.micro_batch_size {micro // 2} (now {micro})")
    if config.model.remat != "full":
        ideas.append(f"--model.remat full (now {config.model.remat})")
    if (chunk := train.loss_chunk_size) > 512:
        ideas.append(f"--train.loss_chunk_size {chunk // 2} (now {chunk})")
    if mesh.data > 1:
        ideas.append(
            f"a larger mesh.state (now {mesh.state}) or mesh.fsdp (now {mesh.fsdp}) and a "
            f"smaller mesh.data (now {mesh.data})"
        )
    return "What needs less: " + "; ".join([*ideas, "more devices", "a smaller model"])
