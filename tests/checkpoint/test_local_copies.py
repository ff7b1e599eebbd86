"""Copies on the hosts' own disks: bit-exact, newest first, damage found, missing ones sent."""

import os
import shutil

import jax
import numpy as np
import pytest
from conftest import build, run_state
from launches import kill, lines, losses, run, start_all, wait_all, wait_for_step, write_config

from baichuan_jax.checkpoint.local_copies import LocalCopies, _send
from baichuan_jax.checkpoint.progress import Piece, Progress
from baichuan_jax.checkpoint.state import StateTarget
from baichuan_jax.resilience.placement import HOST_VARIABLE


def filled(steps, seed):
    """A state of other numbers everywhere, zeros with a sign among them."""
    rng = np.random.default_rng(seed)
    whole = jax.tree.map(
        lambda leaf: np.asarray(rng.integers(-3, 4, leaf.shape) * 0.5, leaf.dtype),
        steps.state_shapes,
    )
    signed = jax.tree.map(lambda x: np.where(x == 0, -x, x).astype(x.dtype), whole)
    return jax.device_put(signed, steps.state_shardings)


def earlier(position):
    """The progress of a copy that says its position alone."""
    return Progress(0, position * 16, pieces=(Piece(0, 0, 16),))


@pytest.fixture
def opened(tiny_config, tmp_path):
    def open_(shape, rollbacks=0):
        _, steps = build(tiny_config, shape)
        target = StateTarget(steps.abstract_state)
        folder = tmp_path / "local"
        return LocalCopies(folder, rollbacks, "here", "abc", target, earlier), steps

    return open_


def bits(state):
    return [
        np.asarray(jax.device_get(leaf)).reshape(-1).view(np.uint32).tolist()
        for leaf in jax.tree.leaves(state)
    ]


def refuse_reports(event):
    raise AssertionError(f"unexpected report {event}")


def test_a_copy_is_restored_bit_for_bit_onto_another_mesh_and_only_the_newest_is_kept(
    opened, tmp_path
):
    copies, steps = opened((2, 2, 1, 2))
    for step in (3, 4):
        copies.save(run_state(filled(steps, step), step, step + 1))
    copies.finish()
    assert [path.name for path in (tmp_path / "local").iterdir()] == ["4.state"]
    again, steps = opened((1, 4, 1, 1))
    restored = again.restore(0, refuse_reports)
    assert (restored.step, restored.position) == (4, 5)
    assert bits(restored.state) == bits(filled(steps, 4))
    assert jax.tree.map(lambda x: x.sharding, restored.state) == steps.state_shardings


def test_what_the_loop_does_to_the_state_after_save_returns_is_not_copied(opened):
    copies, steps = opened((1, 2, 1, 1))
    running = filled(steps, 0)
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 1, tree), donate_argnums=0)
    copies.save(run_state(running, 1, 1))
    for _ in range(5):
        running = change(running)
    copies.finish()
    assert bits(copies.restore(0, refuse_reports).state) == bits(filled(steps, 0))


def test_what_is_older_than_the_newest_checkpoint_or_than_a_rollback_does_not_count(opened):
    copies, steps = opened((1, 1, 1, 1))
    copies.save(run_state(filled(steps, 0), 7, 7))
    copies.finish()
    assert copies.restore(8, refuse_reports) is None
    assert opened((1, 1, 1, 1), rollbacks=1)[0].restore(0, refuse_reports) is None
    assert copies.restore(7, refuse_reports).step == 7


def cut(path):
    os.truncate(path, path.stat().st_size - 4)


def emptied(path):
    os.truncate(path, 0)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, emptied, flipped])
def test_a_damaged_copy_is_told_and_not_used(opened, tmp_path, damage, capfd):
    copies, steps = opened((1, 2, 1, 1))
    copies.save(run_state(filled(steps, 0), 7, 7))
    copies.finish()
    damage(tmp_path / "local" / "7.state")
    reports = []
    assert copies.restore(0, lambda event: reports.append((event.kind, event.step))) is None
    assert ("7.state is not a copy to go on from" in capfd.readouterr().err) != (
        reports == [("local_copy_corrupt", 7)]
    )


