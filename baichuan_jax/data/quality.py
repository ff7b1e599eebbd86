"""Quality of text as a probability, by one fastText classifier for Chinese and one for English.

Input: texts. Output: the probability that each is good. A classifier sees a text as its Han
characters or lower-case words and the marks of its sentences, singly and in neighbouring pairs. So
it knows in what order words come, and nothing of layout, digits and symbols, which are the rules'
work (rules.py). It is trained on good text against bad: text of your choice, or damaged copies of
the good. The classifier is a linear model of word and pair vectors (Joulin et al. 2016,
https://arxiv.org/abs/1607.01759), its output calibrated to a probability on held-out documents.
The package brings a small model (quality_model/; card.json names the text it was trained on).

`python -m baichuan_jax.data.quality train|score`
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from baichuan_jax.config.parsing import read_json, read_text, require_keys, show
from baichuan_jax.config.schema import ConfigError, at_least, require
from baichuan_jax.data.corpus.config import OTHERS, QualityConfig
from baichuan_jax.documents.files import (
    Slice,
    State,
    find_files,
    require_unchanged,
    say_unread,
    states,
)
from baichuan_jax.documents.language import language
from baichuan_jax.documents.reader import read_texts
from baichuan_jax.resilience.exits import run_command
from baichuan_jax.resilience.ownership import lock_beside, owned_output, require_own
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import refuse_inputs, writable_file, write_atomically

if TYPE_CHECKING:
    # At run time these need pyarrow and daft, which the command does without.
    from baichuan_jax.data.corpus.effects import Effects
    from baichuan_jax.data.corpus.filter import Corpus
    from baichuan_jax.data.corpus.parts import DocumentPart, ParquetFile

MODEL = Path(__file__).parent / "quality_model"
LANGUAGES = ("zh", "en")
# One document in so many is kept from training: half of them to calibrate, half to report.
HELD_OUT = 10
# Characters of a training piece: a sentence up to a page.
SHORTEST, LONGEST = 20, 1500
# Characters held in memory for one language and label; more is sampled evenly, and the card says.
MAX_CHARACTERS = 30_000_000
# What the card says where no bad text was given.
DAMAGED = "damaged copies of the good text"
# Least share of function words in running English text; prose has a third. Measured: tables, lists
# and code lie below.
RUNNING = 0.08

_FUNCTION_WORD = re.compile(
    r"\b(?:the|of|and|to|a|in|is|that|for|it|with|as|be|on|by|this|are|or|not|from|at|an|if|you|can"
    r"|was|he|his|her|i|have|had|but|they|which|will|when)\b"
)
_TOKEN = re.compile(r"[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]+|[，。、；：！？,.;:!?]")


# The filter


class Quality:
    """Scores every document, and removes those below the least score of their kind."""

    name = "quality"

    def __init__(self, config: "QualityConfig") -> None:
        """Raises ConfigError where the model cannot be used."""
        self.config = config
        self.model = Path(config.model or MODEL)
        # Loads the model, and refuses it here: before hours of reading, not after them.
        if config.enabled:
            score([], self.model)

    def run(self, corpus: "Corpus") -> "Effects":
        from daft import lit  # pyright: ignore[reportMissingImports]

        from baichuan_jax.data.corpus.effects import Effects
        from baichuan_jax.data.corpus.tables import read_stage

        if not self.config.enabled:
            return Effects()
        # The card holds the checksums of the classifiers, so it changes when they do.
        card = read_text(self.model / "card.json")
        scores, _ = corpus.make_parts("quality", [corpus.documents.key, card], self._score_part)

        # Joined with what is left: removed documents have a score of 0 in the part files.
        def find() -> Any:
            scored = corpus.remaining("source", "lang").join(read_stage(scores), on="doc")
            return _low_quality(scored, self.config.least)

        key, low = corpus.make_table("low-quality", [scores.key, self.config.least], find)
        low = low.with_column("reason", lit("low_quality"))
        return Effects(key, removed=low, scores=scores)

    def _score_part(self, part: "DocumentPart", file: "ParquetFile") -> int:
        """Quality of every document, 0 where it is removed already. Returns how many it scored."""
        import pyarrow as pa  # pyright: ignore[reportMissingImports]

        from baichuan_jax.data.corpus.parts import SCORES

        scored = 0
        file.write(SCORES.empty_table())
        for table in part.read(["doc", "text"]):
            texts = table["text"].to_pylist()
            fit = [index for index, text in enumerate(texts) if text is not None]
            quality = np.zeros(len(texts), np.float32)
            if fit:
                quality[fit] = score([texts[index] for index in fit], self.model)
            file.write(pa.table([table["doc"], pa.array(quality)], schema=SCORES))
            scored += len(fit)
        return scored


def _low_quality(documents: Any, least: dict[str, float]) -> Any:
    """(doc) of documents (doc, source, lang, quality) whose quality is too low.

    The limit is their category's, else their language's, else the one for all others.
    """
    import daft  # pyright: ignore[reportMissingImports]

    @daft.func.batch(return_dtype=daft.DataType.float64())
    def limit(source: daft.Series, lang: daft.Series) -> Any:
        pairs = zip(source.to_pylist(), lang.to_pylist(), strict=True)
        general = least.get(OTHERS, 0.0)
        return [least.get(name, least.get(language, general)) for name, language in pairs]

    below: Any = limit(daft.col("source"), daft.col("lang"))
    return documents.where(daft.col("quality") < below).select("doc")


# Scores


def score(texts: list[str], model: Path | str = MODEL) -> np.ndarray:
    """Probability that each text is good: float32 [len(texts)]; 0 where a text has no letter.

    Documents and sentences alike; a text of mostly Han letters is judged by the Chinese classifier,
    any other by the English one. A table or a list in English has no order of words to be damaged:
    a model that learned from damaged text gives it 0.5 or more. `model` is a folder that `train`
    wrote. Raises ConfigError where it has no classifier of a text's language.
    """
    classifiers = _load(str(model))
    logits = np.full(len(texts), -np.inf)
    by_language: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        by_language.setdefault(language(text), []).append(index)
    for lang, indices in by_language.items():
        if lang not in classifiers:
            raise ConfigError(
                f"{model} holds no classifier of {lang!r}; train one: "
                "python -m baichuan_jax.data.quality train --help"
            )
        classifier, entry = classifiers[lang]
        lines = [_tokens(texts[index]) for index in indices]
        found = entry["slope"] * _logits(classifier, entry["direction"], lines) + entry["intercept"]
        if entry["damaged"] and lang == "en":
            # A model of the order of words cannot judge what has no such order.
            found = np.array(
                [
                    0 if z < 0 and line and not _is_running(line) else z
                    for z, line in zip(found, lines, strict=True)
                ]
            )
        logits[indices] = found
    # The logit of a text without letters is -inf, and its probability 0.
    with np.errstate(over="ignore"):
        return (1 / (1 + np.exp(-logits))).astype(np.float32)


def _tokens(text: str) -> str:
    return " ".join(_TOKEN.findall(text.lower()))


def _is_running(line: str) -> bool:
    return len(_FUNCTION_WORD.findall(line)) >= RUNNING * (1 + line.count(" "))


# What scoring takes from a language's entry in card.json.
_ENTRY = {"sha256": str, "slope": float, "intercept": float, "direction": list[float]}


@functools.lru_cache(maxsize=4)
def _load(folder: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Classifiers of a folder, each with its entry in card.json, by language."""
    fasttext = _fasttext()
    card = Path(folder) / "card.json"
    if not card.is_file():
        raise ConfigError(
            f"{folder} holds no quality model (no card.json); train one: "
            "python -m baichuan_jax.data.quality train --help"
        )
    described = require_keys(read_json(card), {"languages": dict, "bad": Any}, str(card))
    loaded = {}
    for lang, entry in described["languages"].items():
        require_keys(entry, _ENTRY, f"{card}: {lang}")
        require(lang in LANGUAGES, f"{card}: {show(lang)} is no language; expected {LANGUAGES}")
        path = Path(folder) / f"{lang}.ftz"
        # A model that was half copied, or is of another card, scores without an error.
        content = path.read_bytes() if path.is_file() else None
        found = None if content is None else hashlib.sha256(content).hexdigest()
        if content is None or found != entry["sha256"]:
            raise ConfigError(
                f"{path} has SHA-256 {found} and card.json says {entry['sha256']}; train it again"
            )
        entry = {**entry, "damaged": described["bad"] == DAMAGED}
        try:
            _check_classifier(content, len(entry["direction"]))
        except (ValueError, struct.error) as error:
            raise ConfigError(
                f"{path} is no classifier of card.json: {error}; train it again"
            ) from None
        classifier = fasttext.load_model(str(path))
        loaded[lang] = (classifier, entry)
    return loaded


