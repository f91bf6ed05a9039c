"""Zero-shot accuracy over thresholds, by the lm-evaluation-harness (`pip install 'method-zoo[lm-eval]'`).

One model directory of `zoo moefy` gives a row for each threshold: accuracy, the activity that the evaluated tokens
really had, and the parameters that they used. `zoo harness` is the command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.harness import HarnessLM
from zoo.methods.dynamoe.export import nested_layers, set_threshold
from zoo.methods.dynamoe.losses import active_parameters
from zoo.methods.dynamoe.networks import router_parameters
from zoo.methods.dynamoe.routes import Route, Trace


class ModelTokenizer:
    """Tokenizer of a model of `transformers`.

    Args:
        source: Its folder or name.

    Raises:
        ValueError: If there is none, or it has no end token.
    """

    def __init__(self, source: str) -> None:
        from transformers import AutoTokenizer

        try:
            self.inner: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"tokenizer: {source} has none that can be loaded: {reason}") from error
        if self.inner.eos_token_id is None:
            raise ValueError(f"tokenizer: {source} has no token that ends a document")
        self.eos_id: int = self.inner.eos_token_id
        #: What it puts before every text.
        self.prefix: list[int] = list(self.inner("")["input_ids"])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, without special ones."""
        return self.inner(list(texts), add_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, special ones left out."""
        return str(self.inner.decode(list(ids), skip_special_tokens=True))


class DynaMoELM(HarnessLM):
    """A model with nested experts that notes how much of itself it uses.

    Args:
        model: What `export.load` returned, on its device.
        tokenizer: Of the model.
        batch_size: Texts that are scored at a time.
        max_new_tokens: Most tokens of an answer where the task names none.
    """

    def __init__(self, model: Any, tokenizer: ModelTokenizer, batch_size: int = 8, max_new_tokens: int = 256) -> None:
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        super().__init__(tokenizer, context, batch_size, max_new_tokens, tokenizer.prefix)
        self.model, self.layers = model, nested_layers(model)
        self._device = next(model.parameters()).device
        sizes = [[w / mlp.hidden_width for w in mlp.widths] for mlp in self.layers]
        self._sizes = torch.tensor(sizes, dtype=torch.float64, device=self._device)
        self.forget()

    def forget(self) -> None:
        """Count from zero."""
        self._used, self._tokens = torch.zeros_like(self._sizes[:, 0]), torch.zeros_like(self._sizes[0, 0])

    def run(self, ids: Tensor, mask: Tensor | None, **options: Any) -> Any:
        """Run the model and count the widths of all tokens that are no padding."""
        control, trace = self.layers[0].control, Trace()
        with torch.no_grad(), control.using(control.route, trace):
            output = self.model(input_ids=ids, **options)
        widths = trace.stacked("widths").long()
        used = self._sizes[:, None, :].expand(-1, len(ids), -1).gather(2, widths)
        self._used += (used if mask is None else used * mask).sum((1, 2))
        self._tokens += ids.numel() if mask is None else mask.sum()
        return output

    def logits(self, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        """Logits at the last places, `[B, keep, V]`; padding stands behind all that counts and needs no mask."""
        return self.run(ids, mask, use_cache=False).logits[:, -keep:]

    def greedy(self, ids: Tensor, count: int) -> Iterator[int]:
        """Yield the most likely tokens; the cache is the model's own."""
        cache = None
        for _ in range(count):
            output = self.run(ids, None, use_cache=True, past_key_values=cache)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            yield int(ids)

    def costs(self) -> dict[str, float]:
        """Mean activity of the tokens since `forget`, and the parameters that they used; see the method's page."""
        share = (self._used / self._tokens.clamp(min=1)).tolist()
        first, hidden = self.layers[0], [mlp.hidden_width for mlp in self.layers]
        routers = sum(p.numel() for p in router_parameters(self.layers))
        total = sum(p.numel() for p in self.model.parameters()) - routers
        used = [s * h for s, h in zip(share, hidden, strict=True)]
        active = active_parameters(total, routers, first.model_width, hidden, used, first.matrices)
        embedding = self.model.get_input_embeddings().weight.numel()
        return {
            "activity": sum(share) / len(share),
            "active_parameters": active,
            "active_parameters_without_embedding": active - embedding,
            "active_share": active / total,
            "tokens": float(self._tokens),
        }


def theta_grid(
    lm: DynaMoELM, head: str, thresholds: Sequence[float], evaluate: Callable[[DynaMoELM], dict[str, float]]
) -> list[dict[str, Any]]:
    """Evaluate one model at several thresholds, and at full width.

    Args:
        lm: The model.
        head: Kind of its routers.
        thresholds: theta of a score head, tau of a label head; 0 to 1.
        evaluate: Gives the metrics of the model as it is.

    Returns:
        A row for each threshold, ascending, and one for the full model without routers' choices.

    Raises:
        ValueError: If a threshold is out of range.
    """
    knob, control = "theta" if head == "score" else "tau", lm.layers[0].control
    before, rows = control.route, list[dict[str, Any]]()
    try:
        for threshold in [*sorted(set(thresholds)), None]:
            if threshold is None:
                control.route = Route()
            else:
                set_threshold(lm.model, head, threshold)
            lm.forget()
            found = evaluate(lm)
            rows.append({knob: "full width" if threshold is None else threshold, **lm.costs(), **found})
    finally:
        control.route = before
    return rows


def load(
    directory: str | Path,
    tokenizer: str | None = None,
    device: str = "cpu",
    batch_size: int = 8,
    max_new_tokens: int = 256,
) -> tuple[DynaMoELM, str]:
    """Read a directory of `zoo moefy` for the harness.

    Args:
        directory: The folder.
        tokenizer: Folder or name of the tokenizer; None for that in the folder.
        device: Where the model runs.
        batch_size: Texts that are scored at a time.
        max_new_tokens: Most tokens of an answer where the task names none.

    Returns:
        The model and the kind of its routers.

    Raises:
        ValueError: If one of the two cannot be read.
    """
    import json

    from zoo.methods.dynamoe import export

    model: Any = export.load(directory)
    settings = json.loads((Path(directory).expanduser() / export.SETTINGS).read_text("utf-8"))
    encoder = ModelTokenizer(str(Path(directory).expanduser()) if tokenizer is None else tokenizer)
    return DynaMoELM(model.to(device), encoder, batch_size, max_new_tokens), settings["head"]
