"""Sampling of answers behind a small protocol: in this process, or by vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.methods.salsa.decoding import decoder_of
from zoo.methods.salsa.losses import truncate
from zoo.nn.distributed import is_distributed

ENGINES = ("in_process", "vllm")


class Sampling(NamedTuple):
    """How answers are drawn: from the model's own distribution, never from a truncated one.

    KL and ratios are computed from the whole distribution; top-k or top-p would make them wrong.
    """

    length: int
    temperature: float
    eos_id: int
    pad_id: int


class Drawn(NamedTuple):
    """Answers of `B` rows."""

    tokens: Tensor
    """int64 `[B, length]`, filled up after the end."""
    mask: Tensor
    """bool `[B, length]`."""
    logprobs: Tensor | None = None
    """Of each token under the distribution that it was drawn from, float32 `[B, length]`; 0 after the end."""
    entropy: Tensor | None = None
    """Of that distribution, nats."""


class Engine(Protocol):
    """Draws answers."""

    def sync(self, policy: Any) -> None:
        """Take over the present weights; called before each batch of answers."""

    def __call__(
        self, prompt_ids: Tensor, prompt_mask: Tensor, rows: Tensor, seed: int, likelihood: bool = False
    ) -> Drawn:
        """Draw an answer to each prompt.

        Args:
            prompt_ids: int64 `[B, P]`, padded on the left.
            prompt_mask: bool `[B, P]`.
            rows: Number of each row in the global batch, int64 `[B]`: an answer follows from prompt, row and seed.
            seed: Changes all answers.
            likelihood: Whether log-probabilities and entropies are of use. An engine gives them only if they are what
                the trainer would compute; what is None the trainer computes itself.
        """


def uniforms(seed: int, rows: Tensor, steps: int) -> Tensor:
    """Numbers in [0, 1) that follow from seed, row and step alone: float64 `[B, steps]`.

    The answers are then the same for any number of processes, and two models can be compared on common random numbers.
    SplitMix64 (Steele, Lea, Flood 2014) of a counter.
    """
    golden, m1, m2 = -7046029254386353131, -4658895280553007687, -7723592293110705685  # as signed 64 bit numbers
    counter = rows[:, None].long() * 1_000_003 + torch.arange(steps, device=rows.device)

    def mixed(z: Tensor) -> Tensor:
        z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * m1  # a logical shift: the sign must not be drawn in
        z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * m2
        return z ^ ((z >> 31) & ((1 << 33) - 1))

    key = mixed(torch.full_like(counter, seed) * golden + golden)
    z = mixed(mixed(counter * golden + key) + golden)
    return ((z >> 11) & ((1 << 53) - 1)).double() / 2**53


class InProcess:
    """A batched sampler on the policy itself, by inversion of the cumulated distribution.

    Answers do not depend on the batch that they are drawn in. Rows that have ended are dropped once they are half.

    Args:
        sampling: How answers are drawn.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.policy: Any = None

    def sync(self, policy: Any) -> None:
        """Use this network; there is nothing to copy."""
        self.policy = policy

    @torch.no_grad()
    def __call__(
        self, prompt_ids: Tensor, prompt_mask: Tensor, rows: Tensor, seed: int, likelihood: bool = False
    ) -> Drawn:
        """Draw; there are likelihoods if the model computes in float32: then they are those of a trainer's pass."""
        how, count = self.sampling, len(prompt_ids)
        decoder = decoder_of(self.policy, prompt_mask, prompt_ids.shape[1] + how.length)
        numbers, here = uniforms(seed, rows, how.length), torch.arange(count, device=prompt_ids.device)
        tokens = prompt_ids.new_full((count, how.length), how.pad_id)
        found = numbers.new_zeros(2, count, how.length)
        going, ids = torch.ones_like(here, dtype=torch.bool), prompt_ids
        for step in range(how.length):
            logits = decoder(ids)
            likelihood = likelihood and logits.dtype == torch.float32
            logs = torch.log_softmax(logits.double() / how.temperature, dim=-1)
            shares = logs.exp()
            cumulated = shares.cumsum(dim=-1)
            ids = torch.searchsorted(cumulated, numbers[here, step, None] * cumulated[:, -1:], right=True)
            ids = ids.clamp_(max=logs.shape[-1] - 1)
            tokens[here, step] = ids[:, 0]
            if likelihood:
                found[0, here, step] = logs.gather(1, ids)[:, 0]
                found[1, here, step] = -(shares * logs).sum(dim=1)
            if is_distributed():  # under FSDP every process has to take part in every step
                continue
            going &= ids[:, 0] != how.eos_id
            left = int(going.sum())
            if not left:
                break
            if decoder.can_drop and 2 * left <= len(here):
                kept = going.nonzero()[:, 0]
                decoder.keep(kept)
                here, ids, going = here[kept], ids[kept], going[kept]
        tokens, mask = truncate(tokens, how.eos_id, how.pad_id)
        if not likelihood:
            return Drawn(tokens, mask)
        return Drawn(tokens, mask, *torch.where(mask, found, 0).float())


