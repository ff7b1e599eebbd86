"""What the program advises works: commands in its messages are run, those in its source parse."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from launches import REPOSITORY, losses, run, run_here, run_module, write_config

from baichuan_jax.config.files import KEYS, _kinds
from baichuan_jax.config.parsing import quote_path
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.data.corpus.config import CorpusConfig
from baichuan_jax.data.rows import main as rows_command
from baichuan_jax.data.rows import pack
from baichuan_jax.runs.folder import Run
from baichuan_jax.tokenizer import Tokenizer

PACKAGE = REPOSITORY / "baichuan_jax"
COMMAND = re.compile(r"python -m (baichuan_jax(?:\.\w+)+)((?: [^\s;,)]+)*)")
# Names that hold a quoted path already.
QUOTED_BEFORE = {("summary.py", "path")}


def texts(node: ast.AST) -> str:
    """A string of the source, with {} for what is put in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(texts(part) for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "{}"


def advised() -> list[tuple[str, str, str]]:
    """(file, module, words behind it) of every command that a message of the source names."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docs = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in docs:
                text = " ".join(texts(node).split())
                found += [
                    (str(file.relative_to(PACKAGE)), match[1], match[2])
                    for match in COMMAND.finditer(text)
                ]
    return found


def options_of(words: str) -> list[str]:
    return re.findall(r"--[\w.]+", words)


ADVISED = advised()


def test_commands_that_messages_name_are_found():
    assert len(ADVISED) > 20
    assert {"baichuan_jax.generate", "baichuan_jax.data.rows"} <= {name for _, name, _ in ADVISED}


@pytest.mark.slow
def test_commands_that_messages_name_have_these_subcommands_and_options():
    """Against the help of the command, or of the subcommand. COMMAND stands for any."""
    helps: dict[tuple[str, ...], str] = {}
    for file, name, words in ADVISED:
        first = words.split()[:1]
        sub = first if first and re.fullmatch(r"[a-z]+", first[0]) else []
        if name == "baichuan_jax.COMMAND" or not (sub or options_of(words)):
            continue
        if (name, *sub) not in helps:
            done = run_module(name, *sub, "--help", seconds=120)
            assert done.returncode == 0, f"{file}: {name}{words}: {done.stderr}"
            helps[name, *sub] = done.stdout
        for option in options_of(words):
            assert option in helps[name, *sub], f"{file}: {name}{words}"


def test_commands_that_messages_name_exist_and_paths_in_them_are_quoted():
    """A path with a space would be two arguments."""
    for file, name, _ in ADVISED:
        module = PACKAGE.joinpath(*name.split(".")[1:])
        known = module.with_suffix(".py").exists() or (module / "__main__.py").exists()
        assert known or name == "baichuan_jax.COMMAND", (file, name)
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.JoinedStr):
                continue
            # What is put in directly behind a command, or behind an option of one.
            before = ""
            for part in node.values:
                if isinstance(part, ast.FormattedValue) and re.search(
                    r"python -m baichuan_jax[\w.]*( [a-z]+)?( --?\w+)? $", before
                ):
                    put_in = ast.unparse(part.value)
                    quoted = "quote" in put_in or (file.name, put_in) in QUOTED_BEFORE
                    assert quoted, (file.name, put_in)
                before = str(part.value) if isinstance(part, ast.Constant) else ""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of eight steps in a folder with a space, and what it said."""
    folder = tmp_path_factory.mktemp("advice")
    config = write_config(folder)
    options = ["--train.num_steps", "8", "--optimizer.warmup_steps", "2"]
    text = run(config, folder / "my run", *options)
    return folder, config, options, text


def test_the_commands_that_a_finished_run_prints_work(finished, monkeypatch):
    folder, _, _, text = finished
    monkeypatch.chdir(folder)
    commands = [line.strip() for line in text.splitlines() if line.startswith("  python -m ")]
    assert len(commands) == 2
    for command in commands:
        _, _, module, *argv = shlex.split(command)
        name = f"{module}.__main__" if module.endswith("report") else module
        done = run_here(lambda name=name, argv=argv: importlib.import_module(name).main(argv))
        assert done.returncode == 0, done.stderr
    assert (folder / "my run" / "report.html").exists()


def test_paths_in_commands_are_taken_for_no_option(tmp_path, monkeypatch):
    """A folder named -x; and what a shell takes apart."""
    monkeypatch.chdir(tmp_path)
    for name in ("-x", "--prompt", "a b", "it's", "-春", os.fsdecode(b"-\xff")):
        Path(name).mkdir()
        script = "import os, sys; os.chdir(sys.argv[1])\nassert sys.argv[1][0] != '-'"
        argv = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} {quote_path(name)}"
        assert subprocess.run(["bash", "-c", argv], timeout=60).returncode == 0, name


