"""The networks by name: CIFAR forms for (N, 3, 32, 32), a file per family, and ImageNet forms from torchvision."""

from collections.abc import Callable

from torch import nn

from nbs_lib.models.torchvision_ops import ensure_torchvision

ensure_torchvision()  # before anything that imports torchvision

from torchvision import models as imagenet  # noqa: E402

from nbs_lib.models.mobilenet import mobilenet_v2_cifar  # noqa: E402
from nbs_lib.models.resnet import resnet18_cifar, resnet20, resnet50_cifar, resnet56  # noqa: E402
from nbs_lib.models.vgg import vgg16_cifar  # noqa: E402

CIFAR = (vgg16_cifar, resnet18_cifar, resnet50_cifar, mobilenet_v2_cifar, resnet20, resnet56)
IMAGENET = (imagenet.vgg16, imagenet.vgg16_bn, imagenet.resnet18, imagenet.resnet50, imagenet.mobilenet_v2)
MODELS: dict[str, Callable[..., nn.Module]] = {make.__name__: make for make in CIFAR + IMAGENET}


def build(name: str, **options) -> nn.Module:
    """A new network of `MODELS`; `num_classes`, and `width` (CIFAR) or `weights` (ImageNet), go to its factory.

    Raises KeyError, with the known names, for another name."""
    if name not in MODELS:
        raise KeyError(f"Expected a model's name, one of {', '.join(MODELS)}. Got {name!r}.")
    return MODELS[name](**options)
