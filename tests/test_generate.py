"""Generation against the plain way: the whole sequence through the model again for every token."""

import jax
import numpy as np
import pytest
from flax import nnx

from baichuan_jax.config.schema import ConfigError, MeshConfig, ModelConfig
from baichuan_jax.generate import Generator, Sampling, _draw, _Stream, main
from baichuan_jax.hf.weights import export, load_pretrained
from baichuan_jax.model import Transformer
from baichuan_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        dtype="float32",
        remat="none",
        initializer_range=0.3,
    )
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
    got = Generator(model).generate_tokens(
        [prompt], 8, repetition_penalty=penalty, stop_at_eos=False
    )
    assert got.tolist() == [plain_greedy(model, prompt, 8, penalty)]


def test_prompts_of_unequal_length_do_not_disturb_each_other(model):
    prompts = [[5, 9, 260, 11, 40, 41], [7, 8]]
    padded = [prompts[0], [0] * 4 + prompts[1]]
    mask = [[1] * 6, [0] * 4 + [1] * 2]
    got = Generator(model).generate_tokens(padded, 6, attention_mask=mask, stop_at_eos=False)
    for row, prompt in enumerate(prompts):
        assert got[row, 6:].tolist() == plain_greedy(model, prompt, 6)[len(prompt) :]


def test_the_command_refuses_before_it_prints(capsys):
    with pytest.raises(ConfigError, match="top_p"):
        main(["--checkpoint", "nowhere", "--prompt", "a", "--top_p", "1.5"])
    with pytest.raises(ConfigError, match=r"--prompt must be UTF-8, and has '\\udcff' at char"):
        main(["--checkpoint", "nowhere", "--prompt", "a\udcff"])
    assert capsys.readouterr().out == ""


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


def test_a_model_without_padding_token_fills_with_eos():
    config = ModelConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_layers=1,
        num_heads=2,
        dtype="float32",
        pad_token_id=None,
    )
    generator = Generator(Transformer(config, nnx.Rngs(params=3)))
    eos = int(generator.generate_tokens([[5]], 1, stop_at_eos=False)[0, 1])
    got = generator.generate_tokens([[5], [9]], 6, eos_id=eos)
    assert got[0, 1] == eos
    assert (got[0, 2:] == eos).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_rows_without_a_piece_are_never_drawn(model, temperature):
    """Greedy too: the head's largest logit is moved to a row that the tokenizer has not."""
    generator, prompt = Generator(model), [[5, 9, 260, 11]]
    options = {"temperature": temperature, "stop_at_eos": False, "seed": 3}
    free = generator.generate_tokens(prompt, 40, **options)
    count = int(free[0, 4:].max())
    assert count > 200
    got = generator.generate_tokens(prompt, 40, vocab_size=count, **options)
    assert got[0, 4:].max() < count
    # The whole vocabulary gives the same tokens as none that is named, and no other program.
    whole = generator.generate_tokens(prompt, 40, vocab_size=300, **options)
    np.testing.assert_array_equal(whole, free)
    assert len(generator._compiled) == generator._decode._cache_size() == 1


def test_text_comes_from_the_tokenizers_pieces_alone(model):
    texts = Generator(model).generate(Pieces(), ["a"], 60, temperature=50.0, top_p=1.0)
    assert len(texts[0]) > 5


def test_other_prompts_and_lengths_find_compiled_code(model):
    generator = Generator(model)
    for length, new in ((3, 5), (40, 60), (64, 1)):
        generator.generate_tokens(
            [[7] * length],
            new,
            temperature=0.5,
            repetition_penalty=1.0 + 0.1 * new,
            stop_at_eos=False,
        )
    assert len(generator._compiled) == generator._decode._cache_size() == 1
    generator.generate_tokens([[7] * 65], 1, temperature=0.5)
    assert len(generator._compiled) == generator._decode._cache_size() == 2
    assert generator.speed is not None
    assert generator.speed.prompt_tokens == 65
    assert min(generator.speed) > 0


