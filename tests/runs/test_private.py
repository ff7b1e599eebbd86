"""What other users of a host planted is refused, and neither followed, emptied nor removed."""

import argparse
import os
import stat

import pytest

from baichuan_jax.config.schema import Config, ConfigError
from baichuan_jax.preflight import storage_fault
from baichuan_jax.resilience.causes import Cause, cause_of, describe
from baichuan_jax.resilience.ownership import owned
from baichuan_jax.runs.files import (
    Appender,
    create_once,
    draft_of,
    new_folder,
    read_once,
    require_writable,
    writable,
    write_atomically,
)
from baichuan_jax.runs.metrics import Writer
from baichuan_jax.runs.private import (
    open_private,
    refuse_planted_links,
    refuse_programs_of_others,
    trusted_folder,
    why_not_run,
)

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


@pytest.fixture
def victim(tmp_path):
    """A file elsewhere that must keep its content."""
    file = tmp_path / "victim"
    file.write_bytes(b"precious")
    yield file
    assert file.read_bytes() == b"precious"


@pytest.fixture
def open_to_all(tmp_path):
    """A folder such as /tmp."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def parquet(path):
    pa = pytest.importorskip("pyarrow")
    from baichuan_jax.data.corpus.parts import ParquetFile

    with ParquetFile(path) as file:
        file.write(pa.table({"text": ["a"]}))


def folder(path):
    with new_folder(path) as inside:
        inside.mkdir()
        (inside / "file").write_bytes(b"x")


WRITES = {
    "write_atomically": (lambda path: write_atomically(path, b"x"), lambda path: path),
    "parquet": (parquet, lambda path: path),
    "create_once": (lambda path: create_once(path, b"x"), lambda path: path.with_name(".made")),
    "new_folder": (folder, lambda path: path),
    "preflight": (
        lambda path: storage_fault(path.parent),
        lambda path: path.with_name(".preflight"),
    ),
    "probe": (
        lambda path: require_writable(path.parent, "run_dir"),
        lambda path: path.with_name(".probe"),
    ),
}


@pytest.mark.parametrize("to_folder", [False, True])
@pytest.mark.parametrize("what", WRITES)
def test_a_link_in_place_of_a_draft_is_not_written_through(
    victim, open_to_all, tmp_path, what, to_folder
):
    """Names of drafts can be guessed: they are made of the host and the process number."""
    write, named = WRITES[what]
    target = tmp_path / "theirs"
    target.mkdir()
    draft_of(named(open_to_all / "made")).symlink_to(target if to_folder else victim)
    assert write(open_to_all / "made") in (None, True)
    assert list(target.iterdir()) == []


def test_a_shard_is_not_written_through_a_link(victim, open_to_all):
    from array_record.python.array_record_module import ArrayRecordWriter

    from baichuan_jax.runs.files import new_draft

    draft = draft_of(open_to_all / "shard")
    draft.symlink_to(victim)
    new_draft(draft).close()
    writer = ArrayRecordWriter(str(draft), "group_size:1")
    writer.write(b"row")
    writer.close()
    assert not draft.is_symlink()


def test_a_record_is_not_appended_through_a_link(victim, tmp_path):
    (tmp_path / "log").symlink_to(victim)
    error = Appender(tmp_path / "log").add(b"line\n")
    assert cause_of(error) == Cause.CONFIGURATION
    assert describe(error).startswith(f"{tmp_path}/log: it is a link, a pipe or a device")
    for name in ("metrics.jsonl", "events.jsonl"):
        run = tmp_path / f"run-{name}"
        run.mkdir()
        (run / name).symlink_to(victim)
        with pytest.raises(ConfigError, match=rf"{name} is a link, a folder, a pipe or a device"):
            Writer(run, Config(), print)


def test_a_pipe_in_place_of_records_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "log")
    assert Appender(tmp_path / "log").add(b"line\n").strerror.startswith("it is a link, a pipe")


def test_a_lock_that_is_a_link_is_not_taken(victim, tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="it is a link"), owned(tmp_path / "lock", "it", "choose"):
        pass
    assert not (tmp_path / "elsewhere").exists()


@as_root
def test_an_output_is_not_put_where_a_planted_link_leads(victim, open_to_all, tmp_path):
    link, theirs = open_to_all / "page.html", open_to_all / "folder"
    link.symlink_to(victim)
    theirs.symlink_to(tmp_path)
    for text in (link, theirs / "page.html", theirs / "new" / "page.html"):
        writable(str(text))
    for planted in (link, theirs):
        os.lchown(planted, NOBODY, NOBODY)
    for text in (link, theirs / "page.html", theirs / "new" / "page.html"):
        with pytest.raises(argparse.ArgumentTypeError, match="is a link that 'nobody' made"):
            writable(str(text))
    with pytest.raises(ConfigError, match=r"run_dir: .*/tmp/folder is a link that 'nobody' made"):
        require_writable(theirs / "run", "run_dir")
    # A team's folder: its members' links are followed, as before.
    open_to_all.chmod(0o2775)
    refuse_planted_links(theirs / "page.html", "the output")


@as_root
def test_another_user_s_link_to_a_device_or_pipe_is_replaced(tmp_path):
    """A rename puts a file there; written through, the content would go where its owner likes."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    for name in ("pipe", "device"):
        os.lchown(tmp_path / name, NOBODY, NOBODY)
        write_atomically(tmp_path / name, b"x")
        assert read_once(tmp_path / name) == b"x"
        assert not (tmp_path / name).is_symlink()


