"""The training step on every kind of mesh, what it compiles to, and what skips an update."""

import dataclasses
import functools
import itertools
import re

import compile_cache
import jax
import numpy as np
import pytest
from conftest import batch_of, build

from baichuan_jax.config.schema import Config, ConfigError, TokenizerConfig
from baichuan_jax.resilience.causes import BadHost
from baichuan_jax.resilience.digests import compare_digests
from baichuan_jax.step import Request

USUAL = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (2, 2, 1, 2), (1, 2, 2, 2)]
EVERY = [
    shape
    for shape in itertools.product((1, 2, 4, 8), repeat=4)
    if np.prod(shape) == 8 and shape[3] <= 4
]
MESHES = [
    *USUAL,
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in EVERY if shape not in USUAL),
]


def with_settings(config, **sections):
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **values)
            for name, values in sections.items()
        },
    )


@functools.cache
def initial_state(model):
    """A fresh state on the host; put onto a mesh, it needs no compilation there."""
    _, steps = build(
        Config(model=model, tokenizer=TokenizerConfig(vocab_size=model.vocab_size)), (1, 1, 1, 1)
    )
    return jax.device_get(steps.init())


def run(config, shape, tokens, num_steps=2):
    """(losses, norms), last parameters; a large eps keeps AdamW from magnifying roundings."""
    initial = initial_state(config.model)
    config, steps = build(with_settings(config, optimizer={"eps": 1e-2}), shape)
    state = jax.device_put(initial, steps.state_shardings)
    curve = []
    for rows in tokens[:num_steps]:
        state, metrics = steps.train(state, batch_of(config, steps, rows), steps.request())
        curve.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(curve), jax.device_get(state.params)


@pytest.fixture(scope="module")
def single():
    """What one device makes of tiny_config and tokens, which are always the same."""
    found = []

    def get(config, tokens):
        found.append(found[0] if found else run(config, (1, 1, 1, 1), tokens))
        return found[0]

    return get


@pytest.fixture(scope="module")
def mesh_steps():
    """(config, steps) of tiny_config on a mesh of three axes, for tests that only call them."""
    found = []

    def get(config):
        if not found:
            config, steps = build(config, (2, 2, 1, 2))
            found.append((config, steps))
        return found[0]

    return get


def assert_same(got, wanted, rtol=2e-6):
    (curve, params), (wanted_curve, wanted_params) = got, wanted
    np.testing.assert_allclose(curve, wanted_curve, rtol=rtol)  # float32 sums in another order
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(wanted_params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mesh_gives_the_single_device_loss_gradients_and_parameters(
    tiny_config, tokens, single, shape, monkeypatch
):
    # One mesh with the machine code that a user has, in every run of the tests.
    if shape == (1, 2, 2, 2):
        monkeypatch.setattr(compile_cache, "optimise_all", True)
    assert_same(run(tiny_config, shape, tokens), single(tiny_config, tokens))


@pytest.mark.parametrize(
    ("shape", "micro"),
    [((1, 1, 1, 1), 4), ((4, 1, 1, 2), 1), ((2, 2, 2, 1), 1), ((2, 1, 2, 2), 2), ((1, 4, 1, 1), 2)],
    ids=str,
)
def test_accumulation_equals_the_full_batch(tiny_config, tokens, single, shape, micro):
    config = with_settings(tiny_config, train={"micro_batch_size": micro})
    assert_same(run(config, shape, tokens), single(tiny_config, tokens))


@pytest.mark.parametrize(
    "change",
    [{"scan_layers": False}, {"remat": "full"}, {"remat": "matmuls"}],
    ids=lambda change: str(*change.items()),
)
def test_compiling_the_blocks_differently_changes_nothing(tiny_config, tokens, single, change):
    assert_same(
        run(with_settings(tiny_config, model=change), (1, 1, 1, 1), tokens),
        single(tiny_config, tokens),
    )


def abstract_state(steps):
    """Shapes and places of a state, to compile for without having one."""
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        steps.state_shapes,
        steps.state_shardings,
    )


