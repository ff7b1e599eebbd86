"""Quality: repeatable training, calibrated scores, a shipped model that knows scrambled text."""

import gzip
import hashlib
import json
import math
import random
import re
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from launches import SAMPLE

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.data import quality

pytest.importorskip("fasttext")


def documents(name, count):
    with gzip.open(SAMPLE / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(next(file))["text"] for _ in range(count)]


def write(path, texts):
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts),
        encoding="utf-8",
    )
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    good = write(folder / "good.jsonl", documents("train-en", 60))
    return folder / "model", good, quality.train([good], [], folder / "model", size=5000)


def scrambled(text, rng):
    words = re.findall(r"[\u4e00-\u9fff]|[A-Za-z']+", text)
    rng.shuffle(words)
    rest = iter(words)
    return re.sub(r"[\u4e00-\u9fff]|[A-Za-z']+", lambda _: next(rest), text)


def test_the_shipped_model_knows_unseen_text_from_the_same_text_scrambled():
    rng = random.Random(5)
    for name, count in (("validation-en", 11), ("validation-zh", 36)):
        texts = [
            text[start : start + 1000]
            for text in documents(name, count)
            for start in range(0, len(text) - 500, 1000)
        ]
        good, bad = quality.score(texts), quality.score([scrambled(text, rng) for text in texts])
        assert good.dtype == np.float32
        assert np.mean(good > 0.5) > 0.95, name
        assert np.mean(bad < 0.25) > 0.95, (
            name
        )  # verse is the harder: hardly any two characters of it recur
    assert sum(path.stat().st_size for path in quality.MODEL.glob("*.ftz")) < 1_000_000


def test_a_score_depends_on_its_text_alone():
    texts = [
        *documents("validation-en", 3),
        *documents("validation-zh", 3),
        "",
        "=== 12 ===",
        "春眠不覺曉",
        "He said so.",
    ]
    together = quality.score(texts)
    assert together.tolist() == [quality.score([text]).item() for text in texts]
    assert together[6:8].tolist() == [0.0, 0.0]
    assert ((together[:6] > 0) & (together[:6] < 1)).all()
    assert quality.score([]).shape == (0,)
    assert quality.score(["It was a\n\ntruth ."]) == quality.score(
        ["it WAS a TRUTH. 17"]
    )  # layout, case and digits aside


def test_a_list_is_not_judged_by_the_order_of_its_words():
    """Names and numbers, which the classifier alone scores low; with function words it is text."""
    names = (
        "Pinnacle PCTV; Hauppauge WinTV-HVR; Leadtek TV; Terratec Cinergy; Flyvideo; MSI; Zoran; "
        "Philips tuner cards"
    )
    text = quality._tokens(names)
    classifier, entry = quality._load(str(quality.MODEL))["en"]
    raw = (
        entry["slope"] * quality._logits(classifier, entry["direction"], [text])[0]
        + entry["intercept"]
    )
    assert raw < 0
    assert quality.score([names]).item() == 0.5
    assert quality.score(["of the " * 3 + names]).item() < 0.5


def test_training_twice_gives_the_same_bytes(trained, tmp_path):
    model, good, card = trained
    used = [
        np.full(10**6, np.nan) for _ in range(8)
    ]  # fastText reads memory that it never wrote; let that be no zeros
    del used
    assert quality.train([good], [], tmp_path / "again", size=5000) == card
    for path in model.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_classifier_that_the_card_names_no_more_is_removed(trained, tmp_path, monkeypatch):
    """Others' files stay, also those of a language."""
    _, good, card = trained
    for folder, languages in (("used", ["en", "zh"]), ("foreign", ["en"])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "zh.ftz").write_bytes(b"another")
        described = {"languages": {lang: {} for lang in languages}}
        (tmp_path / folder / "card.json").write_text(json.dumps(described))
        monkeypatch.setattr(quality, "_labelled", lambda *_: {})
        fit = lambda lines, path, size, every: card["languages"][path.stem]
        monkeypatch.setattr(quality, "_train_language", fit)
        assert quality.train([good], [], tmp_path / folder, size=5000) == card
    assert not (tmp_path / "used" / "zh.ftz").exists()
    assert (tmp_path / "foreign" / "zh.ftz").read_bytes() == b"another"


def test_chosen_bad_text_is_what_a_model_learns_to_refuse(tmp_path):
    good = write(tmp_path / "good.jsonl", documents("train-en", 60))
    bad = write(
        tmp_path / "bad.jsonl",
        [text.upper().replace("THE ", "ZORG ") for text in documents("train-en", 120)[60:]],
    )
    card = quality.train([good], [bad], tmp_path / "model", size=5000)
    assert card["languages"]["en"]["held_out"]["auc"] > 0.9
    fine, poor = quality.score(
        ["He went to the house by the river.", "He went to zorg house by zorg river."],
        tmp_path / "model",
    )
    assert fine > 0.5 > poor


