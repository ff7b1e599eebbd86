"""Every setting refuses a wrong value when it is read, or when a launch begins, not after steps."""

import argparse
import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from conftest import sentencepiece_defaults

from baichuan_jax.config.files import KEYS, load_config, make_parser, parse_config
from baichuan_jax.config.parsing import environment_number, show
from baichuan_jax.config.schema import (
    Config,
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    at_least,
    between,
)
from baichuan_jax.hardware.accelerators import parse_topology
from baichuan_jax.resilience.placement import Placement
from baichuan_jax.runs.folder import Run
from baichuan_jax.train import train

LEAVES = [key for key in KEYS if not any(other.startswith(key + ".") for other in KEYS)]

# By setting: values that no run can have. What is not here is known at a launch only (below).
WRONG: dict[str, list[Any]] = {
    "run_dir": [""],
    "init_from": [""],
    "model.vocab_size": [0, -1, 2.5, "many"],
    "model.hidden_size": [0, 7],
    "model.intermediate_size": [0],
    "model.num_layers": [0],
    "model.num_heads": [0, 5],
    "model.rms_norm_eps": [-1e-6, ".nan", ".inf"],
    "model.rope_theta": [0, ".nan", ".inf"],
    "model.initializer_range": [0, -0.02, ".nan"],
    "model.pad_token_id": [-1, 512],
    "model.dtype": ["float16"],
    "model.remat": ["some"],
    "model.scan_layers": ["maybe"],
    "train.num_steps": [0, 1.5],
    "train.context_length": [0],
    "train.global_batch_size": [0],
    "train.micro_batch_size": [0],
    "train.loss_chunk_size": [0],
    "train.z_loss": [-1, ".nan", ".inf"],
    "train.seed": [-1, 1 << 63],
    "train.gradient_dtype": ["float16", "1"],
    "train.deterministic": ["maybe"],
    "train.schedule_profile": [""],
    "optimizer.learning_rate": [0, -1e-3, ".nan", ".inf"],
    "optimizer.final_learning_rate_ratio": [-0.1, 1.1, ".nan"],
    "optimizer.warmup_steps": [-1, 9],
    "optimizer.beta1": [-0.1, 1, ".nan"],
    "optimizer.beta2": [-0.1, 1, ".nan"],
    "optimizer.eps": [0, ".nan"],
    "optimizer.weight_decay": [-0.1, ".nan", ".inf"],
    "optimizer.decay_norms": ["maybe"],
    "optimizer.clip_norm": [0, ".nan", ".inf"],
    "tokenizer.path": [""],
    "tokenizer.vocab_size": [260, 0, 513],
    "data.train": [
        '{"a": 1e300, "b": 1e-300}',
        '{"text.jsonl": 0}',
        '{"text.jsonl": .inf}',
        '{"": 1}',
        "text.jsonl",
    ],
    "data.validation": ['{"text.jsonl": -1}', '{"text.jsonl": .nan}'],
    "data.text_field": [""],
    "data.cache_dir": [""],
    "data.document_mask": ["maybe"],
    "data.num_workers": [-1],
    "data.skip": ["[[5, 5]]", "[[-1, 5]]", "[[5]]", "[5, 6]"],
    "mesh.data": [0, -2],
    "mesh.fsdp": [0, 3],
    "mesh.context": [0, 3],
    "mesh.tensor": [0, 3],
    "mesh.state": [0, 3],
    "kernels.attention": ["fastest"],
    "kernels.rms_norm": ["fastest"],
    "checkpoint.every": [0],
    "checkpoint.keep_last": [0],
    "checkpoint.keep_every": [0],
    "checkpoint.local_dir": ["/somewhere", ""],
    "checkpoint.local_every": [0, 1, 2],
    "evaluate.every": [0],
    "evaluate.num_batches": [0],
    "evaluate.tasks": ['{"mmul": "somewhere"}'],
    "evaluate.subjects": ['{"mmlu": ["anatomy"]}'],
    "evaluate.limit": [0],
    "sample.prompts": ['["It was", ""]', '["a", "b", "a"]', "[1]"],
    "sample.max_new_tokens": [0, -1],
    "metrics.tensorboard": ["maybe"],
    "metrics.wandb_project": [""],
    "metrics.peak_tflops": [0, ".nan"],
    "profile.steps": ["[5]", "[0, 2]", "[3, 2]", "[9, 10]", "[7, 9]"],
    "resilience.hang_seconds": [0, ".nan", ".inf"],
    "resilience.start_seconds": [0, ".nan"],
    "resilience.silence_seconds": [0, ".nan"],
    "resilience.spike_deviations": [-1, ".nan"],
    "resilience.max_skips": [-1],
    "resilience.check_every": [-1],
    "distributed.coordinator_address": ["host", "host:", ":1234", "host:port", "host:70000"],
    "distributed.num_processes": [0],
    "distributed.process_id": [-1],
}


