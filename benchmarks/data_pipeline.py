"""Cost of the data pipeline: beside datatrove on the same text, against the corpus's size, and of the loader beside a training.

    pip install -r requirements-data.txt -r requirements-data-bench.txt
    python benchmarks/data_pipeline.py peers [--megabytes 25] [--grams words ...] [--json FILE]
    python benchmarks/data_pipeline.py scale --megabytes 25 50 100 200 400 [--json FILE]
    python benchmarks/data_pipeline.py loader [--json FILE]

`peers`: near-duplicate documents alone, one worker each, on a corpus of corpus_truth.py, whose
planted copies give the recall: the pipeline; datatrove with its defaults (5-grams of words as its
English tokeniser cuts them, 14 bands of 8); with its tokeniser of each language; with 5-grams of
characters. Also all stages of the pipeline. `scale`: CPU-seconds of every stage, and the peak
memory of a process, by size. CPU-seconds are those of a process and all that it started: other load
on the machine changes them little.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script, run from anywhere

import argparse
import json
import os
import resource
import statistics
import subprocess
import tempfile
import threading
import time
from typing import Any

from results import Results

REPOSITORY = Path(__file__).parents[1]
CLOCK = os.sysconf("SC_CLK_TCK")
OFF = {
    "rules": ["--rules.enabled", "false", "--rules.personal_data", "keep"],
    "quality": ["--quality.enabled", "false"],
}
OFF["sentences"] = ["--sentences.enabled", "false"]
GRAMS = ("words", "language", "characters")
NEAR = ("exact", "punctuation", "edit_01", "edit_02")  # kinds of copies that de-duplication owes


class Measured:
    """A command run to its end: CPU-seconds of it and its descendants, and their curve over time."""

    def __init__(self, words: list[str], log: Path) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.curve: list[tuple[float, float]] = []  # (time, CPU-seconds until then)
        began = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *words], cwd=REPOSITORY, stdout=output, stderr=output
            )
            watch = threading.Thread(target=self._watch, args=(process,))
            watch.start()
            code = process.wait()
            self.ended = time.monotonic()
            watch.join()
        if code:
            raise SystemExit(
                f"{' '.join(words)} ended with {code}:\n{log.read_text(errors='replace')[-2000:]}"
            )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.curve.append((self.ended, self.cpu_seconds))
        self.seconds = self.ended - began
        self.peak_gb, self.sum_gb = self._peak / 1e9, self._sum / 1e9

    def _watch(self, process: subprocess.Popen) -> None:
        self._peak = self._sum = 0
        while process.poll() is None:
            cpu, largest, together = _tree(process.pid)
            self._peak, self._sum = max(self._peak, largest), max(self._sum, together)
            self.curve.append((time.monotonic(), cpu))
            time.sleep(0.2)

    def at(self, moment: float) -> float:
        """CPU-seconds used until a moment."""
        return max((cpu for when, cpu in self.curve if when <= moment), default=0.0)


def _tree(root: int) -> tuple[float, int, int]:
    """CPU-seconds of a process, its living descendants and those of theirs that ended; bytes of memory of the largest and of all."""
    children: dict[int, list[int]] = {}
    cpu: dict[int, float] = {}
    memory: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(entry))
        cpu[int(entry)] = sum(map(int, fields[11:15])) / CLOCK
        memory[int(entry)] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    total, largest, together, todo = 0.0, 0, 0, [root]
    while todo:
        pid = todo.pop()
        total += cpu.get(pid, 0.0)
        largest = max(largest, memory.get(pid, 0))
        together += memory.get(pid, 0)
        todo += children.get(pid, [])
    return total, largest, together


def make_corpus(folder: Path, megabytes: float, clean: list[str]) -> int:
    """A corpus of known truth. Returns the bytes of its files."""
    words = [
        "--output",
        str(folder),
        "--megabytes",
        str(megabytes),
        *(["--input", *clean] if clean else []),
    ]
    subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks/corpus_truth.py"), *words],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return sum(path.stat().st_size for path in folder.glob("corpus-*.jsonl"))


def run_pipeline(corpus: Path, output: Path, *words: str) -> Measured:
    command = [
        "-m",
        "baichuan_jax.data.pipeline",
        "--config",
        "configs/corpus.yaml",
        "--input",
        str([f"{corpus}/corpus-*.jsonl"]),
    ]
    return Measured([*command, "--output", str(output), *words], output.with_suffix(".log"))


def recall(corpus: Path, kept: set[str]) -> float:
    """Share of the planted copies in NEAR of which no more than one of the original and its copies was kept."""
    groups: dict[str, list[str]] = {}
    for line in (corpus / "truth.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        record = json.loads(line)
        if record["kind"] in NEAR:
            groups.setdefault(record["of"], [record["of"]]).append(record["id"])
    gone = sum(
        min(len(names) - 1, len(names) - sum(name in kept for name in names))
        for names in groups.values()
    )
    return gone / sum(len(names) - 1 for names in groups.values())


def kept_by_pipeline(output: Path) -> set[str]:
    import pyarrow.parquet

    return {
        name
        for path in (output / "final").glob("*.parquet")
        for name in pyarrow.parquet.read_table(path)["id"].to_pylist()
    }


def datatrove(corpus: Path, output: Path, grams: str) -> None:
    """datatrove's four steps of MinHash de-duplication, in this process; writes output/kept.json."""
    import numpy as np
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.utils.text import ngrams, simplify_text

    class Characters(MinhashDedupSignature):
        """Signatures of 5-grams of characters."""

        def get_shingles(self, text: str) -> Any:
            units = simplify_text(text, self.config.norm_config)
            hashes = [self._hash_func("".join(gram)) for gram in ngrams(units, self.config.n_grams)]
            return np.fromiter(hashes, dtype=np.uint64).reshape((-1, 1))

    config, kept = MinhashConfig(), []

    def collect(documents: Any, rank: int = 0, world_size: int = 1) -> Any:
        for document in documents:
            kept.append(document.id)
            yield document

    def run(folder: Path, signature: MinhashDedupSignature, *select: Any) -> None:
        read = [JsonlReader(str(corpus), glob_pattern="corpus-*.jsonl"), *select]
        steps = [
            [*read, signature],
            [
                MinhashDedupBuckets(
                    str(folder / "signatures"), str(folder / "buckets"), config=config
                )
            ],
            [MinhashDedupCluster(str(folder / "buckets"), str(folder / "remove"), config=config)],
            [*read, MinhashDedupFilter(str(folder / "remove")), collect],
        ]
        for number, step in enumerate(steps):
            tasks = config.num_buckets if number == 1 else 1
            LocalPipelineExecutor(
                step, tasks=tasks, workers=1, logging_dir=str(folder / f"logs-{number}")
            ).run()

    if grams == "words":
        run(output, MinhashDedupSignature(str(output / "signatures"), config=config))
    elif grams == "characters":
        run(output, Characters(str(output / "signatures"), config=config))
    else:
        for lang, name in (("en", "eng"), ("zh", "cmn_Hani")):
            folder = output / lang
            signature = MinhashDedupSignature(
                str(folder / "signatures"), config=config, language=name
            )
            run(
                folder,
                signature,
                LambdaFilter(lambda document, lang=lang: document.metadata["lang"] == lang),
            )
    (output / "kept.json").write_text(json.dumps(kept))


