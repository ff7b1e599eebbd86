"""What processes tell each other, through a stand-in for jax's service, and waits that speak."""

import json
import math
import threading
import time

import pytest

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.resilience import coordination, waits
from baichuan_jax.resilience.causes import PeerFailed
from baichuan_jax.resilience.coordination import agree, describe_difference, gather, require_same
from baichuan_jax.resilience.waits import announced, wait_until


class Service:
    """jax's client, for processes that take their turn in one test."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        self.values[key] = value

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        if key not in self.values:
            time.sleep(0.3)
            raise RuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
        return self.values[key]

    def wait_at_barrier(self, name: str, milliseconds: int) -> None:
        time.sleep(0.3)
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")


@pytest.fixture
def become(monkeypatch):
    """become(number): this is process `number` from here on."""
    service = Service()
    monkeypatch.setattr(coordination, "_client", lambda: service)
    return lambda number: monkeypatch.setattr(coordination, "_process_id", lambda: number)


def test_all_processes_take_what_process_0_chooses(become):
    become(0)
    assert agree("what", lambda: [1, None]) == [1, None]
    become(1)
    assert agree("what", lambda: pytest.fail("process 0 chooses")) == [1, None]


def test_what_process_0_refuses_all_refuse(become):
    def refuse():
        raise ConfigError("not like this")

    for number in (0, 1):
        become(number)
        with pytest.raises(ConfigError, match=r"^not like this$"):
            agree("what", refuse)


def test_what_must_be_the_same_is_compared_with_process_0s(become):
    become(0)
    require_same("the tokenizer", ("a", 1))
    become(1)
    require_same("the tokenizer", ("a", 1))
    with pytest.raises(ConfigError, match=r"differ in the tokenizer: .* process 1 on "):
        require_same("the tokenizer", ("b", 1))


@pytest.mark.parametrize(
    "first, other, said",
    [
        ("a", "b", "it is 'a' for process 0 and 'b' for"),
        (["a", "b", 1], ["a", "c", 1], "number 2 is 'b' for process 0 and 'c' for"),
        (["a"], ["a", "b"], "number 2 is missing for process 0 and 'b' for"),
        ({"x": 1, "y": 2}, {"y": 3, "x": 1}, "y is 2 for process 0 and 3 for"),
        ({"x": None}, {}, "x is None for process 0 and missing for"),
        ({"x": "a" * 9000}, {"x": 0}, "x is 'aaaa"),
    ],
)
def test_the_first_difference_is_named(first, other, said):
    text = describe_difference("what", first, other, "process 1", "do this")
    assert text.startswith(f"the hosts of this run differ in what: {said}")
    assert text.endswith(" process 1; do this")
    assert len(text) < 300


def test_of_several_differences_the_number_is_said():
    text = describe_difference("it", [1, 2, 3], [1, 4], "process 1", "do this")
    assert "number 2 is 2 for process 0 and 4 for process 1 (2 differ); do this" in text


def test_waits_for_others_say_so_and_end_with_what_they_waited_for(become, monkeypatch, capsys):
    monkeypatch.setattr(waits, "SAY_SECONDS", 0.05)
    become(1)
    with pytest.raises(PeerFailed, match=r"^waited 7 s in vain for process 0 to decide: what$"):
        agree("what", lambda: None, 7)
    assert capsys.readouterr().err == "waiting for process 0 to decide: what (7 s at most)\n"
    with pytest.raises(PeerFailed, match="in vain for the other processes to report: what"):
        gather("what", 1, 7)
    assert "waiting for the other processes to report: what (7 s" in capsys.readouterr().err


def test_a_short_wait_says_nothing_and_a_long_one_once(monkeypatch, capsys):
    monkeypatch.setattr(waits, "SAY_SECONDS", 0.1)
    with announced("nothing"):
        pass
    done = threading.Event()
    threading.Timer(0.4, done.set).start()
    assert wait_until(done.is_set, lambda: "the moon", math.inf, every=0.01)
    assert not wait_until(lambda: False, "the sun", 0.01, every=0.001)
    assert capsys.readouterr().err == "waiting for the moon\n"


def test_values_are_those_that_json_gives_back(become):
    become(0)
    assert agree("what", lambda: {"a": (1, 2)}) == {"a": (1, 2)}
    become(1)
    assert agree("what", lambda: None) == json.loads('{"a": [1, 2]}')
