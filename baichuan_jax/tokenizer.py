"""SentencePiece: load any model, train one as the original's was, measure its compression.

`python -m baichuan_jax.tokenizer train|encode|stats`

Training takes documents and writes a model: byte-pair encoding (Sennrich et al. 2016), every digit
a token, characters without a piece spelt in bytes, no normalisation, so that text comes back from
its tokens unchanged. Of a large corpus, lines are sampled evenly. The same documents give the same
bytes on any machine, so the hash of a model names it in checkpoints and in packed rows.
"""

import argparse
import collections
import functools
import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from baichuan_jax.config.parsing import decode, given_text, read_bytes, require_text
from baichuan_jax.config.schema import ConfigError, at_least, between
from baichuan_jax.documents.files import Slice, find_files, say_unread
from baichuan_jax.documents.language import language
from baichuan_jax.documents.reader import MAX_LINE_BYTES, read_texts
from baichuan_jax.resilience.exits import run_command, say
from baichuan_jax.runs.console import Display, shown_text
from baichuan_jax.runs.files import refuse_inputs, writable_file, write_atomically

# Control pieces of the original's tokenizer and of those that are trained here. Another model may
# have others: `Tokenizer.eos_id` is a model's own.
UNK, BOS, EOS = 0, 1, 2
FIRST_PIECES = 3 + 256  # control pieces, then one piece for every byte
# Text to train on. It is held in memory, and is enough for a vocabulary of 8,192 in seconds.
TRAINING_BYTES = 8 << 20
# SentencePiece silently leaves out lines of more than 4,192 bytes; a character has at most 4.
MAX_LINE_CHARACTERS = 1000
# Of a model's file: those with vocabularies of 250,000 pieces have 5 MB.
MOST_MODEL_BYTES = 64 << 20
# Bytes that a model's rules may put in the place of a character: those of Unicode (NFKC) have 33 at
# most. A longer one makes a page of text into all of a machine's memory.
MOST_REPLACEMENT = 64
# Vocabularies have up to 300,000 pieces, rules up to some hundred thousand bytes, and the rest of a
# model is three messages of some fields. More is no model, and takes minutes to walk through.
MOST_PIECES = 1_000_000
MOST_RULES = 8 << 20
MOST_FIELDS = 100
# What SentencePiece writes for a space; packing counts where text itself has it.
SPACE_MARK = "\u2581"
# Texts that should come back from their tokens, by what they have in them. SentencePiece's own
# defaults (nmt_nfkc, white space squeezed, no byte fallback) lose all of it but upper case. U+2581
# (SPACE_MARK) is not among them: every model turns it into a space.
PROBES = {
    "new lines": "a\nb\n\nc",
    "carriage returns": "a\r\nb",
    "tabs": "a\tb",
    "runs of spaces": "a    b",
    "spaces at the beginning": "  a",
    "spaces at the end": "a  ",
    "full-width characters": "ＡＢ，１",
    "full-width spaces": "a\u3000b",
    "no-break spaces": "a\u00a0b",
    "zero-width joiners": "a\u200db",
    "control characters": "a\0\x7fb",
    "ligatures and circled numbers": "ﬁ①",
    "combining accents": "e\u0301",
    "upper case": "Aa",
    "rare characters": "龘🦜",
}