def peers(options: argparse.Namespace, folder: Path, results: Results) -> dict[str, Any]:
    """MB per CPU-second and recall of each, on the same corpus."""
    corpus = folder / "corpus"
    size = make_corpus(corpus, options.megabytes, options.input)
    rows = {}
    only = [word for words in OFF.values() for word in words]
    for name, words in (("documents only", only), ("all stages", [])):
        output = folder / name.replace(" ", "-")
        measured = run_pipeline(corpus, output, "--num_workers", "1", *words)
        rows[f"baichuan_jax, {name}"] = _row(
            measured, size, recall(corpus, kept_by_pipeline(output))
        )
    for grams in options.grams:
        output = folder / f"datatrove-{grams}"
        output.mkdir()
        words = [
            str(Path(__file__).absolute()),
            "datatrove",
            "--corpus",
            str(corpus),
            "--output",
            str(output),
            "--grams",
            grams,
        ]
        measured = Measured(words, folder / f"{grams}.log")
        rows[f"datatrove, {grams}"] = _row(
            measured, size, recall(corpus, set(json.loads((output / "kept.json").read_text())))
        )
    ours = rows["baichuan_jax, documents only"]["mb_per_cpu_second"]
    lines = []
    for name, row in rows.items():
        faster = f"{ours / row['mb_per_cpu_second']:.1f} x" if name.startswith("datatrove") else "-"
        speed = [f"{row['cpu_seconds']:.1f}", f"{row['mb_per_cpu_second']:.3f}", faster]
        lines.append([name, *speed, f"{row['recall']:.4f}", f"{row['peak_gb']:.2f}"])
    columns = [
        "",
        "CPU-seconds",
        "MB/CPU-second",
        "ours is faster",
        "recall of copies",
        "peak GB of a process",
    ]
    results.table(f"Near-duplicate documents of {size / 1e6:.0f} MB", columns, lines)
    return {"bytes": size, "rows": rows}


def _row(measured: Measured, size: int, found: float) -> dict[str, float]:
    return {
        "cpu_seconds": measured.cpu_seconds,
        "mb_per_cpu_second": size / 1e6 / measured.cpu_seconds,
        "recall": found,
        "peak_gb": measured.peak_gb,
    }


