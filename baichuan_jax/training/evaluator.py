"""The model as it is in training: its validation loss, its scores on tests, its samples."""

from typing import Any

import jax
from flax import nnx

from baichuan_jax.config.schema import Config
from baichuan_jax.data.loader import validation_batches
from baichuan_jax.data.prepare import Prepared
from baichuan_jax.evaluate.evaluation import Evaluation
from baichuan_jax.evaluate.prompts import Prompt
from baichuan_jax.evaluate.results import score_prompts
from baichuan_jax.evaluate.scoring import Scorer
from baichuan_jax.evaluate.tables import left_out
from baichuan_jax.generate import Generator, encode_prompts
from baichuan_jax.model import Params, Transformer, abstract_model
from baichuan_jax.runs.output import Output
from baichuan_jax.step import Steps
from baichuan_jax.training.recorder import Recorder, perplexity


class Evaluator:
    """Evaluates parameters that lie on the mesh of `steps`. `tests`: scored beside the loss."""

    def __init__(
        self,
        config: Config,
        steps: Steps,
        prepared: Prepared,
        tests: list[Evaluation],
        recorder: Recorder,
        output: Output,
    ) -> None:
        self._config, self._steps, self._prepared = config, steps, prepared
        self._recorder, self._output = recorder, output
        self._tests = [(test, test.all_prompts()) for test in tests]
        # For its error: a prompt without tokens is refused before the first step, not after the
        # last.
        if config.sample.prompts:
            encode_prompts(prepared.tokenizer, config.sample.prompts)
        for test in tests:
            for counted in left_out(test.settings | test.counts):
                output.say(f"{test.plan.task}: {counted}")
        # Made at its first use: it compiles programs of its own.
        self._scorer: Scorer | None = None

    @property
    def validates(self) -> bool:
        """Whether there is text for a validation loss."""
        return bool(self._prepared.validation)

    def evaluate(self, step: int, params: Params) -> None:
        """Measure and record the validation loss and the scores of all tests."""
        values: dict[str, Any] = {}
        if self.validates:
            values |= self._validate(step, params)
        if self._tests:
            # Once, and not in the pass over every batch of prompts.
            whole = self._steps.gather(params)
            for test, prompts in self._tests:
                values |= self._score(step, whole, test, prompts)
        self._recorder.evaluation(step, values)

    def _validate(self, step: int, params: Params) -> dict[str, Any]:
        """The loss over the first rows of every validation corpus, the same rows each time."""
        config = self._config
        batches = validation_batches(
            self._prepared.validation,
            batch_size=config.train.global_batch_size,
            eos_id=self._prepared.tokenizer.eos_id,
            document_mask=config.data.document_mask,
            sharding=self._steps.batch_sharding,
            accumulation_steps=config.accumulation_steps(config.mesh),
            num_batches=config.evaluate.num_batches,
        )
        # All batches are dispatched before the first sum is fetched.
        sums = jax.device_get([self._steps.evaluate(params, batch) for batch in batches])
        tokens = sum(int(count) for _, count in sums)
        loss = sum(float(total) for total, _ in sums) / tokens
        self._output.say(f"step {step}: validation loss {loss:.4f} over {tokens:,} tokens")
        return {"eval_loss": loss, "eval_perplexity": perplexity(loss), "eval_tokens": tokens}

    def _score(
        self, step: int, params: Params, test: Evaluation, prompts: list[Prompt]
    ) -> dict[str, Any]:
        if self._scorer is None:
            self._scorer = Scorer(self._model(params), self._steps.layout.mesh)
        # The same compiled programs for the parameters of this step.
        self._scorer.use(params)
        result = test.summarise(score_prompts(self._scorer, prompts, test.plan.protocol))
        task, average, stderr = test.plan.task, result["average"], result["stderr"]
        self._output.say(f"step {step}: {task} {average:.1%} of {result['questions']:,} questions")
        return {task: average, f"{task}_stderr": stderr}

    def sample(self, params: Params) -> dict[str, str]:
        """The model's continuation of every prompt of the settings."""
        sample = self._config.sample
        if not sample.prompts:
            return {}
        # Generation decides after each token on the host, where several processes would have to
        # agree.
        if jax.process_count() > 1:
            self._output.say(
                "no samples: the model lies on several processes; use python -m "
                "baichuan_jax.generate"
            )
            return {}
        # Draws with the run's seed: the same run writes the same samples.
        texts = Generator(self._model(self._steps.gather(params))).generate(
            self._prepared.tokenizer,
            sample.prompts,
            max_new_tokens=sample.max_new_tokens,
            temperature=0.8,
            top_p=0.9,
            seed=self._config.train.seed,
        )
        return dict(zip(sample.prompts, texts, strict=True))

    def _model(self, params: Params) -> Transformer:
        graphdef, _, _ = abstract_model(self._config.model, self._config.kernels)
        return nnx.merge(graphdef, params)