def test_calibration_recovers_a_known_law():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, 200_000)
    labels = (rng.random(len(logits)) < 1 / (1 + np.exp(-(0.4 * logits - 1.0)))).astype(float)
    slope, intercept = quality._calibrate(logits, labels)
    assert (slope, intercept) == (
        pytest.approx(0.4, abs=0.01),
        pytest.approx(-1.0, abs=0.03),
    )  # five standard errors
    report = quality._report(slope * logits + intercept, labels)
    assert report["calibration_error"] < 0.01
    assert sum(b["texts"] for b in report["calibration"]) == report["texts"] == len(labels)


def test_the_report_counts_pairs_and_errors():
    logits, labels = np.array([2.0, -1.0, 0.5, -3.0, 4.0]), np.array([1.0, 1.0, 0.0, 0.0, 1.0])
    report = quality._report(logits, labels)
    pairs = [
        (a > b)
        for a, x in zip(logits, labels, strict=True)
        for b, y in zip(logits, labels, strict=True)
        if (x, y) == (1, 0)
    ]
    assert report["auc"] == pytest.approx(sum(pairs) / len(pairs))
    assert report["accuracy"] == pytest.approx(3 / 5)


def test_held_out_figures_are_what_score_gives(trained):
    """The same classifier through the public function, on pieces that this test cuts itself."""
    model, _, card = trained
    figures = card["languages"]["en"]["held_out"]
    assert 0.6 < figures["accuracy"] <= 1
    rng = random.Random(1)
    texts = [
        text[i : i + 300]
        for text in documents("validation-en", 11)
        for i in range(0, len(text) - 300, 300)
    ]
    scores = quality.score([*texts, *(scrambled(text, rng) for text in texts)], model)
    truth = np.repeat([1.0, 0.0], len(texts))
    order = np.argsort(scores, kind="stable")
    area = truth[order].cumsum()[truth[order] == 0].sum() / len(texts) ** 2
    assert 1 - area > 0.9
    assert math.isclose(np.mean(scores), 0.5, abs_tol=0.2)


def test_what_cannot_be_is_refused(trained, tmp_path, monkeypatch):
    model, good, _ = trained
    with pytest.raises(ConfigError, match=r"holds no quality model"):
        quality.score(["a"], tmp_path)
    with pytest.raises(ConfigError, match=r"holds no classifier of 'zh'"):
        quality.score(["春眠不覺曉"], model)
    copy = tmp_path / "damaged"
    copy.mkdir()
    (copy / "card.json").write_bytes((model / "card.json").read_bytes())
    with pytest.raises(ConfigError, match=r"en\.ftz has SHA-256 None"):
        quality.score(["a"], copy)
    (copy / "en.ftz").write_bytes((model / "en.ftz").read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"en\.ftz has SHA-256 \w+ and card"):
        quality.score(["a"], copy)
    with pytest.raises(ConfigError, match="too little en text"):
        quality.train(
            [write(tmp_path / "one.jsonl", ["One short text of a few words."])], [], tmp_path / "m"
        )
    chinese = write(tmp_path / "zh.jsonl", documents("train-zh", 2))
    with pytest.raises(ConfigError, match=r"hold no en text"):
        quality.train([good], [chinese], tmp_path / "m")
    assert not (tmp_path / "m" / "card.json").exists()
    monkeypatch.setitem(sys.modules, "fasttext", None)
    with pytest.raises(ConfigError, match=r"pip install -r requirements-data\.txt"):
        quality.train([good], [], tmp_path / "m")


def test_the_commands_show_figures(trained, tmp_path, capsys):
    _, good, card = trained
    words = [
        "train",
        "--good",
        good,
        "--output",
        str(tmp_path / "m"),
        "--size",
        "5000",
        "--json",
        str(tmp_path / "card.json"),
    ]
    assert quality.main(words) == 0
    assert json.loads((tmp_path / "card.json").read_text()) == card
    assert f"{card['languages']['en']['held_out']['accuracy']:.4f}" in capsys.readouterr().out
    text = write(
        tmp_path / "some.jsonl",
        ["A line that is fine.\n\nof of a the to the of", "Another one, as good as the first."],
    )
    assert (
        quality.main(["score", "--input", text, "--lines", "--json", str(tmp_path / "scores.json")])
        == 0
    )
    lines = ["A line that is fine.", "of of a the to the of", "Another one, as good as the first."]
    figures = json.loads((tmp_path / "scores.json").read_text())[text]
    assert (figures["texts"], figures["mean"]) == (
        3,
        pytest.approx(quality.score(lines).mean(), rel=1e-5),
    )
    printed = capsys.readouterr().out
    assert printed.index("of of a the to the of") < printed.index("A line that is fine.")


