"""`python -m baichuan_jax.evaluate mmlu|ceval|agieval|gaokao|perplexity`: the original's tables and curve for any checkpoint."""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

import baichuan_jax
from baichuan_jax.config.schema import DistributedConfig, MeshConfig
from baichuan_jax.documents.reader import find_files, read_documents, split_files
from baichuan_jax.evaluate import perplexity, tables
from baichuan_jax.evaluate.evaluation import Evaluation, Plan, evaluate
from baichuan_jax.evaluate.perplexity import parse_contexts, perplexity_curve, read_stream
from baichuan_jax.evaluate.scoring import Scorer, Work, default_batch_tokens
from baichuan_jax.evaluate.tasks import SPLITS, TASKS
from baichuan_jax.generate import find_tokenizer
from baichuan_jax.hf.weights import load_pretrained, weights_sha256
from baichuan_jax.kernels.attention.api import choose_attention
from baichuan_jax.resilience.exits import run_command
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import write_atomically
from baichuan_jax.sharding import add_mesh_options, initialize_processes, make_mesh, mesh_config
from baichuan_jax.tokenizer import Tokenizer

LAYOUTS = {
    "mmlu": "a folder with dev/ and test/ (hendrycks/test's data.tar)",
    "ceval": "a folder with dev/, val/ and test/ (ceval-exam.zip)",
    "agieval": "a folder of SUBJECT.jsonl (data/v1 of ruixiangcui/AGIEval)",
    "gaokao": "a folder of SUBJECT.json (Data/Objective_Questions of OpenLMLab/GAOKAO-Bench)",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.evaluate",
        description="Multiple-choice tests by the original's protocols. Interrupted, the same command goes on. "
        "Example: mmlu --checkpoint Baichuan-7B --data mmlu/data --output evaluations/mmlu --dtype bfloat16",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shown = argparse.ArgumentDefaultsHelpFormatter
    for task in TASKS:
        command = commands.add_parser(task, help=f"{LAYOUTS[task]}", formatter_class=shown)
        _add_common(command)
        add = command.add_argument
        add("--data", required=True, metavar="DIR", help=LAYOUTS[task])
        add("--subjects", metavar="A,B", help="only these")
        add("--shots", type=int, default=5, help="examples in a prompt")
        add("--limit", type=int, metavar="N", help="only the first N questions of each subject")
        add("--seed", type=int, default=0, help="of drawn and shuffled examples")
        if task in ("mmlu", "ceval"):
            add("--split", default=SPLITS[task], choices=["val", "test"], help="which questions")
            add(
                "--protocol",
                default="original",
                choices=["original", "lm-eval"],
                help="whose prompts and scores",
            )
        order = "shuffled for every question in ceval's original protocol, else file"
        add(
            "--shot_order", choices=["file", "shuffled"], help=f"of the examples (default: {order})"
        )
        if task == "ceval":
            add("--answers", metavar="FILE", help='the test split\'s, as {"SUBJECT": {"ID": "A"}}')
    command = commands.add_parser(
        "perplexity", help="perplexity of any text by context length", formatter_class=shown
    )
    _add_common(command)
    add = command.add_argument
    add(
        "--text",
        required=True,
        nargs="+",
        metavar="GLOB",
        help="long documents: .txt, or JSONL (a document a line); also .gz, .zst",
    )
    add("--text_field", default="text", help="JSONL field that holds the text")
    add(
        "--context",
        default="4096,4352,...,5376",
        help="window lengths; the dots stand for the steps between",
    )
    add("--max_tokens", type=int, default=1 << 20, help="of the text, from its beginning")
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's folder, one of its checkpoints, or a Hugging Face folder",
    )
    add(
        "--output",
        required=True,
        metavar="DIR",
        help="where results go; finished subjects in it are kept",
    )
    add(
        "--tokenizer",
        metavar="FILE",
        help="a SentencePiece model, where none lies with the checkpoint",
    )
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the computation")
    add(
        "--batch_tokens",
        type=int,
        metavar="N",
        help="tokens of one batch on a device (default: 1024 on a CPU, else 8192)",
    )
    add("--json", metavar="FILE", help="save the figures, and the speed, here too")
    add_mesh_options(command, MeshConfig())


def main(words: list[str]) -> int:
    """The command. Returns its exit code."""
    options = _parser().parse_args(words)
    initialize_processes(DistributedConfig())
    tokenizer = find_tokenizer(options.checkpoint, options.tokenizer)
    if options.command == "perplexity":
        return _perplexity(options, tokenizer)
    return _evaluate(options, tokenizer)