def _check_classifier(content: bytes, dim: int) -> None:
    """Raise ValueError for a file that `train` did not write: fastText believes all that it says.

    Its reader takes the memory that a size asks for, and reads where a number points to. Layout:
    settings, dictionary, pruned pairs, quantised input matrix, output matrix (fastText 0.9.2,
    src/fasttext.cc, dictionary.cc, quantmatrix.cc, productquantizer.cc).
    """
    file = io.BytesIO(content)

    def take(layout: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))

    def agree(found: Any, wanted: Any, what: str) -> None:
        if found != wanted:
            raise ValueError(f"{what} is {found} and must be {wanted}")

    magic, version, found_dim, *settings = take("14i")
    agree((magic, version), (793712314, 12), "its beginning")
    agree(found_dim, dim, "its dimension, by the numbers of direction,")
    # As `_fit` gives them: no parts of words, and softmax over labels.
    _, _, _, _, ngrams, loss, model, bucket, minn, maxn, _ = settings
    agree((ngrams, loss, model, minn, maxn), (2, 3, 3, 0, 0), "wordNgrams, loss, model, minn, maxn")
    take("d")
    size, words, labels, _, pruned = take("3i2q")
    agree((labels, size - words), (2, 2), "its number of labels")
    if not (bucket > 0 and words > 0 and pruned <= len(content) // 8):
        raise ValueError(f"it says bucket={bucket}, {words} words, {pruned} pairs of words")
    place = file.tell()
    for number in range(size):
        # A word, 0, eight bytes of how often it occurs, its kind; labels come last.
        place = content.index(b"\0", place) + 10
        agree(content[place - 1 : place], b"\1" if number >= words else b"\0", "the kind of a word")
    file.seek(place)
    pairs = np.frombuffer(file.read(8 * max(pruned, 0)), "<i4").reshape(-1, 2)
    agree(len(pairs), max(pruned, 0), "its number of pairs of words")
    if not ((pairs[:, 1] >= 0) & (pairs[:, 1] < len(pairs))).all():
        raise ValueError("a pair of words has a row that is not there")
    # -1: nothing was pruned, and every hash has a row.
    rows = words + (bucket if pruned < 0 else pruned)
    agree(take("?"), (True,), "its quantisation")
    norms, found_rows, columns, codes = take("?2qi")
    agree((norms, found_rows, columns), (True, rows, dim), "its matrix")
    agree(codes, rows * -(-dim // 2), "its number of codes")
    file.seek(codes, io.SEEK_CUR)
    # Two dimensions share a code of one byte, and a row's norm has another.
    for width, share in ((dim, 2), (1, 1)):
        parts, rest = -(-width // share), width % share or share
        agree(take("4i"), (width, parts, share, rest), "the layout of its codes")
        file.seek(4 * 256 * width + (rows if share == 2 else 0), io.SEEK_CUR)
    agree(take("?"), (False,), "the quantisation of its output")
    agree(take("2q"), (labels, dim), "its output matrix")
    agree(len(content) - file.tell(), 4 * labels * dim, "the rest of its bytes")


def _fasttext() -> Any:
    try:
        import fasttext  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            "quality scores need the fasttext-numpy2-wheel package: "
            "pip install -r requirements-data.txt"
        ) from None
    # Its loader warns on stderr, at every load, of a change of its interface in 2020.
    setattr(fasttext.FastText, "eprint", lambda *_: None)  # noqa: B010
    return fasttext


def _logits(classifier: Any, direction: list[float], lines: list[str]) -> np.ndarray:
    """log(good/bad) of each line of tokens, before calibration; -inf of an empty one.

    From the hidden vector: fastText's own probabilities end at 1e-5 and do not tell the best texts
    apart.
    """
    vectors = np.stack([classifier.get_sentence_vector(line) for line in lines]).astype(np.float64)
    return np.where([not line for line in lines], -np.inf, vectors @ np.asarray(direction))


# Training


def train(
    good: list[str],
    bad: list[str],
    folder: Path | str,
    *,
    text_field: str = "text",
    size: int = 30_000,
) -> dict[str, Any]:
    """Train a classifier for each language of the good files. Returns the content of card.json.

    `bad` are files too; none: damaged copies of the good text. `size` is how many words and pairs
    of words a classifier keeps (fastText.zip, https://arxiv.org/abs/1612.03651). The same files
    give the same bytes: one thread, a fixed order. Raises ConfigError.
    """
    folder = Path(folder)
    rng = random.Random(0)
    # Once: what is read is what the card names.
    good_files, bad_files = (states(find_files(p) if p else []) for p in (good, bad))
    good_pieces = _read(good_files, text_field, rng)
    bad_pieces = _read(bad_files, text_field, rng)
    card: dict[str, Any] = {
        "good": _described(good_files),
        "bad": _described(bad_files) or DAMAGED,
        "languages": {},
    }
    # In a fixed order: all draw from one random generator.
    for lang in LANGUAGES:
        kept, others = good_pieces.get(lang), bad_pieces.get(lang)
        if kept is None:
            continue
        require(others is not None or not bad, f"{bad} hold no {lang} text, and {good} do")
        lines = _labelled(kept, others, lang, rng)
        card["languages"][lang] = _train_language(lines, folder / f"{lang}.ftz", size, kept.every)
    require(bool(card["languages"]), f"{good} hold no text")
    # Before the new card: where this is killed, the old one names what is missing.
    for lang in _described_languages(folder) - card["languages"].keys():
        (folder / f"{lang}.ftz").unlink(missing_ok=True)
    write_atomically(folder / "card.json", json.dumps(card, indent=1, ensure_ascii=False).encode())
    return card


def _require_own(folder: Path) -> None:
    """Raise ConfigError where the output has files of these names that no training made."""
    names = ("card.json", *(f"{lang}.ftz" for lang in LANGUAGES))
    begun = lambda: bool(_described_languages(folder))
    require_own([folder / name for name in names], lock_beside(folder), begun)


def _described_languages(folder: Path) -> set[str]:
    """Languages of the classifiers that an earlier training wrote, by its card."""
    with contextlib.suppress(ConfigError):
        card = require_keys(read_json(folder / "card.json"), {"languages": dict}, "it")
        return {lang for lang in LANGUAGES if lang in card["languages"]}
    return set()


def _labelled(
    good: "_Pieces", bad: "_Pieces | None", lang: str, rng: random.Random
) -> dict[str, list[str]]:
    """Lines of tokens with their labels, by part: train, fit (to calibrate), report."""
    lines: dict[str, list[str]] = {"train": [], "fit": [], "report": []}
    for piece, part in good.pieces:
        lines[part].append(f"__label__good {_tokens(piece)}")
        if bad is None:
            lines[part].append(f"__label__bad {_tokens(damage(piece, lang, rng))}")
    for piece, part in bad.pieces if bad is not None else ():
        lines[part].append(f"__label__bad {_tokens(piece)}")
    for part, found in lines.items():
        labels = {line.split(" ")[0] for line in found}
        require(
            len(labels) == 2,
            f"too little {lang} text: {len(found)} pieces to {part}, "
            f"all of {labels or 'no label'}; give more documents",
        )
    # fastText learns in the order of the lines, and later ones count for more.
    rng.shuffle(lines["train"])
    return lines


def _train_language(
    lines: dict[str, list[str]], path: Path, size: int, every: int
) -> dict[str, Any]:
    """Train, calibrate and judge one classifier. Returns its entry in card.json."""
    fasttext = _fasttext()
    direction = _fit(fasttext, lines["train"], path, size)
    # The file, not the classifier in memory: quantization has changed it.
    classifier = fasttext.load_model(str(path))
    slope, intercept = _calibrate(*_judged(classifier, direction, lines["fit"]))
    logits, labels = _judged(classifier, direction, lines["report"])
    return {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "direction": direction,
        "slope": slope,
        "intercept": intercept,
        "pieces": len(lines["train"]),
        "one_piece_in": every,
        "held_out": _report(slope * logits + intercept, labels),
    }


def _described(files: Mapping[str, State]) -> list[dict[str, Any]]:
    described = [
        {"file": Path(path).name, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
        for path in files
    ]
    require_unchanged(files)
    return described


class _Pieces:
    """Pieces of one language, each with its part: train, fit or report.

    Where they grow too large, every second one is dropped, and from then on every second new one.
    """

    def __init__(self) -> None:
        self.pieces: list[tuple[str, str]] = []
        self.every, self._seen, self._size = 1, 0, 0

    def add(self, piece: str, part: str) -> None:
        if self._seen % self.every == 0:
            self.pieces.append((piece, part))
            self._size += len(piece)
            if self._size > MAX_CHARACTERS:
                self.every *= 2
                self.pieces = self.pieces[::2]
                self._size = sum(len(kept) for kept, _ in self.pieces)
        self._seen += 1


def _read(files: Iterable[str], text_field: str, rng: random.Random) -> dict[str, _Pieces]:
    """Pieces of all documents by language. All of a document's pieces are in one part."""
    found: dict[str, _Pieces] = {}
    for text in read_texts(map(Slice, files), text_field):
        # By the document's hash: pieces of one document in two parts would leak, and a copy of a
        # document lands where the document is.
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
        part = "train" if digest % HELD_OUT else ("fit", "report")[digest // HELD_OUT % 2]
        pieces = found.setdefault(language(text), _Pieces())
        for piece in _cut(text, rng):
            pieces.add(piece, part)
    return found


def _cut(text: str, rng: random.Random) -> Iterator[str]:
    """Consecutive pieces of log-uniform lengths from SHORTEST to LONGEST characters.

    The last may be shorter; what has fewer than three tokens is left out.
    """
    start = 0
    while start < len(text):
        size = round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))))
        piece = text[start : start + size]
        start += size
        if len(_TOKEN.findall(piece)) >= 3:
            yield piece


def damage(text: str, lang: str, rng: random.Random) -> str:
    """A bad copy of a good text: words in another order, fragments joined, or letters exchanged."""
    pattern, space = (r"[\u3400-\u9fff]", "") if lang == "zh" else (r"[^\W\d_]+", " ")
    words = re.findall(pattern, text)
    kind = rng.randrange(5) if words else 4
    if kind <= 2:
        # Within windows: order that is wrong nearby is harder to see than order wrong all over.
        window = rng.choice([4, 8, 20, len(words) + 1])
        parts = [words[start : start + window] for start in range(0, len(words), window)]
        rest = iter([word for part in parts for word in rng.sample(part, len(part))])
        return re.sub(pattern, lambda _: next(rest), text)
    # Fragments of one to four words, as keyword lists and menus are.
    if kind == 3:
        starts = rng.choices(range(len(words)), k=max(1, len(words) // 3))
        cuts = [words[start : start + rng.randint(1, 4)] for start in starts]
        border = rng.choice(["\n", " | ", " ", ", " if lang == "en" else "、", " > "])
        return border.join(space.join(cut) for cut in cuts)
    # Letters exchanged: what a bad scan or a wrong encoding leaves.
    share = rng.uniform(0.08, 0.3)
    return "".join(rng.choice(text) if rng.random() < share else character for character in text)


def _fit(fasttext: Any, lines: list[str], path: Path, size: int) -> list[float]:
    """Train, prune to `size` words and pairs, quantize, and write.

    Returns the weights of good less those of bad.
    """
    # One thread and a fixed seed: the same bytes every time.
    settings = {"lr": 0.3, "dim": 8, "epoch": 5, "wordNgrams": 2, "minCount": 1, "minn": 0}
    settings |= {"maxn": 0, "thread": 1, "seed": 1, "verbose": 0}
    # With one thread fastText 0.9.2 initialises a tenth of its matrix and trains on whatever
    # memory holds in the rest. Two million rows of eight are above 32 MB, the most that malloc
    # serves from used memory: what it gives is then new, and zero.
    settings["bucket"] = 2_000_000
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "train.txt"
        text.write_text("\n".join(lines) + "\n", encoding="utf-8")
        classifier = fasttext.train_supervised(str(text), **settings)
        # Before quantization, which cannot be asked for it.
        output = dict(zip(classifier.get_labels(), classifier.get_output_matrix(), strict=True))
        classifier.quantize(str(text), qnorm=True, cutoff=size)
    write_atomically(path, _content(classifier))
    return (output["__label__good"] - output["__label__bad"]).astype(float).tolist()


def _content(classifier: Any) -> bytes:
    """The file of a fastText model.

    fastText writes to a name only, and takes no notice of what a full disk refuses; memory refuses
    nothing.
    """
    with os.fdopen(os.memfd_create("model"), "rb") as memory:
        classifier.save_model(f"/proc/self/fd/{memory.fileno()}")
        return memory.read()


def _judged(
    classifier: Any, direction: list[float], lines: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Raw logits and labels (1 good, 0 bad) of labelled lines."""
    split = (line.partition(" ") for line in lines)
    pairs = [(label, tokens) for label, _, tokens in split if tokens]
    logits = _logits(classifier, direction, [tokens for _, tokens in pairs])
    return logits, np.array([label == "__label__good" for label, _ in pairs], float)


def _calibrate(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of the logistic regression of labels on logits (Platt scaling).

    By Newton's method, with a step of at most 1 and a slight penalty, so that labels which the
    logits separate completely give finite values.
    """
    inputs = np.stack([logits, np.ones_like(logits)], axis=1)
    weights = np.array([1.0, 0.0])
    for _ in range(50):
        p = 1 / (1 + np.exp(-inputs @ weights))
        hessian = inputs.T @ (inputs * (p * (1 - p) + 1e-9)[:, None]) + 1e-6 * np.eye(2)
        step = np.linalg.solve(hessian, inputs.T @ (labels - p) - 1e-6 * weights)
        weights += step * min(1.0, 2.0 / float(np.abs(step).max() + 1e-12))
        if np.abs(step).max() < 1e-8:
            break
    return float(weights[0]), float(weights[1])


def _report(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Accuracy, area under the ROC curve, and calibration by tenths of the prediction."""
    p = 1 / (1 + np.exp(-logits))
    # The area is the share of pairs, one good and one bad, that are in the right order.
    ranks = np.argsort(np.argsort(logits, kind="stable"), kind="stable")
    good, bad = int(labels.sum()), int((1 - labels).sum())
    area = (ranks[labels == 1].sum() - good * (good - 1) / 2) / (good * bad)
    # A prediction of exactly 1 belongs to the last tenth.
    tenth = np.minimum((10 * p).astype(int), 9)
    bins = [
        {
            "texts": int((tenth == b).sum()),
            "predicted": float(p[tenth == b].mean()),
            "good": float(labels[tenth == b].mean()),
        }
        for b in range(10)
        if (tenth == b).any()
    ]
    # Expected calibration error: the gap of each tenth, weighted by its texts.
    error = sum(b["texts"] * abs(b["predicted"] - b["good"]) for b in bins) / len(p)
    return {
        "texts": len(p),
        "accuracy": float(((p > 0.5) == (labels == 1)).mean()),
        "auc": float(area),
        "calibration_error": error,
        "calibration": bins,
    }


# The command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.data.quality",
        description="Train quality classifiers, and score text. "
        "Example: train --good 'books/*.jsonl' --bad 'crawl/*.jsonl.gz' --output DIR",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    about = "train a classifier a language; shows accuracy and calibration on held-out documents"
    training = commands.add_parser("train", help=about)
    kinds = "JSONL or .txt, also .gz, .zst"
    add = training.add_argument
    add("--good", nargs="+", required=True, metavar="GLOB", help=f"text to be like: {kinds}")
    unlike = "text to be unlike (default: damaged copies of the good)"
    add("--bad", nargs="+", default=[], metavar="GLOB", help=unlike)
    add("--output", required=True, metavar="DIR", help="name it as the pipeline's quality model")
    kept = "words and pairs that a classifier keeps (default: 30000, 0.5 MB)"
    add("--size", type=at_least(1), default=30_000, help=kept)
    scoring = commands.add_parser("score", help="scores of files: how they spread, and the worst")
    add = scoring.add_argument
    add("--input", nargs="+", required=True, metavar="GLOB", help=kinds)
    given = "what train wrote (default: the package's)"
    add("--model", default=str(MODEL), metavar="DIR", help=given)
    add("--lines", action="store_true", help="score every line by itself, not whole documents")
    worst = "texts of lowest score to print of each file (default: 3)"
    add("--worst", type=at_least(0), default=3, help=worst)
    for command in (training, scoring):
        field = "field that holds the text; outer.inner: inside another (default: text)"
        command.add_argument("--text_field", default="text", help=field)
        command.add_argument("--json", type=writable_file, metavar="FILE", help="save the results")
    return parser


def _show_card(card: dict[str, Any], display: Display) -> None:
    rows = []
    for lang, entry in card["languages"].items():
        h = entry["held_out"]
        values = [f"{h[name]:.4f}" for name in ("accuracy", "auc", "calibration_error")]
        rows.append([lang, f"{h['texts']:,}", *values, f"{entry['bytes']:,} bytes"])
    measures = ["texts", "accuracy", "AUC", "calibration error", "file"]
    display.table(None, ["held out", *measures], rows)
    names = ("texts", "predicted", "good")
    rows = []
    for b in range(10):
        cells: list[str] = []
        for entry in card["languages"].values():
            bins = entry["held_out"]["calibration"]
            found = next((c for c in bins if min(int(10 * c["predicted"]), 9) == b), None)
            if found is None:
                cells += ["-"] * 3
            else:
                shares = [f"{found[name]:.3f}" for name in ("predicted", "good")]
                cells += [f"{found['texts']:,}", *shares]
        rows.append([f"{b / 10:.1f} - {(b + 1) / 10:.1f}", *cells])
    heads = (f"{lang} {name}" for lang in card["languages"] for name in names)
    display.table(None, ["score", *heads], rows)


def _score_files(options: argparse.Namespace, display: Display) -> dict[str, Any]:
    quantiles = (0.01, 0.1, 0.5, 0.9, 0.99)
    rows: list[list[str]] = []
    results: dict[str, Any] = {}
    worst: dict[str, list[tuple[float, str]]] = {}
    say_unread(options.input)
    for path in find_files(options.input):
        scores, lowest = [], []
        for batch in _batches(_texts(path, options.text_field, options.lines)):
            found = score(batch, options.model)
            scores.append(found)
            lowest = sorted([*lowest, *zip(found.tolist(), batch, strict=True)])[: options.worst]
        # In the table too: a file that is missing there would look like a file that is fine.
        if not scores:
            rows.append([path, "0", *("-" for _ in ("mean", *quantiles))])
            results[path] = {"texts": 0}
            continue
        values = np.concatenate(scores)
        mean = float(values.mean())
        spread = np.quantile(values, quantiles).tolist()
        rows.append([path, f"{len(values):,}", *(f"{value:.3f}" for value in (mean, *spread))])
        named = dict(zip(map(str, quantiles), spread, strict=True))
        results[path] = {"texts": len(values), "mean": mean, "quantiles": named}
        worst[path] = lowest
    display.table(None, ["file", "texts", "mean", *(f"{q:.0%}" for q in quantiles)], rows)
    for path, lowest in worst.items():
        for value, text in lowest:
            display.say(f"{path} {value:.3f} {' '.join(text.split())[:160]!r}")
    return results


def _texts(file: str, text_field: str, lines: bool) -> Iterator[str]:
    for document in read_texts([Slice(file)], text_field):
        if not lines:
            yield document
        else:
            yield from (line for line in document.split("\n") if line.strip())


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        # A batch is scored at once; a million characters are enough to keep the cost of a call low.
        if size > 1 << 20:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _refuse_inputs(options: argparse.Namespace) -> None:
    """Raise ConfigError where a result would replace a text or a classifier."""
    read = ("good", "bad") if options.command == "train" else ("input",)
    texts = {f"--{name}": find_files(getattr(options, name)) for name in read}
    folder = Path(options.output if options.command == "train" else options.model)
    model = [folder / "card.json", *(folder / f"{lang}.ftz" for lang in LANGUAGES)]
    if options.command == "train":
        refuse_inputs({"--output": model, "--json": [options.json]}, texts)
    else:
        refuse_inputs({"--json": [options.json]}, texts | {"--model": model})


def main(argv: list[str]) -> int:
    """The command. Returns its exit code."""
    options = _parser().parse_args(argv)
    display = Display()
    _refuse_inputs(options)
    if options.command == "train":
        say_unread([*options.good, *options.bad])
        settings = {"text_field": options.text_field, "size": options.size}
        _require_own(Path(options.output))
        with owned_output(Path(options.output), beside=True):
            results = train(options.good, options.bad, options.output, **settings)
        _show_card(results, display)
    else:
        results = _score_files(options, display)
    if options.json:
        content = json.dumps(results, indent=1, ensure_ascii=False)
        write_atomically(Path(options.json), content.encode())
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]), result_is_shown=True)
