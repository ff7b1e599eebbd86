"""Notebooks run from top to bottom and show what they promise."""

import re

import nbformat
import pytest
from launches import REPOSITORY
from nbclient import NotebookClient


def execute(notebook, tmp_path, monkeypatch) -> list:
    """All outputs of a notebook that is run from the repository, as its users do."""
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("import compile_cache\ncompile_cache.install()\n")
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{REPOSITORY / 'tests'}")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(REPOSITORY)}},
    ).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_notebooks_are_kept_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.notebook
# 120 is the notebook's own number.
@pytest.mark.parametrize("steps", [24, pytest.param(120, marks=pytest.mark.slow)])
def test_quickstart_trains_plots_and_samples(tmp_path, monkeypatch, steps):
    notebook = nbformat.read(REPOSITORY / "notebooks" / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:  # few steps, and nothing left behind in the repository
        cell.source = cell.source.replace(
            "train.num_steps=120", f"train.num_steps={steps}"
        ).replace(
            '"run_dir=runs/quickstart"',
            f'"run_dir={tmp_path}/run", "data.cache_dir={tmp_path}/cache"',
        )
    outputs = execute(notebook, tmp_path, monkeypatch)
    text = str(outputs)
    assert "validation loss" in text
    assert f"completed, {steps} steps" in text
    assert "<table>" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "run" / "checkpoints" / str(steps)).is_dir()


@pytest.mark.slow
@pytest.mark.notebook
def test_look_inside_shows_attention_positions_and_shards(tmp_path, monkeypatch):
    notebook = nbformat.read(REPOSITORY / "notebooks" / "look_inside.ipynb", as_version=4)
    outputs = execute(notebook, tmp_path, monkeypatch)
    text = "".join(output.get("text", "") for output in outputs)
    before, after = map(float, re.search(r"second half: ([\d.]+) .*-> ([\d.]+)", text).groups())
    assert (before > 4, after < 1.5) == (True, True)  # it has learned to look back
    assert float(re.search(r"start\s+4,096: .*: ([\d.e+-]+) of", text)[1]) < 2e-3
    assert float(re.search(r"20 losses from those of one device: ([\d.e+-]+)", text)[1]) < 1e-5
    for shown in (
        "layers.w_pack",
        "CPU 0,4",
        "all-gather           along fsdp",
        "all-reduce           along tensor",
    ):
        assert shown in str(outputs) or shown in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
