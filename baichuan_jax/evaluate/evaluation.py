"""One evaluation from files to scores.

`evaluate` scores all subjects of an `Evaluation` and writes an output folder; the command calls it.
A training run asks the same questions at every evaluation (training/evaluator.py) and writes only
the averages. The manifest in result.json names everything that decides the scores: files, prompts
and weights by hash, protocol, dtype, device.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
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
from baichuan_jax.evaluate.tasks import (
    SPLITS,
    Subject,
    in_other_splits,
    known_subjects,
    load_subjects,
)
from baichuan_jax.evaluate.twins import count_twins
from baichuan_jax.resilience.causes import NumericsError
from baichuan_jax.resilience.coordination import agree
from baichuan_jax.tokenizer import Tokenizer

# Which rows of a file can be asked; part of the manifest.
FILTERS = {
    "mmlu": "none",
    "ceval": "none",
    "agieval": "four options and exactly one right answer",
    "gaokao": "exactly one answer letter A-D",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to ask and how. None: the task's or the protocol's own.

    `data`: the folder of the task's files. `shots`: examples before a question. `seed`: of their
    order and of drawn examples. `limit`: the first questions of each subject only. `answers`: a
    JSON file {subject: {id: letter}} for a split whose files hold none.
    """

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
    """A task's questions, read and checked; `settings` is all that decides its prompts.

    Raises ConfigError for files that are not right, and for what the protocol does not have.
    """

    def __init__(self, plan: Plan, tokenizer: Tokenizer) -> None:
        self.plan, self.tokenizer = plan, tokenizer
        self.shot_order: ShotOrder = plan.shot_order or default_shot_order(plan.task, plan.protocol)
        if plan.protocol == "lm-eval" and self.shot_order != "file":
            raise ConfigError(
                "protocol lm-eval keeps the examples in the file's order; "
                "shot_order=shuffled is for the original's"
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
        # For its error alone: what lm-eval lacks is refused before weights are loaded.
        template(plan.task, self.subjects[0], plan.protocol)
        # Compared with settings.json before an evaluation goes on, so everything that decides a
        # prompt is in it.
        by_name = {subject.name: subject for subject in self.subjects}
        self.settings: dict[str, Any] = {
            "task": plan.task,
            "protocol": plan.protocol,
            "split": plan.split or SPLITS[plan.task],
            "shots": plan.shots,
            "shot_order": self.shot_order,
            "seed": plan.seed,
            "limit": plan.limit,
            "filter": FILTERS[plan.task],
            "subjects": list(by_name),
            "subjects_of_task": len(known_subjects(plan.task)),
            "questions": {name: len(subject.questions) for name, subject in by_name.items()},
            "left_out": {name: s.left_out for name, s in by_name.items() if s.left_out},
            "drawn_examples": _drawn_examples(plan.task, self.subjects),
            "data_sha256": data_hash,
            "tokenizer_sha256": tokenizer.hash,
        }
        # Only where there are some: an evaluation that an earlier version began goes on where no
        # prompt is another.
        if twins := _twins_of_examples(plan.task, self.subjects):
            self.settings["twins_of_examples"] = twins
        # For the manifest. No settings: they decide nothing.
        named = [(each.name, each.examples, each.questions) for each in self.subjects]
        splits = in_other_splits(plan.task, plan.data, plan.split, self.subjects)
        self.counts: dict[str, Any] = {
            "rows": {subject.name: subject.rows for subject in self.subjects},
            "twins": count_twins(named) | {"splits": splits},
        }

    @property
    def num_questions(self) -> int:
        """Questions of all subjects."""
        return sum(len(subject.questions) for subject in self.subjects)

    def all_prompts(self) -> list[Prompt]:
        """The prompts of all subjects."""
        # For a training run, which keeps them; the command makes them subject by subject.
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
    """Score all subjects that the output folder lacks; return what result.json holds.

    settings: what decides the results beside the prompts (checkpoint, dtype, devices). make_scorer
    is called where a subject is left to score. Processes other than the first write nothing and
    return {}.
    """
    first = jax.process_index() == 0
    settings = evaluation.settings | settings
    results = Results(output, settings, writes=first)
    # Process 0 decides for all: only it sees the folder, and all must run the same batches.
    finished = agree(
        "finished subjects", lambda: [results.has(each.name) for each in evaluation.subjects]
    )
    scorer = None if all(finished) else make_scorer()
    records: list[Record] = []
    total, hidden = evaluation.num_questions, not (progress and first)
    with tqdm(total=total, unit="question", disable=hidden, smoothing=0.05) as bar:
        for number, subject in enumerate(evaluation.subjects):
            bar.set_description(subject.name[:32])
            end = bar.n + len(subject.questions)
            if scorer is None or finished[number]:
                records += results.load(subject) if first else []
            else:
                # An answer of several tokens makes several requests of one question.
                on_done = lambda count, end=end: bar.update(min(count, end - bar.n))
                prompts = evaluation.prompts(number)
                try:
                    found = score_prompts(scorer, prompts, evaluation.plan.protocol, on_done)
                except NumericsError as error:
                    # In training a rollback may help; here the same numbers would come again.
                    raise ConfigError(
                        f"{error}: the weights of {settings.get('checkpoint')} are damaged, or "
                        f"overflow in {settings.get('dtype')}; choose other weights, or float32"
                    ) from None
                results.save(subject.name, found)
                records += found
            bar.update(end - bar.n)
    if not first:
        return {}
    result = {
        "task": evaluation.plan.task,
        "protocol": evaluation.plan.protocol,
        **evaluation.summarise(records),
        "manifest": settings | evaluation.counts | _prompt_facts(records, evaluation.plan.shots),
    }
    results.finish(result, records)
    return result


def _prompt_facts(records: list[Record], shots: int) -> dict[str, Any]:
    """What the manifest says of the prompts and the program beside the settings."""
    # One hash for all prompts: two evaluations asked the same where it is the same.
    hashes = "".join(record["prompt_sha256"] for record in records)
    return {
        "prompts_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        "prompts_with_fewer_shots": sum(record["shots"] < shots for record in records),
        # Shows at once whether prompts exceed the training length.
        "longest_prompt_tokens": max(record["num_tokens"] for record in records),
        "version": baichuan_jax.__version__,
        "jax": jax.__version__,
    }


def _twins_of_examples(task: str, subjects: list[Subject]) -> dict[str, list[int]]:
    """By subject, rows that are the same question as an example.

    Where examples are drawn they are not asked; else they are asked without that example.
    """
    found: dict[str, list[int]] = {}
    for subject in subjects:
        asked = {question.row for question in subject.questions}
        # Beyond the limit nothing is asked, with or without an example.
        rows = [row for row in subject.twins if _draws(task) or row in asked]
        if rows:
            found[subject.name] = rows
    return found


def _draws(task: str) -> bool:
    """Whether a seed draws the examples of a task from its questions."""
    return task in ("agieval", "gaokao")


def _drawn_examples(task: str, subjects: list[Subject]) -> dict[str, list[int]] | None:
    """Rows that a seed drew as examples; None where the examples are files of their own."""
    if not _draws(task):
        return None
    return {subject.name: [example.row for example in subject.examples] for subject in subjects}