class VLLM:
    """vLLM in this process. The trainer's weights are copied into it before each batch of answers.

    Args:
        model: Folder or hub name with configuration and weights that vLLM can build.
        sampling: How answers are drawn.
        options: Further arguments of `vllm.LLM`.

    Raises:
        ValueError: If vLLM is not installed.
    """

    def __init__(self, model: str, sampling: Sampling, options: Mapping[str, Any] | None = None) -> None:
        # the engine has to live in this process for its model to be reachable
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ValueError("engine: 'vllm' needs the package vllm; accepted without it: in_process") from error
        self.sampling, self._params = sampling, SamplingParams
        self.llm = LLM(model=model, skip_tokenizer_init=True, trust_remote_code=False, **(options or {}))

    def sync(self, policy: Any) -> None:
        """Copy the weights, adapters merged, and forget cached prefixes of the old ones."""
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.model.load_weights(merged_weights(policy).items())
        self.llm.reset_prefix_cache()

    def __call__(
        self, prompt_ids: Tensor, prompt_mask: Tensor, rows: Tensor, seed: int, likelihood: bool = False
    ) -> Drawn:
        """Draw; each row has a seed of its own, and likelihoods are left to the trainer."""
        how = self.sampling
        prompts = [
            {"prompt_token_ids": ids[mask].tolist()} for ids, mask in zip(prompt_ids, prompt_mask.bool(), strict=True)
        ]
        params = [
            self._params(
                temperature=how.temperature,
                top_p=1.0,
                top_k=0,
                max_tokens=how.length,
                seed=(seed * 1_000_003 + row) % 2**31,
                stop_token_ids=[how.eos_id],
                detokenize=False,
            )
            for row in rows.tolist()
        ]
        tokens = torch.full((len(prompts), how.length), how.pad_id)
        for row, output in enumerate(self.llm.generate(prompts, params, use_tqdm=False)):
            drawn = list(output.outputs[0].token_ids)
            tokens[row, : len(drawn)] = torch.tensor(drawn, dtype=torch.int64)
        return Drawn(*truncate(tokens.to(prompt_ids.device), how.eos_id, how.pad_id))


def build_engine(kind: str, lm: str | Mapping[str, Any], sampling: Sampling, options: Mapping[str, Any]) -> Engine:
    """Make an engine.

    Args:
        kind: One of `ENGINES`.
        lm: The language model's values, folder or name: what vLLM is built from unless `options` name a `model`.
        sampling: How answers are drawn.
        options: Further arguments of `vllm.LLM`.

    Raises:
        ValueError: If vLLM is asked for without a model that it can read, or is not installed.
    """
    if kind == "in_process":
        return InProcess(sampling)
    model = options.get("model", lm if isinstance(lm, str) else None)
    if model is None:
        raise ValueError("engine_options: vllm needs model, a folder or hub name")
    return VLLM(model, sampling, {key: value for key, value in options.items() if key != "model"})


def merged_weights(model: Any) -> dict[str, Tensor]:
    """Weights of a model by their names in `transformers`, adapters merged; the model is left as it is."""
    from torch.distributed.tensor import DTensor

    state = {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in model.state_dict().items()}
    if not any(".lora_" in name for name in state):
        return state
    deltas = {
        f"{name}.weight": part.get_delta_weight(next(iter(part.lora_A)))
        for name, part in model.named_modules()
        if hasattr(part, "get_delta_weight") and hasattr(part, "lora_A")
    }
    plain = {n.replace(".base_layer.", "."): v for n, v in state.items() if ".lora_" not in n}
    return {n: v + deltas[n] if n in deltas else v for n, v in plain.items()}


def drawn_seed(device: torch.device) -> int:
    """A seed from torch's global generator, that of rank 0 on all ranks."""
    seed = torch.randint(2**40, (1,))
    if is_distributed():
        seed = seed.to(device)
        dist.broadcast(seed, 0)
    return int(seed)
