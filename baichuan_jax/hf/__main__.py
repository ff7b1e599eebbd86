"""`python -m baichuan_jax.hf import|export`: checkpoints from and to Hugging Face folders."""

import argparse
import shutil
import sys
from pathlib import Path

from baichuan_jax.checkpoint.weights import load_params, save_params
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.hardware.devices import require_devices
from baichuan_jax.hf.config import read_config, require_form
from baichuan_jax.hf.source import FILE, Source, find_tokenizer, is_hf, read_source
from baichuan_jax.hf.weights import export, import_params, refuse_existing
from baichuan_jax.resilience.exits import run_command, say
from baichuan_jax.resilience.ownership import owned_output
from baichuan_jax.runs.files import new_folder, refuse_inputs, writable
from baichuan_jax.tokenizer import Tokenizer


def main(argv: list[str]) -> int:
    """Import or export; see --help. Returns the exit code."""
    options = _parser().parse_args(argv)
    require_devices()
    {"import": _import, "export": _export}[options.command](options)
    print(f"wrote {options.output}")
    return 0


def _import(options: argparse.Namespace) -> None:
    # Before the weights, whose reading may take minutes.
    output = refuse_existing(Path(options.output))
    read_config(options.folder)  # for its error: a run's folder is a source too, and not for this
    source = read_source(options.folder)
    tokenizer = _tokenizer(source)
    with owned_output(output, beside=True):
        # On one device: a checkpoint is restored on any mesh later.
        params = import_params(options.folder, progress=True)
        with new_folder(output) as draft:
            save_params(
                draft,
                source.model,
                params,
                tokenizer_hash=None if tokenizer is None else tokenizer.hash,
                facts=source.facts,
            )
            # The tokenizer goes with the weights, both ways: `generate` needs it.
            if tokenizer is not None:
                shutil.copy(tokenizer.path, draft / FILE)


def _export(options: argparse.Namespace) -> None:
    refuse_existing(Path(options.output))
    source = read_source(options.checkpoint)
    if is_hf(source.path):
        raise ConfigError(f"{source.path} is a Hugging Face folder already")
    refuse_inputs({"output": [options.output]}, {"checkpoint": source.files})
    tokenizer = _tokenizer(source, options.tokenizer)
    say(f"exporting {source.path}")
    # Before the weights, whose reading may take minutes.
    require_form(source.model, options.form)
    config, params = load_params(source.path)
    export(
        params,
        config,
        options.output,
        dtype=options.dtype,
        form=options.form,
        tokenizer=tokenizer,
        facts=source.facts,
    )


def _tokenizer(source: Source, given: str | None = None) -> Tokenizer | None:
    """The weights' tokenizer; None where the folder has none and none is known."""
    if given is None and source.tokenizer_file is None and source.tokenizer_hash is None:
        say(
            f"warning: {source.path} has no {FILE}: the weights are written without a tokenizer; "
            "generate, evaluate and training from them will ask for it"
        )
        return None
    tokenizer = find_tokenizer(source, given)
    for warning in tokenizer.warnings:
        say(warning)
    return tokenizer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.hf", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser(
        "import", help="a Hugging Face folder -> a checkpoint for --init_from and generate"
    )
    importing.add_argument("folder", help="with config.json and safetensors or .bin files")
    importing.add_argument("output", type=writable, help="the checkpoint's new folder")
    exporting = commands.add_parser(
        "export", help="a run or checkpoint -> a folder that transformers loads"
    )
    exporting.add_argument("checkpoint", help="a run's folder or one of its checkpoints")
    exporting.add_argument("output", type=writable, help="the new folder")
    exporting.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="a SentencePiece model, where the checkpoint has none beside it",
    )
    exporting.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float16", "float32"],
        help="default: bfloat16",
    )
    exporting.add_argument(
        "--form",
        default="llama",
        choices=["llama", "baichuan"],
        help="llama (default): transformers' own class",
    )
    return parser


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
