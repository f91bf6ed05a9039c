"""Mixing, the network, the queue and the record of pseudo-labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zoo.methods.suave.figures import cluster_figure, pseudo_label_figure
from zoo.methods.suave.mix import Mix, append_labelled_mix, draw_mix
from zoo.methods.suave.networks import ClusteringNetwork, Probes, Prototypes
from zoo.methods.suave.state import EmbeddingQueue, QuarterlyAccuracy

BACKBONE = {"name": "small_conv", "channels": [4, 6]}


def network(shared: bool = True, dino_head: bool = False) -> ClusteringNetwork:
    return ClusteringNetwork(BACKBONE, 1, 4, 4 if shared else 9, 10, 5, shared, dino_head)


@pytest.mark.parametrize("mix", [Mix(1.0), Mix(1.0, (3, 3, 2, 2))])
def test_lam_one_keeps_images_and_targets(mix: Mix) -> None:
    x, y = torch.rand(5, 2, 8, 8), torch.rand(5, 3).softmax(dim=1)
    assert torch.equal(mix.images(x, x.flip(0)), x)
    torch.testing.assert_close(mix.targets(y, y.flip(0)), y)


def test_mixed_rows_are_appended_with_the_same_pairing_for_images_and_targets() -> None:
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 6, 6)
    y = torch.eye(4)
    for mix in (Mix(0.7), Mix(1 - 12 / 36, (0, 3, 1, 5))):
        images, targets = append_labelled_mix(x, y, mix)
        assert torch.equal(images[:4], x)
        assert torch.equal(targets[:4], y)
        # the image's mean grey value is the expected class index under its target
        torch.testing.assert_close(images[4:].mean(dim=(1, 2, 3)), targets[4:] @ torch.arange(4.0))
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))


def test_draws_have_a_box_that_is_the_complement_of_lam() -> None:
    torch.manual_seed(0)
    draws = [draw_mix(12, 20) for _ in range(400)]
    boxes = [d for d in draws if d.box is not None]
    assert 150 < len(boxes) < 250
    for d in boxes:
        assert d.box is not None
        top, bottom, left, right = d.box
        assert 0 <= top <= bottom <= 12
        assert 0 <= left <= right <= 20
        assert d.lam == pytest.approx(1 - (bottom - top) * (right - left) / 240)
    lams = torch.tensor([d.lam for d in draws if d.box is None])
    assert lams.mean().item() == pytest.approx(0.5, abs=0.07)  # Beta(1, 1) is uniform
    assert lams.std().item() == pytest.approx(12**-0.5, abs=0.04)
    assert all(draw_mix(8, 8, cutmix_probability=0.0).box is None for _ in range(5))


def test_rows_come_back_in_order_whatever_the_resolution() -> None:
    net = network().eval()
    a, b, c = torch.rand(3, 1, 12, 12), torch.rand(5, 1, 8, 8), torch.rand(2, 1, 12, 12)
    z = net.encode([a, b, c]).z
    for rows, part in zip(z.split([3, 5, 2]), (a, b, c), strict=True):
        torch.testing.assert_close(rows, net.encode([part]).z)


def test_one_backbone_pass_for_each_resolution() -> None:
    net = network()
    batches: list[int] = []
    net.backbone.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    net.encode([torch.rand(n, 1, size, size) for n, size in ((4, 12), (6, 12), (6, 8), (6, 12), (6, 8))])
    assert batches == [16, 12]


@pytest.mark.parametrize("shared", [True, False])
def test_prototypes_have_unit_norm_at_every_forward_and_logits_are_cosines(shared: bool) -> None:
    net = network(shared)
    with torch.no_grad():
        for p in (net.prototypes, net.classifier):
            if p is not None:
                p.weight.mul_(7.0)
    logits = [net.prototypes(net.encode([torch.randn(32, 1, 12, 12)]).z)]
    logits.append(net.class_logits(net.encode([torch.randn(32, 1, 12, 12)]).z))
    torch.testing.assert_close(net.prototypes.weight.norm(dim=1), torch.ones(4 if shared else 9))
    assert max(x.abs().max().item() for x in logits) <= 1 + 1e-5
    assert logits[1].shape == (32, 4)


def test_evaluation_changes_no_weight_in_place() -> None:
    net = network().eval()
    with torch.no_grad():
        net.prototypes.weight.mul_(3.0)
    before = net.prototypes.weight.clone()
    logits = net.class_logits(net.encode([torch.randn(8, 1, 12, 12)]).z)
    assert torch.equal(net.prototypes.weight, before)
    assert logits.abs().max() <= 1 + 1e-5


def test_dino_head_has_a_trainable_gain_of_one_and_no_batch_norm() -> None:
    net = network(dino_head=True)
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in net.projector.modules())
    linear = [m for m in net.projector.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 3
    assert all(not m.bias.any() for m in linear)
    layer = Prototypes(5, 4, scaled=True)
    z = F.normalize(torch.randn(3, 5), dim=1)
    with torch.no_grad():
        layer.weight.mul_(4.0)
        assert layer.gain is not None
        layer.gain[2] = 2.0
    want = z @ F.normalize(layer.weight, dim=1).T * torch.tensor([1.0, 1.0, 2.0, 1.0])
    torch.testing.assert_close(layer(z), want)
    layer(z).sum().backward()
    assert layer.gain.grad is not None


def test_probes_look_on_without_teaching() -> None:
    net = network()
    e = net.encode([torch.randn(8, 1, 12, 12)])
    probes = Probes((6, 10, 5), 4)
    torch.stack([x.sum() for x in probes(e, slice(3)).values()]).sum().backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in probes.parameters())
    assert [len(x) for x in probes(e, slice(3)).values()] == [3, 3, 3]


def test_the_queue_waits_until_it_is_full_and_keeps_the_newest_first() -> None:
    queue = EmbeddingQueue(5, 2)
    assert not queue.full()
    for step in range(1, 4):
        queue.push([torch.full((2, 2), float(step)), torch.full((2, 2), -float(step))])
        assert queue.full() == (step == 3)
        assert len(queue.rows(0)) == (5 if step == 3 else 0)
    assert queue.rows(0)[:, 0].tolist() == [3, 3, 2, 2, 1]
    assert queue.rows(1)[:, 0].tolist() == [-3, -3, -2, -2, -1]
    restored = EmbeddingQueue(5, 2)
    restored.load_state_dict(queue.state_dict())
    assert restored.full()
    assert not EmbeddingQueue(0, 2).full()


def test_pseudo_labels_are_counted_in_the_quarter_they_were_made() -> None:
    record = QuarterlyAccuracy()
    target = torch.tensor([0, 1, 2, 3])
    assert record.update(torch.tensor([0, 1, 0, 0]), target, 0.0).item() == 0.5
    record.update(torch.tensor([0, 1, 2, 0]), target, 0.2)
    record.update(target, target, 0.99)
    record.update(torch.tensor([0, 1, 2, 0]), target, 1.0)
    quarters = record.compute()
    assert quarters[[0, 3]].tolist() == [0.625, 0.875]
    assert quarters[[1, 2]].isnan().all()


def test_figures_show_the_numbers() -> None:
    figure = cluster_figure(torch.tensor([[3.0, 0.0], [1.0, 5.0]]))
    assert figure.axes[0].images[0].get_array().tolist() == [[0.75, 0.0], [0.25, 1.0]]
    free = cluster_figure(torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 1.0]]))
    assert free.axes[0].images[0].get_array().tolist() == [[1.0, 0.0], [0.0, 0.5], [0.0, 0.5]]
    bars = pseudo_label_figure(torch.tensor([0.5, 0.75, torch.nan, torch.nan])).axes[0].patches
    assert [bar.get_height() for bar in bars] == [0.5, 0.75, 0.0, 0.0]
