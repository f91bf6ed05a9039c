"""The paper's rule for its points, on hand-made rows and on the points that it has published."""

from __future__ import annotations

from typing import Any

import pytest

from zoo.methods.slm_bottlenecks import replay
from zoo.methods.slm_bottlenecks.costs import PAPER_RATIOS, SIZES, geometric_mean
from zoo.methods.slm_bottlenecks.figures import paper_figures
from zoo.methods.slm_bottlenecks.published import published_rows
from zoo.methods.slm_bottlenecks.reduce import over_repeats, reduce_best


def row(batch: int, value: float, status: str = "ok", **others: Any) -> dict[str, Any]:
    return {"size": "1b", "batch": batch, "status": status, "tokens_per_dollar": value, **others}


def test_best_is_taken_over_what_is_hidden() -> None:
    rows = [row(4, 10.0, comm="ddp"), row(4, 12.0, comm="fsdp_full"), row(8, 11.0, comm="ddp")]
    best = reduce_best(rows, ("batch",))
    assert {key: found["comm"] for key, found in best.items()} == {(4,): "fsdp_full", (8,): "ddp"}
    assert reduce_best(rows, ())[()]["tokens_per_dollar"] == 12.0


def test_out_of_memory_never_wins_and_never_disappears() -> None:
    rows = [row(4, 99.0, "oom"), row(4, 1.0), row(8, 0.0, "oom"), row(8, 0.0, "unsupported")]
    best = reduce_best(rows, ("batch",))
    assert best[(4,)]["tokens_per_dollar"] == 1.0
    assert best[(8,)]["tokens_per_dollar"] == 0.0
    assert best[(8,)]["status"] != "ok"


def test_repeats() -> None:
    cell = [row(4, 10.0, repeat=0), row(4, 14.0, repeat=1)]
    (joined,) = over_repeats(cell)
    assert joined["tokens_per_dollar"] == 12.0
    assert joined["tokens_per_dollar_std"] == pytest.approx(8**0.5)  # n - 1
    assert joined["repeats"] == 2
    # one repeat that ran out of memory: the cell does not fit; one that was killed says nothing
    assert over_repeats([*cell, row(4, 0.0, "oom")])[0]["tokens_per_dollar"] == 0.0
    assert over_repeats([*cell, row(4, 0.0, "killed")])[0]["tokens_per_dollar"] == 12.0
    assert over_repeats([row(4, 0.0, "failed")])[0]["status"] == "failed"


def test_number_of_published_points() -> None:
    rows = published_rows()
    counts = {figure: sum(r["figure"] == figure for r in rows) for figure in (1, 2, 3, 4)}
    assert counts == {1: 4 * 2 * 7, 2: 4 * 3 * 7, 3: 4 * 3 * 4, 4: 4 * 3 * 8}
    failed = {(r["figure"], r["size"], r.get("attention") or r.get("comm"), r["global_batch"])
              for r in rows if r["status"] == "oom"}  # fmt: skip
    assert failed == {(1, "1b", "eager", 1024), (1, "2b", "eager", 1024), (4, "2b", "ddp", 1024)}


def test_published_maxima() -> None:
    one = replay.points(1, "size", "attention")
    assert {size: one[size, "flash"] for size in SIZES} == {"100m": 63650, "500m": 21180, "1b": 15940, "2b": 4750}
    two = replay.points(2, "size", "n_gpu")
    assert two["2b", 2] == 4800
    assert two["100m", 1] == 63650
    assert replay.agreement() < 0.015


def test_the_four_findings() -> None:
    found = replay.findings()
    speedups = [found[f"flash_speedup_{size}"] for size in SIZES]
    assert [round(s, 1) for s in speedups] == [3.3, 2.2, 2.1, 1.6]
    assert speedups == sorted(speedups, reverse=True)
    assert found["h100_worst_share"] == pytest.approx(26 / 28)
    assert found["ddp_best_share_100m"] == 1.0
    assert found["ddp_best_share_2b"] == 0.0
    assert all(found[f"largest_batch_share_{size}"] < 0.85 for size in SIZES)
    assert all(replay.exceptions().values())
    assert len(replay.exceptions()) == 9


def test_speedup_counts_batches_at_which_both_run(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = (16, 1024)
    rows = [{"figure": 1, "size": size, "attention": name, "global_batch": b, "status": "ok", "tokens_per_dollar": v}
            for size in SIZES for name, values in (("eager", (1.0, 0.0)), ("flash", (3.0, 5.0)))
            for b, v in zip(batches, values, strict=True)]  # fmt: skip
    monkeypatch.setattr(replay, "published_rows", lambda: rows)
    monkeypatch.setattr(replay, "BATCHES", batches)
    assert replay.flash_speedups()["1b"] == pytest.approx(3.0)
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_prices_are_the_means_of_the_vendors() -> None:
    vendors = {"A100-40GB": (1.00, 1.00), "A100-80GB": (1.39, 1.54), "H100-80GB": (2.32, 2.73)}
    for gpu, prices in vendors.items():
        assert abs(PAPER_RATIOS[gpu] - sum(prices) / 2) <= 0.0051  # the paper rounds


def test_the_papers_four_figures() -> None:
    figures = paper_figures(published_rows())
    assert set(figures) == {"attention", "hardware", "communication", "batch"}
    for name, (lines, points) in {"attention": (2, 7), "hardware": (3, 7), "communication": (3, 4)}.items():
        axes: list[Any] = list(figures[name].axes)
        assert [axis.get_title() for axis in axes] == list(SIZES)
        assert all(len(axis.containers) == lines for axis in axes)
        assert all(len(axis.containers[0].lines[0].get_xdata()) == points for axis in axes)
