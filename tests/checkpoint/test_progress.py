"""Progress in the data: each row once an epoch, whatever the settings of later launches change."""

import collections
import json
import math
import random

import grain
import jax
import numpy as np
import pytest

from baichuan_jax.checkpoint.progress import (
    Given,
    Piece,
    Progress,
    count_mixed,
    proportions,
)
from baichuan_jax.config.schema import ConfigError, MeshConfig
from baichuan_jax.data.loader import Loader
from baichuan_jax.resilience.guard import Window
from baichuan_jax.sharding import Layout, make_mesh

SEED = 3
LENGTHS = {"en": 40, "zh": 23, "code": 11}


class Numbered:
    """Rows whose tokens are the number of their corpus and their own."""

    context_length = 2

    def __init__(self, name: str) -> None:
        self._corpus, self._length = list(LENGTHS).index(name), LENGTHS[name]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array([self._corpus, index, 0], np.int32)


def given(weights: dict[str, float]) -> list[Given]:
    return [Given(name, f"rows of {name}", weight) for name, weight in weights.items()]


def begin(weights: dict[str, float], batch_size: int) -> Progress:
    return Progress(SEED).follow(SEED, given(weights), batch_size)


def resume(progress: Progress, weights: dict[str, float], batch_size: int) -> Progress:
    """The progress of a checkpoint, under the settings of the next launch."""
    saved = json.loads(json.dumps(progress.to_json()))
    return Progress.from_json(saved).follow(SEED, given(weights), batch_size)


def read(progress: Progress, batches: int, skip=()) -> tuple[list[list], Progress, list[Window]]:
    """The next batches as lists of (corpus, row), the progress behind them, and their windows."""
    sharding = Layout(make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])).sharding(
        "micro_batch", "batch", "length"
    )
    names = [corpus.name for corpus in progress.corpora if corpus.weight]
    loader = Loader(
        {name: Numbered(name) for name in names},
        progress=progress,
        accumulation_steps=1,
        eos_id=0,
        document_mask=False,
        sharding=sharding,
        skip=skip,
    )
    found, windows = [], []
    try:
        for _ in range(batches):
            windows.append(loader.window)
            rows = np.asarray(next(loader)["inputs"])[0].tolist()
            found.append([(list(LENGTHS)[corpus], row) for corpus, row in rows])
        return found, loader.progress, windows
    finally:
        loader.close()


def flat(batches: list[list]) -> list:
    return [row for batch in batches for row in batch]


def by_earlier_version(weights: dict[str, float], position: int, batch_size: int) -> list:
    """The batch at a position, as the program took it before it stored progress."""
    datasets = [
        grain.MapDataset.source(Numbered(name))
        .seed(SEED + 1000003 * index)
        .shuffle()
        .repeat(None, reseed_each_epoch=True)
        for index, name in enumerate(weights)
    ]
    mixed = datasets[0]
    if len(datasets) > 1:
        mixed = grain.MapDataset.mix(datasets, list(weights.values()))
    rows = [mixed[position * batch_size + row] for row in range(batch_size)]
    return [(list(LENGTHS)[row[0]], int(row[1])) for row in rows]


@pytest.mark.parametrize(
    "weights",
    [{"en": 2.0}, {"en": 1.0, "zh": 1.0}, {"zh": 0.3, "code": 0.1, "en": 1.7}],
    ids=lambda weights: "+".join(weights),
)
def test_under_the_same_settings_the_rows_are_those_of_earlier_versions(weights):
    wanted = [by_earlier_version(weights, position, 4) for position in range(60)]
    found, end, windows = read(begin(weights, 4), 60)
    assert found == wanted
    assert end.position == 60
    assert [window.begin for window in windows] == list(range(60))
    # From its checkpoint, which says a position alone.
    config = {"train": {"seed": SEED, "global_batch_size": 4, "context_length": 2}}
    config["data"] = {"train": weights}
    old = Progress.of_position(25, config, 2).follow(SEED, given(weights), 4)
    assert read(old, 35)[0] == wanted[25:]
    assert old.changes(Progress.of_position(25, config, 2)) == []


