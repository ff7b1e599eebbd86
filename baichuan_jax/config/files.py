"""Settings from YAML files and the command line, and back to YAML.

Every command that takes settings builds its parser here (`make_parser`) and reads it here
(`parse_config`, `parse_command`); a notebook calls `load_config`. Options on the command line
override the files of --config, wherever --config is. A misspelt name is refused with the
nearest right one, in a file and on the command line.
"""

import argparse
import dataclasses
import difflib
import functools
import itertools
import os
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from baichuan_jax.config.parsing import (
    LARGEST,
    is_odd_number,
    read_yaml,
    refuse_credentials,
    require_type,
    require_utf8,
    show,
)
from baichuan_jax.config.schema import Config, ConfigError, MeshConfig, require

# jsonargparse opens files in the locale's encoding; settings are UTF-8 under every locale.
jsonargparse._paths.open = functools.partial(open, encoding="utf-8")  # type: ignore[attr-defined]


def _keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all settings, and of the sections that hold them."""
    names = []
    for item in fields(cls):
        names.append(prefix + item.name)
        if is_dataclass(item.type):
            names += _keys(item.type, f"{prefix}{item.name}.")  # type: ignore[arg-type]
    return names


# Computed once: every command checks its arguments against them.
KEYS = _keys(Config)


class _Help(jsonargparse.DefaultHelpFormatter):
    """An option whose type is a function has the help that it was given, and no more."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.type is None or isinstance(action.type, type):
            return super()._get_help_string(action)
        return action.help or ""


def make_parser(
    prog: str, description: str, settings: type = Config
) -> jsonargparse.ArgumentParser:
    """The parser of a command whose options are the fields of a dataclass: Config, or another."""
    # Help texts are the docstrings below the fields.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = f"{prog} --config FILE [--SETTING VALUE ...]"
    # exit_on_error: a wrong value becomes a ConfigError. allow_abbrev: with it, the beginning of a
    # name would pass for it today and be ambiguous after the next setting is added.
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=usage,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file of settings, or a name (tiny); other options override it.",
    )
    parser.add_class_arguments(settings)
    # JSONARGPARSE_DEFAULT_ENV would have every setting read from the environment, unchecked.
    parser._default_env = False
    return parser


def parse_config(
    parser: jsonargparse.ArgumentParser, argv: list[str], settings: type = Config
) -> Any:
    """The settings that a parser of make_parser reads from argv. Raises ConfigError.

    --help and --print_config print and exit.
    """
    return parse_command(parser, argv, settings=settings)[0]


def parse_command(
    parser: jsonargparse.ArgumentParser,
    argv: list[str],
    own: Sequence[str] = (),
    settings: type = Config,
) -> tuple[Any, dict[str, Any]]:
    """The settings and the command's own options by name, read from argv. Raises ConfigError.

    `own`: options that the command added to the parser beside the settings. --help and
    --print_config print and exit.
    """
    known = KEYS if settings is Config else _keys(settings)
    paths, options = _split_config(argv)
    for path in paths:
        _check_file(path, known)
    kinds = dict(_kinds(settings))
    for option, following in itertools.zip_longest(options, options[1:], fillvalue=""):
        require_utf8(option, "command line")
        if match := re.match(r"--([^=]+)", option):
            key = match[1].rstrip("+")  # --data.skip+ appends to a list
            if key not in ("help", "print_config", *own):
                _refuse_unknown([key], known, "command line")
                _refuse_section(key, known)
                _refuse_odd_number(key, kinds.get(key), option.partition("=")[2] or following)
    try:
        # The files first: jsonargparse lets a later argument win, and an option given by hand must.
        namespace = parser.parse_args([*(f"--config={path}" for path in paths), *options])
        namespace.pop("config")
        values = {name: namespace.pop(name) for name in own}
        for section in {name.split(".")[0] for name in own if "." in name}:
            namespace.pop(section, None)  # empty now
        for name, kind in kinds.items():
            _require_value(namespace[name], kind, name)
        config = settings(**parser.instantiate(namespace).as_dict())
    except (jsonargparse.ArgumentError, argparse.ArgumentTypeError) as error:
        text = " ".join(str(error).split())
        if len(text) > 600:
            # The setting stands at its beginning, the reason at its end; between them any value.
            text = f"{text[:400]} ... {text[-150:]}"
        # Of an argument that is empty.
        raise ConfigError(f"{text} ''" if text.endswith(":") else text) from None
    except OverflowError as error:
        where = " and ".join([*paths, "the command line"])
        raise ConfigError(f"a number in {where} is too large: {error}") from None
    if isinstance(config, Config) and config.run_dir is None:
        # Without run_dir a run is named by its last file.
        name = Path(paths[-1]).stem if paths else "default"
        config = dataclasses.replace(config, run_dir=f"runs/{name}")
    return config, values


