"""A training step of contrastive perplexity over all sentences at once, against one forward pass for each sentence.

The official code needs the log-perplexity of every sentence by itself, which `transformers`' `labels=` loss gives for a
batch of one only. Three ways of making the same step are measured in turn, in one run, on the batches and the model of
`contrastive_perplexity/toxicity`: all p + n sentences of all anchors in one pass (ours), one pass for each of them with
our likelihood, and one pass for each with `labels=` and the official formula. Their losses are compared first.

The memory of a step at the shapes of Llama-7B is counted on the meta device, where tensors have shapes and no numbers:
the largest sum of the bytes of all tensors that are alive beside the weights, of the whole step and of the head with
its loss alone: with all at once, with logits in chunks, and with sentences in chunks as well. Logits in chunks leave
what the layers need: the checkpoints of all of them, and the activations of the one that is computed again. Attention
runs there as matrix products, so its part is larger than with a fused kernel.

    python benchmarks/contrastive_perplexity_step.py [--steps 10] [--rounds 5] [--threads 1] [--out results/bench]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from datamodules.perplexity_sets.synthetic import PerplexitySets
from zoo.bench.report import comparison, write_bench
from zoo.config import load_layers
from zoo.methods.contrastive_perplexity.losses import log_perplexity, official_loss, prototype
from zoo.methods.contrastive_perplexity.module import ContrastivePerplexity
from zoo.methods.contrastive_perplexity.networks import build_network, chunked_logprobs, sentence_logprobs

CONFIG = "contrastive_perplexity/toxicity"
LLAMA_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
#: What the paper trains: 2 anchors of 5 + 5 sentences, cut at 256 tokens.
ANCHORS, MEMBERS, LENGTH = 2, 10, 256


# Time


def rows_of(batch: Any) -> list[Tensor]:
    """The tokens of each sentence of a batch, `[1, S]`, without padding."""
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    return [row[keep][None] for row, keep in zip(ids, mask, strict=True)]


def at_once(model: ContrastivePerplexity, batch: Any) -> Tensor:
    """Log-perplexities `[B, K]` by one pass over all sentences."""
    return model.log_perplexities(batch)[0]


def one_by_one(model: ContrastivePerplexity, batch: Any) -> Tensor:
    """The same by one pass for each sentence."""
    rows = rows_of(batch)
    losses = [log_perplexity(*sentence_logprobs(model.lm, row, torch.ones_like(row, dtype=torch.bool))) for row in rows]
    return torch.cat(losses).view(batch["input_ids"].shape[:2])


def by_labels(model: ContrastivePerplexity, batch: Any) -> Tensor:
    """The same by `transformers`' own loss, one pass for each sentence."""
    losses = [model.lm(input_ids=row, labels=row, use_cache=False).loss for row in rows_of(batch)]
    return torch.stack(losses).view(batch["input_ids"].shape[:2])


