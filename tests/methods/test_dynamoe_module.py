"""The module: which sequences run what, what is counted, what the study says about a model that is known."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.methods.dynamoe import evaluation, figures
from zoo.methods.dynamoe.evaluation import Evaluator, Point, Sequences
from zoo.methods.dynamoe.module import DynaMoE
from zoo.methods.dynamoe.networks import router_parameters
from zoo.methods.dynamoe.routes import ByRouter, Fixed, Mixture, Route, Trace
from zoo.methods.dynamoe.study import knob_name, routed_study, slices_study, summary

LM = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40, "initializer_range": 0.2,
}  # fmt: skip


def made(**options: Any) -> DynaMoE:
    torch.manual_seed(0)
    model = DynaMoE(LM, router_units=8, **options)
    model.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    for parameter in router_parameters(model.layers):
        nn.init.normal_(parameter)
    return model


def batch(rows: int = 8, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    tokens = torch.randint(40, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    classes = torch.randint(4, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "token_class": classes}


def point(activity: float, nll: Sequence[float], widths: Tensor | None = None) -> Point:
    x = torch.tensor(nll, dtype=torch.float64)
    empty = torch.zeros(1, len(nll), 1).byte() if widths is None else widths
    return Point(x, torch.ones(len(nll)).double(), empty, activity, 0.0, x[:, None].float(), {})


# -- training -------------------------------------------------------------------------------------------------------


def test_sequences_run_full_random_or_routed_in_the_parts_asked_for() -> None:
    model = made()
    kinds = []
    for seed in range(40):
        route = model.training_route(batch(16, seed=seed)["input_ids"])
        assert isinstance(route, Mixture)
        kinds.append(route.kind)
        assert route.random.min() >= 0
        assert route.random.max() <= 3
    shares = torch.cat(kinds).bincount() / 640
    assert shares.tolist() == pytest.approx([0.25, 0.25, 0.5], abs=0.06)


def test_each_kind_of_sequence_has_its_widths() -> None:
    route = Mixture(torch.tensor([0, 1, 2]), torch.tensor([[0, 0], [1, 2], [0, 0]]), 4, "score", 0.5)
    prediction = torch.tensor([0.1, 0.9, 0.9]).expand(3, 5, 3)
    widths = route.widths(1, prediction, None)
    assert widths.tolist() == [[3] * 5, [2] * 5, [1] * 5]


def test_nothing_is_routed_at_first() -> None:
    model = made(p_full=0.3, p_random=0.1)
    model._unrouted_steps = 5
    route = model.training_route(batch(400)["input_ids"])
    assert isinstance(route, Mixture)
    assert (route.kind.bincount(minlength=3) / 400).tolist() == pytest.approx([0.75, 0.25, 0.0], abs=0.07)
    never = made(p_full=0.0, p_random=0.0)
    never._unrouted_steps = 5
    assert never.training_route(batch()["input_ids"]).kind.tolist() == [0] * 8  # type: ignore[attr-defined]


def test_padding_changes_neither_loss_nor_activity() -> None:
    model = made(p_full=1.0, p_random=0.0)
    short = batch(4, 8)
    long = {name: torch.cat([value, value[:, :4]], 1) for name, value in short.items()}
    long["labels"][:, 8:] = -100
    long["attention_mask"] = torch.ones_like(long["input_ids"])
    long["attention_mask"][:, 8:] = 0
    losses = [float(model.training_step(given, 0).detach()) for given in (long, short)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    model.control.route = Route()
    for given in (short, long):
        model.on_validation_epoch_start()
        model.validation_step(given, 0)
        given["sums"] = model.sums.clone()
    assert torch.allclose(short["sums"], long["sums"], atol=1e-3)


def test_the_routers_learn_from_their_loss_alone_and_the_model_from_its_own() -> None:
    model = made()
    model.training_step(batch(), 0).backward()
    by_both = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    trace = Trace()
    given = batch()
    _, mask = model.predict_labels(given, model.training_route(given["input_ids"]), trace)
    model.router_loss(trace, mask).backward()
    alone = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert alone.keys() == {name for name, _ in model.named_parameters() if ".router." in name}
    for name, grad in alone.items():
        assert torch.allclose(grad, by_both[name], atol=1e-6)
    assert by_both.keys() == {name for name, _ in model.named_parameters()}


def test_a_frozen_backbone_trains_the_routers() -> None:
    model = made(freeze_backbone=True)
    model.training_step(batch(), 0).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters() if ".router." in n
    }


def test_one_expert_has_no_router_loss() -> None:
    model = made(experts=1)
    given = batch()
    trace = Trace()
    _, mask = model.predict_labels(given, model.training_route(given["input_ids"]), trace)
    assert float(model.router_loss(trace, mask)) == 0
    counts = model.parameter_counts()
    assert counts["parameters_active"] == counts["parameters"] + counts["parameters_router"]


def test_the_label_head_learns_the_labels() -> None:
    model = made(head="label", theta_train=0.5)
    optimizer = torch.optim.Adam(router_parameters(model.layers), lr=0.02)
    given = batch(4)
    losses = []
    for _ in range(60):
        trace = Trace()
        _, mask = model.predict_labels(given, Route(), trace)
        with model.control.using(ByRouter("label"), trace, scored=True):
            model.lm(input_ids=given["input_ids"])
        loss = model.router_loss(trace, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_flextron_is_drawn_to_its_activity() -> None:
    model = made(objective="flextron", target_activity=0.4, beta=100.0)
    optimizer = torch.optim.Adam(router_parameters(model.layers), lr=0.02)
    given = batch(4)

    def active() -> float:
        trace = Trace()
        model.predict_labels(given, model.router_route(), trace)
        return float((trace.stacked("widths").float() + 1).mean() / 4)

    before = active()
    for _ in range(60):
        loss = model.training_step(given, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(active() - 0.4) < abs(before - 0.4)
    assert abs(active() - 0.4) < 0.1


def test_the_dense_objective_is_the_language_model() -> None:
    model = made(objective="dense")
    given = batch()
    logits = model.lm(input_ids=given["input_ids"]).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), given["labels"].flatten())
    loss = model.training_step(given, 0)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert not [n for n, _ in model.named_parameters() if "router" in n]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "moe"}, "objective: 'moe' is unknown; accepted: dynamoe, dense, flextron"),
        ({"similarity": "dot"}, "similarity: 'dot' is unknown; accepted: inner, cosine, relerr"),
        ({"theta": 1.5}, "theta: 1.5 is not accepted; accepted: 0 to 1"),
        ({"thresholds": [-0.1], "shown_thresholds": [-0.1]}, "thresholds: -0.1 is not accepted; accepted: 0 to 1"),
        ({"tau": 2.0}, "tau: 2.0 is not accepted"),
        ({"theta_train": 1.0}, "theta_train: 1 makes every token hard"),
        ({"p_full": 0.7, "p_random": 0.7}, "p_full: 0.7, p_random: 0.7 are not accepted"),
        ({"theta_low": 0.9, "theta_high": 0.6}, "theta_low: 0.9 is above theta_high: 0.6"),
        ({"experts": 25}, "experts: 25 is not accepted for 24 hidden neurons; accepted: 1 to 24"),
        ({"shown_thresholds": [0.1]}, "shown_thresholds"),
        ({"objective": "dense", "freeze_backbone": True}, "freeze_backbone: true leaves nothing to train"),
    ],
)
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)


# -- evaluation -----------------------------------------------------------------------------------------------------


def sequences(count: int = 12) -> Sequences:
    return Sequences.from_batches([batch(count // 2, seed=1), batch(count // 2, seed=2)])


def test_the_order_of_sequences_does_not_depend_on_who_had_them() -> None:
    one = Sequences.from_batches([batch(4, seed=1), batch(4, seed=2)])
    other = Sequences.from_batches([batch(4, seed=2), batch(4, seed=1)])
    for name in ("input_ids", "labels", "token_class", "mask"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_shuffled_widths_have_the_histogram_of_each_layer_and_group() -> None:
    widths = torch.randint(4, (3, 20, 10)).byte()
    groups = torch.randint(-1, 3, (20, 10))
    out = evaluation.shuffled(widths, groups, torch.Generator().manual_seed(0))
    assert not torch.equal(out, widths)
    assert torch.equal(out[:, groups == -1], widths[:, groups == -1])
    for layer in range(3):
        for group in range(3):
            here = groups == group
            assert torch.equal(out[layer][here].bincount(), widths[layer][here].bincount())


def test_the_greedy_chain_takes_the_cheapest_step_each_time() -> None:
    cost = torch.tensor([3.0, 1.0])
    chain = evaluation.greedy_constants(lambda w: float(sum(c * (2 - x) for c, x in zip(cost, w, strict=True))), 2, 3)
    assert chain == [(2, 2), (2, 1), (2, 0), (1, 0), (0, 0)]


def test_a_curve_is_mixed_between_its_points_and_not_left() -> None:
    curve = [point(1.0, [1.0, 2.0]), point(0.5, [3.0, 6.0])]
    mixed = evaluation.at_activity(curve, 0.75)
    assert mixed is not None
    assert mixed.tolist() == [2.0, 4.0]
    assert evaluation.at_activity(curve, 0.4) is None


def test_paired_differences_and_their_error() -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gain, error = evaluation.paired(x + 1, point(0.5, [0.0] * 400))
    assert gain == pytest.approx(float(x.mean()) + 1)
    assert error == pytest.approx(float(x.std()) / 20, rel=0.15)
    assert evaluation.paired(torch.full((400,), 2.0).double(), point(0.5, [1.0] * 400)) == pytest.approx((1.0, 0.0))


def test_only_gains_above_their_noise_count() -> None:
    gains = [(0.3, 9.0, 0.1), (0.4, 0.2, 0.01), (0.5, 0.1, 0.01), (0.6, 0.3, 0.2)]
    assert evaluation.significant(gains, 0.35, 0.6, 4, 1) == 0.2
    assert evaluation.significant(gains, 0.35, 0.6, 4, 2) == 0.1
    assert evaluation.significant(gains, 0.35, 0.6, 4, 3) == 0.0
    assert evaluation.significant(gains, 0.7, 0.9, 4, 1) == 0.0


def test_a_table_of_tokens_is_the_mean_without_context() -> None:
    predictions = torch.randn(2, 3, 4, 2)
    ids, mask = torch.tensor([[0, 1, 1, 2]] * 3), torch.ones(3, 4).bool()
    mask[:, 3] = False
    table = evaluation.token_table(predictions, ids, mask, 5)
    assert torch.allclose(table[:, 1], predictions[:, :, 1:3].flatten(1, 2).mean(1))
    assert torch.allclose(table[:, 2], predictions[:, :, :3].flatten(1, 2).mean(1))  # not seen: the mean over all


def test_the_summary_of_a_curve_that_is_known() -> None:
    router = [point(0.4, [3.0, 3.0]), point(0.5, [2.0, 2.0]), point(0.7, [2.1, 2.1])]
    gains = {
        "shuffled": [(0.4, 0.2, 0.01), (0.5, 0.1, 0.01), (0.7, 0.05, 0.01)],
        "shuffled_in_class": [(0.4, 0.04, 0.01), (0.5, 0.02, 0.01)],
        "layer_adaptive": [(0.4, 0.02, 0.0), (0.5, 0.04, 0.0), (0.9, 9.0, 0.0)],
        "oracle": [(0.4, -0.01, 0.0), (0.5, 0.01, 0.0), (0.9, -9.0, 0.0)],
    }
    found = summary(router, gains)
    assert found["activity_step_min"] == pytest.approx(0.1)
    assert found["nll_rise_max"] == pytest.approx(0.1)
    assert found["nll_spread"] == pytest.approx(0.9)
    assert (found["shuffled_gain"], found["shuffled_gain_upper"]) == (0.1, 0.05)
    assert found["shuffled_in_class_gain"] == 0.0  # the second one is within 3 standard errors
    assert found["layer_adaptive_gain"] == pytest.approx(0.03)
    assert found["oracle_gap_max"] == pytest.approx(0.01)


def test_the_full_width_is_a_limit_of_every_way() -> None:
    model = made()
    evaluator = Evaluator(model.lm.eval(), model.layers, model.control, sequences(), 5)
    full = evaluator.run(Route())
    for route in (ByRouter("score", 1.0), evaluator.constant([3, 3]), Fixed(full.widths)):
        assert torch.equal(evaluator.run(route).nll, full.nll)
    assert full.activity == 1.0
    model.control.route = Route()
    with torch.no_grad():
        logits = model.lm(input_ids=evaluator.sequences.input_ids).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), evaluator.sequences.labels.flatten())
    assert full.mean == pytest.approx(float(expected), rel=1e-5)


def test_the_study_has_all_curves_and_a_perfect_router_is_the_oracle() -> None:
    model = made(thresholds=[0.2, 0.5, 0.8], shown_thresholds=[0.5])
    evaluator = Evaluator(model.lm.eval(), model.layers, model.control, sequences(), 6)
    for mlp in model.layers:  # a router that knows: it computes the similarities
        mlp.router.forward = lambda x, m=mlp: m.scores(m.hidden(x))[..., :-1]  # type: ignore[union-attr, method-assign]
    study = routed_study(evaluator, sequences(6), "score", [0.2, 0.5, 0.8], [0.5], 0.8, 4)
    assert study.curves.keys() == {
        "static_width", "layer_adaptive", "oracle", "token_table", "router", "shuffled", "shuffled_in_class",
        "random_iid",
    }  # fmt: skip
    assert study.curves["oracle"][:3] == study.curves["router"]
    assert study.metrics["label_acc_050"] == 1.0
    assert study.metrics["spearman_oracle"] > 0.9
    assert study.usage is not None
    assert torch.allclose(study.usage.sum(1), torch.ones(2))
    for name, (activity, _) in zip(("020", "050", "080"), study.curves["router"], strict=True):
        assert study.metrics[f"activity_{name}"] == activity


def test_sorted_slices_are_measured_on_the_same_function() -> None:
    model = made(objective="dense")
    evaluator = Evaluator(model.lm.eval(), model.layers, model.control, sequences(), 6)
    before = evaluator.run(Route()).mean
    study = slices_study(evaluator, sequences(6))
    assert evaluator.run(Route()).mean == pytest.approx(before, abs=1e-4)
    assert study.metrics["nll_full"] == before
    assert study.metrics["nll_static_0_unsorted"] != study.metrics["nll_static_0_sorted"]


def test_names_of_thresholds() -> None:
    assert [knob_name(k) for k in (0.45, 0.9, 1.0, None)] == ["045", "090", "100", "argmax"]


def test_figures_are_drawn() -> None:
    model = made(thresholds=[0.2, 0.5], shown_thresholds=[0.5])
    evaluator = Evaluator(model.lm.eval(), model.layers, model.control, sequences(), 6)
    model.study = routed_study(evaluator, sequences(6), "score", [0.2, 0.5], [0.5], 0.8, 4)
    data = SimpleNamespace(token_texts=lambda ids: [f"t$\n{i}" for i in ids])
    model._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    drawn = model.figures()
    assert drawn.keys() == {"nll_over_active", "expert_use", "tokens"}
    for figure in drawn.values():
        figure.draw_without_rendering()


def test_the_curves_of_a_results_file_are_means_over_seeds() -> None:
    def dynamoe(shift: float) -> dict[str, float]:
        found = {"nll_045": 3.0, "activity_045": 0.3, "nll_090": 2.0, "activity_090": 0.8, "nll_full": 1.9}
        found |= {"nll_static_0": 4.0, "nll_static_1": 3.5, "nll_static_2": 2.5, "nll_static_0_sorted": 9.0}
        found |= {"oracle_gain_090": -0.1, "shuffled_gain_045": 0.5, "shuffled_gain_090": 0.25, "shuffled_gain": 7.0}
        return {f"test/{name}": value + shift * (name in ("nll_045", "activity_045")) for name, value in found.items()}

    routed = {"test/nll_065": 3.2, "test/activity_065": 0.5}
    flextron = {"test/nll_router": 2.2, "test/activity_router": 0.46}
    runs: dict[str, Any] = {"dynamoe": {"0": dynamoe(0.0), "1": dynamoe(0.1)}, "router_only": {"0": routed}}
    runs |= {
        "flextron": {"0": flextron},
        "base": {"0": {"test/nll_full": 2.1}},
        "dense_ft": {"0": {"test/nll_full": 1.8}},
    }
    found = figures.curves_of({"runs": runs})
    assert {name: [pytest.approx(pair) for pair in points] for name, points in found.items() if points} == {
        "router": [(0.35, 3.05), (0.8, 2.0)],
        "oracle": [(0.8, 1.9)],
        "shuffled": [(0.35, 3.55), (0.8, 2.25)],
        "static_width": [(0.25, 4.0), (0.5, 3.5), (0.75, 2.5)],
        "router_only": [(0.5, 3.2)],
        "flextron_like": [(0.46, 2.2)],
        "dense": [(1.0, 2.1)],
        "dense_ft": [(1.0, 1.8)],
    }
