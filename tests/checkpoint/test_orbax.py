"""Checkpoints: bit-exact, onto any mesh, and bad ones found by real damage to real files."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
import zstandard
from conftest import build, run_state

from baichuan_jax.checkpoint import orbax
from baichuan_jax.checkpoint.orbax import Checkpoints
from baichuan_jax.checkpoint.state import StateTarget
from baichuan_jax.checkpoint.weights import find_checkpoint, load_params, save_params
from baichuan_jax.config.schema import CheckpointConfig, ConfigError
from baichuan_jax.hf.config import read_config
from baichuan_jax.hf.weights import import_params
from baichuan_jax.resilience.causes import errno_of
from baichuan_jax.resilience.digests import digest

TINY = Path(__file__).parents[1] / "golden" / "tiny"


@pytest.fixture
def opened(tmp_path):
    """Open the checkpoints of a configuration on a mesh; all are closed at the end."""
    everything = []

    def open_(config, shape, tokenizer="abc"):
        config, steps = build(config, shape)
        target = StateTarget(steps.abstract_state)
        checkpoints = Checkpoints(tmp_path / "checkpoints", config, tokenizer, target)
        everything.append(checkpoints)
        return checkpoints, steps

    yield open_
    for checkpoints in everything:
        checkpoints.close()


@pytest.fixture(scope="module")
def state():
    """A state with other numbers in every array, on the host, made without compiling a model."""

    def make(steps, seed=0):
        rng = np.random.default_rng(seed)

        def fill(shape):
            whole = np.issubdtype(shape.dtype, np.integer)
            return (
                rng.integers(1, 9, shape.shape).astype(shape.dtype)
                if whole
                else rng.normal(size=shape.shape).astype(shape.dtype)
            )

        return jax.device_put(jax.tree.map(fill, steps.state_shapes), steps.state_shardings)

    return make


def refuse_reports(event):
    raise AssertionError(f"unexpected report {event}")


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def biggest_file(folder: Path) -> Path:
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


@pytest.mark.parametrize(
    ("first", "others"),
    [
        ((2, 4, 1, 1), [(1, 1, 1, 1), (1, 2, 2, 2), (1, 2, 1, 1, 4)]),
        ((1, 2, 1, 1, 4), [(2, 4, 1, 1)]),
    ],
    ids=str,
)
def test_a_checkpoint_is_restored_bit_for_bit_onto_another_mesh(
    tiny_config, opened, state, first, others
):
    checkpoints, steps = opened(tiny_config, first)
    saved = state(steps)
    checkpoints.save(run_state(saved, 5, 7))
    assert checkpoints.finish() == 5
    for shape in others:
        other, steps = opened(tiny_config, shape)
        restored = other.restore(refuse_reports)
        assert (restored.step, restored.position) == (5, 7)
        assert_equal(restored.state, saved)
        jax.tree.map(
            lambda x, sharding: x.sharding == sharding or pytest.fail(str(x.sharding)),
            restored.state,
            steps.state_shardings,
        )


def test_what_the_loop_does_to_the_state_after_save_returns_is_not_saved(
    tiny_config, opened, state
):
    checkpoints, steps = opened(tiny_config, (1, 1, 1, 1))
    running = state(steps)
    wanted = jax.device_get(running)
    checkpoints.save(run_state(running, 1, 1))
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 1, tree), donate_argnums=0)
    for _ in range(5):
        running = change(running)
    checkpoints.finish()
    assert_equal(checkpoints.restore(refuse_reports).state, wanted)


def truncated(path: Path):
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncated, flipped, Path.unlink])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    tiny_config, opened, state, damage, capfd
):
    checkpoints, steps = opened(tiny_config, (1, 2, 1, 1))
    for step in (1, 2):
        checkpoints.save(run_state(state(steps, seed=step), step, step))
    checkpoints.finish()
    damage(biggest_file(checkpoints.directory / "2" / "params"))
    reports = []
    restored = checkpoints.restore(
        lambda event: reports.append((event.kind, event.step, event.path))
    )
    assert restored.step == 1
    assert_equal(restored.state, state(steps, seed=1))
    assert reports == [("checkpoint_corrupt", 2, str(checkpoints.directory / "2"))]
    assert (checkpoints.directory / "2.corrupt").is_dir()
    assert "Traceback" not in capfd.readouterr().err
    checkpoints.save(run_state(state(steps), 2, 2))  # the step is free again
    assert checkpoints.finish() == 2


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(number, os.strerror(number)) for number in (13, 12, 24, 116)),
        ValueError('PERMISSION_DENIED: Error reading "/run/d/1": Permission denied'),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_system_refuses_to_read_is_not_damaged(
    tiny_config, opened, state, monkeypatch, error
):
    """Renamed, a whole checkpoint would be lost to every later launch."""
    checkpoints, steps = opened(tiny_config, (1, 1, 1, 1))
    for step in (1, 2):
        checkpoints.save(run_state(state(steps, seed=step), step, step))
    checkpoints.finish()

    def refuse(*_, wrong=error):
        raise wrong

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointer, "restore", refuse)
        with pytest.raises((OSError, RuntimeError, MemoryError)) as caught:
            checkpoints.restore(refuse_reports)
    assert errno_of(caught.value) == errno_of(error)
    assert checkpoints.steps() == [1, 2]
    # Orbax says something else of a file that it may not open, and leaves out such a folder.
    real = open

    def closed(file, *rest, **options):
        if "/2/" in str(file) and "metadata" in str(file).lower():
            raise PermissionError(13, os.strerror(13), str(file))
        return real(file, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", closed)
        patch.setattr(ocp.StandardCheckpointer, "restore", lambda *_: refuse(wrong=KeyError()))
        with pytest.raises(PermissionError):
            checkpoints.restore(refuse_reports)
    assert checkpoints.restore(refuse_reports).step == 2


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(tiny_config, opened, state):
    checkpoints, steps = opened(tiny_config, (1, 1, 1, 1))
    for step in (1, 2):
        checkpoints.save(run_state(state(steps, seed=step), step, step))
    checkpoints.finish()
    for step in ("1", "2"):
        truncated(biggest_file(checkpoints.directory / step / "params"))
    # Now, and when somebody starts the same command again.
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"damaged checkpoints only \(1.corrupt, 2.corrupt\)"):
            checkpoints.restore(lambda _: None)


def test_an_unfinished_save_is_not_a_checkpoint(tiny_config, opened, state):
    checkpoints, steps = opened(tiny_config, (1, 1, 1, 1))
    checkpoints.save(run_state(state(steps), 1, 1))
    checkpoints.finish()
    leftover = checkpoints.directory / "2.orbax-checkpoint-tmp"
    (leftover / "params").mkdir(parents=True)
    again, _ = opened(tiny_config, (1, 1, 1, 1))
    assert again.steps() == [1]
    assert again.restore(refuse_reports).step == 1
    assert not leftover.exists()


def test_keep_last_and_keep_every(tiny_config, opened, state):
    config = dataclasses.replace(
        tiny_config, checkpoint=CheckpointConfig(every=1, keep_last=2, keep_every=3)
    )
    checkpoints, steps = opened(config, (1, 1, 1, 1))
    for step in range(1, 8):
        checkpoints.save(run_state(state(steps), step, step))
    checkpoints.finish()
    assert checkpoints.steps() == [3, 6, 7]


def test_another_model_is_refused_with_both_shapes(tiny_config, opened, state):
    checkpoints, steps = opened(tiny_config, (1, 1, 1, 1))
    checkpoints.save(run_state(state(steps), 1, 1))
    checkpoints.finish()
    wider = dataclasses.replace(
        tiny_config, model=dataclasses.replace(tiny_config.model, intermediate_size=192)
    )
    with pytest.raises(
        ConfigError,
        match=r"w_down is \(2, 176, 64\) float32, the configuration makes \(2, 192, 64\)",
    ):
        opened(wider, (1, 1, 1, 1))[0].restore(refuse_reports)
    with pytest.raises(ConfigError, match="tokenizer abc and this run's is xyz"):
        opened(tiny_config, (1, 1, 1, 1), tokenizer="xyz")[0].restore(refuse_reports)
    assert (checkpoints.directory / "1").is_dir()


def test_weights_alone_are_read_from_a_run_a_checkpoint_and_a_weights_folder(
    tiny_config, opened, state, tmp_path
):
    checkpoints, steps = opened(tiny_config, (1, 2, 1, 1))
    saved = state(steps)
    checkpoints.save(run_state(saved, 3, 3))
    checkpoints.finish()
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "3"):
        model, params = load_params(find_checkpoint(path), steps.layout)
        assert model == tiny_config.model
        assert_equal(params, saved.params)
    save_params(tmp_path / "weights", model, params)
    assert_equal(load_params(tmp_path / "weights")[1], saved.params)
    broken = jax.tree.map(lambda leaf: leaf, params)
    broken["final_norm"] = broken["final_norm"].at[1].set(np.inf)
    save_params(tmp_path / "broken", model, broken)
    with pytest.raises(ConfigError, match=r"broken are not finite \(final_norm: 1 of"):
        load_params(tmp_path / "broken")
    flipped(biggest_file(tmp_path / "weights" / "params"))
    with pytest.raises(ConfigError, match="weights is damaged"):
        load_params(tmp_path / "weights")
    with pytest.raises(ConfigError, match="neither a run's folder"):
        find_checkpoint(tmp_path / "nowhere")


def test_the_digest_sees_values_and_order_but_not_the_sharding(tiny_config):
    x = np.arange(64, dtype=np.float32).reshape(4, 16)
    _, steps = build(tiny_config, (1, 4, 1, 2))
    value = [int(v) for v in digest({"x": x})]
    assert [
        int(v)
        for v in jax.jit(digest)({"x": jax.device_put(x, steps.layout.sharding("embed", "heads"))})
    ] == value
    for changed in (x[::-1], x.T.reshape(4, 16), x + np.eye(4, 16, dtype=np.float32) * 1e-3):
        assert [int(v) for v in digest({"x": np.ascontiguousarray(changed)})] != value


@pytest.fixture
def weights(tmp_path):
    """A folder of weights, and its arrays as TensorStore keeps them."""
    save_params(tmp_path / "weights", read_config(TINY), import_params(TINY))
    base = f"file://{tmp_path}/weights/params/"
    return tmp_path / "weights", tensorstore.KvStore.open(
        {"driver": "ocdbt", "base": base}
    ).result()


def describe_array(arrays, name, **values):
    described = json.loads(arrays.read(f"{name}/.zarray").result().value) | values
    arrays.write(f"{name}/.zarray", json.dumps(described).encode()).result()


@pytest.mark.parametrize("chunks", [[1 << 20, 1 << 14], [512, 65], [1, 1]])
def test_an_array_in_chunks_that_no_save_makes_is_refused(weights, chunks, monkeypatch):
    """TensorStore would ask for the memory of a whole chunk, or of a request for each."""
    folder, arrays = weights
    monkeypatch.setattr(orbax, "MOST_CHUNKS", 1 << 14)
    describe_array(arrays, "embedding", chunks=chunks)
    with pytest.raises(
        ConfigError, match=r"weights/params .*embedding is \(512, 64\) in chunks of"
    ):
        load_params(folder)


def test_arrays_that_hold_far_more_than_their_files_are_refused(weights, monkeypatch):
    folder, arrays = weights
    assert load_params(folder)[0].vocab_size == 512
    monkeypatch.setattr(orbax, "FREE_BYTES", 1 << 20)
    rows = 1 << 21
    run = json.loads((folder / "run" / "metadata").read_text())
    run["config"]["model"]["vocab_size"] = rows
    (folder / "run" / "metadata").write_text(json.dumps(run))
    compressed = zstandard.ZstdCompressor().compress(bytes(rows * 256))
    for name, shape in (("embedding", [rows, 64]), ("lm_head", [64, rows])):
        describe_array(arrays, name, chunks=shape, shape=shape)
        arrays.write(f"{name}/0.0", compressed).result()
    with pytest.raises(ConfigError, match=r"weights has [\d,]+ bytes of arrays, and its config"):
        load_params(folder)


def test_a_link_out_of_a_checkpoint_is_refused(weights, tmp_path):
    folder, _ = weights
    (folder / "params" / "d").rename(tmp_path / "d")
    (folder / "params" / "d").symlink_to(tmp_path / "d")
    with pytest.raises(ConfigError, match=r"params/d is a link out of the run's folder"):
        load_params(folder)
    # The folder itself may be one: whoever names it means it.
    (folder / "params" / "d").unlink()
    (tmp_path / "d").rename(folder / "params" / "d")
    (tmp_path / "link").symlink_to(folder)
    assert load_params(tmp_path / "link")[0].vocab_size == 512


def test_tensorstore_reads_no_file_above_the_folder_that_it_was_given(tmp_path):
    """A manifest names its files: what they are called is not looked at here."""
    (tmp_path / "secret").write_text("x")
    (tmp_path / "folder").mkdir()
    store = tensorstore.KvStore.open({"driver": "file", "path": f"{tmp_path}/folder/"}).result()
    for name in ("../secret", "a/../../secret", f"{tmp_path}/secret"):
        with pytest.raises(ValueError, match="Invalid key"):
            store.read(name).result()
