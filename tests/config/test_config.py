import contextlib
import dataclasses
import os
from pathlib import Path

import jax
import pytest

from baichuan_jax.config.files import KEYS, dump_config, load_config, make_parser, parse_config
from baichuan_jax.config.parsing import given_text, parse_yaml
from baichuan_jax.config.schema import Config, ConfigError, DataConfig, MeshConfig
from baichuan_jax.model import abstract_model

CONFIGS = sorted(
    (Path(__file__).parents[2] / "configs").glob("*.yaml")
)  # corpus.yaml: test_pipeline.py
CONFIGS = [path for path in CONFIGS if path.stem != "corpus"]
TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


def parse(*argv: str) -> Config:
    return parse_config(make_parser("train", ""), list(argv))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_file_loads_and_survives_a_round_trip(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(copy) == config


@pytest.mark.parametrize("name", ["baichuan_7b_a800", "baichuan_7b_v5p"])
def test_7b_has_the_originals_parameters(name):
    config = load_config(Path(TINY).with_name(f"{name}.yaml"))
    _, shapes, _ = abstract_model(config.model)
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(shapes))
        == config.model.num_parameters
        == 7_000_559_616
    )


COPIES = ["mesh.data=-1", "mesh.state=1", "resilience.check_every=100"]


def test_a800_configuration_fits_128_nodes_of_8():
    config = load_config(Path(TINY).with_name("baichuan_7b_a800.yaml"))
    for nodes in (1, 8, 64, 128):
        mesh = config.mesh.resolve(8 * nodes)
        assert mesh.shape == (1, nodes, 8, 1, 1)
        config.check_mesh(mesh)
        # Without half of the nodes: the same batch in twice as many passes of as many rows.
        assert config.accumulation_steps(mesh) == 128 // nodes
    # What comparing replicas and hosts' own copies need, as the file says.
    other = load_config(CONFIGS[0].with_name("baichuan_7b_a800.yaml"), COPIES)
    mesh = other.mesh.resolve(1024)
    assert mesh.shape == (128, 1, 8, 1, 1)
    other.check_mesh(mesh)


def test_overrides_win_over_the_file_and_the_file_over_defaults():
    config = load_config(
        TINY,
        [
            "train.num_steps=60",
            'sample.prompts=["登鹳雀楼->", "a b"]',
            "optimizer.learning_rate=1e-3",
        ],
    )
    assert config.train.num_steps == 60
    assert config.sample.prompts == ["登鹳雀楼->", "a b"]
    assert config.optimizer.learning_rate == 1e-3
    assert config.model.hidden_size != Config().model.hidden_size
    assert config.run_dir == "runs/tiny"