@pytest.mark.parametrize("shape", [(2, 2, 1, 2), (1, 4, 2, 1)])
def test_every_mesh_continues_alike(model, tmp_path, shape):
    export(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        model.config,
        tmp_path / "hf",
        dtype="float32",
        form="baichuan",
    )
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    generator = Generator(load_pretrained(tmp_path / "hf", mesh=mesh))
    prompts, mask = (
        [[5, 9, 260, 11], [0, 0, 7, 8], [0, 3, 4, 5]],
        [[1] * 4, [0, 0, 1, 1], [0, 1, 1, 1]],
    )
    got = generator.generate_tokens(prompts, 6, attention_mask=mask, stop_at_eos=False)
    np.testing.assert_array_equal(
        got, Generator(model).generate_tokens(prompts, 6, attention_mask=mask, stop_at_eos=False)
    )


class Bytes:
    """A tokenizer of UTF-8 bytes: every character beyond ASCII takes several tokens."""

    eos_id, vocab_size = 256, 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Pieces(Bytes):
    """A tokenizer that refuses an id without a piece, as SentencePiece does."""

    def decode(self, ids):
        assert all(i < self.vocab_size for i in ids)
        return super().decode(ids)


def test_texts_of_unequal_prompts_are_those_of_each_alone(model):
    generator, prompts = Generator(model), ["春風又綠", "a"]
    texts = generator.generate(Bytes(), prompts, 12, repetition_penalty=1.2)
    assert texts == [
        generator.generate(Bytes(), [prompt], 12, repetition_penalty=1.2)[0] for prompt in prompts
    ]
    for prompts, message in (([], "no prompt"), (["a", ""], "the prompt '' is empty")):
        with pytest.raises(ConfigError, match=message):
            generator.generate(Bytes(), prompts, 4)


def test_streamed_text_comes_in_whole_characters():
    text, pieces = "春x關, é", []
    stream = _Stream(Bytes(), list("風".encode()), pieces.append)
    for byte in [*text.encode(), 256, 0, 0]:
        stream(np.array([[byte]]))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces[:3])
    assert all(len(piece) <= 1 for piece in pieces)


def test_streaming_yields_the_same_tokens(model):
    generator, pieces = Generator(model), []
    whole = generator.generate_tokens([[5, 9, 11]], 20, stop_at_eos=False)
    generator.generate_tokens(
        [[5, 9, 11]], 20, stop_at_eos=False, on_tokens=lambda new: pieces.append(new)
    )
    assert len(pieces) > 1
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole[:, 3:])


def test_a_seed_gives_the_same_draws_and_another_one_others(model):
    generator = Generator(model)
    draws = [
        generator.generate_tokens([[5, 9]], 24, temperature=1.5, seed=seed, stop_at_eos=False)
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


def draw_many(logits, count=4000, temperature=1.0, top_k=0, top_p=1.0):
    sampling = Sampling(temperature, top_k or len(logits), top_p, 1.0)
    keys = jax.random.split(jax.random.key(0), count)
    tokens = jax.jit(jax.vmap(lambda key: _draw(key, np.array([logits], np.float32), sampling)[0]))(
        keys
    )
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


def test_draws_follow_temperature_top_k_and_top_p():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(draw_many(logits), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    squared = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(
        draw_many(logits, temperature=0.5), squared / squared.sum(), atol=0.03
    )
    np.testing.assert_allclose(draw_many(logits, top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(draw_many(logits, top_p=0.7), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(draw_many(logits, top_p=0.01), [1, 0, 0, 0], atol=0)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[5, 6]], {"attention_mask": [[1, 0]]}, "padded on the left"),
        ([[5, 6]], {"attention_mask": [[1]]}, r"attention_mask \(1, 1\) must be \(1, 2\)"),
        ([5, 6], {}, r"tokens \(2,\)"),
        ([[]], {}, r"tokens \(1, 0\)"),
        ([[5, 300]], {}, r"must lie in \[0, 300\)"),
        ([[5]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[5]], {"top_k": -1}, "top_k=-1"),
        ([[5]], {"top_p": 0.0}, "top_p=0.0"),
        ([[5]], {"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ],
    ids=str,
)
def test_what_cannot_be_generated_is_refused(model, tokens, options, message):
    with pytest.raises(ConfigError, match=message):
        Generator(model).generate_tokens(tokens, **{"max_new_tokens": 2, **options})