def parts(kind: Any) -> tuple[Any, ...]:
    """The kinds that a union has; of another, itself."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def read(*options: str) -> Config:
    """A small configuration, read as a command reads it; the mesh is one of eight devices."""
    small = {
        "model.vocab_size": 512,
        "model.hidden_size": 64,
        "model.intermediate_size": 176,
        "model.num_layers": 1,
        "model.num_heads": 4,
        "model.dtype": "float32",
        "train.num_steps": 8,
        "train.context_length": 32,
        "train.global_batch_size": 8,
        "data.train": json.dumps({"a.txt": 1.0}),
        "optimizer.warmup_steps": 1,
        "tokenizer.vocab_size": 512,
        "mesh.data": 1,
        "metrics.tensorboard": "false",
    }
    first = [f"--{key}={value}" for key, value in small.items()]
    return parse_config(make_parser("train", ""), [*first, *options])


def kinds(cls: type, prefix: str = "") -> dict[str, Any]:
    """The annotation of every setting."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        inner = dataclasses.is_dataclass(item.type)
        name = f"{prefix}{item.name}"
        found |= kinds(item.type, f"{name}.") if inner else {name: item.type}
    return found


# By argv and file; what the dataclasses themselves refuse is below.
@pytest.mark.parametrize(
    "text",
    [
        "train: {num_steps: }",
        "model: {scan_layers: }",
        "model: {dtype: null}",
        "optimizer: {clip_norm: }",
        "data: {train: }",
        "data: {train: {a: }}",
        "data: {train: {a: .nan}}",
        "sample: {prompts: [null]}",
        "resilience: {spike_deviations: .inf}",
        # YAML 1.1 has numbers of base 60 and of base 8.
        "train: {context_length: 12:30}",
        "optimizer: {learning_rate: 1:30.5}",
        "evaluate: {every: 010}",
    ],
)
def test_a_file_means_what_its_reader_thinks(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "a.yaml")
    assert "base 8 or 60" in str(error.value) or "010" not in text
    name = text.replace("{", " ").split()[1].strip(":")
    said = str(error.value)
    assert name in said or f"{tmp_path}/a.yaml" in said, said


def refusal(*options: str) -> str:
    with pytest.raises(ConfigError) as error:
        read(*options)
    return str(error.value)


def test_null_is_a_value_where_a_setting_may_be_unset(tmp_path):
    (tmp_path / "a.yaml").write_text("run_dir:\ncheckpoint: {every: }\nmodel: {pad_token_id: }\n")
    assert load_config(tmp_path / "a.yaml").checkpoint.every is None
    assert read("--run_dir=12:30").run_dir == "12:30"
    assert "base 60" in refusal("--evaluate.every=12:30")
    assert "base 60" in refusal("--optimizer.learning_rate", "1:30")
    assert read("--train.num_steps=0x10", "--data.num_workers=1_0").train.num_steps == 16


SECTIONS = {key: section for key, section in kinds(Config).items() if key.count(".") == 1}