def test_a_folder_of_one_s_own_is_made_and_kept_for_this_user_alone(tmp_path, open_to_all):
    before = os.umask(0)
    try:
        os.close(open_private(open_to_all / "mine" / "copies", "checkpoint.local_dir"))
    finally:
        os.umask(before)
    for made in (open_to_all / "mine", open_to_all / "mine" / "copies"):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    # A link of one's own, or of root's, is followed on the way and not at the end.
    (tmp_path / "disk").symlink_to("tmp/mine")
    os.close(open_private(tmp_path / "disk" / "more", "checkpoint.local_dir"))
    assert trusted_folder(tmp_path / "disk" / ".." / "mine", "it") == open_to_all / "mine"
    with pytest.raises(ConfigError, match=r"/disk is a link or a file of .*, and must be a folder"):
        open_private(tmp_path / "disk", "checkpoint.local_dir")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        trusted_folder(tmp_path / "loop" / "x", "it")


@as_root
def test_compiled_programs_of_other_users_are_not_run(tmp_path, monkeypatch):
    programs = tmp_path / "compiled"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(programs))
    assert why_not_run(programs) is None
    programs.mkdir(mode=0o770)
    refuse_programs_of_others()
    programs.chmod(0o1777)
    with pytest.raises(ConfigError, match="JAX_COMPILATION_CACHE_DIR: every user may write"):
        refuse_programs_of_others()
    programs.chmod(0o755)
    os.chown(programs, NOBODY, NOBODY)
    with pytest.raises(
        ConfigError, match="/compiled belongs to 'nobody', and compiled programs are"
    ):
        refuse_programs_of_others()
    # Whoever may replace the folder chooses the programs, too.
    below = programs / "mine" / "compiled"
    below.mkdir(parents=True)
    assert why_not_run(below) == f"{programs} belongs to 'nobody'"
    os.chown(programs, 0, 0)
    assert why_not_run(below) is None
    programs.chmod(0o777)
    for folder in (below, programs / "none"):
        assert why_not_run(folder) == f"every user may write {programs}"
    programs.chmod(0o1777)
    assert why_not_run(below) is None
    (programs / "link").symlink_to("mine")
    os.lchown(programs / "link", NOBODY, NOBODY)
    assert why_not_run(programs / "link" / "compiled") == f"{programs}/link belongs to 'nobody'"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/compiled")
    refuse_programs_of_others()
