"""From raw text to a clean corpus: raw -> rules -> {quality, documents, sentences} -> select -> final, as the original describes it.

    python -m baichuan_jax.data.pipeline --config configs/corpus.yaml --input 'corpus/*.jsonl.gz'
    --output DIR

Text stays in its part of the input all the way; what the parts tell each other is keys: hashes of
documents and sentences. Writes final/*.parquet (id, text, source, lang, quality, frequency),
removed/*.parquet (id, stage, reason, duplicate_of), report.json, and the funnel as PNG and HTML.
Every document of the input is in exactly one of final/ and removed/; their bytes are a function of
the input and the settings, whatever the number of workers and restarts. RAY_ADDRESS names a cluster
to run on.
"""

import dataclasses
import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from baichuan_jax.config.files import make_parser, parse_config
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.data.corpus import funnel
from baichuan_jax.data.corpus.config import CorpusConfig
from baichuan_jax.data.rows import locked
from baichuan_jax.resilience.exits import run_command
from baichuan_jax.runs.files import write_atomically


def run(config: CorpusConfig, progress: bool = True) -> dict[str, Any]:
    """The whole pipeline; goes on where a killed run stopped. Returns what report.json holds. Raises ConfigError."""
    try:
        from baichuan_jax.data.corpus.engine import START_AGAIN, Engine
        from baichuan_jax.data.corpus.stages import Plan
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the data pipeline needs {error.name}: make data-deps, or pip install -r requirements-data.txt"
        ) from None
    output = Path(config.output)
    try:
        with locked(output / "lock"):
            scratch = output / "stages" / "scratch"
            report = Plan(config, Engine(config.num_workers, progress, scratch)).run()
            shutil.rmtree(scratch, ignore_errors=True)
            report["settings"] = dataclasses.asdict(config)
            write_atomically(output / "funnel.png", funnel.picture(report))
            write_atomically(output / "funnel.html", funnel.page(report).encode())
            write_atomically(
                output / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode()
            )
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ConfigError(f"{output}: {error}{START_AGAIN}") from None
    return report


def main(words: list[str]) -> int:
    """The command. Returns its exit code."""
    parser = make_parser("python -m baichuan_jax.data.pipeline", __doc__ or "", CorpusConfig)
    config = parse_config(parser, _join_input(words), CorpusConfig)
    funnel.show(run(config))
    return 0


def _join_input(words: list[str]) -> list[str]:
    """--input A B C (a glob that the shell has replaced) as the list that the settings' parser takes."""
    if "--input" not in words:
        return words
    start = words.index("--input") + 1
    stop = next(
        (index for index in range(start, len(words)) if words[index].startswith("--")), len(words)
    )
    values = words[start:stop]
    return (
        words
        if len(values) == 1 and values[0].startswith("[")
        else [*words[:start], json.dumps(values), *words[stop:]]
    )


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
