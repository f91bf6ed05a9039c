"""Probes on the encoder: ridge regression against its closed form, frozen features, choice of the best, figures."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

import zoo.main
from datamodules.images import Digits
from tests.methods.aimv2_toy import quiet_trainer
from tests.nn.test_distributed import on_two_ranks
from zoo.methods.aimv2.figures import KEPT, keep
from zoo.methods.aimv2.module import AIMv2
from zoo.methods.aimv2.probe import AIMv2Probe
from zoo.methods.aimv2.ridge import RidgeProbe

TRUNK = {"patch_size": 2, "width": 16, "depth": 3, "heads": 2, "multiple_of": 16}


def make_probe(**changes: Any) -> AIMv2Probe:
    arguments: dict[str, Any] = {"num_classes": 10, "in_channels": 1, "image_size": 8, "trunk": TRUNK}
    torch.manual_seed(0)
    return AIMv2Probe(**(arguments | {"lrs": [1e-2, 1e-5]} | changes))


def make_batch(n: int = 12, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "views": [],
        "labelled": torch.randn(n, 1, 8, 8, generator=generator),
        "target": torch.arange(n) % 10,
        "unlab_target": torch.empty(0, dtype=torch.int64),
    }


def features(n: int = 90, d: int = 6, c: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, d, generator=generator) * torch.arange(1, d + 1) + 5
    return x, torch.nn.functional.one_hot(torch.randint(c, (n,), generator=generator), c)


def by_hand(x: torch.Tensor, y: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum of |standardised x w + b - y|^2 + penalty n |w|^2 through an augmented least-squares problem."""
    x, y = x.double(), y.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    z = torch.cat([(x - mean) / std, math.sqrt(penalty * len(x)) * torch.eye(x.shape[1], dtype=x.dtype)])
    right = torch.cat([y - y.mean(0), torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype)])
    weight = torch.linalg.lstsq(z, right).solution / std[:, None]
    return weight, y.mean(0) - mean @ weight


@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_ridge_is_the_minimum_however_the_rows_arrive(penalty):
    x, y = features()
    expected = by_hand(x, y, penalty)
    for size in (90, 7):
        ridge = RidgeProbe(6, 3, penalty)
        for a, b in zip(x.split(size), y.split(size), strict=True):
            ridge.update(a, b)
        for ours, theirs in zip(ridge.solve(), expected, strict=True):
            torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-4)


def test_few_labels_are_the_first_of_each_class():
    x, y = features()
    ridge = RidgeProbe(6, 3, 0.1, per_class=4)
    for a, b in zip(x.split(11), y.split(11), strict=True):
        ridge.update(a, b)
    kept = torch.cat([(y[:, c] == 1).nonzero().flatten()[:4] for c in range(3)]).sort().values
    assert ridge.counts.tolist() == [4, 4, 4]
    for ours, theirs in zip(ridge.solve(), by_hand(x[kept], y[kept], 0.1), strict=True):
        torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-4)


def _two_ranks(number: int) -> dict[str, torch.Tensor]:
    x, y = features()
    ridge = RidgeProbe(6, 3, 0.1, per_class=4)
    ridge.update(x[:40] if number == 0 else x[40:], y[:40] if number == 0 else y[40:])
    weight, offset = ridge.solve()
    return {"weight": weight, "offset": offset}


def test_ridge_of_two_ranks_is_that_of_one(tmp_path: Path):
    x, y = features()
    ridge = RidgeProbe(6, 3, 0.1, per_class=4)
    ridge.update(x, y)
    for got in on_two_ranks(_two_ranks, tmp_path):
        torch.testing.assert_close(got["weight"], ridge.solve()[0])
        torch.testing.assert_close(got["offset"], ridge.solve()[1])


def test_nothing_reaches_a_frozen_encoder():
    probe = make_probe()
    probe.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    probe.training_step(make_batch(), 0).backward()
    assert all(p.grad is None and not p.requires_grad for p in probe.trunk.parameters())
    for head in probe.heads:
        assert all(p.grad is not None and p.grad.any() for p in head.parameters())


