"""MobileNet-V2 in its CIFAR form: stride 1 in the stem and in the first stage that halves the map on ImageNet."""

from torch import nn
from torchvision.models.mobilenetv2 import MobileNetV2

# expansion, channels, blocks, stride
STAGES = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]


def mobilenet_v2_cifar(num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """MobileNet-V2 for (N, 3, 32, 32); `width` multiplies every layer's channels (multiples of 8)."""
    model = MobileNetV2(num_classes=num_classes, width_mult=width, inverted_residual_setting=STAGES)
    model.features[0][0].stride = (1, 1)
    return model
