"""Import and export of Hugging Face folders.

Every published form imports alike, what is wrong with one is named, and an export comes back.
"""

import dataclasses
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import sentencepiece
from conftest import build
from flax import nnx
from launches import REPOSITORY, environment, run_module
from safetensors.numpy import load_file, save_file

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.hf.__main__ import main
from baichuan_jax.hf.config import read_config, read_facts
from baichuan_jax.hf.files import open_tensors, own_file
from baichuan_jax.hf.source import find_tokenizer, read_source
from baichuan_jax.hf.weights import export, import_params, load_pretrained, weights_sha256
from baichuan_jax.sharding import Layout
from baichuan_jax.tokenizer import Tokenizer

TINY = Path(__file__).parents[1] / "golden" / "tiny"
EXAM = TINY.with_name("exam") / "tokenizer.model"


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def params():
    return import_params(TINY)


@pytest.fixture
def copy(tmp_path):
    """The whole-file safetensors form, to damage."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, tmp_path / name)
    return tmp_path


def read_header(path):
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path, header, data):
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def test_shards_hold_the_same_as_the_whole(params, tmp_path):
    shutil.copytree(
        TINY / "sharded", tmp_path / "safetensors", ignore=shutil.ignore_patterns("*.bin*")
    )
    assert_equal(import_params(tmp_path / "safetensors"), params)


def test_of_several_forms_the_one_that_transformers_takes_is_read_and_hashed(params, tmp_path):
    """The whole file before an index; and the hash is of what is read, not of what lies there."""
    shutil.copytree(TINY / "sharded", tmp_path, dirs_exist_ok=True)
    sharded = weights_sha256(read_source(tmp_path))
    whole = load_file(TINY / "model.safetensors")
    whole["model.norm.weight"] = whole["model.norm.weight"] + 1
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    found = import_params(tmp_path)
    np.testing.assert_array_equal(found["final_norm"], params["final_norm"] + 1)
    found_hash = weights_sha256(read_source(tmp_path))
    assert found_hash != sharded
    for name in ("adapter.safetensors", "training_args.bin"):
        (tmp_path / name).write_bytes(b"no weights of this model")
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    assert weights_sha256(read_source(tmp_path)) == found_hash


def test_an_export_goes_where_a_link_leads(params, tmp_path):
    """A new folder cannot replace a link: all would be written, and lost."""
    config = read_config(TINY)
    (tmp_path / "empty").mkdir()
    for name, target in (("to_empty", "empty"), ("to_nothing", "new"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
    for name, target in (("to_empty", "empty"), ("to_nothing", "new")):
        export(params, config, tmp_path / name, dtype="float32")
        assert (tmp_path / name).is_symlink()
        assert read_config(tmp_path / target) == config
    with pytest.raises(ConfigError, match="loop cannot be an output"):
        export(params, config, tmp_path / "loop")
    with pytest.raises(ConfigError, match="empty exists and is not empty"):
        main(["import", str(TINY), str(tmp_path / "to_empty")])


def test_torch_files_hold_the_same(params, tmp_path):
    pytest.importorskip("torch")
    shutil.copytree(
        TINY / "sharded", tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors*")
    )
    assert_equal(import_params(tmp_path / "bin"), params)
    (tmp_path / "whole").mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copy(TINY / name, tmp_path / "whole" / name)
    assert_equal(import_params(tmp_path / "whole"), params)
    os.truncate(tmp_path / "whole" / "pytorch_model.bin", 300_000)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin cannot be read"):
        import_params(tmp_path / "whole")


def test_a_torch_file_without_torch_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copy(TINY / name, tmp_path / name)
    with pytest.raises(ConfigError, match="pip install torch"):
        import_params(tmp_path)


def test_bfloat16_is_the_rounded_float32(params):
    rounded = jax.tree.map(
        lambda x: np.asarray(x.astype(jax.numpy.bfloat16).astype(np.float32)), params
    )
    assert_equal(import_params(TINY / "bf16"), rounded)


def test_matrices_held_in_bfloat16_give_the_logits_of_float32_ones(params):
    ids = np.load(TINY / "parity.npz")["A_ids"]
    model = load_pretrained(TINY, dtype="bfloat16")
    assert model.embedding.dtype == model.layers.w_up.dtype == "bfloat16"
    assert model.final_norm.dtype == "float32"
    logits = np.asarray(model(ids))
    nnx.update(model, params)
    np.testing.assert_array_equal(logits, model(ids))


def test_tensors_arrive_sharded(params, tiny_config):
    config = read_config(TINY)
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (2, 64, 512)
    assert config.pad_token_id == 0
    _, steps = build(tiny_config, (2, 2, 1, 2))
    sharded = import_params(TINY, Layout(steps.layout.mesh))
    assert_equal(sharded, params)
    assert sharded["layers"]["w_pack"].sharding == steps.state_shardings.params["layers"]["w_pack"]


@pytest.mark.parametrize("form", ["llama", "baichuan"])
@pytest.mark.parametrize("max_shard_bytes", [100_000, 1 << 30])
def test_export_comes_back_bit_for_bit(params, tmp_path, form, max_shard_bytes):
    config = read_config(TINY)
    options = {"dtype": "float32", "form": form, "max_shard_bytes": max_shard_bytes}
    export(params, config, tmp_path / "out", **options)
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (max_shard_bytes == 100_000)
    assert read_config(tmp_path / "out") == config
    assert_equal(import_params(tmp_path / "out"), params)
    with pytest.raises(ConfigError, match="exists"):
        export(params, config, tmp_path / "out")


def test_transformers_computes_the_same_logits_from_an_export(params, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    export(params, read_config(TINY), tmp_path / "out", dtype="float32")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id) == (2, 0)
    ids = np.load(TINY / "parity.npz")["A_ids"]
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(load_pretrained(tmp_path / "out")(ids), wanted, atol=2e-5)
    # With rope_parameters and head_dim in its config.json.
    theirs.save_pretrained(tmp_path / "saved")
    assert read_config(tmp_path / "saved") == read_config(TINY)
    assert_equal(import_params(tmp_path / "saved"), params)


def test_export_fills_an_empty_folder_and_brings_the_tokenizer(params, tmp_path):
    (tmp_path / "out").mkdir()
    export(params, read_config(TINY), tmp_path / "out", tokenizer=Tokenizer(EXAM))
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == EXAM.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["out"]
    assert_equal(import_params(tmp_path / "out"), import_params(TINY / "bf16"))


def make_model(path: Path, **options: Any) -> Path:
    """A SentencePiece model of 300 pieces, of a kind that is not this program's."""
    model = io.BytesIO()
    lines = ["It was a truth universally acknowledged, 天下大勢，分久必合"] * 9
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


