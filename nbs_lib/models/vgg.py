"""VGG-16 in its CIFAR form: 13 convolutions with batch norm, one linear layer."""

from collections import OrderedDict

from torch import nn
from torchvision.models.vgg import cfgs, make_layers


def vgg16_cifar(num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """VGG-16 for (N, 3, 32, 32); `width` multiplies every layer's channels."""
    channels = [size if size == "M" else max(1, round(size * width)) for size in cfgs["D"]]
    features = make_layers(channels, batch_norm=True)
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    body = OrderedDict(features=features, avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    return nn.Sequential(body | {"classifier": nn.Linear(channels[-2], num_classes)})
