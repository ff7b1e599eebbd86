"""Files and prompts: the harnesses' wording written out, and every file that must be refused."""

import csv
import json
import shutil

import pytest
from exam import make_agieval, make_ceval, make_gaokao, make_mmlu, write_csv

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.evaluate.prompts import make_prompts
from baichuan_jax.evaluate.questions import READERS
from baichuan_jax.evaluate.tasks import load_subjects


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    path = "bytes"

    def encode(self, text):
        return list(text.encode())

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def piece(self, token):
        return chr(token)


def prompts_of(task, folder, *, protocol="original", shots=1, shot_order="file", seed=0, **options):
    subjects, _ = load_subjects(task, folder, shots=shots, seed=seed, **options)
    return [
        prompt
        for subject in subjects
        for prompt in make_prompts(
            task, subject, Bytes(), protocol=protocol, shots=shots, shot_order=shot_order, seed=seed
        )
    ]


@pytest.fixture
def mmlu(tmp_path):
    write_csv(
        tmp_path / "dev" / "us_foreign_policy_dev.csv", [["Q one?", "a", "b", "c", "None", "D"]]
    )
    rows = [
        [" Why, then? ", "1.0", "None", 'say "x"', "d\ne", "B"],
        ["Second", "1", "2", "3", "4", "A"],
    ]
    write_csv(tmp_path / "test" / "us_foreign_policy_test.csv", rows)
    return tmp_path


def test_mmlu_is_asked_as_hendrycks_script_does(mmlu):
    """Two spaces after "about", every field as it stands, no white space at the end."""
    prompt = prompts_of("mmlu", mmlu, only=["us_foreign_policy"])[0]
    assert prompt.text == (
        "The following are multiple choice questions (with answers) about  us foreign policy.\n\n"
        "Q one?\nA. a\nB. b\nC. c\nD. None\nAnswer: D\n\n"
        ' Why, then? \nA. 1.0\nB. None\nC. say "x"\nD. d\ne\nAnswer:'
    )
    assert (prompt.answer, prompt.shots, prompt.continuations) == (
        "B",
        (0,),
        ((65,), (66,), (67,), (68,)),
    )


def test_mmlu_is_asked_as_lm_eval_does(mmlu):
    prompt = prompts_of("mmlu", mmlu, only=["us_foreign_policy"], protocol="lm-eval")[0]
    assert prompt.text == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
        "Q one?\nA. a\nB. b\nC. c\nD. None\nAnswer: D\n\n"
        'Why, then?\nA. 1.0\nB. None\nC. say "x"\nD. d\ne\nAnswer:'
    )
    assert prompt.continuations[0] == tuple(b" A")


def test_ceval_is_asked_as_the_originals_script_does(tmp_path):
    dev = [
        ["id", "question", *"ABCD", "answer", "explanation"],
        ["0", "一加一____", "1", "2", "3", "4", " b", "算"],
    ]
    write_csv(tmp_path / "dev" / "mao_zedong_thought_dev.csv", dev)
    val = [["id", "question", *"ABCD", "answer"], ["0", "二加二____", "4", "5", "6", "7", "A"]]
    write_csv(tmp_path / "val" / "mao_zedong_thought_val.csv", val)
    text = (tmp_path / "val" / "mao_zedong_thought_val.csv").read_bytes()
    assert b"\r\n" in text
    (tmp_path / "val" / "mao_zedong_thought_val.csv").write_bytes(b"\xef\xbb\xbf" + text)
    original = prompts_of("ceval", tmp_path, only=["mao_zedong_thought"])[0]
    assert original.text == (
        "以下是中国关于毛泽东思想和中国特色社会主义理论概论考试的单项选择题，请选出其中的正确答案。\n"
        "\n一加一____\nA. 1\nB. 2\nC. 3\nD. 4\n答案：B"
        "\n二加二____\nA. 4\nB. 5\nC. 6\nD. 7\n答案："
    )
    assert original.continuations[0] == (65,)
    other = prompts_of("ceval", tmp_path, only=["mao_zedong_thought"], protocol="lm-eval")[0]
    assert other.text == (
        "以下是中国关于毛泽东思想和中国特色社会主义理论体系概论的单项选择题，请选出其中的正确答案。\n\n"
        "一加一____\nA. 1\nB. 2\nC. 3\nD. 4\n答案： B\n\n"
        "二加二____\nA. 4\nB. 5\nC. 6\nD. 7\n答案："
    )


