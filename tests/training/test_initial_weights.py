"""What belongs to weights comes with them, from every form of folder, or is refused."""

import dataclasses
import gzip
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
import sentencepiece
from conftest import build, run_state, sentencepiece_defaults
from flax import nnx

from baichuan_jax.checkpoint import weights
from baichuan_jax.checkpoint.local_copies import RECORD, LocalCopies
from baichuan_jax.checkpoint.state import StateTarget, identity
from baichuan_jax.config.files import load_config
from baichuan_jax.config.schema import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    MetricsConfig,
    TokenizerConfig,
)
from baichuan_jax.data import prepare as module
from baichuan_jax.data.prepare import prepare
from baichuan_jax.evaluate import __main__ as evaluate_command
from baichuan_jax.evaluate.__main__ import main as evaluate
from baichuan_jax.evaluate.results import Results
from baichuan_jax.hf.__main__ import main as hf
from baichuan_jax.hf.source import find_tokenizer, read_source
from baichuan_jax.hf.weights import load_model, weights_sha256
from baichuan_jax.runs.events import Failed, Started, append_event
from baichuan_jax.runs.folder import Run, refuse_other_files
from baichuan_jax.tokenizer import Tokenizer
from baichuan_jax.train import train
from baichuan_jax.training.restore import find_initial_weights

SAMPLE = Path(module.__file__).parent / "sample"


def write_text(path: Path, language: str, documents: int) -> Path:
    with gzip.open(SAMPLE / f"train-{language}.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(next(file))["text"][:4000] for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def on_text(config: Config, folder: Path, text: Path, name: str, **changes: Any) -> Config:
    """A run `name` in the folder, of two steps on this text; changes: section__setting or field."""
    config = dataclasses.replace(
        config,
        run_dir=str(folder / name),
        train=dataclasses.replace(config.train, num_steps=2),
        data=DataConfig(train={str(text): 1.0}, cache_dir=str(folder / "cache"), num_workers=1),
        checkpoint=CheckpointConfig(every=1),
        metrics=MetricsConfig(tensorboard=False),
    )
    for key, value in changes.items():
        section, _, setting = key.partition("__")
        if setting:
            value = dataclasses.replace(getattr(config, section), **{setting: value})
        config = dataclasses.replace(config, **{section: value})
    return config


FORMS = ["A", "A/checkpoints", "A/checkpoints/2", "llama", "baichuan", "weights"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture
def first(tiny_config, folder) -> Path:
    """Run A on English, and its weights in every form; Chinese text for what follows."""
    if not (folder / "A").exists():
        english = write_text(folder / "en.jsonl", "en", 8)
        write_text(folder / "zh.jsonl", "zh", 8)
        train(on_text(tiny_config, folder, english, "A"))
        for form in ("llama", "baichuan"):
            hf(["export", str(folder / "A"), str(folder / form), "--form", form])
        hf(["import", str(folder / "llama"), str(folder / "weights")])
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A tokenizer of as many pieces as A's, and of another order."""
    model = io.BytesIO()
    text = write_text(tmp_path_factory.mktemp("other") / "en.jsonl", "en", 3)
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(json.loads(text.read_text().split("\n")[0])["text"].split("\n")),
        model_writer=model,
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (text.parent / "other.model").write_bytes(model.getvalue())
    return text.parent / "other.model"


@pytest.mark.parametrize("form", FORMS)
def test_a_tokenizer_comes_with_the_weights(first, tiny_config, form, other):
    said: list[str] = []
    own = Tokenizer(first / "A" / "tokenizer.model")
    config = on_text(tiny_config, first, first / "zh.jsonl", "B", init_from=str(first / form))
    assert prepare(config, progress=False, say=said.append).tokenizer.hash == own.hash
    assert f"({own.vocab_size} pieces), of init_from's weights" in said[0]
    given = dataclasses.replace(config, tokenizer=TokenizerConfig(path=str(own.path)))
    assert prepare(given, progress=False).tokenizer.hash == own.hash
    wrong = dataclasses.replace(config, tokenizer=TokenizerConfig(path=str(other)))
    with pytest.raises(ConfigError) as error:
        prepare(wrong, progress=False)
    for part in (own.hash[:12], Tokenizer(other).hash[:12], "--tokenizer.path FILE"):
        assert part in str(error.value)


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_another_model_are_refused_before_the_text_is_read(first, tiny_config, form):
    config = on_text(tiny_config, first, first / "zh.jsonl", "B", init_from=str(first / form))
    find_initial_weights(config)
    for name, value, wanted in (
        ("rms_norm_eps", 1e-5, "1e-06"),
        ("rope_theta", 500.0, "10000.0"),
        ("pad_token_id", None, "0"),
        ("num_heads", 2, "4"),
        ("num_layers", 1, "2"),
    ):
        other = dataclasses.replace(config.model, **{name: value})
        with pytest.raises(ConfigError, match=rf"set --model\.{name} {wanted}$"):
            find_initial_weights(dataclasses.replace(config, model=other))
    # All that differ, so that the advised options are enough.
    other = dataclasses.replace(config.model, num_heads=2, num_layers=1, pad_token_id=None)
    with pytest.raises(ConfigError) as error:
        find_initial_weights(dataclasses.replace(config, model=other))
    advised = str(error.value).split("; set ")[1]
    assert advised == "--model.num_layers 2 --model.num_heads 4 --model.pad_token_id 0"


def test_weights_without_a_tokenizer_need_one(first, tiny_config, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(first / "llama", bare)
    (bare / "tokenizer.model").unlink()
    config = on_text(tiny_config, first, first / "zh.jsonl", "B", init_from=str(bare))
    with pytest.raises(ConfigError, match=r"no tokenizer\.model in .*bare; .*--tokenizer\.path"):
        prepare(config, progress=False)
    path = str(first / "A" / "tokenizer.model")
    given = dataclasses.replace(config, tokenizer=TokenizerConfig(path=path))
    assert str(prepare(given, progress=False).tokenizer.path) == path


def test_a_run_goes_on_with_its_own_tokenizer(first, tiny_config, tmp_path, capsys):
    """Whatever became of the folder that it began from, and of the text."""
    shutil.copytree(first / "llama", tmp_path / "source")
    text = Path(shutil.copy(first / "zh.jsonl", tmp_path / "zh.jsonl"))
    config = on_text(tiny_config, tmp_path, text, "B", init_from=str(tmp_path / "source"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, context_length=16))
    train(config)
    # Another length is legal, and said.
    assert "trained on rows of 32 tokens and train.context_length is 16" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "source")
    with text.open("a") as file:
        file.write(json.dumps({"text": "又一篇文章。" * 50}) + "\n")
    more = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=3))
    assert train(more).status == "completed"
    own = (first / "A" / "tokenizer.model").read_bytes()
    assert (tmp_path / "B" / "tokenizer.model").read_bytes() == own


