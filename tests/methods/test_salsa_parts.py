"""Answers drawn by inversion or by an engine, judges, and the chain of the three methods from end to end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare, kstest

import zoo
from tests.methods.salsa_toy import LLAMA as SMALL
from tests.support.endpoint import Endpoint, Reply, chat, serving
from zoo.errors import RunError
from zoo.methods.salsa.evaluation import in_order, keep_answers, plane_points, surface_metrics
from zoo.methods.salsa.generation import VLLM, InProcess, Sampling, drawn_seed, merged_weights, uniforms
from zoo.methods.salsa.judge import EndpointJudge, RewardJudge, pairwise
from zoo.methods.salsa.networks import ScalarModel, add_adapters, lm_state, merge_adapters
from zoo.nn.kv_cache import preallocated_cache
from zoo.nn.lm import build_lm
from zoo.nn.sampling import left_pad

LLAMA = {**SMALL, "initializer_range": 0.5}
HOW = Sampling(length=5, temperature=0.8, eos_id=2, pad_id=0)


def model_of(vocab_size: int = 9) -> Any:
    torch.manual_seed(3)
    return build_lm(LLAMA, vocab_size)


def test_uniforms_are_uniform_and_follow_from_seed_row_and_step() -> None:
    u = uniforms(11, torch.arange(3000), 8)
    assert kstest(u.flatten().numpy(), "uniform").pvalue > 0.01
    assert abs(float(torch.corrcoef(u.T).fill_diagonal_(0).abs().max())) < 0.06
    assert abs(float(torch.corrcoef(torch.stack([u[1:, 0], u[:-1, 0]]))[0, 1])) < 0.06
    assert abs(float(torch.corrcoef(torch.stack([u[:, 0], uniforms(12, torch.arange(3000), 8)[:, 0]]))[0, 1])) < 0.06
    torch.testing.assert_close(uniforms(11, torch.tensor([5, 2999]), 3), u[[5, 2999], :3])


def test_answers_follow_the_distribution_of_the_model() -> None:
    model, engine = model_of(), InProcess(HOW._replace(length=1))
    engine.sync(model)
    ids = torch.tensor([[1, 5, 7]])
    count = 20_000
    tokens, *_ = engine(ids.expand(count, -1), torch.ones(count, 3, dtype=torch.bool), torch.arange(count), 5)
    with torch.no_grad():
        expected = torch.softmax(model(ids).logits[0, -1].double() / HOW.temperature, dim=0) * count
    seen = torch.bincount(tokens[:, 0], minlength=9).double()
    big = expected > 5
    scale = seen[big].sum() / expected[big].sum()
    assert chisquare(seen[big].numpy(), (expected[big] * scale).numpy()).pvalue > 0.01


def test_answers_do_not_depend_on_the_batch() -> None:
    engine = InProcess(HOW)
    engine.sync(model_of())
    ids, mask = left_pad([torch.tensor([1, 5, 7, 8]), torch.tensor([4]), torch.tensor([6, 6])])
    rows = torch.tensor([10, 11, 12])
    tokens, answer_mask, *_ = engine(ids, mask, rows, 3)
    alone, alone_mask, *_ = engine(ids[1:2, -1:], mask[1:2, -1:], rows[1:2], 3)
    assert tokens[1].tolist() == alone[0].tolist()
    assert answer_mask[1].tolist() == alone_mask[0].tolist()
    assert tokens.shape == answer_mask.shape == (3, 5)
    assert engine(ids, mask, rows, 4)[0].tolist() != tokens.tolist()


def test_seeds_come_from_the_global_generator() -> None:
    torch.manual_seed(0)
    first = [drawn_seed(torch.device("cpu")) for _ in range(2)]
    torch.manual_seed(0)
    assert [drawn_seed(torch.device("cpu")) for _ in range(2)] == first
    assert first[0] != first[1]


class FakeLLM:
    """Answers as `vllm.LLM` does, with the tokens `[prompt length, 2]`."""

    def __init__(self, **options: Any) -> None:
        self.options, self.loaded, self.resets, self.params = options, dict[str, torch.Tensor](), 0, list[Any]()
        model = SimpleNamespace(load_weights=lambda items: self.loaded.update(items))
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        self.params = params
        lists = [[len(p["prompt_token_ids"]), 2] for p in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]) for ids in lists]


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.mark.usefixtures("fake_vllm")
def test_training_with_vllm_syncs_each_batch_and_computes_its_own_likelihoods(tmp_path: Path) -> None:
    options = {"model.init_args.engine": "vllm", "model.init_args.engine_options": {"model": "folder"}}
    short = {"trainer.max_steps": 4, "trainer.limit_val_batches": 0, "checkpoint.every_n_steps": 0}
    short |= {"model.init_args.best_of": 0}
    result = zoo.run("fit", config="salsa/smoke", overrides={**short, **options}, run_dir=tmp_path, wandb="disabled")
    engine = result.model._engine
    assert engine.llm.options["model"] == "folder"
    assert engine.llm.resets == 2, "two batches of two minibatches each: the weights are copied before each batch"
    assert result.metrics["train/length"] == 2
    assert result.metrics["train/ratio_mean"] == pytest.approx(1, abs=0.2)
    assert result.metrics["train/kl"] != 0


def test_the_cache_that_is_allocated_once_is_the_models_own() -> None:
    model, ids = model_of(), torch.tensor([[1, 5, 7, 3], [2, 2, 6, 4]])
    ours = preallocated_cache(model.config, 4)
    with torch.no_grad():
        parts = [model(ids[:, a:b], past_key_values=ours).logits for a, b in ((0, 2), (2, 3), (3, 4))]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits)
        buffers = [layer.key_buffer for layer in ours.layers]
        assert all(
            layer.keys.data_ptr() == buffer.data_ptr() for layer, buffer in zip(ours.layers, buffers, strict=True)
        )
        with pytest.raises(ValueError, match="made for 4 tokens, not 5"):
            model(ids[:, :1], past_key_values=ours)


@pytest.mark.usefixtures("fake_vllm")
def test_the_vllm_engine_gets_prompts_without_padding_and_the_present_weights() -> None:
    engine: Any = VLLM("folder", HOW, {"gpu_memory_utilization": 0.3})
    assert engine.llm.options["gpu_memory_utilization"] == 0.3
    model = add_adapters(model_of(), 2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    engine.sync(model)
    ids, mask = left_pad([torch.tensor([1, 5, 7]), torch.tensor([4])])
    tokens, answer_mask, *_ = engine(ids, mask, torch.tensor([0, 1]), 3)
    assert tokens.tolist() == [[3, 2, 0, 0, 0], [1, 2, 0, 0, 0]]
    assert answer_mask.sum(dim=1).tolist() == [2, 2]
    first, second = engine.llm.params
    assert (first["temperature"], first["top_p"], first["top_k"], first["max_tokens"]) == (0.8, 1.0, 0, 5)
    assert first["seed"] != second["seed"]
    assert engine.llm.resets == 1
    torch.testing.assert_close(engine.llm.loaded, dict(merge_adapters(model).state_dict()))


def test_without_vllm_the_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="needs the package vllm; accepted without it: in_process"):
        VLLM("folder", HOW)


def test_weights_without_adapters_are_their_own() -> None:
    model = model_of()
    assert merged_weights(model).keys() == model.state_dict().keys()


def test_the_scalar_is_read_at_the_last_token_on_either_side_of_padding() -> None:
    net = ScalarModel(model_of())
    row = torch.tensor([5, 6, 7])
    alone = net.score(row[None], torch.ones(1, 3, dtype=torch.bool))
    right = net.score(torch.tensor([[5, 6, 7, 0]]), torch.tensor([[True, True, True, False]]))
    left = net.score(torch.tensor([[0, 5, 6, 7]]), torch.tensor([[False, True, True, True]]))
    torch.testing.assert_close(right, alone)
    torch.testing.assert_close(left, alone)


def test_a_judge_that_takes_the_first_answer_scores_one_half() -> None:
    found = pairwise(lambda prompt, a, b: 1.0, ["p"] * 4, ["a"] * 4, ["b"] * 4)
    assert found.win_rate == 0.5
    assert found.ties == 1.0


def test_the_reward_judge_counts_ties_half_and_gives_an_interval() -> None:
    judge = RewardJudge(lambda prompt, answer: float(len(answer)))
    found = pairwise(judge, ["p"] * 4, ["aa", "a", "aaa", "a"], ["a", "a", "a", "aa"])
    assert found.scores.tolist() == [1.0, 0.5, 1.0, 0.0]
    assert found.win_rate == 0.625
    assert found.low < 0.625 < found.high
    with pytest.raises(ValueError, match="0 prompts"):
        pairwise(judge, [], [], [])


class Judge(Endpoint):
    """Prefers the text that comes later in the alphabet, or says what it is told to."""

    def __init__(self) -> None:
        super().__init__(self.verdict)
        self.said: str | None = ""

    def verdict(self, body: dict[str, Any]) -> Reply:
        first, second = body["messages"][0]["content"].split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
        word = "A" if first.strip() > second.split("\n")[0] else "B"
        return {} if self.said is None else chat(self.said or f" {word}.\n")


@pytest.fixture
def endpoint() -> Iterator[Judge]:
    with serving(server := Judge()):
        yield server


def test_an_endpoint_is_asked_in_both_orders(endpoint: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    judge = EndpointJudge(endpoint.url, "m", "A_KEY")
    found = pairwise(judge, ["p {first}", "q"], ["z", "a"], ["y", "b"])
    assert found.scores.tolist() == [1.0, 0.0]
    assert len(endpoint.asked) == 4
    path, headers, body = endpoint.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert "[Prompt]\np {first}\n" in body["messages"][0]["content"], "a prompt is never filled in itself"
    for reply in ("I cannot say", "A tie", "Both A and B"):
        endpoint.said = reply
        assert judge("p", "x", "y") == 0.5
    endpoint.said = None
    with pytest.raises(RunError, match="gave no verdict"):
        judge("p", "x", "y")


def test_a_wrong_endpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="accepted: http"):
        EndpointJudge("file:///etc", "m")
    with pytest.raises(RunError, match="is the endpoint up"):
        EndpointJudge("http://127.0.0.1:9", "m", timeout=2)("p", "a", "b")


def test_answers_are_logged_as_a_table(tmp_path: Path) -> None:
    tables: list[dict[str, Any]] = []
    logger = SimpleNamespace(log_table=lambda key, **table: tables.append({"key": key, **table}))
    data = SimpleNamespace(decode=lambda tokens: [" ".join(map(str, row)) for row in tokens.tolist()])
    trainer = SimpleNamespace(datamodule=data, loggers=[logger, object()], default_root_dir=str(tmp_path))
    tokens, mask = torch.tensor([[7, 2], [8, 2]]), torch.ones(2, 2, dtype=torch.bool)
    module = SimpleNamespace(
        trainer=trainer,
        drawn={"answers": [(tokens + 10, mask, tokens, mask)]},
        score=lambda *answers: answers[2][:, 0].float(),
    )
    keep_answers(module)
    rows = [["17 12", "7 2", 7.0], ["18 12", "8 2", 8.0]]
    assert tables == [{"key": "answers", "columns": ["prompt", "answer", "score"], "data": rows}]
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [list(row.values()) for row in written] == rows


def test_rows_come_back_in_order() -> None:
    parts = {"row": [torch.tensor([2, 0]), torch.tensor([1])], "x": [torch.tensor([20, 0]), torch.tensor([10])]}
    assert in_order(parts)["x"].tolist() == [0, 10, 20]


def test_the_plane_has_the_vertices_the_centroid_and_a_rim() -> None:
    points = plane_points()
    rounded = {tuple(round(3 * c) for c in point) for point in points}
    assert {(3, 0, 0), (0, 3, 0), (0, 0, 3), (1, 1, 1), (-1, 2, 2)} <= rounded
    assert len(points) == len(rounded)
    assert all(sum(point) == pytest.approx(1) for point in points)


def test_what_is_said_of_a_surface() -> None:
    means = {"-0.25": 0.1, "+0.00": 1.0, "+0.25": 1.4, "+0.50": 1.6, "+0.75": 1.5, "+1.00": 1.1, "+1.25": 0.2, "centroid": 1.7}  # fmt: skip  # noqa: E501
    surface = {label: torch.full((4,), value) for label, value in means.items()}
    plane = {"points": [(1, 0, 0), (1 / 3, 1 / 3, 1 / 3)], "reward": [1.0, 2.0]}
    found = surface_metrics(surface, plane, 1.0)
    assert found["peak_alpha"] == 0.5
    assert found["best_member"] == pytest.approx(1.1)
    assert found["worst_member"] == pytest.approx(1.0)
    assert found["best_extrapolation"] == pytest.approx(0.2)
    assert found["plane_peak_smallest_coordinate"] == pytest.approx(1 / 3)
    assert found["optimum_soup"] == pytest.approx(1.6)


def test_the_three_methods_chain(tmp_path: Path, endpoint: Judge) -> None:
    """Pre-training, two members, a reward model and SALSA from their checkpoints, with all that a test can compare."""
    import matplotlib

    matplotlib.use("Agg")
    data = {"data.init_args.test_rows": 20, "data.init_args.val_rows": 20}
    short = {"trainer.max_steps": 4, "trainer.limit_val_batches": 1, "checkpoint.every_n_steps": 0, **data}

    def fit(name: str, config: str, **overrides: Any) -> str:
        given = {**short, **{key.replace("__", "."): value for key, value in overrides.items()}}
        result = zoo.run("fit", config=config, overrides=given, run_dir=tmp_path / name, wandb="disabled")
        return str(max((result.run_dir / "checkpoints").glob("*.ckpt")))

    base = fit("base", "sft/smoke", data__init_args__stage="pretrain")
    members = [
        fit(f"sft{k}", "sft/smoke", model__init_args__init_from=base, data__init_args__demonstration_set=k)
        for k in (1, 2, 3)
    ]
    reward = fit("reward", "reward_model/smoke", model__init_args__init_from=base)
    content = torch.load(reward, weights_only=True)
    assert float(content["state_dict"]["shift"]) != 0
    opponent = fit("ppo", "salsa/smoke", model__init_args__reference={"mode": "sft", "members": members[:2]})
    options = {
        "model.init_args.reference.members": members,
        "model.init_args.reward_model": reward,
        "model.init_args.value_init": "reward",
        "model.init_args.opponent": opponent,
        "model.init_args.surface": True,
        "model.init_args.judge": {"url": endpoint.url, "model": "m"},
        "trainer.callbacks+": [{"class_path": "figures"}],
    }
    fit("salsa", "salsa/smoke", **{key.replace(".", "__"): value for key, value in options.items()})
    result = zoo.run("test", run_dir=tmp_path / "salsa", wandb="disabled")
    for name in ("reward", "score", "win_rate", "win_rate_low", "gain", "best_of_reward", "reward_alpha_+0.50"):
        assert f"test/{name}" in result.metrics
    assert (
        result.metrics["test/win_rate_low"] <= result.metrics["test/win_rate"] <= result.metrics["test/win_rate_high"]
    )
    assert 0 <= result.metrics["test/judge_win_rate"] <= 1
    assert {"reward_over_alpha.png", "reward_plane.png"} <= {p.name for p in (tmp_path / "salsa" / "figures").iterdir()}
    answers = [json.loads(line) for line in (tmp_path / "salsa" / "answers.jsonl").read_text().splitlines()]
    assert answers[0].keys() == {"prompt", "answer", "score"}
    for member in members:  # a resumed run needs no file of another one
        Path(member).unlink()
    again = zoo.run("validate", run_dir=tmp_path / "salsa", wandb="disabled")
    assert "val/reward" in again.metrics
    assert lm_state(result.model.policy).keys() == lm_state(result.model.frozen["sft"]).keys()