def test_shots_are_dropped_while_a_prompt_exceeds_2048_tokens(tmp_path):
    examples = [[f"{number}" * 500, "a", "b", "c", "d", "A"] for number in range(5)]
    write_csv(tmp_path / "dev" / "virology_dev.csv", examples)
    lengths = (10, 380, 1000, 3000)
    write_csv(
        tmp_path / "test" / "virology_test.csv",
        [["x" * size, "a", "b", "c", "d", "A"] for size in lengths],
    )
    head = len("The following are multiple choice questions (with answers) about  virology.\n\n")
    options = len("\nA. a\nB. b\nC. c\nD. d\nAnswer:")
    for prompt, size in zip(
        prompts_of("mmlu", tmp_path, only=["virology"], shots=5), lengths, strict=True
    ):
        fitting = [
            k
            for k in range(6)
            if head + k * (500 + options + len(" A\n\n")) + size + options <= 2048
        ]
        assert prompt.shots == tuple(range(max(fitting, default=0))), size
        assert (
            len(prompt.tokens)
            == len(prompt.text)
            == head + len(prompt.shots) * (504 + options) + size + options
        )


def test_ceval_shuffles_the_examples_for_every_question(tmp_path):
    make_ceval(tmp_path, ["logic"], 12)
    one = prompts_of("ceval", tmp_path, only=["logic"], shots=5, shot_order="shuffled")
    again = prompts_of("ceval", tmp_path, only=["logic"], shots=5, shot_order="shuffled")
    other = prompts_of("ceval", tmp_path, only=["logic"], shots=5, shot_order="shuffled", seed=1)
    assert one == again
    assert [prompt.shots for prompt in one] != [prompt.shots for prompt in other]
    assert len({prompt.shots for prompt in one}) > 6

    def rows(split):
        with open(tmp_path / split / f"logic_{split}.csv", encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def block(row, answer=""):
        return (
            f"\n{row['question']}\n"
            + "".join(f"{letter}. {row[letter]}\n" for letter in "ABCD")
            + f"答案：{answer}"
        )

    dev = rows("dev")
    for prompt, row in zip(one, rows("val"), strict=True):
        assert sorted(prompt.shots) == list(range(5))
        shown = "".join(block(dev[number], dev[number]["answer"]) for number in prompt.shots)
        assert (
            prompt.text
            == "以下是中国关于逻辑学考试的单项选择题，请选出其中的正确答案。\n" + shown + block(row)
        )


def test_agieval_keeps_four_options_with_one_answer_and_draws_its_examples(tmp_path):
    make_agieval(tmp_path, 20)
    english, chinese = load_subjects("agieval", tmp_path, only=["logiqa-en", "jec-qa-kd"])[0]
    rows = [
        json.loads(line)
        for line in (tmp_path / "jec-qa-kd.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    single = {number for number, row in enumerate(rows) if len(row["label"]) == 1}
    drawn = {example.row for example in chinese.examples}
    assert len(drawn) == 5
    assert drawn | {question.row for question in chinese.questions} == single
    assert (len(english.questions), english.left_out) == (10, 5)
    assert chinese.left_out == 20 - len(single)
    other, _ = load_subjects("agieval", tmp_path, only=["jec-qa-kd"], seed=1)
    assert {example.row for example in other[0].examples} != drawn
    question = english.questions[0]
    source = json.loads(
        (tmp_path / "logiqa-en.jsonl").read_text(encoding="utf-8").splitlines()[question.row]
    )
    assert [
        f"({letter}){choice}" for letter, choice in zip("ABCD", question.choices, strict=True)
    ] == source["options"]


def test_options_lose_their_letters_however_they_are_written(tmp_path):
    written = [
        ["A No sun", "B No moon", "C 有 白 术", "D 不 白 术"],
        ["  A．广义", "  B．照着", "  C．接着", "  D．不同"],
        ["(A)A man", "B. Apples", "(C)", "(C)同"],
        ["A man", "Both", "Cats", "D"],
    ]
    lines = [
        json.dumps({"question": "q", "options": options, "label": "A"}, ensure_ascii=False)
        for options in written
    ]
    (tmp_path / "sat-math.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (subject,), _ = load_subjects("agieval", tmp_path, only=["sat-math"], shots=0)
    assert [question.choices for question in subject.questions] == [
        ("No sun", "No moon", "有 白 术", "不 白 术"),
        ("广义", "照着", "接着", "不同"),
        ("A man", "Apples", "", "同"),
        ("A man", "Both", "Cats", "D"),
    ]


def test_gaokao_keeps_one_letter_and_asks_the_question_as_it_stands(tmp_path):
    make_gaokao(tmp_path, 16)
    prompts = prompts_of("gaokao", tmp_path, only=["2010-2022_History_MCQs"], shots=2)
    rows = json.loads((tmp_path / "2010-2022_History_MCQs.json").read_text(encoding="utf-8"))[
        "example"
    ]
    assert len(prompts) == 12 - 2
    for prompt in prompts:
        assert prompt.text.endswith("\n" + rows[prompt.index]["question"].strip() + "\n答案：")
        assert [prompt.answer] == rows[prompt.index]["answer"]
        assert prompt.index not in prompt.shots


BAD = {
    "a row of five fields": (
        "test/us_foreign_policy_test.csv",
        b'"Q\nq",a,b,c,d,A\nQ,a,b,c,A\n',
        r"_test\.csv:3: 5 fields",
    ),
    "an answer E": (
        "test/us_foreign_policy_test.csv",
        b"Q,a,b,c,d,A\nQ,a,b,c,d,E\n",
        r"_test\.csv:2: the answer is 'E'",
    ),
    "another encoding": (
        "test/us_foreign_policy_test.csv",
        b"Q,a,b,c,d,A\n\xc4\xe3,a,b,c,d,A\n",
        r"_test\.csv:2: not UTF-8",
    ),
    "an empty split": ("test/us_foreign_policy_test.csv", b"", r"_test\.csv has no questions"),
    "empty examples": ("dev/us_foreign_policy_dev.csv", b"", r"_dev\.csv must hold examples"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_mmlu_files_are_named(mmlu, what):
    name, content, message = BAD[what]
    (mmlu / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        prompts_of("mmlu", mmlu, only=["us_foreign_policy"])


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "id,question,A,B,C,answer\n0,q,1,2,3,A\n",
            r"_val\.csv:1: the header is .*, which lacks D;",
        ),
        (
            "id,question,A,B,C,D,D,answer\n0,q,1,2,3,4,5,A\n",
            r"_val\.csv:1: the header is .*, which has D twice;",
        ),
        (
            "id,question,A,B,C,D,answer\n0,q,1,2,3,4\n",
            r"_val\.csv:2: 6 fields and the header has 7",
        ),
        ("id,question,A,B,C,D,answer\n0,q,1,2,3,4,F\n", r"_val\.csv:2: the answer is 'F'"),
        ("id,question,A,B,C,D\n0,q,1,2,3,4\n", r"_val\.csv has questions without answers"),
        ("id,question,A,B,C,D,answer\n", r"_val\.csv has no questions"),
    ],
)
def test_bad_ceval_files_are_named(tmp_path, content, message):
    make_ceval(tmp_path, ["logic"], 2)
    (tmp_path / "val" / "logic_val.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_subjects("ceval", tmp_path, only=["logic"])


@pytest.mark.parametrize("task", ["mmlu", "ceval"])
def test_a_quote_without_its_pair_does_not_make_two_questions_one(tmp_path, task):
    """One in the middle of a field is a character: a file of MMLU has one."""
    header, start = ("id,question,A,B,C,D,answer\n", "7,") if task == "ceval" else ("", "")
    path = tmp_path / "x.csv"
    rows = [f'{start}Nietzsche\'s "Will" to Truth?",1,2,3,4,A\n', f"{start}second?,1,2,3,4,B\n"]
    path.write_text(header + "".join(rows))
    found = READERS[task](path)
    assert [question.question[-8:] for question in found.questions] == [' Truth?"', "second?"]
    for text in ('"Which,1,2,3,4,A\nsecond question" is it,1,2,3,4,B\n', '"open,1,2,3,4,A\n'):
        path.write_text(f"{header}{rows[1]}{start}{text}")
        line = 3 if header else 2
        with pytest.raises(ConfigError, match=rf"x\.csv:{line}: the row that .* is no CSV"):
            READERS[task](path)


@pytest.mark.parametrize("begin", ["", '"'])
def test_a_field_that_is_too_long_is_refused_by_the_limit(tmp_path, begin):
    path = tmp_path / "x.csv"
    path.write_text(f"a,1,2,3,4,A\n{begin}{'long ' * 30_000},1,2,3,4,B\n")
    with pytest.raises(ConfigError) as error:
        READERS["mmlu"](path)
    limit = "x.csv:2: the row that begins here has a field of over 131,072 characters"
    assert limit in str(error.value)
    # Quotes are named where one may be what made the field long.
    assert ("doubled" in str(error.value)) == (begin == '"')


def test_bad_jsonl_and_json_are_named(tmp_path):
    make_agieval(tmp_path, 8)
    with open(tmp_path / "logiqa-en.jsonl", "a", encoding="utf-8") as file:
        file.write('{"question": "q"\n')
    with pytest.raises(ConfigError, match=r"logiqa-en\.jsonl:9 is no JSON"):
        load_subjects("agieval", tmp_path, only=["logiqa-en"])
    (tmp_path / "2010-2022_History_MCQs.json").write_text(
        '{"example": [{"question": "q", "answer": "A"}]}', encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"History_MCQs\.json, example 0"):
        load_subjects("gaokao", tmp_path, only=["2010-2022_History_MCQs"])


@pytest.mark.parametrize(
    "row, message",
    [
        ('["q"]', "a row is a list, expected an object"),
        (
            '{"question": "q", "label": "A"}',
            r"there is no field 'options' \(there are: \['label', 'question'\]\)",
        ),
        (
            '{"question": null, "options": [], "label": "A"}',
            "field 'question' is null, expected a string",
        ),
        (
            '{"question": "q", "options": "abcd", "label": "A"}',
            "field 'options' is a string, expected a list or null",
        ),
        (
            '{"question": "q", "options": [], "label": 3}',
            "field 'label' is a number, expected a string or a list or null",
        ),
        ('{"question": "q", "options": ["a", "b", "c", 4], "label": "A"}', "strings, not 4"),
        ('{"question": "q", "options": ["a", "b", "c", "d"], "label": [1]}', "strings, not 1"),
        (
            '{"question": "q", "options": [], "label": "A", "passage": {}}',
            "field 'passage' is an object, expected a string or null",
        ),
        ('{"question": "\\ud83d", "options": [], "label": "A"}', "half a character"),
        ("[" * 200_000, "is no JSON"),
    ],
)
def test_a_row_of_other_types_is_named_by_what_it_has(tmp_path, row, message):
    (tmp_path / "sat-math.jsonl").write_text(f"\n{row}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"sat-math\.jsonl:2.*{message}"):
        load_subjects("agieval", tmp_path, only=["sat-math"])


def test_a_value_of_any_length_is_shown_by_its_beginning(tmp_path):
    row = {"question": "q", "options": ["a", "b", "c", {"": 10**4000}], "label": "A"}
    (tmp_path / "sat-math.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"must be strings") as error:
        load_subjects("agieval", tmp_path, only=["sat-math"])
    assert len(str(error.value)) < 500 + len(str(tmp_path))


def test_settings_are_refused_one_by_one(tmp_path):
    with pytest.raises(ConfigError, match=r"^limit=0 must be 1 or more$"):
        load_subjects("agieval", tmp_path, limit=0)
    with pytest.raises(ConfigError, match=r"^shots=-1 must be 0 or more$"):
        load_subjects("agieval", tmp_path, shots=-1)


def test_a_folder_that_is_another_or_is_incomplete_is_named(tmp_path):
    make_mmlu(tmp_path / "data", ["virology", "marketing"], 3)
    with pytest.raises(ConfigError, match=r"holds none of mmlu's data .* it is in .*data"):
        load_subjects("mmlu", tmp_path)
    make_mmlu(tmp_path / "one" / "two" / "three", ["virology"], 3)
    with pytest.raises(ConfigError, match=r"it is in .*/one/two/three$"):
        load_subjects("mmlu", tmp_path / "one")
    # Not at any cost: the folder may be / by mistake.
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"holds none of mmlu's data .*: there are one$"):
        load_subjects("mmlu", tmp_path)
    make_mmlu(tmp_path / "data", ["virology", "marketing"], 3)
    with pytest.raises(ConfigError, match="no such folder"):
        load_subjects("mmlu", tmp_path / "nowhere")
    with pytest.raises(
        ConfigError, match=r"110 of mmlu's files are missing: .* --subjects virology,marketing"
    ):
        load_subjects("mmlu", tmp_path / "data")
    (tmp_path / "data" / "dev" / "virology_dev.csv").unlink()
    with pytest.raises(ConfigError, match=r"dev/virology_dev\.csv; fetch the rest"):
        load_subjects("mmlu", tmp_path / "data", only=["virology", "marketing"])
    with pytest.raises(ConfigError, match="did you mean 'marketing'"):
        load_subjects("mmlu", tmp_path / "data", only=["markting"])


def test_the_test_split_of_ceval_takes_answers_that_are_brought(tmp_path):
    make_ceval(tmp_path, ["logic", "law"], 3)
    subjects, _ = load_subjects("ceval", tmp_path, only=["logic", "law"], split="test")
    assert all(question.answer is None for subject in subjects for question in subject.questions)
    answers = tmp_path / "answers.json"
    answers.write_text(
        json.dumps({"logic": {"0": "A", "1": "B", "2": "C"}, "law": {"0": "D", "1": "D"}}),
        encoding="utf-8",
    )
    (logic,), _ = load_subjects("ceval", tmp_path, only=["logic"], split="test", answers=answers)
    assert [question.answer for question in logic.questions] == ["A", "B", "C"]
    with pytest.raises(
        ConfigError, match=r"answers=.*answers\.json has no use: all questions have"
    ):
        load_subjects("ceval", tmp_path, only=["logic"], split="val", answers=answers)
    with pytest.raises(ConfigError, match="the answer of law 2 is None"):
        load_subjects("ceval", tmp_path, only=["logic", "law"], split="test", answers=answers)
