"""Callbacks that watch a training: they change nothing and say what they see."""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot
from torch import Tensor

from callbacks.collapse_monitor import CollapseMonitor, entropy, feature_spread
from callbacks.figures import Figures
from callbacks.nonfinite_guard import NonFiniteError, NonFiniteGuard
from callbacks.online_probe import OnlineProbe, knn_scores
from callbacks.run_summary import RunSummary, batch_rows
from tests.callbacks.toy import Toy, differences, final, fit, resume_callback


class Watched(Toy):
    """The toy with everything that the callbacks ask for."""

    def __init__(self, collapsed: bool = False, bad: str = "") -> None:
        super().__init__()
        self.collapsed, self.bad = collapsed, bad

    def features(self, images: Tensor) -> Tensor:
        return self.net[:4](images + 0 * torch.rand_like(images))  # draws random numbers, as an encoder might

    def assignments(self) -> Tensor:
        logits = torch.zeros(6, 4)
        logits[:, 0] = 20.0 if self.collapsed else 0.0
        return logits.softmax(1)

    def embeddings(self) -> Tensor:
        return torch.ones(6, 3) if self.collapsed else torch.cat([torch.eye(3), -torch.eye(3)])

    def figures(self) -> dict[str, Any]:
        figure, other = pyplot.figure(), pyplot.figure()
        other.savefig = None if self.bad == "figure" else other.savefig  # type: ignore[method-assign]
        return {"assignments/all": figure, "../up": other}


@pytest.fixture(autouse=True)
def _no_window() -> None:
    mpl.use("Agg")


def labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.callbacks.toy import ToyBatches

    plain = ToyBatches.batch

    def batch(self: Any, epoch: int, index: int) -> dict[str, Tensor]:
        out = plain(self, epoch, index)
        label = (out["x"][:, 0] > 0).long()
        label[0] = -1
        return out | {"label": label}

    monkeypatch.setattr(ToyBatches, "batch", batch)


def test_watchers_leave_the_training_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled(monkeypatch)
    for name in ("without", "with"):
        (tmp_path / name).mkdir()
    fit(tmp_path / "without", [], make=Watched)
    probe = OnlineProbe(2, image_key="x", k=5, lr=0.05)
    watchers = [probe, NonFiniteGuard(), CollapseMonitor(every_n_steps=2), RunSummary(2), Figures()]
    fit(tmp_path / "with", watchers, make=Watched)
    without, together = final(tmp_path / "without"), final(tmp_path / "with")
    own = ("monitor/", "val/probe")
    together["metrics"] = {k: v for k, v in together["metrics"].items() if not k.startswith(own)}
    together["rows"] = [[s, {k: v for k, v in row.items() if not k.startswith(own)}] for s, row in together["rows"]]
    together["rows"] = [row for row in together["rows"] if set(row[1]) - {"epoch"}]
    assert differences(without, together) == []


def test_probe_learns_and_survives_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled(monkeypatch)
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed").mkdir()

    def probe() -> OnlineProbe:
        return OnlineProbe(2, image_key="x", k=5, lr=0.1, bank_size=24)

    fit(tmp_path / "whole", [probe(), resume_callback(keep=20)], make=Watched)
    whole = final(tmp_path / "whole")
    assert whole["metrics"]["val/probe_linear_acc"] > 0.7
    assert whole["metrics"]["val/probe_knn_acc"] > 0.7
    checkpoint = tmp_path / "whole" / "checkpoints" / "step=8.ckpt"
    fit(tmp_path / "resumed", [probe(), resume_callback()], checkpoint, make=Watched)
    resumed = final(tmp_path / "resumed")
    assert differences(whole["metrics"], resumed["metrics"]) == []


def test_knn_scores_against_a_loop() -> None:
    bank, labels = torch.nn.functional.normalize(torch.randn(9, 3), dim=1), torch.arange(9) % 3
    query = torch.nn.functional.normalize(torch.randn(4, 3), dim=1)
    got = knn_scores(query, bank, labels, 3, 4, 0.5)
    for row, q in zip(got, query, strict=True):
        near = sorted(range(9), key=lambda i: -float(q @ bank[i]))[:4]
        want = [sum(math.exp(float(q @ bank[i]) / 0.5) for i in near if labels[i] == c) for c in range(3)]
        torch.testing.assert_close(row, torch.tensor(want))


def test_collapse_is_seen_and_told_once(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="clustering has collapsed") as caught:
        trainer = fit(tmp_path, [CollapseMonitor(every_n_steps=1)], make=lambda: Watched(collapsed=True))
    assert len([w for w in caught if "collapsed" in str(w.message)]) == 1
    assert trainer.callback_metrics["monitor/assignment_entropy"] < 0.01
    assert trainer.callback_metrics["monitor/feature_spread"] < 1e-6


def test_healthy_clusters_and_spread_features(tmp_path: Path) -> None:
    trainer = fit(tmp_path, [CollapseMonitor(every_n_steps=1)], make=Watched)  # a warning would be an error
    assert float(trainer.callback_metrics["monitor/assignment_entropy"]) == pytest.approx(1.0)
    assert float(trainer.callback_metrics["monitor/sample_entropy"]) == pytest.approx(1.0)
    # unit vectors along the axes, both signs: standard deviation sqrt(1/3) per dimension
    assert float(trainer.callback_metrics["monitor/feature_spread"]) == pytest.approx(1.0)


