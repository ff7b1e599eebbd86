"""How a process finds the others of its run: settings, environment or Slurm."""

import socket

import jax
import pytest

from baichuan_jax.config.schema import ConfigError, DistributedConfig, ResilienceConfig
from baichuan_jax.resilience.processes import initialize_processes

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("settings", "variables", "message"),
    [
        (DistributedConfig(num_processes=2), {}, "need all of"),
        (DistributedConfig(), {"JAX_COORDINATOR_ADDRESS": "localhost:1"}, "need all of"),
        (
            DistributedConfig(),
            {
                "JAX_COORDINATOR_ADDRESS": "localhost:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "2",
            },
            r"process_id=2 must lie in \[0, num_processes=2\)",
        ),
        (DistributedConfig(), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two'"),
        (
            DistributedConfig(num_processes=2, process_id=0),
            {"JAX_COORDINATOR_ADDRESS": "localhost"},
            "coordinator_address='localhost' must be host:port",
        ),
        # A batch script: the job has several processes, and it is none of them.
        *(
            (
                DistributedConfig(),
                {key: value for key, value in SLURM.items() if key != name},
                rf"SLURM_NTASKS=2 processes, and does not set {name}: start the command with srun",
            )
            for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_LOCALID")
        ),
        (DistributedConfig(), SLURM | {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x' must be a whole"),
        (DistributedConfig(), SLURM | {"SLURM_PROCID": "2"}, r"SLURM_PROCID=2 must lie in \[0"),
        (
            DistributedConfig("192.0.2.77:1", 2, 0),
            {},
            r"192\.0\.2\.77 is no address of this host.* set JAX_COORDINATOR_BIND_ADDRESS=",
        ),
        (
            DistributedConfig("localhost:1", 2, 0),
            {"JAX_COORDINATOR_BIND_ADDRESS": "localhost"},
            "JAX_COORDINATOR_BIND_ADDRESS='localhost' must be host:port",
        ),
    ],
)
def test_half_a_description_of_the_processes_is_refused(settings, variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        initialize_processes(settings, ResilienceConfig())


@pytest.mark.parametrize(
    ("settings", "variables", "wanted"),
    [
        (DistributedConfig(), {}, None),
        (DistributedConfig("h:1", 1, 0), {}, None),
        (
            DistributedConfig("h:1", 4, 3),
            {},
            {"num_processes": 4, "process_id": 3, "coordinator_address": "h:1"},
        ),
        # The service's process alone has to know where it listens.
        (
            DistributedConfig("localhost:1", 4, 0),
            {},
            {
                "num_processes": 4,
                "process_id": 0,
                "coordinator_address": "localhost:1",
                "coordinator_bind_address": "127.0.0.1:1",
            },
        ),
        (
            DistributedConfig("h:1", 4, 0),
            {"JAX_COORDINATOR_BIND_ADDRESS": "0.0.0.0:2"},
            {
                "num_processes": 4,
                "process_id": 0,
                "coordinator_address": "h:1",
                "coordinator_bind_address": "0.0.0.0:2",
            },
        ),
        (
            DistributedConfig(),
            {
                "JAX_COORDINATOR_ADDRESS": "h:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
                "JAX_LOCAL_DEVICE_IDS": "0,1,2",
            },
            {
                "num_processes": 2,
                "process_id": 1,
                "coordinator_address": "h:1",
                "local_device_ids": [0, 1, 2],
            },
        ),
        (
            DistributedConfig(),
            SLURM,
            {
                "cluster_detection_method": "slurm",
                "coordinator_address": "127.0.0.1:61447",
                "coordinator_bind_address": "127.0.0.1:61447",
            },
        ),
        (
            DistributedConfig(),
            SLURM | {"SLURM_PROCID": "1", "JAX_COORDINATOR_PORT": "7"},
            {"cluster_detection_method": "slurm", "coordinator_address": "127.0.0.1:7"},
        ),
    ],
    ids=[
        *("nothing", "one", "settings", "process 0", "the user's choice", "environment"),
        *("slurm", "slurm's second"),
    ],
)
def test_processes_are_described_by_settings_environment_or_slurm(
    settings, variables, wanted, monkeypatch
):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **words: calls.append(words))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    initialize_processes(settings, ResilienceConfig())
    always = {
        "coordinator_bind_address": None,
        "local_device_ids": None,
        "initialization_timeout": 360,
        "heartbeat_timeout_seconds": 30,
        "shutdown_timeout_seconds": 30,
    }
    assert calls == ([] if wanted is None else [always | wanted])


def test_a_name_that_is_known_late_is_waited_for(monkeypatch):
    """Kubernetes knows a new pod after some seconds, and the old one's address until then."""
    answers = ["unknown", "192.0.2.77", "127.0.0.1"]
    real = socket.getaddrinfo

    def look_up(host, *args, **words):
        if host == "pod" and answers[0] == "unknown":
            answers.pop(0)
            raise socket.gaierror("unknown")
        return real(answers.pop(0) if host == "pod" and answers[1:] else answers[0], *args, **words)

    calls = []
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **words: calls.append(words))
    initialize_processes(DistributedConfig("pod:1", 2, 0))
    assert calls[0]["coordinator_bind_address"] == "127.0.0.1:1"


def test_a_name_of_process_0_that_other_hosts_cannot_reach_is_refused(monkeypatch):
    """Else they would wait in vain: Debian gives a host's own name 127.0.1.1."""
    real = socket.getaddrinfo
    name = lambda host, *args, **words: real("127.0.1.1" if host == "n1" else host, *args, **words)
    monkeypatch.setattr(socket, "getaddrinfo", name)
    several = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2"}
    for key, value in {**SLURM, **several}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=r"^n1 is 127\.0\.1\.1 on this host.*JAX_COORDINATOR_A"):
        initialize_processes(DistributedConfig())