def test_a_copy_that_another_host_finds_wrong_when_it_is_sent_is_not_tried_for_ever(
    opened, tmp_path, monkeypatch
):
    import baichuan_jax.checkpoint.local_copies

    copies, steps = opened((1, 1, 1, 1))
    copies.save(run_state(filled(steps, 0), 7, 7))
    copies.finish()
    theirs = {"steps": None, "head": {}, "digest": 1}  # another host, which has no copy
    monkeypatch.setattr(
        baichuan_jax.checkpoint.local_copies,
        "gather",
        lambda name, value: [value, theirs[name.rsplit("/", 1)[1]]],
    )
    monkeypatch.setattr(
        baichuan_jax.checkpoint.local_copies, "_send", lambda content, source: content
    )
    reports = []
    assert copies.restore(0, lambda event: reports.append(event.reason)) is None
    assert reports == ["not the bits that were saved, on processes [0]"]
    assert not list((tmp_path / "local").iterdir())


def test_a_full_disk_is_told_and_the_copy_before_stays(opened, tmp_path):
    copies, steps = opened((1, 1, 1, 1))
    copies.save(run_state(filled(steps, 0), 1, 1))
    copies.finish()
    (tmp_path / "local" / f"2.state.{os.getpid()}").symlink_to("/dev/full")
    copies.save(run_state(filled(steps, 1), 2, 2))
    with pytest.raises(OSError, match="No space left"):
        copies.finish()
    assert copies.restore(0, refuse_reports).step == 1


def test_arrays_are_sent_in_pieces_that_fit(monkeypatch):
    import baichuan_jax.checkpoint.local_copies

    sent = []

    def send(part, is_source):
        sent.append(part.size)
        return part

    monkeypatch.setattr(
        baichuan_jax.checkpoint.local_copies.multihost_utils, "broadcast_one_to_all", send
    )
    monkeypatch.setattr(baichuan_jax.checkpoint.local_copies, "CHUNK", 64)
    content = np.arange(150, dtype=np.float32).reshape(15, 10)
    np.testing.assert_array_equal(_send(content, 0), content)
    assert sent == [64, 64, 32]
    assert _send(np.float32(-0.0).reshape(()), 0).tobytes() == np.float32(-0.0).tobytes()


@pytest.mark.slow
def test_two_hosts_go_on_from_their_copies_and_one_without_is_sent_the_other_s(tmp_path):
    """The same losses as undisturbed, from steps that no checkpoint has."""
    config = write_config(tmp_path)
    options = ["--train.num_steps", "30", "--checkpoint.every", "1000", "--evaluate.every", "1000"]
    straight, disturbed = tmp_path / "straight", tmp_path / "disturbed"
    assert wait_all(start_all(config, straight, *options, processes=2, devices=1)) == [0, 0]
    local = [
        "--checkpoint.local_dir",
        f"{tmp_path}/disk-$BAICHUAN_JAX_HOST",
        "--checkpoint.local_every",
        "4",
    ]
    assert HOST_VARIABLE == "BAICHUAN_JAX_HOST"
    processes = start_all(config, disturbed, *options, *local, processes=2, devices=1, hosts="ab")
    wait_for_step(processes[0], disturbed, 10)
    for process in processes:
        kill(process)
    shutil.rmtree(tmp_path / "disk-a")  # as on a spare, here in process 0's place
    assert wait_all(
        start_all(config, disturbed, *options, *local, processes=2, devices=1, hosts="ab")
    ) == [0, 0]
    events = lines(disturbed, "events")
    restored = [event for event in events if event["kind"] == "restored"]
    assert [(event["local"], event["step"] % 4) for event in restored] == [(True, 0)]
    assert restored[0]["step"] >= 4
    assert losses(disturbed) == losses(straight)
    copied = [event for event in events if event["kind"] == "local_copy"]
    for host in "ab":
        assert [path.name for path in tmp_path.glob(f"disk-{host}/*/*")] == ["28.state"]
    assert all(event["blocked_seconds"] <= event["seconds"] for event in copied)


def test_a_state_that_lies_across_processes_is_refused(tmp_path):
    config = write_config(tmp_path)
    options = [
        "--mesh.fsdp",
        "2",
        "--checkpoint.local_dir",
        str(tmp_path / "disk"),
        "--checkpoint.local_every",
        "4",
    ]
    assert wait_all(start_all(config, tmp_path / "run", *options, processes=2, devices=1)) == [
        78,
        78,
    ]
    assert "needs every process to hold the whole state" in (tmp_path / "run.0.log").read_text()


def test_one_of_the_two_settings_alone_is_refused(tmp_path):
    said = run(write_config(tmp_path), tmp_path / "run", "--checkpoint.local_every", "4", expect=78)
    assert "set both or neither" in said
