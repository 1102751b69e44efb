"""MobileNet-V1 (Howard et al. 2017, table 1) for ImageNet; torchvision does not have it, mapping Table 5 does."""

from collections import OrderedDict

from torch import nn

# filters of each pointwise layer, stride of the depthwise layer before it
STAGES = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


def _convolution(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def mobilenet_v1(num_classes: int = 1000, width: float = 1.0) -> nn.Module:
    """MobileNet-V1 for (N, 3, 224, 224); `width` multiplies every layer's channels (0.5 in mapping Table 5)."""
    channels = max(1, round(32 * width))
    features = nn.Sequential(_convolution(3, channels, 3, 2))
    for size, stride in STAGES:
        outputs = max(1, round(size * width))
        features.append(_convolution(channels, channels, 3, stride, groups=channels))
        features.append(_convolution(channels, outputs, 1, 1))
        channels = outputs
    head = OrderedDict(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(channels, num_classes))
    return nn.Sequential(OrderedDict(features=features) | head)
