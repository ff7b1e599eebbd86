"""A secret in any argument of any command: nothing shows or keeps it."""

import argparse
import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from baichuan_jax.__main__ import NAMES
from baichuan_jax.config.schema import Config
from baichuan_jax.data.corpus.config import CorpusConfig
from baichuan_jax.resilience.exits import run_command

SECRET = "pLanTed41c7sEcret"
ADDRESSES = {
    "plain": f"s3://KEY:{SECRET}@bucket/x/*.jsonl",
    "encoded": f"s3%3A%2F%2FKEY%3A{SECRET}%40bucket%2Fx",
    "token": f"https://ghp_{SECRET}@host/x",
    "parameter": f"https://host/x?auth={SECRET}",
}
# What a command needs besides, so that it looks at the argument; the rest is left at its default.
NUMBERS = {"--vocab_size": "300", "--context_length": "8", "--temperature": "1"}
SETTINGS = {field.name for cls in (Config, CorpusConfig) for field in dataclasses.fields(cls)}
FOUR = ("data.train", "train.num_steps", "run_dir", "output")


class _Found(Exception):
    """Ends a command where it has made its parser."""


def main_of(name: str) -> Callable[[list[str]], int]:
    try:
        module = importlib.import_module(f"baichuan_jax.{name}.__main__")
    except ModuleNotFoundError:
        module = importlib.import_module(f"baichuan_jax.{name}")
    return module.main


@functools.cache
def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser that a command makes."""
    found: list[argparse.ArgumentParser] = []
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self, *given, **options):
        # One without help looks for --config alone, before the parser of all settings.
        if not self.add_help:
            return parse(self, *given, **options)
        found.append(self)
        raise _Found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr("jsonargparse.ArgumentParser.parse_args", stop)
        patch.setattr("jsonargparse.ArgumentParser.parse_known_args", stop)
        with pytest.raises(_Found):
            main_of(name)([])
    return found[0]


def arguments(parser: argparse.ArgumentParser, before: tuple[str, ...] = ()) -> list[list[str]]:
    """A command line for every argument; "@" stands for its value."""
    found, actions = [], parser._actions
    for action in actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found += arguments(inner, (*before, name))
    if found:
        return found
    needed = [a for a in actions if a.required or not a.option_strings]
    for action in actions:
        # test_messages.py has all settings; these are read in other ways.
        is_setting = action.dest.partition(".")[0] in SETTINGS and action.dest not in FOUR
        if action.nargs == 0 or action.dest in ("help", "print_config") or is_setting:
            continue
        argv = list(before)
        for each in {id(a): a for a in [*needed, action]}.values():
            value = "@" if each is action else "nothing"
            if each is not action:
                value = NUMBERS.get((each.option_strings or [""])[0], value)
            argv += [*each.option_strings[-1:], value]
        found.append(argv)
    return found


@pytest.mark.parametrize(
    "form",
    [
        "plain",
        "encoded",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("token", "parameter")),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_no_argument_shows_or_keeps_a_secret(name, form, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("baichuan_jax.resilience.exits.leave", lambda code: codes.append(code))
    shown, codes = {}, []
    for argv in arguments(parser_of(name)):
        argv = [ADDRESSES[form] if text == "@" else text for text in argv]
        monkeypatch.setattr("sys.orig_argv", ["python", "-m", f"baichuan_jax.{name}", *argv])
        with contextlib.suppress(SystemExit):
            run_command(lambda argv=argv: main_of(name)(argv))
        out = capfd.readouterr()
        if SECRET in out.err + out.out:
            shown[" ".join(argv)] = out.err[-600:]
    assert not shown, shown
    assert codes
    kept = [file for file in Path().rglob("*") if SECRET in str(file)]
    kept += [file for file in Path().rglob("*") if file.is_file() and SECRET in file.read_text()]
    assert not kept
