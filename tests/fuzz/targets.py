"""What is fuzzed: for each format a valid folder, and the function that reads it.

A reader gives a right result, or raises ConfigError with one line that names a file. `judge` makes
an error of everything else. A new format is a function here that makes a `Target`, and its name in
TARGETS.
"""

import contextlib
import csv
import dataclasses
import functools
import gzip
import importlib.util
import io
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "report"))

import exam
from strategies import Folder, folders
from test_report import add_results, write_faulty_run

from baichuan_jax.config.files import KEYS, dump_config, load_config
from baichuan_jax.config.schema import Config, ConfigError, OptimizerConfig, TrainConfig
from baichuan_jax.resilience.causes import Cause, cause_of, describe

# A section or a setting by its name.
SETTING = "|".join(re.escape(key) for key in KEYS)
GOLDEN = Path(__file__).parents[1] / "golden"
# A reader that takes longer hangs: the examples have some kilobytes.
SECONDS = 20
# More than a reader of some kilobytes needs, less than a damaged length asks for.
MOST_BYTES = 4 << 30


@dataclass(frozen=True)
class Target:
    """A valid folder, and what reads it."""

    valid: Mapping[str, bytes]
    read: Callable[[Path], Any]
    # What a refusal names where that is no file: a setting.
    place: str | None = None
    # Whether JSON and lines that are spelled otherwise, of the same values, give an equal result.
    respelled: bool = False

    @property
    def examples(self) -> st.SearchStrategy[Folder]:
        """Damaged folders."""
        return folders(Folder(self.valid))


class Hang(AssertionError):
    """A reader did not end."""


