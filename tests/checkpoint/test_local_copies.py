"""Copies on the hosts' own disks: bit-exact, newest first, damage found, missing ones sent."""

import json
import os
import resource
import shutil
import stat
import struct

import jax
import numpy as np
import pytest
from conftest import build, run_state
from launches import (
    kill,
    lines,
    losses,
    run,
    start,
    start_all,
    wait_all,
    wait_for_step,
    write_config,
)

from baichuan_jax.checkpoint.local_copies import RECORD, LocalCopies, _send
from baichuan_jax.checkpoint.state import StateTarget
from baichuan_jax.config.schema import ConfigError
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


@pytest.fixture
def opened(tiny_config, tmp_path):
    def open_(shape, rollbacks=0):
        _, steps = build(tiny_config, shape)
        target = StateTarget(steps.abstract_state)
        folder, record = tmp_path / "local", tmp_path / "run" / RECORD
        return LocalCopies(folder, record, rollbacks, "here", "abc", target), steps

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
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        copies.save(run_state(filled(steps, 1), 2, 2))
        with pytest.raises(OSError, match="File too large"):
            copies.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "local").iterdir()] == ["1.state"]
    assert copies.restore(0, refuse_reports).step == 1


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_copies_are_this_user_s_alone(opened, tmp_path):
    """Also those that an earlier version left open to all, and folders of any umask."""
    copies, steps = opened((1, 1, 1, 1))
    assert mode(tmp_path / "local") == 0o700
    (tmp_path / "local").chmod(0o777)
    (tmp_path / "local" / f"1.state.{os.getpid()}").symlink_to(tmp_path / "elsewhere")
    copies.save(run_state(filled(steps, 0), 1, 1))
    copies.finish()
    assert mode(tmp_path / "local") == 0o700
    assert mode(tmp_path / "local" / "1.state") == 0o600
    assert not (tmp_path / "elsewhere").exists()


def planted(path, change_head=lambda head: None, change=lambda arrays: arrays):
    """Another copy that agrees with itself: whoever owns the folder can write its digests."""
    content = path.read_bytes()
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    head = json.loads(content[8:begin])
    change_head(head)
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + change(content[begin:]))


def swapped(arrays):
    """Other numbers of the same digest on devices: two of them change by amounts that cancel."""
    bits = np.frombuffer(arrays, np.uint32).copy()
    # 2^31 times two odd numbers is 0 modulo 2^32.
    bits[0] += np.uint32(1 << 31)
    bits[2] += np.uint32(1 << 31)
    return bits.tobytes()


@pytest.mark.parametrize("how", ["head", "arrays"])
def test_a_copy_that_another_user_made_is_not_trained_on(opened, tmp_path, how):
    copies, steps = opened((1, 1, 1, 1))
    copies.save(run_state(filled(steps, 0), 7, 7))
    copies.finish()
    if how == "head":
        change = lambda head: head["progress"].update(row=10**6)
        planted(tmp_path / "local" / "7.state", change)
    else:
        planted(tmp_path / "local" / "7.state", change=swapped)
    reports = []
    assert copies.restore(0, lambda event: reports.append(event.reason)) is None
    assert reports == ["not the bits that were saved, on processes [0]"]
    assert not list((tmp_path / "local").iterdir())


def test_a_copy_of_a_step_that_the_run_did_not_record_is_not_read(opened, tmp_path, capfd):
    copies, steps = opened((1, 1, 1, 1))
    copies.save(run_state(filled(steps, 0), 7, 7))
    copies.finish()
    (tmp_path / "local" / "9.state").write_bytes(b"\xff" * 100)
    assert copies.restore(0, refuse_reports).step == 7
    assert "9.state is not a copy to go on from" in capfd.readouterr().err
    for damage in ("[", '{"7": 1}'):
        (tmp_path / "run" / RECORD).write_text(damage)
        assert opened((1, 1, 1, 1))[0].restore(0, refuse_reports) is None
        assert "without it no copy on a host's disk counts" in capfd.readouterr().err


@pytest.mark.parametrize("at", ["hashed", "recorded", "written", "named"])
def test_killed_at_any_moment_a_copy_with_its_digest_is_there(opened, tmp_path, monkeypatch, at):
    copies, steps = opened((1, 1, 1, 1))
    copies.save(run_state(filled(steps, 4), 4, 4))
    copies.finish()
    with monkeypatch.context() as patch:
        if at == "hashed":
            patch.setattr(LocalCopies, "_agree_on", lambda *_: None)
        if at in ("hashed", "recorded"):
            patch.setattr(LocalCopies, "_write_file", lambda *_: None)
        copies.save(run_state(filled(steps, 8), 8, 8))
        copies._thread.join()
        if at == "named":
            copies.finish()
    # Another process, after a kill.
    again, _ = opened((1, 1, 1, 1))
    found = again.restore(0, refuse_reports)
    assert found.step == (8 if at == "named" else 4)
    assert bits(found.state) == bits(filled(steps, found.step))
    again.save(run_state(filled(steps, 12), 12, 12))
    again.finish()
    assert [path.name for path in (tmp_path / "local").iterdir()] == ["12.state"]
    recorded = json.loads((tmp_path / "run" / RECORD).read_text())
    assert list(recorded) == (["4", "12"] if at == "hashed" else ["4", "8", "12"])