def test_loss_at_ln_k(tmp_path: Path) -> None:
    class Stuck(Watched):
        def training_step(self, batch: Any) -> Tensor:
            return 0 * super().training_step(batch) + math.log(4)

    with pytest.warns(RuntimeWarning, match=r"stayed at ln 4 = 1\.39"):
        fit(tmp_path, [CollapseMonitor(every_n_steps=1, patience=3)], make=Stuck)


@pytest.mark.parametrize(("loss", "warned"), [(1, True), (2, False)])
def test_loss_at_ln_k_with_accumulated_gradients(loss: int, warned: bool, tmp_path: Path) -> None:
    """The loss that the module has returned counts, not what Lightning has divided it by."""

    class Stuck(Watched):
        def training_step(self, batch: Any) -> Tensor:
            return 0 * super().training_step(batch) + loss * math.log(4)

    monitor = CollapseMonitor(every_n_steps=1, patience=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, [monitor], make=Stuck, max_epochs=1, accumulate_grad_batches=2)
    assert any("stayed at ln 4" in str(w.message) for w in caught) == warned


def test_entropy_and_spread_by_hand() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(entropy(p), torch.tensor([math.log(2), 0.0]))
    assert float(feature_spread(torch.tensor([[2.0, 0.0], [-5.0, 0.0]]))) == pytest.approx(math.sqrt(2) / 2)


@pytest.mark.parametrize("where", ["loss", "metric"])
def test_nonfinite_stops_and_names_the_last_good_checkpoint(where: str, tmp_path: Path) -> None:
    class Broken(Toy):
        def training_step(self, batch: Any) -> Tensor:
            loss = super().training_step(batch)
            bad = self.trainer.global_step == 6
            if where == "metric":
                self.log("train/other", torch.tensor(math.inf if bad else 1.0))
            return loss * (math.nan if bad and where == "loss" else 1.0)

    guard = NonFiniteGuard(every_n_steps=1)
    with pytest.raises(NonFiniteError, match=r"step=6\.ckpt") as caught:
        fit(tmp_path, [resume_callback(), guard], make=Broken)
    assert caught.value.step == 6
    assert caught.value.name == ("loss" if where == "loss" else "train/other")
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step=5.ckpt", "step=6.ckpt"]


@pytest.mark.parametrize("where", ["own", "foreign"])
def test_nonfinite_right_after_a_resume_names_the_checkpoint_that_it_came_from(where: str, tmp_path: Path) -> None:
    class Broken(Toy):
        def training_step(self, batch: Any) -> Tensor:
            return super().training_step(batch) * math.nan

    for name in ("own", "foreign"):
        (tmp_path / name).mkdir()
    fit(tmp_path / "own", [resume_callback(every_n_steps=0)], max_epochs=1)
    checkpoint = tmp_path / "own" / "checkpoints" / "step=5.ckpt"
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp_path / where, [resume_callback(), NonFiniteGuard()], checkpoint, make=Broken)
    assert caught.value.step == 5
    assert caught.value.checkpoint == (checkpoint if where == "own" else None)
    assert ("there is no checkpoint yet" in str(caught.value)) == (where == "foreign")


def test_figures_are_saved_inside_the_directory_and_closed(tmp_path: Path) -> None:
    before = pyplot.get_fignums()
    fit(tmp_path, [Figures(every_n_validations=2)], make=Watched)
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["-up.png", "assignments-all.png"]
    assert pyplot.get_fignums() == before
    assert not (tmp_path / "up.png").exists()


def test_a_failing_figure_is_told_and_the_others_are_made(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"the figure '\.\./up' could not be made") as caught:
        fit(tmp_path, [Figures()], make=lambda: Watched(bad="figure"))
    assert len([w for w in caught if "figure" in str(w.message)]) == 1
    assert (tmp_path / "figures" / "assignments-all.png").exists()
    assert (tmp_path / "final.pt").exists()


def test_run_summary_measures_waiting_and_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.callbacks.toy import ToyData

    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    transfer = ToyData.on_after_batch_transfer

    def slow_data(self: Any, batch: Any, index: int) -> Any:
        clock[0] += 3.0
        return transfer(self, batch, index)

    class Slow(Toy):
        def training_step(self, batch: Any) -> Tensor:
            clock[0] += 1.0
            return super().training_step(batch)

    monkeypatch.setattr(ToyData, "on_after_batch_transfer", slow_data)
    summary = RunSummary(skip_batches=2)
    fit(tmp_path, [summary], make=Slow)
    facts = summary.facts()
    assert facts["fit/data_wait_share"] == pytest.approx(0.75)
    assert facts["fit/samples_per_second"] == pytest.approx(8 / 4)
    assert (facts["fit/steps"], facts["fit/batches"]) == (15.0, 15.0)
    assert facts["fit/seconds"] == pytest.approx(15 * 4 + 15 * 3)  # the validations load data, too
    assert facts["fit/peak_memory_bytes"] > 1e7


def test_batch_rows() -> None:
    assert batch_rows({"step": torch.tensor(1.0), "views": [torch.zeros(5, 2)]}) == 5
    assert batch_rows("text") == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunSummary(-1), "skip_batches must not be negative, got -1"),
        (lambda: Figures(0), "every_n_validations must be at least 1, got 0"),
        (lambda: CollapseMonitor(warn_below=2.0), r"warn_below must be in \[0, 1\], got 2.0"),
        (lambda: NonFiniteGuard(0), "every_n_steps must be at least 1, got 0"),
        (lambda: OnlineProbe(2, kinds=["svm"]), "kinds accepts linear and knn"),
        (lambda: OnlineProbe(1), "num_classes must be at least 2, got 1"),
    ],
)
def test_bad_options(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