def write(folder: Path, files: Folder) -> None:
    """The files of an example, in a new folder."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def judge(subject: Target, folder: Path) -> Any:
    """What a reader gives; None where it refuses the folder well. Raises AssertionError, others."""
    with _limits():
        try:
            return subject.read(folder)
        except ConfigError as error:
            text = str(error)
        except OSError as error:
            # A path that cannot be, such as one that is too long.
            if cause_of(error) != Cause.CONFIGURATION:
                raise
            text = describe(error)
    # The file's own path, since a text that the message quotes may look like one.
    named = str(folder) in text or (subject.place is not None and re.search(subject.place, text))
    assert named, f"no place: {text}"
    assert "\n" not in text, f"more than one line: {text!r}"
    assert len(text) < 1500 + len(str(folder)), f"{len(text)} characters: {text[:200]}"
    text.encode("utf-8", "surrogateescape")
    return None


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Seconds and bytes that a reader may take."""
    import resource

    def late(number: int, frame: Any) -> None:
        raise Hang(f"still reading after {SECONDS} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MOST_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _made(make: Callable[[Path], Any], *suffixes: str) -> Folder:
    """The files that a function writes into a folder."""
    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        files = [path for path in sorted(Path(name).rglob("*")) if path.is_file()]
        kept = [path for path in files if not suffixes or path.suffix in suffixes]
        return {str(path.relative_to(name)): path.read_bytes() for path in kept}


def _lines(*values: Any) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


DOCUMENTS = ["春眠不覺曉，\n處處聞啼鳥。", "", "a\tb \u2028 🙂", "x" * 500]


def _documents(suffix: str) -> Target:
    """Every line is a document or a problem: none is lost."""
    from baichuan_jax.documents.files import Slice, find_files
    from baichuan_jax.documents.reader import Fields, read_documents, read_texts

    plain = _lines(*({"id": str(n), "text": text} for n, text in enumerate(DOCUMENTS)))
    if suffix.startswith(".txt"):
        plain = DOCUMENTS[0].encode()
    content = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(
        Path(suffix).suffix, bytes
    )(plain)
    if suffix == ".parquet":
        content = _parquet()

    def read(folder: Path) -> list[str]:
        found = []
        for file in find_files([str(folder / "*")]):
            entries = list(read_documents(Slice(file), Fields(id="id", source="source")))
            if suffix == ".jsonl":
                lines = [line for line in Path(file).read_bytes().split(b"\n") if line.strip()]
                count = sum(1 for entry in entries if getattr(entry, "is_document", True))
                assert count == len(lines), f"{count} documents and problems of {len(lines)} lines"
            found += list(read_texts([Slice(file)], "text"))
        return found

    return Target({f"a{suffix}": content}, read)


def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    content = io.BytesIO()
    table = pyarrow.table({"id": ["0", "1", "2", "3"], "text": DOCUMENTS})
    pyarrow.parquet.write_table(table, content, row_group_size=2)
    return content.getvalue()


def _exam(task: str) -> Target:
    from baichuan_jax.evaluate.tasks import load_subjects

    makers = {
        "mmlu": lambda path: exam.make_mmlu(path, ["anatomy"], 3),
        "ceval": lambda path: exam.make_ceval(path, ["accountant"], 3),
        "agieval": lambda path: exam.make_agieval(path, 9),
        "gaokao": lambda path: exam.make_gaokao(path, 9),
    }
    valid = _made(makers[task])
    names = {"mmlu": ["anatomy"], "ceval": ["accountant"], "agieval": ["logiqa-en"]}
    only = names.get(task, ["2010-2022_History_MCQs"])
    split = {"mmlu": "test", "ceval": "val"}.get(task)

    def read(folder: Path) -> Any:
        return load_subjects(task, folder, split=split, shots=2, only=only, seed=0)

    return Target(valid, read)


def _hugging_face(sharded: bool) -> Target:
    from baichuan_jax.hf.config import read_config
    from baichuan_jax.hf.files import open_tensors
    from baichuan_jax.hf.source import read_source

    source = GOLDEN / "tiny" / ("sharded" if sharded else "")
    names = [path for path in source.iterdir() if path.suffix in (".json", ".safetensors")]
    valid = {path.name: path.read_bytes() for path in names}
    facts = {"add_bos_token": False, "model_max_length": 4096, "bos_token": "<s>"}
    valid["tokenizer_config.json"] = json.dumps(facts).encode()

    def read(folder: Path) -> Any:
        read_source(folder)
        config = read_config(folder)
        tensors = open_tensors(folder)
        return config, {name: tensors.read(name).shape for name in tensors.shapes}

    return Target(valid, read)


def _hugging_face_import() -> Target:
    from baichuan_jax.hf.weights import import_params

    source = GOLDEN / "tiny"
    valid = {name: (source / name).read_bytes() for name in ("config.json",)}
    weights = (source / "model.safetensors").read_bytes()

    def read(folder: Path) -> Any:
        (folder / "model.safetensors").write_bytes(weights)
        return import_params(folder)["final_norm"].shape

    return Target(valid, read)


def _tokenizer() -> Target:
    from baichuan_jax.tokenizer import Tokenizer

    valid = {"tokenizer.model": (GOLDEN / "exam" / "tokenizer.model").read_bytes()}

    def read(folder: Path) -> Any:
        tokenizer = Tokenizer(folder / "tokenizer.model")
        return tokenizer.decode(tokenizer.encode("a b"))

    return Target(valid, read)


def _settings() -> Target:
    content = json.dumps(json_of(Config(run_dir="runs/x")), indent=1).encode()

    def read(folder: Path) -> Any:
        file = folder / "c.yaml"
        if not file.exists():
            return None
        config = load_config(file)
        # What is read is what is written.
        (folder / "again.yaml").write_text(dump_config(config), encoding="utf-8")
        assert load_config(folder / "again.yaml") == config
        return config

    # JSON is YAML, so that the same changes apply.
    return Target({"c.yaml": content}, read, SETTING, respelled=True)


def json_of(config: Any) -> Any:
    """The settings as plain values."""
    import dataclasses

    return json.loads(json.dumps(dataclasses.asdict(config)))


def _argv() -> Target:
    from baichuan_jax.config.files import make_parser, parse_config

    argv = ["--config", "tiny", "--train.num_steps", "60", "--data.skip", "[[1, 2]]"]
    argv += ["--optimizer.learning_rate=1e-3", "--evaluate.subjects", '{"mmlu": ["anatomy"]}']
    argv += ["--evaluate.tasks", '{"mmlu": "x"}', "--model.dtype", "float32"]

    def read(folder: Path) -> Any:
        file = folder / "argv.json"
        try:
            words = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        words = [str(word)[:200] for word in words] if isinstance(words, list) else []
        # The bytes that arguments of a process are, and no argument holds a 0.
        words = [
            os.fsdecode(word.replace("\0", "").encode(errors="surrogatepass")) for word in words
        ]
        if {"--help", "-h"} & set(words) or any("print_config" in word for word in words):
            return None
        with contextlib.redirect_stderr(io.StringIO()), contextlib.chdir(folder):
            try:
                return parse_config(make_parser("train", ""), words)
            except ConfigError as error:
                text = str(error)
                given = [str(ConfigError(word))[:20] for word in words if word.strip()]
                # The setting or the word, and more than it: the reason.
                given += [repr(word)[1:-1] for word in given]
                named = re.search(SETTING, text) or any(word in text for word in [*given, "''"])
                # Its bytes are shown as escapes.
                named = named or re.match("command line: '.*' is no UTF-8", text)
                assert named, f"no option: {text}"
                assert re.search(r"[a-z]+ [a-z]+", text), f"no reason: {text}"
                raise

    # Words of argv are in no file; `read` looks for them.
    return Target({"argv.json": json.dumps(argv).encode()}, read, "")


def _corpus_settings() -> Target:
    from baichuan_jax.config.files import make_parser, parse_config
    from baichuan_jax.data.corpus.config import CorpusConfig

    content = json.dumps(json_of(CorpusConfig(input=["a*.jsonl"], output="x")), indent=1).encode()

    def read(folder: Path) -> Any:
        argv = ["--config", str(folder / "c.yaml")]
        return parse_config(make_parser("pipeline", "", CorpusConfig), argv, CorpusConfig)

    names = "|".join(f"{item.name}" for item in dataclasses.fields(CorpusConfig))
    return Target({"c.yaml": content}, read, names, respelled=True)


def _run() -> Target:
    from baichuan_jax.report.page import make_page
    from baichuan_jax.report.recorded import read_runs
    from baichuan_jax.resilience.goodput import account, show_accounting
    from baichuan_jax.runs.console import Display
    from baichuan_jax.runs.folder import Run

    def make(folder: Path) -> None:
        add_results(write_faulty_run(folder / "run"))

    def read(folder: Path) -> Any:
        import datetime

        (folder / "run").mkdir(exist_ok=True)
        run = Run(folder / "run")
        # Each by itself: what the one refuses the other may take.
        for look in (lambda: run.status, lambda: run.curve("loss"), lambda: account(run.path)):
            with contextlib.suppress(ConfigError):
                look()
        accounting = account(run.path)
        assert all(seconds >= 0 for seconds in accounting.seconds.values()), accounting
        assert 0 <= accounting.goodput <= 1, accounting
        with contextlib.redirect_stdout(io.StringIO()):
            show_accounting(Display(), accounting)
        recorded = read_runs([run.path])
        text = make_page(recorded, datetime.datetime(2026, 1, 1))
        text.encode()
        return accounting

    return Target(_made(make), read)


def _launch() -> Target:
    from baichuan_jax.resilience import launch_files as files
    from baichuan_jax.resilience.causes import Cause
    from baichuan_jax.resilience.policy import conclude

    plan = files.LaunchPlan(("a", "b"), 2)
    report = files.Report(0, "a", 1, 2, 3.0, 4, "wait", 0.5, 0.1, {"wait": 1.0}, Cause.HANG, "x")
    ends = {"a": files.HostEnd(False, {0: files.ProcessEnd(76, False, 3.0)}), "b": files.HostEnd()}

    def make(folder: Path) -> None:
        launches = files.Launches(folder / "attempts")
        launches.write_heartbeat("a", files.HostHeartbeat("1.2.3.4", 5, 6))
        for number in (1, 2):
            launch = launches[number]
            launch.write(plan)
            launch.write(files.Coordinator("a:1"))
            launch.publish(report)
            for host, end in ends.items():
                launch.write(end, host)
            launch.write(conclude(plan, ends, {0: report}, None, checkpoint=3, now=9.0))

    def read(folder: Path) -> Any:
        launches = files.Launches(folder / "attempts")
        launches.read_heartbeats()
        for number in launches.numbers():
            launch = launches[number]
            found = launch.read(files.LaunchPlan)
            before = launch.read(files.VerdictRecord)
            launch.read(files.Coordinator)
            launch.ended()
            if found is not None:
                known = {host: launch.read(files.HostEnd, host) for host in found.hosts[:3]}
                there = {host: end for host, end in known.items() if end is not None}
                conclude(found, there, launch.reports(), before, checkpoint=3, now=9.0).to_json()

    return Target(_made(make), read)


def _checkpoint() -> Target:
    from baichuan_jax.checkpoint.orbax import _find_damage
    from baichuan_jax.checkpoint.weights import describe
    from baichuan_jax.hf.source import read_source

    run = {
        "step": 4,
        "position": 4,
        "tokenizer": "abc",
        "config": json_of(Config(run_dir="x")),
        "digest": {"params/embedding": 5},
    }
    files = {"c/4/run/metadata": json.dumps(run).encode(), "c/4/params/d/0": b"abc"}
    sizes = {name.removeprefix("c/4/"): len(content) for name, content in files.items()}
    files["c/4/sizes.json"] = json.dumps(sizes).encode()

    def read(folder: Path) -> Any:
        path = folder / "c" / "4"
        with contextlib.redirect_stderr(io.StringIO()):
            _find_damage(path)
        found = describe(path)
        read_source(folder / "c")
        return found

    return Target(files, read)


def _local_copy() -> Target:
    import struct

    from baichuan_jax.checkpoint.local_copies import _read_head

    head = {"step": 4, "rollbacks": 0, "progress": {}, "tokenizer": "abc", "model": {}}
    head["digest"] = {"params/x": 1}

    def read(folder: Path) -> Any:
        text = (folder / "head.json").read_bytes() if (folder / "head.json").exists() else b""
        (folder / "4.state").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
        try:
            with open(folder / "4.state", "rb") as file:
                found, prefix = _read_head(file)
        # What `_newest` reports and passes over.
        except (OSError, ValueError, KeyError, struct.error):
            return None
        assert isinstance(found["step"], int)
        return found, len(prefix)

    return Target({"head.json": json.dumps(head).encode()}, read)


def _packed_rows() -> Target:
    from baichuan_jax.data.rows import Rows, pack
    from baichuan_jax.tokenizer import Tokenizer

    def make(folder: Path) -> None:
        (folder / "a.txt").write_text("春眠不覺曉，處處聞啼鳥。" * 20, encoding="utf-8")
        tokenizer = Tokenizer(GOLDEN / "exam" / "tokenizer.model")
        pattern, output = [str(folder / "a.txt")], folder / "rows"
        pack(pattern, output, tokenizer, 8, num_workers=1, progress=False)
        (folder / "a.txt").unlink()

    valid = {
        name: content
        for name, content in _made(make).items()
        if "lock" not in name and not name.endswith("00000.json")
    }

    def read(folder: Path) -> Any:
        rows = Rows(folder / "rows")
        counts = rows.counts
        return len(rows), rows[0].tolist(), rows[len(rows) - 1].tolist(), int(counts.sum())

    return Target(valid, read)


def _quality_model() -> Target:
    from baichuan_jax.data import quality

    source = Path(quality.__file__).with_name("quality_model")
    valid = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}

    def read(folder: Path) -> Any:
        quality._load.cache_clear()
        return quality.score(["It is a truth universally acknowledged."], folder)

    return Target(valid, read)


