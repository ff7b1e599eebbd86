"""Cost of the data pipeline beside datatrove and by corpus size, and cost of the training loader.

    pip install -r requirements-data.txt -r requirements-data-bench.txt
    python benchmarks/data_pipeline.py peers [--megabytes 25] [--grams words ...] [--json FILE]
    python benchmarks/data_pipeline.py scale --megabytes 25 50 100 200 400 [--json FILE]
    python benchmarks/data_pipeline.py loader [--json FILE]

`peers` compares the removal of near-duplicate documents alone, one worker each, on a corpus of
corpus_truth.py, whose planted copies give the recall. It runs the pipeline, and datatrove with its
defaults (5-grams of the words of its English tokeniser, 14 bands of 8), with its tokeniser for each
language, and with 5-grams of characters. It also times all stages of the pipeline.
`scale` gives the CPU-seconds of every stage and the peak memory of a process, by corpus size.
`loader` compares the rows a second of the loader with those of a training step.

CPU-seconds are those of a process and its descendants. Other load on the machine changes them
little, unlike seconds by the clock.
"""

import sys
from pathlib import Path

# A script finds the package from any folder.
sys.path.insert(0, str(Path(__file__).parents[1]))

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
# Only the near-duplicate documents are left.
DOCUMENTS_ONLY = (
    *("--rules.enabled=false", "--rules.personal_data=keep"),
    *("--quality.enabled=false", "--sentences.enabled=false"),
)
GRAMS = ("words", "language", "characters")
# Copies above the threshold of the pipeline, which a near-duplicate stage has to find.
NEAR = ("exact", "punctuation", "edit_01", "edit_02")


class Measured:
    """A Python command run to its end: CPU-seconds of its process and descendants, over time."""

    def __init__(self, argv: list[str], log: Path) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        # (time, CPU-seconds until then).
        self.curve: list[tuple[float, float]] = []
        began = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *argv], cwd=REPOSITORY, stdout=output, stderr=output
            )
            watch = threading.Thread(target=self._watch, args=(process,))
            watch.start()
            code = process.wait()
            self.ended = time.monotonic()
            watch.join()
        if code:
            end = log.read_text(errors="replace")[-2000:]
            raise SystemExit(f"{' '.join(argv)} ended with {code}:\n{end}")
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
    """CPU-seconds, memory of the largest process and memory of all, in bytes.

    Of a process and its living descendants; the CPU-seconds include children that have ended.
    """
    children: dict[int, list[int]] = {}
    cpu: dict[int, float] = {}
    memory: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # the process has ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(entry))
        # utime, stime, and both of the children waited for (man 5 proc).
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
    """Make a corpus whose truth is known. Returns the bytes of its files."""
    script = REPOSITORY / "benchmarks" / "corpus_truth.py"
    argv = ["--output", str(folder), "--megabytes", str(megabytes)]
    argv += ["--input", *clean] if clean else []
    subprocess.run([sys.executable, str(script), *argv], check=True, stdout=subprocess.DEVNULL)
    return sum(path.stat().st_size for path in folder.glob("corpus-*.jsonl"))


def run_pipeline(corpus: Path, output: Path, *options: str) -> Measured:
    """Run the pipeline on a corpus of `make_corpus`."""
    files = ["--input", str([f"{corpus}/corpus-*.jsonl"]), "--output", str(output)]
    command = ["-m", "baichuan_jax.data.pipeline", "--config", "configs/corpus.yaml", *files]
    return Measured([*command, *options], output.with_suffix(".log"))


