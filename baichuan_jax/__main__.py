"""`python -m baichuan_jax` lists the commands."""

import difflib
import sys

from baichuan_jax import __version__

COMMANDS = {
    "Train": {
        "train": "train a model, or go on where it was: --config configs/tiny.yaml takes minutes on a CPU",
        "launch": "a supervised run on several hosts, which names the cause of a fault and starts again by itself",
        "preflight": "check in seconds that every device computes, every pair of hosts talks and every host can save",
        "plan": "compile a training step for a cluster that is not there: memory, collectives, predicted speed",
        "xla_flags": "what XLA, NCCL and jax are told for a cluster, model and mesh, each with its reason",
        "kernels": "what every GPU and TPU kernel takes of a device, from the assembler",
    },
    "Look": {
        "report": "a run, or several side by side, as one HTML page",
        "resilience": "what happened in a run, when, to whom, and what it cost",
        "generate": "let a model write",
        "evaluate": "MMLU, C-Eval, AGIEval, Gaokao, and perplexity by context length",
        "hf": "import and export Hugging Face checkpoints",
    },
    "Prepare text": {
        "data.pipeline": "raw text to a clean corpus: rules, quality, near-duplicates, selection",
        "data.quality": "train quality classifiers, and score text",
        "data.decontaminate": "find text of evaluation sets in a corpus",
        "data.mixture": "sampling weights of corpora, by temperature or learned from small trainings",
        "tokenizer": "train, try and measure SentencePiece tokenizers",
        "data.rows": "pack text into rows of tokens beforehand",
    },
}


def main(words: list[str]) -> int:
    """Print the list; 2 where words were given that mean nothing here."""
    names = [name for group in COMMANDS.values() for name in group]
    if words and words[0] not in ("-h", "--help"):
        name = words[0].removeprefix("baichuan_jax.")
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        print(
            f"error: commands are modules: python -m baichuan_jax.{near} {' '.join(words[1:])}".rstrip(),
            file=sys.stderr,
        )
        return 2
    print(
        f"usage: python -m baichuan_jax.COMMAND ...    (baichuan_jax {__version__}; --help explains each)"
    )
    for title, group in COMMANDS.items():
        print(f"\n{title}")
        for name, what in group.items():
            print(f"  {name:<20}{what}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