def test_the_command_line_wins_wherever_config_stands(tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text("train: {num_steps: 50, seed: 7}\n")
    for argv in (
        ["--train.num_steps", "77", "--config", TINY],
        ["--train.num_steps=77", f"--config={TINY}"],
        ["--config", "tiny", "--train.num_steps", "77"],
    ):
        config = parse(*argv)
        assert (config.train.num_steps, config.run_dir) == (77, "runs/tiny")
    # Of several files the later one wins; it also names the run.
    config = parse("--config", TINY, "--train.num_steps", "77", "--config", str(second))
    assert (config.train.num_steps, config.train.seed) == (77, 7)
    assert config.run_dir == "runs/second"
    assert config.model == load_config(TINY).model


def test_every_file_is_checked_and_config_needs_one(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("train: {num_step: 50}\n")
    with pytest.raises(ConfigError, match=r"nearest is 'train\.num_steps'"):
        parse("--config", str(wrong), "--config", TINY)
    with pytest.raises(ConfigError, match="--config needs a file"):
        parse("--train.num_steps", "77", "--config")


def test_the_number_of_settings_is_limited():
    leaves = [key for key in KEYS if not any(other.startswith(key + ".") for other in KEYS)]
    assert len(leaves) <= 74


REFUSED = {
    "--model.num_head 3": "nearest is 'model.num_heads'",
    "--train.num_step 3": "nearest is 'train.num_steps'",
    "--train.num_steps abc": "num_steps",
    "--model.dtype float16": "float16",
    "--model.num_heads 7": "model.num_heads=7 does not divide model.hidden_size=192",
    "--model.vocab_size 100": "model.vocab_size=100 is smaller than tokenizer.vocab_size=8192",
    "--mesh.data 3": "3 x 1 x 1 = 3 does not divide train.global_batch_size=8",
    "--mesh.data 1 --mesh.tensor 2": "mesh.tensor=2 does not divide model.num_heads=3",
    "--mesh.data 1 --mesh.fsdp 5": "mesh.fsdp=5 does not divide model.hidden_size=192",
    "--mesh.data 1 --mesh.context 3": "mesh.context=3 does not divide train.context_length=256",
    "--mesh.data 1 --train.micro_batch_size 3": "train.micro_batch_size=3",
    "--mesh.data 2 --mesh.state 3": "mesh.state x mesh.fsdp = 2 x 3 x 1 = 6 does not divide",
    "--mesh.data 1 --mesh.state 2 --train.micro_batch_size 3": "on 2 batch shards makes 6 rows",
    "--mesh.data 1 --mesh.state 5": "mesh.state=5 does not divide model.hidden_size / mesh.fsdp = "
    "192; on as many devices, mesh.state 1 and mesh.data 5 do",
    "--mesh.data 1 --mesh.fsdp 2 --mesh.state 64": "/ mesh.fsdp = 96; on as many devices, "
    "mesh.state 32 and mesh.data 2 do",
    "--mesh.data 1 --mesh.state 2 --resilience.check_every 9": "resilience.check_every=9 compares "
    "copies of the state, and with mesh.data=1 and mesh.state=2 there is one; set mesh.data to 2",
    "--mesh.data -1 --mesh.state -1": "one of them -1 at most",
    "--mesh.data -1 --mesh.fsdp -1": "one of them -1 at most",
    "--optimizer.warmup_steps 2000": "optimizer.warmup_steps=2000 exceeds train.num_steps=",
    "--optimizer.beta2 1.0": "optimizer.beta2=1.0",
    "--train.seed -1": "train.seed=-1",
    "--train.num_steps 0": "train.num_steps=0",
    "--checkpoint.every 100 --checkpoint.keep_every 150": "checkpoint.keep_every=150",
    "--profile.steps [5]": "profile.steps=[5]",
    "--model 3": "model",
    "stray": "stray",
}


@pytest.mark.parametrize("options", REFUSED, ids=str)
def test_a_contradiction_is_refused_with_both_values(options):
    with pytest.raises(ConfigError) as error:
        parse("--config", TINY, *options.split())
    assert REFUSED[options] in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {hiden_size: 8}", "nearest is 'model.hidden_size'"),
        ("modle: {hidden_size: 8}", "there is no setting 'modle'"),
        ("model: 8", "model is a section"),
        ("- 1", "must hold settings by name"),
        ("model: [", "is no YAML"),
        ("", "wrong.yaml holds no settings"),
        ("# nothing", "wrong.yaml holds no settings"),
        ("null", "wrong.yaml holds no settings"),
        ("[]", "must hold settings by name"),
        ("model: {num_layers: 1, num_layers: 2}", "'num_layers' is set twice"),
        ("model: {num_layers: 1}\ntrain: {seed: 1}\nmodel: {num_heads: 2}", "'model' is set twice"),
        (b"\xff\xfe\x00", "line 1 is no UTF-8 (byte 0xff)"),
        ("train: &t {seed: 1}\nmodel: *t", "wrong.yaml, line 1: &t is an anchor, which settings"),
        ("train:\n  seed: *t", "wrong.yaml, line 2: *t is an alias, which settings may not have"),
        ("run_dir: " + "a" * (1 << 20), "wrong.yaml has over 1,048,576 bytes"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"wrong\.yaml|section") as error:
        load_config(path)
    assert message in str(error.value)


def test_nothing_is_imported_that_settings_name(tmp_path, monkeypatch):
    """jsonargparse imports the module of a class_path before it refuses the class."""
    (tmp_path / "planted.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Model: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    value = '{"class_path": "planted.Model"}'
    file = tmp_path / "part.yaml"
    file.write_text("class_path: planted.Model\n")
    parser = make_parser("train", "")
    sections = [
        item.name for item in dataclasses.fields(Config) if item.default_factory is item.type
    ]
    assert len(sections) == 14
    for name in ("class_path", *sections, "data.train", "sample.prompts", "evaluate.subjects"):
        keys = [] if name == "class_path" else name.split(".")
        inside = [f"{'  ' * depth}{key}:\n" for depth, key in enumerate(keys)]
        whole = tmp_path / "whole.yaml"
        whole.write_text(f"{''.join(inside)}{'  ' * len(keys)}class_path: planted.Model\n")
        monkeypatch.setenv(f"TRAIN_{name.replace('.', '__').upper()}", value)
        for argv in (
            ["--config", str(whole)],
            ["--config", TINY, f"--{name}", str(file)],
            ["--config", TINY, f"--{name}={value}"],
            ["--config", TINY, f"--{name}+", value],
            ["--config", TINY, f"--{name}.class_path", "planted.Model"],
        ):
            # A prompt may be any text.
            with contextlib.suppress(ConfigError):
                parse_config(parser, argv)
                assert "." in name
            assert not (tmp_path / "mark").exists(), argv
    # Nor is a setting read from the environment.
    assert parse("--config", TINY).run_dir == "runs/tiny"
    assert not (tmp_path / "mark").exists()


def test_a_number_that_python_cannot_write_is_refused(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(f"train: {{seed: 0x{'f' * 20_000}}}")
    with pytest.raises(ConfigError, match=r"train\.seed=0xfff.*\.\.\. is too large"):
        load_config(path)


def test_settings_that_share_a_value_are_written_without_aliases():
    shared = {"a.jsonl": 1.0}
    config = dataclasses.replace(
        load_config(TINY), data=DataConfig(train=shared, validation=shared)
    )
    text = dump_config(config)
    assert "&" not in text
    assert parse_yaml(text, "it")["data"]["validation"] == shared


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"no configuration file 'nowhere.yaml'"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize("given", ["--config", "--config="])
def test_settings_through_a_pipe_are_refused_with_the_reason(given):
    reader, writer = os.pipe()
    try:
        path = f"/dev/fd/{reader}"
        argv = [given, path] if given == "--config" else [given + path]
        with pytest.raises(ConfigError, match=rf"{path} is a folder, a pipe or a device, and must"):
            parse(*argv)
    finally:
        os.close(reader)
        os.close(writer)


def test_an_argument_is_utf8_in_every_locale(monkeypatch):
    """LC_ALL=C: Python reads an argument's bytes as ASCII, and keeps the others as halves."""
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    assert given_text("春".encode().decode("ascii", "surrogateescape") + "a", "--prompt") == "春a"
    assert given_text("春", "--prompt") == "春"
    for text in ("a\udcff", "\ud83d"):
        with pytest.raises(ConfigError, match="--prompt must be UTF-8"):
            given_text(text, "--prompt")


def test_a_folder_with_the_name_of_a_configuration_hides_nothing(tmp_path, monkeypatch):
    """As a user may call the folder of a run."""
    monkeypatch.chdir(tmp_path)
    named = parse("--config", "tiny")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "mine").mkdir()
    assert parse("--config", "tiny") == named
    with pytest.raises(ConfigError, match="there is no configuration 'mine'; give a file, or one"):
        parse("--config", "mine")
    (tmp_path / "tiny").rmdir()
    (tmp_path / "tiny").write_text("train: {num_steps: 7000}")
    assert parse("--config", "tiny").train.num_steps == 7000


def test_an_override_without_a_value_is_refused():
    with pytest.raises(ConfigError, match="name=value"):
        load_config(TINY, ["train.num_steps"])


@pytest.mark.parametrize("value", ["9" * 5000, "[" + "1, " * 5000 + "x]", '"' + "春 " * 5000])
def test_a_message_about_a_long_value_is_short(value):
    for name in ("data.validation", "data.skip", "train.seed", "mesh.data"):
        with pytest.raises(ConfigError, match=name.split(".")[1]) as caught:
            parse(f"--{name}", value)
        assert len(str(caught.value)) < 700


def test_mesh_fills_in_what_is_left_or_names_both_numbers():
    assert MeshConfig(-1, 2, 1, 2).resolve(8).shape == (2, 1, 2, 1, 2)
    with pytest.raises(ConfigError, match="there are 6"):
        MeshConfig(-1, 4, 1, 1).resolve(6)
    with pytest.raises(ConfigError, match="needs 8 devices and there are 4"):
        MeshConfig(2, 2, 2, 1).resolve(4)
    with pytest.raises(ConfigError, match=r"\(2, 3, 2, 1, 1\) needs 12 devices and there are 8"):
        MeshConfig(2, 2, state=3).resolve(8)
    # Replicas that share a copy, among all that are left or all that are left themselves.
    assert MeshConfig(1, 2, state=-1).resolve(8).shape == (1, 4, 2, 1, 1)
    assert MeshConfig(-1, 2, state=4).resolve(16).shape == (2, 4, 2, 1, 1)
    # As a launch without some of its nodes has it.
    with pytest.raises(
        ConfigError, match=r"\(data, state, .*\)=\(-1, 4, .* multiple of 8 .* are 12"
    ):
        MeshConfig(-1, 2, state=4).resolve(12)


def test_copies_are_compared_where_the_mesh_that_is_filled_in_has_some():
    config = load_config(TINY, ["mesh.data=1", "mesh.state=-1", "resilience.check_every=9"])
    config.check_mesh(config.mesh.resolve(1))
    with pytest.raises(ConfigError, match=r"mesh\.data=1 and mesh\.state=4 there is one"):
        config.check_mesh(config.mesh.resolve(4))
    config = load_config(TINY, ["mesh.state=2", "resilience.check_every=9"])
    config.check_mesh(config.mesh.resolve(8))
    # A launch that has lost three of four nodes.
    with pytest.raises(ConfigError, match=r"resilience\.check_every 0"):
        config.check_mesh(config.mesh.resolve(2))


def test_without_some_nodes_a_device_has_as_many_rows_in_a_pass():
    config = load_config(TINY, ["mesh.data=1", "mesh.state=-1"])
    full, part = config.mesh.resolve(8), config.mesh.resolve(2)
    assert full.batch_shards == 8
    config = dataclasses.replace(config, mesh=part).on_part(full)
    assert config.train.micro_batch_size == config.train.global_batch_size // 8
    assert config.accumulation_steps(part) == 4


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for key in KEYS:
        assert f"--{key}" in text
    assert "Rows a device holds in one forward and backward pass" in " ".join(text.split())


def test_print_config_prints_what_would_run(capsys):
    with pytest.raises(SystemExit):
        parse("--config", TINY, "--train.num_steps", "77", "--print_config")
    assert "num_steps: 77" in capsys.readouterr().out
