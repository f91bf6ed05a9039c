"""`zoo bench`: the raw loop does the module's work, the arithmetic is right, and a real config can be measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from callbacks.rng import rng_state, set_rng_state
from tests.support.toy import Toy, ToyData
from zoo.bench.raw import RawLoop
from zoo.bench.report import comparison, page, paired_ratios, peak_flops, percentile, speed, trainer_ms, write_bench
from zoo.errors import UsageError
from zoo.main import main

STEPS = 7


class Everything(Toy):
    """The toy with a scheduler and every hook that a step may have; counts what is called."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.calls: list[str] = []
        self.register_buffer("teacher", torch.zeros(2, 4))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.calls.append("batch_start")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.calls.append("batch_end")
        self.teacher.lerp_(self.net.weight.detach(), 0.1)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.calls.append("zero_grad")

    def on_before_backward(self, loss: Any) -> None:
        self.calls.append("backward")

    def on_after_backward(self) -> None:
        self.calls.append("after_backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.calls.append("before_step")
        self.net.bias.grad = None

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "x": 2 * batch["x"]}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 2}}


class ByHand(Toy):
    """The toy with manual optimisation of two optimisers."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        weights, biases = self.optimizers()
        for optimizer in (weights, biases):
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.01, "norm")
            optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        weights = torch.optim.SGD([self.net.weight], lr=0.5)
        return [weights, torch.optim.SGD([self.net.bias], lr=0.1)], [
            torch.optim.lr_scheduler.ExponentialLR(weights, 0.5)
        ]


class StartRaw(pl.Callback):
    """Makes the raw loop before the first step of a fit and remembers the generators."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            pl_module.calls = []
            self.loop = RawLoop(trainer)
            self.generators = rng_state()


def quiet_trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return pl.Trainer(accelerator="cpu", max_steps=STEPS, default_root_dir=tmp_path, **quiet, **options)


def fit_and_raw(tmp_path: Path, module: pl.LightningModule, batches: int, **options: Any) -> RawLoop:
    """Fit a module, then train its copy by the raw loop for as many batches, from the same generators."""
    start = StartRaw()
    quiet_trainer(tmp_path, callbacks=[start], limit_val_batches=0, **options).fit(module, ToyData(count=50))
    set_rng_state(start.generators)
    for _ in range(batches):
        start.loop.step()
    return start.loop


def assert_same(loop: RawLoop, module: pl.LightningModule) -> None:
    for name, value in module.state_dict().items():
        assert torch.equal(value, loop.module.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({}, STEPS),
        ({"accumulate_grad_batches": 3}, 3 * STEPS),
        ({"gradient_clip_val": 0.01}, STEPS),
        ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, STEPS),
        ({"precision": "bf16-mixed"}, STEPS),
    ],
    ids=["plain", "accumulation", "clip by norm", "clip by value", "bf16"],
)
@pytest.mark.filterwarnings("ignore:You have overridden .on_after_batch_transfer.")
def test_the_raw_loop_is_the_fit_bit_for_bit(tmp_path: Path, options: dict[str, Any], batches: int) -> None:
    module = Everything(num_classes=2, lr=0.05)
    loop = fit_and_raw(tmp_path, module, batches, **options)
    assert_same(loop, module)
    assert loop.module.calls == module.calls
    assert not torch.equal(module.teacher, torch.zeros(2, 4))


def test_a_module_with_plain_sgd_too(tmp_path: Path) -> None:
    module = Toy(num_classes=2)
    assert_same(fit_and_raw(tmp_path, module, STEPS), module)


def test_manual_optimisation_too(tmp_path: Path) -> None:
    module = ByHand(num_classes=2)
    loop = fit_and_raw(tmp_path, module, -(-STEPS // 2))
    assert_same(loop, module)


def test_the_raw_loop_logs_nothing_and_leaves_the_fit_alone(tmp_path: Path) -> None:
    alone, disturbed = Everything(num_classes=2), Everything(num_classes=2)
    disturbed.load_state_dict(alone.state_dict())

    class Interrupt(StartRaw):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            before = rng_state()
            self.loop.step()
            set_rng_state(before)

    for module, callbacks in ((alone, []), (disturbed, [Interrupt()])):
        torch.manual_seed(3)
        trainer = quiet_trainer(tmp_path, callbacks=callbacks, limit_val_batches=0)
        trainer.fit(module, ToyData(count=3))
        assert trainer.global_step == STEPS
    for name, value in alone.state_dict().items():
        assert torch.equal(value, disturbed.state_dict()[name]), name


def test_what_cannot_be_compared_says_so(tmp_path: Path) -> None:
    class Uncopyable(Toy):
        def on_train_start(self) -> None:
            self.kept = self.net(torch.zeros(1, 4))

    with pytest.raises(UsageError, match=r"(?s)Uncopyable cannot be copied.*--vs none"):
        quiet_trainer(tmp_path, callbacks=[StartRaw()]).fit(Uncopyable(num_classes=2), ToyData())


def test_ratios_pair_each_raw_block_with_the_fit_beside_it() -> None:
    # the machine becomes slower all the time; the fit takes 25 % longer throughout
    fit = [[1.25 * (1 + i)] * 3 for i in (0, 2, 4)]
    raw = [[1.0 * (1 + i)] * 3 for i in (1, 3)]
    assert paired_ratios(fit, raw) == pytest.approx([0.8, 0.8])
    assert trainer_ms(fit, raw) == pytest.approx(1000 * (0.25 * 2 + 0.25 * 4) / 2)


def test_speed_counts_all_rows_over_all_time() -> None:
    out = speed([[0.1, 0.1], [0.2, 0.4]], [0.02, 0.02, 0.02, 0.02], rows=400, tokens=8000)
    assert out["samples_per_second"] == pytest.approx(500)
    assert out["tokens_per_second"] == pytest.approx(10000)
    assert out["step_ms"] == pytest.approx({"median": 150, "p90": 400})
    assert out["data_wait_share"] == pytest.approx(0.1)
    assert "tokens_per_second" not in speed([[1.0]], [0.0], 1, 0)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 5), (0.9, 9), (0.91, 10), (1.0, 10), (0.0, 1)])
