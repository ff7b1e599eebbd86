"""Where sentences end, what stays when some are cut out, and which are nearly equal."""

import itertools
import random
import re

import pytest

pytest.importorskip("daft")
import numpy as np

from baichuan_jax.data.corpus.writing import cut
from baichuan_jax.data.sentences import _anchors, alike, letters_of, spans


@pytest.mark.parametrize(
    "sentences",
    [
        [
            "Mr. Weston came in.",
            "It was 3.14 p.m. by the clock!",
            '"Stop!" he said.',
            "Was it J. Smith?",
            "Yes.",
        ],
        [
            "他说：“走吧。”",
            "我们走了！",
            "真的吗？",
            "是的……",
            "圆周率是3.14。",
            "（完。）",
            "没有句号",
        ],
        ["See Fig. 2 and e.g. Section 3.", "Use it, etc. and so on.", "The U.S. Senate met."],
    ],
)
def test_sentences_end_where_a_reader_ends_them(sentences):
    between = "" if "。" in "".join(sentences) else " "
    text = between.join(sentences) + "\n\n  " + between.join(sentences)
    assert [text[start:stop] for start, stop in spans(text)] == sentences * 2


def test_spans_hold_everything_but_white_space():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(
            rng.choice(["字", "a", "A", "。", ".", "!", "”", " ", "\n", "3", "Mr"])
            for _ in range(60)
        )
        found = spans(text)
        assert "".join(re.sub(r"\s", "", text[a:b]) for a, b in found) == re.sub(r"\s", "", text)
        assert all(a < b and text[a:b].strip() == text[a:b] for a, b in found)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(found))


@pytest.mark.parametrize(
    "text, removed, left",
    [
        ("One. Two. Three.", ["Two."], "One. Three."),
        ("One. Two.\nThree.", ["Two."], "One.\nThree."),
        ("One. Two.\nThree.", ["One."], "Two.\nThree."),
        ("One.\nTwo.\nThree.", ["Two."], "One.\nThree."),
        ("One.\n\nTwo.\n\nThree.", ["Two."], "One.\n\nThree."),
        ("　　一。二。三。\n　　四。", ["一。"], "　　二。三。\n　　四。"),
        ("　　一。二。三。\n　　四。", ["一。", "二。", "三。"], "　　四。"),
        ("一。二。三。", ["二。", "三。"], "一。"),
        ("One. Two.", ["One.", "Two."], ""),
        ("    code\n  One. Two.\n\tmore", ["One.", "Two."], "    code\n\tmore"),
    ],
)
def test_what_is_left_keeps_its_places(text, removed, left):
    assert (
        cut(
            text,
            [(text.index(sentence), text.index(sentence) + len(sentence)) for sentence in removed],
        )
        == left
    )


def test_letters_are_of_one_width_and_case():
    assert letters_of("Ｈｅｌｌｏ, World! “第１２条”") == "helloworld第12条"


def test_alike_is_a_share_of_letters_in_order_and_the_same_digits():
    """The oracle is a plain longest common subsequence."""

    def common(a: str, b: str) -> int:
        row = [0] * (len(b) + 1)
        for x in a:
            diagonal = 0
            for j, y in enumerate(b, 1):
                diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
        return row[-1]

    rng = random.Random(1)
    left, right = [], []
    for _ in range(300):
        a = [rng.choice("abcdefgh") for _ in range(rng.randint(12, 80))]
        b = [
            rng.choice("abcdefgh") if rng.random() < rng.choice([0.02, 0.1, 0.2]) else c for c in a
        ]
        left.append("".join(a))
        right.append("".join(b))
    lengths = [len(a) + len(b) for a, b in zip(left, right, strict=True)]
    distance = [n - 2 * common(a, b) for a, b, n in zip(left, right, lengths, strict=True)]
    expected = [d <= max(0.12 * n, 4) + 1e-9 for d, n in zip(distance, lengths, strict=True)]
    assert 50 < sum(expected) < 250
    assert alike(left, right, 0.88).tolist() == expected
    assert alike(["article12ofthelawonroads"], ["article13ofthelawonroads"], 0.88).tolist() == [
        False
    ]


def test_texts_that_are_alike_keep_the_same_runs():
    """With one letter of ten replaced, nearly every pair keeps two runs in common.

    Of a text's runs about 20 are kept.
    """
    rng = random.Random(2)
    shared = []
    for _ in range(400):
        a = "".join(rng.choices("etaoinshrdlucmfwyp", k=rng.randint(50, 180)))
        b = list(a)
        for place in rng.sample(range(len(a)), len(a) // 10):
            b[place] = rng.choice("bgvkxjqz")
        first, second = _anchors([a, "".join(b)], [8, 8])
        shared.append(len(np.intersect1d(first, second)))
    assert np.mean(np.array(shared) >= 2) > 0.95
    sizes = [
        len(found)
        for found in _anchors(
            ["".join(rng.choices("abcdefgh", k=500)) for _ in range(200)], [8] * 200
        )
    ]
    assert 18 < np.mean(sizes) < 22