def _kinds(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, annotation) of every setting."""
    for item in fields(cls):
        if is_dataclass(item.type):
            yield from _kinds(item.type, f"{prefix}{item.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + item.name, item.type


def _refuse_odd_number(name: str, kind: Any, text: str) -> None:
    """Refuse an option that jsonargparse would read as YAML's number of base 60: 12:30 is 750."""
    is_text = str in (kind, *typing.get_args(kind))
    if not is_text and ":" in text and is_odd_number(text):
        raise ConfigError(f"{name}={text} is a number of base 60, to YAML; give a decimal one")


def _require_value(value: Any, kind: Any, name: str) -> None:
    """Refuse what jsonargparse takes and no setting can be: null, NaN, numbers of any length."""
    for each in _values(value):
        if isinstance(each, int) and abs(each) > LARGEST:
            raise ConfigError(f"{name}={show(each)} is too large: no count has over 64 bits")
        if isinstance(each, str):
            require("\0" not in each, f"{name}={show(each)} has the character 0, as no name may")
            refuse_credentials(each, name)
    # A line of YAML without a value is null too.
    require(
        value is not None or type(None) in typing.get_args(kind),
        f"{name} has no value (null); give one, or leave the setting out",
    )
    require_type(value, kind, name)


def _refuse_section(key: str, known: list[str]) -> None:
    """Refuse a section of settings as one option, whose value may be a file or JSON.

    jsonargparse imports the module that a class_path in it names, before it refuses that.
    """
    inside = next((name for name in known if name.startswith(f"{key}.")), None)
    require(
        inside is None,
        f"--{key} is a section of settings; give its settings one by one (--{inside} VALUE), or "
        "in a file of settings (--config FILE)",
    )


def _values(value: Any) -> Iterator[Any]:
    """A setting's value, or all that a list or dict holds, keys included."""
    if isinstance(value, dict | list | tuple):
        pairs = list(value.items()) if isinstance(value, dict) else enumerate(value)
        for key, each in pairs:
            yield key
            yield from _values(each)
    else:
        yield value


def load_config(path: str | os.PathLike, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, then overrides such as "train.num_steps=60". Raises ConfigError."""
    # A file and overrides are read by the same code as a command line, and refused alike.
    argv = ["--config", os.fspath(path)]
    for override in overrides or []:
        require(
            "=" in override,
            f"override {override!r} must read name=value, such as train.num_steps=60",
        )
        argv.append("--" + override.removeprefix("--"))
    return parse_config(make_parser("load_config", ""), argv)


def dump_config(config: Config) -> str:
    """The whole configuration as YAML, in the order of the dataclasses."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
        return value

    # What two settings share is written twice: no file of settings has aliases.
    dumper = type("_NoAliases", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})
    return yaml.dump(plain(config), Dumper=dumper, sort_keys=False, allow_unicode=True)


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted name, from a configuration's sections."""
    sections = {item.name for item in fields(Config) if is_dataclass(item.type)}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        # data.train and others are dicts too, and are settings.
        if key in sections and isinstance(value, dict):
            found |= {f"{key}.{name}": setting for name, setting in value.items()}
        else:
            found[key] = value
    return found


