"""The command as a whole: killed and started again, its scores, its refusals.

And the same scores inside a training run.
"""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from exam import make_ceval, make_mmlu
from launches import start_module, write_config
from safetensors.numpy import load_file, save_file

from baichuan_jax.config.files import load_config
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.evaluate import subjects as names
from baichuan_jax.evaluate.__main__ import main
from baichuan_jax.evaluate.questions import LETTERS, Question
from baichuan_jax.evaluate.results import Results, dump_json, summarise
from baichuan_jax.evaluate.tables import PUBLISHED, markdown
from baichuan_jax.evaluate.tasks import Subject, known_subjects, load_subjects
from baichuan_jax.generate import main as generate
from baichuan_jax.resilience.causes import NumericsError
from baichuan_jax.tokenizer import train_tokenizer
from baichuan_jax.train import train

GOLDEN = Path(__file__).parents[1] / "golden"
SUBJECTS = ["logic", "law", "college_physics"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The golden model with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "tiny" / name, folder)
    shutil.copy(GOLDEN / "exam" / "tokenizer.model", folder)
    return folder


@pytest.fixture
def options(tmp_path, checkpoint):
    """Options of an evaluation of three C-Eval subjects, four questions each."""
    make_ceval(tmp_path / "ceval", SUBJECTS, 4)
    options = {
        "checkpoint": checkpoint,
        "data": tmp_path / "ceval",
        "subjects": ",".join(SUBJECTS),
        "shots": 2,
    }
    return [
        "ceval",
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
    ]


def files(folder):
    return {
        name: (folder / name).read_bytes()
        for name in ("result.json", "records.jsonl", "table.md", "chart.png")
    }


def test_a_killed_evaluation_goes_on_to_identical_files(tmp_path, options):
    def start(output):
        return start_module("baichuan_jax.evaluate", *options, "--output", str(tmp_path / output))

    killed = start("killed")
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("killed/subjects/*.jsonl")):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.wait(60)
    finished = {path.name for path in tmp_path.glob("killed/subjects/*.jsonl")}
    assert 0 < len(finished) < len(SUBJECTS)
    assert not (tmp_path / "killed" / "result.json").exists()
    first = {
        name: (tmp_path / "killed" / "subjects" / name).stat().st_mtime_ns for name in finished
    }
    assert [process.wait(240) for process in (start("killed"), start("undisturbed"))] == [0, 0]
    assert files(tmp_path / "killed") == files(tmp_path / "undisturbed")
    for name, written in first.items():  # kept, not scored again
        assert (tmp_path / "killed" / "subjects" / name).stat().st_mtime_ns == written


