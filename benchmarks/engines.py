"""Engines that want environments of their own, as contenders: ncnn, MNN, OpenVINO and DeepSparse.

Each lives in a virtual environment under the cache folder (`engines/<name>`), made on first use from the pinned list
below, which is all that it gets: nothing pulls dependencies (pnnx would want torch). Once made it needs no network. The
engine runs in a process of that environment (`engine_worker.py`), on the CPUs that the caller is pinned to, in float32.
DeepSparse 1.8 wants Python 3.8 to 3.11 and may be used for evaluation only; its analytics are switched off. MNN's wheel
holds AVX2 kernels only. LiteRT is left out: its converters want torch, or TensorFlow and a download at run time.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Timer as Alarm
from time import perf_counter_ns
from timeit import Timer

import numpy as np
import torch
from filelock import FileLock

from nbs_lib import clock
from nbs_lib.measure.peers import pytorch
from nbs_lib.paths import cache_dir, write_atomic

REQUIREMENTS = {
    "ncnn": "ncnn==1.0.20261020 pnnx==20261020 numpy==2.4.6",
    "mnn": "MNN==3.6.1 numpy==2.4.6",
    "openvino": "openvino==2026.4.1 numpy==2.4.6",
    "deepsparse": "deepsparse==1.8.0 sparsezoo==1.8.1 numpy==1.26.4 onnx==1.14.1 protobuf==3.20.3 setuptools==65.5.0 "
    "pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 typing-extensions==4.16.0 typing-inspection==0.4.5 "
    "PyYAML==6.0.3 tqdm==4.70.1 requests==2.34.2 certifi==2026.10.18 charset-normalizer==3.5.2 idna==3.20 "
    "urllib3==2.8.0 click==8.5.1 geocoder==1.38.1 ratelim==0.1.6 decorator==5.3.1 six==1.17.0 py-machineid==1.0.0",
}
NEWEST_PYTHON = {"deepsparse": 11}  # 3.x; the others follow ours
LOAD_S, CALL_S = 600, 60  # a worker that needs longer is ended


class EngineFailed(RuntimeError):
    """An engine could not be installed, crashed, hung or computed something else. The text says which, on one line."""


def environment(name: str) -> Path:
    """The Python of the engine's environment, made first if it is missing, half-made or of other requirements."""
    folder, ours = cache_dir() / "engines" / name, sys.version_info.minor
    newest = min(ours, NEWEST_PYTHON.get(name, ours))
    python = sys.executable if newest == ours else shutil.which(f"python3.{newest}")
    if not python:
        raise EngineFailed(f"Expected python3.{newest} on the path, the newest that {name} runs with. Got none.")
    made, wanted = folder / "made.txt", f"python 3.{newest}\n" + REQUIREMENTS[name].replace(" ", "\n")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not made.exists() or made.read_text() != wanted:  # written last: without it nothing else in there counts
            print(f"making the environment of {name}: {folder}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            _install([python, "-m", "venv", str(folder)])
            pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-input"]
            _install([*pip, "--disable-pip-version-check", *REQUIREMENTS[name].split()])
            write_atomic(made, wanted)
    return folder / "bin/python"


def _install(command: list[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise EngineFailed(f"not installed: {_last_line(done.stderr or done.stdout)}")


def _last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"])[-1]


class Worker:
    """An engine in its own process, with a model loaded. Runs on the CPUs of the thread that makes it; close it.

    `sample(settle, calls)` -> ms per call, as the worker took it around `calls` calls after `settle` untimed ones.
    `idle_ms`: CPU time that it burnt between samples, in all. EngineFailed, also after its limit of time.
    """

    def __init__(self, engine: str, onnx: bytes, x: np.ndarray, wanted: np.ndarray, threads: int = 1):
        python, self.engine, self.idle_ms = environment(engine), engine, 0.0
        self._folder = tempfile.TemporaryDirectory(prefix="prunemap-engine-")
        folder = Path(self._folder.name)
        (folder / "model.onnx").write_bytes(onnx)
        np.save(folder / "input.npy", x)
        cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        command = [python, "-I", Path(__file__).with_name("engine_worker.py"), engine, "model.onnx", "input.npy"]
        command += ["output.npy", str(threads), cpus]
        with open(folder / "log.txt", "wb") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            self._process = subprocess.Popen(command, cwd=folder, start_new_session=True, **pipes)
        try:
            self.version = self._answer(LOAD_S)["version"]
            got = np.load(folder / "output.npy")
            if got.shape != wanted.shape or not np.abs(got - wanted).max() <= 1e-3 * np.abs(wanted).max():
                error = np.abs(got - wanted).max() / np.abs(wanted).max() if got.shape == wanted.shape else got.shape
                raise EngineFailed(f"void: expected PyTorch's output, to 1e-3 of its largest. Got {error} apart.")
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
            if not alarm.is_alive():
                raise EngineFailed(f"hung: no answer in {limit_s} s") from None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            said = (Path(self._folder.name) / "log.txt").read_text(errors="replace")
            raise EngineFailed(f"crashed ({self._process.poll()}): {_last_line(said)}") from None
        finally:
            alarm.cancel()

    def sample(self, settle: int, calls: int = 1) -> float:
        answer = self._answer(CALL_S, f"{settle} {calls}\n")
        self.idle_ms += answer["idle_ms"]
        return answer["ms"]

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # the whole session: a converter may still be at work in it
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        if self._process.returncode is None:
            self._kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        self._folder.cleanup()


def export(model: torch.nn.Module, x: torch.Tensor) -> bytes:
    """The module as ONNX, operator set 13, which all engines read; weights below 1e-30 become zeros first."""
    model, options = pytorch(model, x).model, {"opset_version": 13, "dynamo": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter announces its successor, which needs more packages
        options |= {"input_names": ["input"], "output_names": ["output"]}
        torch.onnx.export(model, (x,), buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def here(fn: Callable) -> Callable[[int], float]:
    """What `Worker.sample` is, for a callable of this process."""

    def sample(settle: int, calls: int = 1) -> float:
        for _ in range(settle):
            fn()
        return Timer(fn, timer=perf_counter_ns).timeit(calls) / calls / 1e6

    return sample


def alternate(samplers: dict[str, Callable], rounds=20, warmup=3, settle=3) -> tuple[clock.Comparison, dict[str, str]]:
    """`clock.alternate` for samplers (settle -> ms): same lock, same order. And {name: error} of those that failed."""
    samples, errors = {name: [] for name in samplers}, {}
    with clock.lock():
        for turn in range(-1, rounds):  # -1: the warm-up
            names = list(samplers)
            for name in np.roll(names, -turn)[:: -1 if turn // len(names) % 2 else 1].tolist():
                if name in errors:
                    continue
                try:
                    ms = samplers[name](warmup if turn < 0 else settle)
                    samples[name] += [ms] * (turn >= 0)
                except EngineFailed as error:
                    errors[name] = str(error)
    timings = {name: clock.Timing(values) for name, values in samples.items() if name not in errors}
    return clock.Comparison(timings), errors
