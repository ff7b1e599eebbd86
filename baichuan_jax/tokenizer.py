"""SentencePiece: load any model, train one as the original's was (BPE, digits split, byte fallback), report its compression.

`python -m baichuan_jax.tokenizer train|encode|stats`
"""

import argparse
import collections
import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from rich.console import Console
from rich.table import Column, Table

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.documents.reader import find_files, language, read_documents, split_files
from baichuan_jax.resilience.exits import run_command
from baichuan_jax.runs.files import write_atomically

TRAINING_BYTES = (
    8 << 20
)  # of text, held in memory; what a vocabulary of 8,192 needs, in seconds. More is sampled evenly.
MAX_LINE_CHARACTERS = (
    1000  # at most 4,000 bytes; SentencePiece silently leaves out lines of more than 4,192
)


class Tokenizer:
    """A SentencePiece model. Raises ConfigError where the file is none, or has no end-of-sentence piece to join documents with."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError(
                f"there is no tokenizer {str(path)!r}; train one: python -m baichuan_jax.tokenizer train --help"
            )
        content = self.path.read_bytes()
        self.hash = hashlib.sha256(content).hexdigest()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
            self.vocab_size: int = self._model.GetPieceSize()
        except Exception as error:
            raise ConfigError(f"{path} is no SentencePiece model: {error}") from None
        self.eos_id: int = self._model.eos_id()
        self.bos_id: int = self._model.bos_id()
        self.pad_id: int = self._model.pad_id()
        if self.vocab_size == 0 or self.eos_id < 0:
            raise ConfigError(
                f"{path} has {self.vocab_size} pieces and no end-of-sentence piece, which joins documents"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without begin or end of sentence."""
        return self._model.EncodeAsIds(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._model.Encode(texts, num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.DecodeIds([int(i) for i in ids])

    def piece(self, token: int) -> str:
        """How the vocabulary writes a token."""
        return self._model.IdToPiece(int(token))


def train_tokenizer(
    documents: Iterable[str],
    path: Path | str,
    vocab_size: int,
    *,
    sample_bytes: int = TRAINING_BYTES,
    chinese_share: float | None = None,
) -> dict[str, int | float]:
    """Train BPE as the original's and write it to `path` at once; the same documents give the same bytes.

    Digits are split and rare characters fall back to bytes. Every character gets a piece where half
    of the vocabulary can hold them all, else the most frequent ones do. Of more text than
    `sample_bytes`, lines are taken evenly, so that memory does not grow with the text;
    `chinese_share` of their bytes come from Chinese documents (None: as many as the text has).
    Returns what was used: bytes, characters, share of characters' occurrences with a piece. Raises
    ConfigError where the text is too small for the vocabulary, or holds no document of a language
    that the share asks for.
    """
    used, figures = _choose(documents, sample_bytes, chinese_share)
    characters = collections.Counter(character for line in used for character in line)
    room = (vocab_size - 3 - 256) // 2
    if room < 1:
        raise ConfigError(
            f"tokenizer.vocab_size={vocab_size} must exceed 261: 3 control pieces and 256 bytes come first"
        )
    # SentencePiece's own character_coverage cannot go below 0.98, which a small vocabulary of
    # Chinese needs: lines are cut at the characters that get no piece instead.
    rare = [character for character, _ in characters.most_common()[room:]]
    if rare:
        cut = re.compile("[" + re.escape("".join(rare)) + "]+")
        used = [part for line in used for part in cut.split(line) if part]
    coverage = 1 - sum(characters[character] for character in rare) / max(
        1, sum(characters.values())
    )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(used),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            split_digits=True,
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            minloglevel=2,
            num_threads=1,  # stands in the model's bytes, so the number of cores would change its hash; more is no faster
        )
    except Exception as error:
        raise ConfigError(
            f"no tokenizer of {vocab_size} pieces from {figures['bytes']:,} bytes of text: {error}"
        ) from None
    write_atomically(Path(path), model.getvalue())
    return {**figures, "characters": len(characters), "coverage": coverage}


class _Sample:
    """Every n-th line of a stream, n the power of two that keeps at most `limit` bytes, one line at least."""

    def __init__(self, limit: int) -> None:
        self.lines: list[str] = []
        self.every, self.total, self.size = 1, 0, 0  # total: bytes seen; size: bytes kept
        self._limit, self._seen = limit, 0

    def add(self, line: str) -> None:
        size = len(line.encode())
        self.total += size
        if self._seen % self.every == 0:
            self.lines.append(line)
            self.size += size
            while self.size > self._limit and len(self.lines) > 1:
                self.every *= 2
                self.lines = self.lines[::2]
                self.size = sum(len(line.encode()) for line in self.lines)
        self._seen += 1

    def spread(self, size: int) -> list[str]:
        """Lines of about `size` bytes, evenly from all that are kept."""
        chosen, passed, taken = [], 0, 0
        for line in self.lines:
            passed += len(line.encode())
            if taken < passed * size / self.size:
                chosen.append(line)
                taken += len(line.encode())
        return chosen


def _choose(
    documents: Iterable[str], sample_bytes: int, chinese_share: float | None
) -> tuple[list[str], dict[str, int | float]]:
    """Lines to train on, and what they are of: bytes seen, one line in how many, with a share the bytes of each language."""
    if chinese_share is None:
        sample = _Sample(sample_bytes)
        for line in _lines(documents):
            sample.add(line)
        return sample.lines, {"bytes": sample.total, "sampled_one_line_in": sample.every}
    if not 0 < chinese_share < 1:
        raise ConfigError(
            f"chinese_share={chinese_share} must lie between 0 and 1; leave it out to take the text as it is"
        )
    shares = {"zh": chinese_share, "en": 1 - chinese_share}
    samples = {name: _Sample(round(share * sample_bytes)) for name, share in shares.items()}
    for document in documents:
        for line in _lines([document]):
            samples[language(document)].add(line)
    for name, sample in samples.items():
        if sample.size == 0:
            raise ConfigError(
                f"chinese_share={chinese_share} asks for {name!r} text too, and there is none"
            )
    size = min(
        sample.size / shares[name] for name, sample in samples.items()
    )  # what the scarcer language allows
    chosen = {name: sample.spread(round(size * shares[name])) for name, sample in samples.items()}
    figures: dict[str, int | float] = {"bytes": sum(sample.total for sample in samples.values())}
    for name, sample in samples.items():
        figures |= {
            f"{name}_bytes": sample.total,
            f"{name}_bytes_used": sum(len(line.encode()) for line in chosen[name]),
        }
    return [line for lines in chosen.values() for line in lines], figures


def _lines(documents: Iterable[str]) -> Iterator[str]:
    """Lines of at most MAX_LINE_CHARACTERS; longer ones are cut."""
    for document in documents:
        for line in document.split("\n"):
            for start in range(0, len(line), MAX_LINE_CHARACTERS):
                yield line[start : start + MAX_LINE_CHARACTERS]


def stats(tokenizer: Tokenizer, documents: Iterable[str]) -> dict[str, dict[str, float]]:
    """Compression by language ("zh" where most letters are Han, else "en", and "all").

    Figures: documents, bytes, characters, tokens, bytes_per_token, characters_per_token, and
    compression_rate: the size of the token ids, two bytes each, over the size of the text in UTF-8.
    Lower is better in the last. The original's README gives such a rate (0.737 for its own) but
    neither its definition nor its text, so compare tokenizers here, not with those numbers.
    """
    sums: dict[str, collections.Counter] = {}
    for document in documents:
        figures = {
            "documents": 1,
            "bytes": len(document.encode()),
            "characters": len(document),
            "tokens": len(tokenizer.encode(document)),
        }
        for name in (language(document), "all"):
            sums.setdefault(name, collections.Counter()).update(figures)
    return {
        name: {
            **total,
            "bytes_per_token": total["bytes"] / max(1, total["tokens"]),
            "characters_per_token": total["characters"] / max(1, total["tokens"]),
            "compression_rate": 2 * total["tokens"] / max(1, total["bytes"]),
        }
        for name, total in sorted(sums.items())
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.tokenizer",
        description="Train, try and measure SentencePiece tokenizers. "
        "Example: train --input 'text/*.jsonl.gz' --vocab_size 32000 --output tokenizer.model",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train BPE: digits split, byte fallback")
    train.add_argument("--output", required=True, metavar="FILE", help="the model to write")
    train.add_argument(
        "--vocab_size",
        type=int,
        required=True,
        help="pieces, with 3 control pieces and 256 bytes among them",
    )
    train.add_argument(
        "--sample_megabytes",
        type=float,
        default=TRAINING_BYTES / 1e6,
        metavar="MB",
        help="text to train on, evenly from all of the input; takes about ten times as much memory (default: 8.4)",
    )
    train.add_argument(
        "--chinese_share", type=float, help="of the bytes trained on (default: as the input has it)"
    )
    encode = commands.add_parser("encode", help="print a text's tokens")
    encode.add_argument("text", help="the text, or - to read it from standard input")
    measure = commands.add_parser("stats", help="bytes a token and compression rate, by language")
    measure.add_argument("--json", metavar="FILE", help="save the figures here too")
    encode.add_argument("--model", required=True, metavar="FILE", help="a SentencePiece model")
    measure.add_argument(
        "--model", required=True, nargs="+", metavar="FILE", help="SentencePiece models to compare"
    )
    for command in (train, measure):
        command.add_argument(
            "--input",
            required=True,
            nargs="+",
            metavar="GLOB",
            help="JSONL (a document a line) or .txt, also .gz, .zst",
        )
        command.add_argument(
            "--text_field", default="text", help="JSONL field that holds the text (default: text)"
        )
    return parser


def main(words: list[str]) -> int:
    """The command. Returns its exit code."""
    options = _parser().parse_args(words)
    if options.command == "encode":
        tokenizer = Tokenizer(options.model)
        text = sys.stdin.read() if options.text == "-" else options.text
        for token in tokenizer.encode(text):
            print(f"{token}\t{tokenizer.piece(token)}")
        return 0
    files = find_files(options.input)

    def documents() -> Iterator[str]:
        for part in split_files(files):
            yield from read_documents(part, options.text_field)

    if options.command == "train":
        used = train_tokenizer(
            documents(),
            options.output,
            options.vocab_size,
            sample_bytes=round(1e6 * options.sample_megabytes),
            chinese_share=options.chinese_share,
        )
        print(f"{options.output}: {options.vocab_size} pieces; {json.dumps(used)}")
        return 0
    tokenizers = {path: Tokenizer(path) for path in options.model}
    results = {path: stats(tokenizer, documents()) for path, tokenizer in tokenizers.items()}
    table = Table(
        Column("tokenizer", overflow="fold"),
        "lang",
        "docs",
        "tokens",
        "bytes/\ntoken",
        "chars/\ntoken",
        "compr.\nrate",
    )
    for path, languages in results.items():
        for name, f in languages.items():
            table.add_row(
                path,
                name,
                f"{f['documents']:,}",
                f"{f['tokens']:,}",
                f"{f['bytes_per_token']:.3f}",
                f"{f['characters_per_token']:.3f}",
                f"{f['compression_rate']:.3f}",
            )
    console = Console(soft_wrap=True)
    console.print(table)
    layout = Table(
        "Model",
        *(Column(path, justify="right", overflow="fold") for path in options.model),
        title="as in the original's README",
    )
    rates = [
        results[path]["all"]["compression_rate"] if "all" in results[path] else math.nan
        for path in options.model
    ]
    layout.add_row("Compress Rate", *(f"{rate:.3f}" for rate in rates))
    layout.add_row(
        "Vocab Size", *(f"{tokenizer.vocab_size:,}" for tokenizer in tokenizers.values())
    )
    console.print(layout)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
