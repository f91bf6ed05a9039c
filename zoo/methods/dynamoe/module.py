"""DynaMoE as a LightningModule, with the dense model that it starts from and the routers that it is compared with.

Longer than other files: the options of three objectives, their explanation and their check are half of it, and stand
together because most of them are checked against each other. What is computed is in the modules beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from zoo.card import Card
from zoo.methods.dynamoe.evaluation import Evaluator, Sequences
from zoo.methods.dynamoe.losses import (
    MODES,
    SIMILARITIES,
    active_parameters,
    activity,
    activity_penalty,
    difficulty,
    label_loss,
    row_mean,
    score_loss,
)
from zoo.methods.dynamoe.networks import Importances, add_routers, load_dense, nest, router_parameters
from zoo.methods.dynamoe.routes import EXECUTIONS, HEADS, ByRouter, Gumbel, Mixture, Route, Trace, hashed_uniform
from zoo.methods.dynamoe.study import Study, flextron_study, routed_study, slices_study
from zoo.nn.distributed import all_gather_rows, all_reduce_mean, all_reduce_sum
from zoo.nn.lm import IGNORE, build_lm, token_logprobs
from zoo.nn.optim import decay_groups
from zoo.nn.pretrained import read_weights
from zoo.nn.schedules import total_steps, trapezoid, warmup_cosine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OBJECTIVES = ("dynamoe", "dense", "flextron")
_CHOICES = {
    "objective": OBJECTIVES,
    "similarity": SIMILARITIES,
    "label_mode": MODES,
    "head": HEADS,
    "execution": EXECUTIONS,
    "schedule": ("cosine", "trapezoid"),
}
_GOLDEN_RATIO = 0.6180339887498949


class DynaMoE(LightningModule):
    """Turn the MLPs of a causal language model into nested experts and learn which token needs how wide a one.

    Args:
        lm: Values of a configuration of `transformers`, or a path or name of a pre-trained model.
        objective: `dynamoe`; `dense` trains the model as it is, to start from or to compare with; `flextron` trains the
            routers through the language model's loss for one activity.
        experts: Nested experts of each MLP; expert e has the first (e + 1) / experts of the hidden neurons.
        similarity: What makes an expert good enough: `inner`, `cosine` or `relerr`, see `losses.similarity`.
        head: `score`: routers predict similarities, and theta is free at inference. `label`: they predict the label.
        label_mode: Where similarity is not monotone: `first` good expert, or `stable`; `test` reads `first`.
        theta_train: Threshold of the labels of the label head.
        theta: Threshold of the score head in validation, prediction and generation; 1 or more is the full width.
        tau: The same for the label head: probability that the chosen width has to hold; null takes the likeliest label.
        router_units: Hidden units of a router.
        p_full: Part of the training sequences that run the full model.
        p_random: Part that runs a random width in each layer; the others run what the router says.
        unrouted_fraction: Part of the training in which no sequence is routed yet.
        theta_low: Least theta of the routed sequences of a score head; a new one each step.
        theta_high: Largest.
        lambda_router: Weight of the router's loss.
        freeze_backbone: Train the routers alone.
        sort_neurons: Put important neurons first before the training starts.
        sort_batches: Training batches from which importance is measured.
        execution: `masked` (a reference: all is computed) or `grouped` (only what was chosen).
        target_activity: Of `flextron`.
        beta: Weight of its penalty.
        init_from: Checkpoint of a run of this method that the language model starts from; routers are new.
        lr: Peak learning rate of AdamW.
        router_lr: That of the routers.
        betas: Its momenta.
        weight_decay: Weight decay of matrices.
        schedule: `cosine` to zero, or `trapezoid`: constant up to half of the steps, then down to a twentieth.
        warmup_steps: Steps of linear warm-up.
        thresholds: Values of theta (score) or tau (label) at which `test` measures.
        shown_thresholds: Those of them at which difficulty is analysed.
        greedy_sequences: Calibration sequences for the constant widths that the router is compared with.
        eval_batch_size: Sequences at a time in `test`.
        vocab_size: Number of tokens, from the data.

    Raises:
        ValueError: If a value is out of range, or the model's MLPs are not understood.

    Departures:
        Equations and settings of the paper that could not be read are reconstructed or ours, see the method's page.
    """

    card = Card(
        title="From Dense to Dynamic: Token-Difficulty Driven MoEfication of Pre-Trained LLMs",
        summary="Nested experts inside a dense language model, as wide for each token as its difficulty asks",
        arxiv="2502.12325",
        year=2025,
        batch="datamodules.token_classes.TokenClassBatch",
        kind="language, inference cost",
        links={"vocab_size": "vocab_size"},
        skip_checks={"sharded": "the pass that sorts the neurons runs the network before the first step"},
        compiles=False,
    )

    sums: Tensor

    def __init__(
        self,
        lm: str | dict[str, Any],
        objective: str = "dynamoe",
        experts: int = 4,
        similarity: str = "inner",
        head: str = "score",
        label_mode: str = "first",
        theta_train: float = 0.8,
        theta: float = 0.75,
        tau: float | None = None,
        router_units: int = 64,
        p_full: float = 0.25,
        p_random: float = 0.25,
        unrouted_fraction: float = 0.1,
        theta_low: float = 0.5,
        theta_high: float = 0.95,
        lambda_router: float = 1.0,
        freeze_backbone: bool = False,
        sort_neurons: bool = True,
        sort_batches: int = 32,
        execution: str = "masked",
        target_activity: float = 0.5,
        beta: float = 10.0,
        init_from: str | None = None,
        lr: float = 3e-4,
        router_lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        schedule: str = "cosine",
        warmup_steps: int = 15,
        thresholds: list[float] | None = None,
        shown_thresholds: list[float] | None = None,
        greedy_sequences: int = 32,
        eval_batch_size: int = 32,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        given = dict(locals())
        self.knobs = sorted(thresholds or [0.45, 0.55, 0.65, 0.75, 0.83, 0.9, 0.96])
        self.shown = sorted(shown_thresholds or [0.65, 0.83])
        _check(given, self.knobs, self.shown)
        self.save_hyperparameters()
        self.lm = build_lm(lm, vocab_size).train()
        self.layers, self.control = nest(self.lm, experts, similarity)
        self.control.execution = execution
        if objective == "flextron":
            add_routers(self.layers, router_units, "label")
        elif objective == "dynamoe":
            add_routers(self.layers, router_units, head)
        if freeze_backbone:
            trained = {id(p) for p in router_parameters(self.layers)}
            for parameter in self.lm.parameters():
                parameter.requires_grad_(id(parameter) in trained)
        self.control.route = self.router_route()
        self.register_buffer("sums", torch.zeros(5), persistent=False)
        self.study: Study | None = None
        self._kept: dict[int, list[dict[str, Tensor]]] = {}
        self._unrouted_steps = 0

    # -- routes -----------------------------------------------------------------------------------------------------

    def router_route(self) -> Route:
        """The route of inference: by the router, at theta or tau; the full model where there is no router."""
        hp = self.hparams
        if hp["objective"] == "dense":
            return Route()
        if hp["objective"] == "flextron":
            return ByRouter("label", None)
        return ByRouter(hp["head"], hp["theta"] if hp["head"] == "score" else hp["tau"])

    def training_route(self, ids: Tensor) -> Route:
        """The route of a training step: for each sequence full, random or routed.

        It is drawn from the tokens and the step, so that it depends neither on the number of processes nor on how a
        batch is divided.
        """
        hp, step, layers = self.hparams, self.global_step, len(self.layers)
        if hp["objective"] == "dense":
            return Route()
        if hp["objective"] == "flextron":
            shape = (*ids.shape, layers, hp["experts"])
            return Gumbel(hashed_uniform(ids, step, ids.shape[1] * layers * hp["experts"]).reshape(shape))
        draws = hashed_uniform(ids, step, 1 + layers)
        fixed = hp["p_full"] + hp["p_random"]
        u = draws[:, 0] * (fixed if step < self._unrouted_steps else 1.0)
        kind = (u >= hp["p_full"]).long() + (u >= fixed).long()
        if step < self._unrouted_steps and not fixed:
            kind = torch.zeros_like(kind)
        random = (draws[:, 1:] * hp["experts"]).long()
        low, high = hp["theta_low"], hp["theta_high"]
        theta = low + (high - low) * ((step + 1) * _GOLDEN_RATIO % 1.0)  # evenly spread over any stretch of steps
        return Mixture(kind, random, hp["experts"], hp["head"], theta if hp["head"] == "score" else None)

    # -- training ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load `init_from` before training; a resumed run has its weights in the checkpoint."""
        if stage == "fit" and self.hparams["init_from"] and not self.trainer.ckpt_path:
            load_dense(self.lm, read_weights(self.hparams["init_from"]))

    def on_train_start(self) -> None:
        """Sort the neurons before the first step."""
        hp = self.hparams
        self._unrouted_steps = round(hp["unrouted_fraction"] * total_steps(self.trainer))
        loader: Any = self.trainer.train_dataloader
        batches = min(hp["sort_batches"], len(loader or ()))
        if hp["sort_neurons"] and hp["objective"] != "dense" and self.global_step == 0 and batches:
            importances = Importances(self.layers)
            importances.add(
                self.lm, (self.transfer_batch_to_device(loader.dataset[0, i], self.device, 0) for i in range(batches))
            )
            importances.sort()

    def predict_labels(self, batch: Mapping[str, Tensor], route: Route, trace: Trace) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood `[B, T]` of the labels and which tokens are no padding, `[B, T]`."""
        given = batch.get("attention_mask")
        with self.control.using(route, trace):
            logits = self.lm(input_ids=batch["input_ids"], attention_mask=given, use_cache=False).logits
        mask = torch.ones_like(batch["labels"]).bool() if given is None else given.bool()
        return -token_logprobs(logits, batch["labels"]), mask

    def router_loss(self, trace: Trace, mask: Tensor) -> Tensor:
        """Mean over layers and tokens of the router's loss on the present difficulty."""
        if not trace.predictions:  # a single expert: nothing to choose
            return torch.zeros((), device=mask.device)
        predictions, scores = trace.stacked("predictions"), trace.stacked("scores")
        if self.hparams["head"] == "score":
            losses = score_loss(predictions, scores)
        else:
            labels = difficulty(scores, self.hparams["theta_train"], self.hparams["label_mode"])
            losses = label_loss(predictions, labels)
        return row_mean(losses.mean(0), mask)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Run each sequence at its widths; teach the routers the difficulty that the layers saw on the way."""
        hp, trace = self.hparams, Trace()
        nll, mask = self.predict_labels(batch, self.training_route(batch["input_ids"]), trace)
        loss = lm_loss = row_mean(nll, batch["labels"] != IGNORE)
        logged = {"train/nll": lm_loss}
        if hp["objective"] == "dynamoe":
            router_loss = self.router_loss(trace, mask)
            loss = lm_loss + hp["lambda_router"] * router_loss
            widths = trace.stacked("widths").long()
            logged |= {"train/router_loss": router_loss, "train/activity": activity(widths, self.sizes)[mask].mean()}
        elif hp["objective"] == "flextron":
            active = (trace.stacked("widths") * self.sizes[:, None, None]).sum(-1).mean(0)[mask]
            penalty = activity_penalty(all_reduce_mean(active.mean()), hp["target_activity"])
            loss = lm_loss + hp["beta"] * penalty
            logged |= {"train/activity": active.mean(), "train/penalty": penalty}
        logged["train/loss"] = loss
        self.log_dict({name: value.detach() for name, value in logged.items()}, on_step=True, on_epoch=False)
        return loss

    @property
    def sizes(self) -> Tensor:
        """Fraction of the hidden neurons of each expert, `[L, E]`."""
        rows = [[w / mlp.hidden_width for w in mlp.widths] for mlp in self.layers]
        return torch.tensor(rows, device=self.device)

    def configure_optimizers(self) -> Any:
        """AdamW with decay on matrices only, a learning rate for the routers, warm-up, and the schedule."""
        hp, steps = self.hparams, total_steps(self.trainer)
        routers = router_parameters(self.layers)
        chosen = {id(p) for p in routers}
        backbone = [p for p in self.lm.parameters() if id(p) not in chosen]
        groups = [
            {**group, "lr": lr}
            for parameters, lr in ((backbone, hp["lr"]), (routers, hp["router_lr"]))
            for group in decay_groups(parameters, hp["weight_decay"])
            if group["params"]
        ]
        optimizer = torch.optim.AdamW(groups, lr=hp["lr"], betas=tuple(hp["betas"]))

        def factor(step: int) -> float:
            if hp["schedule"] == "trapezoid":
                return trapezoid(step, steps, hp["warmup_steps"], 0.5, 0.05)
            return warmup_cosine(step, steps, hp["warmup_steps"])

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- evaluation -------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self.sums.zero_()

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Sum the loss of the full model and of the routed one."""
        trace, count = Trace(), (batch["labels"] != IGNORE).sum()
        full, mask = self.predict_labels(batch, Route(), trace)
        routed, active = full, torch.ones_like(full)
        if self.hparams["objective"] != "dense":
            routed, _ = self.predict_labels(batch, self.router_route(), trace)
            active = activity(trace.stacked("widths").long(), self.sizes)
        self.sums += torch.stack([full.sum(), routed.sum(), count.float(), active[mask].sum(), mask.sum().float()])

    def on_validation_epoch_end(self) -> None:
        """Log nats per token at full width and as routed, and the activity."""
        full, routed, count, active, tokens = all_reduce_sum(self.sums)
        logged = {"val/nll_full": full / count}
        if self.hparams["objective"] != "dense":
            logged |= {"val/nll_router": routed / count, "val/activity": active / tokens}
        self.log_dict(logged, sync_dist=True)

    def on_test_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self._kept = {}

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep the sequences; those of a second loader are for calibration."""
        self._kept.setdefault(dataloader_idx, []).append(dict(batch))

    def sequences(self, loader: int) -> Sequences | None:
        """All sequences of a loader of `test`, from all processes."""
        if loader not in self._kept:
            return None
        batches = self._kept[loader]
        names = [name for name, value in batches[0].items() if isinstance(value, Tensor)]
        return Sequences.from_batches([{n: all_gather_rows(torch.cat([b[n] for b in batches])) for n in names}])

    def on_test_epoch_end(self) -> None:
        """Make the study of this objective and log it; every process makes the same one."""
        hp, test, calibration = self.hparams, self.sequences(0), self.sequences(1)
        assert test is not None
        evaluator = Evaluator(self.lm, self.layers, self.control, test, hp["eval_batch_size"])
        if hp["objective"] == "dense":
            self.study = slices_study(evaluator, calibration or test)
        elif hp["objective"] == "flextron":
            self.study = flextron_study(evaluator)
        else:
            self.study = routed_study(
                evaluator, calibration, hp["head"], self.knobs, self.shown, hp["theta_train"], hp["greedy_sequences"]
            )
        self._kept = {}
        found = {**self.study.metrics, **self.parameter_counts()}
        self.log_dict({f"test/{name}": torch.tensor(value) for name, value in found.items()}, sync_dist=True)

    def parameter_counts(self, active: float = 1.0) -> dict[str, float]:
        """Parameters of the model, of the routers, and those in use at an activity."""
        routers = sum(p.numel() for p in router_parameters(self.layers))
        total = sum(p.numel() for p in self.lm.parameters()) - routers
        hidden = [mlp.hidden_width for mlp in self.layers]
        first = self.layers[0]
        used = active_parameters(
            total, routers, first.model_width, hidden, [active * h for h in hidden], first.matrices
        )
        embeddings: Any = self.lm.get_input_embeddings()
        return {
            "parameters": float(total),
            "parameters_router": float(routers),
            "parameters_active": used,
            "parameters_embedding": float(embeddings.weight.numel()),
        }

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Widths that the router chooses, int64 `[L, B, T]`."""
        trace = Trace()
        self.predict_labels(batch, self.router_route(), trace)
        return trace.stacked("widths").long()

    def figures(self) -> dict[str, Figure]:
        """Loss against active parameters, expert use by layer, and tokens coloured by their width."""
        from zoo.methods.dynamoe.figures import curve_figure, tokens_figure, usage_figure

        if self.study is None or not self.study.curves:
            return {}
        drawn = {"nll_over_active": curve_figure(self.study.curves, self.parameter_counts)}
        if self.study.usage is not None:
            drawn["expert_use"] = usage_figure(self.study.usage)
        if self.study.sample is not None:
            ids, active = self.study.sample
            decode = getattr(getattr(self.trainer, "datamodule", None), "token_texts", None)
            texts = [str(i) for i in ids.tolist()] if decode is None else decode(ids.tolist())
            drawn["tokens"] = tokens_figure(texts, active)
        return drawn


