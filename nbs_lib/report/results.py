"""The results folder of one notebook, replaced as one set.

`run.json` is removed first and written last: where it stands, the set is whole.
"""

import io
import json
import platform
from importlib.metadata import distributions
from pathlib import Path

from nbs_lib import paths
from nbs_lib.measure import host
from nbs_lib.report.claims import Claims

PACKAGES = ("prunemap", "numpy", "numba", "llvmlite", "torch", "torchvision", "pandas", "onnxruntime")


def save(notebook, profile, figures=None, tables=None, claims=None, parameters=None, device="host", seed=None) -> Path:
    """Replace `results/<profile>/<notebook>/` and return it.

    figures: {name: matplotlib figure}; tables: {name: DataFrame}. The first figure becomes `figure.png` and `.svg`, the
    first table `table.csv`; further ones carry their name (`figure_<name>.png`, `table_<name>.csv`). claims: `Claims`.
    parameters: dict of what JSON takes. device: where the numbers come from, in the words of measured rows. Raises
    ValueError, before anything is written, for claims that are unanswered or another notebook's."""
    claims = claims or Claims(notebook)
    if claims.notebook != notebook or claims.unanswered():
        missing = f"{claims.notebook} without {claims.unanswered()}"
        raise ValueError(f"Expected every claim of {notebook} answered. Got {missing}.")
    figure_stems, table_stems = _stems("figure", figures or {}), _stems("table", tables or {})
    files: dict[str, bytes | str] = {"claims.csv": claims.frame().to_csv(index=False)}
    for name, stem in figure_stems.items():
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figures[name].savefig(buffer, format=kind, dpi=150, metadata=metadata)
            files[f"{stem}.{kind}"] = buffer.getvalue()
    files |= {f"{stem}.csv": tables[name].to_csv(index=False) for name, stem in table_stems.items()}
    run = {"notebook": notebook, "profile": profile, "parameters": dict(parameters or {}), "seed": seed}
    run |= {"device": device, "cpu": host.cpu_model()} | host.stamp()
    installed = sorted((found.name, found.version) for found in distributions() if found.name in PACKAGES)
    run["versions"] = dict([("python", platform.python_version()), *installed])
    files["run.json"] = json.dumps(run | {"figures": figure_stems, "tables": table_stems}, indent=1)

    folder = paths.results_dir(profile, notebook)
    (folder / "run.json").unlink(missing_ok=True)
    for old in folder.glob("*"):
        if old.suffix in (".png", ".svg", ".csv") and old.name not in files:
            old.unlink()
    for name, content in files.items():
        paths.write_atomic(folder / name, content)
    return folder


def _stems(kind: str, named: dict) -> dict[str, str]:
    """File names without their ending: the first is just the kind."""
    wrong = [name for name in named if not name.replace("-", "_").isidentifier()]
    if wrong:
        raise ValueError(f"Expected names of letters, digits and '_' for each {kind}. Got {wrong}.")
    return {name: f"{kind}_{name}" if number else kind for number, name in enumerate(named)}