def _decontamination() -> Target:
    from baichuan_jax.data.decontaminate import _items

    row = {"question": "Which of these is a word?", "choices": ["a", "b"], "answer": "A"}
    table = io.StringIO()
    csv.writer(table).writerows([["id", "question", "A"], ["0", "Which?", "x"]])
    valid = {"a.json": json.dumps({"example": [row]}).encode(), "b.jsonl": _lines(row, row)}
    valid |= {"c.csv": table.getvalue().encode(), "d.txt": b"one\n\ntwo\n"}

    def read(folder: Path) -> Any:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return [list(_items(path, set())) for path in files]

    return Target(valid, read)


def _torch() -> Target:
    from baichuan_jax.hf.files import open_tensors

    content = (GOLDEN / "tiny" / "pytorch_model.bin").read_bytes()

    def read(folder: Path) -> Any:
        tensors = open_tensors(folder)
        return {name: tensors.read(name).shape for name in tensors.shapes}

    return Target({"pytorch_model.bin": content}, read)


def _owner() -> Target:
    from baichuan_jax.resilience.ownership import Owner, _Contender, _content, owner_of

    owner = Owner("h", 5, "m", "pid:[1] 7", "python -m x", 1.5, 2, True, 3)

    def read(folder: Path) -> Any:
        contender = _Contender(folder / "lock", 20.0, 3)
        with contextlib.closing(contender.file):
            contender._is_free(owner_of(contender.lock))
        return str(owner_of(contender.lock))

    valid = {"lock-1": _content(owner), "lock-2": _content(owner)}
    return Target(valid, read, respelled=True)


