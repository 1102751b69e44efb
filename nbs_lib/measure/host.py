"""The host device: what this machine is, and times taken on it, pinned and alone."""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import llvmlite.binding as llvm
import psutil

from nbs_lib import clock, paths

CODE = (".", ":!data/measured", ":!data/trained")  # what a number depends on, as git names it


@functools.cache
def cpu_model() -> str:
    """The CPU's name from /proc/cpuinfo, else what the platform module and LLVM know."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Hardware"))]
    return names[0] if names else platform.processor() or f"{platform.machine()} {llvm.get_host_cpu_name()}"


@functools.cache
def commit() -> str:
    """The checkout's commit, "-dirty" with changes to tracked files, but for the rows in `data/measured` and
    `data/trained`; "unknown" outside a checkout or without git."""
    if not ((paths.root() / ".git").exists() and shutil.which("git")):  # git may see a repository that surrounds us
        return "unknown"
    asked = (["describe", "--always", "--abbrev=12", "--exclude=*"], ["status", "-s", "-uno", "--", *CODE])
    command = ["git", "-C", str(paths.root())]
    head, changed = (subprocess.run([*command, *a], capture_output=True, text=True).stdout.strip() for a in asked)
    return head + "-dirty" * bool(head and changed) or "unknown"


def stamp() -> dict:
    """Columns that say of which code and when (UTC) a number is."""
    return {"commit": commit(), "utc": datetime.now(UTC).isoformat(timespec="seconds")}


def fingerprint(engine: str) -> str:
    """12 hex digits that change with the CPU, its vector features, the engine and the code generator's versions."""
    parts = [cpu_model(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), engine]
    return hashlib.sha256("\n".join([*parts, version("numba"), version("llvmlite")]).encode()).hexdigest()[:12]


def provenance(engine: str) -> dict:
    """Columns that say where a number comes from; `engine` as in "prunemap 0.1.0"; `cores`: CPUs of the machine."""
    name, _, number = engine.partition(" ")
    heat = [entry.current for group in getattr(psutil, "sensors_temperatures", dict)().values() for entry in group]
    row = {"device": "host", "cpu": cpu_model(), "cores": os.cpu_count(), "fingerprint": fingerprint(engine)}
    row |= {"load1": psutil.getloadavg()[0], "temperature_c": max(heat, default=None)}
    return row | {"engine": name, "engine_version": number}


def run(target, inputs: tuple, runs=100, warmup=10, adaptive=False) -> dict:
    """Time `target(*inputs)`, pinned to as many CPUs as it has threads and alone under the measuring lock."""
    with clock.lock(), clock.pin(getattr(target, "threads", 1)):
        return {"warmup": warmup} | clock.time_calls(lambda: target(*inputs), runs, warmup, adaptive=adaptive).row()