def shipped() -> dict[str, Path]:
    """The configurations that come with the program, by name."""
    # An installed package holds them as baichuan_jax/configs; a checkout, beside baichuan_jax.
    package = Path(__file__).parents[1]
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


# Axes of the mesh of a command without other settings, and what each splits.
_PIECES = {"data": "rows", "fsdp": "parameters", "context": "sequence", "tensor": "heads"}


def add_mesh_options(parser: argparse.ArgumentParser, default: MeshConfig) -> None:
    """Add --mesh.data, .fsdp, .context and .tensor to a command that has no other settings.

    Not .state: such a command keeps weights alone, and each replica computes with all of them.
    """
    # The same names as in train's settings, so that a user learns them once.
    group = parser.add_argument_group(
        "mesh", "devices along each axis; one of them may be -1: all that are left"
    )
    for name, what in _PIECES.items():
        size = getattr(default, name)
        group.add_argument(
            f"--mesh.{name}", type=int, default=size, metavar="N", help=f"pieces of the {what}"
        )


def mesh_config(options: argparse.Namespace) -> MeshConfig:
    """The mesh of the options that add_mesh_options added."""
    return MeshConfig(**{name: getattr(options, f"mesh.{name}") for name in _PIECES})


def _split_config(argv: list[str]) -> tuple[list[str], list[str]]:
    """The files that --config names in argv, in order, and the other arguments."""
    # argparse finds both forms, `--config FILE` and `--config=FILE`, and leaves the rest alone.
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", action="append", default=[])
    try:
        found, options = finder.parse_known_args(argv)
    except argparse.ArgumentError:
        raise ConfigError("--config needs a file, or the name of a configuration (tiny)") from None
    return [find_config(path) for path in found.config], options


def config_files(argv: list[str]) -> list[str]:
    """The files of settings that --config names in argv. Raises ConfigError."""
    return _split_config(argv)[0]


def find_config(path: str) -> str:
    """A file of settings: the path itself, or that of a configuration given by name (tiny).

    Raises ConfigError where no configuration has that name.
    """
    # A bare word is a name, unless a file of that name exists. A folder may have it by chance.
    if Path(path).suffix or len(Path(path).parts) != 1 or Path(path).is_file():
        return path
    known = shipped()
    require(
        path in known,
        f"there is no configuration {path!r}; give a file, or one of these names: "
        f"{', '.join(known)}",
    )
    return str(known[path])


def _check_file(path: str, known: list[str]) -> None:
    """Refuse a file that is missing, is no YAML or sets something that does not exist."""
    file = Path(path)
    if not file.exists():
        raise ConfigError(
            f"there is no configuration file {path!r} (working directory: {os.getcwd()}); those "
            f"that come with the program are given by name: --config {' | '.join(shipped())}"
        )
    # Read here before jsonargparse reads it, whose message names no nearest setting.
    tree = read_yaml(file)
    require(tree is not None, f"{path} holds no settings; give a file with some, or no --config")
    require(
        isinstance(tree, dict), f"{path} must hold settings by name and holds {type(tree).__name__}"
    )
    try:
        _refuse_unknown(list(_file_keys(tree, known)), known, path)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(path) else f"{path}: {text}") from None


def _file_keys(tree: Any, known: list[str], prefix: str = "") -> Iterator[str]:
    """Dotted names that a parsed YAML file sets, down to the settings' own values."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        # A setting may hold a dict itself (data.train); only sections are walked into.
        if not any(other.startswith(name + ".") for other in known):
            yield name
            continue
        if not isinstance(value, dict):
            raise ConfigError(
                f"{name} is a section of settings and was given {show(value)}; "
                "write its settings below it"
            )
        yield from _file_keys(value, known, name + ".")


def _refuse_unknown(keys: list[str], known: list[str], source: str) -> None:
    for key in keys:
        if key not in known:
            # cutoff 0: the nearest name is always given, however far it is.
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{source}: there is no setting {key!r}; the nearest is {near!r} (--help lists all)"
            )
