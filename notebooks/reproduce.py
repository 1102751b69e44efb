"""The main job, called by `./reproduce.sh`: run the notebooks headless, and gather what they found on one page.

A notebook whose name begins with `_` runs only when it is named. One that measures this machine has a parameter `live`;
while it runs live, no other notebook does.
"""

import argparse
import ast
import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import pandas as pd
import psutil
import yaml
from page import count_verdicts, write_index

import nbs_lib
from nbs_lib import paths
from nbs_lib.report.claims import VERDICTS

CODE = Path(nbs_lib.__file__).resolve().parent
BESIDE = Path(__file__).resolve().parent  # this program, and what belongs to one notebook each
PROFILES = {"quick": 600, "cifar": 12 * 3600, "paper": 14 * 86400}  # name -> seconds one notebook may take
HEARTBEAT_S = 20
DONE = ("ok", "kept")  # kept: done before with the same inputs, so not run again


@dataclass(eq=False)
class Job:
    """One notebook with its parameters, the process that runs it, and what became of it."""

    source: Path
    profile: str
    parameters: dict
    timeout_s: float
    status: str = "not run"
    error: str = ""
    seconds: float = 0.0  # without those it waited for the measuring lock

    def __post_init__(self):
        self.name = self.source.stem
        self.live = bool(self.parameters.get("live"))
        self.folder = paths.results_dir(self.profile, self.name)
        self.run_file, self.log = self.folder / "run.json", self.folder / ".papermill.log"
        self.executed = self.folder / "executed.ipynb"

    def start(self, resume: bool = False) -> None:
        """Start papermill, unless `resume` finds it done. The old `run.json` goes first: a killed run is not done."""
        self.inputs = fingerprint(self)
        if resume and self.is_done():
            self.status = "kept"
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in (self.run_file, self.executed, *self.folder.glob(".waits*")):
            old.unlink(missing_ok=True)
        command = [sys.executable, "-m", "papermill", self.source, self.executed, "--no-progress-bar", "-k", "python3"]
        command += ["--cwd", paths.root(), "--parameters_yaml", yaml.safe_dump(self.parameters)]
        # On a busy machine a kernel may need more than papermill's 60 s to start; our own limit holds for it, too.
        command += ["--start-timeout", str(max(1, int(self.timeout_s)))]
        # The kernel python3 of this environment, whatever the user's own folders call by that name.
        settings = {"JUPYTER_PREFER_ENV_PATH": "1", "JUPYTER_PATH": "", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        environment = os.environ | settings | {"NBS_WAITS": str(self.folder.resolve())}
        with open(self.log, "wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.process = psutil.Popen(command, env=environment, start_new_session=True, **streams)
        self.looked = time.monotonic()

    def is_over(self) -> bool:
        """Look after the running process; True once it has ended, or was ended for taking too long."""
        if self.status == "kept":
            return True
        before, self.looked, code = self.looked, time.monotonic(), self.process.poll()
        if not any(self.folder.glob(".waits*")):
            self.seconds += self.looked - before
        if code is None and self.seconds <= self.timeout_s:
            return False
        if code is None:
            self.stop(f"took longer than {self.timeout_s:g} s")
        elif code == 0 and self.run_file.exists():
            self.finish("ok", "")
        else:
            self.finish("failed", self.find_error() if code else "saved no results (a last cell calls report.save)")
        return True

    def stop(self, why: str) -> None:
        """Kill papermill and the kernel, which is in a session of its own, with all they started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [self.process, *self.process.children(recursive=True)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=5)
        self.finish("failed", why)

    def finish(self, status: str, error: str) -> None:
        """Add to `run.json` what only the runner knows; nothing of a failed run is shown but its error."""
        self.status, self.error = status, error
        if status != "ok":
            (self.folder / "claims.csv").unlink(missing_ok=True)
        run = json.loads(self.run_file.read_text()) if status == "ok" else {"parameters": self.parameters}
        run |= {"title": _title(self.source), "status": status, "error": error, "seconds": round(self.seconds, 1)}
        paths.write_atomic(self.run_file, json.dumps(run | {"inputs": self.inputs}, indent=1))

    def find_error(self) -> str:
        """The exception of the cell that failed, else the last line papermill wrote."""
        outputs = [output for cell in _cells(self.executed) for output in cell.get("outputs", [])]
        errors = [f"{found['ename']}: {found['evalue']}" for found in outputs if found["output_type"] == "error"]
        written = self.log.read_text(errors="replace").strip().splitlines()
        return (errors or written[-1:] or [f"papermill ended with status {self.process.returncode}"])[0]

    def is_done(self) -> bool:
        """True where the last run succeeded with these very inputs."""
        with contextlib.suppress(OSError, ValueError):
            run = json.loads(self.run_file.read_text())
            return (run.get("status"), run.get("inputs")) == ("ok", self.inputs)
        return False


def find_jobs(only: list[str], profile: str, live: bool, given: dict, timeout_s: float | None = None) -> list[Job]:
    """The notebooks to run, in name order, each with the parameters of its profile.

    `notebooks/params/<profile>/<notebook>.yaml` goes over the notebook's defaults, `given` over both; `profile` and
    `live` are passed to notebooks that have them. Raises ValueError for a name or a parameter that does not exist."""
    folder = paths.root() / "notebooks"
    sources = {file.stem: file for file in sorted(folder.glob("*.ipynb"))}
    unknown = [pattern for pattern in only if not fnmatch.filter(sources, pattern)]
    if unknown or not sources:
        raise ValueError(f"Expected notebooks of {folder}: {list(sources)}. Got {unknown}.")
    jobs = []
    for name, source in sources.items():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in only or ["[!_]*"]):
            continue
        known, file = _parameters(source), folder / "params" / profile / f"{name}.yaml"
        listed = (yaml.safe_load(file.read_text()) or {}) if file.exists() else {}
        unknown = [key for key in listed | given if key not in known]
        if unknown:
            raise ValueError(f"Expected parameters of {name}: {known}. Got {unknown}.")
        common = {key: value for key, value in {"profile": profile, "live": live}.items() if key in known}
        jobs.append(Job(source, profile, common | listed | given, timeout_s or PROFILES[profile]))
    return jobs


def fingerprint(job: Job) -> str:
    """SHA-256 of what a run depends on: notebook, parameters, code beside it, nbs_lib, data/, installed versions."""
    digest = hashlib.sha256(json.dumps(job.parameters, sort_keys=True, default=str).encode())
    # Not what is being written by others: a temporary name begins with a dot, and may be gone when it is read.
    data = (file for file in paths.data_dir().rglob("[!.]*") if file.is_file())
    for file in [job.source, *sorted(BESIDE.rglob("*.py")), *sorted(CODE.rglob("*.py")), *sorted(data)]:
        digest.update(f"\n{file} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    installed = {f"{found.name} {found.version}" for found in distributions()}
    digest.update("\n".join([sys.version, *sorted(installed)]).encode())
    return digest.hexdigest()


def run_jobs(jobs: list[Job], workers: int = 1, resume: bool = False) -> None:
    """Run them, at most `workers` at a time, live ones alone; the jobs keep the outcome. Ctrl-C ends what runs."""
    waiting, running, over, beat = sorted(jobs, key=lambda job: workers > 1 and job.live), [], 0, time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < workers and not (running and (waiting[0].live or running[0].live)):
                print(f"{waiting[0].name}: started")
                waiting[0].start(resume)
                running.append(waiting.pop(0))
            for job in [job for job in running if job.is_over()]:
                running.remove(job)
                over += 1
                print(f"[{over}/{len(jobs)}] {job.name}: {job.status}, {job.seconds:.1f} s  {job.error}".rstrip())
            if time.monotonic() - beat > HEARTBEAT_S:
                beat = time.monotonic()
                print(*(f"{job.name}: running, {job.seconds:.0f} s" for job in running), sep="\n")
            time.sleep(0.1)
    finally:
        for job in running:
            if job.status != "kept":
                job.stop("interrupted")


def publish(jobs: list[Job]) -> Path:
    """Copy the jobs' results, without executed notebooks, into the committed `results/reference/`; return it."""
    for job in jobs:
        target = paths.results_dir("reference", job.name)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(job.folder, target, ignore=shutil.ignore_patterns("*.ipynb", ".*"))
    return write_index(paths.results_dir("reference")).parent


def summary(jobs: list[Job]) -> str:
    """The table printed at the end: notebook, status, seconds, and its claims by verdict."""
    rows = []
    for job in jobs:
        counts = count_verdicts(job.folder) if job.status in DONE else dict.fromkeys(VERDICTS, "-")
        rows.append({"notebook": job.name, "status": job.status, "seconds": f"{job.seconds:.1f}"} | counts)
    return pd.DataFrame(rows).rename(columns="  {}".format).to_string(index=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 only if every notebook ran."""
    parser = argparse.ArgumentParser("reproduce.sh", description="Run the notebooks. Or: test [pytest arguments]")
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="NAME", help="these notebooks; * and ? match")
    add("--profile", choices=PROFILES, default="quick")
    add("--live", action="store_true", default=True, help="measure this machine (the default)")
    add("--cached", action="store_false", dest="live", help="use the measurements in data/, measure nothing")
    add("--jobs", type=int, default=1, metavar="N", help="notebooks at a time; timing still runs alone")
    add("--list", action="store_true", help="list the notebooks and stop")
    add("--resume", action="store_true", help="skip what is done with the same parameters, code and data")
    add("--publish", action="store_true", help="copy the results into results/reference/, if all ran")
    add("--timeout", type=float, metavar="SECONDS", help=f"for each notebook; by profile: {PROFILES}")
    add("-p", action="append", default=[], metavar="KEY=VALUE", help="set a parameter of the notebooks (YAML)")
    options = parser.parse_args(arguments)
    try:
        given = {key: yaml.safe_load(value) for key, value in (text.split("=", 1) for text in options.p)}
        jobs = find_jobs(options.only, options.profile, options.live, given, options.timeout)
    except (ValueError, SyntaxError, yaml.YAMLError) as error:
        parser.error(str(error))
    if options.list:
        print("\n".join(f"{job.name:<28}{_title(job.source)}" for job in jobs))
        return 0
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        run_jobs(jobs, max(1, options.jobs), options.resume)
    index = write_index(paths.results_dir(options.profile))
    print(f"\n{summary(jobs)}\n\n{index}")
    failed = [job.name for job in jobs if job.status not in DONE]
    if options.publish:
        print(f"not published: {', '.join(failed)} did not run" if failed else f"published: {publish(jobs)}")
    return int(bool(failed))


def _cells(file: Path) -> list[dict]:
    """The cells of a notebook; none where it cannot be read, which papermill then says."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads(file.read_text())["cells"]
    return []


def _parameters(source: Path) -> list[str]:
    """The names assigned in the cell tagged `parameters` (papermill only warns of others)."""
    cells = [cell for cell in _cells(source) if "parameters" in cell["metadata"].get("tags", [])]
    lines = ast.parse("".join(cells[0]["source"])).body if cells else []
    return [line.targets[0].id for line in lines if isinstance(line, ast.Assign)]


def _title(source: Path) -> str:
    """The first line of the first cell, without its `#`."""
    return "".join(next((cell["source"] for cell in _cells(source)), "")).partition("\n")[0].lstrip("# ")


if __name__ == "__main__":
    sys.exit(main())
