"""The console command: `baichuan-jax train ...` is the same as `python -m baichuan_jax.train ...`.

Only the module of the chosen command is imported, as the program's main module. So its exit code,
its signals and the processes that it spawns are those of `python -m`.
"""

import difflib
import runpy
import sys

from baichuan_jax import __version__

# Written out: asking the modules for their own texts would import jax, which takes seconds.
COMMANDS = {
    "Train": {
        "train": "train a model, or continue a run (--config tiny: minutes on a CPU)",
        "launch": "train on several hosts under supervisors, which find faults and restart",
        "preflight": "check compute, communication and storage of every host in seconds",
        "plan": "compile a training step for a cluster: memory, collectives, predicted speed",
        "xla_flags": "print the XLA, NCCL and jax settings of a cluster, each with its reason",
        "kernels": "print registers, spills and shared memory of every GPU and TPU kernel",
    },
    "Inspect": {
        "report": "write a run, or several side by side, as one HTML page",
        "resilience": "list the faults of a run: when, which host, and their cost",
        "generate": "generate text with a model",
        "evaluate": "MMLU, C-Eval, AGIEval, Gaokao, and perplexity by context length",
        "hf": "import and export Hugging Face checkpoints",
    },
    "Prepare text": {
        "data.pipeline": "clean raw text: rules, quality, near-duplicates, selection",
        "data.quality": "train quality classifiers, and score text",
        "data.decontaminate": "find text of evaluation sets in a corpus",
        "data.mixture": "find sampling weights of corpora, by temperature or small trainings",
        "tokenizer": "train, try and measure SentencePiece tokenizers",
        "data.rows": "tokenise and pack text into rows before training",
    },
}
USAGE = f"""usage: baichuan-jax COMMAND ...    or, the same:    python -m baichuan_jax.COMMAND ...

Baichuan-7B pre-training in JAX, version {__version__}. Each command explains itself with --help.
Start with: baichuan-jax train --config tiny"""


NAMES = [name for group in COMMANDS.values() for name in group]


def main(argv: list[str]) -> None:
    """Run a command, or answer in its place. Raises SystemExit."""
    # A user may copy the whole name from a line of `python -m`.
    name = argv[0].removeprefix("baichuan_jax.") if argv else ""
    if name in NAMES:
        # Every command reads sys.argv[1:] itself.
        sys.argv = [sys.argv[0], *argv[1:]]
        # As `python -m`: the module is __main__, which spawned processes import again by its name.
        runpy.run_module(f"baichuan_jax.{name}", run_name="__main__", alter_sys=True)
        return
    # Not above: nothing else is imported before a command.
    from baichuan_jax.resilience.exits import run_command

    run_command(lambda: answer(argv), result_is_shown=True)


def answer(argv: list[str]) -> int:
    """What no command answers: the list of them, or the version. Raises ConfigError at others."""
    if argv and argv[0] == "--version":
        print(__version__)
    elif not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        for title, group in COMMANDS.items():
            print(f"\n{title}")
            for name, what in group.items():
                print(f"  {name:<20}{what}")
    else:
        from baichuan_jax.config.schema import ConfigError

        # cutoff 0: there is always a nearest name, however far it is.
        near = difflib.get_close_matches(argv[0], NAMES, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"there is no command {argv[0]!r}; the nearest is {near!r}. baichuan-jax --help lists "
            "all commands"
        )
    return 0


def console() -> None:
    """The entry point of `baichuan-jax`."""
    main(sys.argv[1:])


if __name__ == "__main__":
    console()
