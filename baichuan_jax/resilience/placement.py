"""Where a training process belongs: its host, its number, its launch, its supervisor.

A supervisor (launch.py) writes this into the environment of the processes that it starts, and a
process reads it back. A process without a supervisor has the defaults, and asks jax for its number
once the others are there.
"""

import dataclasses
import os
import socket
from pathlib import Path

from baichuan_jax.config.parsing import environment_number
from baichuan_jax.resilience.launch_files import LaunchFolder

# "ATTEMPT" is the folder of the launch; see launch_files.py.
FOLDER_VARIABLE = "BAICHUAN_JAX_ATTEMPT"
HOST_VARIABLE = "BAICHUAN_JAX_HOST"
SUPERVISOR_VARIABLE = "BAICHUAN_JAX_SUPERVISOR"
FULL_VARIABLE = "BAICHUAN_JAX_FULL_PROCESSES"


@dataclasses.dataclass(frozen=True)
class Placement:
    """Process `process` of `processes`, on `host`."""

    host: str
    process: int = 0
    # One until jax has connected them all.
    processes: int = 1
    # The launch's folder and the supervisor's process id; None without a supervisor.
    folder: LaunchFolder | None = None
    supervisor: int | None = None
    # Processes of a launch on all wanted hosts. Where fewer are left, each accumulates gradients of
    # more micro-batches, so that no device needs more memory (Config.on_part).
    full_processes: int | None = None

    @classmethod
    def from_environment(cls) -> "Placement":
        """This process's placement, as far as it is known before jax starts."""
        # JAX_PROCESS_ID may be set without a supervisor too, as Kubernetes does.
        variables = os.environ
        folder = variables.get(FOLDER_VARIABLE)
        return cls(
            host=variables.get(HOST_VARIABLE) or socket.gethostname(),
            process=environment_number("JAX_PROCESS_ID") or 0,
            folder=None if folder is None else LaunchFolder(Path(folder)),
            supervisor=environment_number(SUPERVISOR_VARIABLE),
            full_processes=environment_number(FULL_VARIABLE),
        )

    def to_environment(self, coordinator: str) -> dict[str, str]:
        """The variables of a process that a supervisor starts; `coordinator` is host:port."""
        assert self.folder is not None
        return {
            FOLDER_VARIABLE: str(self.folder.path),
            HOST_VARIABLE: self.host,
            SUPERVISOR_VARIABLE: str(self.supervisor),
            FULL_VARIABLE: str(self.full_processes),
            "JAX_COORDINATOR_ADDRESS": coordinator,
            "JAX_NUM_PROCESSES": str(self.processes),
            "JAX_PROCESS_ID": str(self.process),
        }

    @property
    def alone(self) -> bool:
        """Whether nobody else waits for this process, and nobody would start it again."""
        return self.processes == 1 and self.supervisor is None
