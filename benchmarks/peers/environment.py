"""A virtual environment per engine, under the cache folder (`engines/<name>`), made on first use from its pinned list.

The list is all that it gets: nothing pulls dependencies. Once made it needs no network. An engine whose list is empty
runs in the project's own environment.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from benchmarks.peers.catalogue import Peer
from nbs_lib.paths import cache_dir, write_atomic

INSTALL_S = 1800  # a list that takes longer is given up


class PeerFailed(RuntimeError):
    """An engine could not be installed, crashed, hung or computed something else. The text says which, on one line."""


def python_of(peer: Peer) -> Path:
    """The Python of the engine's environment, made first if it is missing, half-made or of other requirements.

    The file's `REQUIREMENTS` are installed, with the newest Python up to its `NEWEST_PYTHON` (3.x). PeerFailed."""
    requirements, ours = peer.module.REQUIREMENTS, sys.version_info.minor
    if not requirements:
        return Path(sys.executable)
    newest = min(ours, getattr(peer.module, "NEWEST_PYTHON", ours))
    python = sys.executable if newest == ours else shutil.which(f"python3.{newest}")
    if not python:
        raise PeerFailed(
            f"not installed: Expected python3.{newest}, the newest that it runs with, on the path. Got none."
        )
    folder = cache_dir() / "engines" / peer.file.stem
    made, wanted = folder / "made.txt", f"python 3.{newest}\n" + "\n".join(requirements.split())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not made.exists() or made.read_text() != wanted:  # written last: without it nothing else in there counts
            print(f"making the environment of {peer.file.stem}: {folder}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            _install([python, "-m", "venv", str(folder)])
            pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-input"]
            _install([*pip, "--disable-pip-version-check", *requirements.split()])
            write_atomic(made, wanted)
    return folder / "bin/python"


def _install(command: list[str]) -> None:
    streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(command, timeout=INSTALL_S, **streams)
    except subprocess.TimeoutExpired:
        raise PeerFailed(f"not installed: not done in {INSTALL_S} s") from None
    if done.returncode:
        raise PeerFailed(f"not installed: {last_line(done.stderr or done.stdout)}")


def last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"])[-1]
