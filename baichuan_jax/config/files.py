"""A Config from YAML files and command-line words, and back; misspelt settings are refused with the nearest right name."""

import argparse
import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from baichuan_jax.config.schema import Config, ConfigError, require


def _keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all settings, and of the sections that hold them."""
    names = []
    for item in fields(cls):
        names.append(prefix + item.name)
        if is_dataclass(item.type):
            names += _keys(item.type, f"{prefix}{item.name}.")  # type: ignore[arg-type]
    return names


KEYS = _keys(Config)


def _refuse_unknown(keys: list[str], known: list[str], source: str) -> None:
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{source}: there is no setting {key!r}; the nearest is {near!r} (--help lists all)"
            )


def _file_keys(tree: Any, known: list[str], prefix: str = "") -> list[str]:
    """Dotted names that a parsed YAML file sets, down to the settings' own values."""
    keys = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        section = any(other.startswith(name + ".") for other in known)
        if section and not isinstance(value, dict):
            raise ConfigError(
                f"{name} is a section of settings and was given {value!r}; write its settings below it"
            )
        keys += _file_keys(value, known, name + ".") if section else [name]
    return keys


def make_parser(
    prog: str, description: str, settings: type = Config
) -> jsonargparse.ArgumentParser:
    """The command-line parser of every command whose settings are a dataclass: a whole Config, or another."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = f"{prog} --config FILE [--SETTING VALUE ...]"
    parser = jsonargparse.ArgumentParser(
        prog=prog, usage=usage, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file of settings, or a name (tiny); options after it override it.",
    )
    parser.add_class_arguments(settings)
    return parser


def parse_config(
    parser: jsonargparse.ArgumentParser, words: list[str], settings: type = Config
) -> Any:
    """The settings that a parser of make_parser reads. Raises ConfigError; --help and --print_config print and leave."""
    return parse_command(parser, words, settings=settings)[0]


def parse_command(
    parser: jsonargparse.ArgumentParser,
    words: list[str],
    own: Sequence[str] = (),
    settings: type = Config,
) -> tuple[Any, dict[str, Any]]:
    """The settings and the command's own options, by name. Raises ConfigError; --help and --print_config print and leave.

    `own`: options that the command added to the parser beside the settings.
    """
    known = KEYS if settings is Config else _keys(settings)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(words)[0].config
    if path is not None:
        path, words = _find(path, words)
        _check_file(path, known)
    for word in words:
        if match := re.match(r"--([^=]+)", word):
            key = match[1].rstrip("+")
            if key not in ("help", "config", "print_config", *own):
                _refuse_unknown([key], known, "command line")
    try:
        namespace = parser.parse_args(words)
        namespace.pop("config")
        options = {name: namespace.pop(name) for name in own}
        for section in {name.split(".")[0] for name in own if "." in name}:
            namespace.pop(section, None)  # empty now
        config = settings(**parser.instantiate(namespace).as_dict())
    except jsonargparse.ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from None
    if isinstance(config, Config) and config.run_dir is None:
        config = dataclasses.replace(
            config, run_dir=f"runs/{Path(path).stem if path else 'default'}"
        )
    return config, options


def shipped() -> dict[str, Path]:
    """The configurations that come with the program, by name."""
    here = Path(__file__).parents[1]
    folder = (
        here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    )  # installed; a checkout
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _find(path: str, words: list[str]) -> tuple[str, list[str]]:
    """A file of settings: a path, or the name alone (tiny) of one that comes with the program; and the words with its path."""
    if Path(path).suffix or len(Path(path).parts) != 1 or Path(path).exists():
        return path, words
    known = shipped()
    require(
        path in known,
        f"there is no configuration {path!r}; give a file, or one of these names: {', '.join(known)}",
    )
    found = str(known[path])
    given = [f"--config={found}" if word == f"--config={path}" else word for word in words]
    return found, [
        found if place and words[place - 1] == "--config" else word
        for place, word in enumerate(given)
    ]


def _check_file(path: str | os.PathLike, known: list[str]) -> None:
    file = Path(path)
    if not file.is_file():
        raise ConfigError(
            f"there is no configuration file {str(path)!r} (working directory: {os.getcwd()}); those that come with the program are "
            f"given by name: --config {' | '.join(shipped())}"
        )
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    require(
        isinstance(tree, dict), f"{path} must hold settings by name and holds {type(tree).__name__}"
    )
    _refuse_unknown(_file_keys(tree, known), known, str(path))


def load_config(path: str | os.PathLike, overrides: list[str] | None = None) -> Config:
    """Read a YAML file of settings, then overrides such as "train.num_steps=60". Raises ConfigError."""
    words = []
    for override in overrides or []:
        require(
            "=" in override,
            f"override {override!r} must read name=value, such as train.num_steps=60",
        )
        words.append("--" + override.removeprefix("--"))
    return parse_config(make_parser("load_config", ""), ["--config", os.fspath(path), *words])


def dump_config(config: Config) -> str:
    """The whole configuration as YAML, in the order of the dataclasses."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
        return value

    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