def _check(given: Mapping[str, Any], knobs: list[float], shown: list[float]) -> None:
    """Raise `ValueError` for the first value that is not accepted."""
    for key, accepted in _CHOICES.items():
        if given[key] not in accepted:
            raise ValueError(f"{key}: {given[key]!r} is unknown; accepted: {', '.join(accepted)}")
    for key in ("experts", "router_units", "greedy_sequences", "eval_batch_size"):
        if given[key] < 1:
            raise ValueError(f"{key}: {given[key]} is not accepted; accepted: 1 or more")
    for key in ("lr", "router_lr"):
        if given[key] <= 0:
            raise ValueError(f"{key}: {given[key]} is not accepted; accepted: above 0")
    for key in ("sort_batches", "lambda_router", "beta", "warmup_steps"):
        if given[key] < 0:
            raise ValueError(f"{key}: {given[key]} is not accepted; accepted: 0 or more")
    fractions = {
        key: given[key]
        for key in ("theta", "theta_train", "p_full", "p_random", "unrouted_fraction", "theta_low", "theta_high")
    }
    fractions |= {f"thresholds: {value}": value for value in knobs} | {"target_activity": given["target_activity"]}
    fractions |= {"tau": given["tau"]} if given["tau"] is not None else {}
    for key, value in fractions.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{key.partition(':')[0]}: {value} is not accepted; accepted: 0 to 1")
    if given["theta_train"] >= 1:
        raise ValueError("theta_train: 1 makes every token hard; accepted: 0 up to less than 1")
    if given["p_full"] + given["p_random"] > 1:
        raise ValueError(
            f"p_full: {given['p_full']}, p_random: {given['p_random']} are not accepted; accepted: 1 or less together"
        )
    if given["theta_low"] > given["theta_high"]:
        raise ValueError(f"theta_low: {given['theta_low']} is above theta_high: {given['theta_high']}")
    if not set(shown) <= set(knobs):
        raise ValueError(f"shown_thresholds: {shown} are not all among the thresholds {knobs}")
    if given["freeze_backbone"] and given["objective"] == "dense":
        raise ValueError(
            "freeze_backbone: true leaves nothing to train with objective: dense; accepted: dynamoe, flextron"
        )
