"""Where things live: the checkout, its `data/` and `results/`, and the user's cache. The top of the chain.

`NBS_ROOT`, `NBS_RESULTS` and `NBS_CACHE` override the three places; `NBS_DATA` names image folders (see `data`).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from platformdirs import user_cache_path


def root() -> Path:
    """The checkout: `NBS_ROOT`, else the folder that holds `nbs_lib`."""
    return Path(os.environ.get("NBS_ROOT") or Path(__file__).resolve().parent.parent)


def data_dir() -> Path:
    """Committed data: `data/paper`, `data/measured`, `data/trained`."""
    return root() / "data"


def results_dir(profile: str, notebook: str = "") -> Path:
    """Where a notebook's figures and tables go: `results/<profile>/<notebook>`."""
    return Path(os.environ.get("NBS_RESULTS") or root() / "results") / profile / notebook


def cache_dir() -> Path:
    """Compiled kernels and locks: `NBS_CACHE`, else the user's cache folder. Created on first use."""
    path = Path(os.environ.get("NBS_CACHE") or user_cache_path("prunemap"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_atomic(path: str | Path, data: str | bytes) -> Path:
    """Write `data` to a temporary name in the same folder, then rename: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
