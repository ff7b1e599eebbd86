"""Text of evaluation files of every layout is found in a corpus; formulas are not taken for it."""

import csv
import errno
import json
import random

import pytest

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.data.decontaminate import FORMULA, EvaluationSets, find_evaluation_files, main

# 14 words, 22 characters: one and nine more than a sequence has.
ENGLISH = "Which of the following rivers did the second expedition cross before winter set in"
CHINESE = "下列关于唐代科举制度的说法中哪一项是不正确的"


@pytest.fixture
def folder(tmp_path):
    """The five layouts, each with one question of its own."""
    for name in ("mmlu/test", "ceval/val", "agieval", "gaokao", "own"):
        (tmp_path / name).mkdir(parents=True)
    with (tmp_path / "mmlu/test/rivers_test.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(
            [ENGLISH + "?", "Only the Dee", "None", 'All, in "order"\nand twice', "Two", "A"]
        )
    with (tmp_path / "ceval/val/history_val.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "question", "A", "B", "C", "D", "answer", "explanation"])
        writer.writerow(
            [
                0,
                CHINESE + "？____",
                "甲",
                "乙",
                "丙",
                "丁",
                "A",
                "这一段解释的文字不应该被当作考题来查找才对",
            ]
        )
    record = {
        "passage": "一二三四五六七八九十甲乙丙丁戊己庚辛",
        "question": "何者？",
        "options": ["(A)子丑寅卯辰巳午未申酉戌亥天地玄黄", "(B)短"],
        "label": "A",
        "other": {"source": "某某年某某省普通高等学校招生全国统一考试试卷"},
    }
    (tmp_path / "agieval/mixed.jsonl").write_text(
        json.dumps(record, ensure_ascii=False) + "\n\n", encoding="utf-8"
    )
    exam = {
        "keywords": "x",
        "example": [
            {
                "question": "春江潮水连海平海上明月共潮生\nA．滟滟随波 B．千万里",
                "answer": ["C"],
                "analysis": "江流宛转绕芳甸月照花林皆似霰空里流霜",
            }
        ],
    }
    (tmp_path / "gaokao/2010_MCQs.json").write_text(
        json.dumps(exam, ensure_ascii=False), encoding="utf-8"
    )
    (tmp_path / "own/notes.txt").write_text(
        "too short\n\n" + " ".join(f"word{i}" for i in range(20)), encoding="utf-8"
    )
    return tmp_path


@pytest.fixture
def sets(folder):
    return EvaluationSets(find_evaluation_files([f"{folder}/**/*.*"]))


def tasks(sets, text):
    return list(sets.judge({0: sets.find(text)}).get(0, {}))


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"They ask: {ENGLISH}, and more.", ["mmlu/rivers"]),
        (
            "which OF the following,\nrivers -- did the “second” expedition cross before "
            "Winter SET",
            ["mmlu/rivers"],
        ),
        ("Which of the following rivers did the second expedition ford before winter set in", []),
        ("Which of the following rivers did the second expedition cross", []),
        (f"问：{CHINESE}。", ["ceval/history"]),
        (CHINESE[5:18], ["ceval/history"]),
        (CHINESE[5:17], []),
        ("这一段解释的文字不应该被当作考题来查找才对", []),  # C-Eval's explanation
        ("一二三四五，六七八九十——甲乙丙丁戊", ["agieval/mixed"]),
        ("子丑寅卯辰巳午未申酉戌亥天", ["agieval/mixed"]),
        ("某某年某某省普通高等学校招生全国统一考试试卷", []),
        ("春江潮水连海平海上明月共潮生", ["gaokao/2010_MCQs"]),
        ("江流宛转绕芳甸月照花林皆似霰空里流霜", []),  # the analysis
        ("ｗｏｒｄ３ " + " ".join(f"Word{i}" for i in range(4, 17)), ["own/notes"]),
        (f"{CHINESE} {ENGLISH}", ["ceval/history", "mmlu/rivers"]),
        ("", []),
    ],
)
def test_a_text_is_found_where_it_shares_thirteen_units(sets, text, expected):
    assert tasks(sets, text) == expected