def test_heads_do_not_reach_one_another():
    """Each attentive probe of a sweep learns as it would alone."""
    batch, both, alone = make_batch(), make_probe(), make_probe(lrs=[1e-2])
    alone.heads[0].load_state_dict(both.heads[0].state_dict())
    gradients = []
    for probe in (both, alone):
        probe.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        probe.training_step(batch, 0).backward()
        gradients.append([p.grad for p in probe.heads[0].parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_supervised_training_reaches_all_and_has_no_linear_probes():
    probe = make_probe(freeze_trunk=False, lrs=[1e-3])
    probe.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    probe.training_step(make_batch(), 0).backward()
    assert all(p.grad is not None for p in probe.parameters())
    assert not probe.ridges
    assert probe.names() == ["attentive_0"]


def test_intermediate_layers():
    probe, images = make_probe(layers=3).eval(), make_batch()["labelled"]
    x, outputs = probe.trunk.embed(images), []
    for block in probe.trunk.blocks:
        x = block(x)
        outputs.append(probe.trunk.norm(x))
    torch.testing.assert_close(probe.tokens(images), torch.stack(outputs).mean(0))
    torch.testing.assert_close(make_probe().eval().tokens(images), outputs[-1])
    assert not probe.tokens(images).requires_grad


def test_foreground_is_more_than_half_of_a_patch():
    probe = make_probe(foreground=0.5)
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 0, 0:2] = image[0, 0, 1, 0] = 1  # three of four pixels
    image[0, 0, 2, 2:4] = 1  # two of four
    found = probe.is_foreground(image)
    assert found.shape == (1, 16)
    assert found.nonzero().tolist() == [[0, 0]]


def run(probe: AIMv2Probe, **changes: Any) -> tuple[Trainer, dict[str, float]]:
    seed_everything(0, verbose=False)
    data = Digits(
        labels_per_class=40,
        val_per_class=20,
        batch_size=50,
        labelled_batch_size=50,
        views=[],
        labelled_view={"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "flip": 0.0},
        eval_batch_size=128,
    )
    folder = tempfile.mkdtemp()
    often = {"max_steps": 60, "val_check_interval": 20, "check_val_every_n_epoch": None}
    trainer = quiet_trainer(default_root_dir=folder, **often, **changes)
    trainer.fit(probe, data)
    return trainer, dict(trainer.test(probe, data, verbose=False)[0])


def test_a_run_reports_the_probe_that_validates_best():
    probe = make_probe(foreground=0.0)
    trainer, metrics = run(probe)
    assert set(metrics) == {
        *(f"test/acc_{name}" for name in ("attentive", "attentive_0", "attentive_1", "linear", "few")),
        "test/iou_foreground",
    }
    assert int(probe.best) == 0  # the other one has hardly moved
    assert metrics["test/acc_attentive"] == metrics["test/acc_attentive_0"] > metrics["test/acc_attentive_1"]
    assert metrics["test/acc_linear"] > metrics["test/acc_few"] > 0.3
    assert metrics["test/acc_attentive"] > 0.3  # 60 steps on 16 random channels; chance is 0.1
    assert 0.3 < metrics["test/iou_foreground"] <= 1
    assert [point["step"] for point in probe.curve] == [20, 40, 60]
    assert set(probe.figures()) == {"probes", "attention"}
    predictions: Any = trainer.predict(probe, trainer.datamodule)
    assert torch.cat(predictions).sum(1).allclose(torch.ones(len(torch.cat(predictions))))


def test_pictures_of_a_campaign_are_kept(tmp_path: Path):
    for name, run_name in KEPT.items():
        folder = tmp_path / "runs" / run_name / "0" / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(name.encode())
    (tmp_path / "out").mkdir()
    kept = keep(tmp_path / "runs", tmp_path / "out")
    assert {path.name: path.read_bytes().decode() for path in kept} == {f"aimv2.{name}.png": name for name in KEPT}
    (tmp_path / "runs" / "aimv2" / "0" / "figures" / "captions.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no picture .*captions.png; `zoo reproduce aimv2` makes it"):
        keep(tmp_path / "runs", tmp_path / "out")


def test_the_features_are_those_of_the_checkpoint(tmp_path: Path):
    torch.manual_seed(5)
    model = AIMv2(12, 0, 1, 6, in_channels=1, image_size=8, trunk=TRUNK, objective="image_only", decoder={"width": 16})
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.ckpt")
    probe = make_probe(init_from=str(tmp_path / "a.ckpt"))
    run(probe)
    images = make_batch()["labelled"]
    torch.testing.assert_close(probe.tokens(images), model(images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 4}, "layers: 4 is not accepted; accepted: 1 to 3"),
        ({"layers": 0}, "layers: 0 is not accepted"),
        ({"lrs": []}, r"lrs: \[\] is not accepted; accepted: a list of positive numbers"),
        ({"lrs": [0.1, -1.0]}, "lrs: .* is not accepted"),
    ],
)
def test_bad_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_probe(**changes)


def test_a_missing_encoder_is_a_short_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert zoo.main.main(["fit", "--config", "aimv2_probe/smoke", "--model.init_from", "none.ckpt"]) == 2
    err = capsys.readouterr().err
    assert "init_from: no file of weights at none.ckpt" in err
    assert "Traceback" not in err