class Tokenizer:
    """A SentencePiece model; `hash` is the SHA-256 of its file.

    `notes`: what a user should hear of it, beside what it loses; `warnings` has both. Raises
    ConfigError where the file is no model, or has no end-of-sentence piece, which joins documents,
    or could take all memory; `remedy` ends that message with what to do.
    """

    def __init__(self, path: Path | str, remedy: str = "give another file") -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise ConfigError(
                f"there is no tokenizer {str(path)!r}; "
                "train one: python -m baichuan_jax.tokenizer train --help"
            )
        if (size := self.path.stat().st_size) > MOST_MODEL_BYTES:
            raise ConfigError(
                f"{path} has {size:,} bytes, and no SentencePiece model has more than "
                f"{MOST_MODEL_BYTES:,}; {remedy}"
            )
        # Read once: the hash is of the bytes that are loaded, whatever happens to the file.
        content = read_bytes(self.path)
        self.hash = hashlib.sha256(content).hexdigest()
        # From bytes: a path that SentencePiece cannot open ends in an error without its name.
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            longest = max(map(_longest_replacement, _normalisers(content)), default=0)
            self._model.LoadFromSerializedProto(content)
            self.vocab_size: int = self._model.GetPieceSize()
        except Exception as error:
            raise ConfigError(f"{path} is no SentencePiece model: {error}; {remedy}") from None
        if longest > MOST_REPLACEMENT:
            raise ConfigError(
                f"{path} would replace a character by {longest:,} bytes, and {MOST_REPLACEMENT} "
                f"are the most; {remedy}"
            )
        # -1 where the model has no such piece.
        self.eos_id: int = self._model.eos_id()
        self.bos_id: int = self._model.bos_id()
        self.pad_id: int = self._model.pad_id()
        self.unk_id: int = self._model.unk_id()
        self.notes: list[str] = []
        # SentencePiece loads an empty file without complaint, as a model of no pieces.
        if self.vocab_size == 0 or self.eos_id < 0:
            raise ConfigError(
                f"{path} has {self.vocab_size} pieces and no end-of-sentence piece, "
                f"which joins documents; {remedy}"
            )

    @functools.cached_property
    def losses(self) -> dict[str, tuple[str, str]]:
        """What does not come back from its tokens: by name a text, and what comes back of it."""
        back = {name: self.decode(self.encode(text)) for name, text in PROBES.items()}
        return {name: (text, back[name]) for name, text in PROBES.items() if back[name] != text}

    @property
    def warnings(self) -> list[str]:
        """What a command says where it loads this tokenizer; each is one line."""
        if not self.losses:
            return self.notes
        lost = ", ".join(f"{name} ({a!r} -> {b!r})" for name, (a, b) in self.losses.items())
        return [
            *self.notes,
            f"warning: the tokenizer {self.path} does not keep all text. It changes {lost}. "
            "Corpora, prompts and tests are all changed like this, and a model never learns what "
            "is lost. Models of python -m baichuan_jax.tokenizer train keep all but U+2581; with "
            "SentencePiece's own trainer set normalization_rule_name=identity, "
            "remove_extra_whitespaces=false and byte_fallback=true",
        ]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without begin or end of sentence.

        Raises ConfigError for a text that no UTF-8 can write.
        """
        require_text(text, "the text")
        return self._model.EncodeAsIds(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of every text, on one thread: callers have a process for each core."""
        return self._model.Encode(texts, num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; control pieces add nothing."""
        # SentencePiece takes Python ints only, and callers have numpy's.
        return self._model.DecodeIds([int(i) for i in ids])

    def is_text(self, token: int) -> bool:
        """Whether a token is written in texts: no control piece, not unused, not unknown."""
        model, token = self._model, int(token)
        return not (model.IsControl(token) or model.IsUnused(token) or model.IsUnknown(token))

    def piece(self, token: int) -> str:
        """How the vocabulary writes a token."""
        return self._model.IdToPiece(int(token))


def _normalisers(content: bytes) -> Iterator[bytes]:
    """The rules for characters in a model's file, of its normalizer_spec and denormalizer_spec."""
    pieces = others = 0
    for number, value in _fields(content):
        pieces, others = pieces + (number == 1), others + (number != 1)
        _require_at_most(pieces, MOST_PIECES, "pieces")
        _require_at_most(others, MOST_FIELDS, "fields beside its pieces")
        if number not in (3, 5):
            continue
        for count, (inner, rules) in enumerate(_fields(value), 1):
            _require_at_most(count, MOST_FIELDS, "fields of its rules")
            # precompiled_charsmap
            if inner == 2:
                _require_at_most(len(rules), MOST_RULES, "bytes of rules")
                yield rules


def _require_at_most(count: int, most: int, what: str) -> None:
    if count > most:
        raise ValueError(f"it has over {most:,} {what}")


def _longest_replacement(rules: bytes) -> int:
    """Bytes of the longest text of a precompiled_charsmap: size of a trie, trie, texts up to 0."""
    texts = rules[4 + int.from_bytes(rules[:4], "little") :]
    return max(map(len, texts.split(b"\0")))


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, content) of every field of a protobuf message. Raises ValueError.

    Not by the protobuf package: a process may hold the description of this format only once, and
    transformers brings its own.
    """
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            if place >= len(message) or shift > 63:
                raise ValueError("it ends within a field")
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(message):
        key = number()
        kind, start = key & 7, place
        if kind == 0:
            number()
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        elif kind == 2:
            size = number()
            start, place = place, place + size
        else:
            raise ValueError(f"it has a field of the kind {kind}")
        if place > len(message):
            raise ValueError("it ends within a field")
        yield key >> 3, message[start:place]


def train_tokenizer(
    documents: Iterable[str],
    path: Path | str,
    vocab_size: int,
    *,
    sample_bytes: int = TRAINING_BYTES,
    chinese_share: float | None = None,
) -> dict[str, int | float]:
    """Train BPE as the original's and write the model to `path`.

    Every character gets a piece where half of the vocabulary can hold them all, else the most
    frequent ones do. Of more text than `sample_bytes`, lines are sampled evenly, so that memory
    does not grow with the text; `chinese_share` of their bytes come from Chinese documents (None:
    as many as the text has). Returns what was used: bytes, characters, and the share of characters'
    occurrences that have a piece. Raises ConfigError where the text is too small for the
    vocabulary, or holds no document of a language that the share asks for.
    """
    # Memory is bound here; everything below works on the sample alone.
    lines, used = _sample_lines(documents, sample_bytes, chinese_share)
    characters = collections.Counter(character for line in lines for character in line)
    # The other half is for BPE's merges, without which there is no compression.
    room = (vocab_size - FIRST_PIECES) // 2
    if room < 1:
        raise ConfigError(
            f"tokenizer.vocab_size={vocab_size} must be at least {FIRST_PIECES + 2}: "
            "3 control pieces and 256 bytes come first, then a character and a pair"
        )
    # SentencePiece's own character_coverage cannot go below 0.98, which a small vocabulary of
    # Chinese needs: lines are cut at the characters that get no piece instead.
    rare = [character for character, _ in characters.most_common()[room:]]
    if rare:
        cut = re.compile("[" + re.escape("".join(rare)) + "]+")
        lines = [part for line in lines for part in cut.split(line) if part]
    missed = sum(characters[character] for character in rare)
    coverage = 1 - missed / max(1, sum(characters.values()))
    try:
        model = _train_model(lines, vocab_size)
    except Exception as error:
        raise ConfigError(
            f"no tokenizer of {vocab_size} pieces from {used['bytes']:,} bytes of text: {error}"
        ) from None
    # Whole or not at all: several processes of a run may look for it.
    write_atomically(Path(path), model)
    return {**used, "characters": len(characters), "coverage": coverage}


def _train_model(lines: list[str], vocab_size: int) -> bytes:
    """SentencePiece's training with the original's settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        # The lines hold no rare character any more, so all that are left get a piece.
        character_coverage=1.0,
        split_digits=True,
        byte_fallback=True,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        # Together these three keep every character and space of a text.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        minloglevel=2,
        # Written into the model, so the number of cores would change its hash; more is no faster.
        num_threads=1,
    )
    return model.getvalue()


