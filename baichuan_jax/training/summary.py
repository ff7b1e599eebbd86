"""What a launch says of itself: at its start what it runs on and chose, at its end what came of it and what to do next."""

import shlex

import jax
from jax.sharding import Mesh

from baichuan_jax.config.schema import Config
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.events import Completed
from baichuan_jax.runs.folder import Run
from baichuan_jax.sharding import crosses_nodes


def say_start(
    display: Display,
    config: Config,
    mesh: Mesh,
    *,
    text_tokens: int,
    kernels: dict[str, tuple[str, str]],
    mfu_of: str,
    flags: dict[str, str],
) -> None:
    """Model, devices, batch and every choice that was made, with its reason."""
    train, device = config.train, mesh.devices.flat[0]
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    display.say(
        f"{config.model.num_parameters:,} parameters, {config.model.dtype}; {mesh.size} x {device.device_kind} in "
        f"{jax.process_count()} process(es): {axes}"
    )
    accumulation = config.accumulation_steps(config.mesh)
    micro = f" in {accumulation} micro-batches" if accumulation > 1 else ""
    wanted = train.num_steps * train.global_batch_size * train.context_length
    display.say(
        f"batch of {train.global_batch_size} x {train.context_length} tokens{micro}; {train.num_steps} steps = {wanted:,} tokens, "
        f"{wanted / text_tokens:.2f} times the text's {text_tokens:,}"
    )
    for operator, (name, reason) in kernels.items():
        display.say(f"{operator}: {name} ({reason})")
    display.say(f"MFU: {mfu_of}")
    for flag, reason in flags.items():
        display.say(f"{flag}: {reason}")
    for axis in crosses_nodes(mesh):
        display.say(
            f"mesh axis {axis} crosses processes: its collectives leave the node", style="yellow"
        )


def say_result(display: Display, run: Run, completed: Completed, mfu_of: str) -> None:
    """Losses, where the time went, speed, samples, and the next command; from the event that closes the run."""
    rows = [["training loss, mean of the last 20 steps", f"{completed.loss:.3f}"]]
    if completed.eval_loss is not None:
        rows.append(["validation loss", f"{completed.eval_loss:.3f}"])
    rows.append(["unigram entropy of the training tokens", f"{completed.unigram_entropy:.3f}"])
    display.table("Result (nats per token)", ["", "loss"], rows)
    seconds = completed.seconds
    total = sum(seconds.values())
    causes = [*sorted(seconds.items(), key=lambda item: -item[1]), ("in all", total)]
    display.table(
        "Where the time went",
        ["", "seconds", "share"],
        [[name, f"{s:.1f}", f"{s / total:.1%}"] for name, s in causes],
    )
    if completed.tokens_per_second is not None:
        mfu = "" if completed.mfu is None else f", {completed.mfu:.1%} of {mfu_of}"
        display.say(
            f"median step {completed.step_seconds:.3f} s, {completed.tokens_per_second:,.0f} tokens/s{mfu}"
        )
    for prompt, text in completed.samples.items():
        display.say(f"\n{prompt!r} continues:", style="bold")
        display.say(text)
    if (run.path / "loss.png").exists():
        display.say(f"\nloss curve: {run.path / 'loss.png'}")
    say_next(display, run)


def say_complete(display: Display, run: Run, completed: Completed) -> None:
    """That a run needs no further launch."""
    validation = "" if completed.eval_loss is None else f", validation {completed.eval_loss:.3f}"
    display.say(
        f"{run.path} is complete: {completed.step} steps, loss {completed.loss:.3f}{validation}."
    )
    display.say("Train on with a larger --train.num_steps, or again with another --run_dir.")
    say_next(display, run)


def say_next(display: Display, run: Run) -> None:
    """Where everything lies, and the commands to try, fit to be pasted."""
    path = shlex.quote(str(run.path))
    curves = (
        f"  (curves: tensorboard --logdir {path})" if (run.path / "tensorboard").exists() else ""
    )
    display.say(f"the run's folder: {run.path}{curves}")
    display.say("next: look at it in a browser:")
    display.say(
        f"  python -m baichuan_jax.report {path} -o {shlex.quote(str(run.path / 'report.html'))}",
        style="bold",
    )
    display.say("or let it write:")
    display.say(
        f"  python -m baichuan_jax.generate --checkpoint {path} --prompt '春' --max_new_tokens 48",
        style="bold",
    )


def what_would_fit(config: Config) -> str:
    """Settings that need less memory than these, most useful first."""
    ideas = []
    micro = config.train.micro_batch_size or config.train.global_batch_size // (
        config.mesh.data * config.mesh.fsdp
    )
    if micro > 1:
        ideas.append(f"--train.micro_batch_size {micro // 2} (now {micro})")
    if config.model.remat != "full":
        ideas.append(f"--model.remat full (now {config.model.remat})")
    if config.train.loss_chunk_size > 512:
        ideas.append(
            f"--train.loss_chunk_size {config.train.loss_chunk_size // 2} (now {config.train.loss_chunk_size})"
        )
    if config.mesh.data > 1:
        ideas.append(
            f"a larger mesh.fsdp (now {config.mesh.fsdp}) and a smaller mesh.data (now {config.mesh.data})"
        )
    return "What needs less: " + "; ".join([*ideas, "more devices", "a smaller model"])
