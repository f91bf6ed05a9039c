"""A training step of AIMv2 against the same model with dense additive masks and separate passes for image and text.

    python benchmarks/aimv2_step.py [--config aimv2/gpu] [--batch 8] [--rounds 9] [--threads 1] [--device cpu]
    python benchmarks/aimv2_step.py --config aimv2/pretrain_large --batch 64 --device cuda

The slow way is what a straightforward implementation does: float masks of minus infinity in encoder and decoder, one
pass of the decoder for the patches and another one, over image and caption, for the tokens. Weights, batch, optimiser
and losses are the same, and the two losses are compared before anything is timed. Batches are random numbers: loading
data is left out. Both ways take turns; the fastest step of each counts, as what makes a step slower comes from outside.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.bench.report import comparison, write_bench
from zoo.config import load_layers
from zoo.methods.aimv2.decoder import Decoder
from zoo.methods.aimv2.encoder import Trunk
from zoo.methods.aimv2.losses import prefix_mask
from zoo.methods.aimv2.module import AIMv2

#: What the datamodules of the configs tell the model.
FACTS: dict[str, dict[str, int]] = {
    "aimv2/gpu": {"vocab_size": 39, "pad_id": 0, "eos_id": 1, "context_length": 16, "in_channels": 1, "image_size": 28},
    "aimv2/pretrain_large": {"vocab_size": 32000, "pad_id": 1, "eos_id": 1, "context_length": 77},
}


def additive(allowed: Tensor) -> Tensor:
    """A mask of zeros and minus infinities."""
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, -math.inf)


def dense_causal(batch: int, count: int, device: torch.device) -> Tensor:
    """The causal mask as float `[B, N, N]`."""
    return additive(torch.ones(count, count, dtype=torch.bool, device=device).tril()).expand(batch, -1, -1)


def decode(decoder: Decoder, x: Tensor) -> Tensor:
    """One pass of the decoder under a dense mask."""
    mask = dense_causal(len(x), x.shape[1], x.device)
    for block in decoder.blocks:
        x = block(x, mask.to(x.dtype))
    return decoder.norm(x)


class Plain(AIMv2):
    """AIMv2 with dense additive masks and a pass of the decoder for each modality."""

    def encode(self, images: Tensor, prefix_len: Tensor, grid: Tensor | None = None) -> Tensor:
        trunk: Trunk = self.trunk
        x = trunk.embed(images)
        mask = additive(prefix_mask(prefix_len, x.shape[1]))
        for block in trunk.blocks:
            x = block(x, mask.to(x.dtype))
        return trunk.norm(x)

    def errors(self, batch: dict[str, Tensor], prefix_len: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        decoder: Any = self.decoder
        plain = decoder.forward

        def separate(features: Tensor, text: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
            image = decoder.project(features)
            pixels = decoder.pixel_head(decode(decoder, image))
            both = torch.cat([image, decoder.text_tokens(text[:, :-1])], dim=1)
            return pixels, decoder.text_head(decode(decoder, both)[:, image.shape[1] :])

        decoder.forward = separate
        try:
            return super().errors(batch, prefix_len)
        finally:
            decoder.forward = plain


def make_batch(facts: dict[str, int], size: int, device: str) -> dict[str, Tensor]:
    """Random images and captions of random lengths."""
    generator = torch.Generator().manual_seed(0)
    side, channels, length = facts.get("image_size", 224), facts.get("in_channels", 3), facts["context_length"]
    text = torch.randint(2, facts["vocab_size"], (size, length), generator=generator)
    ends = torch.randint(length // 3, length, (size, 1), generator=generator)
    ends[0] = length - 1
    text = torch.where(torch.arange(length) < ends, text, facts["pad_id"]).scatter(1, ends, facts["eos_id"])
    image = torch.randn(size, channels, side, side, generator=generator)
    return {"image": image.to(device), "text": text.to(device)}


def make_model(cls: type[AIMv2], options: dict[str, Any], device: str) -> AIMv2:
    """Return a model with the same weights for each class."""
    torch.manual_seed(0)
    return cls(**options).to(device)


def make_step(model: AIMv2, batch: dict[str, Tensor], device: str) -> Callable[[], Tensor]:
    """Return a training step that gives its loss."""
    model.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    half = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def step() -> Tensor:
        torch.manual_seed(1)  # the same prefix lengths for both
        with half:
            loss = model.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def seconds(step: Callable[[], Any], device: str) -> float:
    """Time one step: the processor's time on a processor, the clock on the wall on a GPU."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    started = clock()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", choices=sorted(FACTS), default="aimv2/gpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9, help="steps of each; both ways take turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = FACTS[args.config]
    options = {**load_layers([args.config], []).merged["model"]["init_args"], **facts}
    batch = make_batch(facts, args.batch, args.device)
    steps = {
        "ours": make_step(make_model(AIMv2, options, args.device), batch, args.device),
        "plain": make_step(make_model(Plain, options, args.device), batch, args.device),
    }
    losses = {name: float(step()) for name, step in steps.items()}
    if abs(losses["ours"] - losses["plain"]) > (1e-2 if args.device == "cuda" else 1e-4):
        raise SystemExit(f"the two ways do not compute the same loss: {losses}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, args.device))
    with FlopCounterMode(display=False) as counter:
        steps["ours"]()
    best = {name: min(values) for name, values in times.items()}
    flops = counter.get_total_flops()
    details: dict[str, Any] = {
        "config": args.config,
        "batch": args.batch,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": args.threads,
        "ms_per_step": {name: 1000 * value for name, value in best.items()},
        "tflop_per_step": flops / 1e12,
        "loss": losses,
    }
    if args.device == "cuda":
        details["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps(details, indent=1))
    name = "aimv2_step" if args.device == "cpu" else "aimv2_step_gpu"
    what = "time of an AIMv2 step with dense additive masks and separate passes for image and text, over ours"
    content = comparison(name, what, best["plain"] / best["ours"], "", ">=", 1.0, details)
    write_bench(args.out or Path(f"results/bench/{name}.json"), content)


if __name__ == "__main__":
    main()
