"""Make a corpus whose truth is known: clean text with planted duplicates, sentences and garbage.

    python benchmarks/corpus_truth.py --output DIR [--input 'GLOB' ...] [--megabytes 25] [--seed 0]
    python benchmarks/corpus_score.py --corpus DIR --result PIPELINE_OUTPUT [--json FILE]

Writes DIR/corpus-*.jsonl (`id, text, source, lang`) and DIR/truth.jsonl: one line for each document
(`id, kind, lang, of`) and one for each planted sentence (`kind, lang, sentences, documents`). The
same arguments give the same bytes. If the clean corpus is smaller than the size asked for, further
rounds re-word it: every word becomes another of the same length and about the same frequency. So
the statistics stay, and no duplicate arises. Memory does not grow with the size.
"""

import sys
from pathlib import Path

# A script finds the package from any folder.
sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import collections
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import garbage

from baichuan_jax.documents.files import Slice, find_files
from baichuan_jax.documents.reader import read_texts

SAMPLE = Path(__file__).parents[1] / "baichuan_jax" / "data" / "sample"
LANGUAGES = ("zh", "en")
# Clean documents among which duplicates and sentences are planted at once.
WINDOW = 1000
SHARD_BYTES = 8 << 20
# Share of the clean documents that get a duplicate.
DUPLICATES = 0.25
# Share of the others whose sentences are copied.
SENTENCES = 0.2
# Garbage documents for each clean one.
GARBAGE = 0.15
BOILERPLATE_COPIES = 20
HAN = r"\u3400-\u4dbf\u4e00-\u9fff"
WORD = {"zh": re.compile(f"[{HAN}]"), "en": re.compile(r"[A-Za-z]+(?:'[a-z]+)?")}
# A sentence that every splitter cuts alike: no quotes, no dots inside, one closing mark, no
# abbreviation before it or at its end.
SENTENCE = {
    "zh": re.compile(f"(?<=[。！？\n])[{HAN}，、；：]{{15,80}}[。！？](?=[{HAN}\n])"),
    "en": re.compile(r"(?<=[a-z]{4}[.!?] )[A-Z][A-Za-z,;:' -]{50,200}[a-z]{4}[.!?](?= [A-Z]|\n)"),
}


class Document(NamedTuple):
    """A text, its kind, and the id of the document of which it is a copy."""

    text: str
    lang: str
    kind: str = "clean"
    of: str | None = None


def language(text: str) -> str:
    """The language by its letters: "zh" where most are Han, else "en"."""
    letters = sum(character.isalpha() for character in text)
    return "zh" if 2 * len(WORD["zh"].findall(text)) > letters else "en"


# clean text


def pieces(documents: Iterable[str], rng: random.Random) -> Iterator[str]:
    """Documents of 800 to 6,000 characters, cut at line ends.

    A line of ten letters or more appears once, later copies are dropped: the clean text must not
    hold duplicates of its own.
    """
    seen: set[int] = set()
    for document in documents:
        lines, size, target = [], 0, rng.randint(800, 6000)
        for line in [*document.split("\n"), None]:
            if line is None or size >= target:
                if size >= 800:
                    yield "\n".join(lines).strip()
                lines, size, target = [], 0, rng.randint(800, 6000)
            if line is None:
                continue
            key = hash(re.sub(r"\W+", "", line))
            if len(line) >= 10 and key in seen:
                continue
            seen.add(key)
            lines.append(line)
            size += len(line) + 1


def rewording(texts: list[str], lang: str, seed: int) -> Callable[[str], str]:
    """A function that exchanges words for others of their length and about their frequency.

    The commonest words stay: they hold the grammar.
    """
    counts = collections.Counter(
        word.lower() for text in texts for word in WORD[lang].findall(text)
    )
    ranked = [word for word, _ in counts.most_common()][20 if lang == "zh" else 100 :]
    rng = random.Random(f"{seed} {lang}")
    exchange: dict[str, str] = {}
    by_length = collections.defaultdict(list)
    for word in ranked:
        by_length[len(word)].append(word)
    for group in by_length.values():
        for start in range(0, len(group), 50):
            bucket = group[start : start + 50]
            exchange.update(zip(bucket, rng.sample(bucket, len(bucket)), strict=True))

    def reword(match: re.Match) -> str:
        word = match[0]
        other = exchange.get(word.lower(), word)
        return other.capitalize() if word[0].isupper() else other

    return lambda text: WORD[lang].sub(reword, text)


def clean_documents(patterns: list[str], seed: int) -> Iterator[Document]:
    """Clean documents without end, as many bytes of Chinese as of English.

    From the second round on they are re-worded.
    """
    rng = random.Random(f"{seed} pieces")
    base: dict[str, list[str]] = {lang: [] for lang in LANGUAGES}
    texts = read_texts(map(Slice, find_files(patterns)), "text")
    for piece in pieces(texts, rng):
        base[language(piece)].append(piece)
    for lang, texts in base.items():
        if not texts:
            raise SystemExit(f"{patterns} hold no {lang} document of 800 characters")
        rng.shuffle(texts)

    def stream(lang: str) -> Iterator[Document]:
        for number in itertools.count():
            reword = lambda text: text
            if number:
                reword = rewording(base[lang], lang, 1000 * seed + number)
            for text in base[lang]:
                yield Document(reword(text), lang)

    streams = {lang: stream(lang) for lang in LANGUAGES}
    written = dict.fromkeys(LANGUAGES, 0)
    while True:
        document = next(streams[min(LANGUAGES, key=lambda lang: written[lang])])
        written[document.lang] += len(document.text.encode())
        yield document


