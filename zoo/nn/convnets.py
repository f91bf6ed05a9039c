"""Image backbones by name: `build_backbone({"name": "small_conv", "channels": [32, 64, 128]})`.

Every backbone maps images `[n, c, H, W]` to features `[n, num_features]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import did_you_mean


class SmallConv(nn.Sequential):
    """Three 3x3 convolutions with stride 2, batch normalisation and ReLU, then global average pooling.

    About 2 MFLOP for a 28-pixel image with the default channels: the network of the CPU experiments.

    Args:
        in_channels: Channels of the images.
        channels: Output channels of each block.

    Raises:
        ValueError: If `channels` is empty or holds anything but whole numbers above 0.
    """

    def __init__(self, in_channels: int = 3, channels: Sequence[int] = (32, 64, 128)) -> None:
        if not all(isinstance(width, int) and width > 0 for width in channels) or not channels:
            raise ValueError(f"backbone.channels: {channels} is not accepted; accepted: whole numbers above 0")
        layers: list[nn.Module] = []
        previous = in_channels
        for width in channels:
            layers += [nn.Conv2d(previous, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            previous = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = previous
        _kaiming_fan_out(self)


class _WideBlock(nn.Module):
    """Pre-activation block of a wide residual network."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(h))))
        return out + (x if self.shortcut is None else self.shortcut(h))


class WideResNet(nn.Module):
    """Wide residual network for small images (arXiv 1605.07146), e.g. WRN-28-8 with `depth=28, width=8`.

    Args:
        in_channels: Channels of the images.
        depth: Number of convolutions, `6 n + 4`.
        width: Widening factor.

    Raises:
        ValueError: If the depth does not fit.
    """

    def __init__(self, in_channels: int = 3, depth: int = 28, width: int = 8) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4 (10, 16, 22, 28, ...), got {depth}")
        widths = [16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        blocks: list[nn.Module] = []
        previous = 16
        for stage, out in enumerate(widths):
            for block in range((depth - 4) // 6):
                blocks.append(_WideBlock(previous, out, stride=2 if stage > 0 and block == 0 else 1))
                previous = out
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(previous)
        self.num_features = previous
        _kaiming_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.blocks(self.stem(x)))).mean(dim=(2, 3))


def _kaiming_fan_out(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def _resnet18_cifar(in_channels: int = 3) -> nn.Module:
    """ResNet-18 with a 3x3 stem of stride 1 and no max pooling, as usual for images of 28 or 32 pixels."""
    from torchvision.models import resnet18

    net = resnet18(weights=None)
    net.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool, net.fc = nn.Identity(), nn.Identity()
    net.num_features = 512
    return net


_FACTORIES: dict[str, Any] = {"small_conv": SmallConv, "wide_resnet": WideResNet, "resnet18_cifar": _resnet18_cifar}


def build_backbone(spec: Mapping[str, Any], in_channels: int = 3) -> nn.Module:
    """Build a backbone from plain data.

    Args:
        spec: `name` and the options of that backbone: `small_conv` (`channels`), `wide_resnet` (`depth`, `width`),
            `resnet18_cifar`, or `timm:<model>` with any option of `timm.create_model`, which builds it without
            a classifier and without weights.
        in_channels: Channels of the images.

    Returns:
        A module with the attribute `num_features`.

    Raises:
        ValueError: If the name or an option is unknown.
    """
    options = dict(spec)
    name = str(options.pop("name", ""))
    if name.startswith("timm:"):
        import timm

        model = name.removeprefix("timm:")
        if model not in timm.list_models():
            raise ValueError(f"backbone {name!r} is not in timm: {did_you_mean(model, timm.list_models())}")
        try:
            return timm.create_model(model, pretrained=False, in_chans=in_channels, num_classes=0, **options)
        except TypeError as error:
            raise ValueError(f"backbone {name!r} does not take these options: {options} ({error})") from error
    if name not in _FACTORIES:
        raise ValueError(f"backbone name must be one of {', '.join(_FACTORIES)} or timm:<model>, got {name!r}")
    try:
        return _FACTORIES[name](in_channels=in_channels, **options)
    except TypeError as error:
        raise ValueError(f"backbone {name!r} does not take these options: {options} ({error})") from error
