"""`python -m baichuan_jax.evaluate mmlu|ceval|agieval|gaokao|perplexity`

The original's tables of multiple-choice tests, and its curve of perplexity by context length, for
any checkpoint: a run's folder, one of its checkpoints, or a Hugging Face folder. Every result has a
manifest of what decides it. Several processes and meshes work as in training.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

import baichuan_jax
from baichuan_jax.checkpoint.state import identity
from baichuan_jax.config.files import mesh_config
from baichuan_jax.config.schema import MOST_SEED, TASKS, DistributedConfig, MeshConfig, at_least
from baichuan_jax.documents.files import (
    Slice,
    State,
    find_files,
    require_unchanged,
    say_unread,
    states,
)
from baichuan_jax.documents.reader import read_texts
from baichuan_jax.evaluate import perplexity, tables
from baichuan_jax.evaluate.evaluation import Evaluation, Plan, evaluate
from baichuan_jax.evaluate.perplexity import (
    check_contexts,
    parse_contexts,
    perplexity_curve,
    read_stream,
)
from baichuan_jax.evaluate.results import Results, dump_json
from baichuan_jax.evaluate.scoring import Scorer, Work, default_batch_tokens
from baichuan_jax.evaluate.tasks import SPLITS, subject_files
from baichuan_jax.generate import add_model_options
from baichuan_jax.hf.source import Source, find_tokenizer, read_source
from baichuan_jax.hf.weights import files_read, load_model, weights_sha256
from baichuan_jax.kernels.attention.api import choose_attention
from baichuan_jax.model import Transformer
from baichuan_jax.resilience.coordination import agree, require_same
from baichuan_jax.resilience.exits import run_command, say
from baichuan_jax.resilience.ownership import owned_together
from baichuan_jax.resilience.processes import initialize_processes
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import refuse_inputs, writable_file, write_atomically
from baichuan_jax.sharding import make_mesh
from baichuan_jax.tokenizer import Tokenizer

LAYOUTS = {
    "mmlu": "a folder with dev/ and test/ (hendrycks/test's data.tar)",
    "ceval": "a folder with dev/, val/ and test/ (ceval-exam.zip)",
    "agieval": "a folder of SUBJECT.jsonl (data/v1 of ruixiangcui/AGIEval)",
    "gaokao": "a folder of SUBJECT.json (Data/Objective_Questions of OpenLMLab/GAOKAO-Bench)",
}


def main(argv: list[str]) -> int:
    """The command. Returns its exit code."""
    options = _parser().parse_args(argv)
    # Before anything asks for devices: from here on jax knows all of them.
    initialize_processes(DistributedConfig())
    # Wrong files and names are refused before the weights are loaded, which may take minutes.
    # Once: of a run that still trains, everything below is of the checkpoint that is newest now.
    source = read_source(options.checkpoint)
    if str(source.path) != options.checkpoint and jax.process_index() == 0:
        say(f"checkpoint: {source.path}")
    tokenizer = find_tokenizer(source, options.tokenizer)
    # On all processes the same: other text would make other batches.
    require_same("--tokenizer", tokenizer.hash)
    for warning in tokenizer.warnings if jax.process_index() == 0 else ():
        say(warning)
    command = _perplexity if options.command == "perplexity" else _evaluate
    output = Path(options.output)
    with owned_together(output / "lock", f"the output {output}", "choose another output"):
        return command(options, source, tokenizer)


def _evaluate(options: argparse.Namespace, source: Source, tokenizer: Tokenizer) -> int:
    """Score a test and write its output folder."""
    plan = Plan(
        options.command,
        options.data,
        # Some tasks lack these options: agieval and gaokao have one protocol and one split.
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
    require_same("--data", evaluation.settings["data_sha256"])
    split, subjects = evaluation.settings["split"], evaluation.settings["subjects"]
    groups = subject_files(plan.task, Path(options.data), split, subjects).values()
    read = {"--data": [file for files in groups for file in files]}
    if plan.answers is not None:
        read["--answers"] = [Path(plan.answers)]
    _refuse_inputs(options, source, read)
    mesh = make_mesh(mesh_config(options))
    display = Display(active=jax.process_index() == 0)
    display.say(
        f"{plan.task}: {evaluation.num_questions} questions of {len(evaluation.subjects)} subjects"
    )
    work = Work()

    def make_scorer() -> Scorer:
        # Loaded only where a subject is left to score.
        nonlocal work
        model = _load_hashed(source, before, options.dtype, mesh)
        scorer = Scorer(model, mesh, options.batch_tokens)
        work = scorer.work
        return scorer

    before = _states(source)
    settings = _settings(options, mesh, source)
    # result is empty in processes other than the first, which write nothing.
    result = evaluate(evaluation, make_scorer, options.output, settings, progress=True)
    if result:
        if options.json:
            # Not in result.json, which must not depend on whether an evaluation was interrupted.
            content = dump_json(result | {"speed": vars(work)})
            write_atomically(Path(options.json), content)
        _show(display, result, Path(options.output), work)
        longest, trained = result["manifest"]["longest_prompt_tokens"], source.context_length
        if trained is not None and longest > trained:
            display.say(
                f"the longest prompt has {longest} tokens, and the model was trained on rows of "
                f"{trained}: it has not learnt such distances",
                style="yellow",
            )
    return 0


def _refuse_inputs(
    options: argparse.Namespace, source: Source, read: Mapping[str, Iterable[Path | str]]
) -> None:
    """Raise ConfigError where --json would replace what is read, or a file of the output."""
    output = Path(options.output)
    names = ("settings.json", "result.json", "records.jsonl", "submission.json", "table.md")
    figures = ("chart.png", "perplexity.png")
    refuse_inputs(
        {"--output": [output / name for name in (*names, *figures)], "--json": [options.json]},
        {
            **read,
            "--checkpoint": source.files,
            "--tokenizer": [] if options.tokenizer is None else [options.tokenizer],
            # Finished subjects, from which it goes on.
            "--output": [output / "subjects"],
        },
    )


def _settings(options: argparse.Namespace, mesh: Mesh, source: Source) -> dict[str, Any]:
    """What decides the results beside text and prompts."""
    # All devices of a mesh are of one kind.
    device = mesh.devices.flat[0]
    # The kernel that a prompt of 1,024 tokens gets: it stands for all lengths.
    attention, _ = choose_attention(
        "auto",
        device=device,
        dtype=options.dtype,
        head_dim=source.model.head_dim,
        masked=False,
        length=1024,
        context=mesh.shape["context"],
    )
    return {
        "checkpoint": str(source.path),
        # A folder of the same name may hold other weights tomorrow.
        "weights_sha256": weights_sha256(source),
        # The same arrays make another model with these. Earlier versions did not record them.
        "model": identity(source.model),
        "dtype": options.dtype,
        "attention": attention,
        "device": device.device_kind,
        # As earlier versions wrote it: their evaluations go on. The command splits no state.
        "mesh": {name: size for name, size in mesh.shape.items() if name != "state"},
        "batch_tokens": options.batch_tokens or default_batch_tokens(),
    }


def _states(source: Source) -> dict[str, State]:
    """What the weights' files are like before they are hashed."""
    return states(map(str, files_read(source)))


