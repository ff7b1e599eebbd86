"""Rules: the numbers they judge by against plain Python, clean text that stays, personal data."""

import gzip
import json
import random
import re
import unicodedata

import pytest
from launches import SAMPLE

pytest.importorskip("daft")
from baichuan_jax.data.corpus.config import RulesConfig
from baichuan_jax.data.rules import RULES, Rules, is_identity_number, measure


def apply(texts: list[str], config: RulesConfig):
    return Rules(config).clean(texts)


def sample(name: str) -> list[str]:
    with gzip.open(SAMPLE / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def test_measures_are_those_of_a_plain_count():
    rng = random.Random(0)
    alphabet = "的是中一abcXYZ  12.。!,…\n\n\u00e9\u0430\u200b\ufffd\ue000\x07★哈哈哈哈哈ooooo"
    texts = ["".join(rng.choice(alphabet) for _ in range(rng.randint(0, 400))) for _ in range(50)]
    texts += ["", "哈" * 5, "one two three four five six seven eight nine ten " * 2, "行" * 12]
    for text, row in zip(texts, measure(texts).to_pylist(), strict=True):
        assert row["length"] == len(text)
        assert row["han"] == len(re.findall(r"[\u4e00-\u9fff]", text))
        assert row["latin"] == len(re.findall("[A-Za-z\u00e9]", text))
        assert row["broken"] == sum(
            (unicodedata.category(c) in ("Cc", "Co", "Cn") and c not in "\n\t\r") or c == "\ufffd"
            for c in text
        )
        units = re.findall(r"[\u4e00-\u9fff]|[A-Za-z0-9\u00e9\u0430]+", text)
        assert row["units"] == len(units)
        drawn = [match for match in re.finditer(r"(\w)\1{4,}", text) if not match[1].isdigit()]
        assert row["drawn_out"] == sum(len(match[0]) for match in drawn)
        seen, covered = set(), set()
        for place in range(len(units) - 9):
            gram = tuple(
                unit.lower() if unit.isascii() else unit for unit in units[place : place + 10]
            )
            covered |= set(range(place, place + 10)) if gram in seen else set()
            seen.add(gram)
        assert row["repeated"] == len(covered)


def test_clean_prose_and_verse_stay():
    for name in ("train-zh", "train-en", "validation-zh", "validation-en"):
        texts = sample(name)
        judged = apply(texts, RulesConfig())
        gone = [reason for reason in judged["reason"].to_pylist() if reason is not None]
        assert len(gone) <= 0.01 * len(texts), (name, gone)
        assert set(judged["lang"].to_pylist()) == {name[-2:]}


def test_every_rule_has_a_text_that_only_it_removes_and_can_be_switched_off():
    """The name of the rule that a text breaks; with it switched off the text stays."""
    en = sample("validation-en")[0][:3000]
    zh = next(text for text in sample("validation-zh") if len(text) > 1000)[:1000]
    words, han = en.split(), r"[\u4e00-\u9fff]"
    shuffled = iter(random.Random(1).sample(re.findall(han, zh), len(re.findall(han, zh))))
    menu = "首页 | 新闻中心 | 关于我们\n登录\n注册\n帮助\n"
    broken = {
        "too_short": "A short text. It ends.",
        "boilerplate": menu * 30 + en[:400],
        "broken_characters": en[:1000] + "\ufffd" * 20,
        "mojibake": "it’s “so”, ".encode().decode("cp1252", errors="ignore") * 20 + en[:1000],
        "rare_han": " ".join(chr(0x9000 + 7 * i) for i in range(250)) + "。",
        "other_language": "Это предложение написано по-русски, и кончается точкой. " * 5
        + "Ещё одно о чём-то другом, и оно длиннее прежнего.",
        "digits": en[:700] + "".join(f" {i}" for i in range(1000, 1150)),
        "symbols": en[:600] + " ★☆◆◇" * 80,
        "drawn_out": en[:900] + " no" + "o" * 150,
        "repeated_lines": (en[:90].replace("\n", " ") + "\n") * 5 + en[100:420],
        "open_lines": "\n".join(f"{line} and more..." for line in en[:1500].split("\n") if line),
        "no_sentences": ", ".join(
            sorted({word.strip('.,;"!?') for word in words if len(word) > 5})
        ),
        "odd_neighbours": " ".join(random.Random(1).sample(words[:500], 500)),
        "random_order": re.sub(han, lambda _: next(shuffled), zh),
    }
    for rule, text in broken.items():
        assert apply([text], RulesConfig())["reason"].to_pylist() == [rule]
        off = apply([text], RulesConfig(limits={rule: None}))["reason"].to_pylist()
        assert off != [rule], rule
    assert broken.keys() <= {rule.name for rule in RULES}


def test_personal_data_and_nothing_else_is_masked():
    rest = "；编号110105194912310021，共138123456789元。"
    text = f"写信给a.b@example.com或致电13812345678、010-12345678，身份证11010519491231002X{rest}"
    masked = f"写信给<email>或致电<phone>、<phone>，身份证<identity>{rest}"
    assert apply([text], RulesConfig())["text"].to_pylist() == [masked]
    assert apply([text], RulesConfig(personal_data="keep"))["text"].to_pylist() == [text]
    long = sample("validation-en")[0][:2000]
    judged = apply([f"{long} {text}", long], RulesConfig(personal_data="drop"))
    assert judged["reason"].to_pylist() == ["personal_data", None]


def test_check_digits_are_those_of_the_standard():
    """The example of GB 11643-1999, and every other last digit."""
    assert [d for d in "0123456789X" if is_identity_number("11010519491231002" + d)] == ["X"]
    assert [d for d in "0123456789X" if is_identity_number("44052418800101001" + d)] == ["4"]


def test_blocked_phrases_remove_documents(tmp_path):
    (tmp_path / "phrases.txt").write_text("a C++ (blocked) phrase\n", encoding="utf-8")
    long = sample("validation-en")[0][:2000]
    judged = apply(
        [long, f"{long} A c++ (Blocked) phrase."],
        RulesConfig(blocked_phrases=str(tmp_path / "phrases.txt")),
    )
    assert judged["reason"].to_pylist() == [None, "blocked_phrase"]
