"""What messages, records and pages show: no control characters, no secrets."""

import html

import pytest

from baichuan_jax.config.files import _kinds, make_parser, parse_config
from baichuan_jax.config.messages import (
    as_html,
    has_credentials,
    hide_secrets,
    printable,
    without_secrets,
)
from baichuan_jax.config.parsing import quote_path, show_path
from baichuan_jax.config.schema import Config, ConfigError
from baichuan_jax.data.corpus.config import CorpusConfig
from baichuan_jax.documents.files import find_files, find_inputs
from baichuan_jax.resilience.causes import describe
from baichuan_jax.resilience.exits import say
from baichuan_jax.runs.events import Failed, LeftOut

TERMINAL = "a\x1b[2J\x07\x9b1m\x7f\u202eb\u2066\u2028"
SHOWN = r"a\x1b[2J\x07\x9b1m\x7f\u202eb\u2066\u2028"
SECRET = "pLanTed/sEcret+41c7"


def test_a_terminal_gets_no_command_of_a_name():
    assert printable(TERMINAL + "\n\t春") == SHOWN + "\n\t春"
    assert printable("a\nb\t", one_line=True) == r"a\nb\t"
    assert show_path(TERMINAL) == SHOWN
    assert str(ConfigError(TERMINAL)) == SHOWN
    assert quote_path("a\x1b") == r"$'a\x1b'"
    assert describe(FileNotFoundError(2, "", "a\nb\x1b")).startswith(r"a\nb\x1b: No such file")
    assert as_html(TERMINAL + "<") == html.escape(SHOWN + "<")


WITH_CREDENTIALS = [
    f"s3://KEY:{SECRET}@bucket/x.jsonl",
    f"s3://KEY:{SECRET.replace('/', '%2F')}@bucket/x.jsonl",
    f"s3://bucket/x?access_key=KEY&secret_key={SECRET}",
    f"s3://bucket/x?region=eu&session_token={SECRET}",
    f"https://user:{SECRET}@host/x.jsonl",
    f"https://bucket/x?X-Amz-Date=1&X-Amz-Signature={SECRET}",
    f"https://bucket/x?sv=1&sig={SECRET}",
    f"s3://bucket/x?endpoint_override=https%3A%2F%2Fuser%3A{SECRET.replace('/', '%2F')}%40host",
    f"abfs://container:{SECRET}@account/x",
]
WITHOUT = [
    "s3://bucket/*.jsonl",
    "s3://bucket/x?region=eu&scheme=http&endpoint_override=host:9000",
    "hdfs://user@host:8020/a@b/x.parquet",
    "gs://anonymous@bucket/x",
    "data/secret=1/token.jsonl",
    "/data/key:value@host",
]


@pytest.mark.parametrize("address", WITH_CREDENTIALS)
def test_an_address_with_credentials_is_refused_and_not_shown(address):
    assert has_credentials(address)
    for call in (lambda: find_files([address]), lambda: find_inputs([address])):
        with pytest.raises(ConfigError, match=r"credentials in it.*AWS_ACCESS_KEY_ID") as error:
            call()
        assert "pLanTed" not in str(error.value)
    # An error of a library may quote it.
    if "%40" not in address:
        assert "pLanTed" not in hide_secrets(f"cannot open {address}: refused")


@pytest.mark.parametrize("address", WITHOUT)
def test_an_address_without_credentials_stays_as_it_is(address):
    assert not has_credentials(address)
    assert hide_secrets(f"{address}: not there") == f"{address}: not there"


def with_text(kind, text: str) -> str | None:
    """A value of a setting's kind with this text in it; None where it takes no text."""
    shown = str(kind)
    if "dict[str, list" in shown:
        return f"{{mmlu: ['{text}']}}"
    if "dict[str" in shown:
        return f"{{'{text}': 1}}"
    if "list[str]" in shown:
        return f"['{text}']"
    return text if "str" in shown else None


def settings_of_text(settings: type) -> dict[str, str]:
    found = {n: with_text(k, f"s3://KEY:{SECRET}@bucket/x") for n, k in _kinds(settings)}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        pytest.param(cls, name, value, id=name)
        for cls in (Config, CorpusConfig)
        for name, value in settings_of_text(cls).items()
    ],
)
def test_no_setting_takes_credentials(settings, name, value):
    needed = ["--config", "tiny"] if settings is Config else ["--input", "['a']", "--output", "b"]
    with pytest.raises(ConfigError) as error:
        parse_config(make_parser("p", "", settings), [*needed, f"--{name}", value], settings)
    assert name.split(".")[-1] in str(error.value)
    assert "pLanTed" not in str(error.value)


# Variables that tools read secrets from.
VARIABLES = [
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "WANDB_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "OSS_ACCESS_KEY_SECRET",
    "AZURE_STORAGE_KEY",
    "GITHUB_PAT",
    "DB_PASSWORD",
]


@pytest.mark.parametrize("variable", [*VARIABLES, "https_proxy"])
def test_a_secret_of_the_environment_is_in_no_record(variable, monkeypatch, capfd):
    proxy = variable == "https_proxy"
    monkeypatch.setenv(variable, f"http://me:{SECRET}@proxy:3128" if proxy else SECRET)
    text = f"ClientError: the signature of {SECRET} does not match"
    assert hide_secrets(text) == "ClientError: the signature of *** does not match"
    assert without_secrets({"a": [text, 1, {SECRET: None}]}) == {
        "a": [hide_secrets(text), 1, {"***": None}]
    }
    for event in (Failed(step=1, error=text), LeftOut(what="samples", error=text)):
        assert SECRET not in event.to_line().decode()
    say(text)
    assert SECRET not in str(ConfigError(text)) + capfd.readouterr().err


def test_what_is_no_secret_is_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_TOKEN", "short")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    monkeypatch.setenv("MAX_TOKENS", "1000000000")
    monkeypatch.setenv("PWD", "/home/somebody")
    text = f"false short {tmp_path} 1000000000 /home/somebody"
    assert hide_secrets(text) == text