@pytest.mark.parametrize("key", SECTIONS)
def test_a_number_that_no_machine_can_count_to_or_compute_with_is_refused(key):
    """Sizes and steps up to 2^31 - 1, others within float32."""
    section, name = key.split(".")
    wrong: tuple[Any, ...] = ()
    if int in parts(SECTIONS[key]):
        wrong = (1 << 31, 1 << 62)
    elif float in parts(SECTIONS[key]):
        wrong = (1e300, math.inf, math.nan)
    elif key in ("profile.steps", "data.skip"):
        wrong = ([1, 1 << 31],) if key == "profile.steps" else ([[1, 1 << 31]],)
    for value in wrong if key != "train.seed" else (1 << 63,):
        with pytest.raises(ConfigError, match=name if section != "mesh" else "mesh"):
            dataclasses.replace(getattr(Config(), section), **{name: value})


def test_a_number_that_float32_rounds_to_0_or_1_is_refused():
    for key in ("learning_rate", "eps", "clip_norm"):
        with pytest.raises(ConfigError, match=key):
            OptimizerConfig(**{key: 1e-300})
    for key in ("beta1", "beta2"):
        with pytest.raises(ConfigError, match=key):
            OptimizerConfig(**{key: 1 - 1e-9})


def test_every_setting_has_a_wrong_value():
    assert sorted(WRONG) == sorted(LEAVES)
    assert read().train.num_steps == 8  # it is the wrong value alone that is refused
    # As messages about weights advise.
    assert read("--model.pad_token_id", "null").model.pad_token_id is None
    assert read("--model.rms_norm_eps", "1e-06").model.rms_norm_eps == 1e-6


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_refused_when_it_is_read(key):
    for value in WRONG[key]:
        with pytest.raises(ConfigError) as error:
            read(f"--{key}={value}")
        assert key.rpartition(".")[2] in str(error.value), (value, str(error.value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"checkpoint: {{every: {10**40}}}", r"^checkpoint\.every=1000.* is too large"),
        (f"data: {{skip: [[0, {1 << 63}]]}}", r"^data\.skip=9223372036854775808 is too large"),
        (f"evaluate: {{limit: {1 << 63}}}", r"^evaluate\.limit=.* is too large"),
        (f"optimizer: {{learning_rate: {10**400}}}", r"a\.yaml .* is too large"),
        (f"data: {{train: {{a: {10**400}}}}}", r"a\.yaml .* is too large"),
        ('run_dir: "a\\0b"', r"^run_dir=.* the character 0"),
        ('data: {train: {"a\\0": 1}}', r"^data\.train=.* the character 0"),
    ],
)
def test_what_no_number_and_no_name_can_be_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "a.yaml")


def test_a_value_of_any_size_is_shown_by_its_beginning():
    value = [{f"key {n}": ["x" * 99] * 9 for n in range(9)}] * 9
    assert len(show(value)) <= 300
    assert show(3) == "3"


def test_a_refusal_is_one_line_whatever_it_quotes():
    assert str(ConfigError("a\nb\x1b[0m\u2028")) == "a\\nb\\x1b[0m\\u2028"


