"""Our end of an engine's process: starts it, checks what it computes, asks it for times, ends it when it hangs."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from threading import Timer as Alarm

import numpy as np

from benchmarks.peers.catalogue import Peer
from benchmarks.peers.environment import PeerFailed, last_line, python_of
from nbs_lib.paths import cache_dir, root

LOAD_S, CALL_S = 900, 120  # a worker that needs longer is ended; tuning comes on top of the first
TOLERANCE = 1e-3  # of the largest output: Winograd and other orders of summation, in float32


class Worker:
    """A peer in its own process, with a network loaded and its output checked against `wanted`. Close it.

    It runs on the CPUs of the thread that makes it. `model`: the network's file; `x`: its input, float32. `version`,
    `settings` (what the engine says of itself) and `difference` (largest, over the largest output wanted) are known
    then. `sample(settle, calls)` -> ms per call, as the process took it around `calls` calls after `settle` untimed
    ones. `idle_ms`: CPU time that it burnt between samples, in all. PeerFailed, also after its limit of time."""

    def __init__(self, peer: Peer, model: Path, x: np.ndarray, wanted: np.ndarray, threads: int = 1):
        python, self.idle_ms, self._ended = python_of(peer), 0.0, False
        self._scratch = tempfile.TemporaryDirectory(prefix="prunemap-peer-")
        folder, cache = Path(self._scratch.name), cache_dir() / "peers" / peer.file.stem
        cache.mkdir(parents=True, exist_ok=True)
        np.save(folder / "input.npy", x)
        request = {"model": str(model.resolve()), "input": "input.npy", "output": "output.npy", "threads": threads}
        request |= {"cpus": sorted(os.sched_getaffinity(0)), "cache": str(cache), "options": dict(peer.options)}
        (folder / "request.json").write_text(json.dumps(request))
        alone = ["-I"] if peer.module.REQUIREMENTS else []  # isolated from our packages and the user's, but for ours
        command = [python, *alone, Path(__file__).with_name("serve.py"), peer.file.resolve(), "request.json"]
        paths = os.pathsep.join(filter(None, [str(root()), os.environ.get("PYTHONPATH")]))
        with open(folder / "log.txt", "wb") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            pipes |= {"start_new_session": True, "env": os.environ | {"PYTHONPATH": paths}}
            self._process = subprocess.Popen(command, cwd=folder, **pipes)
        try:
            hello = self._answer(LOAD_S + 1.5 * peer.options.get("tune_s", 0))
            self.version, self.settings = hello["version"], hello["settings"]
            got = np.load(folder / "output.npy")
            if got.shape != wanted.shape:
                raise PeerFailed(f"void: Expected an output of {wanted.shape}. Got {got.shape}.")
            self.difference = float(np.abs(got - wanted).max() / np.abs(wanted).max())
            if not self.difference <= TOLERANCE:
                raise PeerFailed(f"void: Expected PyTorch's output, to {TOLERANCE:g}. Got {self.difference:.2g} apart.")
        except BaseException:
            self.close()
            raise

    def _answer(self, limit_s: float, request: str = "") -> dict:
        alarm = Alarm(limit_s, self._kill)
        alarm.start()
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError):  # it died: a broken pipe, or an empty or a broken line
            if self._ended:
                raise PeerFailed(f"hung: no answer in {limit_s:g} s") from None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            said = (Path(self._scratch.name) / "log.txt").read_text(errors="replace")
            raise PeerFailed(f"crashed ({self._process.poll()}): {last_line(said)}") from None
        finally:
            alarm.cancel()

    def sample(self, settle: int, calls: int = 1) -> float:
        answer = self._answer(CALL_S, f"{settle} {calls}\n")
        self.idle_ms += answer["idle_ms"]
        return answer["ms"]

    def _kill(self) -> None:
        self._ended = True
        with contextlib.suppress(ProcessLookupError):  # the whole session: a converter may still be at work in it
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        self._kill()  # even where it has ended by itself: what it started may go on
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        self._scratch.cleanup()
