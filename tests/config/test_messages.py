"""What messages, records and pages show: no control characters, no secrets."""

import html
import json
import re
import time
from pathlib import Path

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
from baichuan_jax.runs.events import (
    CheckpointFailed,
    Completed,
    Failed,
    LeftOut,
    VerdictReached,
    parse_event,
)

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
    # As Path writes it, and as a parameter of an address that is one itself.
    f"s3:/KEY:{SECRET}@bucket/x/*.jsonl",
    f"s3://KEY%3A{SECRET.replace('/', '%2F')}%40bucket/x",
    f"s3%3A%2F%2FKEY%253A{SECRET.replace('/', '%252F')}%2540bucket/x",
    f"s3://KEY:a@{SECRET}@bucket/x",
    "https://ghp_pLanTed41c7@host/x",
    "https://hf_pLanTed@host/x",
    "https://pLanTed4sEcret41c7@host/x",
    f"https://{'41c7planted' * 3}@host/x".replace("41c7planted", "41c7pLanTed"),
    *(f"https://host/x?a=1&{name}={SECRET}" for name in ("auth", "pwd", "pass", "key", "jwt")),
    f"https://host/x?authorization={SECRET}",
    f"https://host/x?apiKey={SECRET}",
    f"https://host/x?%61uth={SECRET}",
    f"https://host/x#token={SECRET}",
    f"https://host/x#a=1&access_token={SECRET}",
]
WITHOUT = [
    "ssh://git@github.com/a/b",
    "ssh://first.last@host-1.example.org:22/a",
    "abfs://training-data-2026-11@account/x",
    "https://host/x?max_tokens=5&tokenizer=a&tokens=7&cache_key=8&monkey=9",
    "http://[::1]:9000/a@b",
    "data/100%/a%20b.jsonl",
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
    shown = hide_secrets(f"cannot open {address} or {address} refused")
    assert "pLanTed" not in shown
    assert re.fullmatch(r"cannot open \S+ or \S+ refused", shown)
    assert hide_secrets(str(Path(address))).count("pLanTed") == 0


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
    assert without_secrets({"a": [text, 1, None]}) == {"a": [hide_secrets(text), 1, None]}
    for event in (Failed(step=1, error=text), LeftOut(what="samples", error=text)):
        assert SECRET not in event.to_line().decode()
    say(text)
    assert SECRET not in str(ConfigError(text)) + capfd.readouterr().err


# Names that hold no secret, and values of which none may be taken out of a text.
HARMLESS = {
    "MY_TOKEN": "short",
    "DB_PASSWORD": "checkpoint",
    "TOKENIZERS_PARALLELISM": "false",
    "TOKENIZER_NAME": "baichuan_jax",
    "CACHE_KEY": "checkpoint-2026A",
    "SSH_KEY_NAME": "id_ed25519_Work",
    "PARTITION_KEY": "some-long-name-of-16",
    "KEYBOARD_API": "some-long-name-of-17",
    "MAX_TOKENS": "1000000000",
    "API_TOKENS": "2147483648",
    "MAX_TOKENS_FILE": "tokens-2026-a",
    "PWD": "/home/Somebody1",
    "OLDPWD": "/home/Somebody2",
}


def test_what_is_no_secret_is_shown(monkeypatch, tmp_path):
    for name, value in HARMLESS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    text = " ".join([*HARMLESS.values(), str(tmp_path)])
    assert hide_secrets(text) == text


def test_no_variable_takes_a_record_apart(monkeypatch):
    words = [
        "checkpoint_failed",
        "verdict_is_reached",
        "host-1.cluster.example",
        "step_seconds_of_it",
    ]
    for number, word in enumerate(["numerics", *words]):
        monkeypatch.setenv(f"M{number}_API_KEY", word)
    failed = CheckpointFailed(step=1, reason="a verdict_is_reached b")
    assert json.loads(failed.to_line()) | {"time": 0} == {
        **{"time": 0, "kind": "checkpoint_failed", "step": 1},
        "reason": "a *** b",
    }
    assert parse_event(json.loads(failed.to_line())).kind == "checkpoint_failed"
    verdict = VerdictReached(attempt=1, cause="verdict_is_reached", hosts=[words[2]], host=words[2])
    assert parse_event(json.loads(verdict.to_line())) == verdict
    completed = Completed(step=1, seconds={words[3]: 1.0})
    assert parse_event(json.loads(completed.to_line())) == completed


def test_a_long_text_is_searched_in_seconds():
    began = time.perf_counter()
    for part in ("a", "a://b:", "%3A%2F%2F", "?a&token", "://", "@", "%25"):
        hide_secrets(f"s3://{part * (200_000 // len(part))}")
    assert time.perf_counter() - began < 10