def test_counts_of_a_mixture_are_those_of_grain():
    rng = random.Random(0)
    for _ in range(50):
        weights = [rng.choice([1, 3, rng.uniform(0.01, 5)]) for _ in range(rng.randint(1, 6))]
        sources = [grain.MapDataset.range(1000000) for _ in weights]
        whole = proportions(weights)
        mixed = grain.MapDataset.mix(
            [source.map(lambda x, i=i: (i, x)) for i, source in enumerate(sources)], weights
        )
        for row in rng.sample(range(5000), 20):
            corpus, index = mixed[row]
            here, after = count_mixed(row, whole), count_mixed(row + 1, whole)
            assert (sum(here), sum(after)) == (row, row + 1)
            assert (here[corpus], after[corpus]) == (index, index + 1)


def test_another_batch_size_reads_every_row_once():
    batches, progress, positions = [], begin({"en": 1.0}, 4), []
    for count, batch_size in ((3, 4), (2, 8), (3, 4)):
        progress = resume(progress, {"en": 1.0}, batch_size)
        found, progress, windows = read(progress, count)
        batches += found
        positions += [(window.begin, window.rows) for window in windows]
    assert sorted(flat(batches)) == [("en", row) for row in range(40)]
    assert [len(batch) for batch in batches] == [4, 4, 4, 8, 8, 4, 4, 4]
    assert [position for position, _ in positions] == list(range(8))
    assert [rows for _, rows in positions] == list(
        zip([0, 4, 8, 12, 20, 28, 32, 36], [4, 8, 12, 20, 28, 32, 36, 40], strict=True)
    )
    assert progress.pieces == (Piece(0, 0, 4), Piece(3, 12, 8), Piece(5, 28, 4))
    assert [progress.row_of(position) for position in range(10)] == [
        *(0, 4, 8, 12, 20, 28, 32, 36, 40, 44)
    ]


def test_other_weights_go_on_where_every_corpus_is():
    progress, rows = begin({"en": 1.0, "zh": 1.0}, 4), []
    # The order of the keys says nothing.
    for weights in ({"en": 1.0, "zh": 1.0}, {"zh": 0.1, "en": 1.0}, {"zh": 1.0, "en": 0.5}):
        progress = resume(progress, weights, 4)
        rows += flat(read(progress, 5)[0])
        progress = read(progress, 5)[1]
    counted = collections.Counter(rows)
    assert sum(counted.values()) == 60
    # 10 + 19 + 7 of en; epochs have 40 rows of en, 23 of zh.
    taken = collections.Counter(name for name, _ in rows)
    assert taken == {"en": progress.taken()[0], "zh": progress.taken()[1]} == {"en": 36, "zh": 24}
    assert max(counted[name, row] for name, row in counted if name == "en") == 1
    assert len([1 for name, _ in counted if name == "zh"]) == 23


def test_weights_in_the_same_ratio_are_the_same_mixture():
    progress = read(begin({"en": 1.0, "zh": 3.0}, 4), 3)[1]
    after = resume(progress, {"zh": 6.0, "en": 2.0}, 4)
    assert (after.since, after.changes(progress)) == (0, [])
    assert read(after, 9)[0] == read(progress, 9)[0]


def test_a_corpus_that_comes_back_goes_on_where_it_was():
    both, one = {"en": 1.0, "zh": 1.0}, {"en": 1.0}
    first, progress, _ = read(begin(both, 4), 3)
    without = resume(progress, one, 4)
    assert "zh is left out from here; it would go on behind 6 rows" in without.changes(progress)
    second, progress, _ = read(without, 3)
    back = resume(progress, {**both, "code": 1.0}, 4)
    assert back.changes(progress) == [
        "new weights from here: en 1 (18 rows taken), zh 1 (6 rows taken), code 1 (0 rows taken)"
    ]
    third, _, _ = read(back, 6)
    rows = flat([*first, *second, *third])
    assert max(collections.Counter(rows).values()) == 1
    assert collections.Counter(name for name, _ in rows) == {"en": 26, "zh": 14, "code": 8}


def test_a_corpus_is_known_by_its_rows_and_two_of_the_same_by_their_names():
    progress = read(begin({"en": 1.0, "zh": 1.0}, 4), 3)[1]
    moved = progress.follow(
        SEED, [Given("new place", "rows of en", 1.0), Given("zh", "rows of zh", 1.0)], 4
    )
    assert moved.taken() == [6, 6]
    assert moved.since == 0
    assert moved.changes(progress) == ["new place has the rows of en and goes on behind its 6"]
    exchanged = progress.follow(
        SEED, [Given("en", "rows of zh", 1.0), Given("zh", "rows of en", 1.0)], 4
    )
    assert [corpus.rows for corpus in exchanged.corpora] == ["rows of en", "rows of zh"]
    twice = [Given("a", "same", 1.0), Given("b", "same", 2.0)]
    progress = Progress(SEED).follow(SEED, twice, 4).at(12)
    assert progress.follow(SEED, twice[::-1], 4) == progress


