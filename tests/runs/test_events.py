"""Events as typed records: what is written is read again, also by and from other versions."""

import json

import pytest

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.resilience.checkpoint_interval import fault_history
from baichuan_jax.runs.events import (
    Completed,
    Restored,
    Started,
    Unknown,
    append_event,
    latest,
    of_kind,
    parse_event,
)
from baichuan_jax.runs.folder import Run


def test_an_event_is_read_as_it_was_written(tmp_path):
    written = [Started(attempt=1, mesh={"data": 2}), Completed(step=5, samples={"春": "風"})]
    for event in written:
        append_event(tmp_path, event)
    assert Run(tmp_path).events == written
    assert Run(tmp_path).status == "completed"
    assert latest(written, Restored) is None
    assert of_kind(written, Started) == written[:1]


def test_lines_of_other_versions_are_read():
    later = {"time": 1.0, "kind": "restored", "step": 3, "position": 4, "new_field": 5}
    assert parse_event(later) == Restored(time=1.0, step=3, position=4, local=False)
    unknown = {"time": 1.0, "kind": "of a later version", "anything": 1}
    assert parse_event(unknown) == Unknown(time=1.0, content=unknown)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"time": 1.0, "kind": "restored", "position": 4}, "restored lacks step"),
        ({"kind": "restored", "step": 3, "position": 4}, "a kind and a time"),
        ([], "a kind and a time"),
    ],
)
def test_a_damaged_line_is_refused_with_its_number(tmp_path, line, reason):
    append_event(tmp_path, Started(attempt=1))
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match=rf"events.jsonl, line 2 is no event: .*{reason}"):
        _ = Run(tmp_path).events


def test_a_half_line_of_a_killed_writer_is_dropped(tmp_path):
    append_event(tmp_path, Started(attempt=1))
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"time": 2.0, "kind": "restor')
    append_event(tmp_path, Restored(step=3, position=4))
    assert [event.kind for event in Run(tmp_path).events] == ["started", "restored"]


def test_a_launch_is_a_fault_once_it_was_killed_and_not_while_it_runs(tmp_path):
    assert fault_history(Run(tmp_path).events).faults == 0
    append_event(tmp_path, Started(time=1.0, attempt=1))
    history = fault_history(Run(tmp_path).events)  # of the second launch, before its own `started`
    assert history.faults == 1
    append_event(tmp_path, Started(time=3.0, attempt=2))
    append_event(tmp_path, Completed(time=9.0, step=5))
    assert fault_history(Run(tmp_path).events).faults == 1
    assert fault_history(Run(tmp_path).events).run_seconds == 8.0
