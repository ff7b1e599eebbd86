"""One launch of a run from its first state to its last: steps, validation, checkpoints, and what it reports of them."""

import contextlib
import dataclasses
import gc
import importlib.util
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from flax import nnx

from baichuan_jax.checkpoint.local_copies import LocalCopies
from baichuan_jax.checkpoint.orbax import Checkpoints
from baichuan_jax.checkpoint.schedule import Saver
from baichuan_jax.config.schema import Config
from baichuan_jax.data.loader import Loader, validation_batches
from baichuan_jax.data.prepare import Prepared
from baichuan_jax.data.rows import unigram_entropy
from baichuan_jax.evaluate.evaluation import Evaluation
from baichuan_jax.evaluate.prompts import Prompt
from baichuan_jax.evaluate.results import score_prompts
from baichuan_jax.evaluate.scoring import Scorer
from baichuan_jax.generate import Generator
from baichuan_jax.hardware.devices import peak_flops, peak_memory_gib
from baichuan_jax.model import abstract_model
from baichuan_jax.resilience.causes import BadHost, NumericsError, SaveFailed
from baichuan_jax.resilience.checkpoint_interval import fault_history
from baichuan_jax.resilience.clock import CHECKPOINT, DATA, DISPATCH, EVALUATE, WAIT, Clock
from baichuan_jax.resilience.coordination import agree
from baichuan_jax.resilience.digests import compare_digests
from baichuan_jax.resilience.guard import Rollback, Spikes, plan_rollback
from baichuan_jax.resilience.watch import Watch
from baichuan_jax.runs.console import Display, Progress
from baichuan_jax.runs.events import (
    Compiled,
    Completed,
    Corruption,
    Failed,
    Interrupted,
    NumericsFault,
    Profiled,
    RolledBack,
    Started,
    UpdateSkipped,
    of_kind,
    parse_event,
)
from baichuan_jax.runs.folder import Run
from baichuan_jax.runs.metrics import Throughput, Writer, seconds_since_process_start
from baichuan_jax.step import Request, Steps, TrainState
from baichuan_jax.training.profiler import Tracer
from baichuan_jax.training.restore import restore_or_start
from baichuan_jax.training.summary import say_result, say_start, what_would_fit

