"""Scores of shared, batched and padded prompts against each prompt run by itself."""

import argparse
import types

import jax
import numpy as np
import pytest
from conftest import build
from flax import nnx

from baichuan_jax.config.files import add_mesh_options, mesh_config
from baichuan_jax.config.schema import ConfigError, MeshConfig, ModelConfig
from baichuan_jax.evaluate import __main__ as command
from baichuan_jax.evaluate.perplexity import parse_contexts, perplexity_curve, read_stream
from baichuan_jax.evaluate.prompts import Prompt
from baichuan_jax.evaluate.results import score_prompts
from baichuan_jax.evaluate.scoring import Scorer, ScoreRequest
from baichuan_jax.hf.weights import export, load_pretrained
from baichuan_jax.kernels.attention.reference import prefix_attention
from baichuan_jax.model import Transformer, abstract_model
from baichuan_jax.sharding import make_mesh

CONFIG = ModelConfig(
    vocab_size=304,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    dtype="float32",
    remat="none",
    initializer_range=0.3,
)


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG, nnx.Rngs(params=3))


def plain(model, rows):
    """Logits after every prompt, run by itself, and their log-normalisers, in float64."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = (
            row  # padding comes after the last real token, which does not see it
        )
    graphdef, state = nnx.split(model)
    logits = np.asarray(
        jax.jit(lambda state: nnx.merge(graphdef, state)(tokens))(state), np.float64
    )
    last = np.array([logits[place, len(row) - 1] for place, row in enumerate(rows)])
    return last, np.log(np.exp(last).sum(axis=-1))


def make_requests():
    """A group with a long common beginning, one with a short one, and a prompt of no group."""
    draw = np.random.default_rng(0)
    tokens = lambda count: draw.integers(0, CONFIG.vocab_size, count).tolist()
    common = tokens(70)
    requests = [
        ScoreRequest(common + tokens(count), (1, 2, 3, 4), "long")
        for count in (5, 9, 40, 3, 17, 1, 22)
    ]
    requests += [
        ScoreRequest(common[:8] + tokens(count), (5, 6), "short") for count in (12, 33, 20)
    ]
    return [*requests, ScoreRequest(tokens(51), (7, 8, 9, 10), "alone")]


@pytest.mark.parametrize("shape", [None, (2, 1, 1, 2, 2), (1, 2, 2, 2)])
def test_scores_are_those_of_each_prompt_alone(model, tmp_path, shape):
    requests = make_requests()
    if shape is None:
        scorer = Scorer(model, batch_tokens=64)  # several batches of a group
    else:
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        export(params, CONFIG, tmp_path / "hf", dtype="float32", form="baichuan")
        mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
        scorer = Scorer(load_pretrained(tmp_path / "hf", mesh=mesh), mesh)
    done = []
    logits, norms = scorer.score(requests, done.append)
    assert sum(done) == len(requests)
    expected, expected_norms = plain(model, [request.tokens for request in requests])
    for request, found, wanted in zip(requests, logits, expected, strict=True):
        np.testing.assert_allclose(
            found, wanted[list(request.wanted)], atol=2e-5
        )  # float32 sums in another order
    np.testing.assert_allclose(norms, expected_norms, atol=2e-5)
    assert scorer.work.prompt_tokens == sum(len(request.tokens) for request in requests)
    if shape is None:  # 70 tokens went through once, not seven times
        assert scorer.work.run_tokens < 0.8 * scorer.work.prompt_tokens


def test_a_state_that_replicas_share_scores_as_the_same_weights_on_one_device(tiny_config):
    config, steps = build(tiny_config, (1, 1, 1, 2, 2))
    params = steps.init().params
    whole = steps.gather(params)
    assert any("state" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(params))
    assert not any("state" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(whole))
    requests = make_requests()[-2:]
    graphdef, _, _ = abstract_model(config.model)
    on_mesh = Scorer(nnx.merge(graphdef, whole), steps.layout.mesh)
    alone = Scorer(nnx.merge(graphdef, jax.device_get(params)))
    for one, other in zip(on_mesh.score(requests)[0], alone.score(requests)[0], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    # Where every replica has all weights, there is no other copy.
    _, steps = build(tiny_config, (2, 1, 1, 1))
    assert steps.gather(params) is params


def test_a_prefix_in_bfloat16_is_that_of_the_plain_attention():
    """Against float64: rows of 5 and 8 own tokens after 11 shared ones, of 16 places."""
    draw = np.random.default_rng(1)
    q, k, v = draw.normal(size=(3, 2, 8, 3, 4))
    k_S, v_S = draw.normal(size=(2, 16, 3, 4))
    mask = np.arange(16) < 11
    scores = (
        np.einsum(
            "btnh,bsnh->bnts",
            q,
            np.concatenate([np.broadcast_to(k_S[:11], (2, 11, 3, 4)), k], axis=1),
        )
        / 2
    )
    scores = np.where(np.tri(8, 19, 11, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum(
        "bnts,bsnh->btnh",
        weights,
        np.concatenate([np.broadcast_to(v_S[:11], (2, 11, 3, 4)), v], axis=1),
    )
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 3e-2)):  # bfloat16 keeps 8 bits
        arrays = [jax.numpy.asarray(array, dtype) for array in (q, k, v, k_S, v_S)]
        found = prefix_attention(*arrays, mask)
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance)


def test_answers_of_several_tokens_score_the_sum_over_them(model):
    """lm-eval's log-likelihoods, also where answers share their first token."""
    tokens, answers = [9, 8, 7, 250, 3], ((11, 20), (11, 21), (12,), (13, 20, 22))
    prompt = Prompt("s", 0, "", "text", tokens, (), answers, "C")
    (record,) = score_prompts(Scorer(model), [prompt], "lm-eval")
    steps = [(answer[:length], token) for answer in answers for length, token in enumerate(answer)]
    logits, norms = plain(model, [[*tokens, *start] for start, _ in steps])
    terms = [logits[row, token] - norms[row] for row, (_, token) in enumerate(steps)]
    expected = [terms[0] + terms[1], terms[2] + terms[3], terms[4], sum(terms[5:])]
    np.testing.assert_allclose(record["logits"], expected, atol=5e-5)
    assert record["prediction"] == "ABCD"[int(np.argmax(expected))]


