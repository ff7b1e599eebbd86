"""EleutherAI's lm-eval as the oracle, question by question.

With its recorded scores, and with lm-eval itself where it is installed.

`python tests/evaluate/test_lm_eval.py` records anew, in an environment of
requirements-eval-bench.txt.
"""

import csv
import hashlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
REPOSITORY = TESTS.parent
sys.path[:0] = [str(TESTS), str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from evaluation import (
    compare,
    lm_eval_model,
    lm_eval_tasks,
    random_checkpoint,
    run_lm_eval,
    run_ours,
)
from exam import make_ceval, make_mmlu

from baichuan_jax.evaluate.evaluation import Evaluation, Plan
from baichuan_jax.evaluate.scoring import Scorer
from baichuan_jax.hf.config import read_config
from baichuan_jax.hf.weights import export, import_params, load_pretrained
from baichuan_jax.tokenizer import Tokenizer

GOLDEN = TESTS / "golden"
RECORD = GOLDEN / "exam" / "lm_eval.json"
SHARED = REPOSITORY.parent / "shared" / "eval"
SUBJECTS = {"mmlu": ["us_foreign_policy", "college_medicine"], "ceval": ["logic", "accountant"]}


def plans(folder: Path, count: int | None = None) -> dict[str, Plan]:
    """Both tasks by both protocols."""
    return {
        f"{task} {protocol}": Plan(
            task, folder / task, protocol=protocol, subjects=SUBJECTS[task], limit=count
        )
        for task in SUBJECTS
        for protocol in ("original", "lm-eval")
    }


def lm_eval_scores(
    plan: Plan, tokenizer: Tokenizer, model, folder: Path
) -> list[tuple[str, list[float]]]:
    """lm-eval's scores: its own task files for its protocol, our prompts for the original's."""
    evaluation = Evaluation(plan, tokenizer)
    if plan.protocol == "lm-eval":
        return run_lm_eval(model, own_tasks(plan, evaluation, folder))
    prompts = evaluation.all_prompts()
    # Where "▁A" is a piece, it is what the original scores and what " A" becomes; else the letter
    # alone is.
    delimiter = " " if len(tokenizer.encode("A")) == 1 else ""
    return run_lm_eval(model, lm_eval_tasks(prompts, folder, delimiter))


def own_tasks(plan: Plan, evaluation: Evaluation, folder: Path) -> dict:
    """lm-eval's YAML files of these subjects, on local copies of the data in its form."""
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask
    from yaml import safe_load

    made = {}
    home = Path(tasks.__file__).parent
    for subject in evaluation.subjects:
        if plan.task == "mmlu":
            common, own = (
                home / "mmlu/default/_default_template_yaml",
                home / f"mmlu/default/mmlu_{subject.name}.yaml",
            )
        else:
            common, own = (
                home / "ceval/_default_ceval_yaml",
                home / f"ceval/ceval-valid_{subject.name}.yaml",
            )
        config = safe_load(common.read_text(encoding="utf-8")) | safe_load(
            own.read_text(encoding="utf-8")
        )
        for key in ("include", "dataset_name", "tag", "task_alias"):
            config.pop(key, None)
        split = config.get("test_split") or config["validation_split"]
        files = {}
        for name in ("dev", split):
            with open(
                Path(plan.data) / name / f"{subject.name}_{name}.csv", encoding="utf-8", newline=""
            ) as file:
                if plan.task == "mmlu":
                    rows = [
                        {"question": q, "choices": c, "answer": "ABCD".index(a)}
                        for q, *c, a in csv.reader(file)
                    ]
                else:
                    rows = [
                        {
                            "id": row["id"],
                            "question": row["question"],
                            **{k: row[k] for k in "ABCD"},
                            "answer": row["answer"],
                        }
                        for row in csv.DictReader(file)
                    ]
            files[name] = str(folder / f"{plan.task}-{subject.name}-{name}.json")
            limit = plan.limit if name == split else None
            Path(files[name]).write_text(
                json.dumps(rows[:limit], ensure_ascii=False), encoding="utf-8"
            )
        local = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "num_fewshot": 5}
        made[config["task"]] = ConfigurableTask(config=config | local)
    return made


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_scores_are_those_that_lm_eval_gave(tmp_path):
    """Made-up MMLU and C-Eval subjects, both protocols, the golden model: lm-eval's own scores."""
    make_mmlu(tmp_path / "mmlu", SUBJECTS["mmlu"], 4)
    make_ceval(tmp_path / "ceval", SUBJECTS["ceval"], 4)
    tokenizer = Tokenizer(GOLDEN / "exam" / "tokenizer.model")
    scorer = Scorer(load_pretrained(GOLDEN / "tiny"))
    recorded, letters = json.loads(RECORD.read_text()), set()
    for name, plan in plans(tmp_path).items():
        prompts, records = run_ours(plan, tokenizer, scorer)
        assert [prompt.sha256 for prompt in prompts] == [
            question["prompt_sha256"] for question in recorded[name]
        ], name
        same, difference = compare(records, [question["scores"] for question in recorded[name]])
        assert same, name
        assert difference < 1e-4, name
        letters |= {record["prediction"] for record in records}
    assert len(letters) >= 3  # equal choices mean something


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm-eval's own
@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval is not installed (requirements-eval-bench.txt)",
)
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real test files are not in this checkout")
def test_lm_eval_agrees_on_real_questions(tmp_path):
    checkpoint = random_checkpoint(tmp_path)
    tokenizer = Tokenizer(checkpoint / "tokenizer.model")
    scorer = Scorer(load_pretrained(checkpoint))
    model = lm_eval_model(checkpoint, tokenizer.path, 4)
    for name, plan in plans(SHARED, 20).items():
        theirs = lm_eval_scores(plan, tokenizer, model, tmp_path)
        prompts, records = run_ours(plan, tokenizer, scorer)
        assert [prompt.text for prompt in prompts] == [context for context, _ in theirs], name
        same, difference = compare(records, [scores for _, scores in theirs])
        print(
            f"{name}: {len(records)} questions, choices {'equal' if same else 'differ'}, "
            f"differences within {difference:.1e}"
        )
        assert same, name
        assert difference < 1e-4, name


def record() -> None:
    """Write lm-eval's scores of the made-up questions with the golden model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_mmlu(folder / "mmlu", SUBJECTS["mmlu"], 4)
        make_ceval(folder / "ceval", SUBJECTS["ceval"], 4)
        tokenizer = Tokenizer(GOLDEN / "exam" / "tokenizer.model")
        export(
            import_params(GOLDEN / "tiny"),
            read_config(GOLDEN / "tiny"),
            folder / "model",
            dtype="float32",
        )
        model = lm_eval_model(folder / "model", tokenizer.path, 4)
        found = {
            name: [
                {"prompt_sha256": sha256(context), "scores": scores}
                for context, scores in lm_eval_scores(plan, tokenizer, model, folder)
            ]
            for name, plan in plans(folder).items()
        }
    RECORD.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    record()
