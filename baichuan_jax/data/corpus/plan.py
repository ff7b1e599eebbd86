"""One run of the pipeline over a corpus: read, filter after filter, write, report."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import daft  # pyright: ignore[reportMissingImports]

from baichuan_jax.data.corpus.config import CorpusConfig
from baichuan_jax.data.corpus.filter import Cleaner, Filter
from baichuan_jax.data.corpus.reading import STAGE, read_corpus
from baichuan_jax.data.corpus.report import count_problems, make_funnel
from baichuan_jax.data.corpus.stages import Stages
from baichuan_jax.data.corpus.writing import write_corpus
from baichuan_jax.documents.files import count_unread


def clean_corpus(
    config: CorpusConfig, cleaner: Cleaner, filters: Sequence[Filter], stages: Stages
) -> dict[str, Any]:
    """All stages, each where it is not finished yet; what report.json holds of them."""
    seconds: dict[str, float] = {}
    notes: dict[str, Any] = {}
    with _timed(f"read and {cleaner.name}", seconds):
        corpus, read = read_corpus(stages, config, cleaner)
    # In the order of the list: a filter sees only what those before it have left.
    for each in filters:
        with _timed(each.name, seconds):
            effects = each.run(corpus)
            corpus.apply(each.name, effects)
        notes |= effects.notes
    names = [each.name for each in filters]
    # Text is written once, after all filters: until here they only say what is to happen to it.
    with _timed("write", seconds):
        written = write_corpus(corpus, names)
    # In the report all filters have a line, those that are switched off too.
    order = [STAGE, cleaner.name, *names]
    funnel = make_funnel(order, read.results, written, cleaner.name, corpus.effects.cutter)
    counted = {
        "files": read.files,
        **count_unread(config.input),
        "parts": read.parts,
        **funnel.pop("input"),
    }
    return {
        "input": counted,
        **funnel,
        "problems": count_problems(read.results, read.repeated_ids),
        "seconds": seconds,
        "workers": stages.workers.number,
        "daft": daft.__version__,
        **notes,
    }


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - began, 3)
