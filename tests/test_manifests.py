"""Launch scripts and manifests match the real schemas, their enumerations and our exit codes, and
give a run no more rights than it needs.
"""

import copy
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from launches import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import baichuan_jax
from baichuan_jax.config.files import load_config
from baichuan_jax.resilience.causes import Cause

LAUNCH = REPOSITORY / "launch"
RECIPE = LAUNCH / "Containerfile"
MANIFESTS = sorted(path.name for path in (LAUNCH / "k8s").glob("*.yaml"))
LOCKS = sorted(LAUNCH.glob("*.lock"))
# Values of JobSet and Job that the schemas leave open (plain strings).
JOBSET_ACTIONS = {
    "FailJobSet",
    "RestartJobSet",
    "RestartJobSetAndIgnoreMaxRestarts",
    "RestartJob",
    "RestartJobAndIgnoreMaxRestarts",
}
JOB_FAILURE_REASONS = {
    "BackoffLimitExceeded",
    "DeadlineExceeded",
    "FailedIndexes",
    "MaxFailedIndexesExceeded",
    "PodFailurePolicy",
}


def documents(name: str) -> dict[str, dict]:
    return {
        doc["kind"]: doc
        for doc in yaml.safe_load_all((LAUNCH / "k8s" / name).read_text(encoding="utf-8"))
    }