def step_of(
    likelihood: Callable[[ContrastivePerplexity, Any], Tensor], options: dict[str, Any]
) -> Callable[[Any], tuple[float, float]]:
    """Return a training step by the official formula: seconds and loss of a batch."""
    torch.manual_seed(0)
    model = ContrastivePerplexity(**options)
    optimizer = torch.optim.AdamW(model.lm.parameters(), lr=1e-4)

    def step(batch: Any) -> tuple[float, float]:
        started = time.perf_counter()
        l = likelihood(model, batch)  # noqa: E741 - the letter of the equations
        pos, neg, random = model.parts(l, batch)
        loss = official_loss(pos, neg, random, prototype(pos, "batch"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - started, float(loss.detach())

    return step


def measure_time(steps: int, rounds: int) -> dict[str, Any]:
    """Time the three ways in turn, after their first losses have been compared."""
    config = load_layers([CONFIG], []).merged
    data = PerplexitySets(**config["data"]["init_args"])
    facts = {"vocab_size": data.vocab_size, "eos_id": data.eos_id, "pad_id": data.pad_id}
    options = {**config["model"]["init_args"], **facts}
    batches = data.training_batches()
    ways = {"at_once": at_once, "one_by_one": one_by_one, "by_labels": by_labels}
    steps_of = {name: step_of(way, options) for name, way in ways.items()}
    first = {name: step(batches.batch(0, 0))[1] for name, step in steps_of.items()}
    if max(first.values()) - min(first.values()) > 1e-4 * abs(first["at_once"]):
        raise SystemExit(f"the three ways do not compute the same loss: {first}")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        chosen = [batches.batch(0, (1 + number * steps + i) % len(batches)) for i in range(steps)]
        for name, step in steps_of.items():
            times[name].append(1000 * statistics.median(step(batch)[0] for batch in chosen))
    shape = batches.batch(0, 0)["input_ids"].shape
    return {
        "config": CONFIG,
        "sentences_per_step": shape[0] * shape[1],
        "ms_per_step": {name: statistics.median(values) for name, values in times.items()},
        "ratio_of_rounds": {
            name: [slow / fast for fast, slow in zip(times["at_once"], times[name], strict=True)]
            for name in ("one_by_one", "by_labels")
        },
        "first_loss": first,
    }


# Memory


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made and alive, each storage once.

    Attributes:
        peak: Most bytes at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._alive and key not in given:
                    self._alive[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


def meta_model(layers: int) -> Any:
    """The model with adapters of rank 64 on the meta device, all in bfloat16, as autocast computes."""
    with torch.device("meta"):
        spec = {**LLAMA_7B, "num_hidden_layers": layers}
        return build_network(spec, lora_rank=64, gradient_checkpointing=True).to(torch.bfloat16)


def peak_of_step(head_chunk: int, sentence_chunk: int, layers: int) -> int:
    """Bytes beside the weights at the peak of forward and backward pass.

    `sentence_logprobs` without padding: it looks at masks, and on the meta device there are no numbers.
    """
    model = meta_model(layers)

    def logprobs_of(ids: Tensor) -> Tensor:
        # a mask of four dimensions is taken as it is; others are looked at
        mask = torch.ones(len(ids), 1, LENGTH, LENGTH, dtype=torch.bool, device="meta")
        outputs = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden, labels = outputs.last_hidden_state[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        return chunked_logprobs(model.get_output_embeddings(), hidden, labels, head_chunk)

    ids = torch.zeros(ANCHORS * MEMBERS, LENGTH, dtype=torch.int64, device="meta")
    with PeakMemory() as memory:
        if sentence_chunk:
            parts = [checkpoint(logprobs_of, part, use_reentrant=False) for part in ids.split(sentence_chunk)]
            logprobs = torch.cat(parts)  # type: ignore[arg-type]
        else:
            logprobs = logprobs_of(ids)
        logprobs.mean().backward()
    return memory.peak


def peak_of_head(head_chunk: int) -> int:
    """Bytes at the peak of the part after the last hidden states alone, their gradient among them."""
    tokens = ANCHORS * MEMBERS * (LENGTH - 1)
    with torch.device("meta"):
        head = torch.nn.Linear(LLAMA_7B["hidden_size"], LLAMA_7B["vocab_size"], bias=False)  # type: ignore[arg-type]
        head.to(torch.bfloat16).requires_grad_(False)
        hidden = torch.zeros(tokens, head.in_features, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(tokens, dtype=torch.int64)
    with PeakMemory() as memory:
        chunked_logprobs(head, hidden, labels, head_chunk).mean().backward()
    return memory.peak


def weights_by_formula(layers: int) -> dict[str, int]:
    """Bytes of frozen weights in 4 bits (a float32 scale for 64 values; embeddings, head and norms in bfloat16), and of
    adapters in float32 with their gradients and the two moments of AdamW."""
    model = meta_model(layers)
    bits, rest, adapters = 0, 0, 0
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            adapters += parameter.numel()
        elif ".base_layer." in name:
            bits += parameter.numel()
        else:
            rest += parameter.numel()
    return {"frozen": bits // 2 + bits // 64 * 4 + 2 * rest, "adapters_and_optimizer": 16 * adapters}


def measure_memory(head_chunk: int, sentence_chunk: int, layers: int) -> dict[str, Any]:
    """Count peaks with and without chunks, beside what the shapes say."""
    tokens = ANCHORS * MEMBERS * (LENGTH - 1)
    width, vocabulary = LLAMA_7B["hidden_size"], LLAMA_7B["vocab_size"]
    assert isinstance(width, int)
    assert isinstance(vocabulary, int)
    peaks = {
        "all_at_once": peak_of_step(0, 0, layers),
        "logits_in_chunks": peak_of_step(head_chunk, 0, layers),
        "logits_and_sentences_in_chunks": peak_of_step(head_chunk, sentence_chunk, layers),
    }
    weights = weights_by_formula(layers)
    return {
        "model": LLAMA_7B | {"num_hidden_layers": layers},
        "sentences": ANCHORS * MEMBERS,
        "tokens_per_sentence": LENGTH,
        "head_chunk": head_chunk,
        "sentence_chunk": sentence_chunk,
        "peak_bytes_of_the_step": peaks,
        "over_all_at_once": {name: peak / peaks["all_at_once"] for name, peak in peaks.items()},
        "peak_bytes_of_the_head": {"all_logits": peak_of_head(0), "logits_in_chunks": peak_of_head(head_chunk)},
        "weights_bytes_by_formula": weights,
        "step_and_weights_bytes": {name: peak + sum(weights.values()) for name, peak in peaks.items()},
        # logits in bfloat16, in float32, their log-softmax, and the gradients of the first two
        "logits_bytes_by_formula": {name: n * vocabulary * (2 + 4 + 4 + 4 + 2) for name, n in (
            ("all_logits", tokens), ("logits_in_chunks", min(head_chunk, tokens)))},
        "checkpoints_bytes_by_formula": layers * ANCHORS * MEMBERS * LENGTH * width * 2,
    }  # fmt: skip


def main() -> None:
    """Measure, print and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the three ways take turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=512, help="tokens whose logits are held at once")
    parser.add_argument("--sentences", type=int, default=5, help="sentences whose activations are held at once")
    parser.add_argument("--layers", type=int, default=32, help="layers of the model whose memory is counted")
    parser.add_argument("--part", choices=("all", "time", "memory"), default="all", help="what is measured")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder of the files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.part in ("all", "time"):
        times = measure_time(args.steps, args.rounds) | {"threads": args.threads}
        print(json.dumps(times, indent=1))
        what = "time of a contrastive-perplexity step with one forward pass for each of its sentences"
        for name, way, said in (
            ("step", "one_by_one", f"{what}, over ours"),
            ("labels", "by_labels", f"{what} and transformers' labels= loss (official formula), over ours"),
        ):
            ratio = statistics.median(times["ratio_of_rounds"][way])
            file = args.out / f"contrastive_perplexity_{name}.json"
            write_bench(file, comparison(file.stem, said, ratio, "", ">=", 3.0, times))
    if args.part in ("all", "memory"):
        memory = measure_memory(args.chunk, args.sentences, args.layers)
        print(json.dumps(memory, indent=1))
        said = "peak memory of a step at Llama-7B shapes (meta device), sentences and logits in chunks over all at once"
        ratio = memory["over_all_at_once"]["logits_and_sentences_in_chunks"]
        file = args.out / "contrastive_perplexity_memory.json"
        write_bench(file, comparison(file.stem, said, ratio, "", "<=", 0.75, memory))


if __name__ == "__main__":
    main()