def test_a_notebook_is_refused_alike(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {num_steps: 8}\noptimizer: {warmup_steps: 1}\n")
    for override in ("sample.max_new_tokens=0", "optimizer.clip_norm=.inf"):
        with pytest.raises(ConfigError, match=r"must be (greater than 0|a finite number)"):
            load_config(tmp_path / "a.yaml", [override])


# What only a launch can know: files, the environment, devices, the tokenizer.
AT_A_LAUNCH = {
    "--run_dir {file}": "run_dir=",
    "--init_from {nowhere}": "neither a run's folder",
    "--tokenizer.path {nowhere}": "there is no tokenizer",
    '--data.train {{"{nowhere}":1}}': "nowhere",
    '--data.validation {{"{nowhere}":1}}': "nowhere",
    "--data.text_field body": "body",
    "--data.cache_dir {file}": "cache_dir",
    "--checkpoint.local_every 2 --checkpoint.local_dir $NOT_SET_HERE/x": "is not set on this host",
    '--evaluate.tasks {{"mmlu":"{nowhere}"}}': "nowhere",
    '--evaluate.tasks {{"mmlu":"{nowhere}"}} --evaluate.subjects {{"mmlu":["anatmy"]}}': "anatmy",
    "--kernels.attention cudnn": "cudnn",
    "--kernels.rms_norm pallas": "pallas",
    "--mesh.data 3 --train.global_batch_size 9": "needs 3 devices and there are 8",
    '--tokenizer.path {squeezes} --sample.prompts ["\\u200b"]': "makes no token of it",
    '--tokenizer.path {squeezes} --sample.prompts [" "]': "makes no token of it",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus, a file that is no folder, and a tokenizer that squeezes white space."""
    folder = tmp_path_factory.mktemp("wrong")
    text = "It was a truth universally acknowledged, that a single man in possession of a good "
    texts = [f"{text}fortune {i} must be in want of a wife." for i in range(60)]
    lines = [json.dumps({"text": each}) for each in texts]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "file").write_text("")
    (folder / "squeezes.model").write_bytes(sentencepiece_defaults(text))
    return folder


@pytest.mark.parametrize("options", AT_A_LAUNCH)
def test_a_launch_refuses_before_its_first_step(folder, tmp_path, options):
    names = {"file": folder / "file", "nowhere": "nowhere", "squeezes": folder / "squeezes.model"}
    given = options.format(**names).replace('[" "]', '["\\u3000"]').split()
    config = read(
        f'--data.train={{"{folder}/text.jsonl": 1.0}}',
        f"--data.cache_dir={folder}/cache",
        "--tokenizer.vocab_size=300",
        "--mesh.data=8",
        f"--run_dir={tmp_path}/run",
        *given,
    )
    with pytest.raises(ConfigError) as error:
        train(config)
    assert AT_A_LAUNCH[options] in str(error.value)
    assert not Run(tmp_path / "run").metrics
    assert not list(Path().glob("$*"))


@pytest.mark.parametrize("text", ["abc", "1.5", "-1", str(1 << 31), "9" * 5000, "nan", ""])
def test_an_option_that_is_no_count_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number"):
        at_least(0)(text)


@pytest.mark.parametrize("text", ["abc", "nan", "inf", "1e300", "1e-300", "0", "-1", "0x1"])
def test_an_option_that_is_no_number_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a number from 1e-30 to 1e"):
        between()(text)


@pytest.mark.parametrize("text", ["abc", "1.0", "-1", "9" * 5000])
def test_a_variable_that_is_no_count_is_refused(monkeypatch, text):
    """What a scheduler's template leaves in the environment; empty is unset."""
    monkeypatch.setenv("JAX_PROCESS_ID", "")
    assert Placement.from_environment().process == 0
    for variable in ("JAX_PROCESS_ID", "SLURM_NTASKS", "SLURM_NNODES"):
        monkeypatch.setenv(variable, text)
        with pytest.raises(ConfigError, match=f"^{variable}=.* must be a whole number"):
            environment_number(variable)
    with pytest.raises(ConfigError, match=r"^JAX_PROCESS_ID="):
        Placement.from_environment()


@pytest.mark.parametrize(
    "name", ["a800:9999999x9999999", "a800:1" + "0" * 5000, "v5p:99999x9999x9"]
)
def test_a_cluster_that_nobody_has_is_refused(name):
    with pytest.raises(ConfigError, match=r"^topology="):
        parse_topology(name)


def test_blocks_are_compiled_one_by_one_only_where_there_are_few():
    """The compiler takes minutes for a few hundred, and all memory for some thousands."""
    sizes = {"hidden_size": 8, "num_heads": 2, "vocab_size": 512}
    ModelConfig(num_layers=20_000, **sizes)
    ModelConfig(num_layers=256, scan_layers=False, **sizes)
    with pytest.raises(ConfigError, match=r"scan_layers=false .*num_layers=257 .*scan_layers true"):
        ModelConfig(num_layers=257, scan_layers=False, **sizes)
