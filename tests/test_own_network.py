"""A network the project has never seen, through notebooks/own_network.ipynb; finding networks; the words at the end."""

import json
import pickle
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import nbs_lib as nbs
from nbs_lib import latency
from nbs_lib.latency import NoData
from nbs_lib.models import build, load_checkpoint
from nbs_lib.pruning import load_pruned
from notebooks.beside import own_network as advice
from notebooks.beside.own_network import find_model, parameter

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "own_network.ipynb"
ODD = '''
import torch
from torch import nn

class Odd(nn.Module):
    """Branches, a concatenation, odd channel counts, a layer used twice, and an operator without a kernel."""

    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 13, 3, padding=1)
        self.left, self.right = nn.Conv2d(13, 7, 1), nn.Conv2d(13, 12, 3, padding=1, bias=False)
        self.norm, self.twice = nn.BatchNorm2d(12), nn.Conv2d(19, 19, 3, padding=1)
        self.deep, self.head = nn.Conv2d(19, 19, 5, padding=2, groups=19), nn.Linear(19, classes)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.cat([self.left(x).sinh(), torch.relu(self.norm(self.right(x)))], 1)
        x = self.deep(torch.relu(self.twice(torch.relu(self.twice(x)))))
        return self.head(x.mean((2, 3)))

def make(classes=3, broken=False):
    if broken:
        raise RuntimeError("the drawer is empty")
    return Odd(classes)

def no_module():
    return 7

number = 3
'''


class Fake:
    """A latency model without measurements: large blocks are fast; `right` was never measured."""

    rows, cpu = pd.DataFrame({"ms": [1.0]}), "a CPU"

    @staticmethod
    def build(*_args, **_options):
        return Fake()

    def layer_ms(self, layer, choices):
        if layer.name == "right":
            raise NoData("Expected a layer that was measured. Got right.")
        return np.array([1 + 1 / (getattr(c.scheme, "p", 64) * getattr(c.scheme, "q", 64)) for c in choices])

    def predict(self, graph, mapping):
        return 1e6


@pytest.fixture
def odd(tmp_path):
    """The file of a network, and the network."""
    (file := tmp_path / "odd_network.py").write_text(ODD)
    torch.manual_seed(0)
    return file, find_model(f"{file}:make")


@pytest.fixture
def pictures(tmp_path, rng):
    """Three classes of grey values, 8 x 8 pixels."""
    for part, count in (("train", 20), ("val", 10)):
        for label in range(3):
            (folder := tmp_path / "pictures" / part / f"class{label}").mkdir(parents=True)
            for number in range(count):
                image = rng.integers(80 * label, 80 * label + 80, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs the notebook's cells here, up to the cell `until`; its names."""
    monkeypatch.setenv("NBS_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(latency, "LatencyModel", Fake)
    monkeypatch.syspath_prepend(tmp_path)
    threads, cells = torch.get_num_threads(), json.loads(NOTEBOOK.read_text())["cells"]

    def run(until="save", **given):
        names = {}
        small = {
            "dense_epochs": 0,
            "epochs": 1,
            "retrain_epochs": 1,
            "rounds": 2,
            "rate": 2.0,
            "options": {},
            "size": 0,
        }
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
            if cell["id"] == "parameters":
                assert set(given) <= set(names)
                names |= small | given
            if cell["id"] == until:
                return names

    yield run
    torch.set_num_threads(threads)
    plt.close("all")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_network_never_seen_is_mapped_trained_compiled_and_explained(run, odd, pictures, tmp_path, capsys, wrapped):
    file, model = odd
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "weights.pth")
    network = f"{file}:make" if wrapped else "odd_network:make"
    data = f"folder:{pictures}" if wrapped else str(pictures)
    names = run(network=network, checkpoint=str(tmp_path / "weights.pth"), data=data, resume=str(tmp_path / "resume"))
    folder = tmp_path / "results" / "quick" / "own_network"
    written = {"mapping.json", "model.safetensors", "masks.json", "masks.safetensors", "table.csv", "table_next.csv"}
    assert written | {"table_layers.csv", "figure.png", "figure.svg", "run.json"} <= {f.name for f in folder.iterdir()}
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]
    mapping = nbs.Mapping.load(folder / "mapping.json")
    assert set(mapping) == {"left", "twice", "head"}  # not the stem, the depthwise layer, nor what was never measured
    reasons = mapping.report().set_index("layer").reason
    assert (
        "never" not in reasons["left"] and "was measured. Got right" in reasons["right"] and "stem" in reasons["stem"]
    )
    pruned, image = find_model(f"{file}:make").eval(), torch.randn(1, 3, 8, 8)
    masks = load_pruned(folder, pruned)
    assert masks.rate == pytest.approx(2, rel=0.2) and not pruned.twice.weight[~masks["twice"]].any()
    torch.testing.assert_close(nbs.compile(pruned, image)(image), pruned(image).detach(), rtol=0, atol=1e-4)
    table = pd.read_csv(folder / "table.csv").set_index("label")
    assert list(table.index) == ["PyTorch", "dense", "rule", "block_punched(8x4)", "unstructured", "filter"]
    assert table.median_ms.notna().all() and table.accuracy.between(0, 1).all()
    assert table.accuracy["rule"] == nbs.evaluate(pruned, names["loaded"], progress=False)
    said = capsys.readouterr().out
    assert "Accuracy: " in said and "sinh (1x)" in said and "no data for: right" in said
    assert "predicted" in said  # 1e6 ms, by the fake