def test_more_steps_with_the_options_that_a_finished_run_prints_keep_its_learning_rate(finished):
    folder, config, options, text = finished
    argv = shlex.split(text.split("To keep it, add ")[1].splitlines()[0])
    more = ["--train.num_steps", "12"]
    output = run(config, folder / "my run", *options, *argv, *more)
    assert "going on from checkpoint 8" in output
    # What was advised is not warned of.
    assert "learning rate at step" not in output
    rates = Run(folder / "my run").curve("learning_rate")
    assert [rates[step] for step in (9, 12)] == pytest.approx([rates[8]] * 2, rel=1e-4)
    assert sorted(losses(folder / "my run")) == list(range(1, 13))


def test_a_drawing_that_was_left_out_is_drawn_by_the_advised_line(finished):
    """`from baichuan_jax.runs.folder import Run; Run(...).plot()`, as printed."""
    folder, *_ = finished
    source = (PACKAGE / "training" / "summary.py").read_text(encoding="utf-8")
    assert "from baichuan_jax.runs.folder import Run; " in source
    (folder / "my run" / "loss.png").unlink(missing_ok=True)
    exec(f"from baichuan_jax.runs.folder import Run; Run({str(folder / 'my run')!r}).plot()", {})
    assert (folder / "my run" / "loss.png").exists()


def test_damaged_rows_are_found_by_the_command_that_the_error_names(tmp_path):
    folder = tmp_path / "some rows"
    (tmp_path / "text.txt").write_text("春眠不覺曉,處處聞啼鳥。It was a truth. " * 60)
    tokenizer = Tokenizer(REPOSITORY / "tests" / "golden" / "exam" / "tokenizer.model")
    rows = pack([str(tmp_path / "text.txt")], folder, tokenizer, 16, num_workers=1, progress=False)
    os.truncate(folder / rows.manifest["shards"][0]["file"], 1000)
    with pytest.raises(ConfigError) as error:
        [rows[index] for index in range(len(rows))]
    words = str(error.value).split("python -m baichuan_jax.data.rows ")[1].split(", then")[0]
    done = run_here(lambda: rows_command(shlex.split(words)))
    assert done.returncode == 78
    assert "shard-00000.array_record has 1000 bytes" in done.stderr


def test_settings_and_requirements_that_messages_name_exist():
    """`--section.setting` and `section.setting=` of the training, `pip install -r FILE`."""
    cleaning = [key for key, _ in _kinds(CorpusConfig)]
    looked_at = 0
    for file in sorted(PACKAGE.rglob("*.py")):
        # The pipeline has settings of its own.
        known = {*KEYS, *(cleaning if file.is_relative_to(PACKAGE / "data") else [])}
        sections = {key.split(".")[0] for key in known if "." in key}
        text = file.read_text(encoding="utf-8")
        # Not of a name that is put in, of which this is the beginning.
        named = re.findall(r"--(\w+)\.(\w+)\b(?!\{)", text)
        named += re.findall(r"(?<![\w.])(\w+)\.(\w+)=", text)
        for section, name in named:
            if section in sections:
                assert f"{section}.{name}" in known, (file, section, name)
                looked_at += 1
        for requirements in re.findall(r"pip install -r ([\w.-]+\.txt)", text):
            assert (REPOSITORY / requirements).exists(), (file, requirements)
    assert looked_at > 60
