import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import nbs_lib.models.torchvision_ops as torchvision_ops
from nbs_lib.models import MODELS, build, load_checkpoint

SMALL = ["vgg16_cifar", "resnet18_cifar", "resnet50_cifar", "mobilenet_v2_cifar", "resnet20", "resnet32", "resnet56"]


@pytest.mark.parametrize("name", SMALL)
def test_cifar_forms_run_at_any_width(name):
    model = build(name, num_classes=7, width=0.25).eval()
    with torch.no_grad():
        assert model(torch.randn(3, 3, 32, 32)).shape == (3, 7)
        assert model(torch.randn(1, 3, 40, 33)).shape == (1, 7)
    whole = sum(p.numel() for p in build(name).parameters())
    assert sum(p.numel() for p in model.parameters()) < whole / 4


def parameters(name, **options):
    return sum(p.numel() for p in build(name, **options).parameters())


def test_sizes_are_the_published_ones():
    assert parameters("resnet20") == 269_722  # He et al. 2016, table 6: 0.27 M
    assert parameters("resnet32") == 464_154  # 0.46 M
    assert parameters("resnet56") == 853_018  # 0.85 M
    assert parameters("resnet18") == 11_689_512
    assert parameters("resnet50") == 25_557_032
    assert parameters("mobilenet_v2") == 3_504_872
    assert parameters("mobilenet_v1") == 4_231_976  # Howard et al. 2017, table 4: 4.2 M
    # The CIFAR forms differ from ImageNet's in the stem's kernel (3x3) and in the number of classes only.
    assert parameters("resnet18_cifar", num_classes=1000) == 11_689_512 - 64 * 3 * (49 - 9)
    assert parameters("resnet50_cifar", num_classes=1000) == 25_557_032 - 64 * 3 * (49 - 9)
    assert parameters("mobilenet_v2_cifar", num_classes=1000) == 3_504_872


def maps(model, size):
    """Output sizes of all convolutions for one square image."""
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    return seen


def test_cifar_forms_keep_large_maps():
    assert maps(build("resnet18_cifar", width=0.25), 32)[:6] == [32, 32, 32, 32, 32, 16]
    assert maps(build("mobilenet_v2_cifar", width=0.25), 32)[:8] == [32] * 8
    assert maps(build("mobilenet_v2_cifar", width=0.25), 32)[-1] == 4
    assert maps(build("vgg16_cifar", width=0.25), 32) == [32] * 2 + [16] * 2 + [8] * 3 + [4] * 3 + [2] * 3


@pytest.mark.parametrize("depth", [20, 32, 56])
def test_resnets_have_the_keys_of_the_public_checkpoints(depth):
    state = build(f"resnet{depth}").state_dict()
    assert state["conv1.weight"].shape == (16, 3, 3, 3)
    assert state["layer1.0.conv1.weight"].shape == (16, 16, 3, 3)
    assert state[f"layer3.{depth // 6 - 1}.bn2.running_var"].shape == (64,)
    assert f"layer3.{depth // 6}.bn2.running_var" not in state
    assert state["linear.weight"].shape == (10, 64)
    assert len(state) == (depth - 1) * 6 + 2
    assert not [key for key in state if "downsample" in key]


def test_option_a_shortcut_subsamples_and_pads_both_sides():
    shortcut = build("resnet20").layer2[0].downsample
    x = torch.randn(2, 16, 7, 9)
    y = shortcut(x)
    assert y.shape == (2, 32, 4, 5)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_imagenet_forms_are_torchvisions():
    assert list(build("resnet18").state_dict())[0] == "conv1.weight"
    assert build("mobilenet_v2", num_classes=5).classifier[1].out_features == 5
    with pytest.raises(KeyError, match="NO_SUCH_WEIGHTS"):  # torchvision reads them
        build("resnet18", weights="NO_SUCH_WEIGHTS")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(KeyError, match="Expected a model's name, one of vgg16_cifar, .*resnet50.*Got 'resnet9'"):
        build("resnet9")
    assert set(SMALL) < set(MODELS)


