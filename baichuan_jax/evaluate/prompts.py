"""Few-shot prompts, byte for byte those of the harnesses they follow, and the answers to score.

In: a subject's examples and questions. Out: a `Prompt` for each question, with its tokens and the
tokens of the four answers. Two protocols:

original: MMLU as hendrycks/test evaluate.py and Baichuan-7B's evaluate_mmlu.py (two spaces after
"about", shots dropped while a prompt exceeds 2,048 tokens), C-Eval as Baichuan-7B's evaluate_zh.py.
Of AGIEval and Gaokao the original published scores and no code: their English subjects are asked as
MMLU's, the Chinese ones as C-Eval's. The answer is the logit of one token for each letter.
lm-eval: EleutherAI's tasks mmlu and ceval-valid, version 0.4.13 (Gao et al. 2021). The answer is
the log-likelihood of its tokens. No protocol begins a prompt with BOS.
"""

import dataclasses
import hashlib
from typing import Literal

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.evaluate.questions import LETTERS, Question
from baichuan_jax.evaluate.subjects import CEVAL_LM_EVAL
from baichuan_jax.evaluate.tasks import Subject, order_key
from baichuan_jax.evaluate.twins import without_twins
from baichuan_jax.tokenizer import Tokenizer

Protocol = Literal["original", "lm-eval"]
ShotOrder = Literal["file", "shuffled"]
# Tokens of a prompt in the original protocol. 2,048: its script for MMLU. 4,096, the length it was
# trained on: the tests for which it published no script. C-Eval's script has no limit.
MAX_TOKENS = {"mmlu": 2048, "agieval": 4096, "gaokao": 4096}


@dataclasses.dataclass(frozen=True)
class Template:
    """The wording of a subject's prompts.

    A prompt is `head`, the examples, the question. Each of these is `before`, text, options, `cue`;
    an example goes on with `delimiter`, its letter and `after`.
    """

    head: str
    before: str
    cue: str
    delimiter: str
    after: str
    # Strip white space around the question's text.
    strip: bool = False

    def prompt(self, examples: list[Question], question: Question) -> str:
        """The whole prompt."""
        shots = (
            f"{self._ask(example)}{self.delimiter}{example.answer}{self.after}"
            for example in examples
        )
        return self.head + "".join(shots) + self._ask(question)

    def _ask(self, question: Question) -> str:
        text = question.question.strip() if self.strip else question.question
        options = "".join(
            f"\n{letter}. {choice}"
            for letter, choice in zip(LETTERS, question.choices, strict=False)
        )
        return f"{self.before}{text}{options}{self.cue}"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question as the model gets it."""

    subject: str
    # The question's row in its file, from 0.
    index: int
    id: str
    text: str
    tokens: list[int]
    # Rows of the examples in it, in their order.
    shots: tuple[int, ...]
    # Tokens of the four answers that may follow.
    continuations: tuple[tuple[int, ...], ...]
    answer: str | None

    @property
    def sha256(self) -> str:
        """A hash of the text, which records keep in its place."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def default_shot_order(task: str, protocol: Protocol) -> ShotOrder:
    """The order of a protocol's examples: C-Eval's script shuffles them for every question."""
    return "shuffled" if task == "ceval" and protocol == "original" else "file"