def test_a_damaged_tokenizer_says_what_to_do_and_that_helps(first, tiny_config, tmp_path):
    """The run's own, which generation and training read, and that of the cache."""
    config = resumed(first, tmp_path, tiny_config)
    own = tmp_path / "A" / "tokenizer.model"
    content = own.read_bytes()
    own.write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"A/tokenizer\.model is no .*; put the one that .*A/ch"):
        find_tokenizer(read_source(tmp_path / "A"))
    with pytest.raises(
        ConfigError, match=r"A/tokenizer\.model is no .*; delete it: the next launch"
    ):
        train(config)
    begun = dataclasses.replace(config, init_from="weights")
    with pytest.raises(ConfigError, match=r"init_from's weights with --tokenizer\.path"):
        prepare(begun, progress=False)
    own.unlink()
    cached = Path(prepare(config, progress=False).tokenizer.path)
    cached.write_bytes(b"x")
    with pytest.raises(ConfigError, match=rf"{cached.name} is no .*; delete it, and start again"):
        train(config)
    cached.unlink()
    assert train(config).status == "completed"
    assert own.read_bytes() == cached.read_bytes() == content


def test_a_folder_with_a_number_for_a_name_is_no_checkpoint_of_the_run(
    first, tiny_config, tmp_path
):
    """The first launch begins at init_from with its tokenizer, whatever lies in run_dir."""
    config = on_text(tiny_config, first, first / "zh.jsonl", "B", init_from=str(first / "A"))
    config = dataclasses.replace(config, run_dir=str(tmp_path / "B"))
    (tmp_path / "B" / "1" / "state").mkdir(parents=True)
    assert find_initial_weights(config) is not None
    own = Tokenizer(first / "A" / "tokenizer.model")
    assert prepare(config, progress=False).tokenizer.hash == own.hash
    with pytest.raises(ConfigError, match="neither a run's folder"):
        read_source(tmp_path / "B")
    # What the run itself saved, and that alone, says that it has begun.
    (tmp_path / "B" / "checkpoints" / "1").mkdir(parents=True)
    assert find_initial_weights(config) is None