class _Sample:
    """Every n-th line of a stream, n the power of two that keeps at most `limit` bytes.

    At least one line is kept. When the limit is passed, n doubles and every other line is dropped:
    what is left is still every n-th line, whatever the length of the stream.
    """

    def __init__(self, limit: int) -> None:
        self.lines: list[str] = []
        self.every, self.total, self.size = 1, 0, 0  # total: bytes seen; size: bytes kept
        self._limit, self._seen = limit, 0

    def add(self, line: str) -> None:
        """See one more line of the stream."""
        size = len(line.encode())
        self.total += size
        if self._seen % self.every == 0:
            self.lines.append(line)
            self.size += size
            while self.size > self._limit and len(self.lines) > 1:
                self.every *= 2
                self.lines = self.lines[::2]
                self.size = sum(len(line.encode()) for line in self.lines)
        # Counted also where the line is dropped: it decides which lines come next.
        self._seen += 1

    def spread(self, size: int) -> list[str]:
        """Lines of about `size` bytes, evenly from all that are kept."""
        chosen, passed, taken = [], 0, 0
        for line in self.lines:
            passed += len(line.encode())
            # Bytes and not lines are spread evenly, since lines differ in length.
            if taken < passed * size / self.size:
                chosen.append(line)
                taken += len(line.encode())
        return chosen


