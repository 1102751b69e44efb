"""Notebooks run as `./reproduce.sh` runs them: those of short_parameters.yaml, the template among them.

What every notebook looks like is checked in test_house.py; all of them run, with their defaults, in the main job.
"""

import json
from pathlib import Path

import pandas as pd
import pytest
import reproduce
import yaml

from nbs_lib import paths

NOTEBOOKS = sorted(file.stem for file in (Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
SHORT = yaml.safe_load((Path(__file__).parent / "short_parameters.yaml").read_text())


def test_short_parameters_belong_to_notebooks():
    assert set(SHORT) <= set(NOTEBOOKS)


@pytest.mark.parametrize("notebook", SHORT)
def test_a_notebook_runs_and_saves_what_it_found(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("NBS_RESULTS", str(tmp_path))
    (job,) = reproduce.find_jobs([notebook], "quick", True, SHORT[notebook], timeout_s=240)
    reproduce.run_jobs([job])
    assert (job.status, job.error) == ("ok", "")
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