def recall(corpus: Path, kept: set[str]) -> float:
    """The share of the planted copies in NEAR that were removed.

    Of an original and its copies one has to be kept, whichever.
    """
    groups: dict[str, list[str]] = {}
    for line in (corpus / "truth.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        record = json.loads(line)
        if record["kind"] in NEAR:
            groups.setdefault(record["of"], [record["of"]]).append(record["id"])
    removed = sum(
        min(len(names) - 1, len(names) - sum(name in kept for name in names))
        for names in groups.values()
    )
    return removed / sum(len(names) - 1 for names in groups.values())


def kept_by_pipeline(output: Path) -> set[str]:
    """The ids of the documents in final/."""
    import pyarrow.parquet

    return {
        name
        for path in (output / "final").glob("*.parquet")
        for name in pyarrow.parquet.read_table(path)["id"].to_pylist()
    }


def datatrove(corpus: Path, output: Path, grams: str) -> None:
    """datatrove's four steps of MinHash de-duplication, in this process. Writes kept.json."""
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
        signatures, buckets, remove = (
            str(folder / name) for name in ("signatures", "buckets", "remove")
        )
        steps = [
            [*read, signature],
            [MinhashDedupBuckets(signatures, buckets, config=config)],
            [MinhashDedupCluster(buckets, remove, config=config)],
            [*read, MinhashDedupFilter(remove), collect],
        ]
        for number, step in enumerate(steps):
            tasks, logs = config.num_buckets if number == 1 else 1, str(folder / f"logs-{number}")
            LocalPipelineExecutor(step, tasks=tasks, workers=1, logging_dir=logs).run()

    if grams == "words":
        run(output, MinhashDedupSignature(str(output / "signatures"), config=config))
    elif grams == "characters":
        run(output, Characters(str(output / "signatures"), config=config))
    else:
        for lang, name in (("en", "eng"), ("zh", "cmn_Hani")):
            signatures = str(output / lang / "signatures")
            signature = MinhashDedupSignature(signatures, config=config, language=name)
            of = lambda document, lang=lang: document.metadata["lang"] == lang
            run(output / lang, signature, LambdaFilter(of))
    (output / "kept.json").write_text(json.dumps(kept))


def peers(options: argparse.Namespace, folder: Path, results: Results) -> dict[str, Any]:
    """MB per CPU-second and recall of each, on the same corpus."""
    corpus = folder / "corpus"
    size = make_corpus(corpus, options.megabytes, options.input)
    rows = {}
    for name, settings in (("documents only", DOCUMENTS_ONLY), ("all stages", ())):
        output = folder / name.replace(" ", "-")
        measured = run_pipeline(corpus, output, "--num_workers=1", *settings)
        found = recall(corpus, kept_by_pipeline(output))
        rows[f"baichuan_jax, {name}"] = _row(measured, size, found)
    for grams in options.grams:
        output = folder / f"datatrove-{grams}"
        output.mkdir()
        argv = ["datatrove", "--corpus", str(corpus), "--output", str(output), "--grams", grams]
        measured = Measured([str(Path(__file__).absolute()), *argv], folder / f"{grams}.log")
        found = recall(corpus, set(json.loads((output / "kept.json").read_text())))
        rows[f"datatrove, {grams}"] = _row(measured, size, found)
    ours = rows["baichuan_jax, documents only"]["mb_per_cpu_second"]
    lines = []
    for name, row in rows.items():
        faster = f"{ours / row['mb_per_cpu_second']:.1f} x" if name.startswith("datatrove") else "-"
        speed = [f"{row['cpu_seconds']:.1f}", f"{row['mb_per_cpu_second']:.3f}", faster]
        lines.append([name, *speed, f"{row['recall']:.4f}", f"{row['peak_gb']:.2f}"])
    speeds = ["CPU-seconds", "MB/CPU-second", "ours is faster"]
    columns = ["", *speeds, "recall of copies", "peak GB of a process"]
    results.table(f"Near-duplicate documents of {size / 1e6:.0f} MB", columns, lines)
    return {"bytes": size, "rows": rows}


def _row(measured: Measured, size: int, found: float) -> dict[str, float]:
    """The numbers of one run on `size` bytes with recall `found`."""
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
        # The report has the seconds of each stage. Counted back from the end, they say when each
        # one began, and the curve says how many CPU-seconds were used by then.
        moment, stages = measured.ended, {}
        for stage, seconds in reversed(report["seconds"].items()):
            stages[stage] = measured.at(moment) - measured.at(moment - seconds)
            moment -= seconds
        stages["start"] = measured.at(moment)
        names = ("cpu_seconds", "seconds", "peak_gb", "sum_gb")
        numbers = {name: getattr(measured, name) for name in names}
        rows.append({"bytes": size, "stages": stages, **numbers})
        print(f"{size / 1e6:.0f} MB: {measured.cpu_seconds:.0f} CPU-seconds", flush=True)
        # In case a later size does not finish.
        results.save(options.json, rows=rows)
    names = list(reversed(rows[0]["stages"]))
    lines = []
    for row in rows:
        cells = [f"{row['stages'].get(name, 0):.1f}" for name in names]
        total = row["cpu_seconds"]
        cells += [f"{total:.1f}", f"{total / row['bytes'] * 1e6:.3f}", f"{row['seconds'] / 60:.1f}"]
        cells += [f"{row['peak_gb']:.2f}", f"{row['sum_gb']:.2f}"]
        lines.append([f"{row['bytes'] / 1e6:.0f}", *cells])
    columns = ["MB", *names, "all", "all, a MB", "minutes", "peak GB of a process", "of all"]
    results.table("CPU-seconds of the data pipeline by size", columns, lines)
    return {"rows": rows}


def loader(options: argparse.Namespace, folder: Path, results: Results) -> dict[str, Any]:
    """Rows a second of the loader for configs/tiny.yaml, beside those of its training."""
    import jax

    from baichuan_jax.checkpoint.progress import Given, Progress
    from baichuan_jax.config.files import load_config
    from baichuan_jax.data.loader import Loader
    from baichuan_jax.data.prepare import prepare
    from baichuan_jax.sharding import make_mesh
    from baichuan_jax.step import make_steps

    config = load_config(REPOSITORY / "configs" / "tiny.yaml", [f"data.cache_dir={folder}/cache"])
    config_mesh = config.mesh.resolve(1)
    steps = make_steps(config, make_mesh(config_mesh, jax.devices()[:1]))
    prepared = prepare(config, progress=False)
    corpora = dict(zip(config.data.train, prepared.train, strict=True))
    given = [Given(name, rows.identity, weight) for name, (rows, weight) in corpora.items()]
    batches = Loader(
        {name: rows for name, (rows, _) in corpora.items()},
        progress=Progress(0).follow(0, given, config.train.global_batch_size),
        accumulation_steps=1,
        eos_id=prepared.tokenizer.eos_id,
        document_mask=False,
        sharding=steps.batch_sharding,
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
            # A few steps are enough for the median of training; the loader gets more samples.
            if number % 20 < 5:
                began = time.perf_counter()
                state, metrics = step(state, batch, request)
                jax.block_until_ready(metrics)
                training.append(time.perf_counter() - began)
    finally:
        batches.close()
    rows = config.train.global_batch_size
    read, trained = statistics.median(reading), statistics.median(training)
    result = {
        "read_rows_per_second": rows / read,
        "trained_rows_per_second": rows / trained,
        "times": trained / read,
        "share_of_step": read / (read + trained),
    }
    *speeds, share = result.values()
    columns = ["loader, rows/s", "training, rows/s", "times as fast", "of a step"]
    cells = [*(f"{value:,.0f}" for value in speeds), f"{share:.2%}"]
    results.table("The loader beside the training of configs/tiny.yaml", columns, [cells])
    return result


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    comparing = commands.add_parser("peers", help="beside datatrove")
    comparing.add_argument("--megabytes", type=float, default=25, help="(default: 25)")
    grams = "of datatrove (default: all)"
    comparing.add_argument("--grams", nargs="+", choices=GRAMS, default=GRAMS, help=grams)
    scaling = commands.add_parser("scale", help="by corpus size")
    sizes = [25, 50, 100, 200, 400]
    scaling.add_argument("--megabytes", type=float, nargs="+", default=sizes, help=f"({sizes})")
    reading = commands.add_parser("loader", help="beside the training of configs/tiny.yaml")
    reading.add_argument("--rounds", type=int, default=5, help="of 20 batches (default: 5)")
    clean, kept = "clean text (default: the bundled sample)", "of corpora and outputs, kept"
    for command in (comparing, scaling):
        command.add_argument("--input", nargs="+", default=[], metavar="GLOB", help=clean)
    for command in (comparing, scaling, reading):
        command.add_argument("--json", type=Path, metavar="FILE", help="save the numbers")
        command.add_argument("--folder", type=Path, help=f"{kept} (default: a temporary one)")
    one = commands.add_parser("datatrove", help="one run of datatrove, as `peers` starts it")
    one.add_argument("--corpus", type=Path, required=True)
    one.add_argument("--output", type=Path, required=True)
    one.add_argument("--grams", choices=GRAMS, required=True)
    return parser.parse_args()


def main() -> None:
    """Run one of the benchmarks."""
    options = parse()
    if options.command == "datatrove":
        datatrove(options.corpus, options.output, options.grams)
        return
    benchmark = {"peers": peers, "scale": scale, "loader": loader}[options.command]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = Results()
        numbers = benchmark(options, folder, results)
    results.save(options.json, **numbers)


if __name__ == "__main__":
    main()