def _sample_lines(
    documents: Iterable[str], sample_bytes: int, chinese_share: float | None
) -> tuple[list[str], dict[str, int | float]]:
    """Lines to train on, and counts: bytes seen, one line in how many, bytes of each language."""
    if chinese_share is None:
        sample = _Sample(sample_bytes)
        for line in _lines(documents):
            sample.add(line)
        return sample.lines, {"bytes": sample.total, "sampled_one_line_in": sample.every}
    if not 0 < chinese_share < 1:
        raise ConfigError(
            f"chinese_share={chinese_share} must lie between 0 and 1; "
            "leave it out to take the text as it is"
        )
    # Each language has its own sample, or the larger would leave the other few lines.
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
    # The scarcer language limits the whole.
    size = min(sample.size / shares[name] for name, sample in samples.items())
    chosen = {name: sample.spread(round(size * shares[name])) for name, sample in samples.items()}
    used: dict[str, int | float] = {"bytes": sum(sample.total for sample in samples.values())}
    for name, sample in samples.items():
        used |= {
            f"{name}_bytes": sample.total,
            f"{name}_bytes_used": sum(len(line.encode()) for line in chosen[name]),
        }
    return [line for lines in chosen.values() for line in lines], used


def _lines(documents: Iterable[str]) -> Iterator[str]:
    """Lines of at most MAX_LINE_CHARACTERS; longer ones are cut."""
    for document in documents:
        for line in document.split("\n"):
            # An empty line yields nothing.
            for start in range(0, len(line), MAX_LINE_CHARACTERS):
                yield line[start : start + MAX_LINE_CHARACTERS]


def stats(tokenizer: Tokenizer, documents: Iterable[str]) -> dict[str, dict[str, float]]:
    """Compression by language ("zh" where most letters are Han, else "en", and "all").

    Of each: documents, bytes, characters, tokens, bytes_per_token, characters_per_token, and
    compression_rate: the size of the token ids, two bytes each, over the size of the text in UTF-8;
    lower is better. The original's README gives such a rate (0.737 for its own) but neither its
    definition nor its text, so compare tokenizers here, not with those numbers.
    """
    sums: dict[str, collections.Counter] = {}
    for document in documents:
        counts = {
            "documents": 1,
            "bytes": len(document.encode()),
            "characters": len(document),
            "tokens": len(tokenizer.encode(document)),
        }
        # Counted by document: a language is the document's, not a word's.
        for name in (language(document), "all"):
            sums.setdefault(name, collections.Counter()).update(counts)
    return {
        name: {
            **total,
            "bytes_per_token": total["bytes"] / max(1, total["tokens"]),
            "characters_per_token": total["characters"] / max(1, total["tokens"]),
            "compression_rate": 2 * total["tokens"] / max(1, total["bytes"]),
        }
        for name, total in sorted(sums.items())
    }


def main(argv: list[str]) -> int:
    """The command. Returns its exit code."""
    options = _parser().parse_args(argv)
    return {"train": _train, "encode": _encode, "stats": _stats}[options.command](options)


def _train(options: argparse.Namespace) -> int:
    files = find_files(options.input)
    refuse_inputs({"--output": [options.output]}, {"--input": files})
    say_unread(options.input)
    used = train_tokenizer(
        read_texts(map(Slice, files), options.text_field),
        options.output,
        options.vocab_size,
        sample_bytes=round(1e6 * options.sample_megabytes),
        chinese_share=options.chinese_share,
    )
    print(f"{options.output}: {options.vocab_size} pieces; {json.dumps(used)}")
    return 0


