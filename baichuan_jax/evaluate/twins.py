"""Twins: rows of a test's files that are the same question.

Published files hold questions twice, and a question whose twin stands among its examples is asked
with its answer shown. Input: questions. Output: a key that twins have in common, and their counts.

Two questions are twins where text and options are the same but for white space, the width of
characters (full-width letters and marks), a leading number, and the order of the options. Case,
other marks and super- and subscripts may change a question's meaning, so they count.
"""

import collections
import re
from collections.abc import Iterable
from typing import Any

from baichuan_jax.evaluate.questions import Question

# The ASCII characters' full-width forms, U+FF01 to U+FF5E. Not NFKC, to which x² and x2 are one.
_WIDTHS = {0xFEE0 + code: code for code in range(0x21, 0x7F)}
# Zero-width characters too, which pages leave in text. Between two digits white space counts.
_SPACE = r"[\s\u200b\ufeff]+"
_REMOVED = re.compile(rf"(?<!\d){_SPACE}|{_SPACE}(?!\d)")
# A question's number, and its marks, as in "12.(4分)": they differ between the papers of a year.
_NUMBER = re.compile(r"(\d+[.、](?!\d))?(\(\d+分\))?")
# Where one of the options begins in a text that holds them.
_OPTION = re.compile(r"[A-D][.、]")


def twin_key(question: Question) -> tuple[str, ...]:
    """What twins have in common: the text, then the options in an order of their own."""
    text, options = _plain(question.question), [_plain(choice) for choice in question.choices]
    if not options:
        # Gaokao's options are in the text. Where it is not clear which they are, it stays whole.
        text = _NUMBER.sub("", text, count=1)
        parts = _OPTION.split(text)
        if len(parts) == 5:
            text, *options = parts
    return (text, *sorted(options))


def _plain(text: str) -> str:
    return re.sub(_SPACE, " ", _REMOVED.sub("", text.translate(_WIDTHS)))


def rows_with_twin(questions: Iterable[Question], examples: list[Question]) -> tuple[int, ...]:
    """Rows of the questions that are the same question as one of the examples."""
    shown = {twin_key(example) for example in examples}
    return tuple(question.row for question in questions if twin_key(question) in shown)


def count_twins(
    subjects: Iterable[tuple[str, list[Question], list[Question]]],
) -> dict[str, Any]:
    """For the manifest, of (name, examples, questions asked) of each subject.

    Keys: `examples` and `questions`, by subject how many are the same as an earlier one of the
    subject; `subjects`, how many questions are asked in several subjects.
    """
    examples: dict[str, int] = {}
    questions: dict[str, int] = {}
    asked_in: collections.Counter[tuple[str, ...]] = collections.Counter()
    for name, shown, asked in subjects:
        keys = [twin_key(question) for question in asked]
        asked_in.update(set(keys))
        for found, every in (
            (examples, [twin_key(example) for example in shown]),
            (questions, keys),
        ):
            if repeated := len(every) - len(set(every)):
                found[name] = repeated
    several = sum(count > 1 for count in asked_in.values())
    return {"examples": examples, "questions": questions, "subjects": several}
