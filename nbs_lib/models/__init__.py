"""The networks by name: CIFAR forms for (N, 3, 32, 32), a file per family, and ImageNet forms from torchvision."""

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from nbs_lib.models.torchvision_ops import ensure_torchvision

ensure_torchvision()  # before anything that imports torchvision

from torchvision import models as imagenet  # noqa: E402

from nbs_lib.models.mobilenet import mobilenet_v2_cifar  # noqa: E402
from nbs_lib.models.mobilenet_v1 import mobilenet_v1  # noqa: E402
from nbs_lib.models.resnet import resnet18_cifar, resnet20, resnet32, resnet50_cifar, resnet56  # noqa: E402
from nbs_lib.models.vgg import vgg16_cifar  # noqa: E402
from nbs_lib.paths import reading  # noqa: E402

CIFAR = (vgg16_cifar, resnet18_cifar, resnet50_cifar, mobilenet_v2_cifar, resnet20, resnet32, resnet56)
IMAGENET = (imagenet.vgg16, imagenet.vgg16_bn, imagenet.resnet18, imagenet.resnet50, imagenet.mobilenet_v2)
IMAGENET += (imagenet.mobilenet_v3_large, imagenet.efficientnet_b0, imagenet.mnasnet1_0)
MODELS: dict[str, Callable[..., nn.Module]] = {make.__name__: make for make in (*CIFAR, *IMAGENET, mobilenet_v1)}

HOLDERS = ("state_dict", "model_state_dict", "model", "net")  # where training checkpoints keep the weights
PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")


def build(name: str, **options) -> nn.Module:
    """A new network of `MODELS`; `num_classes`, and `width` (CIFAR, MobileNet-V1) or `weights` (ImageNet), go to its
    factory.

    Raises KeyError, with the known names, for another name."""
    if name not in MODELS:
        raise KeyError(f"Expected a model's name, one of {', '.join(MODELS)}. Got {name!r}.")
    return MODELS[name](**options)


def load_checkpoint(model: nn.Module, path: str | Path) -> nn.Module:
    """Load weights: a state_dict of torch's or in safetensors, or a training checkpoint that holds one, with or without
    the prefixes that wrappers put before names ("module.", "_orig_mod.").

    Returns the model. Raises FileNotFoundError, and ValueError naming the file where it holds other weights."""
    if not (path := Path(path).expanduser()).exists():
        raise FileNotFoundError(f"Expected a checkpoint. Got {path}, which is not there.")
    with reading(path, f"a checkpoint of {type(model).__name__}"):
        read = safetensors.torch.load_file if path.suffix == ".safetensors" else partial(torch.load, weights_only=True)
        state = read(path, "cpu")
        while held := next((state[key] for key in HOLDERS if isinstance(state.get(key), dict)), None):
            state = held
        own = model.state_dict()
        found = OrderedDict((k if k in own else PREFIXES.sub("", k), tensor) for k, tensor in state.items())
        found._metadata = getattr(state, "_metadata", own._metadata)  # versions of modules: safetensors has none
        model.load_state_dict(found)
    return model
