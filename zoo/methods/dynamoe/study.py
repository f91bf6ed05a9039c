"""The studies that `test` makes of one model: its curve with all controls, its slices, what figures show."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zoo.methods.dynamoe.evaluation import (
    CLASSES,
    Evaluator,
    Point,
    Sequences,
    at_activity,
    difficulty_metrics,
    greedy_constants,
    independent,
    paired,
    shuffled,
    significant,
    token_table,
)
from zoo.methods.dynamoe.losses import activity, difficulty, narrowest_above
from zoo.methods.dynamoe.networks import Importances
from zoo.methods.dynamoe.routes import ByRouter, Fixed, Oracle, Route

#: Bands of activity in which the specification compares, fixed before the runs.
MIDDLE, UPPER, WIDE, ORACLE = (0.35, 0.60), (0.60, 0.75), (0.35, 0.70), (0.35, 0.80)

Gain = tuple[float, float, float]


@dataclass
class Study:
    """Metrics by name, and what the figures show.

    Attributes:
        metrics: Numbers.
        curves: Activity and nats per token of each way of choosing widths.
        usage: Share of the tokens with each expert, `[L, E]`, at the middle of the curve.
        sample: Tokens `[T]` of one sequence and their activity `[T]` there.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    usage: Tensor | None = None
    sample: tuple[Tensor, Tensor] | None = None

    def add(self, curve: str, point: Point) -> Point:
        """Put a point on a curve."""
        self.curves.setdefault(curve, []).append((point.activity, point.mean))
        return point


def knob_name(knob: float | None) -> str:
    """`0.65` is `065` in names of metrics."""
    return "argmax" if knob is None else f"{round(100 * knob):03d}"


def class_means(values: Tensor, sequences: Sequences, counted: Tensor) -> dict[str, float]:
    """Mean of `[N, T]` over the counted tokens of each class that occurs."""
    found = {}
    for number, name in enumerate(CLASSES):
        chosen = counted & (sequences.token_class == number)
        if bool(chosen.any()):
            found[name] = float(values[chosen].mean())
    return found


def full_width(evaluator: Evaluator, study: Study) -> Point:
    """Run the whole model; log its loss, accuracy, and the loss of each class."""
    point = evaluator.run(Route())
    s = evaluator.sequences
    study.metrics |= {"nll_full": point.mean, "acc_full": point.correct / float(point.count.sum())}
    by_class = class_means(point.token_nll, s, s.labels >= 0)
    study.metrics |= {f"nll_full_{name}": value for name, value in by_class.items()}
    return point


def slices_study(evaluator: Evaluator, calibration: Sequences) -> Study:
    """A dense model cut into slices, before and after its neurons are sorted by importance (the sorting stays)."""
    study = Study()
    full_width(evaluator, study)
    layers = evaluator.layers
    for state in ("unsorted", "sorted"):
        if state == "sorted":
            importances = Importances(layers)
            rows = range(0, len(calibration), evaluator.batch_size)
            parts = [slice(start, start + evaluator.batch_size) for start in rows]
            batches = [{"input_ids": calibration.input_ids[p], "attention_mask": calibration.mask[p]} for p in parts]
            importances.add(evaluator.model, batches)
            importances.sort(reduce=False)
        for expert in range(layers[0].experts - 1):
            point = study.add(f"static {state}", evaluator.run(evaluator.constant([expert] * len(layers))))
            study.metrics[f"nll_static_{expert}_{state}"] = point.mean
    return study


def flextron_study(evaluator: Evaluator) -> Study:
    """A router that was trained for one activity: one point."""
    study = Study()
    full_width(evaluator, study)
    point = study.add("flextron_like", evaluator.run(ByRouter("label", None)))
    study.metrics |= {"nll_router": point.mean, "activity_router": point.activity}
    return study


