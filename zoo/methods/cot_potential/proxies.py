"""Cheap stand-ins for the potential: one pass over a trace instead of completions of its prefixes (ours)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zoo.methods.cot_potential.curves import Trace


@dataclass(frozen=True)
class Proxies:
    """What a pass over a trace says about its chunks.

    Attributes:
        surprisal: Negative log-probability of each chunk in nats, `[K]`.
        entropy: Largest entropy of a next token within each chunk, nats, `[K]`.
        forced: Probability of the right answer if it has to be given at each boundary, `[K + 1]`; NaN where the
            problem does not say how to ask. At the end, whether the trace is right.
    """

    surprisal: Tensor
    entropy: Tensor
    forced: Tensor


@torch.no_grad()
def trace_proxies(model: Any, trace: Trace) -> Proxies:
    """Measure the proxies of a trace of token ids.

    Args:
        model: Causal language model.
        trace: The trace; its problem may have `forced_answer`: tokens that ask for the answer, and the answer's.
    """
    device = next(model.parameters()).device
    prompt, tokens, bounds = list(trace.problem.prompt), list(trace.tokens), trace.boundaries
    ids = torch.tensor([prompt + tokens], device=device)
    logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(dim=-1)
    own = -logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).nan_to_num().sum(dim=-1)
    spans = list(pairwise(bounds))
    forced = torch.full((len(bounds),), float("nan"))
    asks = getattr(trace.problem, "forced_answer", None)
    if asks is not None:
        marker, answer = asks
        for i, cut in enumerate(bounds[: trace.before_answer + 1]):
            asked = torch.tensor([prompt + tokens[:cut] + marker + answer], device=device)
            said = model(input_ids=asked).logits[0, -len(answer) - 1 : -1].float().log_softmax(dim=-1)
            forced[i] = said.gather(1, asked[0, -len(answer) :, None]).sum().exp().cpu()
        forced[-1] = float(trace.correct)
    return Proxies(
        torch.stack([own[a:b].sum() for a, b in spans]).cpu(),
        torch.stack([entropy[a:b].max() for a, b in spans]).cpu(),
        forced,
    )
