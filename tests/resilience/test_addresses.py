"""Where the processes of a run listen, and who reaches them there."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from launches import environment, lines, start, wait_all, wait_for_step, write_config

from baichuan_jax import launch
from baichuan_jax.config.schema import Config, ConfigError
from baichuan_jax.resilience.addresses import (
    BIND_VARIABLE,
    address_towards,
    exposure,
    is_free,
    is_number,
    join_port,
    listening,
    own_address,
    refuse_loopback,
    resolve,
)
from baichuan_jax.resilience.host_processes import HostProcesses
from baichuan_jax.resilience.launch_files import Coordinator, LaunchFolder, LaunchPlan


def known_as(monkeypatch, *addresses: str) -> None:
    """Every name means these addresses, as /etc/hosts or a name server says."""
    real = socket.getaddrinfo

    def look_up(host, port, *args, **words):
        names = [host] if is_number(host) else addresses
        return [entry for name in names for entry in real(name, port, *args, **words)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def other_address() -> str:
    """An address of this host that is not loopback."""
    with contextlib.suppress(ConfigError):
        # Nothing is sent: any address of the internet will do.
        return address_towards("8.8.8.8")
    pytest.skip("this host has no network")


def a_free_port(address: str) -> int:
    with socket.create_server((address, 0)) as probe:
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    "host", ["127.0.0.1", pytest.param("the host's other", marks=pytest.mark.slow)]
)
def test_a_run_listens_on_its_coordinators_address_alone_and_a_stranger_is_refused(host, tmp_path):
    address = host if host == "127.0.0.1" else other_address()
    port = a_free_port(address)
    config, folder = write_config(tmp_path), tmp_path / "run"
    processes = [
        start(
            config,
            folder,
            *("--train.num_steps", "100000"),
            JAX_COORDINATOR_ADDRESS=f"{address}:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(number),
        )
        for number in (0, 1)
    ]
    try:
        wait_for_step(processes[0], folder, 3)
        found = [listening(process.pid) for process in processes]
        assert {each for sockets in found for each, _ in sockets} == {address}, found
        # The service, and Gloo in both processes.
        assert (address, port) in found[0]
        assert [len(sockets) for sockets in found] == [2, 1]
        for _, open_port in [*found[0], *found[1]]:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", open_port), 5)
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert wait_all(processes) == [75, 75]


@pytest.mark.parametrize("options", [[], ["--address", "127.0.0.1"]], ids=["alone", "address"])
def test_a_supervisor_of_one_host_has_a_socket_in_a_folder_of_its_user(
    options, tmp_path, monkeypatch
):
    given: list[tuple[str, int]] = []

    class Starting(HostProcesses):
        """Starts nothing, and looks at where the processes would meet."""

        def start(self, placement, argv, coordinator):
            mode = Path(coordinator.removeprefix("unix:")).parent.stat().st_mode
            given.append((coordinator, stat.S_IMODE(mode)))

    monkeypatch.setattr(launch, "HostProcesses", Starting)
    parsed, _ = launch._parse(["--host", "h", "--processes", "2", *options])
    supervisor = launch.Supervisor(parsed, Config(run_dir=str(tmp_path)), [])
    folder = supervisor.launches[1]
    supervisor._take_part(folder, LaunchPlan(("h",), 2))
    (address, mode), second = given
    assert folder.read(Coordinator) == Coordinator(address)
    assert second == (address, mode)
    if options:
        assert address.startswith("127.0.0.1:")
        return
    assert address.startswith("unix:/")
    assert mode == 0o700
    assert not Path(address.removeprefix("unix:")).parent.exists()


@pytest.mark.slow
def test_processes_that_a_supervisor_starts_on_one_host_meet_in_a_folder_of_its_user(tmp_path):
    """A stranger on the same host reaches its loopback, and could call himself process 1."""
    config, folder = write_config(tmp_path), tmp_path / "run"
    argv = ["--processes", "2", "--", "--config", str(config), "--run_dir", str(folder)]
    argv += ["--train.num_steps", "100000"]
    with open(tmp_path / "log", "w") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "baichuan_jax.launch", *argv],
            env=environment(),
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 120
        while not any(line["step"] >= 2 for line in lines(folder)):
            assert supervisor.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first = LaunchFolder(folder / "attempts" / "1")
        coordinator = first.read(Coordinator)
        assert coordinator is not None
        socket_file = Path(coordinator.address.removeprefix("unix:"))
        assert socket_file.is_socket()
        assert stat.S_IMODE(socket_file.parent.stat().st_mode) == 0o700
        reports = first.reports()
        assert sorted(reports) == [0, 1]
        # Gloo's. It goes on where somebody connects and sends what it does not know.
        found = [listening(report.pid) for report in reports.values()]
        assert [[address for address, _ in sockets] for sockets in found] == [["127.0.0.1"]] * 2
    finally:
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(120) == 75, (tmp_path / "log").read_text()
    assert not socket_file.parent.exists()


def test_the_most_reachable_address_of_a_name_comes_first(monkeypatch):
    # As where /etc/hosts gives a name 127.0.1.1 as well.
    known_as(monkeypatch, "127.0.1.1", "::1", "fe80::1", "2001:db8::7", "10.1.2.3", "10.1.2.3")
    wanted = ["10.1.2.3", "2001:db8::7", "fe80::1", "127.0.1.1", "::1"]
    assert [address.split("%")[0] for address in resolve("n1")] == wanted
    assert resolve("[::1]") == ["::1"]


def test_a_name_without_an_address_is_refused_with_the_name():
    for name in ("no-such-host.invalid", "a..b", "x" * 300):
        with pytest.raises(ConfigError, match="no address of '"):
            resolve(name)


def test_process_0_listens_on_an_address_of_its_own_host(monkeypatch):
    with pytest.raises(ConfigError, match=r"^192\.0\.2\.77 is no address of this host: process 0"):
        own_address("192.0.2.77")
    known_as(monkeypatch, "192.0.2.77", "192.0.2.78")
    # A service of Kubernetes, or a router that translates.
    with pytest.raises(
        ConfigError,
        match=r"^n1 is 192\.0\.2\.77, 192\.0\.2\.78, which is no address of this host.*"
        r"set JAX_COORDINATOR_BIND_ADDRESS=ADDRESS:PORT",
    ):
        own_address("n1")
    known_as(monkeypatch, "192.0.2.77", "127.0.0.3")
    assert own_address("n1") == "127.0.0.3"


def test_a_name_that_means_loopback_is_refused_where_other_hosts_must_come(monkeypatch):
    """Debian gives a host's own name the address 127.0.1.1 in /etc/hosts."""
    known_as(monkeypatch, "127.0.1.1")
    with pytest.raises(ConfigError, match=r"^n1 is 127\.0\.1\.1 on this host.*; give --address$"):
        refuse_loopback("n1", "give --address")
    # "Hosts" that are one machine.
    for given in ("127.0.0.1", "localhost", "[::1]"):
        refuse_loopback(given, "")
    with pytest.raises(ConfigError, match=r"with --address$"):
        launch._parse(["--hosts", "2", "--host", "n1"])
    monkeypatch.setenv(BIND_VARIABLE, "[::]:7733")
    refuse_loopback("n1", "")


