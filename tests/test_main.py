"""`baichuan-jax COMMAND` is the same as `python -m baichuan_jax.COMMAND`."""

import subprocess
import sys
from pathlib import Path

import pytest
from launches import REPOSITORY, environment

from baichuan_jax.__main__ import COMMANDS, answer
from baichuan_jax.data.rows import Rows

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
