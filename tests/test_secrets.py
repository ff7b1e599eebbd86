"""What commands write and print while the environment holds secrets: none of them."""

from pathlib import Path

import pytest
from launches import SAMPLE, run_module, write_config

SECRET = "pLanTed-sEcret-41c7"
# Variables that tools read: of object storage, trackers, hubs, proxies.
VARIABLES = {
    **dict.fromkeys(
        (
            *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
            *("OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET", "AZURE_STORAGE_KEY"),
            *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "COMET_API_KEY"),
            *("GOOGLE_APPLICATION_CREDENTIALS", "AWS_SHARED_CREDENTIALS_FILE"),
        ),
        SECRET,
    ),
    **dict.fromkeys(
        ("http_proxy", "HTTPS_PROXY", "ALL_PROXY"), f"http://user:{SECRET}@127.0.0.1:9"
    ),
    "SLURM_JOB_COMMENT": SECRET,
    "MY_SETTING": SECRET,
}


@pytest.fixture(autouse=True)
def secrets(monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


def search(folder: Path) -> list[Path]:
    """The files below a folder that have the secret in them, or in their names."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return [file for file in files if SECRET in str(file) or SECRET.encode() in file.read_bytes()]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--metrics.tensorboard", "true"), 0),
        # Every loss is NaN: an exception ends the launch.
        pytest.param(("--model.initializer_range", "1e25"), 77, marks=pytest.mark.slow),
        (("--data.train", f"{{'s3://KEY:{SECRET}@bucket/x.jsonl': 1.0}}"), 78),
        pytest.param(("--data.train", "{'s3://bucket/x.jsonl': 1.0}"), 78, marks=pytest.mark.slow),
    ],
    ids=["to-its-end", "fails", "address", "storage"],
)
def test_a_run_and_its_page_keep_no_secret(options, code, tmp_path):
    config = write_config(tmp_path)
    short = ("--train.num_steps", "3", "--optimizer.warmup_steps", "1", "--checkpoint.every", "2")
    argv = ["--config", str(config), "--run_dir", str(tmp_path / "run"), *short, *options]
    done = run_module("baichuan_jax.train", *argv, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert SECRET not in done.stdout + done.stderr
    if code == 0:
        page = ("baichuan_jax.report", str(tmp_path / "run"), "-o", str(tmp_path / "page.html"))
        shown = run_module(*page, cwd=tmp_path)
        assert shown.returncode == 0, shown.stderr
        assert SECRET not in shown.stdout + shown.stderr
    assert search(tmp_path) == []


@pytest.mark.slow
def test_the_pipeline_keeps_no_secret(tmp_path):
    argv = ["--input", f"['{SAMPLE}/validation-en.jsonl.gz']", "--output", str(tmp_path / "out")]
    done = run_module("baichuan_jax.data.pipeline", *argv, "--num_workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert search(tmp_path) == []