def validate(kind: str, document: dict) -> None:
    """Validate with generated models of the real APIs; keys that a model lacks are refused too."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    if kind == "NetworkPolicy":
        kubernetes_validate.validate(document, "1.33", strict=True)
        return
    model = {
        "JobSet": models.JobsetV1alpha2JobSet,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
        "TrainJob": models.TrainerV1alpha1TrainJob,
    }[kind]
    parsed = model.from_dict(copy.deepcopy(document))
    assert missing(document, parsed.to_dict()) == [], "keys that the API does not know"
    for job in jobs(document):
        kubernetes_validate.validate(
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job},
            "1.33",
            strict=True,
        )


def missing(given: Any, known: Any, path: str = "") -> list[str]:
    """Paths of a document that its parsed form has lost."""
    if isinstance(given, dict):
        return [
            lost
            for key, value in given.items()
            for lost in (
                missing(value, known[key], f"{path}.{key}")
                if key in (known or {})
                else [f"{path}.{key}"]
            )
        ]
    if isinstance(given, list):
        return [
            lost
            for index, value in enumerate(given)
            for lost in missing(value, known[index], f"{path}[{index}]")
        ]
    return []


def jobset_of(document: dict) -> dict:
    """The specification of a JobSet, or of the one inside a TrainingRuntime."""
    spec = document["spec"]
    return spec if document["kind"] == "JobSet" else spec.get("template", {}).get("spec", {})


def jobs(document: dict) -> list[dict]:
    """The jobs of a JobSet."""
    replicated = jobset_of(document).get("replicatedJobs", [])
    return [{"spec": job["template"]["spec"]} for job in replicated]


def pods(name: str) -> list[dict]:
    """The specifications of all pods of a manifest, whatever they belong to."""

    def below(value: Any) -> list[dict]:
        if isinstance(value, list):
            return [pod for item in value for pod in below(item)]
        if not isinstance(value, dict):
            return []
        inside = [pod for item in value.values() for pod in below(item)]
        return [value, *inside] if "containers" in value else inside

    found = below(list(documents(name).values()))
    assert found
    return found


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_what_the_real_apis_take(name):
    for kind, document in documents(name).items():
        validate(kind, document)


def test_a_misspelt_key_would_be_seen():
    document = documents("jobset.yaml")["JobSet"]
    document["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(AssertionError, match=r"failurePolicy\.maxRestart"):
        validate("JobSet", document)


@pytest.mark.parametrize("name", MANIFESTS)
def test_bugs_stop_a_jobset_and_faults_recreate_it(name):
    for document in documents(name).values():
        jobset = jobset_of(document)
        if not jobset:
            continue
        first, second = jobset["failurePolicy"]["rules"]
        assert {first["action"], second["action"]} <= JOBSET_ACTIONS
        assert (
            set(first["onJobFailureReasons"] + second["onJobFailureReasons"]) <= JOB_FAILURE_REASONS
        )
        assert (first["action"], first["onJobFailureReasons"]) == (
            "FailJobSet",
            ["PodFailurePolicy"],
        )
        assert (second["action"], second["onJobFailureReasons"]) == (
            "RestartJobSet",
            ["BackoffLimitExceeded"],
        )
        (job,) = jobset["replicatedJobs"]
        spec = job["template"]["spec"]
        assert spec["backoffLimit"] == 0
        (rule,) = spec["podFailurePolicy"]["rules"]
        assert rule["action"] == "FailJob"
        final = [Cause.EXCEPTION.exit_code, Cause.CONFIGURATION.exit_code]
        assert rule["onExitCodes"]["values"] == final
        assert (
            rule["onExitCodes"]["containerName"]
            == spec["template"]["spec"]["containers"][0]["name"]
        )


def test_the_arguments_in_manifests_name_a_configuration_that_loads():
    job = documents("jobset.yaml")["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    trainer = documents("trainjob.yaml")["TrainJob"]["spec"]["trainer"]
    for argv in (container["args"], trainer["args"]):
        # A name, which is found from any folder: the working folder is the volume's.
        config = load_config(argv[1], ["run_dir=" + argv[3]])
        assert config.run_dir == "/shared/runs/7b"
    number = next(item["value"] for item in container["env"] if item["name"] == "JAX_NUM_PROCESSES")
    assert int(number) == job["completions"] == job["parallelism"]


def test_the_batch_script_is_a_script():
    script = LAUNCH / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text(encoding="utf-8")
    final = (Cause.EXCEPTION, Cause.STORAGE, Cause.CONFIGURATION)
    assert " | ".join(str(cause.exit_code) for cause in final) + ")" in text


def test_a_run_under_slurm_is_writable_by_its_user_alone(tmp_path):
    """Its own function, under the umask of clusters where everybody has a group."""
    text = (LAUNCH / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    supervise = re.search(r"^supervise\(\) \{\n.*?^\}$", text, re.MULTILINE | re.DOTALL)
    assert supervise is not None
    (tmp_path / "writes").write_text("#!/bin/sh\nmkdir run\necho > run/config.yaml\n")
    (tmp_path / "writes").chmod(0o755)
    names = "SLURM_JOB_ID=1 HOSTS=1 MIN_HOSTS=1 PYTHON=./writes"
    script = f"scontrol() {{ :; }}; umask 002; {names}; {supervise[0]}; supervise"
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True)
    for path in (tmp_path / "run", tmp_path / "run" / "config.yaml"):
        assert path.stat().st_mode & 0o022 == 0


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_pod_has_no_more_rights_than_it_needs(name):
    """What Pod Security calls restricted, and a root file system that is not writable."""
    for pod in pods(name):
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == instructions("USER")[-1]
        assert context["runAsGroup"] == context["fsGroup"]
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["limits"])
            for variable in container["env"]:
                # Whoever may read a manifest would read it.
                if re.search("KEY|TOKEN|SECRET|PASSWORD", variable["name"]):
                    assert "value" not in variable, variable["name"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_pod_can_write_where_the_program_writes(name):
    (home,) = re.findall(r"HOME=(\S+)", RECIPE.read_text(encoding="utf-8"))
    for pod in pods(name):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert {"/tmp", "/dev/shm", home} <= set(mounts)
            assert not [path for path, mount in mounts.items() if mount.get("readOnly")]
            for path in ("/tmp", "/dev/shm", home):
                # In memory or on the node's disk, and never without an end.
                assert volumes[mounts[path]["name"]]["emptyDir"]["sizeLimit"]
            # data.cache_dir and the paths of a configuration are relative.
            assert "persistentVolumeClaim" in volumes[mounts[container["workingDir"]]["name"]]


def test_an_image_has_this_version():
    """In every recipe and on every page: `latest` is another program tomorrow."""
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
    recipes = [path for path in LAUNCH.rglob("*") if path.is_file()]
    tags = [
        tag
        for path in (*pages, *recipes)
        for tag in re.findall(r"\S+/baichuan-jax(\S*)", path.read_text(encoding="utf-8"))
    ]
    assert len(tags) >= len(MANIFESTS)
    assert set(tags) == {f":{baichuan_jax.__version__}"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_only_the_pods_of_a_job_talk_to_each_other(name):
    found = documents(name)
    job = found.get("TrainJob") or found["JobSet"]
    # JobSet's controller gives the label to every pod; the JobSet of a TrainJob has its name.
    own = {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": job["metadata"]["name"]}}
    policy = found["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == own
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"] == [{"from": [{"podSelector": own}]}]
    peers, names = policy["egress"]
    assert peers == {"to": [{"podSelector": own}]}
    assert {port["port"] for port in names["ports"]} == {53}


def instructions(name: str) -> list[str]:
    """What stands behind an instruction of the container's recipe, joined over its lines."""
    text = RECIPE.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*)$", text, re.MULTILINE)


