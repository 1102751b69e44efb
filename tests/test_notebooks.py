"""Notebooks of short_parameters.yaml run: some as `./reproduce.sh` runs them, the others' cells in this process.

A kernel of its own takes most of a short notebook's time to start: `NBS_TEST_ALL=1` gives every notebook one.

What every notebook looks like is checked in test_house.py; all of them run, with their defaults, in the main job.
"""

import ast
import json
import os
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import reproduce
import torch
import yaml
from IPython.core.formatters import DisplayFormatter

from nbs_lib import paths

NOTEBOOKS = sorted(file.stem for file in (Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
SHORT = yaml.safe_load((Path(__file__).parent / "short_parameters.yaml").read_text())
BY_THE_RUNNER = {"_template", "map_tab01_algorithms"}  # one that measures, and one with claims


def test_short_parameters_belong_to_notebooks():
    assert set(SHORT) <= set(NOTEBOOKS)


@pytest.fixture
def as_before():
    """What notebooks set for their whole kernel is set back."""
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    with matplotlib.rc_context():
        yield
    plt.close("all")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


def run_cells(job):
    """The code cells in turn, the job's parameters over those of the tagged cell; what a cell ends in is formatted."""
    names, show = {"__name__": "__notebook__"}, DisplayFormatter()
    for cell in json.loads(job.source.read_text())["cells"]:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, job.source, "exec"), names)
            if last and (value := eval(compile(ast.Expression(last.value), job.source, "eval"), names)) is not None:
                show.format(value)
            if "parameters" in cell["metadata"].get("tags", []):
                assert set(job.parameters) <= set(names)
                names |= job.parameters


@pytest.mark.parametrize("notebook", SHORT)
def test_a_notebook_runs_and_saves_what_it_found(notebook, tmp_path, monkeypatch, as_before):
    monkeypatch.setenv("NBS_RESULTS", str(tmp_path))
    monkeypatch.chdir(paths.root())
    (job,) = reproduce.find_jobs([notebook], "quick", True, SHORT[notebook], timeout_s=240)
    if notebook in BY_THE_RUNNER or os.environ.get("NBS_TEST_ALL"):
        reproduce.run_jobs([job])
        assert (job.status, job.error) == ("ok", "")
    else:
        run_cells(job)
    folder = paths.results_dir("quick", notebook)
    run = json.loads((folder / "run.json").read_text())
    assert run["figures"] and run["tables"] and run["seed"] is not None
    for stem in run["figures"].values():
        assert (folder / f"{stem}.png").stat().st_size > 1000 and (folder / f"{stem}.svg").exists()
    for stem in run["tables"].values():
        assert len(pd.read_csv(folder / f"{stem}.csv"))
    assert sum(reproduce.count_verdicts(folder).values()) == len(pd.read_csv(folder / "claims.csv"))


def test_a_live_notebook_can_run_on_what_was_measured_before(tmp_path, monkeypatch):
    monkeypatch.setenv("NBS_RESULTS", str(tmp_path))
    assert reproduce.main(["--only", "_template", "--cached", "-p", "size=7"]) == 0
    assert json.loads((tmp_path / "quick" / "_template" / "run.json").read_text())["device"] == "simulated"


ENGINES = {"nps_tab1_frameworks": "best_dense", "nps_fig34_accuracy_latency": "dense"}


@pytest.mark.parametrize("notebook", ENGINES)
def test_engines_that_did_not_run_are_not_beaten(notebook, tmp_path, monkeypatch, as_before):
    """With ours and slower engines alone on record nothing is won over the others; with none, the notebook says so."""
    file, data = paths.data_dir() / "measured" / "host" / "peers.csv", tmp_path / "data"
    (data / "measured" / "host").mkdir(parents=True)
    (data / "paper").symlink_to(paths.data_dir() / "paper")
    monkeypatch.setenv("NBS_RESULTS", str(tmp_path))
    monkeypatch.chdir(paths.root())
    (job,) = reproduce.find_jobs([notebook], "quick", True, {}, timeout_s=240)
    monkeypatch.setattr(paths, "data_dir", lambda: data)
    with pytest.raises(RuntimeError, match=r"peers.csv: run ./reproduce.sh peers. Got none"):
        run_cells(job)
    rows = pd.read_csv(file, dtype=str, keep_default_na=False)
    slow = rows[rows["engine"].str.startswith("prunemap") | rows["engine"].isin(["mnn", "pytorch"])]
    slow.to_csv(data / "measured" / "host" / "peers.csv", index=False)
    run_cells(job)
    claims = pd.read_csv(paths.results_dir("quick", notebook) / "claims.csv").set_index("id")
    prefix = "_".join(notebook.split("_")[:2])
    assert claims.verdict[f"{prefix}_{ENGINES[notebook]}"] == "cannot be tested here"
    assert "did not run: " in claims.note[f"{prefix}_{ENGINES[notebook]}"]
    if prefix == "nps_tab1":
        assert claims.verdict[["nps_tab1_tflite", "nps_tab1_tvm", "nps_tab1_pytorch"]].eq("cannot be tested here").all()
        assert claims.verdict["nps_tab1_mnn"] != "cannot be tested here"
