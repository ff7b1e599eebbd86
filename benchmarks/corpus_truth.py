"""Corpora whose truth is known: clean text with planted duplicates, sentences and garbage.

    python benchmarks/corpus_truth.py --output DIR [--input 'GLOB' ...] [--megabytes 25] [--seed 0]
    python benchmarks/corpus_score.py --corpus DIR --result PIPELINE_OUTPUT [--json FILE]

Writes DIR/corpus-*.jsonl (`id, text, source, lang`) and DIR/truth.jsonl: a line a document (`id,
kind, lang, of`) and a line a planted sentence (`kind, lang, sentences, documents`). The same
arguments give the same bytes. Where more text is asked for than the clean corpus has, further
rounds re-word it: every word goes to another of the same length and about the same frequency, so
that the statistics stay and no duplicate arises. Memory does not grow with the size.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script, run from anywhere

import argparse
import collections
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import garbage

from baichuan_jax.documents.reader import Part, find_files, read_documents

SAMPLE = Path(__file__).parents[1] / "baichuan_jax" / "data" / "sample"
LANGUAGES = ("zh", "en")
WINDOW = 1000  # clean documents among which duplicates and sentences are planted at once
SHARD_BYTES = 8 << 20
DUPLICATES = (
    0.25  # share of the clean documents that get a duplicate; as much of the rest is left alone
)
SENTENCES = 0.2  # share of them that gives a sentence away
GARBAGE = 0.15  # garbage documents for each clean one
BOILERPLATE_COPIES = 20
HAN = r"\u3400-\u4dbf\u4e00-\u9fff"
WORD = {"zh": re.compile(f"[{HAN}]"), "en": re.compile(r"[A-Za-z]+(?:'[a-z]+)?")}
# A sentence that any splitter cuts alike: no quotes, no dots inside, one closing mark, no
# abbreviation before it or at its end.
SENTENCE = {
    "zh": re.compile(f"(?<=[。！？\n])[{HAN}，、；：]{{15,80}}[。！？](?=[{HAN}\n])"),
    "en": re.compile(r"(?<=[a-z]{4}[.!?] )[A-Z][A-Za-z,;:' -]{50,200}[a-z]{4}[.!?](?= [A-Z]|\n)"),
}


class Document(NamedTuple):
    """A text with what is known of it: its kind, and the id of the document that it is a copy of."""

    text: str
    lang: str
    kind: str = "clean"
    of: str | None = None


def language(text: str) -> str:
    """ "zh" where most letters are Han, else "en"."""
    return (
        "zh"
        if 2 * len(WORD["zh"].findall(text)) > sum(character.isalpha() for character in text)
        else "en"
    )


# clean text


def pieces(documents: Iterable[str], rng: random.Random) -> Iterator[str]:
    """Documents of 800 to 6,000 characters, cut at line ends. A line of ten letters or more comes once; the rest are left out."""
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
    """A function that exchanges words for others of their length and about their frequency; the commonest stay."""
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
    """Clean documents without end, Chinese and English by turns in bytes; from the second round on re-worded."""
    rng = random.Random(f"{seed} pieces")
    base: dict[str, list[str]] = {lang: [] for lang in LANGUAGES}
    files = find_files(patterns)
    for piece in pieces(
        (text for file in files for text in read_documents(Part(file), "text")), rng
    ):
        base[language(piece)].append(piece)
    for lang, texts in base.items():
        if not texts:
            raise SystemExit(f"{patterns} hold no {lang} document of 800 characters")
        rng.shuffle(texts)

    def stream(lang: str) -> Iterator[Document]:
        for number in itertools.count():
            reword = (
                rewording(base[lang], lang, 1000 * seed + number) if number else lambda text: text
            )
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
    """Change this share of the words (characters, in Chinese): two of four are replaced, one is dropped, one doubled by another."""

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
    wide = str.maketrans(",.!?;:()", "，。！？；：（）")
    text = document.text
    if document.lang == "zh":
        text = re.sub("[，；：]", lambda match: rng.choice([match[0], ",", " ", "，"]), text)
        text = (
            text.translate({new: old for old, new in wide.items()}) if rng.random() < 0.5 else text
        )
        return re.sub("\n+", lambda _: rng.choice(["\n", "\n\n", "\u3000"]), text)
    text = re.sub("[,;:]", lambda match: rng.choice([match[0], "", ";", " -"]), text)
    text = re.sub("\n+", lambda _: rng.choice(["\n", "\n\n", "  "]), text)
    return (
        text.upper()
        if rng.random() < 0.2
        else re.sub(r"\. ", lambda _: rng.choice([". ", ".  ", "! "]), text)
    )


def truncated(keep: float) -> Callable[[Document, Document, random.Random], str]:
    """The first part of a document."""
    return lambda document, other, rng: document.text[: round(keep * len(document.text))]


def boilerplated(document: Document, other: Document, rng: random.Random) -> str:
    """A web page's head and foot around the text."""
    lines = garbage.navigation(other.text, document.lang, rng).split("\n")
    size = max(2, rng.randint(3, 6))
    return "\n".join([*lines[:size], document.text, *lines[-size:]])