def _progress() -> Target:
    from baichuan_jax.checkpoint.progress import Given, Progress

    given = [Given("en", "x", 2.0), Given("zh", "y", 1.0)]
    whole = Progress(0).follow(0, given, 4).at(8).follow(0, given[:1], 8).at(24)

    def read(folder: Path) -> Any:
        file = folder / "progress.json"
        try:
            found = Progress.from_json(json.loads(file.read_bytes()))
        # What the checkpoint's reader takes for damage.
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, ConfigError) and "a later version" not in str(error):
                raise
            return None
        assert min(found.taken(), default=0) >= 0
        followed = found.follow(found.seed, given, 16)
        assert followed.position >= 0
        return found, followed.find(followed.row), followed.changes(found)

    return Target({"progress.json": json.dumps(whole.to_json()).encode()}, read, respelled=True)


def _evaluation() -> Target:
    from baichuan_jax.evaluate.questions import Question
    from baichuan_jax.evaluate.results import Results, dump_json, summarise
    from baichuan_jax.evaluate.tasks import Subject

    settings = {"task": "mmlu", "seed": 0, "shots": 5, "files": {"a.csv": "abc"}}
    record = {"subject": "a", "index": 0, "prompt_sha256": "b", "num_tokens": 3, "shots": 5}
    record |= {"shot_rows": [1], "logits": [0.5, 1.5, -1.0, 0.25], "prediction": "B", "answer": "A"}
    other = record | {"index": 2, "logits": [1.5, 0.5, -1.0, 0.25], "prediction": "A"}
    valid = {"e/settings.json": dump_json(settings), "e/subjects/a.jsonl": _lines(record, other)}
    asked = [Question(row, "?", ("1", "2", "3", "4"), "A") for row in (0, 2)]
    subject = Subject("a", "a", "en", ("c",), [], asked, 0)

    def read(folder: Path) -> Any:
        (folder / "e").mkdir(exist_ok=True)
        results = Results(folder / "e", settings)
        if not results.has("a"):
            return []
        records = results.load(subject)
        # Lost and foreign records would be scored as the whole subject.
        found = summarise("ceval", "original", [subject], records)
        assert found["questions"] == 2
        assert found["average"] in (0, 0.5, 1)
        results.finish({"task": "ceval", "manifest": {"split": "test"}}, records)
        return records

    return Target(valid, read, respelled=True)


