"""Train a model: `python -m baichuan_jax.train --config configs/tiny.yaml`, or train(load_config(...)) in a notebook.

train() reads from top to bottom: refuse what cannot work, join the other processes, prepare tokens, build the compiled step, restore
or start a state, then step, evaluate and save until the end. Killed at any moment, the next start goes on from the last checkpoint.
"""

import contextlib
import dataclasses
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from baichuan_jax.checkpoint import Checkpoints, load_params
from baichuan_jax.config import Config, ConfigError, ModelConfig
from baichuan_jax.config_file import dump_config, make_parser, parse_config
from baichuan_jax.console import Display, Progress
from baichuan_jax.data.loader import Loader, validation_batches
from baichuan_jax.data.prepare import Prepared, prepare
from baichuan_jax.data.rows import unigram_entropy
from baichuan_jax.evaluate.evaluation import Evaluation, Plan
from baichuan_jax.evaluate.prompts import Prompt
from baichuan_jax.evaluate.results import score_prompts
from baichuan_jax.evaluate.scoring import Scorer
from baichuan_jax.files import write_atomically
from baichuan_jax.generate import Generator
from baichuan_jax.hf import import_params, read_config
from baichuan_jax.kernels import choose_attention, choose_rms_norm
from baichuan_jax.metrics import Clock, Throughput, Writer, peak_flops, peak_memory_gib, seconds_since_process_start
from baichuan_jax.model import Params, abstract_model
from baichuan_jax.resilience.exits import PREEMPTED, NumericsError, run_command, signals
from baichuan_jax.run import Run
from baichuan_jax.sharding import initialize_processes, make_mesh
from baichuan_jax.step import Steps, TrainState, make_steps
from baichuan_jax.summary import say_complete, say_result, say_start, what_would_fit
from baichuan_jax.xla_flags import apply_flags

MAX_NONFINITE_RUN = 3  # updates skipped in a row before the run ends: it will not mend itself


def train(config: Config) -> Run:
    """Train to the end, or until interrupted (`run.status` tells). Raises ConfigError, NumericsError."""
    return _train(config, Clock())


def _train(config: Config, clock: Clock) -> Run:
    run = Run(config.run_path)
    if _is_complete(config, run):
        return run
    with clock("start"):
        flags = apply_flags(config)
        initialize_processes(config.distributed)
        mesh = make_mesh(config.mesh)
        config = dataclasses.replace(config, mesh=config.mesh.resolve(mesh.size))
        config.check_mesh(config.mesh)
        kernels = _choose_kernels(config)
        first = jax.process_index() == 0
        display = Display(active=first)
        steps = make_steps(config, mesh)
    with clock("tokenise and pack"):
        prepared = prepare(config, writer=first, progress=first, say=display.say)
        tests = _read_tests(config, prepared)
    with clock("start"):
        writer = _open_run(config, run, prepared, display, active=first)
    trainer = Trainer(config, run, steps, prepared, tests, clock, writer, display)
    try:
        with clock("start"):
            trainer.describe(flags, kernels)
            trainer.restore_or_start()
        with signals(trainer.ask_to_stop, trainer.ask_for_trace):
            completed = trainer.loop()
        if completed:
            trainer.conclude()
    except Exception as error:
        advice = trainer.explain(error)
        trainer.close(failed=True)
        if advice is not None:
            raise ConfigError(advice) from error
        raise
    except KeyboardInterrupt:
        trainer.close(failed=True)
        raise
    trainer.close()
    return run


def _choose_kernels(config: Config) -> dict[str, tuple[str, str]]:
    """The implementation of each operator that will run, and why. Raises ConfigError where a forced one cannot."""
    model, device = config.model, jax.devices()[0]
    return {
        "attention": choose_attention(
            config.kernels.attention, device=device, dtype=model.dtype, head_dim=model.head_dim, masked=config.data.document_mask,
            length=config.train.context_length, context=config.mesh.context,
        ),
        "rms_norm": choose_rms_norm(config.kernels.rms_norm, device=device, dtype=model.dtype, width=model.hidden_size),
    }  # fmt: skip


def _is_complete(config: Config, run: Run) -> bool:
    """Whether this run ended before; then say so, without starting jax."""
    completed = [event for event in run.events if event["kind"] == "completed"]
    if run.status != "completed" or completed[-1]["step"] < config.train.num_steps:
        return False
    say_complete(Display(), run, completed[-1])
    return True