@pytest.mark.parametrize(
    ("form", "place", "found"),
    [
        ("llama", "", "config.json"),
        ("baichuan", "checkpoints", "checkpoints/config.json"),
        ("weights", "", "params"),
        ("weights", "checkpoints", "checkpoints/params"),
        ("A/checkpoints", "", "2/params"),
    ],
)
def test_a_run_in_a_folder_of_weights_is_refused(first, tiny_config, tmp_path, form, place, found):
    """What reads the run would read the weights that were there before."""
    run = tmp_path / "B"
    shutil.copytree(first / form, run / place)
    config = on_text(tiny_config, first, first / "zh.jsonl", "B", init_from=str(run / place))
    before = sorted(run.rglob("*"))
    with pytest.raises(ConfigError, match=rf"run_dir='.*/B' holds weights already \({found}\)"):
        train(dataclasses.replace(config, run_dir=str(run)))
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("config.yaml", ""),
        ("loss.png", ""),
        ("tokenizer.model", r" \(name it with --tokenizer.path .*/B/tokenizer.model to train with"),
    ],
)
def test_a_run_replaces_no_file_that_lay_in_its_folder(first, tiny_config, tmp_path, name, advice):
    """A user's tokenizer would be ignored and lost, and the comments of a user's settings."""
    run = tmp_path / "B"
    run.mkdir()
    (run / name).write_text("mine")
    config = on_text(tiny_config, first, first / "zh.jsonl", "B")
    with pytest.raises(ConfigError, match=rf"/B' holds a {name} and no run, .*{advice}"):
        train(dataclasses.replace(config, run_dir=str(run)))
    # A launch that was refused makes no run of it.
    append_event(run, Failed(step=0, error="x"))
    with pytest.raises(ConfigError, match=rf"holds a {name} and no run"):
        train(dataclasses.replace(config, run_dir=str(run)))
    assert sorted(path.name for path in run.iterdir()) == sorted([name, "events.jsonl"])
    assert (run / name).read_text() == "mine"
    # Of a run that has begun they are its own; so they are of a copy without its events.
    append_event(run, Started(attempt=1))
    refuse_other_files(run, None, begun=False)
    (run / "events.jsonl").unlink()
    refuse_other_files(run, None, begun=True)


def test_the_tokenizer_that_the_settings_name_may_lie_in_the_folder(first, tmp_path, other):
    own = tmp_path / "tokenizer.model"
    shutil.copy(other, own)
    for path in (own, other):
        refuse_other_files(tmp_path, str(path), begun=False)
    with pytest.raises(ConfigError, match=r"holds a tokenizer.model and no run"):
        refuse_other_files(tmp_path, str(first / "A" / "tokenizer.model"), begun=False)
    # A complete run's own settings are of that run.
    assert train(load_config(first / "A" / "config.yaml")).status == "completed"


@pytest.mark.slow
def test_a_run_in_the_folder_of_its_settings_and_of_the_tokenizer_that_they_name(
    first, tiny_config, tmp_path, other, capsys
):
    run = tmp_path / "B"
    run.mkdir()
    own = run / "tokenizer.model"
    shutil.copy(other, own)
    config = on_text(tiny_config, first, first / "en.jsonl", "B", tokenizer__path=str(own))
    config = dataclasses.replace(config, run_dir=str(run))
    train(config)
    assert own.read_bytes() == other.read_bytes()
    # The run's own settings go on with it.
    again = load_config(run / "config.yaml", ["train.num_steps=3"])
    assert train(again).status == "completed"
    assert "going on from checkpoint 2" in capsys.readouterr().out
    # Another folder that has a copy of them is not their run's.
    (tmp_path / "C").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "C")
    with pytest.raises(ConfigError, match=r"/C' holds a config.yaml and no run"):
        train(dataclasses.replace(again, run_dir=str(tmp_path / "C")))


def test_results_do_not_go_into_the_files_of_a_run_or_of_weights(first):
    run = read_source(first / "A")
    assert {first / "A" / "events.jsonl", first / "A" / "checkpoints"} <= set(run.files)
    with pytest.raises(ConfigError, match=r"written into .*/A/checkpoints, which checkpoint names"):
        hf(["export", str(first / "A"), str(first / "A" / "checkpoints" / "9")])
    for form, names in (
        ("llama", {"config.json", "model.safetensors", "tokenizer.model"}),
        ("weights", {"params", "run", "tokenizer.model"}),
    ):
        folder = first / form
        assert {folder / name for name in names} <= set(read_source(folder).files)
        assert folder / "figures.json" not in read_source(folder).files


