"""The network of NNCSL: a backbone with a projector for the neighbours and a linear head for the classes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models import resnet18

from zoo.nn.convnets import build_backbone


def official_resnet18(in_channels: int = 3) -> nn.Module:
    """Return the ResNet-18 of the official CIFAR runs: a 3x3 stem of stride 1 and *padding 2*, no max-pool; `[n, 512]`.

    The padding makes a 32-pixel image 34 x 34.
    """
    net = resnet18(weights=None)
    net.conv1 = nn.Conv2d(in_channels, 64, 3, stride=1, padding=2, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool, net.fc = nn.Identity(), nn.Identity()
    net.num_features = 512
    return net


def projector(in_features: int, widths: Sequence[int]) -> nn.Sequential:
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
        backbone: `name` and options as `zoo.nn.convnets.build_backbone` takes them; None is `official_resnet18`.
        projector_widths: Layers of the projector; an empty list builds none.
        feature_projector: Whether to build the square layer that feature distillation trains.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        backbone: Mapping[str, Any] | None,
        projector_widths: Sequence[int],
        feature_projector: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = official_resnet18(in_channels) if backbone is None else build_backbone(backbone, in_channels)
        width = int(self.backbone.num_features)  # type: ignore[arg-type]
        self.projector = projector(width, projector_widths) if projector_widths else None
        self.feature_projector = nn.Linear(projector_widths[-1], projector_widths[-1]) if feature_projector else None
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features `[n, F]` and embeddings `[n, D]` of `[n, c, h, w]`; the same without a projector."""
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
