"""Time to the first token and of decoding: the base, a predicted cache, the auxiliary alone, and `transformers`.

All in one run, in turn, on random weights: times do not depend on what was learned. The base is a Llama that
`transformers` made; ours has its weights, and the logits are compared before anything is measured.

    python benchmarks/kv_prediction_ttft.py [--rounds 5] [--threads 1] [--out results/bench]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.bench.report import comparison, write_bench
from zoo.methods.kv_prediction import prefill
from zoo.methods.kv_prediction.flops import kvp_flops, prefill_flops
from zoo.methods.kv_prediction.generation import decode
from zoo.methods.kv_prediction.losses import canonical_map
from zoo.methods.kv_prediction.models import from_transformers
from zoo.methods.kv_prediction.networks import CausalLM, KVPredictor
from zoo.nn.lm import build_lm

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
AUXILIARY: dict[str, Any] = {
    **BASE,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
#: Batch and prompt: the paper's main table, its second plot.
SHAPES = [(64, 59), (8, 128), (8, 256), (8, 512), (2, 1024)]
DECODED = 32


def seconds(call: Callable[[], Any], threads: int) -> float:
    """Seconds of a call; with one thread those of the processor, so that other processes do not count."""
    clock = time.process_time if threads == 1 else time.perf_counter
    started = clock()
    call()
    return clock() - started


def fastest(calls: dict[str, Callable[[], Any]], rounds: int, threads: int) -> dict[str, float]:
    """Milliseconds of the fastest of some rounds, after one that does not count; the calls take turns."""
    best: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, call in list(calls.items())[:: 1 if number % 2 else -1]:
            spent = 1000 * seconds(call, threads)
            if number:
                best[name] = min(spent, best.get(name, spent))
    return best


class Ways:
    """The ways to a first token and on from there.

    Args:
        theirs: The base of `transformers`.
        base: Ours, with the same weights.
        auxiliary: The small model.
        predictor: The maps.
    """

    def __init__(self, theirs: Any, base: CausalLM, auxiliary: CausalLM, predictor: KVPredictor) -> None:
        self.theirs, self.base, self.auxiliary, self.predictor = theirs, base, auxiliary, predictor

    def first_token(self, prompt: Tensor) -> dict[str, Callable[[], Any]]:
        """Calls that end with a first token."""
        return {
            "base": lambda: prefill.full(self.base, prompt, 1),
            "predicted": lambda: prefill.predicted(self.base, self.auxiliary, self.predictor, prompt, 1),
            "auxiliary": lambda: prefill.full(self.auxiliary, prompt, 1),
            "transformers": lambda: self.theirs(prompt, use_cache=True, logits_to_keep=1),
        }

    def decoding(self, prompt: Tensor) -> dict[str, float]:
        """Seconds of the processor for tokens after the first, by way; prefill is not counted."""
        found = {}
        starts = {
            "base": prefill.full(self.base, prompt, DECODED),
            "predicted": prefill.predicted(self.base, self.auxiliary, self.predictor, prompt, DECODED),
        }
        for name, start in starts.items():
            found[name] = seconds(lambda start=start: list(decode(self.base, start, DECODED)), 1)  # type: ignore[misc]
        output = self.theirs(prompt, use_cache=True, logits_to_keep=1)
        found["transformers"] = seconds(lambda: self._their_decoding(output), 1)
        return found

    def _their_decoding(self, output: Any) -> None:
        for _ in range(DECODED - 1):
            token = output.logits[:, -1:].argmax(-1)
            output = self.theirs(token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)


def make() -> Ways:
    """Build the models and check that ours has the logits of theirs."""
    torch.manual_seed(0)
    theirs = build_lm(BASE)
    base, auxiliary = from_transformers(theirs).eval(), from_transformers(build_lm(AUXILIARY)).eval()
    ids = torch.randint(BASE["vocab_size"], (2, 64))
    torch.testing.assert_close(base.logits(base(ids)[0]), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    layer_map = canonical_map(auxiliary.shape.depth, base.shape.depth)
    return Ways(theirs, base, auxiliary, KVPredictor(auxiliary.shape, base.shape, layer_map))


@torch.no_grad()
def main() -> None:
    """Measure, print and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ways = make()
    rows: list[dict[str, Any]] = []
    for batch, tokens in SHAPES:
        prompt = torch.randint(4096, (batch, tokens))
        ms = fastest(ways.first_token(prompt), args.rounds, args.threads)
        cost = kvp_flops(ways.auxiliary.shape, ways.base.shape, ways.predictor.layer_map, tokens)
        flops_ratio = prefill_flops(ways.base.shape, tokens) / cost
        rows.append({"batch": batch, "prompt": tokens, "ttft_ms": ms, "flops_ratio": flops_ratio})
        rows[-1]["time_ratio"] = ms["base"] / ms["predicted"]
        print(json.dumps(rows[-1]))
    decoded = [ways.decoding(torch.randint(4096, (8, 128))) for _ in range(args.rounds + 1)][1:]
    best = {name: 1000 * min(found[name] for found in decoded) / (DECODED - 1) for name in decoded[0]}
    print(json.dumps(best))
    details = {"shapes": rows, "decode_ms_per_token": best, "threads": args.threads, "models": [BASE, AUXILIARY]}
    first, token = "time to the first token", "time of a decoded token"
    ttft: list[dict[str, float]] = [row["ttft_ms"] for row in rows]
    saved = min(row["time_ratio"] / row["flops_ratio"] for row in rows)
    over_auxiliary = max(ms["predicted"] / ms["auxiliary"] for ms in ttft)
    over_base = best["predicted"] / best["base"]
    results: list[tuple[str, str, float, str, float]] = [
        ("ttft", f"speed-up of the {first} over that in operations, worst shape", saved, ">=", 0.6),
        ("auxiliary", f"{first} with a predicted cache over the auxiliary's, worst shape", over_auxiliary, "<=", 1.35),
        (
            "prefill",
            f"{first} of transformers' Llama over our base's, worst shape",
            min(ms["transformers"] / ms["base"] for ms in ttft),
            ">=",
            1.0,
        ),
        ("decode", f"{token} of transformers' Llama over our base's", best["transformers"] / best["base"], ">=", 1.0),
        ("decode_predicted", f"{token} after a predicted cache over the base's", over_base, "<=", 1.05),
    ]
    for name, what, value, relation, limit in results:
        content = comparison(f"kv_prediction_{name}", what, value, "", relation, limit, details)
        write_bench(args.out / f"kv_prediction_{name}.json", content)


if __name__ == "__main__":
    main()