def _load_hashed(source: Source, before: dict[str, State], dtype: Any, mesh: Mesh) -> Transformer:
    """The model, of the files whose hash was taken. Raises ConfigError where they changed since."""
    model = load_model(source, dtype, mesh)
    require_unchanged(before)
    return model


def _show(display: Display, result: dict[str, Any], output: Path, work: Work) -> None:
    """Write table and chart, and print them in short."""
    write_atomically(output / "table.md", tables.markdown(result).encode())
    if result["scored"]:
        # Without answers there is nothing to draw.
        tables.chart(result, output / "chart.png")
        average = {"accuracy": result["average"], "stderr": result["stderr"]}
        average["questions"] = result["questions"]
        cells = {"average": average} | result["categories"] | result["subjects"]
        display.table(
            f"{result['task']}, {result['manifest']['shots']}-shot, protocol {result['protocol']}",
            ["", "questions", "accuracy, % ± s.e."],
            [[name, str(cell["questions"]), tables.percent(cell)] for name, cell in cells.items()],
        )
        for caution in tables.cautions(result):
            display.say(caution, style="yellow")
    else:
        for counted in tables.left_out(result["manifest"]):
            display.say(counted, style="yellow")
        display.say(f"no public answers: hand in {output / 'submission.json'}")
    if work.seconds:
        display.say(
            f"{work.prompt_tokens:,} prompt tokens in {work.seconds:.1f} s: "
            f"{work.prompt_tokens / work.seconds:,.0f} tokens/s; {work.run_tokens:,} went through "
            f"the model; compilation took {work.compile_seconds:.1f} s more"
        )
    display.say(f"results in {output}: table.md, records.jsonl, result.json")


