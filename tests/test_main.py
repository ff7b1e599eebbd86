"""`baichuan-jax COMMAND` is the same as `python -m baichuan_jax.COMMAND`."""

import ast
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from exam import make_mmlu
from launches import REPOSITORY, Done, environment, run_here

from baichuan_jax.__main__ import COMMANDS, answer
from baichuan_jax.data.rows import Rows
from baichuan_jax.runs.events import Started, append_event

# What an installer writes into bin/baichuan-jax.
CONSOLE = "import sys\nfrom baichuan_jax.__main__ import console\nsys.exit(console())\n"


def run(*argv: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *argv],
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def three_ways(tmp_path: Path, name: str, *argv: str) -> list[subprocess.CompletedProcess]:
    """The module, the package with the command's name, and the console script."""
    script = tmp_path / "baichuan-jax"
    script.write_text(CONSOLE)
    return [
        run("-m", f"baichuan_jax.{name}", *argv),
        run("-m", "baichuan_jax", name, *argv),
        run(str(script), name, *argv),
    ]


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("xla_flags", "--help"), 0, "usage: python -m baichuan_jax.xla_flags"),
        (("train", "--config", "tiny", "--train.num_stps", "3"), 78, "train.num_steps"),
        (("resilience",), 78, "required"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_output_and_exit_code_are_the_same(tmp_path, argv, code, said):
    module, package, console = three_ways(tmp_path, *argv)
    assert module.returncode == code, module.stderr
    assert said in module.stdout + module.stderr
    for other in (package, console):
        assert (other.returncode, other.stdout, other.stderr) == (
            code,
            module.stdout,
            module.stderr,
        )


def test_processes_that_a_command_spawns_find_its_module(tmp_path):
    """Workers of `data.rows pack` are spawned: each imports the main module again by its name."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("春眠不覺曉,處處聞啼鳥。It was a truth. " * 200)
    script = tmp_path / "baichuan-jax"
    script.write_text(CONSOLE)
    tokenizer = REPOSITORY / "tests" / "golden" / "exam" / "tokenizer.model"
    done = run(
        *(str(script), "data.rows", "pack", "--input", f"{tmp_path}/*.txt", "--output", "rows"),
        *("--tokenizer", str(tokenizer), "--context_length", "64", "--num_workers", "2"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(Rows(tmp_path / "rows")) > 0


def test_only_the_modules_of_the_chosen_command_are_imported():
    code = (
        "import sys, contextlib\nfrom baichuan_jax.__main__ import main\n"
        "with contextlib.suppress(SystemExit): main(['report', '--help'])\n"
        "print(sorted(name for name in sys.modules if name.startswith('baichuan_jax.')))\n"
        "print('jax' in sys.modules)"
    )
    done = run("-c", code)
    *_, modules, jax_too = done.stdout.splitlines()
    assert "baichuan_jax.report" in modules
    assert "baichuan_jax.training" not in modules
    assert "baichuan_jax.data" not in modules
    assert jax_too == "False"


def test_help_lists_every_command_and_a_wrong_name_the_nearest(capsys):
    for argv in ([], ["--help"]):
        assert answer(argv) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text for group in COMMANDS.values() for name in group)
        assert all(len(line) <= 100 for line in text.splitlines())
    done = run("-m", "baichuan_jax", "trian", "--config", "x")
    assert done.returncode == 78
    assert "error: there is no command 'trian'; the nearest is 'train'" in done.stderr


def test_help_that_a_full_disk_refuses_is_an_error():
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "-m", "baichuan_jax", "--help"]
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 74
    assert "cannot be written to stdout" in done.stderr


# By command and option: a command line whose output is a file that it reads or keeps, and that
# file. A second name of the file stands for a link to it.
OUTPUTS = {
    ("tokenizer", "--output"): (
        ("train --vocab_size 400 --input *.jsonl --output m.jsonl", "m.jsonl"),
        ("train --vocab_size 400 --input m.jsonl --output link", "m.jsonl"),
    ),
    ("tokenizer", "--json"): (
        ("stats --model s.model --input m.jsonl --json s.model", "s.model"),
        ("stats --model s.model --input m.jsonl --json m.jsonl", "m.jsonl"),
    ),
    ("data.decontaminate", "--json"): (
        ("--evaluation mmlu/*/*.csv --input m.jsonl --json link", "m.jsonl"),
        ("--evaluation e.jsonl --input m.jsonl --json e.jsonl", "e.jsonl"),
    ),
    ("data.quality", "--output"): (("train --good q/card.json --output q", "q/card.json"),),
    ("data.quality", "--json"): (
        ("train --good e.jsonl --bad m.jsonl --output new --json m.jsonl", "m.jsonl"),
        ("train --good m.jsonl --output q --json q/card.json", "q/card.json"),
        ("score --input m.jsonl --json link", "m.jsonl"),
        ("score --input m.jsonl --model q --json q/card.json", "q/card.json"),
    ),
    ("data.mixture", "--output"): (
        ("learn --config mx/plan.json --output mx --runs 6", "mx/plan.json"),
    ),
    ("data.mixture", "--json"): (
        ("temperature --config b.yaml --temperature 2 --json b.yaml", "b.yaml"),
        ("temperature --config b.yaml --temperature 2 --json link", "m.jsonl"),
        ("learn --config b.yaml --output mx --runs 6 --json mx/plan.json", "mx/plan.json"),
        ("learn --config b.yaml --output mx --runs 6 --json mx/run-000/x.json", "b.yaml"),
    ),
    ("evaluate", "--output"): (
        ("mmlu --checkpoint hf --data mmlu --output out --tokenizer out/result.json", "s.model"),
    ),
    ("evaluate", "--json"): (
        ("mmlu --checkpoint hf --data mmlu --output new --json {}", "hf/config.json"),
        ("mmlu --checkpoint hf --data mmlu --output new --json {}", "mmlu/dev/anatomy_dev.csv"),
        ("mmlu --checkpoint hf --data mmlu --output new --json new/settings.json", "b.yaml"),
        ("perplexity --checkpoint hf --text m.jsonl --output new --json link", "m.jsonl"),
    ),
    ("plan", "--output"): (
        ("--config b.yaml --topology h100:1x2 --output . --rates_file {}", "h100-1x2.json"),
    ),
    ("plan", "--json"): (("--config b.yaml --topology h100:1x2 --json b.yaml", "b.yaml"),),
    ("plan", "--hlo"): (
        ("--config b.yaml --topology h100:1x2 --hlo b.yaml", "b.yaml"),
        ("--config b.yaml --topology h100:1x2 --hlo both --json ./both", "b.yaml"),
    ),
    ("report", "-o"): (
        ("R -o R/events.jsonl", "R/events.jsonl"),
        ("R -o R/checkpoints/5/page.html", "b.yaml"),
        ("R -o R/evaluations/mmlu/result.json", "R/evaluations/mmlu/result.json"),
    ),
    ("report", "--output"): (("R --output R/metrics.jsonl", "R/metrics.jsonl"),),
    ("resilience", "--json"): (("R --json R/attempts/1.json", "b.yaml"),),
}
# Outputs that need no such look, and why.
OTHERS = {
    ("kernels", "--json"): "reads no file",
    ("data.rows", "--output"): "a folder of its own: tests/data/test_rows.py",
    ("hf", "output"): "is new; of a run's folder, see tests/hf/test_hf.py",
}


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """A folder with all that the command lines of OUTPUTS read."""
    folder = tmp_path_factory.mktemp("read")
    golden = REPOSITORY / "tests" / "golden"
    for name in ("q", "mx", "out", "R/evaluations/mmlu", "R/attempts"):
        (folder / name).mkdir(parents=True)
    for name in ("m.jsonl", "e.jsonl", "q/card.json"):
        (folder / name).write_text(json.dumps({"text": name * 20}) + "\n")
    (folder / "link").symlink_to("m.jsonl")
    for name in ("s.model", "out/result.json"):
        shutil.copy(golden / "exam" / "tokenizer.model", folder / name)
    shutil.copytree(golden / "tiny", folder / "hf")
    shutil.copy(folder / "s.model", folder / "hf" / "tokenizer.model")
    make_mmlu(folder / "mmlu", ["anatomy"], 3)
    data = {"train": {"m.jsonl": 1, "e.jsonl": 1}, "validation": {"m.jsonl": 1}}
    for name in ("b.yaml", "mx/plan.json"):
        (folder / name).write_text(json.dumps({"data": data}))
    (folder / "h100-1x2.json").write_text("{}")
    append_event(folder / "R", Started(attempt=1))
    for name in ("metrics.jsonl", "evaluations/mmlu/result.json"):
        (folder / "R" / name).write_text("{}")
    return folder


def run_words(command: str, words: str) -> Done:
    """A command in this process, with what the shell would make of its command line."""
    name = f"baichuan_jax.{command}"
    if (REPOSITORY / name.replace(".", "/") / "__main__.py").exists():
        name += ".__main__"
    argv = []
    for word in shlex.split(words):
        argv += sorted(str(path) for path in Path().glob(word)) if "*" in word else [word]
    return run_here(lambda: importlib.import_module(name).main(argv))


@pytest.mark.parametrize(
    ("command", "words", "file"),
    [(key[0], *case) for key, cases in OUTPUTS.items() for case in cases],
)
def test_an_output_that_is_an_input_is_refused_before_the_work(
    read, monkeypatch, command, words, file
):
    monkeypatch.chdir(read)
    if words.startswith("mmlu"):
        words += " --subjects anatomy"
    words, before = words.format(file), (read / file).read_bytes()
    done = run_words(command, words)
    assert done.returncode == 78, done.stderr
    refused = ("would replace", "would be written into", "are one file")
    assert any(what in done.stderr for what in refused), done.stderr
    assert (read / file).read_bytes() == before


# Beside OUTPUTS: all else that names an output. {} stands for it.
MORE_OUTPUTS = [
    ("kernels", "--targets sm_90 --json {}"),
    ("data.rows", "pack --input m.jsonl --tokenizer s.model --context_length 64 --output {}"),
    ("data.pipeline", "--input m.jsonl --output {}"),
    ("hf", "import hf {}"),
    ("hf", "export --checkpoint hf {}"),
    ("train", "--config b.yaml --run_dir {}"),
    ("train", "--config tiny --run_dir R2 --data.cache_dir {}"),
    ("preflight", "--config b.yaml --run_dir {}"),
    ("launch", "-- --config b.yaml --run_dir {}"),
]


def with_output(words: str, option: str) -> str:
    """A command line of OUTPUTS with {} in place of its output."""
    before, _, behind = words.replace("{}", "h100-1x2.json").partition(f"{option} ")
    return f"{before}{option} {{}} {behind.partition(' ')[2]}"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a link to another user")
@pytest.mark.parametrize(
    ("command", "words"),
    [
        *(
            (command, with_output(words, option))
            for (command, option), cases in OUTPUTS.items()
            for words, _ in cases
        ),
        *MORE_OUTPUTS,
    ],
)
def test_no_output_goes_where_another_user_s_link_leads(
    read, tmp_path, monkeypatch, command, words
):
    """In a folder such as /tmp, where anybody may make one under a name that he expects."""
    if command == "data.pipeline":
        pytest.importorskip("daft", reason="make data-deps")
    monkeypatch.chdir(read)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    shared, target = tmp_path / "shared", tmp_path / "target"
    for folder in (shared, target):
        folder.mkdir()
    shared.chmod(0o1777)
    (shared / "link").symlink_to(target)
    os.lchown(shared / "link", 65534, 65534)
    if words.startswith("mmlu"):
        words += " --subjects anatomy"
    done = run_words(command, words.format(shared / "link" / "out"))
    assert done.returncode == 78, done.stderr
    assert f"{shared}/link is a link that " in done.stderr, done.stderr
    assert list(target.iterdir()) == []


def test_every_command_with_an_output_looks_whether_it_is_an_input():
    """A new option that names an output needs a line in OUTPUTS."""
    found = set()
    for name in (name for group in COMMANDS.values() for name in group):
        module = REPOSITORY / "baichuan_jax" / name.replace(".", "/")
        file = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        text = file.read_text(encoding="utf-8")
        nodes = list(ast.walk(ast.parse(text)))
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        for call in calls:
            named = [each.value for each in call.args if isinstance(each, ast.Constant)]
            found |= {
                (name, option)
                for option in named
                if option in ("output", "--output", "--json", "--hlo", "-o")
                and ast.unparse(call.func).split(".")[-1] in ("add", "add_argument")
            }
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        looks = any(ast.unparse(call.func) == "refuse_inputs" for call in calls)
        assert looks or name == "kernels" or not names & {"writable", "writable_file"}, name
    assert found == OUTPUTS.keys() | OTHERS.keys()