@pytest.mark.parametrize("form", ["llama", "weights"])
def test_weights_beside_a_runs_checkpoints_are_told_apart(first, tmp_path, form):
    """A run that an earlier version trained in place."""
    both = tmp_path / "both"
    shutil.copytree(first / form, both)
    shutil.copytree(first / "A" / "checkpoints", both / "checkpoints")
    with pytest.raises(ConfigError, match=r"and a run's checkpoints; name .*both/checkpoints for"):
        read_source(both)
    assert read_source(both / "checkpoints").path == both / "checkpoints" / "2"


def resumed(first: Path, tmp_path: Path, config: Config, **changes: Any) -> Config:
    """The configuration of a copy of run A that has one step more to do."""
    shutil.copytree(first / "A", tmp_path / "A", dirs_exist_ok=True)
    changed = on_text(config, first, first / "en.jsonl", "A", **changes)
    steps = dataclasses.replace(changed.train, num_steps=3)
    return dataclasses.replace(changed, run_dir=str(tmp_path / "A"), train=steps)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model__rope_theta", 500.0, r"model\.rope_theta=10000\.0 .* set --model\.rope_theta"),
        ("model__rms_norm_eps", 1e-5, r"model\.rms_norm_eps=1e-06"),
        ("model__pad_token_id", None, r"set --model\.pad_token_id 0"),
        ("model__num_heads", 2, "w_pack is"),
        ("tokenizer__vocab_size", 400, r"set --tokenizer\.vocab_size 512, or another run_dir"),
    ],
)
def test_a_checkpoint_is_of_one_model(first, tiny_config, tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=message):
        train(resumed(first, tmp_path, tiny_config, **{key: value}))
    assert len(Run(tmp_path / "A").curve("loss")) == 2


def test_what_changes_no_result_may_change(first, tiny_config, tmp_path):
    changes = {"model__remat": "full", "model__scan_layers": False, "model__dtype": "bfloat16"}
    config = resumed(first, tmp_path, tiny_config, **changes)
    assert train(config).status == "completed"


def test_a_hosts_copy_is_of_one_model(tiny_config, tmp_path, capsys):
    """It holds arrays without shapes: those of other heads would fit."""
    config, steps = build(tiny_config, (1, 1, 1, 1))
    shapes = steps.state_shapes
    state = jax.tree.map(lambda leaf: jax.numpy.ones(leaf.shape, leaf.dtype), shapes)
    state = jax.device_put(state, steps.state_shardings)

    def newest(**changes: Any) -> int | None:
        model = dataclasses.replace(config.model, **changes)
        target = StateTarget(steps.abstract_state, identity(model))
        copies = LocalCopies(tmp_path / "local", tmp_path / RECORD, 0, "here", "abc", target)
        found = copies.restore(0, lambda event: None)
        return None if found is None else found.step

    target = StateTarget(steps.abstract_state, identity(config.model))
    copies = LocalCopies(tmp_path / "local", tmp_path / RECORD, 0, "here", "abc", target)
    copies.save(run_state(state, 1, 1))
    copies.finish()
    assert newest() == 1
    for changes in ({"num_heads": 2}, {"rope_theta": 5.0}, {"pad_token_id": None}):
        assert newest(**changes) is None
    assert "of another tokenizer or model" in capsys.readouterr().err


def test_text_of_the_padding_token_is_said(tiny_config, tmp_path):
    """Without byte fallback <unk> is in texts, and its embedding does not learn."""
    text = "It was a truth universally acknowledged, that a single man must be in want of a wife."
    (tmp_path / "a.model").write_bytes(sentencepiece_defaults(text))
    (tmp_path / "a.txt").write_text(f"{text}🦜" * 20)
    path = str(tmp_path / "a.model")
    for padding, count in ((0, 1), (None, 0)):
        said: list[str] = []
        config = on_text(tiny_config, tmp_path, tmp_path / "a.txt", "B", tokenizer__path=path)
        model_config = dataclasses.replace(config.model, pad_token_id=padding)
        config = dataclasses.replace(config, model=model_config)
        prepare(config, progress=False, say=said.append)
        assert sum("has token 0 ('<unk>') 20 times" in line for line in said) == count
        # And what the tokenizer loses, once.
        assert sum("does not keep all text" in line for line in said) == 1


@pytest.fixture
def training(first, tmp_path, monkeypatch) -> Path:
    """Run A when it has one checkpoint; its second one is saved once anybody has looked."""
    run = tmp_path / "A"
    shutil.copytree(first / "A", run)
    (run / "checkpoints" / "2").rename(tmp_path / "later")
    find = weights.find_checkpoint

    def find_and_go_on(path: Path) -> Path:
        found = find(path)
        if (tmp_path / "later").exists():
            (tmp_path / "later").rename(run / "checkpoints" / "2")
        return found

    monkeypatch.setattr(weights, "find_checkpoint", find_and_go_on)
    return run