def test_items_and_those_too_short_to_be_found_are_counted(sets):
    assert dict(sets.items) == {
        "agieval/mixed": 1,
        "ceval/history": 1,
        "gaokao/2010_MCQs": 1,
        "mmlu/rivers": 1,
        "own/notes": 2,
    }
    assert {task: n for task, n in sets.short.items() if n} == {"own/notes": 1}


def test_what_is_found_is_what_a_plain_search_finds(tmp_path):
    rng = random.Random(0)
    draw = lambda n: [
        rng.choice("天地玄黃宇宙洪荒") if rng.random() < 0.5 else rng.choice(["sun", "moon", "x1"])
        for _ in range(n)
    ]
    items = [draw(40) for _ in range(30)]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"question": " ".join(item)}) + "\n" for item in items), encoding="utf-8"
    )
    sets = EvaluationSets(find_evaluation_files([str(tmp_path / "a.jsonl")]))
    known = {tuple(item[i : i + 13]) for item in items for i in range(28)}
    found = 0
    for _ in range(200):
        units = draw(60)
        if rng.random() < 0.5:
            start, at = rng.randrange(28), rng.randrange(40)
            units[at : at + rng.randint(10, 16)] = rng.choice(items)[
                start : start + rng.randint(10, 16)
            ]
        expected = {
            " ".join(units[i : i + 13])
            for i in range(len(units) - 12)
            if tuple(units[i : i + 13]) in known
        }
        assert set(sets.shared(" ".join(units)).values()) == expected
        assert len(sets.find(" ".join(units))) == len(expected)
        found += bool(expected)
    assert 30 < found < 170


def test_a_sequence_of_many_documents_is_a_formula_but_a_whole_question_is_not(tmp_path):
    formula = "中华人民共和国全国人民代表大会"
    question = (
        "以下是一道很长的题目" + formula + "其余的文字只在考卷里出现而不在别处出现所以它是泄漏"
    )
    (tmp_path / "a.txt").write_text(question, encoding="utf-8")
    sets = EvaluationSets(find_evaluation_files([str(tmp_path / "a.txt")]))
    grams = {"formula": sets.find(f"第一条{formula}"), "whole": sets.find(question)}
    assert len(grams["formula"]) == 3
    few = sets.judge(dict.fromkeys(range(FORMULA), grams["formula"]))
    assert len(few) == FORMULA
    many = sets.judge(dict.fromkeys(range(FORMULA + 1), grams["formula"]))
    assert many == {}
    everywhere = sets.judge(dict.fromkeys(range(FORMULA + 1), grams["whole"]))
    assert len(everywhere) == FORMULA + 1
    mixed = sets.judge({**dict.fromkeys(range(50), grams["formula"]), "leak": grams["whole"]})
    assert list(mixed) == ["leak"]
    assert sets.judge({}) == {}


def test_files_that_hold_nothing_to_look_for_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"\*\.csv' matches no file"):
        EvaluationSets(find_evaluation_files([str(tmp_path / "*.csv")]))
    for name, content, message in (
        ("a.json", "{", r"a\.json is no JSON"),
        ("a.csv", 'x,"un\nclosed', r"a\.csv:1: the row that begins here is no CSV"),
        ("a.txt", b"\xff\xfe\xff", r"a\.txt, line 1 is no UTF-8"),
        ("a.doc", "text", r"expected an evaluation file of kind \.csv"),
        ("a.json.gz", "text", r"expected an evaluation file of kind \.csv"),
        ("b.txt", "only a few words", "hold no sequence of 13"),
    ):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ConfigError, match=message):
            EvaluationSets(find_evaluation_files([str(tmp_path / name)]))
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    with pytest.raises(ConfigError, match="are the same file, by a link"):
        find_evaluation_files([f"{tmp_path}/*.txt"])


