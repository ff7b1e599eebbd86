"""Checks before a run: good hardware passes, and each kind of fault names the right process."""

import dataclasses
import platform
import socket
import stat
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from launches import environment, run_module, write_config

from baichuan_jax.config.schema import CheckpointConfig, ConfigError
from baichuan_jax.preflight import (
    compare_hosts,
    exposed,
    judge_pairs,
    memory_is_right,
    pairs_of,
    preflight,
    products_are_right,
    storage_fault,
)
from baichuan_jax.resilience.causes import BadHost
from baichuan_jax.runs.files import LARGEST_PROCESS, draft_of


def test_right_devices_pass_and_a_wrong_product_is_seen():
    device = jax.devices()[3]
    assert products_are_right(device)
    assert memory_is_right(device)
    for wrong in (1.0, -1.0, 0.25, 1e9, jnp.nan, jnp.inf):
        assert not products_are_right(device, lambda a, b, wrong=wrong: (a @ b).at[7, 9].add(wrong))
    # Sums of rows and columns that are right do not hide it.
    block = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    assert not products_are_right(device, lambda a, b: (a @ b).at[7:9, 7:9].add(block))


def test_the_rights_of_a_folder_for_copies_stay(tmp_path, tiny_config):
    """It may be /dev/shm, which all users need: the run closes a folder of its own in it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    checkpoint = CheckpointConfig(local_dir=str(disk), local_every=2)
    config = dataclasses.replace(tiny_config, run_dir=f"{tmp_path}/run", checkpoint=checkpoint)
    for mode in (0o755, 0o1777):
        disk.chmod(mode)
        preflight(config)
        assert stat.S_IMODE(disk.stat().st_mode) == mode
    disk.chmod(0o777)
    with pytest.raises(ConfigError, match="every user may write"):
        preflight(config)
    assert stat.S_IMODE(disk.stat().st_mode) == 0o777


def test_storage_that_cannot_be_written_is_reported(tmp_path):
    folder = tmp_path / "new" / "folder"
    folder.mkdir(parents=True)
    # Of a launch that was killed while it wrote.
    draft_of(folder / ".preflight", LARGEST_PROCESS).write_text("half")
    assert storage_fault(folder) is None
    assert list(folder.iterdir()) == []
    assert storage_fault(tmp_path / "another" / "folder") is None
    (tmp_path / "file").write_text("")
    assert "cannot save in" in (storage_fault(tmp_path / "file") or "")
    assert "cannot save in" in (storage_fault(tmp_path / "file" / "below") or "")


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9])
def test_pairs_are_disjoint_and_everyone_has_two_partners_where_it_can(count):
    partners: dict[int, set[int]] = {process: set() for process in range(count)}
    for pairs in pairs_of(count):
        members = [process for pair in pairs for process in pair]
        assert len(members) == len(set(members))
        for a, b in pairs:
            partners[a].add(b)
            partners[b].add(a)
    assert all(len(found) >= 1 for found in partners.values())
    # Of an odd number two have one partner only; of two, both.
    wanted = 0 if count == 2 else count - 2 if count % 2 else count
    assert sum(len(found) == 2 for found in partners.values()) >= wanted


def results_of(pairs, count, works):
    """What every process reports of a round."""
    return [
        next(((pair, works(pair)) for pair in pairs if process in pair), None)
        for process in range(count)
    ]


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_a_process_that_fails_with_every_partner_is_named(count):
    for bad in range(count):
        works = lambda pair, bad=bad: bad not in pair
        rounds = [results_of(pairs, count, works) for pairs in pairs_of(count)]
        with pytest.raises(BadHost) as caught:
            judge_pairs(rounds)
        ends = count % 2 and bad in (0, count - 1)  # of an odd number two have one partner only
        assert caught.value.processes in ({(bad,)} if not ends else {(bad,), ()})


def test_one_bad_link_between_two_good_hosts_is_a_warning_and_two_hosts_give_no_name():
    rounds = [results_of(pairs, 4, lambda pair: pair != (1, 2)) for pairs in pairs_of(4)]
    (warning,) = judge_pairs(rounds)
    assert warning.startswith("collectives of processes 1 and 2 fail, and those of each of them")
    with pytest.raises(BadHost) as caught:
        judge_pairs([[((0, 1), False), ((0, 1), False)]])
    assert caught.value.processes == ()


def host(name: str, time: float = 0.0, **versions: str) -> dict:
    versions = {"jax": "0.10.1", **versions}
    return {"host": name, "time": time, "versions": versions, "devices": [8, "A800"]}


def test_what_differs_between_hosts_is_refused_or_a_warning():
    assert compare_hosts([host("a"), host("b", 0.5)], "a:1234") == []
    (warning,) = compare_hosts([host("a"), host("b", 9.5)], "a:1234")
    assert "differ by up to 9.5 s" in warning
    with pytest.raises(
        ConfigError,
        match=r"^the hosts of this run differ in versions: numpy is '2' for process 0 and '1' for "
        r"process 1 on b; install the same everywhere$",
    ):
        compare_hosts([host("a", numpy="2"), host("b", numpy="1")], "a:1234")
    for own in ("127.0.0.1:1234", "[::1]:1234", "unix:/tmp/a:1/0"):
        with pytest.raises(ConfigError, match="is each host's own"):
            compare_hosts([host("a"), host("b")], own)
    assert compare_hosts([host("a"), host("a")], "127.0.0.1:1234") == []
    with pytest.raises(ConfigError, match=r"jax 0\.10\.2: it miscompiles"):
        compare_hosts([host("a") | {"versions": {"jax": "0.10.2"}}], None)


def test_a_port_that_strangers_may_reach_is_a_warning_with_host_port_and_remedy():
    inside = [("a", [("10.0.0.5", 7733), ("127.0.0.1", 40000)]), ("b", [("10.0.0.6", 40001)])]
    assert exposed(inside) == []
    (warning,) = exposed([*inside, ("c", [("::", 7733)])])
    assert warning.startswith("process 2 on c listens on port 7733 of all its addresses: whoever")
    assert warning.endswith("(docs/operations.md, Trusted network)")
    # Of thousands of ports there is one line.
    (warning,) = exposed([(f"n{n}", [("8.8.8.8", 7733)]) for n in range(3)])
    assert warning.startswith(
        "process 0 on n0 listens on port 7733 of the public address 8.8.8.8 (and 2 more ports"
    )


@pytest.mark.slow
def test_processes_that_listen_on_all_addresses_are_told_so(tmp_path):
    """The user may choose where process 0 listens, and learns who reaches it there."""
    with socket.create_server(("", 0)) as probe:
        port = probe.getsockname()[1]
    config = write_config(tmp_path)
    argv = ["--config", str(config), "--run_dir", str(tmp_path / "run")]
    with open(tmp_path / "log", "w") as log:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "baichuan_jax.preflight", *argv],
                env=environment(
                    JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
                    JAX_COORDINATOR_BIND_ADDRESS=f"[::]:{port}",
                    JAX_NUM_PROCESSES="2",
                    JAX_PROCESS_ID=str(number),
                ),
                stdout=log,
            )
            for number in (0, 1)
        ]
    assert [process.wait(120) for process in processes] == [0, 0]
    shown = " ".join((tmp_path / "log").read_text().split())
    assert f"process 0 on {platform.node()} listens on port {port} of all its addresses" in shown
    assert "all passed, 1 warning(s)" in shown


def test_the_command_says_that_all_passed(tmp_path):
    config = write_config(tmp_path)
    argv = ["--config", str(config), "--run_dir", str(tmp_path / "run")]
    done = run_module("baichuan_jax.preflight", *argv, devices=2)
    assert done.returncode == 0, done.stderr
    assert "1 process(es), 2 device(s): all passed" in done.stdout


@pytest.mark.parametrize(
    "what", ["programs", *(pytest.param(each, marks=pytest.mark.slow) for each in ("run", "log"))]
)
def test_what_one_process_refuses_ends_all_with_its_reason(tmp_path, what):
    """Else the others wait for minutes, and their code says that a restart may help."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config, run_dir = write_config(tmp_path), tmp_path / "run"
    own: dict[str, Any] = {}
    folder = str(run_dir)
    if what == "programs":
        (tmp_path / "compiled").mkdir()
        (tmp_path / "compiled").chmod(0o777)
        own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
        reason = f"JAX_COMPILATION_CACHE_DIR: every user may write {tmp_path}/compiled"
    elif what == "run":
        (tmp_path / "file").write_text("")
        folder, reason = str(tmp_path / "file" / "run"), "file/run' cannot be written"
    else:
        # Process 0 alone writes it.
        (run_dir / "metrics.jsonl").mkdir(parents=True)
        reason = "metrics.jsonl is a link, a folder, a pipe or a device"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "baichuan_jax.train", "--config", str(config), "--run_dir", run],
            env=environment(
                JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(number),
                **more,
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, run, more in ((0, str(run_dir), {}), (1, folder, own))
    ]
    for process in processes:
        _, said = process.communicate(timeout=120)
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert reason in line
        assert process.returncode == 78, said
