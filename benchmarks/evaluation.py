"""Speed of `baichuan_jax.evaluate` beside EleutherAI's lm-eval, and equality of their choices.

    python benchmarks/evaluation.py [--checkpoint DIR] [--questions 40] [--repeats 3] [--json FILE]

Both score the same questions with the same model: a seeded random one (or a checkpoint), on made-up
questions in MMLU's and C-Eval's file format, with the original's prompts. lm-eval, which computes
with transformers, reads the same prompts byte for byte from a local JSON file and tries batch
sizes; its best one counts. Both times leave out loading and compiling; they include reading files,
making prompts, tokenising and scoring. The two alternate, and medians are compared.

Needs requirements-eval-bench.txt.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# A script finds the package from any folder.
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import os

# lm-eval computes on the CPU here, so both do.
os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import contextlib
import io
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from exam import SAMPLE, make_ceval, make_mmlu
from results import Results

from baichuan_jax.config.schema import ModelConfig
from baichuan_jax.documents.files import Slice
from baichuan_jax.documents.reader import read_texts
from baichuan_jax.evaluate.evaluation import Evaluation, Plan
from baichuan_jax.evaluate.prompts import Prompt
from baichuan_jax.evaluate.results import Record, score_prompts
from baichuan_jax.evaluate.scoring import Scorer
from baichuan_jax.hf.weights import export, load_pretrained
from baichuan_jax.model import init_params
from baichuan_jax.tokenizer import Tokenizer, train_tokenizer

MODEL = ModelConfig(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=688,
    num_layers=6,
    num_heads=4,
    dtype="float32",
    initializer_range=0.05,
)
SUBJECTS = {
    "mmlu": ["abstract_algebra", "us_foreign_policy"],
    "ceval": ["accountant", "modern_chinese_history"],
}


def lm_eval_model(folder: Path, tokenizer: Path, batch_size: int) -> Any:
    """lm-eval's HFLM around a Hugging Face folder, in float32 on the CPU.

    The tokenizer is SentencePiece itself, without BOS.
    """
    offline = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    os.environ |= dict.fromkeys(offline, "1")
    import sentencepiece
    import tokenizers
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))

    class SentencePieceLM(HFLM):
        def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
            return pieces.EncodeAsIds(string)

    # HFLM also asks a tokenizer for its special tokens: this one has nothing else.
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2}
    special = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    ends = transformers.PreTrainedTokenizerFast(tokenizer_object=special, **names)
    llama = transformers.LlamaForCausalLM
    # A folder, never a name on the hub: there is no revision to pin.
    model = llama.from_pretrained(folder, dtype=torch.float32)  # nosec B615
    model.eval()
    options: dict[str, Any] = {"backend": "causal", "batch_size": batch_size, "max_length": 1 << 20}
    return SentencePieceLM(pretrained=model, tokenizer=ends, **options)


def lm_eval_tasks(prompts: list[Prompt], folder: Path, delimiter: str = " ") -> dict[str, Any]:
    """lm-eval's multiple-choice tasks, one for each subject.

    The context is each prompt unchanged, and the choices are the letters A to D after `delimiter`.
    With the right delimiter the letter's token is the one that the original scores.
    """
    from lm_eval.api.task import ConfigurableTask

    tasks = {}
    for subject in dict.fromkeys(prompt.subject for prompt in prompts):
        file = folder / f"{subject}.json"
        rows = [
            {"prompt": p.text, "answer": "ABCD".index(p.answer or "A")}
            for p in prompts
            if p.subject == subject
        ]
        file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        tasks[subject] = ConfigurableTask(
            config={
                "task": subject,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(file)}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{prompt}}",
                "doc_to_choice": ["A", "B", "C", "D"],
                "doc_to_target": "answer",
                "target_delimiter": delimiter,
                "num_fewshot": 0,
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            }
        )
    return tasks


def run_lm_eval(model: Any, tasks: dict[str, Any]) -> list[tuple[str, list[float]]]:
    """(context, log-likelihoods of A to D) of every question, in order."""
    from lm_eval import evaluator

    # Hides its progress bars.
    with contextlib.redirect_stderr(io.StringIO()):
        options: dict[str, Any] = {"log_samples": True, "bootstrap_iters": 0}
        result = evaluator.evaluate(lm=model, task_dict=dict(tasks), **options)
    assert result is not None
    samples = [
        sample
        for task in tasks
        for sample in sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
    ]
    return [
        (sample["arguments"][0][0], [float(answer[0]) for answer in sample["filtered_resps"]])
        for sample in samples
    ]


def run_ours(plan: Plan, tokenizer: Tokenizer, scorer: Scorer) -> tuple[list[Prompt], list[Record]]:
    """Prompts and records of all questions, beginning with the files."""
    evaluation = Evaluation(plan, tokenizer)
    prompts = evaluation.all_prompts()
    return prompts, score_prompts(scorer, prompts, plan.protocol)


def compare(records: list[Record], theirs: list[list[float]]) -> tuple[bool, float]:
    """Whether all choices are equal, and the largest difference of two systems' score differences.

    Differences between two answers' scores: ours are logits, theirs log-likelihoods, which differ
    by the log-normaliser of the question.
    """
    ours, other = np.array([record["logits"] for record in records]), np.array(theirs)
    same = bool((ours.argmax(axis=1) == other.argmax(axis=1)).all())
    differences = lambda scores: scores[:, :, None] - scores[:, None, :]
    return same, float(np.abs(differences(ours) - differences(other)).max())


def random_checkpoint(folder: Path) -> Path:
    """A seeded random model in Hugging Face's form, with a tokenizer trained on the sample text."""
    tokenizer = folder / "tokenizer.model"
    files = [str(path) for path in sorted(SAMPLE.glob("train-*.jsonl.gz"))]
    train_tokenizer(read_texts(map(Slice, files), "text"), tokenizer, MODEL.vocab_size)
    export(
        init_params(MODEL, 0),
        MODEL,
        folder / "model",
        dtype="float32",
        tokenizer=Tokenizer(tokenizer),
    )
    return folder / "model"


