"""How far a run is in its data, as a value: what its next batch depends on beside the settings.

The data of a run are one sequence of rows, numbered 0, 1, ... over its whole life. `Progress` says
how many of them are taken, from which corpora, and how batches have cut them. It is made from the
settings at a run's start, saved in every checkpoint, and followed on where the settings of a later
launch differ: with another batch size or other weights the sequence goes on at the same row, and
every corpus at the row where it is. So a row of a corpus is read once an epoch, whatever changes.

Rows are mixed as by grain's MapDataset.mix, which earlier checkpoints rest on: with P_i the weights
as whole numbers and S the sum of those not yet looked at, corpus i has k - k (S - P_i) // S of
the first k rows, and the corpora behind it share the rest. No prefix is more than a row away from
the ratios. The formula stands here, since counts of rows must not follow a library's changes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from baichuan_jax.config.parsing import Count, Positive, build, require_keys, show
from baichuan_jax.config.schema import HUGEST, MOST_APART, TINIEST, ConfigError
from baichuan_jax.resilience.guard import Window


class Given(NamedTuple):
    """A corpus of the settings: its key in data.train, its rows' identity, its weight."""

    name: str
    rows: str
    weight: float


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus that a run has met; its place among them decides the order of its rows.

    `rows`: their identity (Rows.identity); None: a checkpoint of an earlier version, which has the
    name alone. `weight`: in the mixture under way; 0: not in it. `before`: rows taken before that
    mixture began.
    """

    name: str
    rows: str | None
    weight: float
    before: Count = 0


class Piece(NamedTuple):
    """From `row` on, at batch number `position`, batches have `batch_size` rows."""

    position: int
    row: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Progress:
    """`row`: rows of the run taken so far, those of windows that are left out included.

    `seed` of the order. `corpora` in the order in which the run met them. `since`: the row where
    the mixture under way began. `pieces`: how positions, which count batches, convert to rows.
    """

    seed: int
    row: int = 0
    corpora: tuple[Corpus, ...] = ()
    since: int = 0
    pieces: tuple[Piece, ...] = ()

    @property
    def position(self) -> int:
        """Of the next batch."""
        return self._position(self.row)

    @property
    def batch_size(self) -> int:
        """Rows of the next batch."""
        return self.pieces[-1].batch_size

    def _position(self, row: int) -> int:
        position, begin, size = self.pieces[-1]
        return position + (row - begin) // size

    def at(self, row: int) -> "Progress":
        """The same sequence, when `row` rows of it are taken; not before the newest piece."""
        _, begin, size = self.pieces[-1]
        moved = dataclasses.replace(self, row=row)
        # After a window that is no multiple of a batch, batches begin elsewhere.
        return moved if (row - begin) % size == 0 else moved._begin_piece(size)

    def _begin_piece(self, batch_size: int) -> "Progress":
        position = self.position if self.pieces else 0
        # A piece that begins at this position has no batch.
        kept = [piece for piece in self.pieces if piece.position < position]
        pieces = (*kept, Piece(position, self.row, batch_size))
        return dataclasses.replace(self, pieces=pieces)

    def row_of(self, position: int) -> int:
        """Where the batch of a position begins; ahead of the run, at the present batch size."""
        number = max(i for i, piece in enumerate(self.pieces) if piece.position <= position)
        piece = self.pieces[number]
        row = piece.row + (position - piece.position) * piece.batch_size
        # The last position of a piece may have fewer rows than a batch.
        return min([row, *(later.row for later in self.pieces[number + 1 : number + 2])])

    def rows_of(self, window: Window) -> tuple[int, int]:
        """The rows [begin, end) of a window, which may have positions alone."""
        return window.rows or (self.row_of(window.begin), self.row_of(window.end))

    @functools.cached_property
    def _mixture(self) -> tuple[list[int], list[int]]:
        """Numbers of the corpora of the mixture under way, and their whole proportions."""
        numbers = [i for i, corpus in enumerate(self.corpora) if corpus.weight]
        return numbers, proportions([self.corpora[i].weight for i in numbers])

    def taken(self, row: int | None = None) -> list[int]:
        """Rows of each corpus among the first `row`, not before the mixture began; default: now."""
        numbers, whole = self._mixture
        found = [corpus.before for corpus in self.corpora]
        # Nothing is taken of no corpus.
        counts = count_mixed((self.row if row is None else row) - self.since, whole)
        for number, count in zip(numbers, counts, strict=True):
            found[number] += count
        return found

    def find(self, row: int) -> tuple[int, int]:
        """(number of the corpus, number of the row in the sequence of its epochs) of a row."""
        here, after = self.taken(row), self.taken(row + 1)
        number = next(i for i, count in enumerate(here) if after[i] != count)
        return number, here[number]

    def follow(self, seed: int, given: Sequence[Given], batch_size: int) -> "Progress":
        """This progress under the settings of a launch. Raises ConfigError for another seed."""
        if self.row and seed != self.seed:
            raise ConfigError(
                f"train.seed={seed}, and this run has taken {self.row} rows in the order of seed "
                f"{self.seed}: another order would read some of them again and others never; set "
                f"train.seed={self.seed}, or another run_dir"
            )
        corpora = _match(self.corpora, self.taken(), given)
        followed = dataclasses.replace(self, seed=seed, corpora=corpora, since=self.row)
        # By proportions: weights that are all doubled mean the same mixture.
        if followed._mixture == self._mixture:
            met = zip(corpora, self.corpora, strict=True)
            corpora = tuple(dataclasses.replace(new, before=old.before) for new, old in met)
            followed = dataclasses.replace(followed, corpora=corpora, since=self.since)
        if self.pieces and self.batch_size == batch_size:
            return followed
        return followed._begin_piece(batch_size)

    def changes(self, before: "Progress") -> list[str]:
        """What `follow` has changed, each with the rows that it is about; empty: nothing."""
        found = []
        if self.batch_size != before.batch_size:
            found.append(f"batches of {self.batch_size} rows from here, {before.batch_size} before")
        taken, known = self.taken(), before.corpora
        names = {corpus.name for corpus in self.corpora if corpus.weight}
        for corpus, old, rows in zip(self.corpora, known, taken, strict=False):
            if corpus.name != old.name:
                found.append(
                    f"{corpus.name} has the rows of {old.name} and goes on behind its {rows}"
                )
            if old.weight and not corpus.weight and corpus.name not in names:
                found.append(
                    f"{corpus.name} is left out from here; it would go on behind {rows} rows"
                )
        for corpus in self.corpora[len(known) :]:
            others = [
                rows for old, rows in zip(known, taken, strict=False) if old.name == corpus.name
            ]
            if any(others):
                found.append(
                    f"the rows of {corpus.name} are others than those this run has read "
                    f"{sum(others)} of: they are counted from 0, so text may be read again"
                )
        if self._mixture != before._mixture:
            mixed = zip(self.corpora, taken, strict=True)
            listed = [f"{c.name} {c.weight:g} ({rows} rows taken)" for c, rows in mixed if c.weight]
            found.append(f"new weights from here: {', '.join(listed)}")
        return found

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Progress":
        """The progress that a checkpoint holds.

        Raises ValueError for what is none, ConfigError for one of a later version.
        """
        if not isinstance(content, dict):
            raise ValueError(f"no progress in the data: {show(content)}")
        # Not damage, after which a run goes on from an older checkpoint.
        if later := _unknown(content, cls) or _unknown(content.get("corpora"), Corpus):
            raise ConfigError(
                f"the checkpoint's progress in the data has {', '.join(later)}, which a later "
                "version of the program wrote; go on with that version, or use another run_dir"
            )
        try:
            require_keys(content, _KINDS, "it")
            corpora = tuple(build(Corpus, corpus, "a corpus") for corpus in content["corpora"])
            pieces = tuple(Piece(*piece) for piece in content["pieces"])
        except (ConfigError, TypeError) as error:
            raise ValueError(f"no progress in the data: {error}") from None
        found = cls(content["seed"], content["row"], corpora, content["since"], pieces)
        weights = [corpus.weight for corpus in corpora if corpus.weight]
        if not (
            are_proportions(weights)
            and found.since <= found.row
            and pieces
            and pieces[0].position == 0
            and all(piece.batch_size and piece.row <= found.row for piece in pieces)
            and all(a.position < b.position and a.row < b.row for a, b in pairwise(pieces))
        ):
            raise ValueError(f"no progress in the data: {show(content)}")
        return found

    @classmethod
    def of_position(cls, position: int, config: dict[str, Any], context_length: int) -> "Progress":
        """That of a checkpoint with a position alone, by the configuration that it was made with.

        Earlier versions took row p G as the first of position p, whatever came before.
        `context_length`: today's; rows of another one are others. Raises ValueError for a
        configuration that lacks what it needs.
        """
        try:
            train = require_keys(config.get("train"), _TRAIN, "its train")
            given = require_keys(config.get("data"), {"train": dict[str, float]}, "its data")
        except ConfigError as error:
            raise ValueError(f"no progress in the data by the configuration: {error}") from None
        batch_size = train["global_batch_size"]
        rows = None if train["context_length"] == context_length else ""
        corpora = tuple(Corpus(name, rows, weight) for name, weight in given["train"].items())
        if not are_proportions([corpus.weight for corpus in corpora]):
            raise ValueError(f"no progress in the data by the weights {show(given['train'])}")
        pieces = (Piece(0, 0, batch_size),)
        return cls(train["seed"], position * batch_size, corpora, 0, pieces)


def _unknown(content: Any, cls: type) -> list[str]:
    """Names in a record, or a list of records, that a dataclass does not have."""
    records = content if isinstance(content, list) else [content]
    records = [record for record in records if isinstance(record, dict)]
    names = {field.name for field in dataclasses.fields(cls)}
    return sorted({name for record in records for name in record} - names)


# What JSON of a progress holds, and a configuration from which one is made.
_KINDS = {
    "seed": Count,
    "row": Count,
    "since": Count,
    "corpora": list[dict],
    "pieces": list[list[Count]],
}
_TRAIN = {"global_batch_size": Positive, "context_length": Count, "seed": Count}


def are_proportions(weights: Sequence[float]) -> bool:
    """Whether weights are numbers to compute with, near enough to each other to count rows by."""
    if not weights:
        return True
    least, most = min(weights), max(weights)
    return least >= TINIEST and most <= min(HUGEST, MOST_APART * least)


def proportions(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers, the smallest one as 100; the others are rounded down."""
    return [int(weight * (100 / min(weights))) for weight in weights]


