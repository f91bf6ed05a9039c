"""KV prediction as a model of the lm-evaluation-harness (`pip install 'method-zoo[lm-eval]'`).

Multiple-choice likelihoods use a predicted cache at every position, as in training; generation predicts the cache of
the prompt and goes on with the base, greedily.

    lm = KVPredictionLM(load_predictor("predictor.safetensors"), tokenizer)
    zoo.harness.evaluate(lm, ["triviaqa"], shots=1)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from zoo.harness import HarnessLM, Tokenizer
from zoo.methods.kv_prediction.export import Loaded
from zoo.methods.kv_prediction.generation import decode
from zoo.methods.kv_prediction.prefill import full, predicted


class KVPredictionLM(HarnessLM):
    """A base model whose cache is predicted.

    Args:
        models: Base, auxiliary and maps.
        tokenizer: Of both models.
        max_new_tokens: Most tokens of an answer where the task names none.
        use_base: Whether the base computes its cache itself: the upper bound.
        batch_size: Texts that are scored at a time.
    """

    def __init__(
        self,
        models: Loaded,
        tokenizer: Tokenizer,
        max_new_tokens: int = 64,
        use_base: bool = False,
        batch_size: int = 8,
    ) -> None:
        super().__init__(tokenizer, models.base.shape.context, batch_size, max_new_tokens)
        self.models, self.use_base = models, use_base
        self._device = next(models.base.parameters()).device

    def logits(self, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        """Logits of the base at the last places, from predicted entries or its own; `[B, keep, V]`."""
        base, auxiliary, predictor = self.models
        given = None if self.use_base else predictor(auxiliary.entries(ids))
        return base.logits(base(ids, given=given)[0][:, -keep:])

    def greedy(self, ids: Tensor, count: int) -> Iterator[int]:
        """Yield the most likely tokens; the cache of the prompt is predicted, or the base's own."""
        base, auxiliary, predictor = self.models
        with torch.no_grad():
            start = full(base, ids, count) if self.use_base else predicted(base, auxiliary, predictor, ids, count)
        yield from map(int, decode(base, start, count))