def template(task: str, subject: Subject, protocol: Protocol) -> Template:
    """The wording of one subject. Raises ConfigError where lm-eval has no such task."""
    # Every space and line break here is a harness's own, the odd ones too: scores depend on them.
    english = "The following are multiple choice questions (with answers) about"
    if protocol == "lm-eval":
        if task == "mmlu":
            head = f"{english} {subject.title}.\n\n"
            return Template(head, "", "\nAnswer:", " ", "\n\n", strip=True)
        if task == "ceval":
            title = CEVAL_LM_EVAL.get(subject.name, subject.title)
            head = f"以下是中国关于{title}的单项选择题，请选出其中的正确答案。\n\n"
            return Template(head, "", "\n答案：", " ", "\n\n", strip=True)
        raise ConfigError(
            f"protocol lm-eval is for mmlu and ceval; {task} has the original's alone"
        )
    if subject.language == "en":
        # Two spaces: format_subject begins every word with one, and the sentence ends with one.
        return Template(f"{english}  {subject.title}.\n\n", "", "\nAnswer:", " ", "\n\n")
    # The line break comes before a question, as in evaluate_zh.py, not after it.
    head = f"以下是中国关于{subject.title}考试的单项选择题，请选出其中的正确答案。\n"
    return Template(head, "\n", "\n答案：", "", "")


def make_prompts(
    task: str,
    subject: Subject,
    tokenizer: Tokenizer,
    *,
    protocol: Protocol,
    shots: int,
    shot_order: ShotOrder,
    seed: int,
) -> list[Prompt]:
    """The prompts of all questions.

    Where a limit of MAX_TOKENS holds, shots are dropped from the end until the prompt fits or none
    is left.
    """
    wording = template(task, subject, protocol)
    orders = [_shots(subject, question, shots, shot_order, seed) for question in subject.questions]
    asked = list(zip(subject.questions, orders, strict=True))
    texts = [wording.prompt(order, question) for question, order in asked]
    encoded = tokenizer.encode_batch(texts)
    limit = MAX_TOKENS.get(task) if protocol == "original" else None
    letters = _last_tokens(tokenizer) if protocol == "original" else None
    prompts = []
    for (question, order), text, tokens in zip(asked, texts, encoded, strict=True):
        while limit is not None and len(tokens) > limit and order:
            # From the end, as the original's script does.
            order.pop()
            text = wording.prompt(order, question)
            tokens = tokenizer.encode(text)
        continuations = letters or _continuations(tokenizer, text, tokens, wording.delimiter)
        rows = tuple(example.row for example in order)
        prompts.append(
            Prompt(
                subject.name,
                question.row,
                question.id,
                text,
                tokens,
                rows,
                continuations,
                question.answer,
            )
        )
    return prompts


def _shots(
    subject: Subject, question: Question, shots: int, shot_order: ShotOrder, seed: int
) -> list[Question]:
    """The examples of one question's prompt, in their order."""
    # Shuffled by the question's row, so that it does not depend on which questions are asked.
    order = list(range(len(subject.examples)))
    if shot_order == "shuffled":
        key = f"{seed}/{subject.name}/{question.row}"
        order.sort(key=lambda number: order_key(key, number))
    examples = [subject.examples[number] for number in order]
    if question.row in subject.twins:
        # Its answer would stand in its own prompt. The other examples keep their order, and a test
        # that has a spare one shows that.
        examples = without_twins(question, examples)
    return examples[:shots]


def _last_tokens(tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The last token of each encoded letter, whose logit the original takes.

    "▁A" in Baichuan's tokenizer, whatever the prompt ends with.
    """
    last = tuple((tokenizer.encode(letter)[-1],) for letter in LETTERS)
    if len(set(last)) < len(LETTERS):
        pieces = [tokenizer.piece(token) for (token,) in last]
        raise ConfigError(
            f"{tokenizer.path} ends A, B, C and D in the tokens {pieces}, which are not distinct: "
            "the original protocol cannot score with it"
        )
    return last


def _continuations(
    tokenizer: Tokenizer, text: str, tokens: list[int], delimiter: str
) -> tuple[tuple[int, ...], ...]:
    """Tokens of the answers as lm-eval's _encode_pair takes them.

    Prompt and answer are encoded together, and what is longer than the prompt alone is the answer.
    """
    answers = [f"{text}{delimiter}{letter}" for letter in LETTERS]
    # Encoded apart, the answer could become other tokens: a piece may span the border.
    return tuple(tuple(whole[len(tokens) :]) for whole in tokenizer.encode_batch(answers))
