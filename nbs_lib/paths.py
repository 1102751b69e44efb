"""Where things live: the checkout, its `data/` and `results/`, and the user's cache. Files written and read back.

`NBS_ROOT`, `NBS_RESULTS` and `NBS_CACHE` override the three places; `NBS_DATA` names image folders (see `data`).
"""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from platformdirs import user_cache_path


def root() -> Path:
    """The checkout: `NBS_ROOT`, else the folder that holds `nbs_lib`."""
    return Path(os.environ.get("NBS_ROOT") or Path(__file__).resolve().parent.parent)


def data_dir() -> Path:
    """Committed data: `data/paper`, `data/measured`, `data/trained`, `data/mappings`."""
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


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Errors inside, but for a file that is not there, become a ValueError that says `what` was expected of it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged file, or another program's, makes a reader raise
        told = f"{type(error).__name__}: {shorten(str(error), 500)}"
        raise ValueError(f"Expected {what}. Got {path}: {told}") from error


def read_checkpoint(path: str | Path | None, what: str, settings: dict) -> dict:
    """What is in a checkpoint, a JSON object with its `settings`; {} where there is none. ValueError naming the file
    where it holds something else, or differs in settings, which are named."""
    if not path or not Path(path).exists():
        return {}
    with reading(path, what):
        state = json.loads(Path(path).read_text())
        found = state["settings"]
        odd = sorted(name for name in found | settings if found.get(name) != settings.get(name))
    if odd:
        wanted, found = ({name: facts.get(name) for name in odd} for facts in (settings, found))
        raise ValueError(f"Expected a checkpoint of {wanted}; delete it to start anew. Got {path}, of {found}.")
    return state
