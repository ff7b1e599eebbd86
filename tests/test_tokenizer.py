"""Tokenizers: text survives a round trip, training is repeatable, wrong files are refused."""

import gzip
import io
import itertools
import json
import re
import time
from pathlib import Path

import pytest
import sentencepiece

from baichuan_jax import tokenizer as module
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.data.rows import main as pack_rows
from baichuan_jax.tokenizer import Tokenizer, main, stats, train_tokenizer

SAMPLE = Path(module.__file__).parent / "data" / "sample"


def sample(language: str, lines: int) -> str:
    with gzip.open(SAMPLE / f"train-{language}.jsonl.gz", "rt", encoding="utf-8") as file:
        text = "\n".join(json.loads(next(file))["text"] for _ in range(3))
    return "\n".join(text.split("\n")[:lines])


@pytest.fixture(scope="module")
def documents():
    return [sample("en", 200), sample("zh", 30)]


@pytest.fixture(scope="module")
def trained(documents, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "new" / "sample.model"
    used = train_tokenizer(documents, path, 512)
    return Tokenizer(path), used


@pytest.fixture(scope="module")
def tokenizer(trained):
    return trained[0]


@pytest.mark.parametrize(
    "text",
    [
        "Emma Woodhouse, handsome, clever, and rich",
        "秦川雄帝宅，函谷壯皇居。",
        "mixed 中文 and English，全角！",
        "🙂👩‍👩‍👧 ℵ \x7f \u3000 é e\u0301 ﬁ",  # normalisation would change the last ones
        "1234567890 3.14 -7 ２０２４",
        "a\nb\n\n\tc\r\nd",
        " two  spaces   and some at the end  ",
        "▁_▁",
        " ",
        "",
    ],
)
def test_text_comes_back_from_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace(
        "▁", " "
    )  # SentencePiece writes a space so


def test_training_text_comes_back_and_a_batch_is_its_texts_one_by_one(tokenizer, documents):
    ids = tokenizer.encode_batch(documents)
    assert [tokenizer.decode(i) for i in ids] == documents
    assert ids == [tokenizer.encode(document) for document in documents]
    assert 2 not in {token for i in ids for token in i}
    assert sum(map(len, ids)) < len("".join(documents))  # else it has learnt nothing


def test_control_pieces_come_first_then_the_bytes(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        512,
        1,
        2,
        -1,
    )
    assert [tokenizer.piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert [tokenizer.piece(3 + i) for i in range(256)] == [f"<0x{i:02X}>" for i in range(256)]


def test_every_digit_is_a_token(tmp_path):
    train_tokenizer(["in 1812 and 1812 and 1812, 18 or 12"] * 50, tmp_path / "digits.model", 280)
    tokenizer = Tokenizer(tmp_path / "digits.model")
    pieces = [tokenizer.piece(token) for token in tokenizer.encode("1812 in 18")]
    assert [piece for piece in pieces if piece.strip("▁")[:1].isdigit()] == list("181218")
    assert not any(sum(c.isdigit() for c in tokenizer.piece(i)) > 1 for i in range(259, 280))


@pytest.mark.parametrize("character", ["龘", "🦜", "ψ"])
def test_an_unseen_character_is_spelt_in_bytes(tokenizer, documents, character):
    assert character not in "".join(documents)
    pieces = [tokenizer.piece(token) for token in tokenizer.encode("a" + character)]
    assert pieces[-len(character.encode()) :] == [f"<0x{byte:02X}>" for byte in character.encode()]


def test_the_same_documents_give_the_same_bytes(trained, documents, tmp_path):
    tokenizer, used = trained
    assert train_tokenizer(iter(documents), tmp_path / "again.model", 512) == used
    assert (tmp_path / "again.model").read_bytes() == tokenizer.path.read_bytes()
    assert Tokenizer(tmp_path / "again.model").hash == tokenizer.hash
    assert [path.name for path in tmp_path.iterdir()] == ["again.model"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "again.model").stat().st_mode == (
        tmp_path / "plain"
    ).stat().st_mode  # others may read a shared cache
    train_tokenizer(documents[:1], tmp_path / "again.model", 512)  # replaces it
    assert Tokenizer(tmp_path / "again.model").hash != tokenizer.hash


@pytest.mark.parametrize("cores", [1, 3, 64])
def test_the_number_of_cores_does_not_change_the_bytes(
    trained, documents, tmp_path, monkeypatch, cores
):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    train_tokenizer(documents, tmp_path / "a.model", 512)
    assert Tokenizer(tmp_path / "a.model").hash == trained[0].hash


def test_what_training_used_is_reported(trained, documents):
    text = "".join(documents).replace("\n", "")
    common = sorted((text.count(character) for character in set(text)), reverse=True)[
        : (512 - 259) // 2
    ]
    assert trained[1] == {
        "bytes": len(text.encode()),
        "sampled_one_line_in": 1,
        "characters": len(set(text)),
        "coverage": pytest.approx(sum(common) / len(text)),
    }


@pytest.mark.parametrize("before", [*range(992, 1003), 1330, 1333, 2000, 4000])
def test_a_character_that_only_a_long_line_has_gets_a_piece(tmp_path, before):
    long = (
        "天" * before + "龘" + "地" * 2000
    )  # SentencePiece leaves out lines of more than 4,192 bytes
    train_tokenizer(["天地 heaven and earth\n" * 20 + long], tmp_path / "long.model", 300)
    tokenizer = Tokenizer(tmp_path / "long.model")
    assert "龘" in "".join(
        tokenizer.piece(token) for token in tokenizer.encode("天龘")
    )  # and not its bytes


def test_long_text_is_sampled_evenly(tmp_path):
    lines = [
        f"line {'abcdefghij'[i % 10]} of many {'+' if i % 3 == 0 else '-'}" for i in range(1300)
    ]
    used = train_tokenizer(["\n".join(lines)], tmp_path / "a.model", 280, sample_bytes=10_000)
    assert used["bytes"] == sum(map(len, lines)) == 20_800
    assert (
        used["sampled_one_line_in"] == 4
    )  # the smallest power of two that leaves at most 10,000 bytes
    assert used["characters"] == len(set("".join(lines[::4])))
    train_tokenizer(["\n".join(lines[::4])], tmp_path / "b.model", 280)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


@pytest.mark.parametrize("bound", [1, 5, 40, 10_000])
def test_no_more_text_than_the_bound_is_held_and_all_of_it_is_counted(bound):
    lines = [f"{'天地'[i % 2] * (i % 5)}{i}" for i in range(200)]
    sample = module._Sample(bound)
    for line in lines:
        sample.add(line)
        assert sample.size == len("".join(sample.lines).encode()) <= max(bound, 5 * 3 + 3)
    used, total, every = sample.lines, sample.total, sample.every
    assert total == len("".join(lines).encode())
    assert used == lines[::every]
    assert len("".join(used).encode()) <= bound or len(used) == 1
    assert every == 1 or len("".join(lines[:: every // 2]).encode()) > bound


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_share_of_chinese_is_kept(share):
    english = "\n".join(f"a line of English text, number {i}" for i in range(3000))
    chinese = "\n".join(f"一行中文，第{'一二三四五六七八九十'[i % 10]}行" for i in range(1000))
    lines, used = module._sample_lines([english, chinese], 40_000, share)
    assert used["zh_bytes"] == len(chinese.replace("\n", "").encode())
    assert used["en_bytes"] == len(english.replace("\n", "").encode())
    sizes = [
        len("".join(line for line in lines if line.startswith(first)).encode())
        for first in ("一", "a")
    ]
    assert sizes == [used["zh_bytes_used"], used["en_bytes_used"]]
    assert sizes[0] / sum(sizes) == pytest.approx(share, abs=0.01)
    assert (
        15_000 < sum(sizes) <= 40_100
    )  # a power of two of lines, then the scarcer language decides
    places = [english.split("\n").index(line) for line in lines if line.startswith("a")]
    assert max(b - a for a, b in itertools.pairwise([0, *places, 2999])) < 48  # evenly


def test_a_share_of_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="asks for 'zh' text too, and there is none"):
        train_tokenizer(["only English"], tmp_path / "b.model", 320, chinese_share=0.5)
    with pytest.raises(ConfigError, match="chinese_share=1"):
        train_tokenizer(["only English"], tmp_path / "b.model", 320, chinese_share=1.0)


def test_half_of_a_small_vocabulary_is_the_most_frequent_characters(tmp_path):
    characters = [chr(0x4E00 + i) for i in range(300)]
    counts = {character: 400 - i for i, character in enumerate(characters)}
    document = "\n".join("".join(c for c in characters if counts[c] > i) for i in range(400))
    used = train_tokenizer([document], tmp_path / "a.model", 459)
    tokenizer = Tokenizer(tmp_path / "a.model")
    kept = {c for c in characters if c in "".join(tokenizer.piece(i) for i in range(459))}
    assert kept == {*characters[: (459 - 259) // 2]}
    assert used["coverage"] == pytest.approx(sum(counts[c] for c in kept) / sum(counts.values()))
    assert used["coverage"] < 0.5
    assert tokenizer.decode(tokenizer.encode(document)) == document


def test_a_vocabulary_too_large_or_too_small_is_refused_and_nothing_written(tmp_path):
    for documents in (["only a few words"], [], [""]):
        with pytest.raises(
            ConfigError, match=r"no tokenizer of 5000 pieces from \d+ bytes of text: "
        ):
            train_tokenizer(documents, tmp_path / "a.model", 5000)
    for size in (0, 259, 260):
        with pytest.raises(ConfigError, match=f"vocab_size={size} must be at least 261"):
            train_tokenizer(["some words"] * 9, tmp_path / "a.model", size)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_tokenizer_is_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"there is no tokenizer '.*nowhere\.model'"):
        Tokenizer(tmp_path / "nowhere.model")
    with pytest.raises(ConfigError, match="is a folder, a pipe or a device"):
        Tokenizer(tmp_path)
    content = tokenizer.path.read_bytes()
    for bad in (b"", b"no model at all", b"\x00" * 4096, content[: len(content) // 2 + 1]):
        (tmp_path / "bad.model").write_bytes(bad)
        with pytest.raises(
            ConfigError, match=r"bad\.model (is no SentencePiece model|has 0 pieces).*; delete it$"
        ):
            Tokenizer(tmp_path / "bad.model", "delete it")


def test_a_model_without_end_of_sentence_is_refused(documents, tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(documents[0].split("\n")),
        model_writer=model,
        vocab_size=100,
        eos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "a.model").write_bytes(model.getvalue())
    with pytest.raises(ConfigError, match="no end-of-sentence piece"):
        Tokenizer(tmp_path / "a.model")


def spm_train(path: Path, documents: list[str], **options: object) -> Tokenizer:
    """A model of SentencePiece's own trainer, with its defaults where no option is given."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter("\n".join(documents).split("\n")),
        model_writer=model,
        vocab_size=800,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


@pytest.mark.parametrize(
    ("options", "lost", "kept"),
    [
        # Its defaults: nmt_nfkc, white space squeezed, no byte fallback.
        (
            {},
            {"new lines", "tabs", "runs of spaces", "full-width characters", "rare characters"},
            {"upper case"},
        ),
        (
            {"normalization_rule_name": "identity", "byte_fallback": True},
            {"runs of spaces", "spaces at the beginning", "spaces at the end"},
            {"new lines", "tabs", "full-width characters", "rare characters"},
        ),
        (
            {"normalization_rule_name": "nfkc_cf", "remove_extra_whitespaces": False},
            {"upper case", "ligatures and circled numbers", "full-width characters"},
            {"runs of spaces"},
        ),
        # LLaMA's, as far as its model says: nothing is lost.
        (
            {
                "model_type": "bpe",
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "byte_fallback": True,
            },
            set(),
            set(module.PROBES),
        ),
    ],
)
def test_what_a_tokenizer_loses_is_said(documents, tmp_path, options, lost, kept):
    tokenizer = spm_train(tmp_path / "a.model", documents, **options)
    assert lost <= tokenizer.losses.keys()
    assert not kept & tokenizer.losses.keys()
    assert len(tokenizer.warnings) == bool(lost)
    for name in lost:
        text, back = tokenizer.losses[name]
        assert f"{name} ({text!r} -> {back!r})" in tokenizer.warnings[0]
        assert tokenizer.decode(tokenizer.encode(text)) == back != text


def test_the_tokenizers_trained_here_lose_nothing(tokenizer):
    assert tokenizer.losses == {}
    assert tokenizer.warnings == []


def test_every_command_says_what_its_tokenizer_loses(documents, tmp_path, capsys):
    spm_train(tmp_path / "a.model", documents)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": documents[0]}) + "\n")
    given = ["--input", str(tmp_path / "text.jsonl")]
    model, rows = str(tmp_path / "a.model"), str(tmp_path / "rows")
    assert main(["stats", *given, "--model", model]) == 0
    assert capsys.readouterr().err.count("does not keep all text. It changes new lines") == 1
    options = ["--tokenizer", model, "--context_length", "16", "--output", rows]
    assert pack_rows(["pack", *given, *options]) == 0
    assert capsys.readouterr().err.count("does not keep all text. It changes new lines") == 1
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    assert manifest["tokenizer_loses"][0] == "new lines"


def test_what_the_globs_leave_out_is_said(documents, tokenizer, tmp_path, capsys):
    for name in ("a.jsonl", ".b.jsonl", "c/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": "\n".join(documents)}) + "\n")
    source = ["--input", f"{tmp_path}/*"]
    training = ["train", *source, "--vocab_size", "300", "--output", str(tmp_path / "m")]
    for argv in (training, ["stats", *source, "--model", str(tokenizer.path)]):
        assert main(argv) == 0
        shown = "1 hidden files not read, 1 files in matched folders not read"
        assert shown in capsys.readouterr().err
        (tmp_path / "m").unlink(missing_ok=True)


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "a.model"):
        with pytest.raises(SystemExit):
            main(["train", "--input", "nowhere", "--vocab_size", "300", "--output", str(output)])
        assert re.search(r"--output: '.*' cannot be written", capsys.readouterr().err)


def test_stats_are_sums_over_the_documents_of_a_language(tokenizer, documents):
    english, chinese, mixed = documents[0], documents[1], "漢字漢字漢字 with a few words"
    found = stats(tokenizer, [english, chinese, mixed, ""])
    for language, texts in {
        "zh": [chinese],
        "en": [english, mixed, ""],
        "all": [chinese, english, mixed, ""],
    }.items():
        tokens, size = (
            sum(len(tokenizer.encode(text)) for text in texts),
            len("".join(texts).encode()),
        )
        assert found.pop(language) == {
            "documents": len(texts),
            "bytes": size,
            "characters": len("".join(texts)),
            "tokens": tokens,
            "bytes_per_token": size / tokens,
            "characters_per_token": len("".join(texts)) / tokens,
            "compression_rate": 2 * tokens / size,
        }
    assert not found
    assert stats(tokenizer, []) == {}


def test_the_commands_train_encode_and_measure(documents, trained, tmp_path, capsys, monkeypatch):
    text, model = str(tmp_path / "text.jsonl"), str(tmp_path / "a.model")
    lines = [json.dumps({"body": document}) + "\n" for document in documents]
    Path(text).write_text("".join(lines))
    source = ["--input", text, "--text_field", "body"]
    assert main(["train", *source, "--vocab_size", "512", "--output", model]) == 0
    assert capsys.readouterr().out == f"{model}: 512 pieces; {json.dumps(trained[1])}\n"
    tokenizer = trained[0]
    assert Path(model).read_bytes() == tokenizer.path.read_bytes()
    assert main(["encode", "--model", model, "Emma 1812"]) == 0
    printed = capsys.readouterr().out
    assert printed == "".join(f"{i}\t{tokenizer.piece(i)}\n" for i in tokenizer.encode("Emma 1812"))
    give = lambda content: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    give(b"Emma 1812")
    assert main(["encode", "--model", model, "-"]) == 0
    assert capsys.readouterr().out == printed
    # As it is: Python's reader of text would give one line break.
    give(b"a\r\nb")
    assert main(["encode", "--model", model, "-"]) == 0
    ids = tokenizer.encode("a\r\nb")
    assert capsys.readouterr().out == "".join(f"{i}\t{tokenizer.piece(i)}\n" for i in ids)
    give(b"Emma\n\xff")
    with pytest.raises(ConfigError, match=r"standard input, line 2 is no UTF-8 \(byte 0xff\)"):
        main(["encode", "--model", model, "-"])
    monkeypatch.setattr("sys.stdin", None)
    assert main(["encode", "--model", model, "-"]) == 0
    with pytest.raises(
        ConfigError, match=r"the text must be UTF-8, and has '\\udcff' at character"
    ):
        main(["encode", "--model", model, "Emma\udcff"])
    with pytest.raises(ConfigError, match="the text must be UTF-8"):
        tokenizer.encode("\ud83d")
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "300")
    numbers, other = tmp_path / "numbers.json", str(tokenizer.path)
    assert main(["stats", "--model", model, other, *source, "--json", str(numbers)]) == 0
    assert json.loads(numbers.read_text()) == dict.fromkeys(
        (model, other), stats(tokenizer, documents)
    )
    row = rf"{re.escape(other)} +│ zh +│ +1 │ +{len(tokenizer.encode(documents[1])):,} │"
    printed = capsys.readouterr().out
    assert re.search(row, printed)
    rate = f"{stats(tokenizer, documents)['all']['compression_rate']:.3f}"
    assert re.search(
        rf"Compress Rate +│ +{rate} +│ +{rate} +│", printed
    )  # the original's layout: a column a model
    assert re.search(r"Vocab Size +│ +512 +│ +512 +│", printed)
    with pytest.raises(ConfigError, match=r"text\.jsonl, line 1: .*there is no field 'text'"):
        main(["stats", "--model", model, "--input", text])


def field(number: int, content: bytes) -> bytes:
    """A field of a protobuf message, of bytes."""
    size, length = b"", len(content)
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


def with_rules(model: Path, rules: bytes, number: int) -> bytes:
    """The model with other rules for characters, in its field 3 (normalizer) or 5 (denormalizer).

    The last of two fields counts.
    """
    return model.read_bytes() + field(number, field(2, rules))


@pytest.mark.parametrize("number", [3, 5])
def test_a_model_that_makes_pages_of_a_letter_is_refused(documents, tmp_path, number):
    (tmp_path / "rules.tsv").write_text("61\t78\n62\t79\n")
    ruled = spm_train(
        tmp_path / "ruled.model",
        documents,
        normalization_rule_tsv=str(tmp_path / "rules.tsv"),
    )
    assert ruled.decode(ruled.encode("ab")) == "xy"
    (rules,) = module._normalisers(ruled.path.read_bytes())
    assert rules.endswith(b"x\0y\0")
    assert module._longest_replacement(rules) == 1
    longer = tmp_path / "longer.model"
    longer.write_bytes(with_rules(ruled.path, rules[:-4] + b"x" * 64 + b"\0", number))
    Tokenizer(longer)
    longer.write_bytes(with_rules(ruled.path, rules[:-4] + b"x" * 65 + b"\0", number))
    with pytest.raises(ConfigError, match=r"longer\.model would replace a character by 65 bytes"):
        Tokenizer(longer)


def test_a_file_larger_than_any_model_is_not_read(tmp_path):
    with open(tmp_path / "large.model", "wb") as file:
        file.truncate(module.MOST_MODEL_BYTES + 1)
    with pytest.raises(ConfigError, match=r"large\.model has 67,108,865 bytes, and no"):
        Tokenizer(tmp_path / "large.model")


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        # Made when they are needed: 60 MiB each.
        (lambda: b"\x58\0" * (30 << 20), "100 fields beside its pieces"),
        (lambda: b"\x0a\0" * (30 << 20), "1,000,000 pieces"),
        (lambda: field(3, b"\x58\0" * (30 << 20)), "100 fields of its rules"),
        (lambda: field(3, field(2, bytes(60 << 20))), "8,388,608 bytes of rules"),
    ],
    ids=["unknown", "pieces", "fields-of-rules", "rules"],
)
def test_a_model_of_millions_of_fields_is_refused_in_seconds(trained, tmp_path, added, reason):
    large = tmp_path / "large.model"
    large.write_bytes(trained[0].path.read_bytes() + added())
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=rf"large\.model is no Sent.*it has over {reason}"):
        Tokenizer(large)
    # 12 s where every field is looked at; here 1 s.
    assert time.perf_counter() - began < 6
