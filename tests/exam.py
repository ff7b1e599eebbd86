"""Small test sets in the layouts of MMLU, C-Eval, AGIEval and GAOKAO-Bench.

Their questions are sentences of the bundled text: which word is missing?
"""

import csv
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

SAMPLE = Path(__file__).parents[1] / "baichuan_jax" / "data" / "sample"
LETTERS = "ABCD"


def questions(language: str, seed: str) -> Iterator[tuple[str, list[str], str]]:
    """(question, four options, letter), without end: sentences with a word left out."""
    draw = random.Random(seed)
    with gzip.open(SAMPLE / f"validation-{language}.jsonl.gz", "rt", encoding="utf-8") as file:
        text = " ".join(json.loads(line)["text"].replace("\n", " ") for line in file)
    sentences = [
        part.strip()
        for part in re.split(r"(?<=[.!?。！？])", text)
        if 8 <= len(part.strip()) <= 400
    ]
    pattern = r"[A-Za-z]{4,}" if language == "en" else r"[\u4e00-\u9fff]{2}"
    while True:
        start = draw.randrange(len(sentences) - 4)
        passage = sentences[start : start + draw.randint(1, 4)]
        words = re.findall(pattern, " ".join(passage))
        if len(set(words)) < 4:
            continue
        options = draw.sample(sorted(set(words)), 4)
        letter = draw.choice(LETTERS)
        joined = (" " if language == "en" else "").join(passage)
        yield joined.replace(options[LETTERS.index(letter)], "____", 1), options, letter


def write_csv(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def make_mmlu(folder: Path, subjects: list[str], count: int) -> Path:
    """dev/ with five examples and test/ with `count` questions of each subject."""
    for subject in subjects:
        made = questions("en", subject)
        for split, size in (("dev", 5), ("test", count)):
            rows = [
                [question, *options, letter]
                for question, options, letter in (next(made) for _ in range(size))
            ]
            write_csv(folder / split / f"{subject}_{split}.csv", rows)
    return folder


def make_ceval(folder: Path, subjects: list[str], count: int) -> Path:
    """dev/ and val/ with answers, test/ without."""
    for subject in subjects:
        made = questions("zh", subject)
        for split, size in (("dev", 5), ("val", count), ("test", count)):
            header = [
                "id",
                "question",
                *LETTERS,
                *(["answer"] if split != "test" else []),
                *(["explanation"] if split == "dev" else []),
            ]
            rows = [
                [str(number), question, *options, letter, "因为如此。\n所以"][: len(header)]
                for number, (question, options, letter) in enumerate(
                    next(made) for _ in range(size)
                )
            ]
            write_csv(folder / split / f"{subject}_{split}.csv", [header, *rows])
    return folder


def make_agieval(folder: Path, count: int) -> Path:
    """One subject of each language; every fourth row has five options or two right answers."""
    folder.mkdir(parents=True, exist_ok=True)
    for subject, language in (("logiqa-en", "en"), ("jec-qa-kd", "zh")):
        made, lines = questions(language, subject), []
        for number in range(count):
            question, options, letter = next(made)
            shown = [f"({mark}){option}" for mark, option in zip(LETTERS, options, strict=True)]
            row = {"passage": None, "question": question, "options": shown, "label": letter}
            if language == "zh":
                row["label"] = (
                    [letter, "ABCD"[number % 4]] if number % 4 == 3 and letter != "D" else [letter]
                )
            elif number % 4 == 3:
                row["options"] = [*shown, "(E)none"]
            lines.append(json.dumps(row, ensure_ascii=False))
        (folder / f"{subject}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def make_gaokao(folder: Path, count: int) -> Path:
    """One subject; every fourth question has two right answers."""
    folder.mkdir(parents=True, exist_ok=True)
    made, rows = questions("zh", "gaokao"), []
    for number in range(count):
        question, options, letter = next(made)
        listed = "  ".join(
            f"{mark}．{option}" for mark, option in zip(LETTERS, options, strict=True)
        )
        answer = [letter] if number % 4 != 3 else ["AC"]
        rows.append(
            {
                "year": "2010",
                "question": f"{number + 1}．{question}（　　）\n{listed}\n",
                "answer": answer,
                "index": number,
            }
        )
    content = {"keywords": "2010-2022_History_MCQs", "example": rows}
    (folder / "2010-2022_History_MCQs.json").write_text(
        json.dumps(content, ensure_ascii=False), encoding="utf-8"
    )
    return folder
