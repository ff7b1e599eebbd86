"""Generation against the plain way: the whole sequence through the model again for every token."""

import jax
import numpy as np
import pytest
from flax import nnx

from baichuan_jax.config import ModelConfig
from baichuan_jax.generate import Generator, Sampling, _draw
from baichuan_jax.model import Transformer


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, dtype="float32", remat="none",
        initializer_range=0.3,
    )  # fmt: skip
    return Transformer(config, nnx.Rngs(params=3))


def plain_greedy(model, prompt, count, penalty=1.0):
    ids = list(prompt)
    for _ in range(count):
        logits = np.array(model(np.array([ids]))[0, -1])
        seen = np.unique(ids)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        ids.append(int(logits.argmax()))
    return ids


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_the_plain_way(model, penalty):
    prompt = [5, 9, 260, 11]
    got = Generator(model).generate_tokens([prompt], 8, repetition_penalty=penalty, stop_at_eos=False)
    assert got.tolist() == [plain_greedy(model, prompt, 8, penalty)]


def test_prompts_of_unequal_length_do_not_disturb_each_other(model):
    prompts = [[5, 9, 260, 11, 40, 41], [7, 8]]
    padded = [prompts[0], [0] * 4 + prompts[1]]
    mask = [[1] * 6, [0] * 4 + [1] * 2]
    got = Generator(model).generate_tokens(padded, 6, attention_mask=mask, stop_at_eos=False)
    for row, prompt in enumerate(prompts):
        assert got[row, 6:].tolist() == plain_greedy(model, prompt, 6)[len(prompt) :]


def test_a_row_stops_at_eos_and_the_call_when_all_have(model):
    generator = Generator(model)
    free = generator.generate_tokens([[5, 9], [7, 8]], 12, stop_at_eos=False)
    eos = int(free[0, 4])
    first = [row.tolist().index(eos) if eos in row.tolist() else 99 for row in free[:, 2:]]
    got = generator.generate_tokens([[5, 9], [7, 8]], 12, eos_id=eos)
    assert got[0, : 2 + first[0] + 1].tolist() == free[0, : 2 + first[0] + 1].tolist()
    assert not got[0, 2 + first[0] + 1 :].any()
    alone = generator.generate_tokens([[5, 9]], 12, eos_id=eos)
    assert alone.shape[1] == 2 + first[0] + 1


def test_streaming_yields_the_same_tokens(model):
    generator, pieces = Generator(model), []
    whole = generator.generate_tokens([[5, 9, 11]], 20, stop_at_eos=False)
    generator.generate_tokens([[5, 9, 11]], 20, stop_at_eos=False, on_tokens=lambda new: pieces.append(new))
    assert len(pieces) > 1
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole[:, 3:])


def test_a_seed_gives_the_same_draws_and_another_one_others(model):
    generator = Generator(model)
    draws = [generator.generate_tokens([[5, 9]], 24, temperature=1.5, seed=seed, stop_at_eos=False) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


def draw_many(logits, count=4000, temperature=1.0, top_k=0, top_p=1.0):
    sampling = Sampling(temperature, top_k or len(logits), top_p, 1.0)
    keys = jax.random.split(jax.random.key(0), count)
    tokens = jax.jit(jax.vmap(lambda key: _draw(key, np.array([logits], np.float32), sampling)[0]))(keys)
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


def test_draws_follow_temperature_top_k_and_top_p():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(draw_many(logits), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    squared = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(draw_many(logits, temperature=0.5), squared / squared.sum(), atol=0.03)
    np.testing.assert_allclose(draw_many(logits, top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(draw_many(logits, top_p=0.7), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(draw_many(logits, top_p=0.01), [1, 0, 0, 0], atol=0)


def test_what_cannot_be_generated_is_refused(model):
    generator = Generator(model)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generator.generate_tokens([[5]], 0)
    with pytest.raises(ValueError, match="padded on the left"):
        generator.generate_tokens([[5, 6]], 2, attention_mask=[[1, 0]])