def measure(
    plan: Plan, checkpoint: Path, batch_sizes: list[int], repeats: int, folder: Path
) -> dict[str, Any]:
    """Time both systems on the same questions, in turn."""
    tokenizer = Tokenizer(checkpoint / "tokenizer.model")
    scorer = Scorer(load_pretrained(checkpoint))
    # The first run compiles.
    prompts, records = run_ours(plan, tokenizer, scorer)
    tasks = lm_eval_tasks(prompts, folder)
    models = {
        size: lm_eval_model(checkpoint, checkpoint / "tokenizer.model", size)
        for size in batch_sizes
    }
    ours: list[tuple[float, float]] = []
    theirs: dict[int, list[tuple[float, float]]] = {size: [] for size in batch_sizes}
    same, difference = True, 0.0
    for _ in range(repeats):
        for size, model in models.items():
            scores, times = timed(lambda model=model: run_lm_eval(model, tasks))
            theirs[size].append(times)
            (_, records), times = timed(lambda: run_ours(plan, tokenizer, scorer))
            ours.append(times)
            equal, largest = compare(records, [score for _, score in scores])
            same, difference = same and equal, max(difference, largest)
    medians = {
        size: [statistics.median(column) for column in zip(*times, strict=True)]
        for size, times in theirs.items()
    }
    best = min(medians, key=lambda size: medians[size])
    seconds, cpu_seconds = (statistics.median(column) for column in zip(*ours, strict=True))
    return {
        "questions": len(prompts),
        "prompt_tokens": sum(len(prompt.tokens) for prompt in prompts),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "lm_eval_seconds": {size: times[0] for size, times in medians.items()},
        "lm_eval_cpu_seconds": {size: times[1] for size, times in medians.items()},
        "best_batch_size": best,
        "speedup": medians[best][0] / seconds,
        "cpu_speedup": min(times[1] for times in medians.values()) / cpu_seconds,
        "choices_equal": same,
        "max_difference": difference,
    }


def timed(function: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """A function's result, its seconds by the clock, and its CPU-seconds.

    On a shared machine the CPU-seconds say more.
    """
    began, busy = time.perf_counter(), time.process_time()
    result = function()
    return result, (time.perf_counter() - began, time.process_time() - busy)


def show(found: dict[str, dict[str, Any]]) -> Results:
    """The table of all tasks."""
    rows = []
    for title, numbers in found.items():
        theirs = numbers["lm_eval_seconds"][numbers["best_batch_size"]]
        seconds = [f"{numbers['seconds']:.2f}", f"{theirs:.2f}"]
        times = [f"{numbers[name]:.1f}" for name in ("speedup", "cpu_speedup")]
        equal = "yes" if numbers["choices_equal"] else "NO"
        largest = f"{numbers['max_difference']:.0e}"
        rows.append([title, f"{numbers['questions']}", *seconds, *times, equal, largest])
    speeds = ["s", "lm-eval's s", "times as fast", "in CPU time"]
    columns = ["5-shot", "questions", *speeds, "choices equal", "largest difference"]
    results = Results()
    results.table("Evaluation beside lm-eval with transformers", columns, rows)
    return results


def main() -> None:
    """Run the benchmark for MMLU, and for C-Eval with both orders of its shots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    checkpoint = "a Hugging Face folder with tokenizer.model (default: a random model)"
    parser.add_argument("--checkpoint", metavar="DIR", help=checkpoint)
    parser.add_argument("--questions", type=int, default=40, help="of each subject (default: 40)")
    tried = "that lm-eval tries (default: 4,16,32)"
    parser.add_argument("--batch_sizes", default="4,16,32", help=tried)
    parser.add_argument("--repeats", type=int, default=3, help="(default: 3)")
    parser.add_argument("--json", metavar="FILE", help="save the numbers")
    options = parser.parse_args()
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = Path(options.checkpoint) if options.checkpoint else random_checkpoint(folder)
        mmlu = make_mmlu(folder / "mmlu", SUBJECTS["mmlu"], options.questions)
        ceval = make_ceval(folder / "ceval", SUBJECTS["ceval"], options.questions)
        subjects = SUBJECTS["ceval"]
        plans = {
            "mmlu": Plan("mmlu", mmlu, subjects=SUBJECTS["mmlu"]),
            "ceval, fixed order": Plan("ceval", ceval, subjects=subjects, shot_order="file"),
            "ceval, shuffled for every question": Plan("ceval", ceval, subjects=subjects),
        }
        for title, plan in plans.items():
            found[title] = measure(plan, checkpoint, sizes, options.repeats, folder)
    device = jax.devices()[0].device_kind
    show(found).save(options.json, device=device, cores=os.cpu_count(), tasks=found)


if __name__ == "__main__":
    main()