def _read_tests(config: Config, prepared: Prepared) -> list[Evaluation]:
    """The tests that are scored during the run. Raises ConfigError where their files are not as they should be."""
    only, limit = config.evaluate.subjects, config.evaluate.limit
    return [
        Evaluation(Plan(task, folder, subjects=only.get(task), limit=limit), prepared.tokenizer)
        for task, folder in config.evaluate.tasks.items()
    ]


def _open_run(config: Config, run: Run, prepared: Prepared, display: Display, active: bool) -> Writer:
    """Create the run's folder, put configuration and tokenizer into it, say what changed since its last launch."""
    if active:
        run.path.mkdir(parents=True, exist_ok=True)
        file = run.path / "config.yaml"
        now = dump_config(config)
        if file.exists() and (before := file.read_text(encoding="utf-8")) != now:
            changed = [line.strip() for line in now.splitlines() if line not in before.splitlines()]
            display.say(f"settings differ from this run's last launch: {', '.join(changed)}", style="yellow")
        write_atomically(file, now.encode())
        write_atomically(run.path / "tokenizer.model", Path(prepared.tokenizer.path).read_bytes())
    return Writer(run.path, config, active)


class Trainer:
    """One launch of a run: its state on the devices, where it stands in the data, and what it reports to."""

    def __init__(
        self,
        config: Config,
        run: Run,
        steps: Steps,
        prepared: Prepared,
        tests: list[Evaluation],
        clock: Clock,
        writer: Writer,
        display: Display,
    ) -> None:
        self.config, self.run, self.steps, self.prepared = config, run, steps, prepared
        self.clock, self.writer, self.display = clock, writer, display
        self.checkpoints = Checkpoints(
            run.path / "checkpoints", config, prepared.tokenizer.hash, steps.state_shapes, steps.state_shardings
        )
        self.state: TrainState = None  # type: ignore[assignment]  # from restore_or_start on
        self.step = self.position = 0  # steps done; position in the data of the next batch
        self.stop_requested = False
        self.trace_requested = False
        self.eval_loss: float | None = None
        self.losses: list[float] = []
        self.entropy = unigram_entropy(prepared.train)
        device = jax.devices()[0]
        peak, self.peak_source = peak_flops(config, device)
        self.throughput = Throughput(config, steps.layout.mesh.size, peak)
        self.tests = tests
        self.test_prompts = [test.all_prompts() for test in tests]
        self._scorer: Scorer | None = None
        self._stop_flags = {stop: steps.stop_flag(stop) for stop in (False, True)}
        self._batches = None
        self._mark = 0.0

    def ask_to_stop(self, signal_name: str) -> None:
        self.stop_requested = True
        # Not print: a signal may come in the middle of one.
        os.write(2, f"\n{signal_name}: saving after this step, then stopping; once more quits unsaved\n".encode())

    def ask_for_trace(self) -> None:
        self.trace_requested = True

    def describe(self, flags: dict[str, str], kernels: dict[str, tuple[str, str]]) -> None:
        """Say and record what this launch runs on and what it chose."""
        mesh = self.steps.layout.mesh
        rows = {str(rows.path): len(rows) for rows, _ in self.prepared.train}
        tokens = sum(rows.values()) * self.config.train.context_length
        say_start(
            self.display, self.config, mesh, text_tokens=tokens, kernels=kernels, mfu_of=self.peak_source, flags=flags
        )  # fmt: skip
        chosen = {operator: name for operator, (name, _) in kernels.items()}
        reasons = {f"{operator}_reason": reason for operator, (_, reason) in kernels.items()}
        self.writer.event(
            "started", jax=jax.__version__, device=mesh.devices.flat[0].device_kind, devices=mesh.size,
            processes=jax.process_count(), mesh=dict(mesh.shape), **chosen, **reasons,
            xla_flags=list(flags), mfu_of=self.peak_source, parameters=self.config.model.num_parameters,
            tokenizer=self.prepared.tokenizer.hash, rows=rows, unigram_entropy=self.entropy,
        )  # fmt: skip

    def restore_or_start(self) -> None:
        """Take the newest good checkpoint, or `init_from`'s weights, or fresh ones."""

        def report(kind: str, **fields: Any) -> None:
            self.display.say(f"{kind}: {fields['path']}: {fields['reason']}; trying the one before it", style="yellow")
            self.writer.event(kind, **fields)

        restored = self.checkpoints.restore(report)
        if restored is not None:
            self.state, self.step, self.position = restored.state, restored.step, restored.position
            self.display.say(f"going on from checkpoint {self.step} in {self.checkpoints.directory}", style="green")
            self.writer.event("restored", step=self.step, position=self.position)
            curve = self.run.curve("eval_loss")
            self.eval_loss = curve.get(self.step)
            self.losses = [loss for step, loss in self.run.curve("loss").items() if step <= self.step]
        elif self.config.init_from is not None:
            self.state = self.steps.start(self._initial_weights(self.config.init_from))
            self.display.say(f"weights from {self.config.init_from}, fresh optimiser and schedule", style="green")
            self.writer.event("initialised", source=self.config.init_from)
        else:
            self.state = self.steps.init()

    def _initial_weights(self, path: str) -> Params:
        layout = self.steps.layout
        if (Path(path) / "config.json").exists():
            model = read_config(path)
            _refuse_other_shapes(path, model, self.config)
            return import_params(path, layout)
        model, params = load_params(path, layout)
        _refuse_other_shapes(path, model, self.config)
        return params

    def loop(self) -> bool:
        """Step to the end: True, or until asked to stop: save and return False. Raises NumericsError."""
        config = self.config
        with self.clock("wait for data"):
            self._batches = Loader(
                self.prepared.train, seed=config.train.seed, accumulation_steps=config.accumulation_steps(config.mesh),
                batch_size=config.train.global_batch_size, eos_id=self.prepared.tokenizer.eos_id,
                document_mask=config.data.document_mask, sharding=self.steps.batch_sharding, position=self.position,
            )  # fmt: skip
        pending: tuple[int, dict[str, jax.Array]] | None = None
        step_function = None
        tracing_until: int | None = None
        with self.display.progress(self.step, config.train.num_steps) as progress, _scheduled_gc() as collect:
            while self.step < config.train.num_steps:
                with self.clock("wait for data"):
                    batch = next(self._batches)
                if step_function is None:
                    step_function = self._compile(batch)
                    self._mark = time.perf_counter()
                tracing_until = self._start_trace(tracing_until)
                with self.clock("step"):
                    with jax.transfer_guard("disallow"):
                        self.state, metrics = step_function(self.state, batch, self._stop_flags[self.stop_requested])
                    self.step, self.position = self.step + 1, self.position + 1
                    # The step before this one: its figures are fetched while the devices work on this one.
                    stop = self._record(pending, progress)
                    pending = (self.step, metrics)
                last = self.step == config.train.num_steps
                evaluate = last or self.step % config.evaluate.every == 0
                save = last or self.step % config.checkpoint.every == 0
                if evaluate or save or stop or self.step == tracing_until:
                    with self.clock("step"):
                        stop = self._record(pending, progress) or stop
                        pending = None
                    if self.step == tracing_until:
                        tracing_until = self._stop_trace()
                    if evaluate:
                        self._evaluate()
                    if save or stop:
                        self._save(must_succeed=last or stop)
                    if stop and not last:
                        if tracing_until is not None:
                            self._stop_trace()
                        self.writer.event("interrupted", step=self.step, position=self.position)
                        self.display.say(
                            f"stopped and saved at step {self.step}; the same command goes on from here", style="green"
                        )
                        return False
                    collect()
                    self._mark = time.perf_counter()
        return True

    def _compile(self, batch: dict[str, jax.Array]) -> Any:
        with self.clock("compile"):
            compiled = self.steps.train.lower(self.state, batch, self._stop_flags[False]).compile()
        self.writer.event("compiled", seconds=self.clock.totals()["compile"], since_launch=seconds_since_process_start())
        return compiled

    def _record(self, pending: tuple[int, dict[str, jax.Array]] | None, progress: Progress) -> bool:
        """Fetch and write a step's figures; whether any process was asked to stop. Raises NumericsError."""
        if pending is None:
            return False
        step, metrics = pending
        values = jax.device_get(metrics)
        now = time.perf_counter()
        figures = self.throughput.add(now - self._mark)
        self._mark = now
        loss = float(values["loss"])
        self.losses.append(loss)
        line: dict[str, Any] = {
            "loss": loss, "perplexity": _exp(loss), "grad_norm": float(values["grad_norm"]),
            "learning_rate": float(values["learning_rate"]), **figures, "tokens": int(values["tokens"]),
            "data_wait_seconds": self.clock.seconds.get("wait for data", 0.0), "memory_gib": peak_memory_gib(),
        }  # fmt: skip
        if not values["finite"]:
            line["skipped"] = True
            self._report_nonfinite(step, values)
        self.writer.metrics(step, line)
        progress.update(step, loss, line["tokens_per_second"], self.eval_loss)
        return bool(values["stop"])

    def _report_nonfinite(self, step: int, values: dict[str, Any]) -> None:
        run = int(values["nonfinite_run"])
        fields = {"loss": str(values["loss"]), "grad_norm": str(values["grad_norm"]), "in_a_row": run}
        self.writer.event("update_skipped", step=step, total=int(values["nonfinite"]), **fields)
        self.display.say(f"step {step}: not finite, its update is skipped: {fields}", style="red")
        if run >= MAX_NONFINITE_RUN:
            raise NumericsError(
                f"{run} steps in a row up to step {step} were not finite (loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}): lower optimizer.learning_rate, or look at the data of these steps"
            )

    def _evaluate(self) -> None:
        """Validation loss over the first rows of every validation corpus, the same rows each time; and scores of the tests."""
        line: dict[str, Any] = {}
        if self.prepared.validation:
            line |= self._validate()
        for test, prompts in zip(self.tests, self.test_prompts, strict=True):
            line |= self._score(test, prompts)
        if line:
            self.writer.metrics(self.step, line)

    def _validate(self) -> dict[str, Any]:
        config = self.config
        with self.clock("evaluation"):
            sums = [
                self.steps.evaluate(self.state.params, batch)
                for batch in validation_batches(
                    self.prepared.validation, batch_size=config.train.global_batch_size, eos_id=self.prepared.tokenizer.eos_id,
                    document_mask=config.data.document_mask, sharding=self.steps.batch_sharding,
                    accumulation_steps=config.accumulation_steps(config.mesh), num_batches=config.evaluate.num_batches,
                )
            ]  # fmt: skip
            sums = jax.device_get(sums)
            tokens = sum(int(count) for _, count in sums)
            self.eval_loss = sum(float(total) for total, _ in sums) / tokens
        self.display.say(f"step {self.step}: validation loss {self.eval_loss:.4f} over {tokens:,} tokens")
        return {"eval_loss": self.eval_loss, "eval_perplexity": _exp(self.eval_loss), "eval_tokens": tokens}

    def _score(self, test: Evaluation, prompts: list[Prompt]) -> dict[str, Any]:
        with self.clock("evaluation"):
            if self._scorer is None:
                graphdef, _, _ = abstract_model(self.config.model, self.config.kernels)
                self._scorer = Scorer(nnx.merge(graphdef, self.state.params), self.steps.layout.mesh)
            self._scorer.params = self.state.params
            result = test.summarise(score_prompts(self._scorer, prompts, test.plan.protocol))
        task, average, stderr = test.plan.task, result["average"], result["stderr"]
        self.display.say(f"step {self.step}: {task} {average:.1%} of {result['questions']:,} questions")
        return {task: average, f"{task}_stderr": stderr}

    def _save(self, must_succeed: bool) -> None:
        """Start a checkpoint; wait for it where it must succeed. One that failed is reported, and training goes on without it."""
        self._finish_save(must_succeed=False)
        with self.clock("checkpoint"), self._reported(self.step, must_succeed):
            self.checkpoints.save(self.state, self.step, self.position)
        if must_succeed:
            self._finish_save(must_succeed=True)

    def _finish_save(self, must_succeed: bool) -> None:
        saving = self.checkpoints.saving
        if saving is None:
            return
        with self.clock("checkpoint"), self._reported(saving, must_succeed):
            self.checkpoints.finish()
            self.writer.event("checkpoint", step=saving)

    @contextlib.contextmanager
    def _reported(self, step: int, must_succeed: bool) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.writer.event("checkpoint_failed", step=step, reason=str(error))
            self.display.say(f"checkpoint {step} failed and does not count: {error}", style="red")
            if must_succeed:
                raise

    def _start_trace(self, until: int | None) -> int | None:
        """Start a profiler trace where the settings or SIGUSR1 ask for one; the step it lasts until."""
        planned = self.config.profile.steps
        if until is not None or not (self.trace_requested or (planned and planned[0] == self.step + 1)):
            return until
        until = self.step + 3 if self.trace_requested else planned[1]
        self.trace_requested = False
        jax.profiler.start_trace(str(self.run.path / "profile"))
        return min(until, self.config.train.num_steps)

    def _stop_trace(self) -> None:
        jax.profiler.stop_trace()
        self.writer.event("profiled", step=self.step)
        self.display.say(f"profile of the steps up to {self.step} in {self.run.path / 'profile'}")

    def conclude(self) -> None:
        """After the last step: validation if it is still missing, curve, samples, and what came of it all."""
        if self.eval_loss is None and self.prepared.validation:
            self._evaluate()
        with self.clock("samples and plot"):
            if jax.process_index() == 0:
                self.run.plot()
            samples = self._sample()
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        completed = {
            "step": self.step, "loss": statistics.fmean(finite[-20:]), "eval_loss": self.eval_loss,
            "unigram_entropy": self.entropy, "seconds": self.clock.totals(), "samples": samples, **self.throughput.median(),
        }  # fmt: skip
        self.writer.event("completed", **completed)
        say_result(self.display, self.run, completed, self.peak_source)

    def _sample(self) -> dict[str, str]:
        """The model's continuation of every prompt of the settings."""
        sample = self.config.sample
        if not sample.prompts:
            return {}
        if jax.process_count() > 1:
            self.display.say("no samples: the model lies on several processes; use python -m baichuan_jax.generate")
            return {}
        graphdef, _, _ = abstract_model(self.config.model, self.config.kernels)
        generator = Generator(nnx.merge(graphdef, self.state.params))
        texts = generator.generate(
            self.prepared.tokenizer, sample.prompts, max_new_tokens=sample.max_new_tokens, temperature=0.8, top_p=0.9,
            seed=self.config.train.seed,
        )  # fmt: skip
        return dict(zip(sample.prompts, texts, strict=True))

    def explain(self, error: Exception) -> str | None:
        """Record what ended the run. Where memory ran out, keep a profile of it and return what would make it fit."""
        self.writer.event("failed", step=self.step, error=f"{type(error).__name__}: {error}"[:2000])
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            return None
        profile = self.run.path / "memory.prof"
        jax.profiler.save_device_memory_profile(str(profile))
        reason = str(error).splitlines()[0][:200]
        return f"out of memory at step {self.step} ({reason}); profile in {profile}. {what_would_fit(self.config)}"

    def close(self, failed: bool = False) -> None:
        if self._batches is not None:
            self._batches.close()
        if not (failed and jax.process_count() > 1):  # to finish a save, the other processes would have to be there
            self.checkpoints.close()
        self.writer.close()


def _refuse_other_shapes(path: str, found: ModelConfig, config: Config) -> None:
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "rms_norm_eps", "rope_theta"):
        theirs, ours = getattr(found, name), getattr(config.model, name)
        if theirs != ours:
            raise ConfigError(f"init_from={path} has {name}={theirs} and model.{name}={ours}; set model.{name}={theirs}")


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


@contextlib.contextmanager
def _scheduled_gc() -> Iterator[Callable[[], int]]:
    """No garbage collection inside: it would halt one host at a time, and all others with it. The loop calls what is yielded."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield lambda: gc.collect(1)
    finally:
        if enabled:
            gc.enable()


def main(words: list[str]) -> int:
    """The command. Returns its exit code."""
    clock = Clock()
    clock.add("imports", seconds_since_process_start())
    parser = make_parser(
        "python -m baichuan_jax.train",
        "Train a Baichuan model. Started again with the same settings, it goes on where it was: --config configs/tiny.yaml "
        "trains a small model on bundled text in minutes on a CPU.",
    )
    run = _train(parse_config(parser, words), clock)
    return PREEMPTED if run.status == "interrupted" else 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