# T5's order: </s> is 1, there is no BOS, and <unk> is 2.
OTHER_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


@pytest.fixture
def other(tmp_path) -> Path:
    """A Hugging Face folder of the golden model with a tokenizer of other special tokens."""
    tokenizer = Tokenizer(make_model(tmp_path / "spm", **OTHER_IDS))
    options: Any = {"tokenizer": tokenizer, "facts": {"max_position_embeddings": 16384}}
    export(import_params(TINY), read_config(TINY), tmp_path / "other", dtype="float32", **options)
    return tmp_path / "other"


@pytest.mark.parametrize("form", ["llama", "baichuan"])
def test_an_export_says_what_its_tokenizer_and_its_training_were(other, tmp_path, form):
    weights, again = str(tmp_path / "weights"), tmp_path / "again"
    assert main(["import", str(other), weights]) == 0
    assert main(["export", weights, str(again), "--form", form, "--dtype", "float32"]) == 0
    found = json.loads((again / "config.json").read_text())
    wanted = {
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "max_position_embeddings": 16384,
        "torch_dtype": "float32",
    }
    assert {key: found[key] for key in wanted} == wanted
    generation = json.loads((again / "generation_config.json").read_text())
    assert generation == {key: wanted[key] for key in generation}
    tokenizer = json.loads((again / "tokenizer_config.json").read_text())
    assert (tokenizer["add_bos_token"], tokenizer["add_eos_token"]) == (False, False)
    assert (tokenizer["model_max_length"], tokenizer["legacy"]) == (16384, True)
    pieces = {"bos_token": None, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    assert {key: tokenizer[key] for key in pieces} == pieces
    assert json.loads((again / "special_tokens_map.json").read_text()) == pieces
    # The original's classes are files beside the weights.
    assert ("auto_map" in found, "auto_map" in tokenizer) == ((form == "baichuan"),) * 2
    if form == "llama":
        assert tree(again) == tree(other)  # the first export: a fixed point


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_transformers_encodes_and_stops_as_the_tokenizer_does(other):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(other, local_files_only=True)
    ours = Tokenizer(other / "tokenizer.model")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (None, 1, 0)
    assert len(theirs) == ours.vocab_size  # no default was added
    for text in (
        "It was a truth",
        "天下大勢，\n分久必合",
        "if x:\n    y",
        "a  b ",
        "🦜龘 12",
        "\t",
    ):
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(other, local_files_only=True)
    assert model.generation_config.eos_token_id == ours.eos_id
    # A head that prefers </s> to all others: the first new token is the last.
    with torch.no_grad():
        last = model.model(torch.tensor([[5, 6]])).last_hidden_state[0, -1]
        model.lm_head.weight[:] = 0
        model.lm_head.weight[ours.eos_id] = last
    out = model.generate(torch.tensor([[5, 6]]), max_new_tokens=5, do_sample=False)
    assert out.tolist() == [[5, 6, ours.eos_id]]


def test_config_json_and_the_tokenizer_beside_it_must_agree(other):
    config = json.loads((other / "config.json").read_text())
    assert find_tokenizer(read_source(other)).eos_id == 1
    for eos in ([1, 7], None):
        (other / "config.json").write_text(json.dumps({**config, "eos_token_id": eos}))
        assert find_tokenizer(read_source(other)).eos_id == 1
    for wrong in ("1", [True], {}):
        (other / "config.json").write_text(json.dumps({**config, "eos_token_id": wrong}))
        with pytest.raises(ConfigError, match="which must be a whole number"):
            find_tokenizer(read_source(other))
    (other / "config.json").write_text(json.dumps({**config, "eos_token_id": 2}))
    with pytest.raises(ConfigError, match=r"has eos_token_id=2 and .*tokenizer\.model has 1"):
        find_tokenizer(read_source(other))


def test_weights_that_saw_a_bos_say_so(other, tmp_path):
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    main(["import", str(other), str(tmp_path / "weights")])
    for folder in (other, tmp_path / "weights"):
        assert "add_bos_token=true" in find_tokenizer(read_source(folder)).warnings[0]
    main(["export", str(tmp_path / "weights"), str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["add_bos_token"]


def test_every_form_of_folder_brings_its_tokenizer_or_is_refused(other, tmp_path, capfd):
    weights = tmp_path / "in" / "weights"
    assert main(["import", str(other), str(weights)]) == 0
    own = find_tokenizer(read_source(weights))
    assert own.hash == find_tokenizer(read_source(other)).hash
    wrong = make_model(tmp_path / "wrong.model", bos_id=1, eos_id=2, unk_id=0)
    for folder in (other, weights):
        with pytest.raises(ConfigError, match=rf"was trained with tokenizer {own.hash[:12]}"):
            find_tokenizer(read_source(folder), wrong)
        assert find_tokenizer(read_source(folder), own.path).hash == own.hash
        (folder / "tokenizer.model").unlink()
    # The hash is recorded, so a file above may serve, and another one is noticed.
    shutil.copy(wrong, tmp_path / "in" / "tokenizer.model")
    with pytest.raises(ConfigError, match="was trained with tokenizer"):
        find_tokenizer(read_source(weights))
    with pytest.raises(ConfigError, match="was trained with tokenizer"):
        main(["export", str(weights), str(tmp_path / "out")])
    (tmp_path / "in" / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match=rf"begins with {own.hash[:12]}\): --tokenizer FILE"):
        main(["export", str(weights), str(tmp_path / "out")])
    main(["export", str(weights), str(tmp_path / "out"), "--tokenizer", str(tmp_path / "spm")])
    # Nothing is known of a folder of Hugging Face: a file above it may be of any model.
    shutil.copy(tmp_path / "spm", tmp_path / "tokenizer.model")
    with pytest.raises(ConfigError, match=r"give the one .* with: --tokenizer FILE"):
        find_tokenizer(read_source(other))
    capfd.readouterr()
    main(["import", str(other), str(tmp_path / "bare")])
    main(["export", str(tmp_path / "bare"), str(tmp_path / "bare_hf")])
    assert capfd.readouterr().err.count("without a tokenizer") == 2
    found = json.loads((tmp_path / "bare_hf" / "config.json").read_text())
    assert (found["eos_token_id"], found["max_position_embeddings"]) == (1, 16384)


def test_the_commands_import_and_export(params, tmp_path, capsys):
    assert main(["import", str(TINY), str(tmp_path / "weights")]) == 0
    assert_equal(load_pretrained(tmp_path / "weights").embedding[...], params["embedding"])
    assert (
        main(["export", str(tmp_path / "weights"), str(tmp_path / "out"), "--dtype", "float32"])
        == 0
    )
    assert_equal(import_params(tmp_path / "out"), params)
    assert f"wrote {tmp_path / 'out'}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="exists"):
        main(["import", str(TINY), str(tmp_path / "weights")])


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    done = run_module("baichuan_jax.hf", "import", str(tmp_path), str(tmp_path / "weights"))
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == f"error: {tmp_path} has no config.json: it is no Hugging Face folder\n"


def test_a_missing_tensor_is_named(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is missing"):
        import_params(copy)


def test_an_extra_tensor_is_named(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.7.mlp.up_proj.weight"] = tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"layers\.7\.mlp\.up_proj\.weight \(64,\) is not of this model"
    ):
        import_params(copy)


def test_a_misshapen_tensor_is_named_with_both_shapes(copy):
    header, data = read_header(copy / "model.safetensors")
    header["model.norm.weight"]["shape"] = [32, 2]
    write_header(copy / "model.safetensors", header, data)
    with pytest.raises(
        ConfigError, match=r"norm\.weight is \(32, 2\) and config\.json makes it \(64,\)"
    ):
        import_params(copy)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (0, "header too small"),
        (4, "header too small"),
        (600, "invalid header length"),
        (400_000, "file not fully covered"),
    ],
)
def test_a_truncated_file_is_named(copy, size, reason):
    os.truncate(copy / "model.safetensors", size)
    with pytest.raises(ConfigError, match=rf"model\.safetensors is damaged, cut short .*{reason}"):
        import_params(copy)


def test_a_damaged_header_is_named(copy):
    file = copy / "model.safetensors"
    header, data = read_header(file)
    file.write_bytes(b"\xff".join([file.read_bytes()[:40], file.read_bytes()[41:]]))
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged.*invalid utf-8"):
        import_params(copy)
    header["model.norm.weight"]["data_offsets"][0] -= 4
    write_header(file, header, data)
    offset = r"model\.safetensors is damaged.*offset for tensor `model\.norm\.weight`"
    with pytest.raises(ConfigError, match=offset):
        import_params(copy)
    header["model.norm.weight"]["data_offsets"][0] += 4
    header["model.norm.weight"]["dtype"] = "I32"
    write_header(file, header, data)
    wrong_type = r"model\.safetensors: model\.norm\.weight is I32; expected one of float32 \(F32\)"
    with pytest.raises(ConfigError, match=wrong_type):
        import_params(copy)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    shutil.copytree(TINY / "sharded", tmp_path / "sharded")
    shutil.copy(
        tmp_path / "sharded" / "model-00001-of-00002.safetensors",
        tmp_path / "sharded" / "model-00002-of-00002.safetensors",
    )
    with pytest.raises(ConfigError, match="and again in"):
        open_tensors(tmp_path / "sharded")


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_damaged_index_is_named(tmp_path, content):
    shutil.copytree(TINY / "sharded", tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json is no index"):
        open_tensors(tmp_path / "sharded")


def test_a_missing_shard_is_named(tmp_path):
    shutil.copytree(TINY / "sharded", tmp_path / "sharded")
    (tmp_path / "sharded" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"not there: model-00002-of-00002\.safetensors"):
        open_tensors(tmp_path / "sharded")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1 for 4 heads"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
            "rope_parameters",
        ),
        (
            {"rope_theta": 10000, "rope_parameters": {"rope_theta": 5e5}},
            r"rope_theta=10000 and rope_parameters\.rope_theta=500000",
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"rope_theta": 5e5}},
            r"rope_theta=10000.0 and rope_scaling\.rope_theta=500000",
        ),
        (
            {"rope_parameters": {"rope_theta": "a"}},
            r"rope_parameters\.rope_theta is 'a' and must be",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 and this model has 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters=.*not scaled"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*before quantisation"),
        ({"compression_config": {}}, "compression_config=.*before quantisation"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"head_dim": 32}, "head_dim=32"),
        # Baichuan-13B, Baichuan2.
        ({"architectures": ["BaichuanForCausalLM"]}, "architecture 'BaichuanForCausalLM'"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4' and must be a whole number"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
    ids=str,
)
def test_what_this_model_cannot_be_is_refused(copy, change, message):
    config = json.loads((copy / "config.json").read_text())
    config = {key: value for key, value in {**config, **change}.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        read_config(copy)


@pytest.mark.parametrize("content", [b"{", b"[]", b"3", b"\xff"], ids=str)
def test_a_damaged_configuration_is_named(copy, content):
    (copy / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(copy)


def test_one_base_in_two_places_is_one(copy):
    config = json.loads((copy / "config.json").read_text())
    rope = {"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 1.0}
    for theta, both in ((5e5, {}), (500000, {"rope_scaling": rope}), (None, {})):
        changed = {**config, **both, "rope_theta": theta, "rope_parameters": rope}
        changed = {key: value for key, value in changed.items() if value is not None}
        (copy / "config.json").write_text(json.dumps(changed))
        assert read_config(copy).rope_theta == 5e5


def test_the_original_s_form_has_no_other_base(params, tmp_path):
    config = dataclasses.replace(read_config(TINY), rope_theta=5e5)
    with pytest.raises(
        ConfigError, match=r"rope_theta=500000 is 10000 in the original's code.*llama"
    ):
        export(params, config, tmp_path / "out", form="baichuan")
    assert not any(tmp_path.iterdir())
    export(params, config, tmp_path / "out")
    assert read_config(tmp_path / "out") == config


def test_a_number_that_the_type_does_not_have_is_refused(params, tmp_path):
    wide = jax.tree.map(lambda leaf: leaf, params)
    wide["final_norm"] = wide["final_norm"].at[3].set(-1e5)
    with pytest.raises(
        ConfigError, match=r"model\.norm\.weight .*up to 1e\+05.*6\.55e\+04 are infinite in float16"
    ):
        export(wide, read_config(TINY), tmp_path / "out", dtype="float16")
    # No half of a folder, under any name.
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    export(wide, read_config(TINY), tmp_path / "out", dtype="bfloat16")


def test_a_negative_padding_token_is_none(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "pad_token_id": -1}))
    assert read_config(copy).pad_token_id is None


def test_a_folder_without_weights_or_configuration_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        open_tensors(tmp_path)


@pytest.mark.slow
def test_memory_stays_near_the_largest_tensor(tmp_path):
    """2.1 GB of float32, in a process of its own: the peak above the parameters.

    On a CPU these are host memory too. One largest tensor is read while the parameters grow, and a
    second one while it is transposed; half a one for everything else.
    """
    script = """
        import json, resource, sys
        from pathlib import Path
        import jax, numpy as np
        from baichuan_jax.config.schema import ModelConfig
        from baichuan_jax.hf.config import make_config
        from baichuan_jax.hf.files import write_safetensors
        from baichuan_jax.hf.names import entries
        from baichuan_jax.hf.weights import export, import_params

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        folder = Path(sys.argv[2])
        sizes = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5504}
        config = ModelConfig(**sizes, num_layers=8, num_heads=16)
        if sys.argv[1] == "make":
            shapes = {}
            for entry in entries(config, True):
                shapes |= entry.tensors
            arrays = (np.full(shape, i, np.float32) for i, shape in enumerate(shapes.values()))
            folder.mkdir()
            write_safetensors(folder, shapes, arrays, "float32", 5 << 30)
            described = make_config(config, "float32", "baichuan")
            (folder / "config.json").write_text(json.dumps(described))
        else:
            jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8))())
            before = peak()
            params = jax.block_until_ready(import_params(folder))
            imported = peak()
            export(params, config, folder / "out", dtype="float32")
            size = sum(x.nbytes for x in jax.tree.leaves(params))
            largest = params["embedding"].nbytes
            assert size > 2e9
            print((imported - before - size) / largest, (peak() - before - size) / largest)
    """

    def run(what):
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), what, str(tmp_path / "big")],
            env=environment(),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=600,
            check=True,
        ).stdout

    try:
        run("make")  # apart: its memory is not the import's
        importing, exporting = map(float, run("read").split())
        print("above the parameters, in largest tensors:", end=" ")
        print(f"import {importing:.2f}, export {exporting:.2f}")
        assert importing < 2.5
        assert exporting < 2.5
    finally:
        shutil.rmtree(tmp_path / "big", ignore_errors=True)