def test_percentile(share: float, expected: int) -> None:
    assert percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], share) == expected


def test_peaks_depend_on_the_numbers() -> None:
    assert peak_flops("NVIDIA H200", "bf16-mixed") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "32-true") == 19.5e12
    assert peak_flops("Something else", "32-true") is None


@pytest.fixture
def toy(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(repository / "tests" / "support" / "toy.yaml")


def test_a_config_is_measured_and_written(toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["toy", "--config", toy, "--steps", "12", "--blocks", "3", "--results", "out", "--data.count", "9"]
    assert main(["bench", *words]) == 0
    content = json.loads((tmp_path / "out" / "toy.json").read_text())
    assert content["config"] == toy
    assert content["options"] == ["--data.count", "9"]
    assert (content["steps"], content["blocks"]) == (16, 4), "a fit block before and after each raw one"
    assert content["rows_per_step"] == 8
    assert len(content["ratio"]["blocks"]) == 3
    # forward and the weights' gradient, two operations each for 8 rows, 4 inputs, 2 outputs
    assert content["flops_per_step"] == 2 * (2 * 8 * 4 * 2)
    for side in ("fit", "raw"):
        assert content[side]["samples_per_second"] > 0
        assert 0 <= content[side]["data_wait_share"] <= 1
    assert content["ratio"]["min"] <= content["ratio"]["median"] <= content["ratio"]["max"] < 1
    assert content["trainer_ms_per_step"] > 0
    assert not list(tmp_path.glob("runs*"))
    shown = capsys.readouterr().out
    assert "fit over raw" in shown
    assert (tmp_path / "out" / "README.md").read_text() == page(tmp_path / "out")
    assert "| 8" not in shown


def test_without_comparison(toy: str, tmp_path: Path) -> None:
    words = ["toy", "--config", toy, "--steps", "4", "--blocks", "2", "--results", "out", "--vs", "none"]
    assert main(["bench", *words]) == 0
    content = json.loads((tmp_path / "out" / "toy.json").read_text())
    assert content["raw"] is content["ratio"] is content["trainer_ms_per_step"] is None
    assert content["fit"]["samples_per_second"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--blocks", "200"], "--blocks 200: more than"),
        (["--model.lrr", "1"], "did you mean 'lr'"),
        (["--trainer.limit_train_batches", "0"], "the run ended after 0 steps"),
    ],
)
def test_mistakes(toy: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "toy", "--config", toy, "--results", "out", *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_unknown_method_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "suav"]) == 2
    assert "did you mean 'suave'" in capsys.readouterr().err


def test_the_page_shows_benchmarks_and_methods(tmp_path: Path) -> None:
    hardware = {"cpu": "A CPU", "threads": 1, "gpus": []}
    facts = {"hardware": hardware, "versions": {}, "commit": ""}
    write_bench(tmp_path / "x.json", comparison("x", "X takes", 3.21, "s", "<=", 3.0, {"more": 1}) | facts)
    write_bench(tmp_path / "y.json", comparison("y", "Y over Z", 18.04, "", ">=", 15.0, {}) | facts)
    row = {"config": "a/b", "step_ms": 12.345, "shares": {"data": 0.251, "rest": 0.749}}
    write_bench(tmp_path / "z.json", {"benchmark": "z", "parts": [row]} | facts)
    text = (tmp_path / "README.md").read_text()
    assert "| config | step ms | data | rest |" in text
    assert "| a/b | 12.3 | 25% | 75% |" in text
    assert "| `x` | X takes | 3.21 s | <= 3 s | **no** | A CPU |" in text
    assert "| `y` | Y over Z | 18 | >= 15 | yes | A CPU |" in text


def test_the_committed_page_is_what_the_files_say(repository: Path) -> None:
    folder = repository / "results" / "bench"
    if folder.is_dir():
        assert (folder / "README.md").read_text() == page(folder)