def arrays_of(path: Path) -> dict[str, Any]:
    return dict(nnx.to_flat_state(nnx.state(load_model(read_source(path)))))


def test_of_a_run_that_trains_the_checkpoint_that_is_read_is_the_one_that_is_hashed(
    training, first, capsys
):
    text = first / "en.jsonl"
    words = ["perplexity", "--checkpoint", str(training), "--text", str(text), "--context", "16"]
    assert evaluate([*words, "--max_tokens", "64", "--output", str(training / "out")]) == 0
    step = training / "checkpoints" / "1"
    assert f"checkpoint: {step}\n" in capsys.readouterr().err
    assert (training / "checkpoints" / "2").exists()
    manifest = json.loads((training / "out" / "result.json").read_text())["manifest"]
    assert manifest["checkpoint"] == str(step)
    assert manifest["weights_sha256"] == weights_sha256(read_source(step))
    assert manifest["weights_sha256"] != weights_sha256(read_source(training))


def test_of_a_run_that_trains_one_checkpoint_is_exported(training, tmp_path, capsys):
    step = training / "checkpoints" / "1"
    hf(["export", str(training), str(tmp_path / "out"), "--dtype", "float32"])
    assert f"exporting {step}\n" in capsys.readouterr().err
    assert (training / "checkpoints" / "2").exists()
    exported, own, later = map(arrays_of, (tmp_path / "out", step, training))
    assert all((value[...] == exported[name][...]).all() for name, value in own.items())
    assert not all((value[...] == exported[name][...]).all() for name, value in later.items())


@pytest.mark.slow
def test_of_a_run_that_trains_one_checkpoint_begins_another(
    training, first, tiny_config, tmp_path, capsys
):
    train(on_text(tiny_config, tmp_path, first / "zh.jsonl", "B", init_from=str(training)))
    assert (training / "checkpoints" / "2").exists()
    step = f"{training}/checkpoints/1"
    assert f"weights from {step}" in "".join(capsys.readouterr().out.split("\n"))
    (begun,) = (event for event in Run(tmp_path / "B").events if event.kind == "initialised")
    assert begun.source == step


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_named(training):
    source = read_source(training)
    shutil.rmtree(source.path)
    with pytest.raises(ConfigError, match=r"checkpoints/1 was deleted meanwhile: its run still"):
        load_model(source)
    with pytest.raises(ConfigError, match=r"checkpoints/1 was deleted meanwhile"):
        weights_sha256(source)


def test_the_same_weights_by_another_name_go_on_with_an_evaluation(tmp_path):
    """Of a run's folder the newest checkpoint is meant, and earlier versions recorded the run."""
    Results(tmp_path / "out", {"checkpoint": "run", "weights_sha256": "a"})
    Results(tmp_path / "out", {"checkpoint": "run/checkpoints/1", "weights_sha256": "a"})
    with pytest.raises(ConfigError, match=r"checkpoint: 'run' there, 'run/checkpoints/2' now"):
        Results(tmp_path / "out", {"checkpoint": "run/checkpoints/2", "weights_sha256": "b"})


@pytest.mark.parametrize("form", ["weights", "llama"])
def test_weights_that_change_after_their_hash_was_taken_are_not_evaluated(
    first, tmp_path, monkeypatch, form
):
    shutil.copytree(first / form, tmp_path / "copy")
    changed = tmp_path / "copy" / ("run/metadata" if form == "weights" else "model.safetensors")

    def change_and_load(*arguments: Any) -> Any:
        os.utime(changed, ns=(0, 0))
        return load_model(*arguments)

    monkeypatch.setattr(evaluate_command, "load_model", change_and_load)
    words = ["perplexity", "--checkpoint", str(tmp_path / "copy"), "--context", "16"]
    words += ["--text", str(first / "en.jsonl"), "--max_tokens", "64"]
    with pytest.raises(ConfigError, match=rf"{changed} changed while it was read"):
        evaluate([*words, "--output", str(tmp_path / "out")])


def test_the_same_arrays_are_another_model_with_other_settings(tmp_path):
    """Their digests are equal; earlier versions recorded nothing else, and their results go on."""
    settings = {"checkpoint": "a", "weights_sha256": "a"}
    Results(tmp_path / "before", settings)
    Results(tmp_path / "before", settings | {"model": {"rope_theta": 1e4}})
    Results(tmp_path / "out", settings | {"model": {"rope_theta": 1e4}})
    with pytest.raises(ConfigError, match=r"model: .*10000.0.* there, .*20000.0.* now"):
        Results(tmp_path / "out", settings | {"model": {"rope_theta": 2e4}})