FORMS = {
    "plain": lambda state: state,
    "inside": lambda state: {"state_dict": state, "epoch": 7, "best_prec1": 92.6},
    "training": lambda state: {"model": state, "optimizer": {"lr": 0.1}, "rows": []},
    "parallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "both": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_load_in_their_usual_forms(tmp_path, form):
    torch.manual_seed(0)
    trained, model = build("resnet20", width=0.25), build("resnet20", width=0.25)
    trained.bn1.running_mean.uniform_()
    torch.save(FORMS[form](trained.state_dict()), tmp_path / "a.th")
    parameter = model.conv1.weight
    assert load_checkpoint(model, tmp_path / "a.th") is model and model.conv1.weight is parameter
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())


WRONG = {
    "another network": lambda path: torch.save(build("resnet32", width=0.25).state_dict(), path),
    "another width": lambda path: torch.save(build("resnet20", width=0.5).state_dict(), path),
    "a whole module": lambda path: torch.save(build("resnet20", width=0.25), path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "a list": lambda path: torch.save([1, 2], path),
    "a number inside": lambda path: torch.save({"state_dict": 5}, path),
    "nothing": lambda path: path.touch(),
    "text": lambda path: path.write_text("<html>not found</html>"),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_checkpoint_of_the_network_is_named(tmp_path, kind):
    WRONG[kind](tmp_path / "a.th")
    with pytest.raises(ValueError, match=rf"Expected a checkpoint of Sequential. Got {tmp_path / 'a.th'}: "):
        load_checkpoint(build("resnet20", width=0.25), tmp_path / "a.th")


def test_truncated_and_missing_checkpoints_are_named(tmp_path):
    model, path = build("resnet20", width=0.25), tmp_path / "a.th"
    with pytest.raises(FileNotFoundError, match=f"Expected a checkpoint. Got {path}, which is not there"):
        load_checkpoint(model, path)
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=f"Expected a checkpoint of Sequential. Got {path}: "):
        load_checkpoint(model, path)


def python(code, *paths):
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, paths), root])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_torchvision_imports_after_a_first_failure():
    code = """
try:
    import torchvision
except RuntimeError:
    pass  # a PyTorch build that torchvision's compiled operators do not fit
import nbs_lib.models
from nbs_lib.models.torchvision_ops import ensure_torchvision
ensure_torchvision()
import torchvision
assert torchvision.models.resnet18 is nbs_lib.models.MODELS["resnet18"]
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


OPERATORS = f"import runpy; ensure = runpy.run_path({torchvision_ops.__file__!r})['ensure_torchvision']\n"


def fake_torchvision(folder, body):
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(body)
    (package / "part.py").write_text("import builtins\nbuiltins.tries = getattr(builtins, 'tries', 0) + 1\n")


def test_missing_operators_are_declared_once_and_halves_of_modules_are_dropped(tmp_path):
    body = """
import torch
from torchvision import part
for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
        raise RuntimeError(f"operator torchvision::{name} does not exist")
"""
    fake_torchvision(tmp_path, body)
    check = """
import builtins, gc, torch
ensure(); gc.collect(); ensure()
import torchvision
assert builtins.tries == 2, builtins.tries
assert torch.ops.torchvision.nms.default._schema.arguments[2].name == "iou_threshold"
"""
    result = python(OPERATORS + check, tmp_path)
    assert result.returncode == 0, result.stderr


def test_other_import_errors_are_not_hidden(tmp_path):
    fake_torchvision(tmp_path, "raise RuntimeError('something else')\n")
    result = python(OPERATORS + "ensure()", tmp_path)
    assert result.returncode == 1 and result.stderr.strip().endswith("RuntimeError: something else")


def test_a_checkpoint_in_safetensors_needs_no_versions_of_modules(tmp_path):
    torch.manual_seed(0)
    model = build("mnasnet1_0", num_classes=3)  # refuses weights that do not say of which version it is
    safetensors.torch.save_file(model.state_dict(), tmp_path / "m.safetensors")
    other = load_checkpoint(build("mnasnet1_0", num_classes=3), tmp_path / "m.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