# duplicates


def edited(share: float) -> Callable[[Document, Document, random.Random], str]:
    """Change this share of the words (in Chinese: characters).

    Of four, two are replaced, one is dropped, and one is followed by a new word.
    """

    def edit(document: Document, other: Document, rng: random.Random) -> str:
        pool = WORD[document.lang].findall(other.text)
        places = list(WORD[document.lang].finditer(document.text))
        chosen = {match.start(): match for match in rng.sample(places, round(share * len(places)))}
        out, end = [], 0
        space = "" if document.lang == "zh" else " "
        for start in sorted(chosen):
            match = chosen[start]
            new = {0: "", 1: match[0] + space + rng.choice(pool)}.get(
                rng.randrange(4), rng.choice(pool)
            )
            out += [document.text[end:start], new]
            end = match.end()
        return "".join([*out, document.text[end:]])

    return edit


def punctuated(document: Document, other: Document, rng: random.Random) -> str:
    """Other punctuation, line ends, spaces, and (English) capitals; the words stay."""
    narrow = str.maketrans("，。！？；：（）", ",.!?;:()")
    text = document.text
    if document.lang == "zh":
        text = re.sub("[，；：]", lambda match: rng.choice([match[0], ",", " ", "，"]), text)
        text = text.translate(narrow) if rng.random() < 0.5 else text
        return re.sub("\n+", lambda _: rng.choice(["\n", "\n\n", "\u3000"]), text)
    text = re.sub("[,;:]", lambda match: rng.choice([match[0], "", ";", " -"]), text)
    text = re.sub("\n+", lambda _: rng.choice(["\n", "\n\n", "  "]), text)
    if rng.random() < 0.2:
        return text.upper()
    return re.sub(r"\. ", lambda _: rng.choice([". ", ".  ", "! "]), text)


def truncated(keep: float) -> Callable[[Document, Document, random.Random], str]:
    """The first part of a document."""
    return lambda document, other, rng: document.text[: round(keep * len(document.text))]


def boilerplated(document: Document, other: Document, rng: random.Random) -> str:
    """The text between the head and the foot of a web page."""
    lines = garbage.navigation(other.text, document.lang, rng).split("\n")
    size = max(2, rng.randint(3, 6))
    return "\n".join([*lines[:size], document.text, *lines[-size:]])


