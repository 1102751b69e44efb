"""The networks by name: CIFAR forms for (N, 3, 32, 32), a file per family, and ImageNet forms from torchvision."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nbs_lib.models.torchvision_ops import ensure_torchvision

ensure_torchvision()  # before anything that imports torchvision

from torchvision import models as imagenet  # noqa: E402

from nbs_lib.models.mobilenet import mobilenet_v2_cifar  # noqa: E402
from nbs_lib.models.resnet import resnet18_cifar, resnet20, resnet32, resnet50_cifar, resnet56  # noqa: E402
from nbs_lib.models.vgg import vgg16_cifar  # noqa: E402

CIFAR = (vgg16_cifar, resnet18_cifar, resnet50_cifar, mobilenet_v2_cifar, resnet20, resnet32, resnet56)
IMAGENET = (imagenet.vgg16, imagenet.vgg16_bn, imagenet.resnet18, imagenet.resnet50, imagenet.mobilenet_v2)
MODELS: dict[str, Callable[..., nn.Module]] = {make.__name__: make for make in CIFAR + IMAGENET}


def build(name: str, **options) -> nn.Module:
    """A new network of `MODELS`; `num_classes`, and `width` (CIFAR) or `weights` (ImageNet), go to its factory.

    Raises KeyError, with the known names, for another name."""
    if name not in MODELS:
        raise KeyError(f"Expected a model's name, one of {', '.join(MODELS)}. Got {name!r}.")
    return MODELS[name](**options)


def load_checkpoint(model: nn.Module, path: str | Path) -> nn.Module:
    """Load weights saved by torch: a state_dict, or a training checkpoint that holds one, with or without "module.".

    Returns the model. Raises FileNotFoundError, and ValueError naming the file where it holds other weights."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state.get("model", state))
        model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    except FileNotFoundError:
        raise FileNotFoundError(f"Expected a checkpoint. Got {path}, which is not there.") from None
    except Exception as error:  # whatever torch's unpickler meets in a damaged file
        raise ValueError(f"Expected a checkpoint of {type(model).__name__}. Got {path}: {error}") from error
    return model
