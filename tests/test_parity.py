"""The original's numbers: what modeling_baichuan.py computed on a CPU, kept in tests/golden."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build
from flax import nnx

from baichuan_jax.config.schema import Config, OptimizerConfig, TokenizerConfig, TrainConfig
from baichuan_jax.generate import Generator
from baichuan_jax.hf.config import read_config
from baichuan_jax.hf.files import Safetensors
from baichuan_jax.hf.weights import import_params, load_pretrained
from baichuan_jax.loss import cross_entropy
from baichuan_jax.model import init_cache
from baichuan_jax.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny"
STORIES = Path(__file__).parents[2] / "shared" / "golden" / "stories260K_baichuan"


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(TINY / "parity.npz"))


@pytest.fixture(scope="module")
def model():
    return load_pretrained(TINY)


def mean_loss(model, inputs, labels):
    hidden = model.hidden(jnp.asarray(inputs))
    total = cross_entropy(hidden, model.lm_head[...], jnp.asarray(labels, jnp.int32), chunk_size=50)
    return float(total) / (np.asarray(labels) != -100).sum()


def test_logits(model, golden):
    np.testing.assert_allclose(model(golden["A_ids"]), golden["A_logits"], atol=2e-5)


def test_hidden_states_of_every_depth(golden):
    """A model cut after l blocks gives the original's state there, before the final norm."""
    config, params = read_config(TINY), import_params(TINY)
    depths = sorted(
        int(name.removeprefix("A_hidden")) for name in golden if name.startswith("A_hidden")
    )
    full = load_pretrained(TINY)
    for depth in depths:
        wanted = golden[f"A_hidden{depth}"]
        if depth == 0:
            got = np.asarray(params["embedding"])[golden["A_ids"]]
        elif depth == config.num_layers:  # transformers norms the last one
            got = full.hidden(jnp.asarray(golden["A_ids"]))
        else:
            layers = jax.tree.map(lambda x, depth=depth: x[:depth], params["layers"])
            cut = load_pretrained(TINY)
            nnx.update(cut, {"layers": layers, "final_norm": jnp.ones_like(params["final_norm"])})
            hidden = cut.hidden(jnp.asarray(golden["A_ids"]))
            scale = np.sqrt(
                np.mean(np.square(wanted), axis=-1, keepdims=True) + config.rms_norm_eps
            )
            got = np.asarray(hidden) * scale
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_keys_after_rope_and_values(model, golden):
    B, T = golden["A_ids"].shape
    cache = init_cache(model.config, jnp.ones((B, T), bool))
    _, cache = model.extend(jnp.asarray(golden["A_ids"]), cache, jnp.arange(T)[None])
    for layer in range(model.config.num_layers):
        for ours, theirs in ((cache.k_LBSNH, "k"), (cache.v_LBSNH, "v")):
            np.testing.assert_allclose(
                ours[layer].swapaxes(1, 2), golden[f"A_{theirs}{layer}"], atol=2e-5
            )


def test_loss_with_and_without_ignored_labels(model, golden):
    ids = golden["A_ids"]
    assert mean_loss(model, ids[:, :-1], ids[:, 1:]) == pytest.approx(
        float(golden["A_loss"]), rel=1e-6
    )
    assert mean_loss(model, ids[:, :-1], golden["B_labels"][:, 1:]) == pytest.approx(
        float(golden["B_loss"]), rel=1e-6
    )


def test_left_padding(model, golden):
    mask = golden["C_mask"]
    logits = np.asarray(model(golden["C_ids"], attention_mask=mask))
    np.testing.assert_allclose(logits[mask == 1], golden["C_logits"][mask == 1], atol=2e-5)
    for row in range(len(mask)):
        np.testing.assert_allclose(
            logits[row][mask[row] == 1], golden[f"C_row{row}_unpadded_logits"][0], atol=2e-5
        )


def test_cached_steps(model, golden):
    ids = jnp.asarray(golden["A_ids"][:, :16])
    cache = init_cache(model.config, jnp.ones(ids.shape, bool))
    hidden, cache = model.extend(ids[:, :10], cache, jnp.arange(10)[None])
    logits = [model.head(hidden)]
    for position in range(10, 16):
        hidden, cache = model.extend(
            ids[:, position : position + 1], cache, jnp.full((1, 1), position)
        )
        logits.append(model.head(hidden))
    np.testing.assert_allclose(np.concatenate(logits, axis=1), golden["D_logits"], atol=2e-5)


@pytest.mark.parametrize(("name", "penalty"), [("E_greedy", 1.0), ("F_greedy", 1.1)])
def test_greedy_continuations(model, golden, name, penalty):
    wanted = golden[name]
    got = Generator(model).generate_tokens(
        wanted[:, :8], 24, repetition_penalty=penalty, stop_at_eos=False
    )
    np.testing.assert_array_equal(got, wanted)


def test_beyond_the_training_length(model, golden):
    np.testing.assert_allclose(model(golden["G_ids"]), golden["G_logits"], atol=2e-5)


def test_bfloat16(golden):
    """Two bfloat16 computations differ by their roundings: no more than bfloat16 from float32."""
    got = np.asarray(load_pretrained(TINY / "bf16", dtype="bfloat16")(golden["A_ids"]))
    exact, theirs = golden["A_logits"], golden["H_logits_bf16"].astype(np.float32)
    own = np.sqrt(np.mean((theirs - exact) ** 2))
    assert np.sqrt(np.mean((got - exact) ** 2)) < 1.2 * own
    assert np.sqrt(np.mean((got - theirs) ** 2)) < 1.5 * own


