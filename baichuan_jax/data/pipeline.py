"""From raw text to a clean corpus: read, then filter after filter, then write.

    python -m baichuan_jax.data.pipeline --config configs/corpus.yaml --input 'corpus/*.jsonl.gz'
    --output DIR

Text stays in its part of the input all the way; filters compare parts by keys: hashes of documents
and of sentences. Writes final/*.parquet (id, text, source, lang, quality, frequency),
removed/*.parquet (id, stage, reason, duplicate_of), report.json, and the funnel as PNG and HTML.
Every document of the input is in exactly one of final/ and removed/; their bytes are a function of
the input and the settings, whatever the number of workers and restarts. RAY_ADDRESS names a cluster
to run on.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baichuan_jax.config.files import make_parser, parse_config
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.data.corpus import funnel
from baichuan_jax.data.corpus.config import CorpusConfig
from baichuan_jax.data.runner import Workers
from baichuan_jax.resilience.causes import Cause, SaveFailed, cause_of, describe
from baichuan_jax.resilience.exits import run_command
from baichuan_jax.resilience.ownership import owned_output
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import write_atomically

if TYPE_CHECKING:
    from baichuan_jax.data.corpus.filter import Cleaner, Filter


def filters_of(config: CorpusConfig) -> tuple["Cleaner", list["Filter"]]:
    """The filter that sees each text while it is read, and the filters of documents, in order.

    A new filter is a file beside this one and a line here. Raises ConfigError at a wrong setting.
    """
    # Not at the head of this file: they need daft, and --help does without.
    from baichuan_jax.data import decontaminate, near_duplicates, quality, rules, selection
    from baichuan_jax.data import sentences as sentence_filter

    return rules.Rules(config.rules), [
        quality.Quality(config.quality),
        decontaminate.Decontaminate(config.decontaminate),
        near_duplicates.NearDuplicates(config.dedup),
        # After whole documents: a sentence that two copies share is no repetition.
        sentence_filter.Sentences(config.sentences),
        # Last: a budget counts the bytes that the others have left.
        selection.Selection(config.select),
    ]


def run(
    config: CorpusConfig, progress: bool = True, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The whole pipeline; continues where a killed run stopped. Returns what report.json holds.

    Raises ConfigError.
    """
    # Here, so that a missing package becomes a message that says how to install it.
    try:
        from baichuan_jax.data.corpus.plan import clean_corpus
        from baichuan_jax.data.corpus.stages import (
            PAGE,
            PICTURE,
            REPORT,
            Stages,
            require_own_output,
        )
        from baichuan_jax.data.corpus.tables import Tables
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the data pipeline needs {error.name}: make data-deps, or "
            "pip install -r requirements-data.txt"
        ) from None
    output = Path(config.output)
    require_own_output(output)
    try:
        # Two pipelines in one folder would remove each other's unfinished files.
        with owned_output(output), Workers(config.num_workers, progress) as workers:
            cleaner, filters = filters_of(config)
            scratch = output / "stages" / "scratch"
            tables = Tables(scratch, workers.number, workers.on_ray)
            stages = Stages(output, workers, tables, say)
            report = clean_corpus(config, cleaner, filters, stages)
            # Kept where the run fails: it may show why.
            shutil.rmtree(scratch, ignore_errors=True)
            if not stages.made:
                say(f"{output} was complete: every part was there already, none was made again")
            report["settings"] = dataclasses.asdict(config)
            # report.json last: it is what others wait for.
            write_atomically(output / PICTURE, funnel.picture(report))
            write_atomically(output / PAGE, funnel.page(report).encode())
            content = json.dumps(report, indent=1, ensure_ascii=False)
            # Its settings may name files whose names are not UTF-8: escaped as JSON has it.
            write_atomically(output / REPORT, content.encode("utf-8", "backslashreplace"))
    except OSError as error:
        if cause_of(error) != Cause.STORAGE:
            raise
        raise SaveFailed(f"{output}: {describe(error)}: finished parts are kept") from None
    return report


def main(argv: list[str]) -> int:
    """The command. Returns its exit code."""
    parser = make_parser("python -m baichuan_jax.data.pipeline", __doc__ or "", CorpusConfig)
    config = parse_config(parser, _join_input(argv), CorpusConfig)
    display = Display()
    funnel.show(run(config, say=display.say), display)
    return 0


def _join_input(argv: list[str]) -> list[str]:
    """--input A B C (a glob that the shell has replaced) as the list that the parser takes."""
    if "--input" not in argv:
        return argv
    start = argv.index("--input") + 1
    options = (index for index in range(start, len(argv)) if argv[index].startswith("--"))
    stop = next(options, len(argv))
    values = argv[start:stop]
    if len(values) == 1 and values[0].startswith("["):
        return argv
    return [*argv[:start], json.dumps(values), *argv[stop:]]


if __name__ == "__main__":
    run_command(
        lambda: main(sys.argv[1:]),
        interrupted="finished parts are kept, and the same command goes on after them",
    )
