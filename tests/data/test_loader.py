"""Batches are a function of seed and position alone; every device holds its own part of them."""

import collections
import contextlib
import json
import os
import shutil
import threading
import time

import jax
import numpy as np
import pytest

from baichuan_jax.checkpoint.progress import Given, Progress
from baichuan_jax.config.schema import ConfigError, MeshConfig
from baichuan_jax.data.loader import CLOSE_SECONDS, Loader, document_arrays, validation_batches
from baichuan_jax.data.rows import Rows, pack
from baichuan_jax.sharding import Layout, make_mesh
from baichuan_jax.tokenizer import Tokenizer, train_tokenizer

EOS, T, G = 2, 16, 16


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two corpora of packed rows, 100 and 37 of them, no two rows alike."""
    folder = tmp_path_factory.mktemp("corpora")
    documents = [f"the {i}th of {i * i}" for i in range(1000)]
    train_tokenizer(documents, folder / "a.model", 275)
    tokenizer = Tokenizer(folder / "a.model")
    sizes = np.cumsum([len(tokenizer.encode(document)) + 1 for document in documents])

    def make(name, first, rows):
        last = int(np.searchsorted(sizes, sizes[first - 1] + rows * (T + 1))) + 1
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": d}) + "\n" for d in documents[first:last])
        )
        return pack([f"{folder}/{name}.jsonl"], folder / name, tokenizer, T, num_workers=1)

    large, small = make("large", 10, 100), make("small", 500, 37)
    assert (len(large), len(small), len({*everything(large), *everything(small)})) == (100, 37, 137)
    return large, small


def everything(rows):
    return [tuple(rows[i].tolist()) for i in range(len(rows))]


def sharding_of(shape):
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    return Layout(mesh).sharding("micro_batch", "batch", "length")


def settings(shape=(1, 1, 1, 1), accumulation_steps=1, document_mask=False):
    return {
        "accumulation_steps": accumulation_steps,
        "eos_id": EOS,
        "document_mask": document_mask,
        "sharding": sharding_of(shape),
    }


@pytest.fixture
def load():
    """Start a loader; all are closed at the end."""
    loaders = []

    def start(*sources, seed=3, position=0, skip=(), **chosen):
        given = [Given(str(i), f"rows {i}", weight) for i, (_, weight) in enumerate(sources)]
        progress = Progress(seed).follow(seed, given, G).at(position * G)
        loader = Loader(
            {str(i): rows for i, (rows, _) in enumerate(sources)},
            progress=progress,
            skip=[(begin * G, end * G) for begin, end in skip],
            **settings(**chosen),
        )
        loaders.append(loader)
        return loader

    yield start
    for loader in loaders:
        loader.close()


def rows_of(batch):
    """The rows [T + 1] of a batch, in the batch's order."""
    inputs, labels = (np.asarray(batch[name]).reshape(-1, T) for name in ("inputs", "labels"))
    np.testing.assert_array_equal(inputs[:, 1:], labels[:, :-1])  # labels are the next tokens
    return [tuple(row.tolist()) for row in np.concatenate([inputs, labels[:, -1:]], axis=1)]


def take(loader, count):
    return [rows_of(next(loader)) for _ in range(count)]


def elements_of(loader, batches):
    return [row for rows in take(loader, batches) for row in rows]


