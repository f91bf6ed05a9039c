"""continue a prompt, token by token, with the time to the first one"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import UsageError

if TYPE_CHECKING:
    from zoo.methods.kv_prediction.module import KVPrediction


def main(argv: list[str]) -> int:
    """Print what the model of a run makes of a prompt; for kv_prediction, with a predicted cache and without."""
    parser = argparse.ArgumentParser(
        prog="zoo generate", description="Continue a prompt with a predicted cache, then with the base's own."
    )
    parser.add_argument("run", type=Path, help="directory of a run of kv_prediction")
    parser.add_argument("prompt", help="the prompt; for data without text, numbers of tokens: '3 1 4'")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0, help="processor threads; 0 leaves the default")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {args.max_new_tokens}", "accepted: 1 or more")
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    model, encoder = load(args.run)
    try:
        ids = encoder.encode([args.prompt])[0] if encoder else [int(word) for word in args.prompt.split()]
    except ValueError as error:
        hint = "this run's data have no text; accepted: numbers of tokens such as '3 1 4'"
        raise UsageError(f"the prompt {args.prompt!r}", hint) from error
    size = model.base.shape.vocab_size
    if any(not 0 <= token < size for token in ids):
        raise UsageError(f"the prompt has tokens {ids}", f"accepted: 0 to {size - 1}")
    prompt = torch.tensor([ids], dtype=torch.int64)
    try:
        model.check_length(prompt, args.max_new_tokens)
        first = {}
        for name in ("predicted cache", "base") if model.predictor is not None else ("base",):
            first[name] = show(model, prompt, args.max_new_tokens, encoder, name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if len(first) == 2:
        ours, theirs = first.values()
        print(f"time to first token: {ours:.1f} ms with a predicted cache, {theirs:.1f} ms without")
    return 0


def show(model: KVPrediction, prompt: Any, count: int, encoder: Any, name: str) -> float:
    """Print the tokens as they come, and the times after them; returns the time to the first token in milliseconds."""
    from zoo.methods.kv_prediction.generation import generate, stream

    generate(model, prompt, 1, name == "base")  # the first call of a process is slower
    print(f"[{name}] ", end="", flush=True)
    tokens: list[int] = []
    shown, times = "", list[float]()
    for step in stream(model, prompt, count, name == "base"):
        tokens.append(int(step.tokens[0]))
        times.append(step.milliseconds)
        text = encoder.decode(tokens) if encoder else " ".join(map(str, tokens))
        if not text.endswith("\ufffd"):  # half a character: the next token completes it
            print(text[len(shown) :], end="", flush=True)
            shown = text
    rate = f", then {1000 * (len(times) - 1) / (times[-1] - times[0]):.0f} tokens a second" if len(times) > 1 else ""
    print(f"\n  TTFT {times[0]:.1f} ms{rate}", flush=True)
    return times[0]


def load(run: Path) -> tuple[KVPrediction, Any]:
    """Return the trained model of a run and the tokenizer of its data; None if they are no text.

    Raises:
        UsageError: If there is no run of kv_prediction.
    """
    import torch

    from callbacks.checkpoint_files import checkpoints_newest_first
    from zoo.methods.kv_prediction.module import KVPrediction

    files = checkpoints_newest_first(run) if run.is_dir() else []
    if not files:
        raise UsageError(f"no run with a checkpoint in {run}", "accepted: the directory that zoo fit printed")
    content = torch.load(files[0], map_location="cpu", weights_only=True)
    stamp = content.get("zoo", {})
    if stamp.get("method") != "kv_prediction":
        raise UsageError(f"{run} is a run of {stamp.get('method')}", "accepted: a run of kv_prediction")
    try:
        # Lightning's own entries begin with an underscore
        model = KVPrediction(**{k: v for k, v in content["hyper_parameters"].items() if not k.startswith("_")})
        model.on_load_checkpoint(content)
        model.load_state_dict(content["state_dict"])
    except ValueError as error:
        raise UsageError(str(error)) from error
    config = stamp["config"]["data"]
    module, _, name = config["class_path"].rpartition(".")
    data = getattr(importlib.import_module(module), name)(**config.get("init_args", {}))
    data.prepare_data()
    data.setup("test")
    return model.eval(), getattr(data, "encoder", None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