def test_huggingface_llama_with_the_same_weights(model, golden):
    np.testing.assert_allclose(model(golden["A_ids"]), golden["I_llama_logits"], atol=2e-5)


def safetensors(path):
    """All tensors of one file, named as the original names them."""
    tensors = Safetensors([path])
    return {name: tensors.read(name) for name in tensors.shapes}


@pytest.mark.parametrize(
    ("name", "accumulation", "optimizer"),
    [
        (
            "const",
            1,
            OptimizerConfig(learning_rate=1e-3, warmup_steps=0, final_learning_rate_ratio=1.0),
        ),
        (
            "sched_acc2",
            2,
            OptimizerConfig(learning_rate=3e-3, warmup_steps=3, final_learning_rate_ratio=0.1),
        ),
    ],
)
def test_ten_training_steps(name, accumulation, optimizer):
    """The original in train mode: losses, norms, learning rates, first gradients, last weights."""
    wanted = json.loads((GOLDEN / "train" / "train.json").read_text())[name]["orig"]
    data = np.load(GOLDEN / "train" / "data.npz")["data_no0"][:, :accumulation].astype(np.int32)
    model = dataclasses.replace(read_config(TINY), dtype="float32", remat="none")
    config = Config(
        model=model,
        train=TrainConfig(
            num_steps=10,
            context_length=32,
            global_batch_size=4 * accumulation,
            micro_batch_size=4,
            loss_chunk_size=50,
        ),
        optimizer=optimizer,
        tokenizer=TokenizerConfig(vocab_size=512),
    )
    config, steps = build(config, (1, 1, 1, 1))
    state = steps.start(import_params(TINY, steps.layout))
    for step, rows in enumerate(data):
        batch = jax.device_put(
            {"inputs": rows[..., :-1], "labels": rows[..., 1:]}, steps.batch_sharding
        )
        state, metrics = steps.train(state, batch, steps.request())
        assert float(metrics["loss"]) == pytest.approx(wanted["losses"][step], rel=2e-6)
        assert float(metrics["grad_norm"]) == pytest.approx(wanted["grad_norms"][step], rel=2e-6)
        assert float(metrics["learning_rate"]) == pytest.approx(wanted["lrs"][step], rel=1e-6)
        if name == "const" and step == 0:
            # After one step AdamW's mean of gradients is a tenth of the clipped gradient.
            scale = min(1, 1 / (wanted["grad_norms"][0] + 1e-6))
            first = safetensors(GOLDEN / "train" / "const.grad_step1.safetensors")
            mean = state.opt_state[0].mu
            for ours, theirs in _pairs(mean, first):
                np.testing.assert_allclose(
                    ours / 0.1 / scale, theirs, atol=1e-6 * max(1, np.abs(theirs).max())
                )
    if name == "const":
        final = safetensors(GOLDEN / "train" / "const.final.safetensors")
        errors = np.concatenate(
            [np.abs(ours - theirs).ravel() for ours, theirs in _pairs(state.params, final)]
        )
        # AdamW divides a gradient by its own size, so where one is near zero its rounding becomes a
        # full step of 1e-3.
        assert (errors > 1e-5).sum() <= 5  # of 115,000
        assert errors.max() < 4e-5


def _pairs(params, tensors):
    """(ours, theirs) of every tensor of the original, in ours' layout."""
    H, D = params["layers"]["w_pack"].shape[-1], params["embedding"].shape[1]
    yield params["embedding"], tensors["model.embed_tokens.weight"]
    yield params["lm_head"], tensors["lm_head.weight"].T
    yield params["final_norm"], tensors["model.norm.weight"]
    for layer in range(len(params["layers"]["w_up"])):
        ours = {name: value[layer] for name, value in params["layers"].items()}
        prefix = f"model.layers.{layer}."
        yield ours["w_pack"].reshape(D, 3 * D), tensors[prefix + "self_attn.W_pack.weight"].T
        yield ours["w_out"].reshape(D, D), tensors[prefix + "self_attn.o_proj.weight"].T
        for name in ("gate", "up", "down"):
            yield ours[f"w_{name}"], tensors[f"{prefix}mlp.{name}_proj.weight"].T
        yield ours["attention_norm"], tensors[prefix + "input_layernorm.weight"]
        yield ours["mlp_norm"], tensors[prefix + "post_attention_layernorm.weight"]
    assert D % H == 0


@pytest.mark.skipif(not STORIES.is_dir(), reason="stories260K_baichuan is not in this checkout")
def test_a_real_trained_model():
    """Perplexities and a greedy continuation of a model trained on English children's stories."""
    model, tokenizer = load_pretrained(STORIES), Tokenizer(STORIES / "tokenizer.model")
    reference = json.loads((STORIES / "greedy_reference.json").read_text())
    ids = reference["ids"]
    got = Generator(model).generate_tokens([ids[:1]], len(ids) - 1, stop_at_eos=False)[0]
    assert got.tolist() == ids
    assert tokenizer.decode(ids) == reference["text"]
    for name, case in json.loads((STORIES / "perplexity_oracle.json").read_text()).items():
        assert [1, *tokenizer.encode(case["text"])] == case["ids"], name
        logits = np.asarray(model(np.array([case["ids"]]))[0], np.float64)
        lse = np.log(np.exp(logits).sum(axis=-1))
        nll = (lse - logits[np.arange(len(logits)), np.roll(case["ids"], -1)])[:-1]
        assert np.exp(nll.mean()) == pytest.approx(case["ppl"], rel=1e-3), name
        np.testing.assert_allclose(logits[-1], case["last_logits"], atol=2e-4)
