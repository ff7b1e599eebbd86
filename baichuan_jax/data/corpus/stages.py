"""Makes the stages of one corpus, each once: parts in worker processes, tables with Daft."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from daft import DataFrame  # pyright: ignore[reportMissingImports]

from baichuan_jax.data.corpus.parts import ParquetFile, Stage, StagePart, stage_key
from baichuan_jax.data.corpus.tables import Tables, is_finished
from baichuan_jax.data.runner import Workers


class Stages:
    """The folder of a corpus, what works on it, and how much of it was there already."""

    def __init__(
        self, output: Path, workers: Workers, tables: Tables, say: Callable[[str], None]
    ) -> None:
        self.output, self.workers, self.tables = output, workers, tables
        self._say = say
        # Parts and tables that this run made; the others were finished before.
        self.made = 0

    def stage(self, name: str, key: list[Any], outputs: tuple[Path, ...] = ()) -> Stage:
        """The stage of a name; `key` is all that its files depend on."""
        return Stage(self.output / "stages" / name, stage_key(name, *key), outputs)

    def run_parts(
        self, stage: Stage, work: Callable[[Any, ParquetFile], Any], arguments: list[Any]
    ) -> list[Any]:
        """The results of work on each of these arguments, in order; finished ones are kept."""
        if outdated := stage.prepare():
            self._say(
                f"{stage.folder.name}: {outdated} finished parts are of other settings, another "
                "input or another version; they are made again"
            )
        parts = [
            StagePart(stage, number, work, argument) for number, argument in enumerate(arguments)
        ]
        self.made += self.workers.finish(parts, stage.folder.name)
        # From the disk: most may be of an earlier run.
        return [stage.record(part.number) for part in parts]

    def make_table(
        self, name: str, key: list[Any], make: Callable[[], DataFrame]
    ) -> tuple[str, DataFrame]:
        """A table of the whole corpus that is kept; first its key, for what is made from it."""
        stage = self.stage(name, key)
        self.made += not is_finished(stage)
        return stage.key, self.tables.table(stage, make)
