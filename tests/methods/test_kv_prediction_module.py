"""The module: which loss reaches what, the frozen base, evaluation, generation, checkpoints, the exported predictor."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from datamodules.prompts import Hop
from zoo.methods.kv_prediction.evaluation import Sums, all_arms, recoveries, score
from zoo.methods.kv_prediction.export import load_predictor, read_facts, save_predictor
from zoo.methods.kv_prediction.figures import pareto_figure
from zoo.methods.kv_prediction.generation import generate, stream
from zoo.methods.kv_prediction.losses import cache_loss, token_loss
from zoo.methods.kv_prediction.module import KVPrediction, layer_map_of
from zoo.methods.kv_prediction.prefill import continue_from, full

BASE: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 40,
    "tie_word_embeddings": True,
}
AUXILIARY: dict[str, Any] = {**BASE, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


def make(**options: Any) -> KVPrediction:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"base": BASE, "auxiliary": AUXILIARY, "vocab_size": 12, "tokenizer_id": "hop-10-1-2"}
    return KVPrediction(**(settings | options))


def batch(seed: int = 0) -> dict[str, Tensor]:
    data = Hop(batch_size=4, queries=3, data_seed=seed)
    return data.train_dataloader().dataset.batch(0, 0)  # type: ignore[no-any-return]


def step(model: KVPrediction, ids: dict[str, Tensor]) -> dict[str, Tensor]:
    logged: dict[str, Tensor] = {}
    model.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign, assignment]
    total = model.training_step(ids, 0)
    return {"total": total} | {name.removeprefix("train/"): value for name, value in logged.items()}


def reached(model: KVPrediction) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


# ---------------------------------------------------------------- losses


def test_the_total_is_the_weighted_sum_of_what_the_parts_give() -> None:
    weights = {"base_weight": 0.5, "auxiliary_weight": 2.0, "consistency_weight": 3.0, "z_weight": 0.01}
    model, data = make(**weights, consistency_reduction="sum"), batch()
    found = step(model, data)
    auxiliary, predictor = model.pair
    ids, labels = data["input_ids"], data["labels"]
    guessed, true = predictor(auxiliary.entries(ids)), model.base.entries(ids)
    parts = {
        "base": token_loss(model.predicted_logits(ids), labels, 0.01),
        "auxiliary": token_loss(auxiliary.logits(auxiliary(ids)[0]), labels, 0.01),
        "consistency": cache_loss(model.base.normed(guessed), model.base.normed(true), None, "sum"),
    }
    for name, value in parts.items():
        assert torch.allclose(found[name], value, atol=1e-6), name
    expected = 0.5 * parts["base"] + 2 * parts["auxiliary"] + 3 * parts["consistency"]
    assert torch.allclose(found["total"], expected, atol=1e-5)


def test_gradients_reach_auxiliary_and_maps_and_never_the_base() -> None:
    model = make()
    step(model, batch())["total"].backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert reached(model) == trained
    assert {name.partition(".")[0] for name in trained} == {"auxiliary", "predictor"}


def test_the_loss_of_the_base_flows_through_it_into_the_auxiliary() -> None:
    model = make(auxiliary_weight=0.0, consistency_weight=0.0)
    step(model, batch())["total"].backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert reached(model) == trained
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad and n.startswith("auxiliary")}
    assert "auxiliary.norm.weight" in frozen
    assert {n for n in frozen if "layers.1" in n} >= {"auxiliary.layers.1.mlp.up_proj.weight"}
    assert "auxiliary.layers.1.self_attn.k_proj.weight" in trained


def test_a_frozen_auxiliary_leaves_the_maps_alone_to_be_trained() -> None:
    model = make(freeze_auxiliary=True)
    found = step(model, batch())
    found["total"].backward()
    assert found["auxiliary"] == 0
    assert {name.partition(".")[0] for name in reached(model)} == {"predictor"}


def test_consistency_may_count_labels_alone() -> None:
    data = batch()
    every, some = step(make(), data), step(make(consistency_positions="labels"), data)
    assert every["consistency"] != some["consistency"]
    assert torch.equal(every["base"], some["base"])
    changed = copy.deepcopy(data)
    changed["labels"][:, -2:] = -100
    assert step(make(), changed)["consistency"] == every["consistency"]
    assert step(make(consistency_positions="labels"), changed)["consistency"] != some["consistency"]


def test_positions_may_see_their_own_entry() -> None:
    data, model = batch(), make(self_entries="own")
    found, ids = step(model, data), data["input_ids"]
    logits = [model.prefill(ids[:, : t + 1], 1).logits for t in range(ids.shape[1])]
    assert torch.allclose(found["base"], token_loss(torch.stack(logits, dim=1), data["labels"]), atol=1e-5)
    assert found["base"] != step(make(), data)["base"]
    assert found["consistency"] == step(make(), data)["consistency"]


def test_with_a_copy_of_the_base_and_identity_maps_consistency_is_zero() -> None:
    model = make(auxiliary=BASE)
    auxiliary, predictor = model.pair
    auxiliary.load_state_dict(model.base.state_dict())
    with torch.no_grad():
        for linear in (*predictor.keys, *predictor.values):
            linear.weight.copy_(torch.eye(8))
            linear.bias.zero_()
    found = step(model, batch())
    assert found["consistency"] == 0
    assert torch.allclose(found["base"], found["auxiliary"], atol=1e-6)
    prompt = batch()["input_ids"][:, :9]
    assert torch.equal(generate(model, prompt, 6), generate(model, prompt, 6, with_base=True))


def test_the_base_stays_in_evaluation_mode() -> None:
    model = make().train()
    assert not model.base.training
    assert model.pair[0].training
    assert make(mode="alone", auxiliary=None).train().base.training


# ---------------------------------------------------------------- maps


def test_maps_by_name() -> None:
    assert layer_map_of("canonical", 2, 5, None) == [0, 0, 0, 1, 1]
    assert layer_map_of("uniform", 3, 5, None) == [0, 0, 1, 1, 2]
    assert layer_map_of("reversed", 2, 5, None) == [0, 0, 1, 1, 1]
    assert layer_map_of("pruned", 2, 5, [0, 3]) == [0, 0, 0, 1, 1]
    assert layer_map_of([1, 0], 2, 2, None) == [1, 0]
    model = make(auxiliary={"layers": [0, 2]}, layer_map="pruned")
    assert model.pair[1].layer_map == [0, 0, 1]
    assert torch.equal(model.pair[0].layers[1].mlp.up_proj.weight, model.base.layers[2].mlp.up_proj.weight)  # type: ignore[union-attr]


# ---------------------------------------------------------------- evaluation


def test_scores_are_those_of_teacher_forcing() -> None:
    g = torch.Generator().manual_seed(0)
    logits, answer = torch.randn(3, 4, 7, generator=g), torch.randint(7, (3, 4), generator=g)
    logits[0].scatter_(1, answer[0][:, None], 50.0)
    logits[1, 0, answer[1, 0]] = 50.0
    found = score(logits, answer, [1, 2, 8], "hop2")
    assert set(found) == {"nll_1", "nll_2", "acc", "acc_first", "acc_hop2"}
    assert float(found["acc"][0]) == float(found["acc_hop2"][0]) == 1
    assert float(found["acc_first"][0]) >= 2
    expected = -logits.log_softmax(-1).gather(2, answer[..., None])[:, :2, 0].mean(1).sum()
    assert torch.allclose(found["nll_2"][0], expected)
    assert found["nll_2"][1] == 3


def test_exact_match_is_that_of_greedy_decoding() -> None:
    model = make(mode="alone", auxiliary=None)
    prompt = batch()["input_ids"][:, :6]
    answer = generate(model, prompt, 4)
    logits = continue_from(model.base, full(model.base, prompt, 4), answer)
    assert float(score(logits, answer, [1], "")["acc"][0]) == 4
    answer[0, 2] = (answer[0, 2] + 1) % 12
    logits = continue_from(model.base, full(model.base, prompt, 4), answer)
    assert float(score(logits, answer, [1], "")["acc"][0]) == 3


def test_means_and_recoveries() -> None:
    sums = Sums()
    sums.add("", {"nll_1": (torch.tensor(6.0), 2)})
    sums.add("", {"nll_1": (torch.tensor(2.5), 1)})
    sums.add("base", {"nll_1": (torch.tensor(2.0), 1)})
    sums.add("no_prompt", {"nll_1": (torch.tensor(4.0), 1)})
    means = sums.means(torch.device("cpu"))
    assert means == pytest.approx({"nll_1": 8.5 / 3, "base/nll_1": 2, "no_prompt/nll_1": 4})
    assert recoveries(means, [""]) == pytest.approx({"recovery_1": (4 - 8.5 / 3) / 2})


def test_pruning_is_given_no_less_than_the_method_costs() -> None:
    model = make()
    arms = all_arms(model.base, *model.pair, 20, [0.5])
    for name in ("truncate", "random_prune", "static_prune", "lazyllm"):
        assert arms[name].cost >= arms[""].cost, name
    assert arms["no_prompt"].cost < arms[""].cost < arms["base"].cost
    assert arms["random_prune_0.5"].cost == arms["truncate_0.5"].cost


def test_a_fit_and_a_test_measure_all_arms(tmp_path: Path) -> None:
    data = Hop(batch_size=8, steps_per_epoch=2, eval_prompts=6, eval_batch_size=4)
    quiet: dict[str, Any] = {
        "logger": False,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", max_steps=2, default_root_dir=tmp_path, **quiet)
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.fit(model, datamodule=data)
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) == n.startswith("base.") for n in before if "norm" not in n)
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    assert metrics["test/base/cost"] == 1
    assert metrics["test/cost"] < 1
    assert 0 <= metrics["test/random_prune/acc_hop1"] <= 1
    assert metrics["test/ttft_ms"] > 0
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model.base, model.pair[0])]
    assert metrics["test/reduction_by_parameters"] == pytest.approx(sizes[0] / sizes[1])
    assert set(model.figures()) == {"pareto"}
    assert (tmp_path / "predictor.safetensors").is_file()


def test_the_figure_has_each_way_by_operations_and_by_time() -> None:
    ways = ("", "base", "layers", "truncate", "truncate_0.5", "lazyllm")
    points = {
        w: {"cost": i + 1.0, "ttft_ms": 10.0 * i + 10, "nll_1": 4.0 - i, "nll_16": 1.0} for i, w in enumerate(ways)
    }
    by_operations, by_time = pareto_figure(points).axes
    for axis, first in ((by_operations, 1.0), (by_time, 0.5)):
        assert [tuple(c.get_offsets()[0]) for c in axis.collections] == [
            (first, 4.0),
            (3 * first, 2.0),
            (2 * first, 3.0),
        ]
        assert [len(line.get_xdata()) for line in axis.lines] == [2, 1]
        assert axis.yaxis_inverted()
    exact = {way: {key: own[key] for key in ("cost", "ttft_ms")} | {"acc": 0.5} for way, own in points.items()}
    assert not pareto_figure(exact).axes[0].yaxis_inverted()


# ---------------------------------------------------------------- generation


def test_generation_calls_the_auxiliary_once_and_the_cache_grows_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = make(), batch()["input_ids"][:, :9]
    calls = {"auxiliary": 0}
    lengths: list[int] = []
    entries, extend = model.pair[0].entries, model.base.extend

    def counted(ids: Tensor) -> Any:
        calls["auxiliary"] += 1
        assert ids.shape[1] == 8
        return entries(ids)

    def watched(ids: Tensor, cache: Any, *args: Any, **kwargs: Any) -> Tensor:
        assert ids.shape[1] == 1
        out = extend(ids, cache, *args, **kwargs)
        lengths.append(cache.lengths[0])
        return out

    monkeypatch.setattr(model.pair[0], "entries", counted)
    monkeypatch.setattr(model.base, "extend", watched)
    steps = list(stream(model, prompt, 5))
    assert calls["auxiliary"] == 1
    assert lengths == [9, 10, 11, 12, 13]
    assert all(a.milliseconds < b.milliseconds for a, b in itertools.pairwise(steps))
    assert torch.equal(torch.stack([s.tokens for s in steps], dim=1), generate(model, prompt, 5))


def test_generation_with_the_base_is_the_naive_loop() -> None:
    model, prompt = make(), batch()["input_ids"][:, :9]
    ids = prompt
    with torch.no_grad():
        for _ in range(4):
            ids = torch.cat([ids, model.base.logits(model.base(ids)[0])[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, prompt, 4, with_base=True), ids[:, 9:])


def test_prompts_that_are_empty_or_too_long_are_refused() -> None:
    model = make()
    ids = torch.zeros(1, 38, dtype=torch.int64)
    with pytest.raises(ValueError, match="prompt: 38 tokens and 3 more are too long for the base; accepted: 40 in all"):
        generate(model, ids, 3)
    with pytest.raises(ValueError, match="a prompt of no tokens is not accepted; accepted: one token or more"):
        generate(model, ids[:, :0], 3)
    assert generate(model, ids[:, :1], 3).shape == (1, 3)


# ---------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode: 'both' is unknown; accepted: predict, alone"),
        ({"auxiliary": None}, "auxiliary: None does not go with mode: predict"),
        ({"mode": "alone"}, "does not go with mode: alone"),
        ({"layer_map": "diagonal"}, "layer_map: 'diagonal' is unknown; accepted: canonical, pruned, uniform, reversed"),
        ({"layer_map": "pruned"}, "layer_map: pruned needs auxiliary: {layers:"),
        ({"layer_map": [0, 1]}, "layer_map: \\[0, 1\\] is not accepted; accepted: 3 numbers"),
        ({"consistency_reduction": "max"}, "consistency_reduction: 'max' is unknown; accepted: mean, sum"),
        ({"consistency_weight": -1.0}, "consistency_weight: -1.0 is not accepted; accepted: 0 or more"),
        ({"lr": 0.0}, "lr: 0.0 is not accepted; accepted: above 0"),
        ({"retentions": [1.5]}, "retentions: 1.5 is not accepted; accepted: above 0, at most 1"),
        ({"horizons": [0]}, "horizons: 0 is not accepted; accepted: 1 or more"),
        (
            {"auxiliary": {**AUXILIARY, "vocab_size": 13}},
            "auxiliary: a vocabulary of 13 tokens is not that of the base",
        ),
        ({"auxiliary": {**AUXILIARY, "num_hidden_layers": 4}}, "4 layers cannot feed a base of 3"),
    ],
)
def test_what_cannot_be_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


# ---------------------------------------------------------------- checkpoints, export


def saved(model: KVPrediction, path: Path) -> str:
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


def test_a_base_from_a_checkpoint_is_left_out_of_the_next_one_and_put_back(tmp_path: Path) -> None:
    base = saved(make(mode="alone", auxiliary=None), tmp_path / "base.ckpt")
    model = make(base=base)
    content = torch.load(saved(model, tmp_path / "kvp.ckpt"), weights_only=True)
    assert not any(name.startswith("base.") for name in content["state_dict"])
    again = make(base=base)
    again.on_load_checkpoint(content)
    again.load_state_dict(content["state_dict"])
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    torch.manual_seed(1)
    other = saved(KVPrediction(base=BASE, mode="alone", vocab_size=12, tokenizer_id="hop-10-1-2"), tmp_path / "2.ckpt")
    with pytest.raises(ValueError, match="base: its weights .* are not those that the checkpoint was trained with"):
        make(base=other).on_load_checkpoint(torch.load(tmp_path / "kvp.ckpt", weights_only=True))


def test_checkpoints_of_other_tokens_or_of_the_method_itself_are_refused(tmp_path: Path) -> None:
    base = saved(make(mode="alone", auxiliary=None), tmp_path / "base.ckpt")
    with pytest.raises(ValueError, match="base: .* was trained on tokens 'hop-10-1-2', the data have 'bytes'"):
        make(base=base, tokenizer_id="bytes")
    pair = saved(make(), tmp_path / "pair.ckpt")
    with pytest.raises(ValueError, match="auxiliary: .* is no checkpoint of a model that was trained alone"):
        make(auxiliary=pair)


def test_the_exported_predictor_names_its_models_and_gives_the_same_tokens(tmp_path: Path) -> None:
    base = saved(make(mode="alone", auxiliary=None), tmp_path / "base.ckpt")
    model, file = make(base=base), tmp_path / "predictor.safetensors"
    save_predictor(file, model)
    facts = read_facts(file)
    assert facts["base"] == base
    assert facts["auxiliary"] == AUXILIARY
    assert facts["layer_map"] == [0, 0, 1]
    assert facts["base_hash"] == model.base_hash
    loaded, prompt = load_predictor(file), batch()["input_ids"][:, :9]
    again = make(base=base)
    again.base, again.auxiliary, again.predictor = loaded
    assert torch.equal(generate(again, prompt, 6), generate(model, prompt, 6))
    with torch.no_grad():
        assert torch.equal(again.predicted_logits(prompt), model.predicted_logits(prompt))


def test_an_exported_predictor_is_not_used_with_another_base(tmp_path: Path) -> None:
    base = saved(make(mode="alone", auxiliary=None), tmp_path / "base.ckpt")
    save_predictor(tmp_path / "predictor.safetensors", make(base=base))
    torch.manual_seed(1)
    other = saved(KVPrediction(base=BASE, mode="alone", vocab_size=12), tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="base: .*other.ckpt has not the weights that"):
        load_predictor(tmp_path / "predictor.safetensors", other)
    save_predictor(tmp_path / "random.safetensors", make())
    with pytest.raises(ValueError, match="nowhere kept; name the base"):
        load_predictor(tmp_path / "random.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="predictor: .*broken.safetensors cannot be read"):
        load_predictor(tmp_path / "broken.safetensors")