def count_mixed(rows: int, whole: Sequence[int]) -> list[int]:
    """How many of the first rows of a mixture are of each corpus, by its proportions."""
    counts, remaining = [], sum(whole)
    for share in whole:
        # Of what the corpora before have left, this one takes its share, rounded up.
        left = rows * (remaining - share) // remaining
        counts.append(rows - left)
        rows, remaining = left, remaining - share
    return counts


def _match(
    known: Sequence[Corpus], taken: Sequence[int], given: Sequence[Given]
) -> tuple[Corpus, ...]:
    """The corpora that a run has met, with what is given in its place; new ones behind them.

    A corpus is known by its rows: it may have another name now. By its name too where several have
    the same rows, and by its name alone where a checkpoint does not say which rows it had.
    """
    found = [
        dataclasses.replace(corpus, weight=0.0, before=rows)
        for corpus, rows in zip(known, taken, strict=True)
    ]
    free, waiting = list(range(len(known))), list(given)
    # The surest first, over all corpora: a name must not take the place of the same rows.
    for same in (
        lambda old, new: (old.name, old.rows) == (new.name, new.rows),
        lambda old, new: old.rows == new.rows,
        lambda old, new: old.rows is None and old.name == new.name,
    ):
        for new in list(waiting):
            number = next((i for i in free if same(found[i], new)), None)
            if number is not None:
                found[number] = Corpus(new.name, new.rows, new.weight, found[number].before)
                free.remove(number)
                waiting.remove(new)
    return (*found, *(Corpus(new.name, new.rows, new.weight) for new in waiting))