def _last_settings() -> Target:
    from baichuan_jax.config.parsing import read_text
    from baichuan_jax.training import changes

    # JSON has 1e-05 for 0.00001, which is text to YAML.
    config = Config(run_dir="x", optimizer=OptimizerConfig(learning_rate=0.5, eps=0.5))

    def read(folder: Path) -> Any:
        file = folder / "config.yaml"
        text = read_text(file) if file.exists() else None
        found = changes.compare(text, config)
        schedule = None if text is None else changes._schedule_of(text)
        if schedule is not None:
            changes.describe_schedules(schedule, schedule.rate(3), changes._schedule(config), 3)
        return found, schedule

    content = json.dumps(json_of(config)).encode()
    return Target({"config.yaml": content}, read, r"^config\.yaml in the run", respelled=True)


def _shards() -> Target:
    from baichuan_jax.data.rows import pack
    from baichuan_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer(GOLDEN / "exam" / "tokenizer.model")
    text = "春眠不覺曉，處處聞啼鳥。" * 20

    def packed(folder: Path) -> Any:
        file = folder / "a.txt"
        file.write_text(text, encoding="utf-8")
        os.utime(file, ns=(0, 0))
        return pack([str(file)], folder / "rows", tokenizer, 8, num_workers=1, progress=False)

    kept = lambda name: name == "rows/shard-00000.json" or name.endswith((".bin", ".npy"))
    valid = {name: content for name, content in _made(packed).items() if kept(name)}
    identity = []

    def read(folder: Path) -> Any:
        rows = packed(folder)
        identity.append(rows.identity)
        # A damaged record or shard is made again: the rows are the same.
        assert identity[0] == rows.identity
        return rows.identity

    return Target(valid, read)


