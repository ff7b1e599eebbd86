"""Twins: rows of a test's files that are the same question.

Published files hold questions twice, and a question whose twin stands among its examples is asked
with its answer shown. Input: questions. Output: a key that twins have in common, and their counts.

Two questions are twins where the text is the same, and so are the options, whatever their order, or
at least the right one. What pages and typists change does not count: white space, width and case of
characters, super- and subscripts, quotes, the length of a blank, a mark at the end, and a number or
a source in front. So two questions that differ in these alone pass for twins. That costs a prompt
one example; a twin that is missed shows an answer.
"""

import collections
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from baichuan_jax.evaluate.questions import LETTERS, Question

# Zero-width characters too, which pages leave in text. Between two digits white space counts.
_SPACE = r"[\s\u200b\ufeff]+"
_REMOVED = re.compile(rf"(?<!\d){_SPACE}|{_SPACE}(?!\d)")
_QUOTES = str.maketrans(dict.fromkeys("‘’`´′", "'") | dict.fromkeys("“”„«»″", '"'))
_BLANK = re.compile(r"_+")
_END = re.compile(r"[.。,、;:?!]+$")
# A question's number, and its marks or its source, as in "12.(4分)" and "(2011·北京)": they differ
# between the papers of a year and the books that print them.
_FRONT = re.compile(r"(\d+[.、](?!\d))?(\(\d+分\)|\((?:19|20)\d\d[^()]{1,30}\))*")
# Where one of the options begins in a text that holds them.
_OPTION = re.compile(r"[a-d][.、]")


def twin_key(question: Question) -> tuple[str, ...]:
    """The text, then the options in an order of their own: what is the same in all parts."""
    text, options = _parts(question)
    return (text, *sorted(options))


def _parts(question: Question) -> tuple[str, list[str]]:
    """Text and options, as they are compared."""
    text, options = _plain(question.question), [_plain(choice) for choice in question.choices]
    text = _FRONT.sub("", text, count=1)
    if not options:
        # Gaokao's options are in the text. Where it is not clear which they are, it stays whole.
        parts = _OPTION.split(text)
        if len(parts) == 5:
            text, *options = parts
    return _END.sub("", text), [_END.sub("", option) for option in options]


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text.translate(_QUOTES)).casefold()
    return _BLANK.sub("_", re.sub(_SPACE, " ", _REMOVED.sub("", text)))


def _keys(question: Question) -> set[tuple[str, ...]]:
    """What twins have one in common of: the whole question, and its text with the right option."""
    text, options = _parts(question)
    keys: set[tuple[str, ...]] = {(text, *sorted(options))}
    # A wrong option may be another one: the answer is shown all the same.
    if question.answer is not None and options:
        keys.add((text, options[LETTERS.index(question.answer)]))
    return keys


def without_twins(question: Question, examples: Iterable[Question]) -> list[Question]:
    """The examples that are not the same question, in their order."""
    keys = _keys(question)
    return [example for example in examples if not keys & _keys(example)]


def rows_with_twin(questions: Iterable[Question], examples: list[Question]) -> tuple[int, ...]:
    """Rows of the questions that are the same question as one of the examples."""
    shown = {key for example in examples for key in _keys(example)}
    return tuple(question.row for question in questions if shown & _keys(question))


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
