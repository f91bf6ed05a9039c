"""Tokens a second of the sampler that draws answers, against `generate` of transformers; the same distribution.

Both draw answers of the same length to the same prompts from the same model, in turn, in one run. That they draw from
one distribution is tested by chi-square on the first two tokens of many answers to one prompt.

    python benchmarks/salsa_sampler.py [--rounds 7] [--threads 1] [--out results/bench/salsa_sampler.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.stats import chi2_contingency
from torch import Tensor

from datamodules.reviews import Reviews
from zoo.bench.report import comparison, write_bench
from zoo.config import load_layers
from zoo.methods.salsa.generation import InProcess, Sampling
from zoo.nn.lm import build_lm

CONFIG = "salsa/reviews"
#: Prompts of a batch and tokens of an answer.
BATCH, LENGTH = 128, 32


def first_two(tokens: Tensor, vocab_size: int) -> Tensor:
    """Counts of the first two tokens of answers as one number."""
    return torch.bincount(tokens[:, 0] * vocab_size + tokens[:, 1], minlength=vocab_size**2)


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds; both take turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/bench/salsa_sampler.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = load_layers([CONFIG], []).merged
    data = Reviews()
    lm = {**config["model"]["init_args"]["lm"], "max_position_embeddings": 64, "initializer_range": 0.3}
    model = build_lm(lm, data.vocab_size)
    vocab_size = data.vocab_size
    batch: Any = data.held_out_batches("test").batch(0, 0)
    ids, mask = batch["prompt_ids"][:BATCH], batch["prompt_mask"][:BATCH]
    no_end = vocab_size  # no token has this number: answers are of full length

    def ours(ids: Tensor, mask: Tensor, length: int, seed: int) -> Tensor:
        engine = InProcess(Sampling(length, 1.0, no_end, data.pad_id))
        engine.sync(model)
        return engine(ids, mask, torch.arange(len(ids)), seed)[0]

    def theirs(ids: Tensor, mask: Tensor, length: int, seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            found = model.generate(
                ids, attention_mask=mask.long(), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                max_new_tokens=length, min_new_tokens=length, pad_token_id=data.pad_id, eos_token_id=None,
            )  # fmt: skip
        return found[:, ids.shape[1] :]

    ways: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {"ours": ours, "transformers": theirs}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name, way in ways.items():
            started = time.process_time()
            drawn = way(ids, mask, LENGTH, number)
            if number:  # the first warms up
                rates[name].append(drawn.numel() / (time.process_time() - started))
    many = 20_000
    one, one_mask = ids[:1].expand(many, -1), mask[:1].expand(many, -1)
    counts = torch.stack([first_two(way(one, one_mask, 2, 99), vocab_size) for way in ways.values()])
    rare = counts.sum(dim=0) < 20
    table = torch.cat([counts[:, ~rare], counts[:, rare].sum(dim=1, keepdim=True)], dim=1)
    p_value = float(chi2_contingency(table[:, table.sum(dim=0) > 0].numpy()).pvalue)
    ratios = [a / b for a, b in zip(rates["ours"], rates["transformers"], strict=True)]
    details = {
        "config": CONFIG,
        "batch": BATCH,
        "length": LENGTH,
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "clock": "processor time",
        "ratio_of_rounds": ratios,
        "chi_square_p": p_value,
        "threads": args.threads,
    }
    print(json.dumps(details, indent=1))
    what = "tokens a second of the sampler of answers over those of transformers' generate, the same distribution"
    write_bench(args.out, comparison("salsa_sampler", what, statistics.median(ratios), "", ">=", 1.5, details))


if __name__ == "__main__":
    main()
