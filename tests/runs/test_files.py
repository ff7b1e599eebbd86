"""Files of which there is one: who is first, with hard links and without, whatever is killed."""

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launches import environment

from baichuan_jax.checkpoint.weights import choose_checkpoint
from baichuan_jax.config.schema import ConfigError
from baichuan_jax.resilience.ownership import owned
from baichuan_jax.runs import files
from baichuan_jax.runs.files import (
    create_once,
    draft_of,
    new_folder,
    read_once,
    refuse_inputs,
    remove_leftovers,
    remove_once,
    require_writable,
    writable,
    writable_file,
    write_atomically,
)


def lacking(number: int):
    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture(params=["links", "no links"])
def links(request, monkeypatch):
    if request.param == "no links":
        monkeypatch.setattr(os, "link", lacking(errno.EPERM))


def test_the_first_writes_and_the_others_read(links, tmp_path):
    path = tmp_path / "sub" / "plan.json"
    assert read_once(path) is None
    assert create_once(path, b"first")
    assert not create_once(path, b"second")
    assert read_once(path) == b"first"
    assert len(list(path.parent.iterdir())) == 1
    # What replaces it counts.
    write_atomically(path, b"third")
    assert read_once(path) == b"third"
    remove_once(path)
    assert list(path.parent.iterdir()) == []


def test_a_host_with_links_sees_what_one_without_wrote(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lacking(errno.ENOTSUP))
        assert create_once(path, b"first")
    assert not create_once(path, b"second")


def test_a_link_whose_reply_was_lost_is_ones_own(tmp_path, monkeypatch):
    real = os.link

    def asked_twice(source, target):
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", asked_twice)
    assert create_once(tmp_path / "plan.json", b"mine")


def test_a_file_system_that_lacks_both_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lacking(errno.ENOSYS))
    monkeypatch.setattr(os, "rename", lacking(errno.ENOSYS))
    with pytest.raises(ConfigError, match=rf"^{tmp_path} lies on a file system without hard links"):
        create_once(tmp_path / "plan.json", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_written_and_not_replaced(tmp_path):
    """As /dev/stdout, which root could replace for the whole machine."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, link):
        assert writable_file(str(path)) == str(path)
        write_atomically(path, b"result\n")
        assert os.read(reader, 100) == b"result\n"
    os.close(reader)
    assert pipe.is_fifo()
    assert link.is_symlink()


def test_where_stdout_goes_the_result_stands_between_what_is_printed(tmp_path):
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    code = (
        "import sys; from pathlib import Path; from baichuan_jax.runs.files import *\n"
        "print('before'); write_atomically(Path(sys.argv[1]), b'result\\n'); print('after')"
    )
    with open(tmp_path / "log", "wb") as log:
        argv = [sys.executable, "-c", code, str(tmp_path / "stdout")]
        subprocess.run(argv, stdout=log, env=environment(), check=True, timeout=60)
    assert (tmp_path / "log").read_text() == "before\nresult\nafter\n"
    assert (tmp_path / "stdout").is_symlink()


def test_of_a_link_that_an_option_names_the_target_is_written(tmp_path):
    target, link = tmp_path / "results" / "today.json", tmp_path / "latest.json"
    link.symlink_to(target)
    for content in (b"first", b"second"):
        write_atomically(Path(writable_file(str(link))), content)
        assert target.read_bytes() == content
        assert link.is_symlink()


def test_an_output_that_is_an_input_by_any_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, folder = tmp_path / "text.jsonl", tmp_path / "rows"
    (folder / "inner").mkdir(parents=True)
    for file in (text, folder / "inner" / "shard", tmp_path / "other"):
        file.write_text("{}")
    (tmp_path / "link").symlink_to(text)
    (tmp_path / "hard").hardlink_to(text)
    (tmp_path / "shard").hardlink_to(folder / "inner" / "shard")
    (tmp_path / "by").symlink_to(folder)
    inputs = {"--model": ["missing"], "--input": [tmp_path / "other.txt", text]}
    for same in ("text.jsonl", "./rows/../text.jsonl", text, "link", "hard"):
        with pytest.raises(ConfigError, match=r"^--json .* would replace .*/text\.jsonl, which"):
            refuse_inputs({"--json": [same]}, inputs)
    # One that is not there yet.
    with pytest.raises(ConfigError, match=r"would replace missing, which --model names; name ano"):
        refuse_inputs({"--json": [tmp_path / "missing"]}, inputs)
    for inside in ("rows/inner/shard", "rows/new.json", "by/inner/new", "shard"):
        with pytest.raises(ConfigError, match="would be written into rows, which --input names"):
            refuse_inputs({"--json": [inside]}, {"--input": ["rows"]})
    with pytest.raises(ConfigError, match=r"--hlo ./new and --json new are one file"):
        refuse_inputs({"--json": ["new"], "--hlo": ["./new"]}, {})
    # Any other file is the user's to name, and a device loses nothing.
    for other in ("other", "rows.json", "new", None, os.devnull):
        refuse_inputs({"--json": [other], "--hlo": [os.devnull]}, {**inputs, "--data": ["rows"]})


def test_a_name_that_has_no_room_for_its_draft_is_refused_before_the_work(tmp_path):
    for length in (1, 200, 225):
        write_atomically(Path(writable_file(str(tmp_path / ("a" * length)))), b"x")
    for length in (240, 255, 256, 1000):
        with pytest.raises(argparse.ArgumentTypeError, match="File name too long"):
            writable_file(str(tmp_path / ("a" * length)))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_other_errors_are_not_taken_for_a_missing_feature(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "link", lacking(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        create_once(tmp_path / "plan.json", b"x")


def test_processes_with_one_number_on_two_hosts_share_no_draft(tmp_path, monkeypatch):
    """In containers every process may be number 1."""
    drafts = []
    monkeypatch.setattr(files, "publish", lambda draft, path: drafts.append(draft.name))
    monkeypatch.setattr(os, "getpid", lambda: 1)
    for host in ("a", "b"):
        name = os.uname_result(("Linux", host, "", "", ""))
        monkeypatch.setattr(os, "uname", lambda name=name: name)
        write_atomically(tmp_path / "file", b"x")
    assert len(set(drafts)) == 2


@pytest.mark.parametrize("is_zombie", [False, True])
def test_drafts_of_dead_processes_are_removed_and_no_others(tmp_path, is_zombie):
    """A zombie is dead: where a container's first process asks for no child, it stays one."""
    dead = subprocess.Popen(["true"])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    if not is_zombie:
        dead.wait()
    mine = draft_of(tmp_path / "file")
    file, folder = (
        mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{dead.pid}.").replace("file", name))
        for name in ("file", "folder\n[*]")
    )
    others = mine.with_name(f"file.{'0' * 8}.{dead.pid}.tmp")
    kept = {mine, others, tmp_path / "file", tmp_path / f"file.{dead.pid}.tmp"}
    for path in kept | {file}:
        path.write_bytes(b"x")
    (folder / "inside").mkdir(parents=True)
    remove_leftovers(tmp_path, "file")
    assert set(tmp_path.iterdir()) == kept | {folder}
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == kept
    remove_leftovers(tmp_path / "nowhere")
    dead.wait()


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path):
    def make_half():
        with new_folder(tmp_path / "a") as folder:
            folder.mkdir()
            (folder / "first").write_bytes(b"x")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        make_half()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with new_folder(tmp_path / "a") as folder:
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "first").write_bytes(b"x")
        folder.with_name("beside").mkdir()
        assert list((tmp_path / "a").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "sub" / "first").read_bytes() == b"x"