def scale(options: argparse.Namespace, folder: Path, results: Results) -> dict[str, Any]:
    """CPU-seconds of every stage by size of the corpus."""
    rows = []
    for megabytes in options.megabytes:
        corpus, output = folder / f"corpus-{megabytes:g}", folder / f"out-{megabytes:g}"
        size = make_corpus(corpus, megabytes, options.input)
        measured = run_pipeline(corpus, output)
        report = json.loads((output / "report.json").read_text(encoding="utf-8"))
        moment, stages = measured.ended, {}
        for stage, seconds in reversed(report["seconds"].items()):
            stages[stage] = measured.at(moment) - measured.at(moment - seconds)
            moment -= seconds
        stages["start"] = measured.at(moment)
        memory = {"peak_gb": measured.peak_gb, "sum_gb": measured.sum_gb}
        rows.append(
            {
                "bytes": size,
                "cpu_seconds": measured.cpu_seconds,
                "seconds": measured.seconds,
                "stages": stages,
                **memory,
            }
        )
        print(f"{size / 1e6:.0f} MB: {measured.cpu_seconds:.0f} CPU-seconds", flush=True)
        results.save(options.json, rows=rows)  # what there is, should a later size not end
    names = list(reversed(rows[0]["stages"]))
    lines = []
    for row in rows:
        cells = [f"{row['stages'].get(name, 0):.1f}" for name in names]
        total = row["cpu_seconds"]
        cells += [f"{total:.1f}", f"{total / row['bytes'] * 1e6:.3f}", f"{row['seconds'] / 60:.1f}"]
        lines.append(
            [f"{row['bytes'] / 1e6:.0f}", *cells, f"{row['peak_gb']:.2f}", f"{row['sum_gb']:.2f}"]
        )
    columns = ["MB", *names, "all", "all, a MB", "minutes", "peak GB of a process", "of all"]
    results.table("CPU-seconds of the data pipeline by size", columns, lines)
    return {"rows": rows}


def loader(options: argparse.Namespace, folder: Path, results: Results) -> dict[str, Any]:
    """Rows a second that the loader gives for configs/tiny.yaml, beside what its training takes."""
    import jax

    from baichuan_jax.config.files import load_config
    from baichuan_jax.data.loader import Loader
    from baichuan_jax.data.prepare import prepare
    from baichuan_jax.sharding import make_mesh
    from baichuan_jax.step import make_steps

    config = load_config(REPOSITORY / "configs" / "tiny.yaml", [f"data.cache_dir={folder}/cache"])
    config_mesh = config.mesh.resolve(1)
    steps = make_steps(config, make_mesh(config_mesh, jax.devices()[:1]))
    prepared = prepare(config, progress=False)
    batches = Loader(
        prepared.train,
        seed=0,
        accumulation_steps=1,
        batch_size=config.train.global_batch_size,
        eos_id=prepared.tokenizer.eos_id,
        document_mask=False,
        sharding=steps.batch_sharding,
        position=0,
    )
    try:
        state = steps.init()
        batch, request = next(batches), steps.request()
        step = steps.train.lower(state, batch, request).compile()
        reading, training = [], []
        for number in range(options.rounds * 20):
            began = time.perf_counter()
            batch = next(batches)
            reading.append(time.perf_counter() - began)
            if number % 20 < 5:
                began = time.perf_counter()
                state, metrics = step(state, batch, request)
                jax.block_until_ready(metrics)
                training.append(time.perf_counter() - began)
    finally:
        batches.close()
    rows = config.train.global_batch_size
    result = {
        "read_rows_per_second": rows / statistics.median(reading),
        "trained_rows_per_second": rows / statistics.median(training),
        "times": statistics.median(training) / statistics.median(reading),
        "share_of_step": statistics.median(reading)
        / (statistics.median(reading) + statistics.median(training)),
    }
    figures = [
        f"{result[name]:,.0f}"
        for name in ("read_rows_per_second", "trained_rows_per_second", "times")
    ]
    columns = ["loader, rows/s", "training, rows/s", "times as fast", "of a step"]
    results.table(
        "The loader beside the training of configs/tiny.yaml",
        columns,
        [[*figures, f"{result['share_of_step']:.2%}"]],
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    comparing = commands.add_parser("peers", help="beside datatrove")
    comparing.add_argument("--megabytes", type=float, default=25)
    comparing.add_argument(
        "--grams", nargs="+", choices=GRAMS, default=GRAMS, help="of datatrove (default: all)"
    )
    scaling = commands.add_parser("scale", help="by the corpus's size")
    scaling.add_argument("--megabytes", type=float, nargs="+", default=[25, 50, 100, 200, 400])
    reading = commands.add_parser("loader", help="beside the training of configs/tiny.yaml")
    reading.add_argument("--rounds", type=int, default=5, help="of 20 batches (default: 5)")
    for command in (comparing, scaling):
        command.add_argument(
            "--input", nargs="+", default=[], metavar="GLOB", help="clean text (default: bundled)"
        )
    for command in (comparing, scaling, reading):
        command.add_argument("--json", type=Path, metavar="FILE", help="save the figures")
        command.add_argument(
            "--folder", type=Path, help="keep corpora and outputs here (default: a temporary one)"
        )
    one = commands.add_parser("datatrove", help="one run of datatrove: what `peers` starts")
    one.add_argument("--corpus", type=Path, required=True)
    one.add_argument("--output", type=Path, required=True)
    one.add_argument("--grams", choices=GRAMS, required=True)
    options = parser.parse_args()
    if options.command == "datatrove":
        datatrove(options.corpus, options.output, options.grams)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = Results()
        figures = {"peers": peers, "scale": scale, "loader": loader}[options.command](
            options, folder, results
        )
    results.save(options.json, **figures)


if __name__ == "__main__":
    main()