@pytest.mark.parametrize("value", ["true", 1, [True], {}], ids=repr)
def test_a_statement_about_bos_that_is_none_is_refused(tmp_path, value):
    shutil.copy(TINY / "config.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": value}))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: add_bos_token is .* true or"):
        read_facts(tmp_path)


def test_torch_files_that_hold_no_weights_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    for content, reason in (([1], "holds list"), ({"a": 3}, "'a' is int"), ({}, None)):
        torch.save(content, tmp_path / "pytorch_model.bin")
        if reason is None:
            assert open_tensors(tmp_path).shapes == {}
            continue
        with pytest.raises(ConfigError, match=rf"pytorch_model\.bin.*{reason}"):
            open_tensors(tmp_path)


def test_torch_tensors_that_are_no_weights_are_refused_and_parameters_are_read(params, tmp_path):
    """The same types as of safetensors: any other would be cast to numbers that mean nothing."""
    torch = pytest.importorskip("torch")
    shutil.copy(TINY / "config.json", tmp_path)
    file, name = tmp_path / "pytorch_model.bin", "model.norm.weight"
    tensors = torch.load(TINY / "pytorch_model.bin")
    norm = tensors[name]
    for wrong, reason in (
        ((norm * 1000).to(torch.int8), "int8"),
        (norm > 0, "bool"),
        (norm.to(torch.complex64), "complex64"),
        (norm.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (norm.double(), "float64"),
        (norm.to_sparse(), "a sparse, nested or meta tensor"),
        (norm.to("meta"), "a sparse, nested or meta tensor"),
    ):
        torch.save(tensors | {name: wrong}, file)
        with pytest.raises(
            ConfigError, match=rf"pytorch_model\.bin: model\.norm\.weight is {reason}"
        ):
            import_params(tmp_path)
    # Of a training that saved its parameters themselves; a view that is negated when it is read.
    negated = torch.complex(norm, -norm).conj().imag
    assert negated.is_neg()
    for same in (torch.nn.Parameter(norm), negated):
        torch.save(tensors | {name: same}, file)
        assert_equal(import_params(tmp_path), params)


def test_a_link_is_followed_within_its_folder_and_into_the_cache_of_hugging_face(params, tmp_path):
    """Snapshots of the cache are links to blobs; what else is a link may be any file of a host."""
    cache = tmp_path / "models--baichuan-inc--Baichuan-7B"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.copy(EXAM, blobs / "c")
    for blob, name in (("a", "config.json"), ("b", "model.safetensors"), ("c", "tokenizer.model")):
        if name != EXAM.name:
            shutil.copy(TINY / name, blobs / blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    assert_equal(import_params(snapshot), params)
    assert find_tokenizer(read_source(snapshot)).hash == Tokenizer(EXAM).hash
    # In a folder of the snapshot; and the blobs of another model, which may be private.
    (snapshot / "sub").mkdir()
    (snapshot / "sub" / "config.json").symlink_to("../../../blobs/a")
    assert own_file(snapshot / "sub" / "config.json")
    other = tmp_path / "models--others--private" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(TINY / "config.json", other / "a")
    (tmp_path / "received").mkdir()
    for place in (snapshot, tmp_path / "received"):
        (place / "theirs").symlink_to(other / "a")
        with pytest.raises(ConfigError, match=r"theirs is a link out of its folder, to /"):
            own_file(place / "theirs")
        (place / "theirs").unlink()
    for name in ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"):
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to((tmp_path / name).absolute())
        shutil.copy(
            EXAM if name == EXAM.name else TINY / name.removeprefix("tokenizer_"), tmp_path / name
        )
        with pytest.raises(ConfigError, match=rf"abc/{name} is a link out of its folder, to /"):
            find_tokenizer(read_source(snapshot)), import_params(snapshot)
        (snapshot / name).unlink()
        shutil.copy(tmp_path / name, snapshot / "own")
        (snapshot / name).symlink_to("own")
        if name != "tokenizer_config.json":
            (snapshot / name).unlink()
            (snapshot / "own").rename(snapshot / name)
    assert_equal(import_params(snapshot), params)


@pytest.mark.parametrize("name", ["../model.safetensors", "{folder}/model.safetensors", "..", "."])
def test_an_index_names_files_of_its_folder_only(tmp_path, name):
    shutil.copytree(TINY / "sharded", tmp_path / "sharded")
    shutil.copy(TINY / "model.safetensors", tmp_path)
    index = {"weight_map": {"model.norm.weight": name.format(folder=tmp_path)}}
    file = tmp_path / "sharded" / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    with pytest.raises(
        ConfigError, match=r"model\.safetensors\.index\.json (is no index|names fil)"
    ):
        open_tensors(tmp_path / "sharded")


def test_a_tensor_that_a_header_names_twice_is_refused(copy):
    file = copy / "model.safetensors"
    header, data = read_header(file)
    # Of two the library takes the last. Here both have the same bytes, so that nothing is left out.
    norm = json.dumps(header["model.norm.weight"])
    text = f'{{"model.norm.weight": {norm}, {json.dumps(header)[1:]}'.encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    with pytest.raises(
        ConfigError, match=r"model\.safetensors .*'model\.norm\.weight' comes twice"
    ):
        open_tensors(copy)


def test_a_header_that_no_model_needs_is_refused(copy):
    file = copy / "model.safetensors"
    header, data = read_header(file)
    header["__metadata__"] = {"x": " " * (5 << 20)}
    write_header(file, header, data)
    with pytest.raises(
        ConfigError, match=r"model\.safetensors: its header has 5,\d{3},\d{3} bytes"
    ):
        open_tensors(copy)


def test_a_torch_file_that_takes_more_than_its_bytes_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    file = tmp_path / "pytorch_model.bin"

    def refused(reason: str) -> None:
        with pytest.raises(ConfigError, match=rf"pytorch_model\.bin {reason}"):
            open_tensors(tmp_path)

    torch.save({"x": torch.zeros(1).expand(1 << 20, 64)}, file)
    refused(r"has [\d,]+ bytes and its tensors 268,435,456: they repeat what is there")
    torch.save({"x": torch.zeros(64), "y": bytearray(8)}, file)
    refused("calls '__builtin__ bytearray', which no weights need")
    torch.save({"x": torch.zeros(64)}, file)
    open_tensors(tmp_path)
    with zipfile.ZipFile(file) as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in content.items():
            archive.writestr(name, part)
    refused("has compressed entries")


def test_an_export_leaves_what_has_a_name_like_its_own(params, tmp_path):
    for name in ("out.tmp", "out.lock.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").touch()
    export(params, read_config(TINY), tmp_path / "out", dtype="float32")
    assert all((tmp_path / name / "kept").exists() for name in ("out.tmp", "out.lock.tmp"))