def test_the_containers_recipe_is_clean_and_pins_its_base():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed (make dev)")
    done = subprocess.run(
        [hadolint, "--failure-threshold", "style", RECIPE], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (base,) = instructions("FROM")
    assert re.fullmatch(r"\S+:\d[\w.-]+@sha256:[0-9a-f]{64}", base)


def test_the_container_gets_nothing_that_no_hash_covers():
    installs = [line for line in instructions("RUN") if "pip install" in line]
    assert installs
    for line in installs:
        assert "--no-deps" in line
        assert "--require-hashes" in line or "--no-build-isolation" in line, line
    sources = [name for line in instructions("COPY") for name in line.split()[:-1]]
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    for source in sources:
        # CUDA 12 and CUDA 13 each have a lock.
        assert len(list(REPOSITORY.glob(source.replace("${CUDA}", "*")))) >= 1, source
        assert any(Path(source).match(pattern) for pattern in allowed), source


def test_the_container_runs_as_a_user_of_its_own():
    (user,) = instructions("USER")
    number, group = user.split(":")
    assert int(number) >= 10000, "a number that no user of the host is likely to have"
    assert int(group) >= 10000
    (settings,) = instructions("ENV")
    # Without it `python -m` imports from the working folder, which is on the shared volume.
    assert "PYTHONSAFEPATH=1" in settings.split()


def locked(lock: Path) -> dict[str, list[str]]:
    """Names in a lock file -> the version and the hashes."""
    text = re.sub(r"^ *#.*$", "", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)
    entries = [entry.split() for entry in text.replace("\\\n", " ").splitlines() if entry.strip()]
    return {entry[0].partition("==")[0]: entry for entry in entries}


def wanted(name: str) -> list[Requirement]:
    """The requirements of a file and of those that it includes, under Python 3.12."""
    found = []
    for line in (REPOSITORY / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            found += wanted(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or marker.evaluate({"python_version": "3.12"}):
                found.append(requirement)
    return found


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_satisfies_its_requirements(lock):
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    backend = tomllib.loads(project)["build-system"]["requires"]
    entries = locked(lock)
    for requirement in [*wanted(f"{lock.stem}.txt"), *map(Requirement, backend)]:
        name = canonicalize_name(requirement.name)
        assert name in entries, f"{name}: make lock"
        version = entries[name][0].partition("==")[2]
        assert requirement.specifier.contains(version), f"{requirement}, not {version}: make lock"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_has_hashes_and_no_address(lock):
    text = lock.read_text(encoding="utf-8")
    assert "://" not in text
    assert "--index" not in text
    for name, (version, *hashes) in locked(lock).items():
        assert re.fullmatch(rf"{name}==[\w.]+", version)
        assert hashes, name
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), name


def test_the_container_has_a_lock_for_each_cuda():
    assert [lock.stem for lock in LOCKS] == ["requirements-cuda12", "requirements-cuda13"]
    for lock, cuda in zip(LOCKS, ("12", "13"), strict=True):
        assert {f"jax-cuda{cuda}-plugin", f"jax-cuda{cuda}-pjrt"} <= set(locked(lock))