def pasted(document: Document, other: Document, rng: random.Random) -> str:
    """The text with a section of another document in its middle, a fifth as long as the text."""
    size = len(document.text) // 5
    start = rng.randrange(max(1, len(other.text) - size))
    middle = document.text.find("\n", len(document.text) // 3) + 1
    return document.text[:middle] + other.text[start : start + size] + "\n" + document.text[middle:]


COPIES: dict[str, Callable[[Document, Document, random.Random], str]] = {
    "exact": lambda document, other, rng: document.text,
    "punctuation": punctuated,
    **{f"edit_{percent:02d}": edited(percent / 100) for percent in (1, 2, 3, 5, 10, 20)},
    **{f"truncate_{percent}": truncated(1 - percent / 100) for percent in (10, 30, 50)},
    "boilerplate": boilerplated,
    "pasted": pasted,
}


# sentences


def near(sentence: str, rng: random.Random, pool: str) -> str:
    """The sentence with one letter of ten replaced.

    The first letter stays: a splitter finds the beginning of an English sentence by its capital.
    """
    letters = [i for i, character in enumerate(sentence) if i and character.isalpha()]
    changed = list(sentence)
    for place in rng.sample(letters, max(1, round(len(letters) / 10))):
        others = [c for c in rng.choices(pool, k=20) if c != sentence[place]]
        changed[place] = rng.choice(others or [pool[0]])
    return "".join(changed)


def insert(document: Document, sentence: str, rng: random.Random) -> Document | None:
    """The document with a sentence between two of its own; None where it has fewer."""
    places = [match.end() for match in SENTENCE[document.lang].finditer(document.text)]
    if not places:
        return None
    place = rng.choice(places)
    joined = sentence if document.lang == "zh" else " " + sentence
    text = document.text[:place] + joined + document.text[place:]
    return document._replace(text=text, kind="host")


def plant_sentences(
    window: dict[str, Document], free: list[str], rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Copy sentences of some free documents into others.

    Replaces documents in `window`, and yields one record for each sentence.
    """
    seen: set[str] = set()
    givers = free[: round(SENTENCES * len(free))]
    hosts = {
        lang: [name for name in free[len(givers) :] if window[name].lang == lang]
        for lang in LANGUAGES
    }
    boilerplate = dict.fromkeys(LANGUAGES, 0)
    for number, giver in enumerate(givers):
        lang = window[giver].lang
        found = [s for s in SENTENCE[lang].findall(window[giver].text) if s not in seen]
        if not found:
            continue
        sentence = rng.choice(found)
        seen.add(sentence)
        kind = ("sentence_exact", "sentence_near")[number % 2]
        copies = rng.choice([1, 1, 2]) if kind == "sentence_exact" else 1
        if boilerplate[lang] < 2 and len(hosts[lang]) > 2 * BOILERPLATE_COPIES:
            kind, copies = "sentence_boilerplate", BOILERPLATE_COPIES
            boilerplate[lang] += 1
        pool = "".join(WORD[lang].findall(window[giver].text))
        sentences, documents = [sentence], [giver]
        for _ in range(min(copies, len(hosts[lang]))):
            host = hosts[lang].pop()
            copy = near(sentence, rng, pool) if kind == "sentence_near" else sentence
            if changed := insert(window[host], copy, rng):
                window[host] = changed
                sentences.append(copy)
                documents.append(host)
        if len(documents) > 1:
            window[giver] = window[giver]._replace(kind="giver")
            yield {"kind": kind, "lang": lang, "sentences": sentences, "documents": documents}


# the corpus


def plant(
    window: dict[str, Document], name: Callable[[], str], rng: random.Random
) -> tuple[dict[str, Document], list[dict]]:
    """Add copies, sentences and garbage to clean documents.

    Returns all documents in random order, and the records of the planted sentences.
    """
    names = rng.sample(list(window), len(window))
    count = round(DUPLICATES * len(names))
    originals, rest = names[:count], names[count:]
    added: dict[str, Document] = {}
    kinds = itertools.cycle(rng.sample(list(COPIES), len(COPIES)))
    for original in originals:
        kind = next(kinds)
        document = window[original]
        for _ in range(rng.choice([1, 1, 2, 4]) if kind == "exact" else 1):
            other = window[rng.choice([n for n in rest[:200] if window[n].lang == document.lang])]
            copy = COPIES[kind](document, other, rng)
            added[name()] = Document(copy, document.lang, kind, original)
    # The first third of the others stays clean: what a pipeline removes of it is a wrong removal.
    sentences = list(plant_sentences(window, rest[len(rest) // 3 :], rng))
    kinds_of_garbage = itertools.cycle(itertools.product(garbage.KINDS, LANGUAGES))
    for kind, lang in itertools.islice(kinds_of_garbage, round(GARBAGE * len(window))):
        text = window[rng.choice([n for n in names if window[n].lang == lang])].text
        added[name()] = Document(garbage.KINDS[kind](text, lang, rng), lang, f"garbage_{kind}")
    window = {**window, **added}
    return {key: window[key] for key in rng.sample(list(window), len(window))}, sentences


def make(patterns: list[str], output: Path, size: int, seed: int) -> collections.Counter:
    """Write a corpus of about `size` bytes of text. Returns documents by kind."""
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("corpus-*.jsonl"):
        old.unlink()
    rng = random.Random(seed)
    numbers = (f"{rng.getrandbits(48):012x}" for _ in itertools.count())
    stream = clean_documents(patterns, seed)
    shards = [
        (output / f"corpus-{index:05d}.jsonl").open("w", encoding="utf-8")
        for index in range(max(1, round(size / SHARD_BYTES)))
    ]
    counts: collections.Counter = collections.Counter()
    written = 0
    with (output / "truth.jsonl").open("w", encoding="utf-8") as truth:
        while written < size:
            clean: dict[str, Document] = {}
            left = (size - written) / (1 + DUPLICATES + GARBAGE / 2)
            while left > 0 and len(clean) < WINDOW:
                clean[next(numbers)] = document = next(stream)
                left -= len(document.text.encode())
            if len(clean) < 8:
                break
            window, sentences = plant(clean, lambda: next(numbers), rng)
            for key, document in window.items():
                line = {"id": key, "text": document.text, "source": "truth", "lang": document.lang}
                rng.choice(shards).write(json.dumps(line, ensure_ascii=False) + "\n")
                fields = {"kind": document.kind, "lang": document.lang, "of": document.of}
                truth.write(json.dumps({"id": key, **fields}) + "\n")
                counts[document.kind] += 1
                written += len(document.text.encode())
            for record in sentences:
                truth.write(json.dumps(record, ensure_ascii=False) + "\n")
                counts[record["kind"]] += 1
    for shard in shards:
        shard.close()
    return counts


def main() -> None:
    """Write a corpus and print how many documents it has of each kind."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        nargs="+",
        default=[f"{SAMPLE}/train-*.jsonl.gz"],
        metavar="GLOB",
        help="clean text (default: the bundled sample)",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--megabytes", type=float, default=25, help="of text, about (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: 0)")
    options = parser.parse_args()
    counts = make(options.input, options.output, round(1e6 * options.megabytes), options.seed)
    print("\n".join(f"{kind:28}{count:8,}" for kind, count in sorted(counts.items())))


if __name__ == "__main__":
    main()
