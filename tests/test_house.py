"""The house itself: import order, registries, one list of dependencies, its size, and the two commands."""

import ast
import importlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch.nn import Linear

import nbs_lib as nbs

HOUSE = Path(__file__).resolve().parent.parent
LIBRARY = HOUSE / "nbs_lib"
MODULES = sorted(LIBRARY.rglob("*.py"))
NOTEBOOKS = sorted((HOUSE / "notebooks").glob("*.ipynb"))
BESIDE = sorted((HOUSE / "notebooks").rglob("*.py"))  # their runner, its page, and what belongs to one each

# A module imports only from its own room and from rooms above it.
ROOMS = ["paths", "models", "data", "train", "layers", "schemes", "pruning", "formats", "clock", "kernels", "compiler"]
ROOMS += ["measure", "latency", "mapping", "trained", "nps", "report"]
# Who may import torch.
TORCH = {
    "models",
    "data",
    "train",
    "layers",
    "pruning",
    "compiler",
    "measure/testnets.py",
    "latency/settings.py",
    "mapping/evaluate.py",
    "mapping/policy.py",
    "trained",
}


def room_of(file):
    return file.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imports_of(file):
    """Dotted names a module imports, at any depth of its code; relative ones made absolute."""
    package = list(file.relative_to(HOUSE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(LIBRARY)))
def test_a_module_imports_only_from_rooms_above_it(file):
    if file == LIBRARY / "__init__.py":
        return  # the façade: it loads any room on first use
    assert room_of(file) in ROOMS, f"Expected a room of {ROOMS}. Got {room_of(file)}."
    allowed = ROOMS[: ROOMS.index(room_of(file)) + 1]
    for name in imports_of(file):
        if name != "nbs_lib.__version__" and (name == "nbs_lib" or name.startswith("nbs_lib.")):
            assert name.count(".") and name.split(".")[1] in allowed, f"Expected imports from {allowed}. Got {name}."
        if name.split(".")[0] in ("torch", "torchvision"):
            assert {room_of(file), str(file.relative_to(LIBRARY))} & TORCH, f"Expected torch only in {TORCH}."


def test_importing_the_library_loads_no_heavy_room():
    code = "import sys, nbs_lib; sys.exit(bool({'torch', 'numba', 'pandas', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=HOUSE).returncode == 0


def test_public_names_mean_the_same_after_their_rooms_have_loaded():
    code = "import nbs_lib.report, nbs_lib.measure, nbs_lib as nbs, sys\n"
    code += "sys.exit([name for name in nbs.__all__ if not name.startswith('_') and not callable(getattr(nbs, name))])"
    done = subprocess.run([sys.executable, "-c", code], cwd=HOUSE, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


REGISTRIES = {  # registry -> how a user asks for an entry; None where the dict itself is read
    "schemes.SCHEMES": lambda name: importlib.import_module("nbs_lib.schemes").parse(name),
    "pruning.ALGORITHMS": lambda name: nbs.prune(Linear(2, 2), {}, algorithm=name),
    "formats.FORMATS": None,
    "measure.DEVICES": lambda name: nbs.measure(len, device=name, x=np.zeros(3)),
    "models.MODELS": lambda name: importlib.import_module("nbs_lib.models").build(name),
}


@pytest.mark.parametrize("registry", REGISTRIES)
def test_a_registry_is_a_plain_dict_whose_door_lists_it(registry):
    module, name = registry.rsplit(".", 1)
    known = getattr(importlib.import_module(f"nbs_lib.{module}"), name)
    assert type(known) is dict and known
    assert all(re.fullmatch(r"[a-z0-9_:]+", key) for key in known)
    if REGISTRIES[registry]:
        with pytest.raises(KeyError) as refused:
            REGISTRIES[registry]("nope")
        assert "nope" in str(refused.value) and all(key in str(refused.value) for key in known)


def lines_of_code(file):
    """Lines that hold code: docstrings, comments and blank lines explain it and are free."""
    source = file.read_text()
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in skipped]
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        owns_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if owns_docstring and ast.get_docstring(node) is not None:
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(code)


def test_lines_of_code_leave_out_what_explains(tmp_path):
    (file := tmp_path / "a.py").write_text(
        '"""Doc\nstring."""\n\nx = """a\nb"""  # two\n\n\n# why\ndef f():\n    "d"\n'
    )
    assert lines_of_code(file) == 3


