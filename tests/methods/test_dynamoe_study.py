"""The study of DynaMoE on a model whose losses are known: every control, its sign and its bookkeeping by hand.

`World` stands for a language model. Each token has a hardness in each layer, which follows from the token, from the one
before it and from its class; expert e leaves `1 - S_e = hardness (3 - e) / 3` of a layer undone, at a price. What the
study says of it is computed here once more, with none of its functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from zoo.methods.dynamoe.evaluation import Evaluator, Sequences
from zoo.methods.dynamoe.routes import Control
from zoo.methods.dynamoe.study import Study, flextron_study, routed_study

VOCABULARY, EXPERTS, ROWS, LENGTH = 24, 4, 100, 24
PRICE = torch.tensor([2.0, 0.7])
KNOBS, SHOWN, THETA_TRAIN, GREEDY = [0.45, 0.55, 0.65, 0.75, 0.85], [0.65, 0.85], 0.7, 3
CLASS_OF = torch.tensor([0, 2, 3])[torch.arange(VOCABULARY) % 3]  # boilerplate, arithmetic, text
LOWEST = torch.tensor([0.0, 0.0, 0.3, 0.6])[CLASS_OF]  # hardness of a class


class World(nn.Module):
    """A model whose loss is `base(token) + sum_l PRICE_l (1 - S_l)` for the experts that its route chooses."""

    def __init__(self, head: str = "score") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.own, self.context, self.base, self.error = (
            torch.rand(count, VOCABULARY, generator=generator).double() for count in (2, 1, 1, 2)
        )
        self.own[0, :6] = 0.0  # with the first tokens alone, layer 0 is the cheap one
        self.head, self.control = head, Control()
        self.layers: list[Any] = [SimpleNamespace(widths=[2, 4, 6, 8], hidden_width=8, experts=EXPERTS)] * 2

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(num_embeddings=VOCABULARY)

    def scores(self, ids: Tensor) -> Tensor:
        """True similarities `[L, N, T, E]`; the first token is easy whatever it is."""
        before = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], dim=1)
        hardness = LOWEST[ids] + 0.5 * self.own[:, ids] + 0.3 * self.context[0, before]
        hardness[0] = torch.where(ids < 6, 0.0, hardness[0])
        hardness[:, :, 0] = 0.01
        undone = torch.tensor([3.0, 2.0, 1.0, 0.0]) / 3
        return 1 - hardness[..., None] * undone

    def predictions(self, ids: Tensor) -> Tensor:
        """What routers say: a little wrong, and as wrong as can be on the first token."""
        found = self.scores(ids)[..., :-1] + (0.16 * self.error[:, ids, None] - 0.08)
        found[:, :, 0] = -1.0
        if self.head == "score":
            return found
        shares = torch.cat([found[..., :1], found.diff(dim=-1), 1 - found[..., -1:]], dim=-1)
        return shares.clamp(0.01).log()

    def losses(self, ids: Tensor, widths: Tensor) -> Tensor:
        """Nats of each token `[N, T]` for widths `[L, N, T]`."""
        undone = 1 - self.scores(ids).gather(-1, widths[..., None].long())[..., 0]
        return 0.05 + 5 * self.base[0, ids] + (PRICE[:, None, None] * undone).sum(0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, use_cache: bool) -> Any:
        route, trace = self.control.route, self.control.trace
        assert trace is not None
        predictions, scores = self.predictions(input_ids), self.scores(input_ids)
        for layer in range(2):
            seen = (
                predictions[layer] if route.needs_router else None,
                scores[layer] if route.needs_scores or self.control.scored else None,
            )
            widths = route.widths(layer, *seen)
            full = torch.full_like(input_ids, EXPERTS - 1)
            trace.widths[layer] = full if widths is None else widths.expand(input_ids.shape)
            for kept, value in zip((trace.predictions, trace.scores), seen, strict=True):
                if value is not None:
                    kept[layer] = value
        right = torch.exp(-self.losses(input_ids, trace.stacked("widths")))[..., None]
        logits = ((1 - right) / (VOCABULARY - 1)).log().repeat(1, 1, VOCABULARY)
        return SimpleNamespace(logits=logits.scatter(-1, labels_of(input_ids)[..., None], right.log()))


def labels_of(ids: Tensor) -> Tensor:
    return (5 * ids + 3) % VOCABULARY


def sequences(seed: int, rows: int, known: int = VOCABULARY) -> Sequences:
    """Random tokens below `known`; some labels do not count, rows are padded with a token that is easy."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(known, (rows, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.randint(LENGTH - 8, LENGTH + 1, (rows, 1), generator=generator)
    ids = torch.where(mask, ids, 0)
    counted = mask & (torch.rand(rows, LENGTH, generator=generator) < 0.9)
    return Sequences(ids, torch.where(counted, labels_of(ids), -100), CLASS_OF[ids], mask)


