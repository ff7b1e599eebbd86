"""`python -m baichuan_jax.hf import|export`: checkpoints from and to Hugging Face folders."""

import argparse
import shutil
import sys
from pathlib import Path

from baichuan_jax.checkpoint.weights import load_params, save_params
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.hf.config import read_config
from baichuan_jax.hf.weights import export, import_params, tokenizer_file
from baichuan_jax.resilience.exits import run_command
from baichuan_jax.resilience.ownership import owned_output


def main(argv: list[str]) -> int:
    """Import or export; see --help. Returns the exit code."""
    options = _parser().parse_args(argv)
    if options.command == "import":
        # Now: Orbax refuses an existing folder only when it writes, after all weights were read.
        if Path(options.output).exists():
            raise ConfigError(f"{options.output} exists; import writes a new folder")
        with owned_output(Path(options.output), beside=True):
            # On one device: a checkpoint is restored on any mesh later.
            params = import_params(options.folder, progress=True)
            save_params(options.output, read_config(options.folder), params)
            # The tokenizer goes with the weights, both ways: `generate` needs it.
            if (tokenizer := Path(options.folder) / "tokenizer.model").exists():
                shutil.copy(tokenizer, Path(options.output) / "tokenizer.model")
    else:
        config, params = load_params(options.checkpoint)
        export(
            params,
            config,
            options.output,
            dtype=options.dtype,
            form=options.form,
            tokenizer=tokenizer_file(options.checkpoint),
        )
    print(f"wrote {options.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.hf", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser(
        "import", help="a Hugging Face folder -> a checkpoint for --init_from and generate"
    )
    importing.add_argument("folder", help="with config.json and safetensors or .bin files")
    importing.add_argument("output", help="the checkpoint's new folder")
    exporting = commands.add_parser(
        "export", help="a run or checkpoint -> a folder that transformers loads"
    )
    exporting.add_argument("checkpoint", help="a run's folder or one of its checkpoints")
    exporting.add_argument("output", help="the new folder")
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