def _pipeline() -> Target:
    """Every line is kept, or removed for a reason."""
    from baichuan_jax.data.pipeline import main

    text = "It was a truth universally acknowledged, that a single man must be in want of a wife. "
    lines = [{"id": str(n), "text": f"{n} {text * 5}", "source": "a"} for n in range(4)]

    def read(folder: Path) -> Any:
        import pyarrow.parquet

        output = folder / "out"
        (folder / "b.jsonl").write_bytes(_lines({"text": text}))
        argv = ["--input", f"{folder}/*.jsonl", "--output", str(output), "--num_workers", "1"]
        for stage in ("dedup", "sentences", "quality"):
            argv += [f"--{stage}.enabled", "false"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main(argv) == 0
        report = json.loads((output / "report.json").read_bytes())
        removed = sum(
            reason["documents"]
            for stage in report["stages"]
            for reason in stage["removed"].values()
        )
        given = [line for file in folder.glob("*.jsonl") for line in file.read_bytes().split(b"\n")]
        count = sum(1 for line in given if line.strip())
        assert report["input"]["documents"] == count, f"{report['input']} of {count} lines"
        assert count == report["final"]["documents"] + removed, (count, report["final"], removed)
        kept = [pyarrow.parquet.read_table(file) for file in (output / "final").glob("*.parquet")]
        assert sum(table.num_rows for table in kept) == report["final"]["documents"]
        return report["final"]

    return Target({"a.jsonl": _lines(*lines)}, read)


def _rates() -> Target:
    from baichuan_jax.hardware.accelerators import HARDWARE
    from baichuan_jax.plan.rates import read_rates

    content = {"device": "H100", "hardware": "h100", "date": "2026", "rates": {"matmul": 0.7}}

    def read(folder: Path) -> Any:
        return read_rates(folder / "rates.json", HARDWARE["h100"])

    return Target({"rates.json": json.dumps(content).encode()}, read)


def _mixture_plan() -> Target:
    from baichuan_jax.data.mixture import _keep_plan

    plan = {"config": "a: 1\n", "overrides": ["--a", "1"], "corpora": ["春", "b"], "steps": 5}
    plan |= {"mixtures": [[0.5, 0.5], [0.25, 0.75]], "files": {"春.jsonl": [3, 4]}}

    def read(folder: Path) -> Any:
        _keep_plan(folder, plan)
        kept = json.loads((folder / "plan.json").read_bytes())
        assert kept == plan
        return kept

    return Target({"plan.json": json.dumps(plan).encode()}, read, respelled=True)


def _schedule_profile() -> Target:
    from baichuan_jax.hardware.accelerators import parse_topology
    from baichuan_jax.xla_flags import choose_flags

    lines = ['costs { name: "dot.1" cost_us: 5.000 }']
    lines += ['latencies { source: "a-start" target: "a-done" latency_us: 0.125 }']
    topology = parse_topology("a800:1x8")

    def read(folder: Path) -> Any:
        file = folder / "p.pbtxt"
        config = Config(train=TrainConfig(schedule_profile=str(file)))
        flags = choose_flags(config, topology).xla
        assert any(flag.endswith(str(file)) for flag in flags)
        return file.read_bytes()

    return Target({"p.pbtxt": ("\n".join(lines) + "\n").encode()}, read)


def _wire() -> Target:
    """Reports on jax's coordination service, where each process reads those of all."""
    from baichuan_jax.resilience.coordination import ReportService
    from baichuan_jax.resilience.launch_files import Report

    report = Report(1, "a", 1, 2, 3.0, 4, "wait", 0.5, 0.1, {"wait": 1.0}, Cause.HANG, "x")

    class Client:
        def __init__(self, text: str) -> None:
            self.text = text

        def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
            return [(f"{prefix}1", self.text)]

    def read(folder: Path) -> Any:
        file = folder / "report.json"
        text = file.read_bytes().decode("utf-8-sig", "replace") if file.exists() else ""
        return ReportService(Client(text)).reports()

    return Target({"report.json": report.to_json().encode()}, read, "^report/1 ", respelled=True)


def _wandb_id() -> Target:
    from baichuan_jax.runs.metrics import _identity

    def read(folder: Path) -> Any:
        found = _identity(folder / "wandb" / "id.txt")
        # The next launch goes on with the same one.
        assert found == _identity(folder / "wandb" / "id.txt")
        assert re.fullmatch("[A-Za-z0-9_-]+", found)
        return found

    return Target({"wandb/id.txt": b"0123456789abcdef" * 2}, read)


TARGETS: dict[str, Callable[[], Target]] = {
    **{
        f"documents{suffix}": functools.partial(_documents, suffix)
        for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.zst", ".parquet")
    },
    **{task: functools.partial(_exam, task) for task in ("mmlu", "ceval", "agieval", "gaokao")},
    "packed_rows": _packed_rows,
    "hugging_face": functools.partial(_hugging_face, False),
    "hugging_face_shards": functools.partial(_hugging_face, True),
    "hugging_face_import": _hugging_face_import,
    "tokenizer": _tokenizer,
    "settings": _settings,
    "argv": _argv,
    "corpus_settings": _corpus_settings,
    "run": _run,
    "launch": _launch,
    "checkpoint": _checkpoint,
    "local_copy": _local_copy,
    "quality_model": _quality_model,
    "decontamination": _decontamination,
    "rates": _rates,
    "mixture_plan": _mixture_plan,
    "schedule_profile": _schedule_profile,
    "wire": _wire,
    "wandb_id": _wandb_id,
    **({"torch": _torch} if importlib.util.find_spec("torch") else {}),
    "owner": _owner,
    "progress": _progress,
    "evaluation": _evaluation,
    "last_settings": _last_settings,
    "shards": _shards,
    **({"pipeline": _pipeline} if importlib.util.find_spec("daft") else {}),
}


@functools.cache
def target(name: str) -> Target:
    """A target, made once."""
    return TARGETS[name]()


def try_example(name: str, files: Folder) -> Any:
    """Judge one example in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=os.environ.get("TMPDIR")) as folder:
        write(Path(folder), files)
        return judge(target(name), Path(folder))
