"""ResNets for 32x32 images: ResNet-18 and -50 with a 3x3 stem and no max pooling; He et al.'s CIFAR form (2016, 4.2).

The keys of `resnet20` and `resnet56` are those of public CIFAR-10 checkpoints (layer1.0.conv1.weight, linear.weight).
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1, conv3x3


class PaddedShortcut(nn.Module):
    """Shortcut option A, without parameters: every second pixel, zeros for the channels that are not there yet."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride, self.missing = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.missing // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.missing - before))


def _projected_shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


def _resnet(block: type, depths: list[int], first: float, shortcut: Callable, num_classes: int) -> nn.Module:
    planes = [max(1, round(first * 2**stage)) for stage in range(len(depths))]
    channels, stages = planes[0], OrderedDict()
    for stage, (depth, plane) in enumerate(zip(depths, planes, strict=True), start=1):
        stages[f"layer{stage}"] = blocks = nn.Sequential()
        for index in range(depth):
            stride, outputs = 2 if stage > 1 and index == 0 else 1, plane * block.expansion
            same = stride == 1 and channels == outputs
            blocks.append(block(channels, plane, stride, None if same else shortcut(channels, outputs, stride)))
            channels = outputs
    stem = OrderedDict(conv1=conv3x3(3, planes[0]), bn1=nn.BatchNorm2d(planes[0]), relu=nn.ReLU(inplace=True))
    head = OrderedDict(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(channels, num_classes))
    model = nn.Sequential(stem | stages | head)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def resnet18_cifar(num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """ResNet-18 for (N, 3, 32, 32); `width` multiplies every layer's channels."""
    return _resnet(BasicBlock, [2, 2, 2, 2], 64 * width, _projected_shortcut, num_classes)


def resnet50_cifar(num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """ResNet-50 for (N, 3, 32, 32); `width` multiplies every layer's channels."""
    return _resnet(Bottleneck, [3, 4, 6, 3], 64 * width, _projected_shortcut, num_classes)


def resnet20(num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """He et al.'s 20-layer CIFAR network, for (N, 3, 32, 32); `width` multiplies every layer's channels."""
    return _resnet(BasicBlock, [3, 3, 3], 16 * width, PaddedShortcut, num_classes)


def resnet32(num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """He et al.'s 32-layer CIFAR network, for (N, 3, 32, 32); `width` multiplies every layer's channels."""
    return _resnet(BasicBlock, [5, 5, 5], 16 * width, PaddedShortcut, num_classes)


def resnet56(num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """He et al.'s 56-layer CIFAR network, for (N, 3, 32, 32); `width` multiplies every layer's channels."""
    return _resnet(BasicBlock, [9, 9, 9], 16 * width, PaddedShortcut, num_classes)
