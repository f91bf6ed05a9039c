"""What is compared at the end of a test: an opponent, the best of several answers, the soups of the members."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.methods.salsa import losses
from zoo.methods.salsa.frozen import member_states
from zoo.methods.salsa.judge import EndpointJudge, pairwise, verdict
from zoo.methods.salsa.networks import freeze, load_lm, load_weights
from zoo.methods.salsa.rollout import ended
from zoo.methods.salsa.soup import soup, soup_weights
from zoo.nn.distributed import all_gather_rows, rank

ALPHAS = (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
#: Prompts for each point of the plane of three members, and the step of its coordinates.
PLANE_PROMPTS, PLANE_STEP = 500, 3
#: Answers that are written down.
KEPT = 20


def in_order(parts: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Put the rows of all batches and processes in the order of `row`."""
    gathered = {name: all_gather_rows(torch.cat(list(values))) for name, values in parts.items()}
    order = gathered["row"].argsort()
    return {name: values[order] for name, values in gathered.items()}


@torch.no_grad()
def evaluate_prompts(module: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Answer fixed prompts, and keep what is said of each answer in `module.evaluated`.

    Args:
        module: A `Salsa` module.
        batch: A `PromptBatch`.

    Returns:
        Prompts, their mask, answers and their mask.
    """
    tokens, mask = module.answer(batch, batch["row"], module.hparams["eval_seed"])[:2]
    answers = (batch["prompt_ids"], batch["prompt_mask"], tokens, mask)
    logprobs, _, entropy = module.evaluate_policy(*answers, entropy=True)

    def kl_to(reference: Tensor) -> Tensor:
        return torch.where(mask, losses.k1(logprobs, reference), 0).sum(dim=1)

    found = {
        "row": batch["row"],
        "score": module.score(*answers),
        "kl": kl_to(module.frozen.reference_logprobs(*answers)),
        "entropy": (entropy * mask).sum(dim=1) / mask.sum(dim=1),
        "length": mask.sum(dim=1).float(),
        "no_eos": (~ended(tokens, mask, module.sampling.eos_id)).float(),
    }
    if "sft" in module.frozen:
        is_reference = module.mode == "sft"
        found["kl_sft"] = found["kl"] if is_reference else kl_to(module.frozen.logprobs("sft", *answers))
    if hasattr(getattr(module.trainer, "datamodule", None), "reward"):
        found["reward"] = module.gold(batch["prompt_ids"], tokens, mask)
    for name, value in found.items():
        module.evaluated.setdefault(name, []).append(value)
    return answers


def mean_of_prompts(module: Any, stage: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Log the means of what was found over all prompts; returns them, and what was found for each prompt in order."""
    rows = in_order(module.evaluated)
    means = {name: value.float().mean() for name, value in rows.items() if name != "row"}
    module.log_dict({f"{stage}/{name}": value for name, value in means.items()}, sync_dist=True)
    return means, rows


def finish_test(module: Any) -> None:
    """Log means, and compare with the opponent, the best of several answers, and the soups of the members."""
    _, rows = mean_of_prompts(module, "test")
    hp, values = module.hparams, dict[str, float]()
    if hp["opponent"]:
        values |= against_opponent(module, rows)
    if hp["best_of"]:
        values |= best_of(module, hp["best_of"])
    if hp["surface"]:
        surface, plane = surfaces(module)
        values |= surface_metrics(surface, plane, hp["beta"])
        module.drawn |= {"surface": surface, "plane": plane}
    module.log_dict({f"test/{name}": value for name, value in values.items()}, sync_dist=True)
    keep_answers(module)


@torch.no_grad()
def rewards_of(module: Any, policy: Any, seed: int, most: int = 0) -> dict[str, Tensor]:
    """Scores and, where the data have one, programmatic rewards of a model's answers to the prompts of the test.

    Args:
        module: A `Salsa` module in its test.
        policy: The model.
        seed: Of the answers.
        most: Only prompts below this number; 0 for all.

    Returns:
        `score` and `reward` (the score where there is no other), each `[N]` in the order of the prompts.
    """
    found: dict[str, list[Tensor]] = {"row": [], "score": [], "reward": []}
    gold = hasattr(module.trainer.datamodule, "reward")
    for batch in module.drawn["batches"]:
        rows = batch["row"] < most if most else torch.ones_like(batch["row"], dtype=torch.bool)
        if not bool(rows.any()) and found["row"]:
            continue
        part = {key: value[rows] for key, value in batch.items()}
        if len(part["row"]):
            answers = module.answer(part, part["row"], seed, policy)[:2]
            score = module.score(part["prompt_ids"], part["prompt_mask"], *answers)
            reward = module.gold(part["prompt_ids"], *answers) if gold else score
        else:
            score = reward = torch.zeros(0, device=module.device)
        for name, value in (("row", part["row"]), ("score", score), ("reward", reward)):
            found[name].append(value)
    return in_order(found)


def against_opponent(module: Any, rows: Mapping[str, Tensor]) -> dict[str, float]:
    """Compare with the opponent's answers, drawn with the same random numbers; intervals are 95 % bootstrap ones."""
    hp = module.hparams
    opponent = freeze(load_lm(hp["opponent"], hp["vocab_size"])[0]).to(module.device)
    theirs = rewards_of(module, opponent, hp["eval_seed"])
    name = "reward" if "reward" in rows else "score"
    found = verdict(losses.wins(rows[name], theirs[name]))
    low, high = losses.bootstrap_interval(rows[name] - theirs[name])
    values = {
        "win_rate": found.win_rate, "win_rate_low": found.low, "win_rate_high": found.high, "ties": found.ties,
        "opponent_reward": float(theirs[name].mean()), "gain": float((rows[name] - theirs[name]).mean()),
        "gain_low": low, "gain_high": high,
    }  # fmt: skip
    if hp["judge"] and rank() == 0:
        values |= judged(module, opponent)
    return values


@torch.no_grad()
def judged(module: Any, opponent: Any) -> dict[str, float]:
    """Let an endpoint compare this process's answers with the opponent's."""
    data, judge = module.trainer.datamodule, EndpointJudge(**module.hparams["judge"])
    texts: list[list[str]] = [[], [], []]
    for batch, answers in zip(module.drawn["batches"], module.drawn["answers"], strict=True):
        theirs = module.answer(batch, batch["row"], module.hparams["eval_seed"], opponent)[0]
        for kept, tokens in zip(texts, (batch["prompt_ids"], answers[2], theirs), strict=True):
            kept += data.decode(tokens)
    found = pairwise(judge, *texts)
    return {
        "judge_win_rate": found.win_rate,
        "judge_low": found.low,
        "judge_high": found.high,
        "judge_ties": found.ties,
    }


def best_of(module: Any, count: int) -> dict[str, float]:
    """Mean of what the best of `count` answers by the score is worth."""
    draws = [rewards_of(module, module.policy, module.hparams["eval_seed"] + 1 + n) for n in range(count)]
    score, reward = (torch.stack([draw[name] for draw in draws]) for name in ("score", "reward"))
    best = score.argmax(dim=0, keepdim=True)
    return {
        "best_of_score": float(score.gather(0, best).mean()),
        "best_of_reward": float(reward.gather(0, best).mean()),
    }


def plane_points(step: int = PLANE_STEP) -> list[tuple[float, float, float]]:
    """Barycentric coordinates of a grid over a triangle and a rim of one step around it."""
    grid = range(-1, step + 2)
    return [
        (a / step, b / step, (step - a - b) / step) for a, b in itertools.product(grid, grid) if step - a - b in grid
    ]


def surfaces(module: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reward of soups of the members on the prompts of the test.

    Returns:
        `{label: rewards [N]}`: for two members by alpha, `centroid` of all; and, of three or more, the points of the
        plane through the first three with their mean rewards.

    Raises:
        ValueError: If there are no members.
    """
    if len(module.members) < 2:
        raise ValueError("surface: true needs two or more reference.members")
    states, _ = member_states(module.members, module.hparams["vocab_size"])
    model = freeze(copy.deepcopy(load_lm(module.members[0], module.hparams["vocab_size"])[0])).to(module.device)
    seed = module.hparams["eval_seed"]

    def reward(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float], most: int = 0) -> Tensor:
        load_weights(model, soup(states, weights), "soup")
        return rewards_of(module, model, seed, most)["reward"]

    surface = {f"{alpha:+.2f}": reward(states[:2], soup_weights(2, alpha)) for alpha in ALPHAS}
    if len(states) == 2:
        return surface, {}
    surface["centroid"] = reward(states, soup_weights(len(states)))
    points = plane_points()
    means = [float(reward(states[:3], point, PLANE_PROMPTS).mean()) for point in points]
    return surface, {"points": points, "reward": means}


def surface_metrics(surface: Mapping[str, Tensor], plane: Mapping[str, Any], beta: float) -> dict[str, float]:
    """Rewards over alpha, where their peak is, and how far soups are above the members, extrapolations below them.

    `optimum_sft` and `optimum_soup` are the rewards of the optimal policies near the first member and near the soup of
    two, estimated from samples of these (`losses.tilted_mean`).
    """
    mean = {label: float(rewards.mean()) for label, rewards in surface.items()}
    by_alpha = {alpha: mean[f"{alpha:+.2f}"] for alpha in ALPHAS}
    values = {f"reward_alpha_{label}": value for label, value in mean.items() if label != "centroid"}
    values["peak_alpha"] = max(by_alpha, key=lambda alpha: by_alpha[alpha])
    values["best_member"] = max(by_alpha[0.0], by_alpha[1.0])
    values["worst_member"] = min(by_alpha[0.0], by_alpha[1.0])
    values["best_extrapolation"] = max(by_alpha[-0.25], by_alpha[1.25])
    if "centroid" in mean:
        values["reward_centroid"] = mean["centroid"]
    if plane:
        best = max(range(len(plane["reward"])), key=lambda i: plane["reward"][i])
        values["plane_peak_smallest_coordinate"] = min(plane["points"][best])
    if beta > 0:
        values["optimum_sft"] = float(losses.tilted_mean(surface["+0.00"], beta))
        values["optimum_soup"] = float(losses.tilted_mean(surface["+0.50"], beta))
    return values


def keep_answers(module: Any) -> None:
    """Write some prompts and answers to `answers.jsonl`, and a table to W&B, if the data can decode them."""
    data: Any = getattr(module.trainer, "datamodule", None)
    if rank() != 0 or not hasattr(data, "decode") or not module.drawn.get("answers"):
        return
    prompts, mask, tokens, answer_mask = (part[:KEPT] for part in module.drawn["answers"][0])
    scores = module.score(prompts, mask, tokens, answer_mask).tolist()
    texts = zip(data.decode(prompts), data.decode(tokens), scores, strict=True)
    rows = [{"prompt": prompt, "answer": answer, "score": score} for prompt, answer, score in texts]
    folder = Path(module.trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "answers.jsonl").write_text(text, encoding="utf-8")
    for logger in module.trainer.loggers:
        if hasattr(logger, "log_table"):
            columns = ["prompt", "answer", "score"]
            logger.log_table("answers", columns=columns, data=[[row[c] for c in columns] for row in rows])