def _evaluate(options: argparse.Namespace, tokenizer: Tokenizer) -> int:
    plan = Plan(
        options.command,
        options.data,
        protocol=getattr(options, "protocol", "original"),
        split=getattr(options, "split", None),
        subjects=options.subjects.split(",") if options.subjects else None,
        shots=options.shots,
        shot_order=options.shot_order,
        seed=options.seed,
        limit=options.limit,
        answers=getattr(options, "answers", None),
    )
    evaluation = Evaluation(plan, tokenizer)
    mesh = make_mesh(mesh_config(options))
    display = Display(active=jax.process_index() == 0)
    display.say(
        f"{plan.task}: {evaluation.num_questions} questions of {len(evaluation.subjects)} subjects"
    )
    work = Work()

    def make_scorer() -> Scorer:
        nonlocal work
        model = load_pretrained(options.checkpoint, dtype=options.dtype, mesh=mesh)
        scorer = Scorer(model, mesh, options.batch_tokens)
        work = scorer.work
        return scorer

    result = evaluate(
        evaluation, make_scorer, options.output, _settings(options, mesh), progress=True
    )
    if result:
        _show(display, result, Path(options.output), work, options.json)
    return 0


def _settings(options: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """What decides the figures beside text and prompts."""
    device = mesh.devices.flat[0]
    attention, _ = choose_attention(
        "auto",
        device=device,
        dtype=options.dtype,
        head_dim=128,
        masked=False,
        length=1024,
        context=mesh.shape["context"],
    )
    return {
        "checkpoint": str(options.checkpoint),
        "weights_sha256": weights_sha256(options.checkpoint),
        "dtype": options.dtype,
        "attention": attention,
        "device": device.device_kind,
        "mesh": dict(mesh.shape),
        "batch_tokens": options.batch_tokens or default_batch_tokens(),
    }


def _perplexity(options: argparse.Namespace, tokenizer: Tokenizer) -> int:
    contexts = parse_contexts(options.context)
    documents = (
        text
        for part in split_files(find_files(options.text))
        for text in read_documents(part, options.text_field)
    )
    tokens = read_stream(documents, tokenizer, options.max_tokens)
    mesh = make_mesh(mesh_config(options))
    first = jax.process_index() == 0
    display = Display(active=first)
    display.say(f"{len(tokens):,} tokens of text")
    settings = _settings(options, mesh)
    model = load_pretrained(options.checkpoint, dtype=options.dtype, mesh=mesh)
    with tqdm(
        total=len(contexts) * len(tokens), unit="token", unit_scale=True, disable=not first
    ) as bar:
        rows = perplexity_curve(
            model,
            tokens,
            contexts,
            mesh=mesh,
            batch_tokens=options.batch_tokens,
            on_done=bar.update,
        )
    if not first:
        return 0
    output = Path(options.output)
    hashes = {
        "tokenizer_sha256": tokenizer.hash,
        "text_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }
    manifest = (
        settings
        | hashes
        | {"text_tokens": len(tokens), "version": baichuan_jax.__version__, "jax": jax.__version__}
    )
    content = (
        json.dumps({"curve": rows, "manifest": manifest}, indent=1, ensure_ascii=False) + "\n"
    ).encode()
    for file in (output / "result.json", *([Path(options.json)] if options.json else [])):
        write_atomically(file, content)
    write_atomically(output / "table.md", perplexity.table(rows).encode())
    perplexity.chart(rows, output / "perplexity.png")
    display.table(
        "perplexity by context length",
        ["context", "windows", "perplexity", f"of the last {perplexity.TAIL}"],
        [
            [
                f"{r['context']:,}",
                str(r["windows"]),
                f"{r['perplexity']:.3f}",
                f"{r['tail_perplexity']:.3f}",
            ]
            for r in rows
        ],
    )
    display.say(f"results in {output}: table.md, perplexity.png, result.json")
    return 0


def _show(
    display: Display, result: dict[str, Any], output: Path, work: Work, file: str | None
) -> None:
    write_atomically(output / "table.md", tables.markdown(result).encode())
    if result["scored"]:
        tables.chart(result, output / "chart.png")
        average = {
            "average": {
                "accuracy": result["average"],
                "stderr": result["stderr"],
                "questions": result["questions"],
            }
        }
        rows = (average | result["categories"] | result["subjects"]).items()
        display.table(
            f"{result['task']}, {result['manifest']['shots']}-shot, protocol {result['protocol']}",
            ["", "questions", "accuracy", "± s.e."],
            [
                [name, str(cell["questions"]), f"{100 * cell['accuracy']:.1f}", _error(cell)]
                for name, cell in rows
            ],
        )
        for caution in tables.cautions(result):
            display.say(caution, style="yellow")
    else:
        display.say(f"no answers: hand in {output / 'submission.json'}")
    speed = dict(vars(work))
    if work.seconds:
        display.say(
            f"{work.prompt_tokens:,} prompt tokens in {work.seconds:.1f} s: {work.prompt_tokens / work.seconds:,.0f} tokens/s; "
            f"{work.run_tokens:,} went through the model; {work.compile_seconds:.1f} s of compilation come on top"
        )
    display.say(f"results in {output}: table.md, records.jsonl, result.json")
    if file is not None:
        write_atomically(
            Path(file),
            (json.dumps(result | {"speed": speed}, indent=1, ensure_ascii=False) + "\n").encode(),
        )


def _error(cell: dict[str, Any]) -> str:
    return "" if cell["stderr"] is None else f"{100 * cell['stderr']:.1f}"


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