def computations_with(collective: str, text: str) -> dict[str, list[str]]:
    """Computation name -> its collectives of one kind, from HLO text."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line):
            name = match[1]
        if f" {collective}(" in line or f" {collective}-start(" in line:
            found.setdefault(name, []).append(line.strip())
    return found


def entry_of(text: str) -> str:
    return re.search(r"ENTRY %?([\w.\-]+)", text)[1]


def test_gradients_are_reduced_across_replicas_once_a_step(tiny_config, tokens):
    """With micro-batches on replicas, the entry computation has the all-reduce, no loop body.

    With scan_layers the last micro-batch's loop over layers has sums too (test_exchange.py).
    """
    changed = with_settings(
        tiny_config, train={"micro_batch_size": 1}, model={"scan_layers": False}
    )
    config, steps = build(changed, (4, 1, 1, 1))
    batch = batch_of(config, steps, tokens[0])
    assert batch["inputs"].shape[0] == 4
    text = steps.train.lower(abstract_state(steps), batch, steps.request()).compile().as_text()
    assert set(computations_with("all-reduce", text)) == {entry_of(text)}


def test_the_partitioner_moves_nothing_it_need_not(tiny_config, tokens, compiled_anew, capfd):
    """Blocks exchange nothing, since a tensor axis splits heads; the embedding does, both ways.

    And XLA gathers nothing that it cannot place.
    """
    config, steps = build(tiny_config, (2, 2, 1, 2))
    batch = batch_of(config, steps, tokens[0])
    text = steps.train.lower(abstract_state(steps), batch, steps.request()).compile().as_text()
    assert "all-reduce" in text
    exchanges = computations_with("all-to-all", text)
    assert {name: len(found) for name, found in exchanges.items()} == {entry_of(text): 2}
    assert "rematerialization" not in capfd.readouterr().err


def test_a_nonfinite_gradient_skips_the_update_and_is_counted(tiny_config, tokens, mesh_steps):
    config, steps = mesh_steps(tiny_config)
    state = jax.device_put(initial_state(config.model), steps.state_shardings)
    no = steps.request()
    state, _ = steps.train(state, batch_of(config, steps, tokens[0]), no)
    # A weight of 3e38 overflows the forward pass; all else must come out as it went in.
    before = jax.device_get(state)
    broken = state._replace(
        params={**state.params, "final_norm": state.params["final_norm"] * 3e38}
    )
    state, metrics = steps.train(broken, batch_of(config, steps, tokens[1]), no)
    assert not metrics["finite"]
    assert (int(metrics["nonfinite"]), int(metrics["nonfinite_run"]), int(state.step)) == (1, 1, 2)
    after = jax.device_get(state)
    for name in ("embedding", "lm_head", "layers"):
        jax.tree.map(np.testing.assert_array_equal, after.params[name], before.params[name])
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
    mended = jax.device_put(after._replace(params=before.params), steps.state_shardings)
    state, metrics = steps.train(mended, batch_of(config, steps, tokens[2]), no)
    assert metrics["finite"]
    assert (int(metrics["nonfinite"]), int(metrics["nonfinite_run"])) == (1, 0)


def test_all_processes_see_the_largest_request(tiny_config, tokens, mesh_steps):
    config, steps = mesh_steps(tiny_config)
    for request in (Request.NONE, Request.SAVE, Request.ROLL_BACK):
        state = jax.device_put(initial_state(config.model), steps.state_shardings)
        _, metrics = steps.train(state, batch_of(config, steps, tokens[0]), steps.request(request))
        assert int(metrics["request"]) == request


def test_the_padding_row_of_the_embedding_gets_no_gradient(tiny_config, tokens, mesh_steps):
    rows = tokens[0].copy()
    rows[:, ::3] = 0
    config, steps = mesh_steps(tiny_config)
    state = jax.device_put(initial_state(config.model), steps.state_shardings)
    before = np.asarray(state.params["embedding"])
    state, metrics = steps.train(state, batch_of(config, steps, rows), steps.request())
    after = np.asarray(state.params["embedding"])
    decay = 1 - float(metrics["learning_rate"]) * config.optimizer.weight_decay
    np.testing.assert_allclose(
        after[0], before[0] * decay, rtol=1e-6
    )  # decayed, as in the original, and nothing more
    used = np.unique(rows[:, :-1])
    assert all(
        np.abs(after[token] - before[token] * decay).max() > 1e-4 for token in used if token != 0
    )


def test_training_overfits_one_batch(tiny_config, tokens):
    config, steps = build(with_settings(tiny_config, train={"num_steps": 60}), (1, 1, 1, 1))
    state, losses = steps.init(), []
    batch = batch_of(config, steps, tokens[0])
    for _ in range(60):
        state, metrics = steps.train(state, batch, steps.request())
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(512), rel=0.02)
    assert losses[-1] < losses[0] / 2


def test_evaluation_sums_over_valid_labels(tiny_config, tokens, mesh_steps):
    config, steps = mesh_steps(tiny_config)
    state = jax.device_put(initial_state(config.model), steps.state_shardings)
    batch = batch_of(config, steps, tokens[0])
    total, count = steps.evaluate(state.params, batch)
    _, metrics = steps.train(state, batch, steps.request())
    assert int(count) == 16 * 32 - 5 == int(metrics["tokens"])
    assert float(total) / int(count) == pytest.approx(float(metrics["loss"]), rel=1e-6)


def test_no_device_holds_the_whole_model_at_the_start(tiny_config):
    _, steps = build(tiny_config, (1, 4, 1, 2))
    memory = steps.init.lower().compile().memory_analysis()
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(steps.state_shapes.params))
    assert memory.output_size_in_bytes < 3 * whole / 8 * 1.2
    assert memory.temp_size_in_bytes < whole / 2


def test_a_mesh_that_does_not_divide_is_refused_before_anything_is_allocated(tiny_config):
    with pytest.raises(ConfigError, match=r"mesh.tensor=8 does not divide model.num_heads=4"):
        build(tiny_config, (1, 1, 1, 8))


def test_a_flipped_bit_in_one_copy_is_seen_and_its_process_named(tiny_config, tokens):
    """Four replicas of two shards; a copy differs in a bit of a number that the rows use or not."""
    config, steps = build(tiny_config, (4, 2, 1, 1))
    batch = batch_of(config, steps, tokens[0])
    params = steps.init().params
    right = jax.device_get(steps.check(params, batch))
    assert len(set(right.tolist())) == 1
    leaves, tree = jax.tree.flatten(params)
    used = [
        index
        for index, (path, _) in enumerate(jax.tree.leaves_with_path(params))
        if "embed" not in jax.tree_util.keystr(path)
    ]
    for name in used[:3]:
        leaf = leaves[name]
        copies = [shard.data for shard in leaf.addressable_shards]
        bits = np.asarray(copies[5]).copy()  # device 5: replica 2
        bits.view(np.uint32)[(0,) * bits.ndim] ^= 1 << 22
        copies[5] = jax.device_put(bits, copies[5].device)
        wrong = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, copies)
        found = jax.device_get(
            steps.check(
                jax.tree.unflatten(tree, [*leaves[:name], wrong, *leaves[name + 1 :]]), batch
            )
        ).tolist()
        assert found[:2] + found[3:] == right.tolist()[:3]
        assert found[2] != right[2]
        with pytest.raises(BadHost, match="3 of 4 agree") as caught:
            compare_digests(found, {0: [0], 1: [0], 2: [1, 1], 3: [1]})
        assert caught.value.processes == (1,)
    with pytest.raises(BadHost, match="no majority") as caught:
        compare_digests([1, 2], {0: [0], 1: [3]})
    assert caught.value.processes == (0, 3)