# Rounds of processes that race for a file; some are killed at a random moment. A winner that lives
# says so, a reader looks all the time.
RACE = """
import errno, json, os, random, signal, sys, time
from pathlib import Path
from baichuan_jax.runs.files import create_once, read_once

folder, links, rounds = Path(sys.argv[1]), sys.argv[2] == "links", int(sys.argv[3])
if not links:
    def link(*_, **__):
        raise OSError(errno.EPERM, "no links")
    os.link = link
rng = random.Random(0)

def child(path, number, begin):
    while time.monotonic() < begin:
        pass
    won = create_once(path, json.dumps([number] * 500).encode())
    os._exit(10 if won else 11)

def whole(path):
    content = read_once(path)
    if content is not None:
        values = json.loads(content)
        assert len(values) == 500 and len(set(values)) == 1, values
        return values[0]

for turn in range(rounds):
    path, begin = folder / f"{turn}.json", time.monotonic() + 0.003
    pids = {}
    for number in range(6):
        if (pid := os.fork()) == 0:
            child(path, number, begin)
        pids[pid] = number
    killed = [pid for pid in pids if rng.random() < 0.4]
    for pid in killed:
        while time.monotonic() < begin + rng.random() * 0.002:
            whole(path)
        os.kill(pid, signal.SIGKILL)
    winners, seen = [], set()
    for pid, number in pids.items():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (10, 11, -9), code
        winners += [number] * (code == 10)
        seen.add(whole(path))
    final = whole(path)
    assert len(winners) <= 1, winners
    assert seen <= {None, final}
    assert not winners or winners == [final]
    # Somebody lived to the end, so there is a file.
    assert final is not None or len(killed) == 6
    # A restart finds it taken, or takes it.
    assert create_once(path, json.dumps([9] * 500).encode()) == (final is None)
print("done")
"""


@pytest.mark.parametrize("how", ["links", "none"])
def test_of_racing_processes_one_is_first_whatever_is_killed(tmp_path, how):
    done = subprocess.run(
        [sys.executable, "-c", RACE, str(tmp_path), how, "60"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "done\n", done.stderr


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "verdict.json")
    with pytest.raises(ConfigError, match=r"verdict\.json is a folder, a pipe or a device"):
        read_once(tmp_path / "verdict.json")


@pytest.mark.parametrize("name", [b"a\nb", b"\xff", b"[x]", b"a*", b"a?", b"{a}", b"a\\\\b"])
def test_a_folder_that_libraries_cannot_write_in_is_refused_before_anything_is_made(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    for refuse in (
        lambda: require_writable(path / "run", "run_dir"),
        lambda: owned(path / "lock", "the output", "choose another").__enter__(),
        lambda: choose_checkpoint(path / "checkpoints"),
    ):
        with pytest.raises(ConfigError, match=r"is no UTF-8|do not take in a name"):
            refuse()
    with pytest.raises(argparse.ArgumentTypeError):
        writable(str(path / "out"))
    assert not path.exists()


def test_a_folder_of_any_other_name_is_taken(tmp_path):
    path = tmp_path / "-春 '\"$H#%s~;&" / "run"
    require_writable(path, "run_dir")
    with owned(path / "lock", "the output", "choose another"):
        assert path.exists()


def test_the_record_of_an_owner_holds_arguments_of_any_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", os.fsdecode(b"\xff")])
    with owned(tmp_path / "lock", "the output", "choose another"):
        assert list(tmp_path.glob("lock-*"))


def test_a_new_folder_removes_no_folder_that_stood_there(tmp_path):
    there = draft_of(tmp_path / "a")
    there.mkdir()
    (there / "kept").touch()
    with pytest.raises(FileExistsError), new_folder(tmp_path / "a"):
        pass
    assert (there / "kept").exists()