def routed_study(
    evaluator: Evaluator,
    calibration: Sequences | None,
    head: str,
    knobs: Sequence[float],
    shown_knobs: Sequence[float],
    theta_train: float,
    greedy_sequences: int,
) -> Study:
    """The curve of a router and of everything that it is compared with at its own activity.

    Args:
        evaluator: Of the test sequences.
        calibration: Sequences for the constants of each layer and for the table of tokens; None leaves these out.
        head: Kind of router.
        knobs: Thresholds, ascending.
        shown_knobs: Those at which difficulty is analysed.
        theta_train: Threshold of the labels of a label head.
        greedy_sequences: Calibration sequences for the constants.
    """
    study, s = Study(), evaluator.sequences
    full = full_width(evaluator, study)
    statics = static_widths(evaluator, study)
    curves: dict[str, list[Point]] = {}
    if calibration is not None:
        curves["layer_adaptive"] = [full, *adaptive_widths(evaluator, calibration.first(greedy_sequences)), statics[0]]
    if head == "score":
        curves["oracle"] = [*(evaluator.run(Oracle(knob)) for knob in knobs), full]
        if calibration is not None:
            routes = table_routes(evaluator, calibration, knobs)
            curves["token_table"] = [statics[0], *(evaluator.run(route) for route in routes), full]
    for curve, points in curves.items():
        for point in points:
            study.add(curve, point)

    generator = torch.Generator().manual_seed(0)
    groups = {"shuffled": torch.where(s.mask, 0, -1), "shuffled_in_class": torch.where(s.mask, s.token_class, -1)}
    gains: dict[str, list[Gain]] = {name: [] for name in (*groups, *curves)}
    router: list[Point] = []

    def compare(control: str, nll: Tensor | None, point: Point, knob: str) -> None:
        if nll is not None:
            gain, error = paired(nll, point)
            gains[control].append((point.activity, gain, error))
            study.metrics |= {f"{control}_gain_{knob}": gain, f"{control}_se_{knob}": error}

    for knob in knobs:
        point = study.add("router", evaluator.run(ByRouter(head, knob), keep=("scores",)))
        scores, name = point.trace.pop("scores"), knob_name(knob)
        study.metrics |= {f"nll_{name}": point.mean, f"activity_{name}": point.activity}
        for control, group in groups.items():
            run = study.add(control, evaluator.run(Fixed(shuffled(point.widths, group, generator))))
            compare(control, run.nll, point, name)
        for curve, points in curves.items():
            compare(curve, at_activity(points, point.activity), point, name)
        if knob in shown_knobs:
            study.add("random_iid", evaluator.run(Fixed(independent(point.widths, s.mask, generator))))
            labels = difficulty(scores, knob if head == "score" else theta_train)
            found = difficulty_metrics(point, labels, evaluator.sizes, s, full.token_nll)
            active = activity(point.widths.long(), evaluator.sizes)
            found |= {f"activity_{c}": value for c, value in class_means(active, s, s.mask).items()}
            study.metrics |= {f"{key}_{name}": value for key, value in found.items()}
        router.append(point)
    study.metrics |= summary(router, gains) | summary_of_difficulty(study.metrics, shown_knobs)
    middle = router[len(router) // 2]
    experts = range(evaluator.sizes.shape[1])
    study.usage = torch.stack([(middle.widths[:, s.mask] == e).float().mean(1) for e in experts], dim=1).cpu()
    study.sample = (s.input_ids[0].cpu(), activity(middle.widths[:, :1].long(), evaluator.sizes)[0].cpu())
    return study


def static_widths(evaluator: Evaluator, study: Study) -> list[Point]:
    """The same expert for all tokens of all layers; the narrowest first, without the full one."""
    points = []
    for expert in range(evaluator.layers[0].experts - 1):
        route = evaluator.constant([expert] * len(evaluator.layers))
        points.append(study.add("static_width", evaluator.run(route)))
        study.metrics[f"nll_static_{expert}"] = points[-1].mean
    return points


def adaptive_widths(evaluator: Evaluator, calibration: Sequences) -> list[Point]:
    """Constants of each layer, chosen greedily by the loss on calibration data; without the two ends."""
    chain = greedy_constants(
        lambda widths: evaluator.run(evaluator.constant(widths), on=calibration).mean,
        len(evaluator.layers),
        evaluator.layers[0].experts,
    )
    return [evaluator.run(evaluator.constant(widths)) for widths in chain[1:-1]]


def table_routes(evaluator: Evaluator, calibration: Sequences, knobs: Sequence[float]) -> list[Route]:
    """Routes by the mean prediction for each input token, whatever stands around it."""
    # any threshold will do for the states that the router is asked about: those of the full model
    seen = evaluator.run(ByRouter("score", 1.0), keep=("predictions",), on=calibration).trace["predictions"]
    vocab_size = evaluator.model.get_input_embeddings().num_embeddings
    table = token_table(seen, calibration.input_ids, calibration.mask, vocab_size)
    predicted = table[:, evaluator.sequences.input_ids]
    return [Fixed(narrowest_above(predicted, knob)) for knob in knobs]


def summary(router: Sequence[Point], gains: dict[str, list[Gain]]) -> dict[str, float]:
    """The numbers that the claims are about."""
    metrics: dict[str, float] = {}
    steps = list(itertools.pairwise(router))
    if steps:
        metrics["activity_step_min"] = min(b.activity - a.activity for a, b in steps)
        metrics["nll_rise_max"] = max(b.mean - a.mean for a, b in steps)
        metrics["nll_spread"] = router[0].mean - router[-1].mean
        area = sum((b.activity - a.activity) * (a.mean + b.mean) / 2 for a, b in steps)
        metrics["curve_area"] = area / max(router[-1].activity - router[0].activity, 1e-9)
    metrics["shuffled_gain"] = significant(gains["shuffled"], *MIDDLE, errors=4, rank=2)
    metrics["shuffled_gain_upper"] = significant(gains["shuffled"], *UPPER, errors=4, rank=1)
    metrics["shuffled_in_class_gain"] = significant(gains["shuffled_in_class"], *MIDDLE, errors=3, rank=2)
    for name, band in (("layer_adaptive", WIDE), ("token_table", WIDE), ("oracle", ORACLE)):
        inside = [gain for gain in gains.get(name, []) if band[0] <= gain[0] <= band[1]]
        if inside:
            metrics[f"{name}_gain"] = sum(gain for _, gain, _ in inside) / len(inside)
            metrics[f"{name}_gap_max"] = max(-gain for _, gain, _ in inside)
    return metrics


def summary_of_difficulty(metrics: dict[str, float], knobs: Sequence[float]) -> dict[str, float]:
    """The least over the thresholds at which difficulty was analysed."""
    found: dict[str, float] = {}
    for key in ("quartile_gap", "spearman_oracle"):
        values = [metrics[name] for knob in knobs if (name := f"{key}_{knob_name(knob)}") in metrics]
        if values:
            found[key] = min(values)
    gaps = [
        metrics[f"activity_text_{name}"] - metrics[f"activity_boilerplate_{name}"]
        for name in map(knob_name, knobs)
        if {f"activity_text_{name}", f"activity_boilerplate_{name}"} <= metrics.keys()
    ]
    return found | ({"class_gap": min(gaps)} if gaps else {})