def test_results_add_up_and_others_are_not_mixed_in(tmp_path, options, capsys):
    output = ["--output", str(tmp_path / "out")]
    assert main([*options, *output, "--json", str(tmp_path / "figures.json")]) == 0
    assert "3 of 52 subjects" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    records = [
        json.loads(line)
        for line in (tmp_path / "out" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(records) == 12
    for record in records:
        assert record["prediction"] == LETTERS[int(np.argmax(record["logits"]))]
        assert (record["shots"], len(record["shot_rows"])) == (2, 2)
    right = {
        name: [r["prediction"] == r["answer"] for r in records if r["subject"] == name]
        for name in SUBJECTS
    }
    assert result["average"] == pytest.approx(np.mean([np.mean(group) for group in right.values()]))
    assert result["micro"]["accuracy"] == pytest.approx(
        np.mean(np.concatenate(list(right.values())))
    )
    assert result["categories"]["Hard"]["accuracy"] == pytest.approx(
        np.mean(right["college_physics"])
    )
    assert result["manifest"]["shot_order"] == "shuffled"
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures["speed"]["prompt_tokens"] == sum(record["num_tokens"] for record in records)
    with pytest.raises(ConfigError, match=r"another evaluation \(seed: 0 there, 1 now\)"):
        main([*options, *output, "--seed", "1"])


def test_standard_errors_and_categories():
    """Against numpy, on answers made by hand."""
    draw = np.random.default_rng(3)
    sizes = {"virology": 7, "marketing": 30, "prehistory": 12}
    subjects = [Subject(name, *known_subjects("mmlu")[name], [], [], 0) for name in sizes]
    records = [
        {"subject": name, "prediction": "A", "answer": str(draw.choice(list("AB")))}
        for name, size in sizes.items()
        for _ in range(size)
    ]
    right = {
        name: np.array([r["answer"] == "A" for r in records if r["subject"] == name], float)
        for name in sizes
    }
    found = summarise("mmlu", "original", subjects, records)
    pooled = np.concatenate(list(right.values()))
    assert found["average"] == pytest.approx(pooled.mean())
    assert found["stderr"] == pytest.approx(pooled.std(ddof=1) / np.sqrt(len(pooled)))
    other = np.concatenate([right["virology"], right["marketing"]])
    category = found["categories"]["other (business, health, misc.)"]
    assert (category["accuracy"], category["questions"], category["subjects"]) == (
        pytest.approx(other.mean()),
        37,
        2,
    )
    errors = [group.std(ddof=1) / np.sqrt(len(group)) for group in right.values()]
    assert found["macro"]["accuracy"] == pytest.approx(
        np.mean([group.mean() for group in right.values()])
    )
    assert found["macro"]["stderr"] == pytest.approx(np.sqrt(np.sum(np.square(errors))) / 3)
    manifest = {
        "shots": 5,
        "split": "test",
        "limit": None,
        "subjects_of_task": 57,
        "shot_order": "file",
    }
    text = markdown({"task": "mmlu", "protocol": "original", **found, "manifest": manifest})
    assert f"| {100 * pooled.mean():.1f} ± {100 * found['stderr']:.1f} |" in text
    assert "| Baichuan-7B (published) | 38.4 | 48.9 | 35.6 | 48.1 | 42.3 |" in text
    assert all(model in text for model in PUBLISHED["mmlu"])


def test_the_test_split_makes_a_submission_or_takes_answers(tmp_path, options):
    assert main([*options, "--output", str(tmp_path / "blind"), "--split", "test"]) == 0
    submission = json.loads((tmp_path / "blind" / "submission.json").read_text(encoding="utf-8"))
    assert {name: list(answers) for name, answers in submission.items()} == {
        name: list("0123") for name in SUBJECTS
    }
    result = json.loads((tmp_path / "blind" / "result.json").read_text(encoding="utf-8"))
    assert not result["scored"]
    assert "average" not in result
    assert "submission.json" in (tmp_path / "blind" / "table.md").read_text(encoding="utf-8")
    answers = str(tmp_path / "blind" / "submission.json")  # scored against itself
    assert (
        main(
            [
                *options,
                "--output",
                str(tmp_path / "scored"),
                "--split",
                "test",
                "--answers",
                answers,
            ]
        )
        == 0
    )
    assert (
        json.loads((tmp_path / "scored" / "result.json").read_text(encoding="utf-8"))["average"]
        == 1.0
    )


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(tmp_path, options):
    train_tokenizer(["a b c d e f " * 50], tmp_path / "other.model", 265)
    with pytest.raises(ConfigError, match="was trained with tokenizer"):
        main(
            [
                *options,
                "--output",
                str(tmp_path / "out"),
                "--tokenizer",
                str(tmp_path / "other.model"),
            ]
        )


def test_training_scores_as_the_command_does(tmp_path):
    make_mmlu(tmp_path / "mmlu", ["virology"], 5)
    settings = [
        f"run_dir={tmp_path / 'run'}",
        "train.num_steps=4",
        "optimizer.warmup_steps=1",
        "evaluate.every=2",
        f"evaluate.tasks={{mmlu: {tmp_path / 'mmlu'}}}",
        "evaluate.subjects={mmlu: [virology]}",
        "evaluate.limit=4",
    ]
    run = train(load_config(write_config(tmp_path), settings))
    scores = run.curve("mmlu")
    assert list(scores) == [2, 4]
    assert run.curve("eval_loss").keys() == scores.keys()
    options = [
        "mmlu",
        "--checkpoint",
        str(tmp_path / "run"),
        "--data",
        str(tmp_path / "mmlu"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*options, "--subjects", "virology", "--limit", "4"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert (result["average"], result["stderr"], result["questions"]) == (
        scores[4],
        run.curve("mmlu_stderr")[4],
        4,
    )


def test_a_prompt_longer_than_the_models_rows_is_said(tmp_path, options, checkpoint, capsys):
    config = json.loads((checkpoint / "config.json").read_text())
    folder = shutil.copytree(checkpoint, tmp_path / "short")
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    given = [str(folder) if word == str(checkpoint) else word for word in options]
    assert main([*given, "--output", str(tmp_path / "out")]) == 0
    assert "the model was trained on rows of 16" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_done_is_refused_before_the_weights_are_read(
    tmp_path, options, checkpoint, monkeypatch, capsys
):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("baichuan_jax.evaluate.__main__.load_model", never)
    monkeypatch.setattr("baichuan_jax.generate.load_model", never)
    (tmp_path / "a.txt").write_text("a short text")
    text = ["--text", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="a window of 4096 tokens does not fit"):
        main(["perplexity", "--checkpoint", str(checkpoint), *text])
    with pytest.raises(SystemExit):
        main([*options, "--output", str(tmp_path / "out"), "--json", str(tmp_path)])
    assert "--json:" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is empty"):
        generate(["--checkpoint", str(checkpoint), "--prompt", ""])
    with pytest.raises(SystemExit):
        generate(["--checkpoint", str(checkpoint), "--prompt", "a", "--temperature", "nan"])
    assert "--temperature: 'nan' must be a number" in capsys.readouterr().err


@pytest.fixture
def curve(tmp_path, checkpoint):
    """Measure a short curve of a text: curve(output, *options)."""
    (tmp_path / "a.txt").write_text("It was a truth universally acknowledged. " * 20)
    words = ["perplexity", "--checkpoint", str(checkpoint), "--text", str(tmp_path / "a.txt")]
    words += ["--max_tokens", "64", "--context", "16"]
    return lambda output, *options: main([*words, "--output", str(output), *options])


def test_a_curve_takes_no_others_place(tmp_path, curve, options, monkeypatch, capsys):
    """As the results of a test."""
    row = {"context": 16, "windows": 4, "tokens_left_out": 0}
    row |= {"perplexity": 2.0, "tail_perplexity": 2.0}
    monkeypatch.setattr("baichuan_jax.evaluate.__main__.load_model", lambda *_: None)
    monkeypatch.setattr("baichuan_jax.evaluate.__main__.perplexity_curve", lambda *_, **__: [row])
    assert curve(tmp_path / "out") == 0
    before = (tmp_path / "out" / "result.json").read_bytes()
    # The same curve may be measured again.
    (tmp_path / ".hidden.txt").touch()
    assert curve(tmp_path / "out", "--text", f"{tmp_path}/*.txt") == 0
    assert "1 hidden files not read" in capsys.readouterr().err
    for changes, message in (
        (["--context", "8"], r"contexts: \[16\] there, \[8\] now"),
        (["--max_tokens", "48"], r"text_sha256"),
        (["--dtype", "bfloat16"], r"dtype: 'float32' there, 'bfloat16' now"),
    ):
        with pytest.raises(
            ConfigError, match=rf"holds results of another evaluation \(.*{message}"
        ):
            curve(tmp_path / "out", *changes)
    with pytest.raises(ConfigError, match=r"holds results of another evaluation \("):
        main([*options, "--output", str(tmp_path / "out"), "--limit", "1"])
    assert (tmp_path / "out" / "result.json").read_bytes() == before
    Results(tmp_path / "test", {"task": "mmlu"})
    with pytest.raises(ConfigError, match=r"holds results of another evaluation \("):
        curve(tmp_path / "test")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "result.json").write_text("mine")
    with pytest.raises(ConfigError, match="exists and holds no evaluation"):
        curve(tmp_path / "foreign")
    assert (tmp_path / "foreign" / "result.json").read_text() == "mine"


def test_weights_that_are_not_finite_are_refused(tmp_path, curve, options, checkpoint):
    """By every command that computes with them."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan
    folder = tmp_path / "nan"
    shutil.copytree(checkpoint, folder)
    save_file(tensors, folder / "model.safetensors")
    message = r"weights of .*nan are not finite \(layers/w_up: 1 of \d+ arrays"
    with pytest.raises(ConfigError, match=message):
        curve(tmp_path / "out", "--checkpoint", str(folder))
    assert not (tmp_path / "out" / "result.json").exists()
    with pytest.raises(ConfigError, match=message):
        main([*options, "--output", str(tmp_path / "test"), "--checkpoint", str(folder)])
    with pytest.raises(ConfigError, match=message):
        generate(["--checkpoint", str(folder), "--prompt", "a"])


def test_numbers_that_overflow_end_an_evaluation_as_a_wrong_input(tmp_path, options, monkeypatch):
    """A restart, which may help a training run, would meet them again."""

    def overflow(*_: object, **__: object) -> None:
        raise NumericsError("logic, question 0: the logits [inf] are not finite")

    monkeypatch.setattr("baichuan_jax.evaluate.evaluation.score_prompts", overflow)
    with pytest.raises(ConfigError, match=r"logic, question 0.*the weights of .* are damaged, or"):
        main([*options, "--output", str(tmp_path / "out")])
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            dump_json({"perplexity": number})


def test_ids_of_a_submission_are_distinct(tmp_path, options):
    """It would hold fewer answers than there are questions."""
    file = tmp_path / "ceval" / "test" / "law_test.csv"
    lines = file.read_text(encoding="utf-8").split("\n")
    assert lines[4].startswith("3,")
    file.write_text("\n".join([*lines[:4], "1" + lines[4][1:], *lines[5:]]), encoding="utf-8")
    message = r"law_test\.csv: rows 1 and 3 \(from 0\) both have the id '1'"
    with pytest.raises(ConfigError, match=message):
        main([*options, "--output", str(tmp_path / "out"), "--split", "test"])


def test_training_refuses_a_test_without_its_files(tmp_path):
    settings = [f"run_dir={tmp_path / 'run'}", f"evaluate.tasks={{mmlu: {tmp_path / 'nowhere'}}}"]
    with pytest.raises(ConfigError, match="holds none of mmlu's data"):
        train(load_config(write_config(tmp_path), settings))
    with pytest.raises(ConfigError, match="must have some of mmlu"):
        load_config(write_config(tmp_path), ["evaluate.tasks={mmul: a}"])


def test_subjects_of_the_tasks_are_those_of_their_authors():
    """Against the lists that come with the real files."""
    shared = Path(__file__).parents[3] / "shared" / "eval"
    if not shared.is_dir():
        pytest.skip("the real test files are not in this checkout")
    theirs = json.loads((shared / "mmlu" / "subject_category.json").read_text(encoding="utf-8"))
    assert {name: [part["category"], part["subcategory"]] for name, part in theirs.items()} == {
        name: list(categories) for name, (_, _, categories) in known_subjects("mmlu").items()
    }
    theirs = json.loads((shared / "ceval" / "subject_mapping.json").read_text(encoding="utf-8"))
    plural = {"Social Science": "Social Sciences", "Other": "Others"}
    ours = known_subjects("ceval")
    assert {name: plural.get(group, group) for name, (_, _, group) in theirs.items()} == {
        name: categories[0] for name, (_, _, categories) in ours.items()
    }
    titles = {name: names.CEVAL_LM_EVAL.get(name, title) for name, (title, _, _) in ours.items()}
    assert titles == {name: title for name, (_, title, _) in theirs.items()}
    hard = json.loads((shared / "ceval" / "hard_subjects.json").read_text(encoding="utf-8"))
    assert {name for name, (_, _, categories) in ours.items() if "Hard" in categories} == set(hard)
    counts = {
        "agieval": {
            "gaokao-history": 235,
            "gaokao-physics": 165,
            "jec-qa-ca": None,
            "logiqa-zh": 651,
            "sat-math": 220,
        },
        "gaokao": {
            "2010-2013_English_MCQs": 105,
            "2010-2022_History_MCQs": 287,
            "2010-2022_Physics_MCQs": 41,
        },
    }
    for task, kept in counts.items():
        for subject in load_subjects(task, shared / task, only=list(kept))[0]:
            usable = len(subject.questions) + len(subject.examples) + len(subject.twins)
            assert kept[subject.name] in (None, usable), subject.name


@pytest.mark.parametrize("content", ["[]", "{", "", '{"a": 1, "a": 1}'], ids=repr)
def test_damaged_settings_of_an_evaluation_are_named(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ConfigError, match=r"settings\.json is "):
        Results(tmp_path, {})


ASKED = Subject(
    "logic",
    "logic",
    "zh",
    ("STEM",),
    [],
    [Question(row, "?", ("1", "2", "3", "4"), "A", id=f"q{row}") for row in (0, 2)],
    0,
)


def finished(folder: Path) -> tuple[Results, list[str]]:
    """An evaluation with one finished subject, and the lines of its file."""
    record = {"subject": "logic", "prompt_sha256": "", "num_tokens": 1, "shots": 0, "answer": "A"}
    records = [
        record | {"index": each.row, "id": each.id, "logits": logits, "prediction": letter}
        for each, letter, logits in zip(
            ASKED.questions, "AB", ([0.5, 0.25, -1.0, 0.5], [-3.0, 2.0, 1.0, 0.0]), strict=True
        )
    ]
    results = Results(folder, {})
    results.save("logic", records)
    assert results.load(ASKED) == records
    return results, (folder / "subjects" / "logic.jsonl").read_text().splitlines()


@pytest.mark.parametrize("line", ["[]", "{", "null", '{"subject": "a", "index": null}'], ids=repr)
def test_damaged_records_of_a_subject_are_named_with_what_to_do(tmp_path, line):
    results, _ = finished(tmp_path)
    (tmp_path / "subjects" / "logic.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"logic\.jsonl is no subject's records: line 1.*delete"):
        results.load(ASKED)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda one, two: [one], "it has 1 lines and the subject 2 questions; delete it"),
        (lambda one, two: [], "it has 0 lines and the subject 2 questions; delete it"),
        (lambda one, two: [one, two, two], "it has 3 lines and the subject 2 questions"),
        (lambda one, two: [two], r"line 1: index is 2 and its question's 0"),
        (lambda one, two: [one, one], r"line 2: index is 0 and its question's 2"),
        (lambda one, two: [one, two.replace("logic", "law")], r"line 2: subject is 'law' and"),
        (lambda one, two: [one, two.replace("q2", "q0")], r"line 2: id is 'q0' and its"),
        (lambda one, two: [one.replace('"answer": "A"', '"answer": "C"'), two], "answer is 'C'"),
        (lambda one, two: [one, two.replace('"B"', '"Z"')], r"line 2: prediction is 'Z' and by"),
        (lambda one, two: [one, two.replace('"B"', '""')], r"line 2: prediction is '' and by its"),
        # The answer in the place of what the model said.
        (
            lambda one, two: [one, two.replace('"B"', '"A"')],
            "is 'A' and by its logits B",
        ),
        (lambda one, two: [one, two.replace("-3.0", "9.0")], "is 'B' and by its logits A"),
        (lambda one, two: [one, two.replace("-3.0, ", "")], r"line 2 has 3 logits and not one for"),
        (lambda one, two: [one.replace("0.25", '"0.25"'), two], r"line 1.*logits"),
        (lambda one, two: [one.replace('"logits"', '"log"'), two], r"line 1.*logits"),
        (lambda one, two: [one.replace("0.25", "NaN"), two], r"line 1.*(logits|not finite)"),
    ],
)
def test_records_that_are_not_those_of_the_questions_are_refused(tmp_path, damage, message):
    """They would be scored as a whole subject."""
    results, lines = finished(tmp_path)
    text = "".join(line + "\n" for line in damage(*lines))
    (tmp_path / "subjects" / "logic.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        results.load(ASKED)
