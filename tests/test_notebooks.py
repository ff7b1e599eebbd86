"""Notebooks run from top to bottom and show what they promise."""

import nbformat
import pytest
from launches import REPOSITORY
from nbclient import NotebookClient


@pytest.mark.notebook
def test_quickstart_trains_plots_and_samples(tmp_path, monkeypatch):
    notebook = nbformat.read(REPOSITORY / "notebooks" / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:  # few steps, and nothing left behind in the repository
        cell.source = cell.source.replace("train.num_steps=120", "train.num_steps=24").replace(
            '"run_dir=runs/quickstart"', f'"run_dir={tmp_path}/run", "data.cache_dir={tmp_path}/cache"'
        )
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(REPOSITORY)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = str(outputs)
    assert "validation loss" in text
    assert "completed, 24 steps" in text
    assert "<table>" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "run" / "checkpoints" / "24").is_dir()
