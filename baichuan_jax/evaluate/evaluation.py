"""One evaluation from files to scores: `evaluate` writes an output folder; a training run asks the questions of an `Evaluation`."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

import baichuan_jax
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.evaluate.prompts import (
    Prompt,
    Protocol,
    ShotOrder,
    default_shot_order,
    make_prompts,
    template,
)
from baichuan_jax.evaluate.results import Record, Results, score_prompts, summarise
from baichuan_jax.evaluate.scoring import Scorer
from baichuan_jax.evaluate.tasks import SPLITS, count_subjects, load_subjects
from baichuan_jax.tokenizer import Tokenizer

FILTERS = {
    "mmlu": "none",
    "ceval": "none",
    "agieval": "four options and exactly one right answer",
    "gaokao": "exactly one answer letter A-D",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to ask and how. None: the task's or the protocol's own."""

    task: str
    data: Path | str
    protocol: Protocol = "original"
    subjects: list[str] | None = None
    split: str | None = None
    shots: int = 5
    shot_order: ShotOrder | None = None
    seed: int = 0
    limit: int | None = None
    answers: Path | str | None = None


class Evaluation:
    """A task's questions, read and checked; `settings` is all that decides its prompts."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer) -> None:
        self.plan, self.tokenizer = plan, tokenizer
        self.shot_order: ShotOrder = plan.shot_order or default_shot_order(plan.task, plan.protocol)
        if plan.protocol == "lm-eval" and self.shot_order != "file":
            raise ConfigError(
                "protocol lm-eval keeps the examples in the file's order; shot_order=shuffled is the original's"
            )
        self.subjects, data_hash = load_subjects(
            plan.task,
            plan.data,
            split=plan.split,
            only=plan.subjects,
            shots=plan.shots,
            seed=plan.seed,
            limit=plan.limit,
            answers=plan.answers,
        )
        template(
            plan.task, self.subjects[0], plan.protocol
        )  # refuses a protocol that the task lacks
        drawn = plan.task in ("agieval", "gaokao")
        self.settings: dict[str, Any] = {
            "task": plan.task,
            "protocol": plan.protocol,
            "split": plan.split or SPLITS[plan.task],
            "shots": plan.shots,
            "shot_order": self.shot_order,
            "seed": plan.seed,
            "limit": plan.limit,
            "filter": FILTERS[plan.task],
            "subjects": [subject.name for subject in self.subjects],
            "subjects_of_task": count_subjects(plan.task),
            "questions": {subject.name: len(subject.questions) for subject in self.subjects},
            "left_out": {
                subject.name: subject.left_out for subject in self.subjects if subject.left_out
            },
            "drawn_examples": {
                s.name: [example.row for example in s.examples] for s in self.subjects
            }
            if drawn
            else None,
            "data_sha256": data_hash,
            "tokenizer_sha256": tokenizer.hash,
        }

    @property
    def num_questions(self) -> int:
        return sum(len(subject.questions) for subject in self.subjects)

    def all_prompts(self) -> list[Prompt]:
        """The prompts of all subjects."""
        return [prompt for number in range(len(self.subjects)) for prompt in self.prompts(number)]

    def prompts(self, number: int) -> list[Prompt]:
        """The prompts of one subject."""
        plan = self.plan
        return make_prompts(
            plan.task,
            self.subjects[number],
            self.tokenizer,
            protocol=plan.protocol,
            shots=plan.shots,
            shot_order=self.shot_order,
            seed=plan.seed,
        )

    def summarise(self, records: list[Record]) -> dict[str, Any]:
        """Scores of all questions' records."""
        return summarise(self.plan.task, self.plan.protocol, self.subjects, records)


def evaluate(
    evaluation: Evaluation,
    make_scorer: Callable[[], Scorer],
    output: Path | str,
    settings: dict[str, Any],
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Score all subjects, or those that an interrupted evaluation left; write the output folder and return what result.json holds.

    settings: what decides the results beside the prompts (checkpoint, dtype, devices). make_scorer
    is called where a subject is left.
    """
    first = jax.process_index() == 0
    settings = evaluation.settings | settings
    results = Results(output, settings, writes=first)
    finished = np.array([results.has(subject.name) for subject in evaluation.subjects])
    if jax.process_count() > 1:  # the first process decides for all
        finished = multihost_utils.broadcast_one_to_all(finished)
    scorer = None if finished.all() else make_scorer()
    records: list[Record] = []
    with tqdm(
        total=evaluation.num_questions,
        unit="question",
        disable=not (progress and first),
        smoothing=0.05,
    ) as bar:
        for number, subject in enumerate(evaluation.subjects):
            bar.set_description(subject.name[:32])
            end = bar.n + len(subject.questions)
            if scorer is None or finished[number]:
                records += results.load(subject.name) if first else []
            else:
                # An answer of several tokens makes several requests of one question.
                on_done = lambda count, end=end: bar.update(min(count, end - bar.n))
                found = score_prompts(
                    scorer, evaluation.prompts(number), evaluation.plan.protocol, on_done
                )
                results.save(subject.name, found)
                records += found
            bar.update(end - bar.n)
    if not first:
        return {}
    fewer = sum(record["shots"] < evaluation.plan.shots for record in records)
    prompts_hash = hashlib.sha256(
        "".join(record["prompt_sha256"] for record in records).encode()
    ).hexdigest()
    manifest = settings | {
        "prompts_sha256": prompts_hash,
        "prompts_with_fewer_shots": fewer,
        "longest_prompt_tokens": max(record["num_tokens"] for record in records),
        "version": baichuan_jax.__version__,
        "jax": jax.__version__,
    }
    plan = evaluation.plan
    result = {
        "task": plan.task,
        "protocol": plan.protocol,
        **evaluation.summarise(records),
        "manifest": manifest,
    }
    results.finish(result, records)
    return result