def joined(*parts: Sequences) -> Sequences:
    names = ("input_ids", "labels", "token_class", "mask")
    return Sequences(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


TEST = sequences(3, ROWS)
#: The constants of the layers are chosen on the first rows, where they are others than on the test.
CALIBRATION = joined(sequences(4, GREEDY, known=6), sequences(5, 40, known=VOCABULARY - 1))
COUNTED = TEST.labels >= 0


def studied(head: str = "score", calibration: Sequences | None = CALIBRATION) -> tuple[World, Study]:
    world = World(head)
    evaluator = Evaluator(world, world.layers, world.control, TEST, batch_size=32)
    return world, routed_study(evaluator, calibration, head, KNOBS, SHOWN, THETA_TRAIN, GREEDY)


@pytest.fixture(scope="module")
def known() -> tuple[World, Study]:
    return studied()


# -- by hand --------------------------------------------------------------------------------------------------------


def narrowest(scores: Tensor, knob: float) -> Tensor:
    """Widths for scores `[..., 3]`, token by token."""
    rows = [next((e for e in range(3) if row[e] > knob), 3) for row in scores.reshape(-1, 3).tolist()]
    return torch.tensor(rows).reshape(scores.shape[:-1])


def constant(*widths: int) -> Tensor:
    return torch.tensor(widths)[:, None, None].expand(2, *TEST.input_ids.shape)


def cost(world: World, widths: Tensor) -> tuple[float, Tensor]:
    """Activity, and the loss of each sequence."""
    active = float(((widths + 1) / EXPERTS).mean(0)[TEST.mask].mean())
    return active, torch.where(COUNTED, world.losses(TEST.input_ids, widths), 0).sum(1)


def mean(nll: Tensor) -> float:
    return float(nll.sum() / COUNTED.sum())


def mixed(points: Sequence[tuple[float, Tensor]], wanted: float) -> float:
    """Nats per token at an activity, each sequence interpolated between its neighbours on a curve."""
    ordered = sorted(points, key=lambda point: point[0])
    x, y = [point[0] for point in ordered], torch.stack([point[1] for point in ordered], dim=1).numpy()
    assert x[0] <= wanted <= x[-1]
    return mean(torch.tensor([np.interp(wanted, x, row) for row in y]))


def exchanged(world: World, widths: Tensor, groups: Tensor) -> float:
    """Expected nats per token when widths are drawn from those of the same layer and group."""
    scores, total = world.scores(TEST.input_ids), torch.zeros(ROWS, LENGTH).double()
    for layer in range(2):
        for group in groups[TEST.mask].unique():
            here = TEST.mask & (groups == group)
            shares = widths[layer][here].bincount(minlength=EXPERTS).double() / int(here.sum())
            total[here] += PRICE[layer] * ((1 - scores[layer][here]) @ shares)
    nothing = world.losses(TEST.input_ids, constant(3, 3))
    return mean(torch.where(COUNTED, nothing + total, 0).sum(1))


def gains_of(world: World, points: Sequence[tuple[float, Tensor]]) -> list[float]:
    """What a curve costs more than the router, at the router's activity, for each threshold."""
    found = []
    for knob in KNOBS:
        active, nll = cost(world, narrowest(world.predictions(TEST.input_ids), knob))
        found.append(mixed(points, active) - mean(nll))
    return found


def said(study: Study, what: str) -> list[float]:
    return [study.metrics[f"{what}_{round(100 * knob):03d}"] for knob in KNOBS]


# -- the curve and its controls -------------------------------------------------------------------------------------


def test_the_router_costs_what_its_widths_cost(known: tuple[World, Study]) -> None:
    world, study = known
    points = [cost(world, narrowest(world.predictions(TEST.input_ids), knob)) for knob in KNOBS]
    assert said(study, "activity") == pytest.approx([active for active, _ in points])
    assert said(study, "nll") == pytest.approx([mean(nll) for _, nll in points], rel=1e-5)
    assert study.curves["router"] == list(zip(said(study, "activity"), said(study, "nll"), strict=True))
    assert study.metrics["nll_spread"] == pytest.approx(mean(points[0][1]) - mean(points[-1][1]), rel=1e-4)


def test_the_full_width_and_the_static_ones(known: tuple[World, Study]) -> None:
    world, study = known
    losses = world.losses(TEST.input_ids, constant(3, 3))
    assert study.metrics["nll_full"] == pytest.approx(float(losses[COUNTED].mean()), rel=1e-5)
    sure = torch.exp(-losses) > 1 / VOCABULARY  # else another token is likelier
    assert 0.1 < float(sure[COUNTED].float().mean()) < 0.9
    assert study.metrics["acc_full"] == pytest.approx(float(sure[COUNTED].double().mean()))
    for number, name in ((0, "boilerplate"), (2, "arithmetic"), (3, "text")):
        here = COUNTED & (TEST.token_class == number)
        assert study.metrics[f"nll_full_{name}"] == pytest.approx(float(losses[here].mean()), rel=1e-5)
    for expert in range(3):
        active, nll = cost(world, constant(expert, expert))
        assert study.metrics[f"nll_static_{expert}"] == pytest.approx(mean(nll), rel=1e-5)
        assert study.curves["static_width"][expert] == pytest.approx((active, mean(nll)), rel=1e-5)


def test_constants_of_the_layers_are_a_greedy_chain_on_the_calibration_data(known: tuple[World, Study]) -> None:
    world, study = known
    chain = [(3, 3), (2, 3), (1, 3), (0, 3), (0, 2), (0, 1), (0, 0)]  # on the test it would begin with layer 1
    points = [cost(world, constant(*widths)) for widths in chain]
    for point, (active, nll) in zip(study.curves["layer_adaptive"], points, strict=True):
        assert point == pytest.approx((active, mean(nll)), rel=1e-5)
    gains = gains_of(world, points)
    assert said(study, "layer_adaptive_gain") == pytest.approx(gains, abs=1e-5)
    assert min(gains) > 0.05, "a router that knows which token is hard is better"
    inside = [gain for gain, active in zip(gains, said(study, "activity"), strict=True) if 0.35 <= active <= 0.70]
    assert 0 < len(inside) < len(gains)
    assert study.metrics["layer_adaptive_gain"] == pytest.approx(sum(inside) / len(inside), abs=1e-5)


def test_the_table_of_tokens_knows_the_token_and_nothing_else(known: tuple[World, Study]) -> None:
    world, study = known
    seen = world.predictions(CALIBRATION.input_ids)[:, CALIBRATION.mask]
    where = CALIBRATION.input_ids[CALIBRATION.mask]
    rows = [seen[:, where == token].mean(1) if (where == token).any() else seen.mean(1) for token in range(VOCABULARY)]
    table = torch.stack(rows, dim=1)[:, TEST.input_ids]
    assert not (where == VOCABULARY - 1).any()
    points = [cost(world, narrowest(table, knob)) for knob in KNOBS]
    for point, (active, nll) in zip(study.curves["token_table"][1:-1], points, strict=True):
        assert point == pytest.approx((active, mean(nll)), rel=1e-5)
    gains = gains_of(world, [cost(world, constant(0, 0)), *points, cost(world, constant(3, 3))])
    assert said(study, "token_table_gain") == pytest.approx(gains, abs=1e-5)
    assert max(gains) > 1e-3


def test_the_oracle_reads_the_true_scores(known: tuple[World, Study]) -> None:
    world, study = known
    points = [cost(world, narrowest(world.scores(TEST.input_ids)[..., :-1], knob)) for knob in KNOBS]
    points.append(cost(world, constant(3, 3)))
    for point, (active, nll) in zip(study.curves["oracle"], points, strict=True):
        assert point == pytest.approx((active, mean(nll)), rel=1e-5)
    gains = gains_of(world, points)
    assert said(study, "oracle_gain") == pytest.approx(gains, abs=1e-5)
    assert max(gains) < -1e-3, "nothing is better than the truth"
    inside = [gain for gain, active in zip(gains, said(study, "activity"), strict=True) if 0.35 <= active <= 0.80]
    assert study.metrics["oracle_gap_max"] == pytest.approx(-min(inside), abs=1e-5)


def test_shuffling_costs_what_chance_costs_and_less_inside_a_class(known: tuple[World, Study]) -> None:
    world, study = known
    everywhere, classes = torch.zeros_like(TEST.token_class), TEST.token_class
    for place, knob in enumerate(KNOBS):
        widths = narrowest(world.predictions(TEST.input_ids), knob)
        active, nll = cost(world, widths)
        for control, groups in (("shuffled", everywhere), ("shuffled_in_class", classes)):
            expected = exchanged(world, widths, groups)
            assert study.curves[control][place] == pytest.approx((active, expected), abs=0.02)
            gain, error = (said(study, f"{control}_{what}")[place] for what in ("gain", "se"))
            assert gain == pytest.approx(study.curves[control][place][1] - mean(nll), abs=1e-5)
            assert gain == pytest.approx(expected - mean(nll), abs=0.02)
            assert 0 < error < 0.02
        apart = exchanged(world, widths, everywhere) - exchanged(world, widths, classes)
        assert 0 < apart < exchanged(world, widths, everywhere) - mean(nll), "classes explain some of it"
        if place < 3:
            assert apart > 0.05, "more than chance moves a control"


def test_what_the_claims_read_are_gains_of_the_router(known: tuple[World, Study]) -> None:
    _, study = known
    active = said(study, "activity")
    bands = {"shuffled_gain": (0.35, 0.60, 4, 2), "shuffled_gain_upper": (0.60, 0.75, 4, 1), "shuffled_in_class_gain": (0.35, 0.60, 3, 2)}  # fmt: skip  # noqa: E501
    for name, (low, high, errors, rank) in bands.items():
        control = name.removesuffix("_upper").removesuffix("_gain")
        gains = zip(active, said(study, f"{control}_gain"), said(study, f"{control}_se"), strict=True)
        inside = sorted((g for a, g, error in gains if low <= a <= high and g > errors * error), reverse=True)
        assert study.metrics[name] == inside[rank - 1] > 0


def test_random_widths_are_those_of_the_router_given_to_any_token(known: tuple[World, Study]) -> None:
    world, study = known
    everywhere = torch.zeros_like(TEST.token_class)
    for point, knob in zip(study.curves["random_iid"], SHOWN, strict=True):
        widths = narrowest(world.predictions(TEST.input_ids), knob)
        assert point[0] == pytest.approx(cost(world, widths)[0], abs=0.02)
        assert point[1] == pytest.approx(exchanged(world, widths, everywhere), abs=0.04)


# -- difficulty -----------------------------------------------------------------------------------------------------


def test_difficulty_is_read_at_each_threshold_without_the_first_tokens(known: tuple[World, Study]) -> None:
    world, study = known
    counted = TEST.mask.clone()
    counted[:, 0] = False
    for knob in SHOWN:
        widths = narrowest(world.predictions(TEST.input_ids), knob)
        labels = narrowest(world.scores(TEST.input_ids)[..., :-1], knob)
        active, hard = ((widths + 1) / EXPERTS).mean(0), labels.double().mean(0)
        loss = world.losses(TEST.input_ids, constant(3, 3))
        both = counted & COUNTED
        majority = [row.bincount().max() / row.numel() for row in labels[:, counted]]
        expected = {
            "label_acc": float((widths == labels)[:, counted].double().mean()),
            "majority": float(sum(majority) / 2),
            "spearman_oracle": spearmanr(active[counted], hard[counted]).statistic,
            "spearman_loss": spearmanr(active[both], loss[both]).statistic,
        }
        for name, number in (("boilerplate", 0), ("arithmetic", 2), ("text", 3)):
            expected[f"activity_{name}"] = float(active[TEST.mask & (TEST.token_class == number)].mean())
        name = f"{round(100 * knob):03d}"
        assert {key: study.metrics[f"{key}_{name}"] for key in expected} == pytest.approx(expected, abs=1e-4)
    first = "_065", "_085"
    assert study.metrics["spearman_oracle"] == min(study.metrics[f"spearman_oracle{name}"] for name in first)
    gaps = [study.metrics[f"activity_text{name}"] - study.metrics[f"activity_boilerplate{name}"] for name in first]
    assert study.metrics["class_gap"] == pytest.approx(min(gaps))
    assert min(gaps) > 0.1


def test_figures_show_the_middle_of_the_curve(known: tuple[World, Study]) -> None:
    world, study = known
    widths = narrowest(world.predictions(TEST.input_ids), KNOBS[2])
    usage = torch.stack([row[TEST.mask].bincount(minlength=EXPERTS) / int(TEST.mask.sum()) for row in widths])
    assert study.usage is not None
    assert study.sample is not None
    assert torch.allclose(study.usage, usage)
    assert torch.equal(study.sample[0], TEST.input_ids[0])
    assert torch.allclose(study.sample[1], ((widths[:, 0] + 1) / EXPERTS).mean(0))


# -- other studies --------------------------------------------------------------------------------------------------


def test_a_label_head_has_no_scores_and_is_judged_at_the_threshold_of_its_training() -> None:
    world, study = studied("label")
    assert study.curves.keys() == {
        "static_width", "layer_adaptive", "router", "shuffled", "shuffled_in_class", "random_iid"
    }  # fmt: skip
    labels = narrowest(world.scores(TEST.input_ids)[..., :-1], THETA_TRAIN)
    counted = TEST.mask.clone()
    counted[:, 0] = False
    for knob in SHOWN:
        sums = world.predictions(TEST.input_ids).softmax(-1).cumsum(-1)
        widths = (sums[..., :-1] < knob).sum(-1)
        found = study.metrics[f"label_acc_{round(100 * knob):03d}"]
        assert found == pytest.approx(float((widths == labels)[:, counted].double().mean()), abs=1e-4)


def test_without_calibration_data_nothing_is_made_from_the_test() -> None:
    _, study = studied(calibration=None)
    assert study.curves.keys() == {
        "static_width", "oracle", "router", "shuffled", "shuffled_in_class", "random_iid"
    }  # fmt: skip
    assert not any(name.startswith(("layer_adaptive", "token_table")) for name in study.metrics)


def test_the_router_of_flextron_takes_the_likeliest_label() -> None:
    world = World("label")
    study = flextron_study(Evaluator(world, world.layers, world.control, TEST, batch_size=64))
    active, nll = cost(world, world.predictions(TEST.input_ids).argmax(-1))
    assert study.metrics["activity_router"] == pytest.approx(active)
    assert study.metrics["nll_router"] == pytest.approx(mean(nll), rel=1e-5)
    assert study.metrics["nll_full"] == pytest.approx(mean(cost(world, constant(3, 3))[1]), rel=1e-5)