def test_what_a_glob_of_evaluation_files_leaves_out_is_refused_or_said(tmp_path, capsys):
    """A corpus is not clean of questions that nobody looked for."""
    (tmp_path / "d" / "test").mkdir(parents=True)
    (tmp_path / "d" / "README.txt").write_text(CHINESE)
    question = tmp_path / "d" / "test" / "x_test.csv"
    question.write_text(f"{ENGLISH}?,1,2,3,4,A\n")
    (tmp_path / "c" / "more").mkdir(parents=True)
    for name in ("a.txt", ".h.txt", "more/b.txt"):
        (tmp_path / "c" / name).write_text(ENGLISH)
    argv = ["--input", f"{tmp_path}/c/*", "--evaluation", f"{tmp_path}/d/*"]
    with pytest.raises(ConfigError, match=r"x_test\.csv is in a folder that .* \(1 such files\)"):
        main(argv)
    (tmp_path / "d" / "test" / ".y_test.csv").write_text("hidden")
    (tmp_path / "d" / ".z_test.csv").write_text("hidden")
    assert main([*argv, f"{tmp_path}/d/*/*"]) == 0
    shown = capsys.readouterr()
    assert "1 of 1 documents hold text" in shown.out
    assert "2 hidden files not read among the evaluation files" in shown.err
    assert "c/*: 1 hidden files not read, 1 files in matched folders not read;" in shown.err
    (tmp_path / "d" / "gone.csv").symlink_to("nowhere.csv")
    with pytest.raises(ConfigError, match=r"gone\.csv is a broken link"):
        main([*argv, f"{tmp_path}/d/*/*"])


def test_an_evaluation_file_that_the_disk_refuses_is_no_damaged_one(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("q")

    def fail(path, *limits):
        raise OSError(errno.EIO, "it", str(path))

    monkeypatch.setattr("baichuan_jax.config.parsing.read_regular", fail)
    with pytest.raises(OSError, match=r"a\.csv"):
        EvaluationSets([str(tmp_path / "a.csv")])


def test_fields_that_are_not_compared_are_named_and_empty_files_shown(folder, tmp_path, capsys):
    passages = [
        {"article": CHINESE, "question": ENGLISH, "Article": CHINESE, "id": 1, "note": "short"},
        {"context": f"{CHINESE[::-1]}", "title": ENGLISH, "qas": [{"question": "why"}]},
    ]
    lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in passages)
    (tmp_path / "own" / "race.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "own" / "nothing.jsonl").touch()
    sets = EvaluationSets(find_evaluation_files([f"{folder}/**/*.*"]))
    assert {task: names for task, names in sets.not_compared.items() if names} == {
        "agieval/mixed": {"other"},
        "ceval/history": {"explanation"},
        "gaokao/2010_MCQs": {"analysis"},
        "own/race": {"Article", "title"},
    }
    assert tasks(sets, CHINESE[::-1]) == ["own/race"]
    assert tasks(sets, CHINESE) == ["ceval/history", "own/race"]
    assert sets.counts("own/nothing") == {"items": 0, "too_short": 0, "not_compared": []}
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Nothing here.")
    assert main(["--evaluation", f"{folder}/own/*.*", "--input", str(corpus)]) == 0
    shown = capsys.readouterr().out
    assert "own/race: fields with text that are not compared: Article, title (compared:" in shown
    assert "own/nothing" in shown


def test_the_command_counts_documents_by_task(folder, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    corpus = tmp_path / "corpus.jsonl"
    texts = ["Nothing here.", f"A leak: {CHINESE}", f"Two: {CHINESE} {ENGLISH}"]
    corpus.write_text(
        "".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)),
        encoding="utf-8",
    )
    words = [
        "--evaluation",
        f"{folder}/mmlu/*/*.csv",
        f"{folder}/ceval/*/*.csv",
        "--input",
        str(corpus),
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert main(words) == 0
    figures = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (figures["documents"], figures["contaminated"], figures["formulas_only"]) == (3, 2, 0)
    assert {task: [p["line"] for p in f["places"]] for task, f in figures["tasks"].items()} == {
        "ceval/history": [2, 3],
        "mmlu/rivers": [3],
    }
    assert "2 of 3 documents hold text of an evaluation set" in capsys.readouterr().out
    corpus.write_text('{"text": 1}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"corpus\.jsonl, line 1: no_text"):
        main(words)