def test_the_library_stays_thin():
    assert sum(map(lines_of_code, MODULES)) < 6000
    assert {
        str(file): len(file.read_text().splitlines())
        for file in [*MODULES, *BESIDE]
        if file.read_text().count("\n") > 300
    } == {}


def texts():
    """Every text file of the checkout that git would take, but this one."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=HOUSE, capture_output=True, text=True, check=True
    )
    names = [name for name in listed.stdout.split("\n") if re.search(r"\.(py|md|sh|toml|yml|yaml|txt|ipynb)$", name)]
    return {name: (HOUSE / name).read_text() for name in names if (HOUSE / name).is_file()}


@pytest.mark.skipif(not (HOUSE / ".git").exists(), reason="not a git checkout")
def test_no_unfinished_business():
    words = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error", r"\.\./" + "shared"]))
    assert {name: words.findall(text) for name, text in texts().items() if words.search(text)} == {}


def test_ruff_is_content():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=HOUSE, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def project():
    return tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower()


def test_environment_yml_equals_pyproject():
    environment = yaml.safe_load((HOUSE / "environment.yml").read_text())
    assert environment["name"] == project()["name"]
    wanted = sorted(project()["dependencies"] + project()["optional-dependencies"]["test"])
    listed = [re.sub(r"^pytorch\b", "torch", line) for line in environment["dependencies"]]
    assert sorted(line for line in listed if not line.startswith("python=")) == wanted
    assert "python=" + project()["requires-python"].removeprefix(">=") in listed


def test_constraints_pin_every_dependency_exactly():
    lines = [line for line in (HOUSE / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    pinned = {name.lower().replace("_", "-") for name in pins}
    wanted = project()["dependencies"] + project()["optional-dependencies"]["test"]
    assert {name_of(line) for line in wanted} <= pinned
    assert (pins["torch"], pins["torchvision"]) == ("2.13.0", "0.28.0")


def test_every_third_party_import_is_a_dependency():
    imported_as = {"pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn"}
    listed = {imported_as.get(name, name) for name in (name_of(line) for line in project()["dependencies"])}
    listed.add("llvmlite")  # numba brings it
    used = {name.split(".")[0] for file in [*MODULES, *BESIDE] for name in imports_of(file)}
    used -= set(sys.stdlib_module_names) | {"nbs_lib", *(file.stem for file in BESIDE)}
    assert used - listed == set()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_committed_clean(notebook):
    content = json.loads(notebook.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    cells = content["cells"]
    assert all(cell.get("id") for cell in cells)
    assert cells[0]["cell_type"] == "markdown" and "".join(cells[0]["source"]).startswith("# ")
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert all(len("".join(cell["source"]).splitlines()) <= 30 for cell in code), (
        "Expected short cells: logic is in nbs_lib"
    )
    assert not any("def " in line[:4] for cell in code for line in cell["source"])
    (tagged,) = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    lines = ast.parse("".join(tagged["source"])).body
    values = {line.targets[0].id: ast.literal_eval(line.value) for line in lines}
    assert values["profile"] == "quick" and values.get("live", True) is True
    assert f'save("{notebook.stem}", profile' in "".join(code[-1]["source"]), (
        "Expected the last cell to save the results"
    )


def test_parameter_files_belong_to_notebooks():
    files = sorted((HOUSE / "notebooks" / "params").glob("*/*"))
    assert all(file.parent.name in ("quick", "cifar", "paper") and file.suffix == ".yaml" for file in files)
    assert {file.stem for file in files} <= {notebook.stem for notebook in NOTEBOOKS}


# The two commands, with programs that only pretend: what reproduce.sh decides, in milliseconds.

PYTHON = """#!/bin/sh
echo "$0 $*" >> "$CALLS"
case "$*" in
*version_info*) [ -z "$IS_OLD" ] ;;
--version) echo "Python 3.8.2" ;;
*base_executable*) echo "$0" ;;
"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
"-m pip"*) [ -z "$PIP_FAILS" ] || { echo "ERROR: the well is dry"; exit 1; } ;;
"- "*) echo "$CONDA_LACKS" ;;
esac
"""
TOOLS = ["bash", "dirname", "cat", "cksum", "awk", "grep", "tail", "head", "touch", "rm", "cp", "mkdir", "sh", "flock"]


@pytest.fixture
def commands(tmp_path):
    """A checkout with the two commands and a PATH with nothing but pretended programs; call it to run one."""
    house, tools = tmp_path / "house", tmp_path / "tools"
    (house / ".ci").mkdir(parents=True)
    tools.mkdir()
    for name in ("reproduce.sh", "pyproject.toml", "constraints.txt", ".ci/run"):
        shutil.copy(HOUSE / name, house / name)
    for name in filter(shutil.which, TOOLS):
        (tools / name).symlink_to(shutil.which(name))
    for name, text in {"python3": PYTHON, "df": "#!/bin/sh\necho; echo / 9 9 ${FREE_KB:-99999999} 1% /\n"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(*arguments, script="reproduce.sh", **settings):
        calls.write_text("")
        environment = {"PATH": str(tools), "CALLS": str(calls)} | {key: str(value) for key, value in settings.items()}
        done = subprocess.run([house / script, *arguments], env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr.strip().splitlines(), calls.read_text()

    run.house, run.tools = house, tools
    return run


def test_first_run_sets_up_and_second_installs_nothing(commands):
    status, said, calls = commands("--only", "00_tour")
    assert status == 0 and len(said) == 2
    assert "-m pip install" in calls and "-c constraints.txt -e .\n" in calls
    assert calls.endswith(".venv/bin/python notebooks/reproduce.py --only 00_tour\n")
    status, said, calls = commands()
    assert (status, said) == (0, []) and "pip" not in calls and "venv --clear" not in calls


def test_the_test_command_adds_its_extra_once(commands):
    assert "-e .[test]" in commands("test", "-x", "tests/test_house.py")[2]
    status, said, calls = commands(script=".ci/run")
    assert (status, said) == (0, []) and calls.endswith("-m pytest -q -n 2 --dist worksteal\n") and "pip" not in calls
    assert "pip" not in commands()[2]  # the test set-up has all of the main one


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_changed_list_is_installed_into_the_same_environment(commands, changed):
    commands()
    with (commands.house / changed).open("a") as file:
        file.write("# changed\n")
    calls = commands()[2]
    assert "-m pip install" in calls and "venv --clear" not in calls


def test_an_interrupted_set_up_is_made_anew(commands):
    status, said, _ = commands(PIP_FAILS=1)
    assert status == 1 and "the well is dry" in said[-1] and not any("Traceback" in line for line in said)
    calls = commands()[2]
    assert "-m venv --clear .venv" in calls and "-m pip install" in calls
    assert "pip" not in commands()[2]


def test_somebody_elses_venv_is_kept(commands):
    (commands.house / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(commands.tools / "python3", commands.house / ".venv/bin/python")
    calls = commands()[2]
    assert "-m pip install" in calls and "venv --clear" not in calls


def test_an_old_python_none_and_no_disk_are_one_clear_line(commands):
    status, said, _ = commands(IS_OLD=1)
    assert status == 1 and len(said) == 1 and "Expected Python 3.11 or newer. Got Python 3.8.2" in said[0]
    status, said, _ = commands(PYTHON="/nowhere/python")
    assert status == 1 and len(said) == 1 and "Got none" in said[0]
    status, said, _ = commands(FREE_KB=1024)
    assert status == 1 and len(said) == 1 and "Expected 3 GB free for the first set-up. Got 1 MB" in said[0]
    (commands.tools / "python3").unlink()
    status, said, _ = commands()
    assert status == 1 and len(said) == 1 and "Got none on PATH" in said[0]
    assert not (commands.house / ".venv").exists()


def test_a_conda_environment_is_used_when_it_has_everything(commands, tmp_path):
    (tmp_path / "conda" / "bin").mkdir(parents=True)
    shutil.copy(commands.tools / "python3", tmp_path / "conda/bin/python")
    status, said, calls = commands("test", CONDA_PREFIX=tmp_path / "conda")
    assert (status, said) == (0, []) and "pip" not in calls
    assert calls.endswith("conda/bin/python -m pytest -q -n 2 --dist worksteal\n")
    status, said, calls = commands(CONDA_PREFIX=tmp_path / "conda", CONDA_LACKS="torch>=2")
    assert "lacks torch>=2: using .venv" in said[0] and "-m pip install" in calls


def test_scripts_are_executable():
    for name in ("reproduce.sh", ".ci/run"):
        assert (HOUSE / name).stat().st_mode & stat.S_IXUSR and os.access(HOUSE / name, os.X_OK)