def test_other_rows_under_a_name_are_counted_from_0_and_that_is_said():
    progress = read(begin({"en": 1.0, "zh": 1.0}, 4), 3)[1]
    changed = [Given("en", "other rows", 1.0), Given("zh", "rows of zh", 1.0)]
    after = progress.follow(SEED, changed, 4)
    assert after.taken() == [6, 6, 0]
    said = "; ".join(after.changes(progress))
    assert "rows of en are others than those this run has read 6 of: they are counted" in said
    assert "left out" not in said
    # The rows of before come back, and are no others.
    again = after.follow(SEED, given({"en": 1.0, "zh": 1.0}), 4)
    assert again.taken() == [6, 6, 0]
    assert "others" not in "; ".join(again.changes(after))


def test_rows_of_another_length_are_others_to_a_checkpoint_of_an_earlier_version():
    config = {"train": {"seed": SEED, "global_batch_size": 4, "context_length": 64}}
    config["data"] = {"train": {"en": 1.0}}
    old = Progress.of_position(5, config, 128)
    assert "others than those this run has read 20 of" in "; ".join(
        old.follow(SEED, given({"en": 1.0}), 4).changes(old)
    )


def test_another_seed_is_refused_with_both():
    assert begin({"en": 1.0}, 4).follow(7, given({"en": 1.0}), 4).seed == 7
    with pytest.raises(ConfigError, match=r"train\.seed=7, .* 8 rows in the order of seed 3"):
        begin({"en": 1.0}, 4).at(8).follow(7, given({"en": 1.0}), 4)


def test_windows_are_the_same_rows_at_another_batch_size():
    """Batches 5 and 6 of four rows, in batches of eight: two are filled with the rows behind."""
    progress = read(begin({"en": 1.0}, 4), 2)[1]
    _, _, windows = read(progress, 5)
    bad = windows[3].until(windows[4])
    assert bad == Window(5, 7, (20, 28))
    after = resume(progress, {"en": 1.0}, 8)
    # Positions alone: of the past as they were then, ahead at the size of today.
    assert after.rows_of(Window(1, 2)) == (4, 8)
    assert after.rows_of(Window(1, 3)) == (4, 16)
    found, end, windows = read(after, 3, skip=[bad.rows])
    whole = [row for position in range(10) for row in by_earlier_version({"en": 1.0}, position, 4)]
    assert flat(found) == [*whole[8:20], *whole[28:40]]
    assert [window.rows for window in windows] == [(8, 16), (16, 32), (32, 40)]
    assert [window.begin for window in windows] == [2, 3, 5]
    assert (end.row, end.position) == (40, 6)


def test_positions_stay_those_of_their_batches_behind_a_window_that_is_no_multiple_of_one():
    _, progress, windows = read(begin({"en": 1.0}, 8), 6, skip=[(10, 13), (40, 42)])
    for window in windows:
        assert progress.rows_of(Window(*window[:2]))[0] == window.rows[0]
    assert [window.begin for window in windows] == sorted({window.begin for window in windows})


