"""The notebook runner, on small notebooks in a checkout of their own."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import reproduce

HOUSE = Path(__file__).resolve().parent.parent
SAVE = "from nbs_lib.report import save\nsave({name!r}, profile, parameters={{'profile': profile}})"


@pytest.fixture
def good(write_notebook):
    write_notebook("good", "import os; print(os.getcwd())", SAVE.format(name="good"))


def run_file(checkout, name, profile="quick"):
    return json.loads((checkout / "results" / profile / name / "run.json").read_text())


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_failing_notebook_does_not_stop_the_others(checkout, write_notebook, capfd):
    write_notebook("bad", "figures = {}", "raise RuntimeError('the <oven> is cold')", SAVE.format(name="bad"))
    write_notebook("forgot", "pass")
    write_notebook("good", "import sys, os; print(sys.executable, os.getcwd())", SAVE.format(name="good"))
    write_notebook("_template", "raise RuntimeError('runs only when it is named')")
    (checkout / "notebooks" / "broken.ipynb").write_text('{"cells": [')
    assert reproduce.main([]) == 1
    out = capfd.readouterr().out
    assert "[1/4] bad: failed" in out and "[4/4] good: ok" in out and "_template" not in out
    assert run_file(checkout, "broken")["status"] == "failed"
    assert run_file(checkout, "bad")["error"] == "RuntimeError: the <oven> is cold"
    assert "saved no results" in run_file(checkout, "forgot")["error"]
    good = run_file(checkout, "good")
    assert good["status"] == "ok" and good["title"] == "Title of good" and good["parameters"] == {"profile": "quick"}
    executed = (checkout / "results/quick/good/executed.ipynb").read_text()
    assert sys.executable in executed and str(checkout) in executed  # this environment's kernel, in the checkout
    page = (checkout / "results/quick/index.html").read_text()
    assert "the &lt;oven&gt; is cold" in page and "Title of good" in page


def test_a_hanging_notebook_is_ended_with_its_kernel(checkout, write_notebook, capfd, monkeypatch):
    monkeypatch.setattr(reproduce, "HEARTBEAT_S", 2)
    write_notebook("hangs", "import os; open('pid', 'w').write(str(os.getpid()))", "while True: pass")
    began = time.monotonic()
    assert reproduce.main(["--timeout", "8"]) == 1
    assert time.monotonic() - began < 30
    assert run_file(checkout, "hangs")["error"] == "took longer than 8 s"
    assert "hangs: running, " in capfd.readouterr().out
    assert is_gone(int((checkout / "pid").read_text()))


def test_waiting_for_the_measuring_lock_takes_no_time(good):
    (job,) = reproduce.find_jobs([], "quick", True, {}, timeout_s=100)
    job.folder.mkdir(parents=True)
    job.process, job.looked = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE), 0
    (job.folder / ".waits123").touch()
    assert not job.is_over() and job.seconds == 0  # though nobody looked since the machine started
    (job.folder / ".waits123").unlink()
    job.looked -= 5
    assert not job.is_over() and 5 <= job.seconds < 60
    job.process.communicate()


def test_runs_after_a_first_one(checkout, write_notebook, good, capfd):
    """Resumed, published and failing ones in turn: every start of a notebook takes seconds."""
    # Nothing is done yet: --resume runs all, and all that ran is published.
    assert reproduce.main(["--publish", "--resume"]) == 0
    reference = checkout / "results" / "reference"
    assert {file.name for file in (reference / "good").iterdir()} == {"run.json", "claims.csv"}
    assert "Title of good" in (reference / "index.html").read_text()
    # --resume skips what is done with the same inputs, and only that.
    first = run_file(checkout, "good")
    assert reproduce.main(["--resume"]) == 0
    assert "kept" in capfd.readouterr().out and run_file(checkout, "good") == first
    (checkout / "data" / "new.csv").write_text("a\n1\n")
    assert reproduce.main(["--resume"]) == 0
    assert run_file(checkout, "good")["inputs"] != first["inputs"]
    # Results are published only when all ran.
    write_notebook("bad", "1 / 0")
    assert reproduce.main(["--publish", "--resume"]) == 1
    assert "not published: bad" in capfd.readouterr().out and not (reference / "bad").exists()
    # A failed run leaves nothing of the one before.
    assert (checkout / "results/quick/good/claims.csv").exists() and "figures" in run_file(checkout, "good")
    write_notebook("good", "raise ValueError('now it fails')")
    assert reproduce.main(["--only", "good"]) == 1
    assert run_file(checkout, "good")["status"] == "failed" and "figures" not in run_file(checkout, "good")
    assert not (checkout / "results/quick/good/claims.csv").exists()


def test_a_fingerprint_leaves_out_what_others_are_writing(checkout, good):
    (job,) = reproduce.find_jobs([], "quick", True, {})
    before = reproduce.fingerprint(job)
    (checkout / "data" / ".rows.csv.1a2b3c4d").write_text("half a fi")
    assert reproduce.fingerprint(job) == before


def test_resume_notices_code_parameters_and_source(checkout, write_notebook, good, monkeypatch):
    def now(**given):
        (job,) = reproduce.find_jobs([], "quick", True, given)
        return reproduce.fingerprint(job)

    before = now()
    assert before == now() != now(profile="paper")
    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "CODE", checkout)
        assert now() != before
    write_notebook("good", "pass")
    assert now() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "rnus=3"], "Expected parameters of good: ['profile', 'runs']. Got ['rnus']"),
        (["-p", "runs"], "KEY=VALUE"),
        (["--only", "god"], "Got ['god']"),
        (["--profile", "huge"], "invalid choice"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_runs(checkout, write_notebook, capsys, arguments, message):
    write_notebook("good", parameters='profile = "quick"\nruns = 1  # count\n')
    with pytest.raises(SystemExit) as refused:
        reproduce.main(arguments)
    assert refused.value.code == 2 and message in capsys.readouterr().err
    assert not (checkout / "results").exists()


def test_no_notebooks_is_said(checkout, capsys):
    with pytest.raises(SystemExit):
        reproduce.main([])
    assert "Expected notebooks" in capsys.readouterr().err


def test_profile_parameters_go_over_defaults_and_given_ones_over_both(checkout, write_notebook):
    write_notebook("one", parameters='profile = "quick"\nlive = True\nruns = 1\nsizes = [\n    1,\n    2,\n]\n')
    write_notebook("two", parameters='profile = "quick"\n')
    folder = checkout / "notebooks" / "params" / "paper"
    folder.mkdir(parents=True)
    (folder / "one.yaml").write_text("runs: 100\nsizes: [7, 9]\n")
    one, two = reproduce.find_jobs([], "paper", False, {})
    assert one.parameters == {"profile": "paper", "live": False, "runs": 100, "sizes": [7, 9]}
    assert two.parameters == {"profile": "paper"} and not two.live
    (one,) = reproduce.find_jobs(["on*"], "paper", True, {"runs": 3})
    assert one.parameters["runs"] == 3 and one.live
    assert reproduce.find_jobs(["one"], "quick", True, {})[0].parameters == {"profile": "quick", "live": True}
    (folder / "two.yaml").write_text("epochs: 3\n")
    with pytest.raises(ValueError, match="Expected parameters of two.*epochs"):
        reproduce.find_jobs([], "paper", True, {})


def test_live_notebooks_never_share_the_machine(checkout, write_notebook, capfd):
    stamp = "import json, time; a = time.monotonic(); time.sleep(0.5); "  # a clock that all processes share
    stamp += "open({name!r}, 'w').write(json.dumps([a, time.monotonic()])); "
    stamp += "open('results/quick/{name}/run.json', 'w').write('{{}}')"  # as report.save does; it imports much
    live = 'profile = "quick"\nlive = True\n'
    for name, parameters in {"a": live, "b": 'profile = "quick"\n', "c": live, "d": 'profile = "quick"\n'}.items():
        write_notebook(name, stamp.format(name=name), parameters=parameters)
    assert reproduce.main(["--jobs", "3"]) == 0
    spans = {name: json.loads((checkout / name).read_text()) for name in "abcd"}
    for name in "ac":
        others = [span for other, span in spans.items() if other != name]
        assert all(end <= spans[name][0] or begin >= spans[name][1] for begin, end in others)
    assert [line.split(":")[0] for line in capfd.readouterr().out.splitlines()[:2]] == ["b", "d"]


def test_list_names_every_notebook(checkout, good, capsys):
    assert reproduce.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == ["good", "Title", "of", "good"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_kernel_and_still_shows_the_table(checkout, write_notebook, number):
    write_notebook("slow", "import os; open('pid', 'w').write(str(os.getpid()))", "import time; time.sleep(600)")
    write_notebook("zz_next", "pass")
    command = [sys.executable, HOUSE / "notebooks" / "reproduce.py"]  # from wherever one is
    environment = os.environ | {"PYTHONPATH": str(HOUSE)}
    heard = functools.partial(signal.signal, number, signal.SIG_DFL)  # what a shell starts with "&" ignores Ctrl-C
    runner = subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=heard
    )
    deadline = time.monotonic() + 60
    while not (checkout / "pid").exists() or not (checkout / "pid").read_text():
        assert time.monotonic() < deadline and runner.poll() is None
        time.sleep(0.1)
    runner.send_signal(number)
    out, _ = runner.communicate(timeout=90)
    assert runner.returncode == 1 and "not run" in out and run_file(checkout, "slow")["error"] == "interrupted"
    assert is_gone(int((checkout / "pid").read_text()))
