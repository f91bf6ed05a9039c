"""KV prediction as a model of the lm-evaluation-harness (`pip install 'method-zoo[lm-eval]'`).

Multiple-choice likelihoods use a predicted cache at every position, as in training; generation predicts the cache of
the prompt and goes on with the base, greedily.

    lm = KVPredictionLM(load_predictor("predictor.safetensors"), tokenizer)
    lm_eval.simple_evaluate(model=lm, tasks=["triviaqa"], num_fewshot=1)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.methods.kv_prediction.export import Loaded
from zoo.methods.kv_prediction.generation import decode
from zoo.methods.kv_prediction.prefill import full, predicted
from zoo.nn.lm import token_logprobs

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise ImportError("the harness is missing: pip install 'method-zoo[lm-eval]'") from error


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of `datamodules.text` have it."""

    eos_id: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, without special ones."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens."""


class KVPredictionLM(LM):
    """A base model whose cache is predicted.

    Args:
        models: Base, auxiliary and maps.
        tokenizer: Of both models.
        max_new_tokens: Most tokens of an answer where the task names none.
        use_base: Whether the base computes its cache itself: the upper bound.
    """

    def __init__(self, models: Loaded, tokenizer: Tokenizer, max_new_tokens: int = 64, use_base: bool = False) -> None:
        super().__init__()
        self.models, self.tokenizer = models, tokenizer
        self.max_new_tokens, self.use_base = max_new_tokens, use_base
        self._context = models.base.shape.context

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether greedy decoding gives it."""
        return [self._score(*self._pair(*request.args)) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of whole texts, after an end token.

        Texts longer than the context are scored in windows that do not overlap.
        """
        found = []
        for request in requests:
            ids = self.tokenizer.encode([request.args[0]])[0]
            width = self._context - 1 if self._context else max(len(ids), 1)
            windows = [ids[i : i + width] for i in range(0, len(ids), width)]
            before = [self.tokenizer.eos_id, *(window[-1] for window in windows[:-1])]
            found.append(sum(self._score([b], w)[0] for b, w in zip(before, windows, strict=True)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to the first of the stop strings."""
        return [self._continue(*request.args) for request in requests]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, split where the tokens of the whole text are; the blank goes with the continuation."""
        blank = len(context) - len(context.rstrip())
        if blank:
            context, continuation = context[:-blank], context[-blank:] + continuation
        whole, start = self.tokenizer.encode([context + continuation, context])
        return whole[: len(start)] or [self.tokenizer.eos_id], whole[len(start) :]

    @torch.no_grad()
    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        ids = [*context, *continuation][-(self._context or 10**9) - 1 :]
        row = torch.tensor([ids])
        inputs, labels = row[:, :-1], row[:, -len(continuation) :]
        base, auxiliary, predictor = self.models
        given = None if self.use_base else predictor(auxiliary.entries(inputs))
        logits = base.logits(base(inputs, given=given)[0][:, -len(continuation) :])
        right: Tensor = logits.argmax(dim=-1) == labels
        return float(token_logprobs(logits, labels).sum()), bool(right.all())

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise ValueError("do_sample: True is not accepted; accepted: False, greedy decoding")
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        count = int(options.get("max_gen_toks", self.max_new_tokens))
        ids = self.tokenizer.encode([context])[0] or [self.tokenizer.eos_id]
        if self._context:
            if count >= self._context:
                raise ValueError(f"max_gen_toks: {count} is not accepted; accepted: less than {self._context}")
            ids = ids[-(self._context - count) :]
        base, auxiliary, predictor = self.models
        prompt = torch.tensor([ids])
        with torch.no_grad():
            start = full(base, prompt, count) if self.use_base else predicted(base, auxiliary, predictor, prompt, count)
        tokens: list[int] = []
        for token in decode(base, start, count):
            if int(token) == self.tokenizer.eos_id:
                break
            tokens.append(int(token))
            text = self.tokenizer.decode(tokens)
            ends = [text.index(stop) for stop in stops if stop and stop in text]
            if ends:
                return text[: min(ends)]
        return self.tokenizer.decode(tokens)
