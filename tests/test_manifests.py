"""Launch scripts and manifests match the real schemas, their enumerations and our exit codes."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from launches import REPOSITORY

from baichuan_jax.config.files import load_config
from baichuan_jax.resilience.causes import Cause

LAUNCH = REPOSITORY / "launch"
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


@pytest.mark.parametrize("name", ["jobset.yaml", "trainjob.yaml"])
def test_a_manifest_is_what_the_real_apis_take(name):
    for kind, document in documents(name).items():
        validate(kind, document)


def test_a_misspelt_key_would_be_seen():
    document = documents("jobset.yaml")["JobSet"]
    document["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(AssertionError, match=r"failurePolicy\.maxRestart"):
        validate("JobSet", document)


@pytest.mark.parametrize("name", ["jobset.yaml", "trainjob.yaml"])
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
        config = load_config(REPOSITORY / argv[1], ["run_dir=" + argv[3]])
        assert config.run_dir == "/shared/runs/7b"
    number = next(item["value"] for item in container["env"] if item["name"] == "JAX_NUM_PROCESSES")
    assert int(number) == job["completions"] == job["parallelism"]


def test_the_batch_script_is_a_script():
    script = LAUNCH / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text(encoding="utf-8")
    final = (Cause.EXCEPTION, Cause.STORAGE, Cause.CONFIGURATION)
    assert " | ".join(str(cause.exit_code) for cause in final) + ")" in text


def test_the_containers_recipe_is_clean_and_pins_its_base():
    recipe, hadolint = LAUNCH / "Containerfile", Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed (make dev)")
    done = subprocess.run(
        [hadolint, "--failure-threshold", "style", recipe], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in recipe.read_text(encoding="utf-8").splitlines()]
    (base,) = [line[1] for line in lines if line[:1] == ["FROM"]]
    assert base.rpartition(":")[2][0].isdigit()
    for source in [name for line in lines if line[:1] == ["COPY"] for name in line[1:-1]]:
        assert (REPOSITORY / source).exists(), source
