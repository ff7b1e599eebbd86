"""How a process finds the others of its run: settings, environment or Slurm."""

import jax
import pytest

from baichuan_jax.config.schema import ConfigError, DistributedConfig, ResilienceConfig
from baichuan_jax.resilience.processes import initialize_processes

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
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
        (DistributedConfig("h:1", 4, 3), {}, (("h:1", 4, 3), {"local_device_ids": None})),
        (
            DistributedConfig(),
            {
                "JAX_COORDINATOR_ADDRESS": "h:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
                "JAX_LOCAL_DEVICE_IDS": "0,1,2",
            },
            (("h:1", 2, 1), {"local_device_ids": [0, 1, 2]}),
        ),
        (
            DistributedConfig(),
            SLURM,
            ((), {"cluster_detection_method": "slurm", "local_device_ids": None}),
        ),
    ],
    ids=["nothing", "one", "settings", "environment", "slurm"],
)
def test_processes_are_described_by_settings_environment_or_slurm(
    settings, variables, wanted, monkeypatch
):
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **words: calls.append((args, words))
    )
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    initialize_processes(settings, ResilienceConfig())
    timeouts = {
        "initialization_timeout": 360,
        "heartbeat_timeout_seconds": 30,
        "shutdown_timeout_seconds": 30,
    }
    assert calls == ([] if wanted is None else [(wanted[0], wanted[1] | timeouts)])
