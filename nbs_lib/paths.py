"""Where things live: the checkout, its `data/` and `results/`, and the user's cache. The top of the chain.

`NBS_ROOT`, `NBS_RESULTS` and `NBS_CACHE` override the three places; `NBS_DATA` names image folders (see `data`).
"""

import os
import secrets
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
    """Compiled kernels: `NBS_CACHE`, else the user's cache folder. Created on first use; OSError where it cannot be."""
    path = Path(os.environ.get("NBS_CACHE") or user_cache_path("prunemap"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = "Expected NBS_CACHE (else the user's cache folder) to be a folder, or one that can be made."
        raise OSError(f"{rule} Got {path}: {error.strerror}.") from None
    return path


def write_atomic(path: str | Path, data: str | bytes) -> Path:
    """Write `data` to a temporary name in the same folder, then rename: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