def test_a_position_holds_the_same_rows_in_any_number_of_micro_batches(corpora, load):
    chosen = [(corpora[0], 3.0), (corpora[1], 1.0)]
    whole = take(load(*chosen), 10)
    assert len({row for rows in whole for row in rows}) > 100
    for accumulation_steps, shape in (
        (2, (1, 1, 1, 1)),
        (4, (2, 2, 1, 1)),
        (2, (8, 1, 1, 1)),
        (1, (1, 2, 2, 2)),
    ):
        loader = load(*chosen, accumulation_steps=accumulation_steps, shape=shape)
        batch = next(loader)
        assert {x.shape for x in batch.values()} == {
            (accumulation_steps, G // accumulation_steps, T)
        }
        assert {str(x.dtype) for x in batch.values()} == {"int32"}
        found = [rows_of(batch), *take(loader, 9)]
        assert [collections.Counter(rows) for rows in found] == [
            collections.Counter(rows) for rows in whole
        ]


@pytest.mark.parametrize("position", [1, 6, 7, 20])  # the first epoch ends within position 6
def test_starting_at_a_position_equals_stepping_to_it(corpora, load, position):
    for chosen in ([(corpora[0], 1.0)], [(corpora[0], 3.0), (corpora[1], 1.0)]):
        stepped, started = load(*chosen), load(*chosen, position=position)
        wanted = take(stepped, position + 3)[position:]
        assert (stepped.position, started.position) == (position + 3, position)
        assert take(started, 3) == wanted
        assert started.position == position + 3


@pytest.mark.parametrize("position", [0, 3, 5, 8])
def test_windows_are_left_out_wherever_reading_starts(corpora, load, position):
    skip = ((4, 6), (7, 8), (5, 7), (12, 13))  # 4 to 7 and 12 are left out
    kept = [p for p in range(20) if p not in (4, 5, 6, 7, 12)]
    whole = take(load((corpora[0], 1.0)), 20)
    loader = load((corpora[0], 1.0), position=position, skip=skip)
    for wanted in [p for p in kept if p >= position][:8]:
        assert loader.position == wanted
        assert take(loader, 1) == [whole[wanted]]


def test_an_epoch_has_every_row_once_and_each_epoch_another_order(corpora, load):
    elements = elements_of(load((corpora[0], 1.0)), 3 * 100 // G + 1)
    epochs = [elements[i * 100 : (i + 1) * 100] for i in range(3)]
    rows = everything(corpora[0])
    for epoch in epochs:
        assert sorted(epoch) == sorted(rows)
        assert sum(a == b for a, b in zip(epoch, rows, strict=True)) < 20  # it is shuffled
    assert all(
        sum(a == b for a, b in zip(epochs[i], epochs[j], strict=True)) < 20
        for i, j in ((0, 1), (0, 2), (1, 2))
    )


def test_another_seed_gives_another_order(corpora, load):
    first, second, again = (
        elements_of(load((corpora[0], 1.0), seed=seed), 4) for seed in (3, 4, 3)
    )
    assert first == again
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20


def test_the_same_corpus_twice_is_in_two_orders(corpora, load):
    elements = elements_of(load((corpora[0], 1.0), (corpora[0], 1.0)), 12)
    assert sum(a == b for a, b in zip(elements[::2], elements[1::2], strict=True)) < 20


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (0.2, 0.8)])
def test_corpora_are_mixed_by_weight_and_each_is_used_in_full(corpora, load, weights):
    elements = elements_of(load((corpora[0], weights[0]), (corpora[1], weights[1])), 50)
    small = {*everything(corpora[1])}
    of_small = [row in small for row in elements]
    for i in range(1, len(elements)):  # all along, not only on the average
        assert abs(sum(of_small[:i]) - i * weights[1] / sum(weights)) <= 1
    counts = collections.Counter(row for row in elements if row in small)
    assert len(counts) == 37
    assert max(counts.values()) - min(counts.values()) <= 1  # whole epochs, and a part of one


@pytest.mark.parametrize(
    "shape", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (2, 2, 1, 1, 2)], ids=str
)
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_every_device_holds_its_slice_of_the_global_batch(corpora, load, shape, accumulation_steps):
    source = (corpora[0], 1.0)
    whole = np.array(take(load(source), 3))[2].reshape(accumulation_steps, -1, T + 1)
    batch = next(
        load(
            source,
            shape=shape,
            accumulation_steps=accumulation_steps,
            document_mask=True,
            position=2,
        )
    )
    documents = {
        name: x.reshape(*whole.shape[:2], T)
        for name, x in by_hand(whole[..., :-1].reshape(-1, T)).items()
    }
    wanted = {"inputs": whole[..., :-1], "labels": whole[..., 1:], **documents}
    assert batch.keys() == wanted.keys()
    sizes = MeshConfig(*shape)
    B, C = whole.shape[1] // sizes.batch_shards, T // sizes.context
    mesh = make_mesh(sizes).devices
    for name, array in batch.items():
        held = {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}
        assert len(held) == 8
        for (d, s, f, c, t), device in np.ndenumerate(mesh):
            b = (d * sizes.state + s) * sizes.fsdp + f
            expected = wanted[name][:, b * B : (b + 1) * B, c * C : (c + 1) * C]
            np.testing.assert_array_equal(
                held[device], expected, err_msg=f"{name} of {(d, s, f, c, t)}"
            )


def by_hand(inputs):
    """Segment ids and positions, token by token."""
    segments, positions = np.zeros_like(inputs), np.zeros_like(inputs)
    for n, row in enumerate(inputs.tolist()):
        segment, position = 1, 0
        for i, token in enumerate(row):
            segments[n, i], positions[n, i] = segment, position
            position += 1
            if token == EOS:
                segment, position = segment + 1, 0
    return {"segment_ids": segments, "positions": positions}


def test_documents_are_numbered_and_counted_from_their_starts():
    inputs = np.random.default_rng(0).choice([EOS, 5, 6, 7], (50, 12), p=[0.3, 0.3, 0.2, 0.2])
    inputs[0], inputs[1], inputs[2] = EOS, 5, [5] * 11 + [EOS]
    inputs[3, 0] = EOS
    found, wanted = document_arrays(inputs, EOS), by_hand(inputs)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])
        assert found[name].dtype == np.int32


