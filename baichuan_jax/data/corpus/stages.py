"""Makes the stages of one corpus, each once: parts in worker processes, tables with Daft."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from daft import DataFrame  # pyright: ignore[reportMissingImports]

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.data.corpus.parts import ParquetFile, Stage, StagePart, stage_key
from baichuan_jax.data.corpus.tables import Tables, is_finished
from baichuan_jax.data.runner import Workers
from baichuan_jax.resilience.ownership import require_own

# What a run replaces in its output.
FOLDERS = ("final", "removed", "stages")
REPORT, PICTURE, PAGE = "report.json", "funnel.png", "funnel.html"
OWN = (*FOLDERS, REPORT, PICTURE, PAGE)


def require_own_output(output: Path) -> None:
    """Raise ConfigError where the output has files of these names that no earlier run made."""
    begun = lambda: any(output.glob("stages/*/key"))
    require_own([output / name for name in OWN], output / "lock", begun)


def require_outside(files: Iterable[str], output: Path) -> None:
    """Raise ConfigError where a file of the input lies in what a run replaces in its output."""
    own = [os.path.realpath(output / name) for name in OWN]
    for file in files:
        real = os.path.realpath(file)
        if any(real == path or real.startswith(f"{path}{os.sep}") for path in own):
            raise ConfigError(
                f"{file} lies in what is written to the output {output}, and would be lost; choose "
                "another output"
            )


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

    def forget(self, last: Stage, why: str) -> None:
        """Remove all finished work: what was made from wrong parts has the keys of right ones.

        `last`: the stage that shows why, which is removed when all others are.
        """
        self._say(f"{self.output}: {why}; everything is made again")
        for folder in (self.output / "stages").iterdir():
            if folder not in (last.folder, self.tables.scratch):
                shutil.rmtree(folder)
        shutil.rmtree(last.folder)

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
