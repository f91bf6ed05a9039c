"""Potential of chains of thought: `fit` trains a small model, `test` analyses it, `predict` measures given traces."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.card import Card
from zoo.errors import UsageError, did_you_mean
from zoo.methods.cot_potential.curves import Chunker, make_trace
from zoo.methods.cot_potential.engine import SCHEMES, LocalEngine
from zoo.methods.cot_potential.losses import Thresholds, trace_loss
from zoo.methods.cot_potential.metrics import all_metrics
from zoo.methods.cot_potential.networks import load_provider
from zoo.methods.cot_potential.optimise import chunk_stop
from zoo.methods.cot_potential.store import SampleStore, fingerprint
from zoo.methods.cot_potential.streams import Policy
from zoo.methods.cot_potential.studies import (
    STUDIES,
    Bench,
    Row,
    Settings,
    check_trace,
    correct_traces,
    curve_row,
    study_curves,
    study_independent,
    study_optimise,
    study_pass,
    study_proxies,
    study_transfer,
)
from zoo.nn.lm import IGNORE, build_lm, token_logprobs
from zoo.nn.optim import decay_groups
from zoo.nn.schedules import total_steps, warmup_cosine_lr

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class CoTPotential(LightningModule):
    """Measure how each part of a chain of thought changes the probability of a correct answer.

    Args:
        lm: Values of a configuration of `transformers`, or a path or name of a model; with `server` it is left empty.
        vocab_size: Number of tokens; from the data.
        eos_id: Token that ends a text; from the data.
        provider: Model whose correct traces are analysed: a checkpoint of a run of this method, a path or a name. Empty
            for the model itself. With another one, `transfer` tells how much of its traces the model needs.
        server: An OpenAI-compatible server instead of `lm`: `{url: http://127.0.0.1:8000/v1, model: NAME}`, and more
            options of `zoo.methods.cot_potential.server.ServerEngine`, such as `concurrency` and `max_tokens_total`.
        engine: `fork` the cache of one prefill, `prefix` (a prefill for each boundary), or `naive`, which has one for
            each completion. They give the same numbers at different cost.
        max_rows: Most completions that are decoded together.
        temperature: Of the completions; 0 is greedy.
        top_p: Nucleus of the completions, after the temperature.
        budget: Most tokens of trace and completion together.
        sample_seed: Seed of the completions; those of `(trace, boundary, row)` are the same in any order of work.
        samples: Completions behind each potential.
        reuse: Whether completions that reproduce a chunk count for its end too.
        stop_width: Stop drawing where Wilson's interval is narrower; 0 for never. Tests of monotonicity count
            every point with the most completions of any, and become too strict.
        chunker: `equal_k`, `every_m_tokens`, `newline`, `sentence` or `step_token`.
        chunk_size: Number of chunks (`equal_k`), or tokens of one.
        step_token: Token that ends a chunk (`step_token`).
        insight_rise: Rise of the potential that is an insight.
        tangent_fall: Fall that is a tangent.
        guess_below: Potential before a correct answer under which it is a late guess.
        studies: What `test` measures: `curves`, `independent` (without reuse), `pass_at_k`, `optimise`, `transfer` and
            `proxies`.
        analysis: Sizes of the studies, see `zoo.methods.cot_potential.studies.Settings`.
        report: Whether `test` and `predict` write `report.html`; rows and tables of events are written anyway.
        lr: Peak learning rate of `fit`.
        betas: Momenta of AdamW.
        weight_decay: Weight decay of matrices.
        warmup_steps: Steps of linear warm-up.
        final_lr: Factor of the learning rate at the end of the cosine.

    Raises:
        ValueError: If a value is out of range or two do not go together.

    Departures:
        Nothing is trained in the paper; `fit` is plain language modelling of traces, for the synthetic task. Its way of
        cutting traces, its candidates and its extraction of answers are not known here.
    """

    card = Card(
        title="The Potential of CoT for Reasoning: A Closer Look at Trace Dynamics",
        summary="Which part of a chain of thought raises the chance of a correct answer: potential curves",
        arxiv="2602.14903",
        year=2026,
        batch="datamodules.reasoning_chain.ReasoningBatch",
        kind="language, analysis",
        links={"vocab_size": "vocab_size", "eos_id": "eos_id"},
    )

    def __init__(
        self,
        lm: str | dict[str, Any] = "",
        vocab_size: int = 0,
        eos_id: int = 0,
        provider: str = "",
        server: dict[str, Any] | None = None,
        engine: str = "fork",
        max_rows: int = 1024,
        temperature: float = 1.0,
        top_p: float = 1.0,
        budget: int = 64,
        sample_seed: int = 0,
        samples: int = 128,
        reuse: bool = True,
        stop_width: float = 0.0,
        chunker: str = "step_token",
        chunk_size: int = 20,
        step_token: str = "SEP",
        insight_rise: float = 0.4,
        tangent_fall: float = 0.3,
        guess_below: float = 0.05,
        studies: list[str] = ["curves"],  # noqa: B006 - never changed; a list is what the command line shows
        analysis: dict[str, Any] | None = None,
        report: bool = True,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        warmup_steps: int = 50,
        final_lr: float = 0.03,
    ) -> None:
        super().__init__()
        self.policy = Policy(temperature, top_p, budget, sample_seed)
        if bool(lm) == (server is not None):
            raise ValueError("lm, server: give exactly one of them")
        if server is not None and provider:
            raise ValueError(f"provider: {provider!r} with a server; traces of a file are given by the data")
        if server is not None:
            self._make_server(server)
        for study in studies:
            if study not in STUDIES:
                raise ValueError(f"studies: {study!r} is not accepted; {did_you_mean(study, STUDIES)}")
        if engine not in SCHEMES:
            raise ValueError(f"engine: {engine!r} is not accepted; {did_you_mean(engine, SCHEMES)}")
        if not 0 <= stop_width < 1:
            raise ValueError(f"stop_width: {stop_width} is not accepted; accepted: 0 (never) to below 1")
        self.chunker = Chunker(chunker, chunk_size, step_token)
        self.thresholds = Thresholds(insight_rise, tangent_fall, guess_below)
        unknown = [key for key in analysis or {} if key not in Settings.__dataclass_fields__ or key == "samples"]
        if unknown:
            known = [key for key in Settings.__dataclass_fields__ if key != "samples"]
            raise ValueError(f"analysis.{unknown[0]}: not accepted; {did_you_mean(unknown[0], known)}")
        sizes = {key: tuple(v) if isinstance(v, list) else v for key, v in (analysis or {}).items()}
        self.settings = Settings(samples=samples, **sizes)  # type: ignore[arg-type]
        self.net: Any = build_lm(lm, vocab_size or None).train() if lm else nn.Module()
        self.val_metrics = nn.ModuleDict({name: MeanMetric() for name in _TRACE_METRICS})
        self.test_metrics = nn.ModuleDict({name: MeanMetric() for name in _TRACE_METRICS})
        self.rows: dict[str, list[Row]] = {}
        self._benches: dict[str, Bench] = {}
        self.save_hyperparameters()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `[B, T, V]` of tokens `[B, T]`."""
        return self.net(input_ids=input_ids).logits

    # training

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the traces' tokens."""
        loss = trace_loss(self(batch["input_ids"]), batch["labels"])
        self.log_dict({"train/loss": loss.detach()}, on_step=True, on_epoch=False)
        return loss

    def _trace_step(self, stage: str, metrics: Any, batch: Mapping[str, Tensor]) -> None:
        logits, labels = self(batch["input_ids"]), batch["labels"]
        counted = (labels != IGNORE).sum(dim=1)
        logprob = token_logprobs(logits, labels).sum(dim=1)
        metrics["loss"].update(-logprob / counted, counted)
        if "logprob" in batch:
            metrics["excess_nll"].update((batch["logprob"] - logprob) / counted, counted)
        if "right" in batch:
            own = token_logprobs(logits, batch["right"]).exp()
            written = batch["right"] != IGNORE
            for name, where in (("easy", written & ~batch["hard"]), ("hard", written & batch["hard"])):
                metrics[f"p_right_{name}"].update(own, where.float())
                metrics[f"p_target_{name}"].update(batch["target"], where.float())
        used = {f"{stage}/{name}": metric for name, metric in metrics.items() if metric.update_called}
        self.log_dict(used, on_step=False, on_epoch=True, add_dataloader_idx=False)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Loss against the writer's own, and probability of the right value where a step is written."""
        self._trace_step("val", self.val_metrics, batch)

    # analysis

    def bench(self, name: str = "model") -> Bench:
        """The engine with what goes with it, of the `model` or of the `provider`."""
        if name not in self._benches:
            self._benches[name] = self._make_bench(name)
        return self._benches[name]

    def _make_bench(self, name: str) -> Bench:
        hparams = self.hparams
        folder = Path(self.trainer.default_root_dir) / "samples"
        facts = (self.policy, hparams["server"], str(hparams["chunker"]), self.chunker)
        options: dict[str, Any] = {
            "chunker": self.chunker,
            "thresholds": self.thresholds,
            "settings": self.settings,
            "reuse": hparams["reuse"],
            "stop_width": hparams["stop_width"],
        }
        if hparams["server"] is not None:
            store = SampleStore(folder / f"server-{fingerprint(None, *facts)}-{self.global_rank}.jsonl")
            return Bench(self._make_server(hparams["server"]), store, **options)
        model = self.net
        if name == "provider":
            model = load_provider(hparams["provider"], hparams["vocab_size"] or None).to(self.device)
        store = SampleStore(folder / f"{name}-{fingerprint(model, *facts)}-{self.global_rank}.jsonl")
        engine = LocalEngine(model, [hparams["eos_id"]], self.policy, hparams["engine"], hparams["max_rows"])
        return Bench(engine, store, model=model, **options)

    def _make_server(self, options: Mapping[str, Any]) -> Any:
        """The engine of a server; also made once to see that the options are accepted."""
        from zoo.methods.cot_potential.server import ServerEngine

        accepted = [name for name in signature(ServerEngine).parameters if name != "policy"]
        for key in options:
            if key not in accepted:
                raise ValueError(f"server.{key}: not accepted; {did_you_mean(key, accepted)}")
        for key in ("url", "model"):
            if not options.get(key):
                raise ValueError(f"server.{key}: not given; accepted: {{url: http://127.0.0.1:8000/v1, model: NAME}}")
        return ServerEngine(self.policy, **options)

    def _start_analysis(self) -> None:
        self.rows, self._benches = {}, {}

    def on_test_start(self) -> None:
        """Forget an earlier analysis; what it drew is on disk."""
        self._start_analysis()

    def on_predict_start(self) -> None:
        """Forget an earlier analysis; what it drew is on disk."""
        self._start_analysis()

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score traces, or make the studies of some problems."""
        if "problems" not in batch:
            self._trace_step("test", self.test_metrics, batch)
            return
        problems, given, studies = batch["problems"], batch["traces"], self.hparams["studies"]
        own = self.bench()
        source = self.bench("provider") if self.hparams["provider"] else own
        try:
            needed = {"curves", "independent", "transfer", "proxies"} & {*studies}
            traces = correct_traces(source, problems, given) if needed else []
            if {"curves", "independent", "proxies"} & {*studies}:
                rows = study_curves(own, traces)
                self._add("curves", rows)
                if "independent" in studies:
                    self._add("independent", study_independent(own, traces, rows))
                if "proxies" in studies:
                    self._add("proxies", study_proxies(own, traces, rows))
            if "transfer" in studies:
                self._add("transfer", study_transfer(own, traces))
            if "pass_at_k" in studies:
                self._add("pass_at_k", study_pass(own, problems))
            if "optimise" in studies:
                own.stop = own.stop or self._chunk_stop(problems[0])
                self._add("optimise", study_optimise(own, problems))
        except ValueError as error:
            raise UsageError(str(error)) from error

    def _chunk_stop(self, problem: Any) -> list[Any]:
        if self.hparams["server"] is not None:
            return [self.chunker.token] if self.chunker.kind == "step_token" else []
        words = [problem.pieces([token])[0] for token in range(self.hparams["vocab_size"])]
        return chunk_stop(self.chunker, words)[0]

    def _add(self, study: str, rows: list[Row]) -> None:
        self.rows.setdefault(study, []).extend(rows)

    def on_test_epoch_end(self) -> None:
        """Log the numbers of all processes' rows, and write rows and report."""
        self.rows = gather_rows(self.rows)
        metrics = all_metrics(self.rows)
        for kind in ("easy", "hard"):
            own, target = (self.test_metrics[f"p_{what}_{kind}"] for what in ("right", "target"))
            if own.update_called:
                metrics[f"p_right_{kind}_error"] = float((own.compute() - target.compute()).abs())  # type: ignore[operator]
        for name, bench in self._benches.items():
            meter = getattr(bench.engine, "meter", None)
            if meter is not None:
                metrics[f"{name}_decoded_tokens"] = float(meter.decoded)
        self.log_dict({f"test/{name}": value for name, value in metrics.items()}, sync_dist=True)
        self._write()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[Row]:
        """Curves of given traces, correct or not, as plain values."""
        bench = self.bench()
        try:
            traces = [
                make_trace(problem, tokens, self.chunker, f"t{i}")
                for problem, own in zip(batch["problems"], batch["traces"], strict=True)
                for i, tokens in enumerate(own)
            ]
            for trace in traces:
                check_trace(trace)
            rows = [curve_row(curve, self.thresholds) for curve in bench.curves(traces)]
        except ValueError as error:
            raise UsageError(str(error)) from error
        self._add("curves", rows)
        return rows

    def on_predict_epoch_end(self) -> None:
        """Write curves and report."""
        self.rows = gather_rows(self.rows)
        self._write()

    def _write(self) -> None:
        if not self.trainer.is_global_zero or not self.rows:
            return
        from zoo.methods.cot_potential.figures import png_images
        from zoo.methods.cot_potential.report import log_report, write_report, write_rows

        folder = Path(self.trainer.default_root_dir) / "analysis"
        write_rows(folder, self.rows)
        if self.hparams["report"]:
            curves, unit = self.rows.get("curves", []), "tokens" if self.hparams["server"] is None else "characters"
            images = png_images(self.rows)
            path = write_report(folder / "report.html", curves, all_metrics(self.rows), self.thresholds, images, unit)
            log_report(self.trainer.loggers, path, curves)

    def figures(self) -> dict[str, Figure]:
        """Curves with their intervals, pass@k, transfer and optimised traces; what there is data for."""
        from zoo.methods.cot_potential.figures import all_figures

        return all_figures(self.rows)

    def configure_optimizers(self) -> Any:
        """AdamW with decay on matrices alone, linear warm-up, cosine."""
        hparams = self.hparams
        groups = decay_groups(self.parameters(), hparams["weight_decay"])
        optimizer = torch.optim.AdamW(groups, lr=hparams["lr"], betas=tuple(hparams["betas"]))
        scheduler = warmup_cosine_lr(optimizer, total_steps(self.trainer), hparams["warmup_steps"], hparams["final_lr"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


#: Numbers of given traces.
_TRACE_METRICS = ("loss", "excess_nll", "p_right_easy", "p_target_easy", "p_right_hard", "p_target_hard")


def gather_rows(rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Rows of all processes, in the order of the ranks."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, rows)
    names = list(dict.fromkeys(name for part in found for name in part))
    return {name: [row for part in found for row in part.get(name, [])] for name in names}