def _perplexity(options: argparse.Namespace, source: Source, tokenizer: Tokenizer) -> int:
    """Measure the curve and write its output folder."""
    contexts = parse_contexts(options.context)
    files = find_files(options.text)
    _refuse_inputs(options, source, {"--text": files})
    if jax.process_index() == 0:
        say_unread(options.text)
    documents = read_texts(map(Slice, files), options.text_field)
    # Every process reads the whole text; the mesh splits the batches.
    tokens, counts = read_stream(documents, tokenizer, options.max_tokens)
    text_hash = hashlib.sha256(tokens.tobytes()).hexdigest()
    require_same("--text", text_hash)
    check_contexts(contexts, tokens)
    mesh = make_mesh(mesh_config(options))
    first = jax.process_index() == 0
    display = Display(active=first)
    display.say(
        f"{len(tokens):,} tokens of text: {counts['documents']:,} documents "
        f"({counts['empty_documents']:,} empty)"
    )
    if counts["text_cut"]:
        display.say("the text goes on beyond --max_tokens, and is not read", style="yellow")
    before = _states(source)
    settings = _settings(options, mesh, source) | {
        "task": "perplexity",
        "contexts": contexts,
        "tokenizer_sha256": tokenizer.hash,
        # Hashes of what was read: a path says nothing about its content.
        "text_sha256": text_hash,
    }
    # Process 0 decides for all. One folder holds one curve, and no test's results.
    agree("the output's settings", lambda: Results(options.output, settings) and None)
    model = _load_hashed(source, before, options.dtype, mesh)
    # Each context length reads the whole text once.
    total = len(contexts) * len(tokens)
    with tqdm(total=total, unit="token", unit_scale=True, disable=not first) as bar:
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
    manifest = settings | {
        "context_length": source.context_length,
        "text_tokens": len(tokens),
        **counts,
        "version": baichuan_jax.__version__,
        "jax": jax.__version__,
    }
    output = Path(options.output)
    content = dump_json({"curve": rows, "manifest": manifest})
    for file in (output / "result.json", *([Path(options.json)] if options.json else [])):
        write_atomically(file, content)
    write_atomically(output / "table.md", perplexity.table(rows).encode())
    perplexity.chart(rows, output / "perplexity.png")
    tail = f"of the last {perplexity.TAIL}"
    columns = ["context", "windows", "tokens left out", "perplexity", tail]
    display.table("perplexity by context length", columns, [_cells(row) for row in rows])
    display.say(f"results in {output}: table.md, perplexity.png, result.json")
    return 0


def _cells(row: dict[str, Any]) -> list[str]:
    """A row of the curve as text."""
    values = (row["perplexity"], row["tail_perplexity"])
    counts = (row["windows"], row["tokens_left_out"])
    return [f"{row['context']:,}", *map(str, counts), *(f"{value:.3f}" for value in values)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.evaluate",
        description="Multiple-choice tests by the original's protocols. Interrupted, the same "
        "command goes on. Example: mmlu --checkpoint Baichuan-7B --data mmlu/data --output "
        "evaluations/mmlu --dtype bfloat16",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shown = argparse.ArgumentDefaultsHelpFormatter
    # A subcommand for each test, since they differ in splits, protocols and layouts.
    for task in TASKS:
        command = commands.add_parser(task, help=LAYOUTS[task], formatter_class=shown)
        _add_common(command)
        _add_test(command, task)
    what = "perplexity of any text by context length"
    command = commands.add_parser("perplexity", help=what, formatter_class=shown)
    _add_common(command)
    add = command.add_argument
    text = "long documents: .txt, or JSONL (a document a line); also .gz, .zst"
    add("--text", required=True, nargs="+", metavar="GLOB", help=text)
    add("--text_field", default="text", help="field that holds the text, or outer.inner")
    lengths = "window lengths; the dots stand for the steps between"
    add("--context", default="4096,4352,...,5376", help=lengths)
    add("--max_tokens", type=at_least(1), default=1 << 20, help="of the text, from its beginning")
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    """Options of all subcommands."""
    # The same names as in `generate`.
    add = command.add_argument
    add_model_options(command, MeshConfig())
    output = "where results go; finished subjects in it are kept"
    add("--output", required=True, metavar="DIR", help=output)
    batch = "tokens of one batch on a device (default: 1024 on a CPU, else 8192)"
    add("--batch_tokens", type=at_least(1), metavar="N", help=batch)
    results = "save the results, and the speed, here too"
    add("--json", type=writable_file, metavar="FILE", help=results)


def _add_test(command: argparse.ArgumentParser, task: str) -> None:
    """Options of a multiple-choice test."""
    add = command.add_argument
    add("--data", required=True, metavar="DIR", help=LAYOUTS[task])
    add("--subjects", metavar="A,B", help="only these")
    add("--shots", type=at_least(0), default=5, help="examples in a prompt")
    add("--limit", type=at_least(1), metavar="N", help="only the first N questions of each subject")
    add("--seed", type=at_least(0, MOST_SEED), default=0, help="of drawn and shuffled examples")
    # The two others have neither splits nor a second protocol.
    if task in ("mmlu", "ceval"):
        add("--split", default=SPLITS[task], choices=["val", "test"], help="which questions")
        protocols = ["original", "lm-eval"]
        add("--protocol", default="original", choices=protocols, help="whose prompts and scores")
    order = "shuffled for every question in ceval's original protocol, else file"
    orders = ["file", "shuffled"]
    add("--shot_order", choices=orders, help=f"of the examples (default: {order})")
    if task == "ceval":
        add("--answers", metavar="FILE", help='the test split\'s, as {"SUBJECT": {"ID": "A"}}')


if __name__ == "__main__":
    run_command(
        lambda: main(sys.argv[1:]),
        interrupted="finished subjects of a test are kept, and the same command goes on after "
        "them; a curve of perplexity begins again",
        joins=True,
    )