@pytest.mark.parametrize("seed", range(20))
def test_any_history_of_settings_reads_what_a_walk_over_rows_reads(seed):
    rng = random.Random(seed)
    names, skip = list(LENGTHS), []
    order: list[str] = []  # in which the run met them
    taken = collections.Counter()
    row, position, progress, weights = 0, 0, None, {}

    def next_row(name):
        shuffled = grain.MapDataset.source(range(LENGTHS[name]))
        shuffled = shuffled.seed(SEED + 1000003 * order.index(name)).shuffle()
        # Behind its end it is the same rows in the order of the next epoch.
        found = shuffled[taken[name]]
        taken[name] += 1
        return (name, found)

    for _ in range(rng.randint(2, 7)):
        if rng.random() < 0.7 or not weights:
            chosen = rng.sample(names, rng.randint(1, 3))
            new = {name: rng.choice([1.0, 0.25, 3.0, rng.uniform(0.1, 2)]) for name in chosen}
            order += [name for name in new if name not in order]
            inorder = [name for name in order if name in new]
            same = list(weights) == inorder and proportions([*weights.values()]) == proportions(
                [new[name] for name in inorder]
            )
            weights = {name: new[name] for name in inorder}
            if not same:
                since = row
                sources = [grain.MapDataset.source([i]).repeat() for i in range(len(inorder))]
                mixed = grain.MapDataset.mix(sources, list(weights.values()))
        size = rng.choice([1, 2, 4, 8])
        begin_window = row + rng.randint(0, 30)
        skip.append((begin_window, begin_window + rng.randint(1, 9)))
        # In any order of keys, but for the corpora that the run meets now.
        keys = [name for name in weights if progress and name in progress_names(progress)]
        rng.shuffle(keys)
        shown = {name: weights[name] for name in [*keys, *weights]}
        progress = begin(shown, size) if progress is None else resume(progress, shown, size)
        batches, wanted = rng.randint(0, 6), []
        for _ in range(batches):
            batch = []
            while len(batch) < size:
                element = next_row(list(weights)[mixed[row - since]])
                batch += [] if any(a <= row < b for a, b in skip) else [element]
                row += 1
            wanted.append(batch)
        found, progress, windows = read(progress, batches, skip)
        assert found == wanted
        while any(a <= row < b for a, b in skip):
            next_row(list(weights)[mixed[row - since]])
            row += 1
        assert progress.row == row
        assert dict(zip(progress_names(progress), progress.taken(), strict=True)) == {
            name: taken[name] for name in order
        }
        for window in windows:
            assert window.begin >= position
            position = window.end
        assert progress.position >= position


def progress_names(progress: Progress) -> list[str]:
    return [corpus.name for corpus in progress.corpora]


@pytest.mark.parametrize(
    "damage",
    [
        {"row": "8"},
        {"row": -1},
        {"row": None},
        {"pieces": []},
        {"pieces": [[0, 0, 0]]},
        {"pieces": [[1, 4, 4]]},
        {"pieces": 3},
        {"corpora": [{"name": "en"}]},
        {"corpora": [{"name": "en", "rows": "x", "weight": "1"}]},
        {"since": 100},
        {"row": 1 << 63},
        {"pieces": [[0, 0, 4, 4]]},
        {"pieces": [[0, 0, 4], [0, 4, 4]]},
        {"corpora": ["en"]},
        {"corpora": [{"name": None, "rows": "x", "weight": 1.0}]},
        {"corpora": [{"name": "en", "rows": "x", "weight": math.inf}]},
        {"corpora": [{"name": n, "rows": n, "weight": w} for n, w in (("a", 1e308), ("b", 1e-9))]},
    ],
    ids=str,
)
def test_what_is_no_progress_is_refused(damage):
    whole = json.loads(json.dumps(begin({"en": 1.0}, 4).at(8).to_json()))
    assert Progress.from_json(whole) == begin({"en": 1.0}, 4).at(8)
    with pytest.raises(ValueError, match="no progress"):
        Progress.from_json({**whole, **damage})
    with pytest.raises(ValueError, match="no progress"):
        Progress.from_json([whole])
    for weight in (1e-320, 1e308):
        corpora = [{**whole["corpora"][0], "weight": weight}]
        with pytest.raises(ValueError, match="no progress"):
            Progress.from_json({**whole, "corpora": corpora})
    for name in whole:
        with pytest.raises(ValueError, match="no progress"):
            Progress.from_json({key: whole[key] for key in whole if key != name})


@pytest.mark.parametrize(
    "config",
    [{}, {"train": 3}, {"data": {"train": {"en": "1"}}}, {"data": {"train": {"en": -1.0}}}]
    + [{"data": {"train": {"en": weight}}} for weight in (1e-320, 1e308)],
    ids=str,
)
def test_what_is_no_configuration_of_an_earlier_version_is_refused(config):
    whole = {
        "train": {"global_batch_size": 4, "context_length": 8, "seed": 0},
        "data": {"train": {"en": 1.0}},
    }
    assert Progress.of_position(2, whole, 8).row == 8
    with pytest.raises(ValueError, match="no progress"):
        Progress.of_position(2, {**whole, **config} if config else config, 8)


def test_the_progress_of_a_later_version_is_refused_and_not_taken_for_damage():
    content = json.loads(json.dumps(begin({"en": 1.0}, 4).to_json()))
    with pytest.raises(ConfigError, match="stages, which a later version"):
        Progress.from_json({**content, "stages": []})
    with pytest.raises(ConfigError, match="stage, which a later version"):
        Progress.from_json({**content, "corpora": [{**content["corpora"][0], "stage": 1}]})
