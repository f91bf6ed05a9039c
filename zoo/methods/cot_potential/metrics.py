"""Rows of the studies as the numbers that are logged. Rates are over traces; a number without data is left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from zoo.methods.cot_potential.losses import area_under_curve, corrected_pass_at_k, pass_at_k

#: `k` of pass@k that are logged, as far as there are samples.
KS = (1, 2, 4, 8, 16, 32, 64)
#: What the planted kinds are called that a rise or a fall belongs to.
INSIGHT_KINDS, TANGENT_KINDS = ("hard", "no"), ("try",)


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are numbers; NaN if there are none."""
    known = [float(v) for v in values if not math.isnan(float(v))]
    return sum(known) / len(known) if known else math.nan


def all_metrics(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Every number that the rows of the studies give."""
    out: dict[str, float] = {}
    for study, function in _METRICS.items():
        if rows.get(study):
            out |= function(rows[study])
    return {name: value for name, value in out.items() if not math.isnan(value)}


def curve_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Rates of events; against the exact curve and the planted kinds where there are such."""
    out = {
        "traces": float(len(rows)),
        "insight_rate": mean(bool(r["insights"]) for r in rows),
        "tangent_rate": mean(bool(r["tangents"]) for r in rows),
        "late_guess_rate": mean(r["late_guess"] for r in rows),
        "monotone_rate": mean(r["monotone"] for r in rows),
        "monotone_2se_rate": mean(r["monotone_2se"] for r in rows),
        "chunks_per_trace": mean(len(r["pot"]) - 1 for r in rows),
    }
    pairs = [(p, e) for r in rows if r["exact"] for p, e in zip(r["pot"][:-1], r["exact"][:-1], strict=True)]
    out["mae_exact"] = mean(abs(p - e) for p, e in pairs)
    known = [r for r in rows if "exact_monotone" in r]
    for own, true in (
        ("insights", "insight"),
        ("tangents", "tangent"),
        ("late_guess", "late_guess"),
        ("monotone", "monotone"),
    ):
        out[f"exact_{true}_rate"] = mean(r[f"exact_{own}"] for r in known)
        out[f"{true}_agreement"] = mean(bool(r[own]) == r[f"exact_{own}"] for r in known)
    out["monotone_2se_agreement"] = mean(r["monotone_2se"] == r["exact_monotone"] for r in known)
    kinds = [r for r in rows if any(r["kinds"])]
    out["insight_precision"] = mean(r["kinds"][k] in INSIGHT_KINDS for r in kinds for k in r["insights"])
    out["tangent_precision"] = mean(r["kinds"][k] in TANGENT_KINDS for r in kinds for k in r["tangents"])
    return out


def independent_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What independent estimates read as monotone."""
    return {
        "independent_monotone_rate": mean(r["monotone"] for r in rows),
        "independent_monotone_2se_rate": mean(r["monotone_2se"] for r in rows),
    }


def pass_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """pass@k with and without late guesses, and how well these are told from the others."""
    out: dict[str, float] = {}
    for k in (k for k in KS if k <= min(r["n"] for r in rows)):
        guesses = [sum(t["late_guess"] for t in r["correct"]) for r in rows]
        out[f"pass_at_{k}"] = mean(pass_at_k(r["n"], len(r["correct"]), k) for r in rows)
        out[f"corrected_pass_at_{k}"] = mean(
            corrected_pass_at_k(r["n"], len(r["correct"]), g, k) for r, g in zip(rows, guesses, strict=True)
        )
        out[f"pass_inflation_{k}"] = out[f"pass_at_{k}"] - out[f"corrected_pass_at_{k}"]
    traces = [t for r in rows for t in r["correct"]]
    planted = [t for t in traces if t["kind"]]
    out["guesses_flagged"] = mean(t["late_guess"] for t in planted if t["kind"] == "hmm")
    out["others_flagged"] = mean(t["late_guess"] for t in planted if t["kind"] != "hmm")
    out["guesses_among_correct"] = mean(t["late_guess"] for t in traces)
    return out


def optimise_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Monotonicity, length and success of optimised and natural traces."""
    out: dict[str, float] = {}
    for arm in ("optimised", "natural"):
        own = [r for r in rows if r["arm"] == arm]
        out[f"{arm}_monotone_2se_rate"] = mean(r["monotone_2se"] for r in own)
        out[f"{arm}_final_potential"] = mean(r["pot"][-1] for r in own)
        out[f"{arm}_tokens"] = mean(r["boundaries"][-1] for r in own)
    return out


def transfer_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy of the receiver by the share of the provider's trace that it is given, in percent of its tokens."""
    out = {"transfer_traces": float(len(rows))}
    for i, share in enumerate(rows[0]["shares"]):
        name = f"{100 * share:.0f}"
        out[f"transfer_acc_{name}"] = mean(r["pot"][i] for r in rows)
        out[f"transfer_exact_{name}"] = mean(r["exact"][i] for r in rows)
        out[f"transfer_given_{name}"] = mean(r["given"][i] for r in rows)
        locked = [r for r in rows if r["pot"][0] < 0.05]
        out[f"unlock_rate_{name}"] = mean(r["pot"][i] > 0.5 for r in locked)
    out["transfer_foreign_acc"] = mean(r["foreign"] for r in rows)
    if {0.0, 0.2, 0.8} <= set(rows[0]["shares"]):
        out["transfer_gain_20"] = out["transfer_acc_20"] - out["transfer_acc_0"]
        out["transfer_share_of_80"] = out["transfer_acc_20"] / max(out["transfer_acc_80"], 1e-9)
        out["transfer_foreign_gain"] = out["transfer_foreign_acc"] - out["transfer_acc_0"]
    return out


def proxy_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Area under the ROC curve of each proxy as a detector of insights among the chunks before the answer.

    `auc_..` for planted insights, where there are such; `auc_.._measured` for those of the measured curves.
    """
    planted = [(r, k) for r in rows if any(r["kinds"]) for k in range(r["before_answer"])]
    out = _areas(planted, [r["kinds"][k] in INSIGHT_KINDS for r, k in planted])
    chunks = [(r, k) for r in rows for k in range(r["before_answer"])]
    measured = _areas(chunks, [k in r["insights"] for r, k in chunks])
    # the measured gain is what they are defined by
    return out | {f"{name}_measured": area for name, area in measured.items() if name != "auc_potential_gain"}


def _areas(chunks: Sequence[tuple[Mapping[str, Any], int]], found: Sequence[bool]) -> dict[str, float]:
    out: dict[str, float] = {}
    positive = torch.tensor(found, dtype=torch.bool)
    scores = {
        "surprisal": [r["surprisal"][k] for r, k in chunks],
        "entropy": [r["entropy"][k] for r, k in chunks],
        "forced_gain": [r["forced"][k + 1] - r["forced"][k] for r, k in chunks],
        "potential_gain": [r["gain"][k] for r, k in chunks],
    }
    for name, values in scores.items():
        if not any(map(math.isnan, values)):
            out[f"auc_{name}"] = area_under_curve(torch.tensor(values), positive)
    return out


_METRICS = {
    "curves": curve_metrics,
    "independent": independent_metrics,
    "pass_at_k": pass_metrics,
    "optimise": optimise_metrics,
    "transfer": transfer_metrics,
    "proxies": proxy_metrics,
}