def pasted(document: Document, other: Document, rng: random.Random) -> str:
    """A section of another document, a fifth as long, stands in the middle."""
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
    """The sentence with one letter of ten replaced; never the first, whose capital tells a splitter where an English one begins."""
    letters = [i for i, character in enumerate(sentence) if i and character.isalpha()]
    changed = list(sentence)
    for place in rng.sample(letters, max(1, round(len(letters) / 10))):
        changed[place] = rng.choice(
            [c for c in rng.choices(pool, k=20) if c != sentence[place]] or [pool[0]]
        )
    return "".join(changed)


def insert(document: Document, sentence: str, rng: random.Random) -> Document | None:
    """The document with a sentence between two others; None where it has no such place."""
    places = [match.end() for match in SENTENCE[document.lang].finditer(document.text)]
    if not places:
        return None
    place = rng.choice(places)
    joined = sentence if document.lang == "zh" else " " + sentence
    return document._replace(
        text=document.text[:place] + joined + document.text[place:], kind="host"
    )


def plant_sentences(
    window: dict[str, Document], free: list[str], rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Put sentences of some free documents into others; documents in `window` change. Yields a record a sentence."""
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
    """Clean documents with their copies, sentences and garbage, in random order; and the records of the sentences."""
    names = rng.sample(list(window), len(window))
    originals, rest = (
        names[: round(DUPLICATES * len(names))],
        names[round(DUPLICATES * len(names)) :],
    )
    added: dict[str, Document] = {}
    kinds = itertools.cycle(rng.sample(list(COPIES), len(COPIES)))
    for original in originals:
        kind = next(kinds)
        document = window[original]
        for _ in range(rng.choice([1, 1, 2, 4]) if kind == "exact" else 1):
            other = window[rng.choice([n for n in rest[:200] if window[n].lang == document.lang])]
            added[name()] = Document(
                COPIES[kind](document, other, rng), document.lang, kind, original
            )
    sentences = list(
        plant_sentences(window, rest[len(rest) // 3 :], rng)
    )  # the first third stays as it was
    for kind, lang in itertools.islice(
        itertools.cycle(itertools.product(garbage.KINDS, LANGUAGES)), round(GARBAGE * len(window))
    ):
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
                record = {
                    "id": key,
                    "kind": document.kind,
                    "lang": document.lang,
                    "of": document.of,
                }
                truth.write(json.dumps(record) + "\n")
                counts[document.kind] += 1
                written += len(document.text.encode())
            for record in sentences:
                truth.write(json.dumps(record, ensure_ascii=False) + "\n")
                counts[record["kind"]] += 1
    for shard in shards:
        shard.close()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        nargs="+",
        default=[f"{SAMPLE}/train-*.jsonl.gz"],
        metavar="GLOB",
        help="clean text (default: bundled)",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--megabytes", type=float, default=25, help="of text, about (default: 25)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = make(options.input, options.output, round(1e6 * options.megabytes), options.seed)
    print("\n".join(f"{kind:28}{count:8,}" for kind, count in sorted(counts.items())))


if __name__ == "__main__":
    main()
