"""Few-shot prompts, byte for byte those of the harnesses they follow; what is scored after them.

original: MMLU as hendrycks/test evaluate.py and Baichuan-7B's evaluate_mmlu.py (two spaces after
"about", shots dropped while a prompt exceeds 2,048 tokens), C-Eval as Baichuan-7B's evaluate_zh.py.
Of AGIEval and Gaokao the original published scores and no code: their English subjects are asked as
MMLU's, the Chinese ones as C-Eval's. lm-eval: EleutherAI's tasks mmlu and ceval-valid, version
0.4.13. No BOS anywhere.
"""

import dataclasses
import hashlib
from typing import Literal

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.evaluate.subjects import CEVAL_LM_EVAL
from baichuan_jax.evaluate.tasks import LETTERS, Question, Subject, order_key
from baichuan_jax.tokenizer import Tokenizer

Protocol = Literal["original", "lm-eval"]
ShotOrder = Literal["file", "shuffled"]
# Of the original's script for MMLU; for those it published no script for, the length it was trained
# on.
MAX_TOKENS = {"mmlu": 2048, "agieval": 4096, "gaokao": 4096}


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt is `head`, then `before`, question, `cue` and, of an example, `delimiter`, its letter and `after`."""

    head: str
    before: str
    cue: str
    delimiter: str
    after: str
    strip: bool = False
    """Strip white space around the question's text."""

    def ask(self, question: Question) -> str:
        text = question.question.strip() if self.strip else question.question
        options = "".join(
            f"\n{letter}. {choice}"
            for letter, choice in zip(LETTERS, question.choices, strict=False)
        )
        return f"{self.before}{text}{options}{self.cue}"

    def show(self, example: Question) -> str:
        return f"{self.ask(example)}{self.delimiter}{example.answer}{self.after}"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question as the model gets it."""

    subject: str
    index: int
    """The question's row in its file, from 0."""
    id: str
    text: str
    tokens: list[int]
    shots: tuple[int, ...]
    """Rows of the examples in it, in their order."""
    continuations: tuple[tuple[int, ...], ...]
    """Tokens of the four answers that may follow."""
    answer: str | None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def default_shot_order(task: str, protocol: Protocol) -> ShotOrder:
    """The order of a protocol: C-Eval's script shuffles the examples for every question, the others keep theirs."""
    return "shuffled" if task == "ceval" and protocol == "original" else "file"


def template(task: str, subject: Subject, protocol: Protocol) -> Template:
    """The wording of one subject. Raises ConfigError where lm-eval has no such task."""
    if protocol == "lm-eval":
        if task == "mmlu":
            head = f"The following are multiple choice questions (with answers) about {subject.title}.\n\n"
            return Template(head, "", "\nAnswer:", " ", "\n\n", strip=True)
        if task == "ceval":
            title = CEVAL_LM_EVAL.get(subject.name, subject.title)
            head = f"以下是中国关于{title}的单项选择题，请选出其中的正确答案。\n\n"
            return Template(head, "", "\n答案：", " ", "\n\n", strip=True)
        raise ConfigError(
            f"protocol lm-eval is for mmlu and ceval; {task} has the original's alone"
        )
    if subject.language == "en":
        # format_subject begins every word with a space, and the sentence has one before it.
        head = f"The following are multiple choice questions (with answers) about  {subject.title}.\n\n"
        return Template(head, "", "\nAnswer:", " ", "\n\n")
    return Template(
        f"以下是中国关于{subject.title}考试的单项选择题，请选出其中的正确答案。\n",
        "\n",
        "\n答案：",
        "",
        "",
    )


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
    """The prompts of all questions. Where a limit of MAX_TOKENS holds, shots are dropped from the end until none is left."""
    words = template(task, subject, protocol)
    examples = subject.examples
    shown = [words.show(example) for example in examples]
    limit = MAX_TOKENS.get(task) if protocol == "original" else None
    orders, texts = [], []
    for question in subject.questions:
        order = list(range(len(examples)))
        if shot_order == "shuffled":
            order.sort(
                key=lambda number, row=question.row: order_key(
                    f"{seed}/{subject.name}/{row}", number
                )
            )
        orders.append(order[:shots])
        texts.append(
            words.head + "".join(shown[number] for number in orders[-1]) + words.ask(question)
        )
    encoded = tokenizer.encode_batch(texts)
    for index, question in enumerate(subject.questions):
        while limit is not None and len(encoded[index]) > limit and orders[index]:
            orders[index].pop()
            texts[index] = (
                words.head
                + "".join(shown[number] for number in orders[index])
                + words.ask(question)
            )
            encoded[index] = tokenizer.encode(texts[index])
    letters = _last_tokens(tokenizer) if protocol == "original" else None
    return [
        Prompt(
            subject.name,
            question.row,
            question.id,
            text,
            tokens,
            tuple(examples[number].row for number in order),
            letters or _continuations(tokenizer, text, tokens, words.delimiter),
            question.answer,
        )
        for question, order, text, tokens in zip(
            subject.questions, orders, texts, encoded, strict=True
        )
    ]


def _last_tokens(tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The original takes the logit of the last token of the encoded letter: "▁A" in Baichuan's tokenizer, whatever comes before."""
    last = tuple((tokenizer.encode(letter)[-1],) for letter in LETTERS)
    if len(set(last)) < len(LETTERS):
        pieces = [tokenizer.piece(token) for (token,) in last]
        raise ConfigError(
            f"{tokenizer.path} ends A, B, C and D in the tokens {pieces}, which do not tell them apart"
        )
    return last


def _continuations(
    tokenizer: Tokenizer, text: str, tokens: list[int], delimiter: str
) -> tuple[tuple[int, ...], ...]:
    """As lm-eval's _encode_pair: what the encoding of prompt and answer together has beyond the prompt's own length."""
    return tuple(
        tuple(whole[len(tokens) :])
        for whole in tokenizer.encode_batch([f"{text}{delimiter}{letter}" for letter in LETTERS])
    )