MAX_NONFINITE_RUN = 3  # updates skipped in a row before the run ends: it will not mend itself
OWN_STEPS = 32  # whose median is a process's own time
Pending = tuple[
    int, int, dict[str, jax.Array]
]  # step, position of its batch, figures on the devices


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
        watch: Watch,
        writer: Writer,
        display: Display,
    ) -> None:
        self.config, self.run, self.steps, self.prepared = config, run, steps, prepared
        self.clock, self.watch, self.writer, self.display = clock, watch, writer, display
        self.checkpoints = Checkpoints(
            run.path / "checkpoints",
            config,
            prepared.tokenizer.hash,
            steps.state_shapes,
            steps.state_shardings,
        )
        self.saver = Saver(
            self.checkpoints,
            config.checkpoint,
            clock,
            writer,
            display,
            devices=steps.layout.mesh.size,
            **dataclasses.asdict(fault_history(run.events)),
        )
        self.tracer = Tracer(config.profile, run.path / "profile", config.train.num_steps)
        self.state: TrainState = None  # type: ignore[assignment]  # from restore_or_start on
        self.step = self.position = 0  # steps done; position in the data of the next batch
        self.stop_requested = False
        self.eval_loss: float | None = None
        self.losses: list[float] = []
        self.entropy = unigram_entropy(prepared.train)
        device = jax.devices()[0]
        peak, self.peak_source = peak_flops(config, device)
        self.throughput = Throughput(config, steps.layout.mesh.size, peak)
        self.tests = tests
        self.test_prompts = [test.all_prompts() for test in tests]
        self._scorer: Scorer | None = None
        self._requests = [steps.request(request) for request in Request]
        self._replicas, self._checked = (
            steps.layout.mesh.shape["data"],
            0,
        )  # step of the last check that went well
        self._spike: tuple[str, int, int, int] | None = None  # why, step, its window of positions
        self._nonfinite_since: tuple[int, int] | None = (
            None  # step and position of the first of a row
        )
        self._own: deque[float] = deque(maxlen=OWN_STEPS)
        self._alone = 0.0
        self._batches = None
        self._mark = 0.0

    def ask_to_stop(self, signal_name: str) -> None:
        self.stop_requested = True
        # Not print: a signal may come in the middle of one.
        os.write(
            2,
            f"\n{signal_name}: saving after this step, then stopping; once more quits unsaved\n".encode(),
        )

    def describe(self, flags: dict[str, str], kernels: dict[str, tuple[str, str]]) -> None:
        """Say and record what this launch runs on and what it chose."""
        mesh = self.steps.layout.mesh
        rows = {str(rows.path): len(rows) for rows, _ in self.prepared.train}
        tokens = sum(rows.values()) * self.config.train.context_length
        say_start(
            self.display,
            self.config,
            mesh,
            text_tokens=tokens,
            kernels=kernels,
            mfu_of=self.peak_source,
            flags=flags,
        )
        chosen = {operator: name for operator, (name, _) in kernels.items()}
        reasons = {f"{operator}_reason": reason for operator, (_, reason) in kernels.items()}
        self.writer.event(
            Started(
                attempt=self.watch.launch,
                jax=jax.__version__,
                device=mesh.devices.flat[0].device_kind,
                devices=mesh.size,
                processes=jax.process_count(),
                mesh=dict(mesh.shape),
                **chosen,
                **reasons,
                xla_flags=list(flags),
                mfu_of=self.peak_source,
                parameters=self.config.model.num_parameters,
                tokenizer=self.prepared.tokenizer.hash,
                rows=rows,
                unigram_entropy=self.entropy,
            )
        )

    def restore_or_start(self) -> None:
        """Take the newest good checkpoint, or `init_from`'s weights, or fresh ones."""
        resilience, skip = self.config.resilience, self.config.data.skip
        found = agree("rollback", lambda: self._plan_rollback(skip, resilience.max_skips))
        self.skip = tuple((begin, end) for begin, end in found["windows"])
        rollback = Rollback(
            self.skip, found["before"], found["back"], tuple(map(parse_event, found["events"]))
        )
        if (local_path := self.config.checkpoint.local_path) is not None:
            self.saver.copies = LocalCopies(
                local_path / found["run"], found["rollbacks"], self.watch.host, self.checkpoints
            )
        begun = restore_or_start(
            self.config,
            self.steps,
            self.checkpoints,
            self.saver.copies,
            rollback,
            self.writer,
            self.display,
        )
        self.state, self.step, self.position = begun.state, begun.step, begun.position
        self.watch.step = self._checked = self.step
        self.eval_loss = self.run.curve("eval_loss").get(self.step)
        self.losses = [loss for step, loss in self.run.curve("loss").items() if step <= self.step]
        self.spikes = Spikes(resilience.spike_deviations, self.losses)

    def _plan_rollback(self, skip: list[list[int]], max_skips: int) -> dict[str, Any]:
        """The rollback that this launch begins with, a name for the run, and how often it will have rolled back."""
        events = self.run.events
        plan = plan_rollback(events, skip, max_skips)
        rollbacks = len(of_kind([*events, *plan.events], RolledBack))
        return {
            **dataclasses.asdict(plan),
            "events": [event.to_json() for event in plan.events],
            "run": f"{self.run.path.name}-{events[0].time:.3f}",
            "rollbacks": rollbacks,
        }

    def loop(self) -> bool:
        """Step to the end: True, or until asked to stop: save and return False. Raises NumericsError."""
        config = self.config
        with self.clock("start"):
            self._batches = Loader(
                self.prepared.train,
                seed=config.train.seed,
                accumulation_steps=config.accumulation_steps(config.mesh),
                batch_size=config.train.global_batch_size,
                eos_id=self.prepared.tokenizer.eos_id,
                document_mask=config.data.document_mask,
                sharding=self.steps.batch_sharding,
                position=self.position,
                skip=self.skip,
            )
        pending: Pending | None = None
        every = config.resilience.check_every
        step_function = None
        with (
            self.display.progress(self.step, config.train.num_steps) as progress,
            _scheduled_gc() as collect,
        ):
            while self.step < config.train.num_steps:
                with self.clock(DATA):
                    here = self._batches.position
                    batch = next(self._batches)
                if step_function is None:
                    step_function = self._compile(batch)
                    self._mark = time.perf_counter()
                self.tracer.before(self.step + 1)
                with self.clock(DISPATCH), jax.transfer_guard("disallow"):
                    self.state, metrics = step_function(
                        self.state, batch, self._requests[self._request()]
                    )
                self.step, self.position = self.step + 1, self._batches.position
                self.watch.step = self.step
                # The step before this one: its figures are fetched while the devices work on this
                # one.
                request = self._record(pending, progress)
                pending = (self.step, here, metrics)
                self.saver.poll(recorded=self.step - 1)
                last = self.step == config.train.num_steps
                evaluate = last or self.step % config.evaluate.every == 0
                save = (
                    last
                    or self.saver.due(self.step)
                    or (request == Request.SAVE and self.saver.far_enough(self.step))
                )
                check = self._replicas > 1 and every > 0 and self.step % every == 0
                copy = self.saver.copy_due(self.step) and not last
                if (
                    evaluate
                    or save
                    or copy
                    or check
                    or request == Request.STOP
                    or self.step == self.tracer.until
                ):
                    request = max(self._record(pending, progress), request)
                    pending = None
                    stop = request == Request.STOP
                    if self.step == self.tracer.until or (stop and self.tracer.until is not None):
                        self._stop_trace()
                    if check:
                        self._check(batch)
                    if evaluate:
                        self._evaluate()
                    if save or copy or stop:
                        self._save(
                            durably=save or stop,
                            locally=copy and not stop,
                            must_succeed=last or stop,
                        )
                    if stop and not last:
                        self.writer.event(Interrupted(step=self.step, position=self.position))
                        self.display.say(
                            f"stopped and saved at step {self.step}; the same command goes on from here",
                            style="green",
                        )
                        return False
                    collect()
                    self._mark = time.perf_counter()
        return True

    def _compile(self, batch: dict[str, jax.Array]) -> Any:
        with self.clock("compile"):
            compiled = self.steps.train.lower(
                self.state, batch, self._requests[Request.NONE]
            ).compile()
        self.writer.event(
            Compiled(
                seconds=self.clock.totals()["compile"],
                since_launch=seconds_since_process_start(),
            )
        )
        return compiled

    def _request(self) -> Request:
        """What this process wants of the others: they hear it with the figures of the step that it goes into."""
        if self._spike is not None:
            return Request.ROLL_BACK
        if self.stop_requested:
            return Request.STOP
        return Request.SAVE if self.saver.wanted() else Request.NONE

    def _save(self, durably: bool, locally: bool, must_succeed: bool) -> None:
        with self.clock(CHECKPOINT):
            finite = self.checkpoints.finite(self.state)
        if not finite:
            self._numbers_broke(
                f"the state after step {self.step} is not finite",
                self.step,
                self.position,
                self.position + 1,
            )
        if durably:
            self.saver.save(self.state, self.step, self.position, must_succeed)
        if locally:
            self.saver.copy(self.state, self.step, self.position)

    def _record(self, pending: Pending | None, progress: Progress) -> int:
        """Fetch and write a step's figures; the largest request of all processes. Raises NumericsError."""
        if pending is None:
            return Request.NONE
        step, position, metrics = pending
        with self.clock(WAIT):
            values = jax.device_get(metrics)
        now = time.perf_counter()
        figures = self.throughput.add(now - self._mark)
        self._note_own_time()
        self._say_stragglers()
        self._mark = now
        loss = float(values["loss"])
        self.losses.append(loss)
        line: dict[str, Any] = {
            "loss": loss,
            "perplexity": _exp(loss),
            "grad_norm": float(values["grad_norm"]),
            "learning_rate": float(values["learning_rate"]),
            **figures,
            "tokens": int(values["tokens"]),
            "data_wait_seconds": self.clock.seconds.get(DATA, 0.0),
            "memory_gib": peak_memory_gib(),
        }
        if not values["finite"]:
            line["skipped"] = True
        self.writer.metrics(step, line)
        progress.update(step, loss, line["tokens_per_second"], self.eval_loss)
        self._guard(step, position, values)
        return int(values["request"])

    def _note_own_time(self) -> None:
        """Seconds of the last steps that this process spent alone, on data and on the host: what a slow host shows in."""
        alone = sum(self.clock.totals().get(phase, 0.0) for phase in (DATA, "other"))
        self._own.append(alone - self._alone)
        self._alone = alone
        if len(self._own) == OWN_STEPS:
            self.watch.own_seconds = statistics.median(self._own)

    def _say_stragglers(self) -> None:
        for found in self.watch.stragglers():
            self.writer.event(found)
            self.display.say(
                f"process {found.process} on {found.host} is slow: {found.seconds:.3f} s of its "
                f"own a step, the median {found.median:.3f} s",
                style="yellow",
            )

    def _guard(self, step: int, position: int, values: dict[str, Any]) -> None:
        """Count updates that were skipped; raise NumericsError after three in a row, and where process 0 saw a spike."""
        if not values["finite"]:
            run = int(values["nonfinite_run"])
            fields = {
                "loss": str(values["loss"]),
                "grad_norm": str(values["grad_norm"]),
                "in_a_row": run,
            }
            self.writer.event(
                UpdateSkipped(
                    step=step,
                    position=position,
                    total=int(values["nonfinite"]),
                    **fields,
                )
            )
            self.display.say(
                f"step {step}: not finite, its update is skipped: {fields}", style="red"
            )
            self._nonfinite_since = (
                (step, position)
                if run == 1 or self._nonfinite_since is None
                else self._nonfinite_since
            )
            if run >= MAX_NONFINITE_RUN:
                first, begin = self._nonfinite_since
                self._numbers_broke(
                    f"{run} steps in a row up to step {step} were not finite (loss {values['loss']}, gradient norm "
                    f"{values['grad_norm']})",
                    first,
                    begin,
                    position + 1,
                )
        if values["request"] == Request.ROLL_BACK:
            self._numbers_broke(
                *(self._spike or ("process 0 saw a spike", step, position, position + 1))
            )
        if self._spike is None and (
            spike := self.spikes.check(loss=values["loss"], grad_norm=values["grad_norm"])
        ):
            words, steps = spike
            self._spike = (
                f"step {step}: {words}",
                step - steps + 1,
                position - steps + 1,
                position + 1,
            )

    def _check(self, batch: dict[str, jax.Array]) -> None:
        """Whether all replicas compute the same bits. Raises BadHost on all processes where they do not."""
        mesh = self.steps.layout.mesh
        with self.clock(EVALUATE):
            digests = jax.device_get(self.steps.check(self.state.params, batch))
        owners = {
            replica: [device.process_index for device in mesh.devices[replica].flat]
            for replica in range(self._replicas)
        }
        try:
            compare_digests([int(digest) for digest in digests], owners)
        except BadHost as error:
            self.writer.event(Corruption(step=self._checked + 1, reason=str(error)))
            raise
        self._checked = self.step

    def _numbers_broke(self, reason: str, step: int, begin: int, end: int) -> NoReturn:
        """Leave, so that the next launch goes back to before this step, whose data lie at positions [begin, end)."""
        self.writer.event(NumericsFault(step=step, begin=begin, end=end, reason=reason))
        raise NumericsError(
            f"{reason}; the next start goes back to a checkpoint before step {step}, and leaves positions {begin} to {end - 1} of the "
            "data out if it happens there again"
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
        with self.clock(EVALUATE):
            sums = [
                self.steps.evaluate(self.state.params, batch)
                for batch in validation_batches(
                    self.prepared.validation,
                    batch_size=config.train.global_batch_size,
                    eos_id=self.prepared.tokenizer.eos_id,
                    document_mask=config.data.document_mask,
                    sharding=self.steps.batch_sharding,
                    accumulation_steps=config.accumulation_steps(config.mesh),
                    num_batches=config.evaluate.num_batches,
                )
            ]
            sums = jax.device_get(sums)
            tokens = sum(int(count) for _, count in sums)
            self.eval_loss = sum(float(total) for total, _ in sums) / tokens
        self.display.say(
            f"step {self.step}: validation loss {self.eval_loss:.4f} over {tokens:,} tokens"
        )
        return {
            "eval_loss": self.eval_loss,
            "eval_perplexity": _exp(self.eval_loss),
            "eval_tokens": tokens,
        }

    def _score(self, test: Evaluation, prompts: list[Prompt]) -> dict[str, Any]:
        with self.clock(EVALUATE):
            if self._scorer is None:
                graphdef, _, _ = abstract_model(self.config.model, self.config.kernels)
                self._scorer = Scorer(
                    nnx.merge(graphdef, self.state.params), self.steps.layout.mesh
                )
            self._scorer.params = self.state.params
            result = test.summarise(score_prompts(self._scorer, prompts, test.plan.protocol))
        task, average, stderr = test.plan.task, result["average"], result["stderr"]
        self.display.say(
            f"step {self.step}: {task} {average:.1%} of {result['questions']:,} questions"
        )
        return {task: average, f"{task}_stderr": stderr}

    def _stop_trace(self) -> None:
        self.tracer.stop()
        self.writer.event(Profiled(step=self.step))
        self.display.say(f"profile of the steps up to {self.step} in {self.run.path / 'profile'}")

    def _draw(self) -> None:
        """The loss curve, where there is what draws it: a run must not end in an error for want of a picture."""
        if importlib.util.find_spec("matplotlib") is not None:
            self.run.plot()
            return
        self.display.say(
            f"{self.run.path / 'loss.png'} is not drawn: matplotlib is not installed; pip install matplotlib, then in Python: "
            f"from baichuan_jax.runs.folder import Run; Run({str(self.run.path)!r}).plot()",
            style="yellow",
        )

    def conclude(self) -> None:
        """After the last step: validation if it is still missing, curve, samples, and what came of it all."""
        if self.eval_loss is None and self.prepared.validation:
            self._evaluate()
        if jax.process_index() == 0:
            self._draw()
        samples = self._sample()
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        completed = Completed(
            step=self.step,
            loss=statistics.fmean(finite[-20:]),
            eval_loss=self.eval_loss,
            unigram_entropy=self.entropy,
            seconds=self.clock.totals(),
            samples=samples,
            **self.throughput.median(),
        )
        self.writer.event(completed)
        say_result(self.display, self.run, completed, self.peak_source)

    def _sample(self) -> dict[str, str]:
        """The model's continuation of every prompt of the settings."""
        sample = self.config.sample
        if not sample.prompts:
            return {}
        if jax.process_count() > 1:
            self.display.say(
                "no samples: the model lies on several processes; use python -m baichuan_jax.generate"
            )
            return {}
        graphdef, _, _ = abstract_model(self.config.model, self.config.kernels)
        generator = Generator(nnx.merge(graphdef, self.state.params))
        texts = generator.generate(
            self.prepared.tokenizer,
            sample.prompts,
            max_new_tokens=sample.max_new_tokens,
            temperature=0.8,
            top_p=0.9,
            seed=self.config.train.seed,
        )
        return dict(zip(sample.prompts, texts, strict=True))

    def explain(self, error: BaseException) -> str | None:
        """Record what ended the run. Where memory ran out, keep a profile of it and return what would make it fit."""
        if isinstance(error, KeyboardInterrupt):
            return None
        self.writer.event(Failed(step=self.step, error=f"{type(error).__name__}: {error}"[:2000]))
        memory = "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)
        if (
            isinstance(error, SaveFailed) or not memory
        ):  # of a full disk TensorStore says RESOURCE_EXHAUSTED too
            return None
        profile = self.run.path / "memory.prof"
        jax.profiler.save_device_memory_profile(str(profile))
        reason = str(error).splitlines()[0][:200]
        return f"out of memory at step {self.step} ({reason}); profile in {profile}. {what_would_fit(self.config)}"

    def close(self, failed: bool = False) -> None:
        """Let go of everything; after a failure among several processes only of files, since the rest would wait for the others."""
        if not (failed and jax.process_count() > 1):
            if self._batches is not None:
                self._batches.close()
            self.checkpoints.close()
        self.writer.close()


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