def _encode(options: argparse.Namespace) -> int:
    tokenizer = Tokenizer(options.model)
    # As bytes: Python's own reader takes the locale's encoding, and changes the ends of lines.
    if options.text == "-":
        # None: a process whose input was closed.
        content = sys.stdin.buffer.read(MAX_LINE_BYTES + 1) if sys.stdin else b""
        if len(content) > MAX_LINE_BYTES:
            raise ConfigError(f"standard input has more than {MAX_LINE_BYTES:,} bytes; give less")
        text = decode(content, "standard input")
    else:
        text = given_text(options.text, "the text")
    for token in tokenizer.encode(text):
        print(f"{token}\t{shown_text(tokenizer.piece(token))}")
    return 0


def _stats(options: argparse.Namespace) -> int:
    files = find_files(options.input)
    refuse_inputs({"--json": [options.json]}, {"--input": files, "--model": options.model})
    say_unread(options.input)
    # All are loaded before the first is measured: a wrong file is named at once.
    tokenizers = {path: Tokenizer(path) for path in options.model}
    for tokenizer in tokenizers.values():
        for warning in tokenizer.warnings:
            say(warning)
    results = {
        path: stats(tokenizer, read_texts(map(Slice, files), options.text_field))
        for path, tokenizer in tokenizers.items()
    }
    display = Display()
    _show_languages(results, display)
    # A column for each tokenizer, rows for rate and size.
    rates = [results[path].get("all", {}).get("compression_rate", math.nan) for path in tokenizers]
    sizes = [tokenizer.vocab_size for tokenizer in tokenizers.values()]
    rows = [
        ["Compress Rate", *(f"{rate:.3f}" for rate in rates)],
        ["Vocab Size", *(f"{size:,}" for size in sizes)],
    ]
    display.table("as in the original's README", ["Model", *options.model], rows)
    if options.json:
        write_atomically(Path(options.json), json.dumps(results, indent=1).encode())
    return 0


def _show_languages(results: dict[str, dict[str, dict[str, float]]], display: Display) -> None:
    """A row for each tokenizer and language."""
    rows = []
    for path, languages in results.items():
        for name, counts in languages.items():
            rates = ("bytes_per_token", "characters_per_token", "compression_rate")
            cells = [f"{counts['documents']:,}", f"{counts['tokens']:,}"]
            rows.append([path, name, *cells, *(f"{counts[rate]:.3f}" for rate in rates)])
    heads = ["lang", "docs", "tokens", "bytes/\ntoken", "chars/\ntoken", "compr.\nrate"]
    display.table(None, ["tokenizer", *heads], rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.tokenizer",
        description="Train, try and measure SentencePiece tokenizers. Example: "
        "train --input 'text/*.jsonl.gz' --vocab_size 32000 --output tokenizer.model",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train BPE: digits split, byte fallback")
    model = "the model to write"
    train.add_argument("--output", required=True, type=writable_file, metavar="FILE", help=model)
    vocab_size = "pieces, with 3 control pieces and 256 bytes among them"
    train.add_argument("--vocab_size", type=at_least(1), required=True, help=vocab_size)
    train.add_argument(
        "--sample_megabytes",
        type=between(),
        default=TRAINING_BYTES / 1e6,
        metavar="MB",
        help="text to train on, evenly from all of the input; training takes about ten times as "
        "much memory (default: 8.4)",
    )
    share = "of the bytes trained on (default: as the input has it)"
    train.add_argument("--chinese_share", type=between(0, 1), help=share)
    encode = commands.add_parser("encode", help="print a text's tokens")
    encode.add_argument("text", help="the text, or - to read it from standard input")
    encode.add_argument("--model", required=True, metavar="FILE", help="a SentencePiece model")
    measure = commands.add_parser("stats", help="bytes a token and compression rate, by language")
    numbers = "save the numbers here too"
    measure.add_argument("--json", type=writable_file, metavar="FILE", help=numbers)
    models = "SentencePiece models to compare"
    measure.add_argument("--model", required=True, nargs="+", metavar="FILE", help=models)
    # Both read text in the same way.
    for command in (train, measure):
        files = "JSONL (a document a line) or .txt, also .gz, .zst"
        command.add_argument("--input", required=True, nargs="+", metavar="GLOB", help=files)
        field = "field that holds the text; outer.inner: inside another (default: text)"
        command.add_argument("--text_field", default="text", help=field)
    return parser


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]), result_is_shown=True)