def test_perplexity_is_the_mean_over_windows_on_any_mesh(model):
    tokens = np.random.default_rng(2).integers(0, CONFIG.vocab_size, 1000).astype(np.int32)
    rows = perplexity_curve(model, tokens, [300, 64], batch_tokens=128)
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda windows: nnx.merge(graphdef, state)(windows))
    for row, context in zip(rows, (300, 64), strict=True):
        windows = tokens[: 1000 // context * context].reshape(-1, context)
        logits = np.asarray(call(windows), np.float64)
        norms = np.log(np.exp(logits).sum(axis=-1))
        losses = (
            norms
            - np.take_along_axis(logits, np.roll(windows, -1, axis=1)[..., None], axis=-1)[..., 0]
        )[:, :-1]
        assert row["windows"] == len(losses)
        assert row["loss"] == pytest.approx(losses.mean(), rel=1e-5)
        assert row["windows"] * row["context"] + row["tokens_left_out"] == len(tokens)
        assert row["tail_perplexity"] == pytest.approx(np.exp(losses[:, -256:].mean()), rel=1e-4)
    mesh = make_mesh(MeshConfig(2, 1, 2, 1), jax.devices()[:4])
    for one, other in zip(rows, perplexity_curve(model, tokens, [300, 64], mesh=mesh), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_a_loss_without_a_finite_perplexity_is_refused(model):
    tokens = np.random.default_rng(2).integers(0, CONFIG.vocab_size, 64).astype(np.int32)
    graphdef, state = nnx.split(model)
    state["lm_head"] = jax.tree.map(lambda leaf: leaf * 1e6, state["lm_head"])
    with pytest.raises(ConfigError, match=r"context=16: the loss of all is \d.* nats"):
        perplexity_curve(nnx.merge(graphdef, state), tokens, [16])


def test_dots_stand_for_the_steps_between():
    assert parse_contexts("4096,4352,...,5376") == [4096, 4352, 4608, 4864, 5120, 5376]
    assert parse_contexts("128") == [128]
    for bad in ("4096,...,5376", "4096,4352,...,5000", "4096,x"):
        with pytest.raises(ValueError, match="must be lengths"):
            parse_contexts(bad)


class Letters:
    """A tokenizer whose tokens are letters."""

    eos_id = 2

    def encode(self, text):
        return list(map(ord, text))


@pytest.mark.parametrize(
    "limit, tokens, documents, is_cut",
    [
        (100, "ab2c2", 4, False),
        (5, "ab2c2", 3, True),
        (4, "ab2c", 3, True),
        (3, "ab2", 2, True),
        (1, "a", 2, True),
    ],
)
def test_the_text_of_a_curve_is_as_packed_and_counted(limit, tokens, documents, is_cut):
    """Empty documents add no EOS of their own."""
    stream, counts = read_stream(iter(["", "ab", "c", ""]), Letters(), limit)
    assert stream.tolist() == [2 if token == "2" else ord(token) for token in tokens]
    assert counts == {
        "documents": documents,
        "empty_documents": 1 + (documents == 4),
        "text_cut": is_cut,
    }


def test_an_evaluation_that_an_earlier_version_began_on_a_mesh_goes_on(monkeypatch):
    """It wrote the axes that the command has; a folder with other settings is refused."""
    monkeypatch.setattr(command, "weights_sha256", lambda source: "0")
    source = types.SimpleNamespace(path="weights", model=CONFIG)
    options = argparse.Namespace(dtype="float32", batch_tokens=None)
    mesh = make_mesh(MeshConfig(2, 2, 1, 2))
    settings = command._settings(options, mesh, source)
    assert settings["mesh"] == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    parser = argparse.ArgumentParser()
    add_mesh_options(parser, MeshConfig())
    assert mesh_config(parser.parse_args(["--mesh.fsdp", "2"])) == MeshConfig(-1, 2)