def test_without_data_it_is_about_latency(run, odd, tmp_path, capsys):
    file, _ = odd
    run(network=f"{file}:make", data="", size=9, options={"classes": 5})
    said = capsys.readouterr().out
    assert "No data were given" in said and "The weights are random" in said and "Time: " in said
    assert pd.read_csv(tmp_path / "results/quick/own_network/table.csv").accuracy.isna().all()


def test_without_a_latency_model_uniform_schemes_stand_alone(run, odd, monkeypatch, capsys):
    def lacking(*_args, **_options):
        raise NoData("Expected at least 16 measured settings. Got 3.")

    monkeypatch.setattr(Fake, "build", lacking)
    names = run(until="next", network=f"{odd[0]}:make", data="", size=9, ignored_layers=["head"])
    assert names["chosen"] == "block_punched(8x4)" and "head" not in names["mappings"]["unstructured"]
    assert "No rule-based mapping yet" in capsys.readouterr().out


def test_a_rule_without_data_for_any_layer_is_left_out(run, odd, monkeypatch, capsys):
    def refuses(self, layer, choices):
        raise NoData(f"Expected a measured layer. Got {layer.name}.")

    monkeypatch.setattr(Fake, "layer_ms", refuses)
    names = run(until="next", network=f"{odd[0]}:make", data=None, size=9)
    assert list(names["mappings"]) == ["block_punched(8x4)", "unstructured", "filter"]
    assert "data for none of the layers. Expected a measured layer. Got left." in capsys.readouterr().out


