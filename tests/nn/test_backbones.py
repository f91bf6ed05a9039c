"""Backbones by name, and weights from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zoo.nn.convnets import build_backbone
from zoo.nn.pretrained import load_backbone, load_part, read_weights


@pytest.mark.parametrize(
    ("spec", "features"),
    [
        ({"name": "small_conv"}, 128),
        ({"name": "small_conv", "channels": [4, 8]}, 8),
        ({"name": "wide_resnet", "depth": 10, "width": 1}, 64),
        ({"name": "resnet18_cifar"}, 512),
        ({"name": "timm:resnet10t"}, 512),
        ({"name": "timm:vit_tiny_patch16_224", "img_size": 28, "patch_size": 7, "depth": 1}, 192),
    ],
)
def test_features_of_two_channel_images(spec: dict[str, Any], features: int) -> None:
    net = build_backbone(spec, in_channels=2)
    assert net.num_features == features
    assert net(torch.randn(2, 2, 28, 28)).shape == (2, features)


def test_sizes_of_known_networks() -> None:
    def millions(spec: dict[str, Any]) -> float:
        return sum(p.numel() for p in build_backbone(spec).parameters()) / 1e6

    assert millions({"name": "wide_resnet", "depth": 28, "width": 2}) == pytest.approx(1.47, abs=0.02)
    assert millions({"name": "resnet18_cifar"}) == pytest.approx(11.17, abs=0.02)
    assert sum(p.numel() for p in build_backbone({"name": "small_conv"}, 1).parameters()) == pytest.approx(
        93e3, rel=0.01
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "small_con"}, "small_conv, wide_resnet, resnet18_cifar or timm"),
        ({}, "small_conv"),
        ({"name": "timm:resnet5000"}, "not in timm"),
        ({"name": "small_conv", "widths": [1]}, "widths"),
        ({"name": "small_conv", "channels": ["a", "b"]}, r"backbone.channels: \['a', 'b'\] is not accepted"),
        ({"name": "small_conv", "channels": []}, r"accepted: whole numbers above 0"),
        ({"name": "timm:resnet10t", "widths": [1]}, "does not take these options"),
        ({"name": "wide_resnet", "depth": 11}, r"6 n \+ 4"),
    ],
)
def test_bad_descriptions(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(spec)


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_backbone({"name": "small_conv", "channels": [2, 3]})


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "net.backbone.", "_orig_mod.encoder."])
@pytest.mark.parametrize("container", ["", "state_dict", "teacher"])
def test_published_backbones_load_whatever_wraps_them(tmp_path: Path, prefix: str, container: str) -> None:
    source, target = small(0), small(1)
    weights: dict[str, Any] = {prefix + name: value for name, value in source.state_dict().items()}
    weights[prefix + "fc.weight"] = torch.ones(1)
    torch.save({container: weights} if container else weights, tmp_path / "w.pt")
    load_backbone(target, read_weights(tmp_path / "w.pt"))
    for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_safetensors_load_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, target = small(0), small(1)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_backbone(target, read_weights(tmp_path / "w.safetensors"))
    assert torch.equal(next(source.parameters()), next(target.parameters()))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    weights = small(0).state_dict()
    first = next(iter(weights))
    with pytest.raises(ValueError, match=f"missing: {first}"):
        load_backbone(small(1), {k: v for k, v in weights.items() if k != first})
    with pytest.raises(ValueError, match="another shape"):
        load_backbone(small(1), {**weights, first: torch.ones(1)})
    with pytest.raises(ValueError, match="unknown: extra"):
        load_part(small(1), {**{f"net.{k}": v for k, v in weights.items()}, "net.extra": torch.ones(1)}, "net")
    with pytest.raises(FileNotFoundError, match=r"gone\.pt"):
        read_weights(tmp_path / "gone.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="no tensors"):
        read_weights(tmp_path / "empty.pt")
