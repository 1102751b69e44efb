"""The families users bring: torchvision's networks on small odd images, dense and pruned, against PyTorch.

A few run always; `NBS_TEST_ALL=1` runs every family both ways.
"""

from __future__ import annotations

import os

import pytest
import torch
from naive import agrees, scramble
from torch import nn

from nbs_lib.models import imagenet
from nbs_lib.schemes import BlockPunched

FAMILIES = {
    "densenet121": (33, 65),
    "efficientnet_b0": (64, 64),
    "googlenet": (47, 47),
    "mnasnet0_5": (33, 65),
    "mobilenet_v2": (33, 33),
    "mobilenet_v3_small": (33, 33),
    "regnet_y_400mf": (33, 65),
    "resnet18": (47, 33),
    "resnet50": (33, 33),
    "resnext50_32x4d": (33, 33),
    "shufflenet_v2_x0_5": (64, 64),
    "squeezenet1_1": (33, 65),
    "vgg11": (32, 32),
}
ALWAYS = {
    "dense": {"squeezenet1_1"},
    "pruned": {"mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5"},
}


def build(name: str) -> nn.Module:
    """A torchvision network with random weights and statistics, and an odd number of classes."""
    torch.manual_seed(0)
    options = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    return scramble(getattr(imagenet, name)(weights=None, num_classes=17, **options))


def punch(model: nn.Module, rate: float) -> set[str]:
    """Prune the weights of all but stems and depthwise layers, with the scheme alone; gives the layers' names."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels // module.groups >= 4:
            weight = module.weight.data
            weight *= torch.from_numpy(BlockPunched(8, 4).project(weight.numpy(), rate, groups=module.groups))
            names.add(name)
    return names


@pytest.mark.parametrize("kind", ALWAYS)
@pytest.mark.parametrize(("name", "size"), FAMILIES.items())
def test_family(name, size, kind):
    if name not in ALWAYS[kind] and not os.environ.get("NBS_TEST_ALL"):
        pytest.skip("only with NBS_TEST_ALL=1")
    model = build(name)
    punched = punch(model, 4) if kind == "pruned" else set()
    net = agrees(model, torch.randn(2, 3, *size), tolerance=1e-4)
    assert net.fallback_macs == 0
    table = net.explain().query("op == 'conv2d' and layer in @punched")
    assert set(table.layer) == punched and (table.chosen == "sparse").all() and net.functions < 70