def test_the_socket_lies_in_tmp_where_the_path_of_tmpdir_is_too_long(tmp_path, monkeypatch, capsys):
    options, _ = launch._parse(["--processes", "2"])
    supervisor = launch.Supervisor(options, Config(run_dir=str(tmp_path)), [])
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with supervisor._socket_folder() as folder:
        assert folder is not None
        assert Path(folder).parent == Path("/tmp").resolve()
        assert Path(folder).stat().st_mode & 0o777 == 0o700
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"the path of TMPDIR={long} is too long for a socket's: process 0's lies in /tmp"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_the_socket_lies_in_no_folder_that_another_user_may_replace(tmp_path, monkeypatch):
    """The folder itself is this user's alone, and the owner of its parent exchanges it."""
    options, _ = launch._parse(["--processes", "2"])
    supervisor = launch.Supervisor(options, Config(run_dir=str(tmp_path)), [])
    theirs = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(theirs))
        theirs.chmod(0o777)
        with pytest.raises(ConfigError, match=rf"^TMPDIR: every user may write {theirs}"):
            supervisor._socket_folder()
        theirs.chmod(0o755)
        os.chown(theirs, 65534, 65534)
        with pytest.raises(ConfigError, match=rf"^TMPDIR: {theirs} belongs to "):
            supervisor._socket_folder()
        assert not list(theirs.iterdir())
    finally:
        theirs.rmdir()


def test_a_port_on_which_somebody_listens_is_taken():
    for address in ("127.0.0.1", "0.0.0.0"):
        with socket.create_server((address, 0)) as server:
            port = server.getsockname()[1]
            assert not is_free("127.0.0.1", port)
        assert is_free("127.0.0.1", port)


def test_the_sockets_on_which_a_process_listens_are_found():
    before = listening()
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server((address, 0), family=family))
            for family, address in (
                (socket.AF_INET, "127.0.0.1"),
                (socket.AF_INET, "0.0.0.0"),
                (socket.AF_INET6, "::1"),
            )
        ]
        # As gRPC listens, which jax uses.
        mapped = stack.enter_context(socket.socket(socket.AF_INET6))
        mapped.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        mapped.bind(("::ffff:127.0.0.1", 0))
        mapped.listen()
        # One that is only connected is none.
        stack.enter_context(socket.create_connection(servers[0].getsockname()))
        ports = [server.getsockname()[1] for server in [*servers, mapped]]
        wanted = zip(["127.0.0.1", "0.0.0.0", "::1", "127.0.0.1"], ports, strict=True)
        assert sorted(set(listening()) - set(before)) == sorted(wanted)
    assert listening() == before


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("0.0.0.0", "all its addresses"),
        ("::", "all its addresses"),
        ("8.8.8.8", "the public address 8.8.8.8"),
        ("2a00:1450::1", "the public address 2a00:1450::1"),
        ("127.0.0.1", None),
        ("::1", None),
        ("10.0.0.5", None),
        ("172.16.0.5", None),
        ("192.168.0.5", None),
        ("100.64.0.5", None),
        ("169.254.0.5", None),
        ("fd00::2", None),
        ("fe80::2", None),
    ],
)
def test_who_reaches_an_address(address, wanted):
    assert exposure(address) == wanted


def test_addresses_and_ports_are_joined_as_jax_reads_them():
    assert join_port("10.0.0.5", 1) == "10.0.0.5:1"
    assert join_port("fd00::2", "1") == "[fd00::2]:1"
