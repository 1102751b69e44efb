"""What all tests share: a seeded generator, and small notebooks in a checkout of their own."""

from __future__ import annotations

import os

# One thread for PyTorch and BLAS, here and in what tests start: two workers share the cores, networks are tiny, and
# threads that wait spin. Set before either is imported; our own kernels' threads are not concerned.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
import nbformat
import numpy as np
import pytest

matplotlib.use("Agg")

CLAIMS_HEADER = "id,source,claim,notebook,metric,paper_value,criterion,threshold,unit,scope,threshold_from\n"


@pytest.fixture(scope="session", autouse=True)
def lock_of_this_worker(tmp_path_factory):
    """Tests wait neither for a measurement on this machine nor for each other's: none of them asserts milliseconds."""
    os.environ["NBS_LOCK"] = str(tmp_path_factory.mktemp("lock") / "measure.lock")


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty checkout that `nbs_lib` takes for its own: `notebooks/`, `data/paper/claims.csv`, `results/`."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data" / "paper").mkdir(parents=True)
    (tmp_path / "data" / "paper" / "claims.csv").write_text(CLAIMS_HEADER)
    monkeypatch.setenv("NBS_ROOT", str(tmp_path))
    monkeypatch.delenv("NBS_RESULTS", raising=False)
    return tmp_path


@pytest.fixture
def write_notebook(checkout):
    """A function that writes `notebooks/<name>.ipynb`: title, parameters cell, then the code cells given."""

    def write(name, *cells, parameters='profile = "quick"\n'):
        notebook = nbformat.v4.new_notebook(
            metadata={"kernelspec": {"name": "somebody-elses-kernel", "display_name": "x", "language": "python"}}
        )
        notebook.cells = [nbformat.v4.new_markdown_cell(f"# Title of {name}\n\nText.")]
        notebook.cells += [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
        nbformat.write(notebook, checkout / "notebooks" / f"{name}.ipynb")

    return write