def test_another_device_times_ours_alone(run, odd, capsys):
    names = run(until="next", network=f"{odd[0]}:make", data="", size=9, device="simulated")
    assert set(names["table"].provenance) == {"simulated"} and "PyTorch" not in set(names["table"].label)
    assert "as fast as our dense network" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network": "nowhere.to_be:found"}, "network = 'nowhere.to_be:found'.*module that can be imported.*nowhere"),
        ({"network": "/nowhere/net.py:make"}, "network = .*no file /nowhere/net.py"),
        ({"network": "odd_network:made"}, "network = .*Expected a function of odd_network: .*make.*Got 'made'"),
        ({"network": "odd_network:number"}, "network = .*Expected a function of odd_network"),
        ({"network": "odd_network:no_module"}, "network = .*torch.nn.Module. Got int"),
        ({"network": "resnet81"}, "network = .*such as resnet.*Got 'resnet81'"),
        ({"options": {"colour": "red"}}, "network = .*Expected options that odd_network:make takes.*colour"),
        ({"options": {"broken": True}}, "network = .*the drawer is empty"),
        ({"options": {"classes": 2}}, "network = .*logits for 3 classes. Got an output of shape \\(1, 2\\)"),
        ({"checkpoint": "/nowhere.pth"}, "checkpoint = .*nowhere.pth, which is not there"),
        ({"checkpoint": "odd_network.py"}, "checkpoint = .*Expected a checkpoint of Odd"),
        ({"checkpoint": "other.pth"}, "checkpoint = .*Expected a checkpoint of Odd.*Missing key"),
        ({"data": "/nowhere"}, "data = '/nowhere'.*Expected /nowhere to hold train/<class>"),
        ({"device": "toaster"}, "Expected a device out of host, .*Got 'toaster'"),
        ({"threads": 4096}, "threads = 4096.*Expected threads from 1"),
        ({"uniform": [["blocks", ""]]}, "uniform = .*blocks"),
        ({"rate": 1.0}, "rate above 1"),
        ({"beta": -1}, "Expected beta >= 0"),
        ({"task": "odd"}, "Expected a task out of easy, hard"),
        ({"ignored_layers": ["nose"]}, "Expected ignored_layers out of stem"),
    ],
)
def test_a_bad_parameter_is_named_before_anything_is_trained(run, odd, pictures, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    torch.save(build("resnet20").state_dict(), "other.pth")
    with pytest.raises((ValueError, KeyError), match=message):
        run(until="uniform", **{"network": "odd_network:make", "data": str(pictures)} | given)
    assert not (tmp_path / "results").exists()


def test_networks_are_found_by_name():
    assert type(find_model("resnet20", width=0.25)).__name__ == type(build("resnet20")).__name__
    assert isinstance(find_model("torch.nn:Conv2d", in_channels=1, out_channels=1, kernel_size=1), nn.Conv2d)
    assert find_model("squeezenet1_1", num_classes=7).classifier[1].out_channels == 7


@pytest.mark.parametrize(
    "form", ["plain.pt", "nested.th", "wrapped.pth", "deep.pt", "plain.safetensors", "wrapped.safetensors"]
)
def test_checkpoints_of_all_forms_are_loaded(form, tmp_path):
    made, model = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    state = made.state_dict()
    prefix = {"wrapped": "module._orig_mod.", "deep": "module."}.get(form.partition(".")[0], "")
    state = {prefix + name: tensor for name, tensor in state.items()}
    if form.endswith("safetensors"):
        safetensors.torch.save_file(state, tmp_path / form)
    else:
        holders = {"nested": ["model_state_dict"], "wrapped": ["state_dict"], "deep": ["model", "state_dict"]}
        for holder in reversed(holders.get(form.partition(".")[0], [])):
            state = {holder: state, "epoch": 3}
        torch.save(state, tmp_path / form)
    load_checkpoint(model, tmp_path / form)
    assert all(map(torch.equal, model.state_dict().values(), made.state_dict().values()))


def test_a_network_that_names_a_part_module_keeps_its_names(tmp_path):
    made, model = (nn.ModuleDict({"module": nn.Linear(2, 2)}) for _ in range(2))
    torch.save(made.state_dict(), tmp_path / "a.pt")
    assert torch.equal(load_checkpoint(model, tmp_path / "a.pt")["module"].weight, made["module"].weight)


def test_errors_name_their_parameter():
    with pytest.raises(ValueError, match="^Parameter rate = 3: Expected less. Got 3.$"), parameter("rate", 3):
        raise KeyError("Expected less. Got 3.")
    with pytest.raises(ValueError, match="Parameter x = 1: ZeroDivisionError"), parameter("x", 1):
        raise ZeroDivisionError


def test_a_file_may_be_called_as_a_module_of_python(tmp_path):
    (tmp_path / "calendar.py").write_text(ODD + "\n\ndef fails():\n    return len(7)\n")
    made = [find_model(f"{tmp_path}/calendar.py:make") for _ in range(2)]
    assert all(type(pickle.loads(pickle.dumps(model))) is type(model) for model in made)
    with pytest.raises(TypeError, match="^object of type 'int' has no len"):  # its own, not of the options
        find_model(f"{tmp_path}/calendar.py:fails")
    (tmp_path / "half.py").write_text("class Half: pass\nraise RuntimeError('no more')")
    before = set(sys.modules)
    with pytest.raises(ValueError, match="RuntimeError: no more"):
        find_model(f"{tmp_path}/half.py:make")
    assert set(sys.modules) == before


def test_a_run_goes_on_with_its_mapping_when_the_latency_model_has_grown(run, odd, tmp_path, monkeypatch):
    given = {"network": f"{odd[0]}:make", "data": "", "size": 9, "until": "uniform", "resume": str(tmp_path / "kept")}
    first = run(**given)["mappings"]["rule"]
    monkeypatch.setattr(Fake, "layer_ms", lambda self, layer, choices: np.ones(len(choices)))
    names = run(**given)
    assert names["mappings"]["rule"] == first and "right" not in first and "right" in names["unknown"]
    assert "right" in run(**given | {"rate": 3.0})["mappings"]["rule"]  # another question, another mapping


def test_a_network_that_cannot_be_predicted_is_told_why(run, odd, monkeypatch, capsys):
    def refuses(self, graph, mapping):
        raise NoData("Expected a kind of step that was measured. Got sinh.")

    monkeypatch.setattr(Fake, "predict", refuses)
    run(until="next", network=f"{odd[0]}:make", data="", size=9)
    said = capsys.readouterr().out
    assert "cannot predict the whole network under rule, block_punched(8x4)" in said and "Got sinh." in said


def outcome(ms=(4.0, 2.0, 1.0), accuracy=(0.9, 0.9, 0.9), predicted=None, **others):
    labels = ["PyTorch", "dense", "rule", *others]
    rows = {"median_ms": [*ms, *(value[0] for value in others.values())], "error": "", "predicted_ms": predicted}
    rows["accuracy"] = [*accuracy, *(value[1] for value in others.values())]
    return pd.DataFrame({"label": labels} | rows).astype({"predicted_ms": float, "accuracy": float})


def words(table, steps=None, left_dense=False, rate=4.0, chosen="rule", classes=10):
    shapes = [(8, 8, 3, 3), (8, 8, 1, 1)]
    report = pd.DataFrame({"layer": ["a", "b"], "kind": "conv", "shape": shapes, "macs": [900, 100]})
    report["scheme"], report["reason"] = ["dense" if left_dense else "block_punched(8x4)", "filter"], "as it is"
    columns = {"layer": ["a", "", ""], "op": ["conv2d", "torch:sinh", "call"], "chosen": ["sparse", "sparse", "python"]}
    profile = pd.DataFrame(
        columns | {"ms": [3.0, np.nan, 1.0], "macs": [900, 0, 0], "bound": ["memory", "PyTorch", ""]}
    )
    return "\n".join(
        advice.next_steps(table, chosen, profile if steps is None else steps(profile), report, rate, classes)
    )


def test_much_accuracy_lost_asks_for_less_pruning_and_patterns():
    said = words(outcome(accuracy=(0.9, 0.9, 0.85)))
    assert (
        "-5.00 points" in said and "rate = 2" in said and "epochs" in said and "task = 'hard'" in said and "90%" in said
    )
    assert "No gain" not in said and "4.00 times as fast as PyTorch" in said


def test_no_accuracy_lost_leaves_room_and_some_lost_asks_for_epochs():
    assert "rate = 6" in words(outcome()) and "More epochs" in words(outcome(accuracy=(0.9, 0.9, 0.89)))
    assert "No data" in words(outcome(accuracy=(None, None, None)))


def test_a_network_at_chance_is_not_asked_to_be_pruned_further():
    said = words(outcome(accuracy=(0.1, 0.1, 0.11)))
    assert "hardly learnt anything, chance being 10 %" in said and "There is room" not in said
    assert "There is room" in words(outcome(accuracy=(0.1, 0.12, 0.12)), classes=100)
    assert "hardly learnt anything: train" in words(outcome(accuracy=(0.1, 0.05, 0.05)), classes=0)


def test_the_lowest_rate_is_not_advised_again():
    said = words(outcome(accuracy=(0.9, 0.9, 0.8)), rate=1.5)
    assert "try twice the epochs" in said and "rate =" not in said


def test_no_gain_says_where_the_time_is_and_what_was_left_dense():
    said = words(outcome(ms=(4.0, 1.05, 1.0)))
    assert "No gain against dense. The time is in a (75%, conv2d: memory), call (25%" in said and "higher rate" in said
    assert "Layers left dense have 90%" in words(outcome(ms=(0.5, 2.0, 1.9)), left_dense=True)
    assert "No gain against PyTorch." in words(outcome(ms=(1.0, 2.0, 1.0)))


def test_fallbacks_better_mappings_and_wrong_predictions_are_named():
    said = words(outcome(), lambda profile: profile.assign(chosen=["sparse", "torch", "python"]))
    assert "sinh (1x)" in said and "1 of 4 ms" in said and "Through PyTorch" not in words(outcome())
    assert "Faster than rule and no less accurate: filter (0.5 ms)" in words(outcome(filter=(0.5, 0.95)))
    assert "Faster" not in words(outcome(filter=(0.5, 0.5)))
    assert "smaller beta" in words(outcome(filter=(0.5, 0.95)))
    said = words(outcome(filter=(1.0, 0.9)).assign(median_ms=[4.0, 2.0, 0.5, 1.0]), chosen="filter")
    assert "Faster than filter" in said and "beta" not in said
    assert "predicted 2 ms, +100%" in words(outcome(predicted=2.0)) and "predicted" not in words(outcome(predicted=1.1))


def test_times_that_scatter_are_not_trusted():
    table = outcome().assign(mad_ms=[0.1, 0.5, 0.01])
    assert "times scattered (dense by 25%)" in words(table) and "scattered" not in words(table.assign(mad_ms=0.01))


def test_a_failed_measurement_is_said():
    table = outcome(ms=(4.0, 2.0, None)).assign(error="RuntimeError: no")
    assert "No time was taken: RuntimeError: no." in words(table)
