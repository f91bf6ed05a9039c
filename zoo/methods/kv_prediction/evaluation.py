"""What a test compares: ways to the first token at one cost, and what each makes of the answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from zoo.methods.kv_prediction import prefill
from zoo.methods.kv_prediction.flops import kvp_flops, lazy_flops, prefill_flops, static_prune_flops
from zoo.methods.kv_prediction.losses import recovery
from zoo.methods.kv_prediction.networks import CausalLM, KVPredictor
from zoo.nn.distributed import all_reduce_sum
from zoo.nn.lm import token_logprobs

#: Baselines that choose tokens of the prompt.
PRUNING = ("truncate", "random_prune", "static_prune", "lazyllm")


@dataclass(frozen=True)
class Arm:
    """A way to the first token.

    Args:
        run: From prompts `[B, N]`, their rows `[B]` and the number of tokens to come to logits and cache.
        model: Goes on from there.
        cost: Floating-point operations to the first token.
    """

    run: Callable[[Tensor, Tensor, int], prefill.Prefill]
    model: CausalLM
    cost: int


def base_arm(model: CausalLM, tokens: int) -> Arm:
    """The whole prompt through one model."""
    return Arm(lambda prompt, rows, more: prefill.full(model, prompt, more), model, prefill_flops(model.shape, tokens))


def predicted_arm(base: CausalLM, auxiliary: CausalLM, predictor: KVPredictor, tokens: int) -> Arm:
    """The method."""
    cost = kvp_flops(auxiliary.shape, base.shape, predictor.layer_map, tokens)
    return Arm(lambda prompt, rows, more: prefill.predicted(base, auxiliary, predictor, prompt, more), base, cost)


def truncate_arm(model: CausalLM, tokens: int, kept: int) -> Arm:
    """The last tokens of the prompt alone; with one token, no prompt."""

    def run(prompt: Tensor, rows: Tensor, more: int) -> prefill.Prefill:
        return prefill.pruned(model, prompt, prefill.truncated_positions(prompt, kept), more)

    return Arm(run, model, prefill_flops(model.shape, kept))


def random_arm(model: CausalLM, tokens: int, kept: int) -> Arm:
    """Random tokens of the prompt."""

    def run(prompt: Tensor, rows: Tensor, more: int) -> prefill.Prefill:
        return prefill.pruned(model, prompt, prefill.random_positions(prompt, rows, kept), more)

    return Arm(run, model, prefill_flops(model.shape, kept))


def static_arm(model: CausalLM, tokens: int, kept: int) -> Arm:
    """Tokens that the first layers find important."""

    def run(prompt: Tensor, rows: Tensor, more: int) -> prefill.Prefill:
        return prefill.pruned(model, prompt, prefill.static_positions(model, prompt, kept), more)

    return Arm(run, model, static_prune_flops(model.shape, tokens, kept))


def lazy_arm(model: CausalLM, tokens: int, counts: Sequence[int]) -> Arm:
    """Fewer tokens from layer to layer."""

    def run(prompt: Tensor, rows: Tensor, more: int) -> prefill.Prefill:
        return prefill.lazy(model, prompt, counts, more)

    return Arm(run, model, lazy_flops(model.shape, counts))


def all_arms(
    base: CausalLM, auxiliary: CausalLM, predictor: KVPredictor, tokens: int, retentions: Sequence[float]
) -> dict[str, Arm]:
    """The method under the name `""` and what it is compared with, for prompts of `tokens` tokens.

    Pruning is given the cost of the method, or the least above it; `random_prune_0.25` and the like keep a fraction of
    the tokens (LazyLLM from that fraction to a quarter of it).
    """
    budget = prefill.equal_cost(auxiliary.shape, base.shape, predictor.layer_map, tokens)
    arms = {
        "": predicted_arm(base, auxiliary, predictor, tokens),
        "base": base_arm(base, tokens),
        "auxiliary": base_arm(auxiliary, tokens),
        "no_prompt": truncate_arm(base, tokens, 1),
        "truncate": truncate_arm(base, tokens, budget.tokens),
        "random_prune": random_arm(base, tokens, budget.tokens),
        "static_prune": static_arm(base, tokens, budget.static),
        "lazyllm": lazy_arm(base, tokens, budget.lazy),
    }
    for retention in retentions:
        kept = max(round(retention * tokens), 1)
        arms[f"truncate_{retention:g}"] = truncate_arm(base, tokens, kept)
        arms[f"random_prune_{retention:g}"] = random_arm(base, tokens, kept)
        arms[f"static_prune_{retention:g}"] = static_arm(base, tokens, kept)
        counts = prefill.lazy_counts(base.shape.depth, tokens, retention, retention / 4)
        arms[f"lazyllm_{retention:g}"] = lazy_arm(base, tokens, counts)
    return arms


def score(logits: Tensor, answer: Tensor, horizons: Sequence[int], group: str) -> dict[str, tuple[Tensor, int]]:
    """Sum over prompts what is measured of answers, with the number of prompts.

    `nll_h`: mean negative log-likelihood of the first `h` tokens in nats. `acc`: whether greedy decoding gives the
    whole answer; with teacher forcing that is whether each token is the most likely one. `acc_first`: the first token
    alone, where there are more. `acc_<group>`: the same by kind of prompt.

    Args:
        logits: `[B, M, V]`.
        answer: int64 `[B, M]`.
        horizons: Those longer than the answer are left out.
        group: Kind of the prompts, or `""`.
    """
    count, length = answer.shape
    nll = -token_logprobs(logits, answer)
    right = logits.argmax(dim=-1) == answer
    sums = {f"nll_{h}": nll[:, :h].mean(dim=1).sum() for h in horizons if h <= length}
    sums["acc"] = right.all(dim=1).float().sum()
    if length > 1:
        sums["acc_first"] = right[:, 0].float().sum()
    if group:
        sums[f"acc_{group}"] = sums["acc"]
    return {name: (value, count) for name, value in sums.items()}


def timed(arm: Arm, prompt: Tensor, rows: Tensor, more: int) -> tuple[prefill.Prefill, float]:
    """Run an arm; also returns the milliseconds until the first token is there."""
    wait = partial(torch.cuda.synchronize, prompt.device) if prompt.is_cuda else (lambda: None)
    wait()
    started = time.perf_counter()
    start = arm.run(prompt, rows, more)
    start.logits.argmax(dim=-1)
    wait()
    return start, 1000 * (time.perf_counter() - started)


class Sums:
    """Sums and counts by name, put together over processes."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, folder: str, values: Mapping[str, tuple[Tensor, int]]) -> None:
        """Add sums and counts; their names get `folder/` before them, if it is not empty."""
        for name, (value, count) in values.items():
            key = f"{folder}/{name}" if folder else name
            total, before = self._sums.get(key, (torch.zeros((), dtype=torch.float64), 0))
            self._sums[key] = (total + value.detach().cpu().double(), before + count)

    def means(self, device: torch.device) -> dict[str, float]:
        """Return the means over all processes; each must have added under the same names."""
        names = sorted(self._sums)
        if not names:
            return {}
        totals = torch.stack([self._sums[name][0] for name in names]).to(device)
        counted = torch.tensor([self._sums[name][1] for name in names], dtype=torch.float64, device=device)
        sums, counts = all_reduce_sum(torch.stack([totals, counted]))
        return dict(zip(names, (sums / counts).tolist(), strict=True))


def recoveries(means: Mapping[str, float], folders: Sequence[str]) -> dict[str, float]:
    """Return the recovery of each folder (an arm) at each horizon, where base and no prompt were measured too."""
    found = {}
    for key, base in means.items():
        name = key.removeprefix("base/")
        if not key.startswith("base/nll_") or f"no_prompt/{name}" not in means:
            continue
        for folder in folders:
            own = f"{folder}/" if folder else ""
            if f"{own}{name}" in means:
                value = recovery(means[f"{own}{name}"], base, means[f"no_prompt/{name}"])
                found[f"{own}{name.replace('nll', 'recovery')}"] = value
    return found
