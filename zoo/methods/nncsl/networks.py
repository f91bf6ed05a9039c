"""The network of NNCSL: a backbone with a projector for the neighbours and a linear head for the classes."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models import resnet18


def conv_net(in_channels: int, widths: list[int]) -> nn.Sequential:
    """Return the CPU-sized backbone: blocks of 3x3 convolution with stride 2, BN and ReLU, then a global mean.

    Output `[n, widths[-1]]` for images `[n, in_channels, h, w]` of any size.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, width in enumerate(widths, start=1):
        layers[f"conv{number}"] = nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False)
        layers[f"bn{number}"] = nn.BatchNorm2d(width)
        layers[f"relu{number}"] = nn.ReLU()
        in_channels = width
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    return nn.Sequential(layers)


def resnet(in_channels: int, stem: str) -> nn.Module:
    """Return a ResNet-18 without its classifier, output `[n, 512]`.

    Args:
        in_channels: Channels of the images.
        stem: `imagenet` (7x7, stride 2, max-pool) or `cifar` (3x3, stride 1, no max-pool). The padding of the CIFAR stem
            is 2, as in the official code, so that a 32 px image becomes 34 x 34.
    """
    net = resnet18(weights=None)
    if stem == "cifar":
        net.conv1 = nn.Conv2d(in_channels, 64, 3, stride=1, padding=2, bias=False)
        net.maxpool = nn.Identity()
    else:
        net.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.fc = nn.Identity()
    return net


def projector(in_features: int, widths: list[int]) -> nn.Sequential:
    """Return an MLP `in_features -> widths`, with BN and ReLU after each layer but the last."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, width in enumerate(widths, start=1):
        layers[f"fc{number}"] = nn.Linear(in_features, width)
        if number < len(widths):
            layers[f"bn{number}"] = nn.BatchNorm1d(width)
            layers[f"relu{number}"] = nn.ReLU()
        in_features = width
    return nn.Sequential(layers)


class Network(nn.Module):
    """Backbone, projector and linear head.

    Args:
        num_classes: Classes of the whole stream; logits of classes to come exist from the start.
        in_channels: Channels of the images.
        backbone: `resnet18_cifar`, `resnet18` (ImageNet stem) or `convnet`.
        convnet_widths: Channels of the blocks of `convnet`.
        projector_widths: Layers of the projector; an empty list builds none.
        feature_projector: Whether to build the square layer that feature distillation trains.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        backbone: str,
        convnet_widths: list[int],
        projector_widths: list[int],
        feature_projector: bool = False,
    ) -> None:
        super().__init__()
        if backbone == "convnet":
            self.backbone: nn.Module = conv_net(in_channels, convnet_widths)
            width = convnet_widths[-1]
        else:
            self.backbone = resnet(in_channels, "cifar" if backbone == "resnet18_cifar" else "imagenet")
            width = 512
        self.projector = projector(width, projector_widths) if projector_widths else None
        self.feature_projector = nn.Linear(projector_widths[-1], projector_widths[-1]) if feature_projector else None
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features `[n, F]` and embeddings `[n, D]` (the features where there is no projector) of `[n, c, h, w]`."""
        features = self.backbone(x)
        return features, features if self.projector is None else self.projector(features)


def parameter_groups(net: Network) -> dict[str, list[nn.Parameter]]:
    """Sort the parameters as the official optimiser does, into `weights`, `no_adaptation` and `classifier`.

    `no_adaptation` holds biases and the scales of batch norms: no weight decay, no layer-wise rate. The scale of the BN
    in a ResNet's shortcut (`downsample.1.weight`) belongs to `weights`: the official code selects by the substrings
    `bias` and `bn`, which that name lacks.
    """
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "no_adaptation": [], "classifier": []}
    for name, parameter in net.named_parameters():
        if name.startswith("classifier."):
            groups["classifier"].append(parameter)
        elif parameter.ndim <= 1 and not name.endswith("downsample.1.weight"):
            groups["no_adaptation"].append(parameter)
        else:
            groups["weights"].append(parameter)
    return groups


def all_finite(module: nn.Module) -> bool:
    """Whether every parameter of `module` is a finite number."""
    return bool(torch.stack([p.detach().isfinite().all() for p in module.parameters()]).all())
