"""A real Slurm of virtual nodes on this machine, which runs launch/slurm/train.sbatch.

Training runs on two nodes, the others are spares, and nodes die. `make test-slurm`, as root, with
Debian's slurm-wlm and munge. It runs in namespaces of its own (processes, mounts, network): so the
nodes have addresses and names, nothing of this machine is changed, and all ends with the test.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launches import REPOSITORY, losses

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import chaos

pytestmark = pytest.mark.skipif(
    os.getpid() != 1, reason="make test-slurm runs it in namespaces of its own"
)

NODES = 4
NETWORK = "10.77.0."
DOWN_SECONDS = 10  # that a node's slurmd may be silent; a cluster gives it minutes
CONFIGURATION = """
ClusterName=virtual
SlurmctldHost=localhost
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdTimeout={down}
KillWait=5
ReturnToService=2
NodeName=n[1-{nodes}] NodeHostname=localhost NodeAddr={network}[1-{nodes}] \
Port=[17001-{port}] CPUs={cpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def command(*argv: str) -> str:
    """The output of a command. Fails where it does."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


class Slurm:
    """A controller and its nodes n1, n2, ..., each with an address on the loopback interface."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = [(f"{NETWORK}{number}", f"n{number}") for number in range(1, NODES + 1)]
        command("ip", "link", "set", "lo", "up")
        for address, _ in names:
            command("ip", "address", "add", f"{address}/32", "dev", "lo")
        hosts = folder / "hosts"
        lines = [
            f"{address} {name}" for address, name in [*names, (f"{NETWORK}1", socket.gethostname())]
        ]
        hosts.write_text(
            Path("/etc/hosts").read_text(encoding="utf-8") + "\n".join(lines) + "\n",
            encoding="utf-8",
        )
        command("mount", "--bind", str(hosts), "/etc/hosts")
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = [
            f"--{name}={folder}/munge.{name.split('-')[0]}"
            for name in ("socket", "pid-file", "log-file", "seed-file")
        ]
        command("munged", "--force", f"--key-file={key}", *files)
        settings = folder / "slurm.conf"
        settings.write_text(
            CONFIGURATION.format(
                folder=folder,
                nodes=NODES,
                network=NETWORK,
                port=17000 + NODES,
                cpus=os.cpu_count(),
                down=DOWN_SECONDS,
            ),
            encoding="utf-8",
        )
        os.environ["SLURM_CONF"] = str(settings)
        (folder / "state").mkdir()
        command("slurmctld")
        for _, name in names:
            self.start(name)

    def start(self, node: str) -> None:
        """Start a node's slurmd, and wait until the controller counts on it."""
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        command("slurmd", "-N", node)
        self.wait(
            lambda: self.state_of(node) in ("idle", "mixed", "allocated"), f"{node} is not idle"
        )

    def state_of(self, node: str) -> str:
        return command("sinfo", "--noheader", "--nodes", node, "--format", "%T")

    def kill(self, node: str) -> None:
        """Lose a node: its slurmd and all of a job on it, srun and the batch script included."""
        daemon = int((self.folder / f"slurmd-{node}.pid").read_text())
        for process in [daemon, *_processes_of(node)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def wait(self, found, message: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not found():
            assert time.monotonic() < deadline, (
                f"{message}: {command('sinfo', '-N', '-l')}; logs in {self.folder}"
            )
            time.sleep(0.2)


def _processes_of(node: str) -> list[int]:
    """The slurmstepds that started a job's processes on a node, then these processes."""
    steps, children = set(), set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURMD_NODENAME={node}".encode() in (path / "environ").read_bytes().split(b"\0"):
                children.add(int(path.name))
                parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
                    steps.add(parent)
    # A lost node reports nothing, and a slurmstepd that outlives the batch script would: the job
    # would end.
    return [*steps, *(children - steps)]


class Job(chaos.Supervised):
    """A run that Slurm starts with the project's own script."""

    def __init__(
        self, slurm: Slurm, run_dir: Path, argv: list[str], *, hosts: int, nodes: int
    ) -> None:
        super().__init__(run_dir)
        self._ended = (0.0, False)
        self.log = run_dir.parent / f"{run_dir.name}-slurm.log"
        script = REPOSITORY / "launch" / "slurm" / "train.sbatch"
        os.environ.update(
            self.variables, PYTHON=sys.executable, HOSTS=str(hosts), TF_CPP_MIN_LOG_LEVEL="3"
        )
        self.id = command(
            "sbatch",
            "--parsable",
            f"--nodes={nodes}",
            f"--output={self.log}",
            "--time=30",
            f"--chdir={REPOSITORY}",
            str(script),
            *argv,
            "--run_dir",
            str(run_dir),
        )

    @property
    def state(self) -> str:
        return self.show("JobState")

    def show(self, field: str) -> str:
        """A field of what Slurm knows of the job."""
        words = command("scontrol", "show", "job", self.id).split()
        return next(word.split("=", 1)[1] for word in words if word.startswith(f"{field}="))

    def ended(self) -> bool:
        if time.monotonic() - self._ended[0] > 2:  # it costs a process to ask
            alive = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD")
            self._ended = (time.monotonic(), self.state not in alive)
        return self._ended[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    for program in ("slurmctld", "slurmd", "munged", "ip"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: apt-get install slurm-wlm munge iproute2")
    folder = tmp_path_factory.mktemp("slurm")
    for path in (folder, *folder.parents[:3]):  # munge wants its socket's folder open to all
        path.chmod(0o755)
    return Slurm(folder)


def test_a_job_goes_on_after_a_hang_and_lost_nodes_its_first_one_too_and_is_requeued_saved(
    slurm, tmp_path
):
    job = Job(slurm, tmp_path / "run", chaos.argv_of(tmp_path), hosts=2, nodes=4)

    def goes_on(began: float, launch: int, what: str) -> list[str]:
        """The hosts of the next launch, which steps within a minute, in the same allocation."""
        _, again = job.steps(12, after=launch)
        print(
            f"{what}: running on {job.file('plan')['hosts']} after {again - began:.1f} s",
            flush=True,
        )
        assert again - began < 60
        assert (job.state, job.show("Restarts"), job.launch) == ("RUNNING", "0", launch + 1)
        return job.file("plan")["hosts"]

    job.steps(12)
    # The batch script and srun are lost with this node.
    first, hosts = job.show("BatchHost"), job.file("plan")["hosts"]

    process = next(number for number, host in enumerate(hosts) if host != first)
    began, launch = job.inject("hang", process), job.launch
    after = goes_on(began, launch, f"hang of {hosts[process]}")
    verdict = job.file("verdict", launch)["verdict"]
    assert (verdict["host"], verdict["rule"]) == (hosts[process], "not in the collective")
    assert hosts[process] not in after
    assert first in after  # it was, or it is the first of the spares

    lost = next(host for host in after if host != first)
    began, launch = time.time(), job.launch
    slurm.kill(lost)
    after = goes_on(began, launch, f"loss of {lost}")
    assert job.file("verdict", launch)["verdict"]["host"] == lost
    assert first in after
    assert lost not in after

    began, launch = time.time(), job.launch
    slurm.kill(first)
    after = goes_on(began, launch, f"loss of {first}, the batch host")
    assert job.file("verdict", launch)["verdict"]["host"] == first
    assert not {first, lost} & set(after)
    slurm.wait(lambda: slurm.state_of(first).startswith("down"), f"{first} is not down", 120)

    # The time limit's signal: saved, and back in the queue, by those that are left.
    launch = job.launch
    command("scancel", "--signal=TERM", job.id)
    slurm.wait(lambda: job.show("Restarts") == "1", "the job was not requeued", 60)
    assert job.file("verdict", launch)["verdict"]["cause"] == "preempted"
    slurm.wait(lambda: job.state == "PENDING", "the job does not wait", 60)
    for node in (lost, first):  # it waits for as many nodes as it began with
        slurm.start(node)
    command("scontrol", "update", f"job={job.id}", "StartTime=now")
    # Four launches reach step 42 at least, from checkpoints 10 steps apart; this one passes 60.
    job.steps(24, after=launch)
    command("scancel", job.id)
    assert len(losses(job.run_dir)) > 60  # whatever was repeated came out the same to the last bit