@pytest.mark.parametrize("shape, accumulation_steps", [((1, 1, 1, 1), 1), ((2, 2, 2, 1), 2)])
def test_validation_takes_every_row_once_from_all_corpora_in_turn(
    corpora, shape, accumulation_steps
):
    large, small = map(everything, corpora)
    wanted = [row for pair in zip(large, small, strict=False) for row in pair] + large[37:]
    chosen = {"batch_size": G, **settings(shape=shape, accumulation_steps=accumulation_steps)}

    def batches(num_batches):
        return list(
            validation_batches(
                [(corpora[0], 1.0), (corpora[1], 9.0)], **chosen, num_batches=num_batches
            )
        )

    found = batches(100)
    assert len(found) == -(-137 // G) == 9
    labels = np.concatenate([np.asarray(batch["labels"]).reshape(-1, T) for batch in found])
    inputs = np.concatenate([np.asarray(batch["inputs"]).reshape(-1, T) for batch in found])
    assert [
        (*a, b[-1]) for a, b in zip(inputs[:137].tolist(), labels.tolist(), strict=False)
    ] == wanted
    np.testing.assert_array_equal(labels[:137, :-1], inputs[:137, 1:])
    assert (labels[137:] == -100).all()
    assert len(labels) == 9 * G
    assert (
        (inputs >= 0) & (inputs < 275)
    ).all()  # rows that are ignored go through the model all the same
    assert found[0]["inputs"].sharding == chosen["sharding"]
    for number in (1, 3, 9):
        again = batches(number)
        assert len(again) == number
        jax.tree.map(np.testing.assert_array_equal, again, found[:number])


def test_validation_keeps_documents_apart_where_training_does(corpora):
    for batch in validation_batches(
        [(corpora[1], 1.0)], batch_size=G, **settings(document_mask=True), num_batches=9
    ):
        wanted = by_hand(np.asarray(batch["inputs"]).reshape(-1, T))
        assert {*batch} == {"inputs", "labels", *wanted}
        for name in wanted:
            np.testing.assert_array_equal(np.asarray(batch[name]).reshape(-1, T), wanted[name])


def gone(path):
    path.unlink()
    return "No such file"


def flipped(path):
    content = bytearray(path.read_bytes())
    content[300] ^= 1  # in one of the first rows: the file is padded
    path.write_bytes(content)
    return "hash mismatch"


def cut_short(path):
    os.truncate(path, 2000)
    return f"0 bytes instead of {2 * (T + 1)}"


@pytest.mark.parametrize("damage", [gone, flipped, cut_short])
def test_an_error_in_reading_reaches_the_caller_and_names_the_shard(
    corpora, load, tmp_path, damage
):
    rows = Rows(shutil.copytree(corpora[0].path, tmp_path / "rows"))
    if damage is cut_short:
        rows[0]  # so the file is open before it is cut
    message = damage(tmp_path / "rows" / "shard-00000.array_record")
    loader = load((rows, 1.0))
    with pytest.raises(
        ConfigError,
        match=rf"row \d+ of .*rows cannot be read from .*shard-00000\.array_record: .*{message}",
    ):
        take(loader, 100 // G + 1)
    position = loader.position
    with pytest.raises(ValueError, match="closed"):  # to go on would leave out a batch
        next(loader)
    assert loader.position == position
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < CLOSE_SECONDS


@pytest.mark.parametrize("batches", [0, 1, 20])
def test_close_ends_the_reading_threads(corpora, load, batches):
    before = {*threading.enumerate()}
    loader = load((corpora[0], 1.0))
    take(loader, batches)
    loader.close()
    deadline = time.monotonic() + 10
    while started := {*threading.enumerate()} - before:
        assert time.monotonic() < deadline, started
        time.sleep(0.01)


class Stuck:
    """A corpus whose files never answer."""

    context_length = T

    def __init__(self):
        self.asked, self.released = threading.Event(), threading.Event()

    def __len__(self):
        return 100

    def __getitem__(self, index):
        self.asked.set()
        self.released.wait(60)
        return np.zeros(T + 1, np.int32)


def test_close_returns_while_a_read_hangs(load):
    rows = Stuck()
    loader = load((rows, 1.0))

    def read():
        with contextlib.suppress(RuntimeError):  # closed meanwhile
            next(loader)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert rows.asked.wait(10)
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < CLOSE_SECONDS + 3
    rows.released.set()
    reader.join(10)
    assert not reader.is_alive()