def test_a_host_with_other_bits_than_process_0_keeps_its_older_copy(opened, monkeypatch):
    import baichuan_jax.checkpoint.local_copies

    copies, steps = opened((1, 1, 1, 1))
    for answer, reason in (
        ({"digest": "0" * 64, "failed": None}, "other bits of the state than process 0"),
        ({"digest": "", "failed": "No space left on device"}, "could not be written: No space"),
    ):
        monkeypatch.setattr(
            baichuan_jax.checkpoint.local_copies, "agree", lambda *_, answer=answer: answer
        )
        copies.save(run_state(filled(steps, 1), 2, 2))
        with pytest.raises(RuntimeError, match=reason):
            copies.finish()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
@pytest.mark.parametrize("how", ["owner", "parent", "link", "writable parent"])
def test_a_folder_that_another_user_could_replace_is_refused_by_name(opened, tmp_path, how):
    """As /dev/shm/baichuan may be: everybody may make it, and root would follow its links."""
    folder = tmp_path / "local"
    if how == "link":
        (tmp_path / "theirs").mkdir()
        folder.symlink_to(tmp_path / "theirs")
        os.lchown(folder, 65534, 65534)
    elif how == "owner":
        folder.mkdir()
        os.chown(folder, 65534, 65534)
    elif how == "parent":
        os.chown(tmp_path, 65534, 65534)
    else:
        tmp_path.chmod(0o777)
    name = "" if how == "writable parent" else "nobody"
    named = tmp_path if "parent" in how else folder
    with pytest.raises(ConfigError, match=rf"^checkpoint\.local_dir: .*{named} .*{name}"):
        opened((1, 1, 1, 1))
    assert not list(folder.iterdir()) if folder.exists() else True


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


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        (("--mesh.fsdp", "2"), "split by mesh.state=1, mesh.fsdp=2 and"),
        (("--mesh.data", "1", "--mesh.state", "-1"), "split by mesh.state=2, mesh.fsdp=1 and"),
    ],
)
def test_a_state_that_lies_across_processes_is_refused(tmp_path, mesh, said):
    config = write_config(tmp_path)
    options = [
        *mesh,
        "--checkpoint.local_dir",
        str(tmp_path / "disk"),
        "--checkpoint.local_every",
        "4",
    ]
    assert wait_all(start_all(config, tmp_path / "run", *options, processes=2, devices=1)) == [
        78,
        78,
    ]
    log = (tmp_path / "run.0.log").read_text()
    assert "needs every process to hold the whole state" in log
    assert said in log
    # Before the text is packed.
    assert not (tmp_path / "run" / "tokenizer.model").exists()


def test_one_of_the_two_settings_alone_is_refused(tmp_path):
    said = run(write_config(tmp_path), tmp_path / "run", "--checkpoint.local_every", "4", expect=78)
    assert "set both or neither" in said


@pytest.mark.slow
@pytest.mark.parametrize("how", ["planted", "unrecorded"])
def test_a_run_goes_on_with_the_same_numbers_whatever_lies_on_its_disk(tmp_path, how):
    config = write_config(tmp_path)
    straight, disturbed = tmp_path / "straight", tmp_path / "disturbed"
    options = ["--train.num_steps", "30", "--checkpoint.every", "5", "--evaluate.every", "1000"]
    run(config, straight, *options)
    local = ["--checkpoint.local_dir", f"{tmp_path}/disk", "--checkpoint.local_every", "4"]
    process = start(config, disturbed, *options, *local)
    wait_for_step(process, disturbed, 14)
    kill(process)
    (copy,) = (tmp_path / "disk").glob("*/*.state")
    if how == "planted":
        # Newer than all checkpoints, and with a head of today's.
        planted(copy, lambda head: head.update(step=24), swapped)
        copy.rename(copy.with_name("24.state"))
    else:
        (disturbed / RECORD).unlink()
    said = run(config, disturbed, *options, *local)
    assert f"{RECORD} has no digest of it" in said
    assert losses(disturbed) == losses(straight)
    (restored,) = [event for event in lines(disturbed, "events") if event["kind"] == "restored"]
    assert not restored["local"]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_one_host_whose_folder_is_another_user_s_ends_all_with_its_name(tmp_path):
    config = write_config(tmp_path)
    options = ["--checkpoint.local_dir", f"{tmp_path}/disk-$BAICHUAN_JAX_HOST"]
    options += ["--checkpoint.local_every", "4"]
    (tmp_path / "disk-b").mkdir()
    os.chown(tmp_path / "disk-b", 65534, 65534)
    processes = start_all(config, tmp_path / "run", *options, processes=2, devices=1, hosts="ab")
    assert wait_all(processes) == [78, 78]
    for process in (0, 1):
        said = (tmp_path / f"run.{process}.log").read_text()
        assert "disk-b belongs to 'nobody'" in said
        assert "(process 1)" in said