def test_an_output_with_files_of_others_is_refused_and_keeps_them(tmp_path):
    good = write(tmp_path / "good.jsonl", ["One short text."])
    for name in ("card.json", "en.ftz"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(ConfigError, match=rf"holds '{name}', which no earlier run"):
            quality.main(["train", "--good", good, "--output", str(folder)])
        assert (folder / name).read_text() == "mine"


def test_what_the_globs_leave_out_is_said(tmp_path, capsys):
    write(tmp_path / "a.jsonl", documents("train-en", 1))
    write(tmp_path / ".b.jsonl", ["b"])
    assert quality.main(["score", "--input", f"{tmp_path}/*"]) == 0
    assert "1 hidden files not read" in capsys.readouterr().err


def test_a_file_without_a_text_is_in_the_table_of_scores(tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    full = write(tmp_path / "full.jsonl", documents("train-en", 1))
    files = ["--input", full, str(tmp_path / "empty.jsonl")]
    assert quality.main(["score", *files, "--json", str(tmp_path / "scores.json")]) == 0
    assert re.search(r"│ +0 │ +- │", capsys.readouterr().out)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {Path(name).name: found["texts"] for name, found in scores.items()} == {
        "empty.jsonl": 0,
        "full.jsonl": 1,
    }


def layout(content: bytes) -> dict[str, int]:
    """Where the numbers of a classifier's file are."""
    size, _, _, _, pruned = struct.unpack_from("<3i2q", content, 64)
    place = 92
    for _ in range(size):
        place = content.index(b"\0", place) + 10
    matrix = place + 8 * pruned
    return {"kind": place - 1, "pair": place + 4, "rows": matrix + 2, "codes": matrix + 18}


@pytest.mark.parametrize(
    ("place", "kind", "value", "reason"),
    [
        (0, "i", 1, "its beginning is"),
        (8, "i", 1 << 30, "its dimension"),
        (28, "i", 1 << 30, "wordNgrams"),
        (40, "i", 0, "bucket=0"),
        (48, "i", 1 << 30, "maxn"),
        (64, "i", (1 << 31) - 1, "its number of labels"),
        (68, "i", -7, "its number of labels"),
        (84, "q", 1 << 60, "pairs of words"),
        ("pair", "i", 1 << 30, "a pair of words has a row that is not there"),
        ("rows", "q", 1 << 40, "its matrix"),
        ("codes", "i", (1 << 31) - 1, "its number of codes"),
        ("kind", "s", b"\0", "the kind of a word"),
    ],
)
def test_a_classifier_that_lies_about_its_sizes_is_refused(tmp_path, place, kind, value, reason):
    """fastText would take all memory, read where nothing is, or never end."""
    content = bytearray((quality.MODEL / "en.ftz").read_bytes())
    at = place if isinstance(place, int) else layout(content)[place]
    struct.pack_into(f"<{kind}", content, at, value)
    with pytest.raises(ValueError, match=reason):
        quality._check_classifier(bytes(content), 8)
    card = json.loads((quality.MODEL / "card.json").read_text())
    card["languages"] = {"en": card["languages"]["en"]}
    card["languages"]["en"]["sha256"] = hashlib.sha256(content).hexdigest()
    (tmp_path / "card.json").write_text(json.dumps(card))
    (tmp_path / "en.ftz").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"en\.ftz is no classifier of card\.json: .*{reason}"):
        quality.score(["a b"], tmp_path)


def test_a_classifier_that_is_cut_short_is_refused():
    content = (quality.MODEL / "en.ftz").read_bytes()
    quality._check_classifier(content, 8)
    for size in (0, 50, 1000, 150_000, len(content) - 1):
        with pytest.raises((ValueError, struct.error)):
            quality._check_classifier(content[:size], 8)


def test_a_card_names_classifiers_of_its_folder(tmp_path):
    card = json.loads((quality.MODEL / "card.json").read_text())
    card["languages"]["../zh"] = card["languages"].pop("zh")
    (tmp_path / "card.json").write_text(json.dumps(card))
    shutil.copy(quality.MODEL / "en.ftz", tmp_path)
    with pytest.raises(ConfigError, match=r"card\.json: '\.\./zh' is no language"):
        quality.score(["a b"], tmp_path)
