"""turn a dense language model, or a run of dynamoe, into a model directory with a width for each token"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import UsageError

if TYPE_CHECKING:
    from zoo.methods.dynamoe.module import DynaMoE

DESCRIPTION = """\
SOURCE is a run directory or checkpoint of the method dynamoe: its model is written as it is. Or it is a model of
transformers, a folder or a name on the hub: its neurons are sorted by importance and routers are trained for a moment;
its other weights stay as they are. OUT is a model directory of transformers: any program loads the dense model, and
zoo.methods.dynamoe.export.load the one that chooses widths. The tokenizer is written beside it: the model's, the one
that the run's data had, or --tokenizer.
"""


def main(argv: list[str]) -> int:
    """Write the directory."""
    parser = argparse.ArgumentParser(prog="zoo moefy", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("source", metavar="SOURCE", help="run directory, checkpoint, model folder or name")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not be there")
    width = parser.add_mutually_exclusive_group()
    width.add_argument("--theta", type=float, help="threshold that is stored (default: that of the run, or 0.75)")
    width.add_argument("--activity", type=float, help="choose the threshold that has this activity on the corpus")
    parser.add_argument("--corpus", default="python", help="text, as in the data `text` (default: python)")
    parser.add_argument("--tokenizer", help="of the text, as in the data `text` (default: the model's or run's own)")
    new = parser.add_argument_group("of a model that has no routers yet")
    new.add_argument("--experts", type=int, default=4, help="nested experts of each MLP (default: 4)")
    new.add_argument("--similarity", default="inner", help="inner, cosine or relerr (default: inner)")
    new.add_argument("--router-units", type=int, default=128, help="hidden units of a router (default: 128)")
    new.add_argument("--router-steps", type=int, default=200, help="steps of the routers' training (default: 200)")
    new.add_argument("--router-lr", type=float, default=3e-3, help="its learning rate (default: 0.003)")
    new.add_argument("--length", type=int, default=256, help="tokens of a sequence (default: 256)")
    new.add_argument("--batch-size", type=int, default=8, help="sequences of a step (default: 8)")
    new.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UsageError(f"moefy: {args.out} is there already", "choose another folder")
    for option, value, good in (
        ("theta", args.theta, args.theta is None or 0 <= args.theta <= 1),
        ("activity", args.activity, args.activity is None or 0 < args.activity <= 1),
        ("router-steps", args.router_steps, args.router_steps >= 1),
        ("experts", args.experts, args.experts >= 1),
    ):
        if not good:
            accepted = "0 to 1" if option in ("theta", "activity") else "1 or more"
            raise UsageError(f"--{option} {value} is not accepted", f"accepted: {accepted}")
    try:
        return moefy(args)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"moefy: {error}") from error


def moefy(args: argparse.Namespace) -> int:
    """Make the model and write it."""
    from zoo.methods.dynamoe.export import calibrate, mean_activity, save
    from zoo.methods.dynamoe.routes import ByRouter

    checkpoint = find_checkpoint(args.source)
    if checkpoint is None and not args.source.startswith((".", "/", "~")) and not Path(args.source).exists():
        print(f"no file, run or model at {args.source}: looking for a model of that name on the hub", flush=True)
    method, config = (train(args), None) if checkpoint is None else read(checkpoint)
    model = method.lm.eval()
    hp = {name: method.hparams[name] for name in ("head", "router_units", "similarity", "theta", "tau")}
    knob = "theta" if hp["head"] == "score" else "tau"
    if args.theta is not None:
        hp[knob] = args.theta
    if args.activity is not None:
        if config is None or args.tokenizer is not None:
            data = text(args, args.source if checkpoint is None else None)
        else:
            data = data_of(config)
        data.prepare_data()
        data.setup("validate")
        batches = [data.val_dataloader().dataset[0, 0]]
        hp[knob] = calibrate(lambda value: mean_activity(model, batches, ByRouter(hp["head"], value)), args.activity)
    save(model, args.out, hp)
    print(f"written: {args.out}  ({knob} {hp[knob]})")
    try:
        save_tokenizer(args, checkpoint, config)
    except (ValueError, FileNotFoundError) as error:  # the model is of use without it
        print(f"  no tokenizer is written: {error}")
    print("  dense:   transformers.AutoModelForCausalLM.from_pretrained(...)")
    print("  dynamic: zoo.methods.dynamoe.export.load(...)")
    return 0


def find_checkpoint(source: str) -> Path | None:
    """Return the checkpoint that is meant: a file, or the newest of a run directory; None for a model.

    Raises:
        UsageError: If the run has none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not (path / "run.json").is_file():
        return None
    from callbacks.checkpoint_files import checkpoints_newest_first

    found = checkpoints_newest_first(path)
    if not found:
        raise UsageError(f"moefy: the run {path} has no checkpoint")
    return found[0]


def save_tokenizer(args: argparse.Namespace, checkpoint: Path | None, config: Any) -> None:
    """Write the tokenizer that belongs to the model, as one of `transformers`.

    Args:
        args: Of the command.
        checkpoint: None for a model that had no routers.
        config: Data of the run, if they are known.

    Raises:
        ValueError: If it cannot be known, or is none of `tokenizers`.
        FileNotFoundError: If the corpus that it was trained on is not here.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from datamodules.text import BPETokenizer, Text

    named = args.tokenizer or (args.source if checkpoint is None else None)
    if named is not None and named not in ("bytes", "bpe") and not named.endswith(".json"):
        AutoTokenizer.from_pretrained(named, trust_remote_code=False).save_pretrained(args.out)
        return
    encoder: Any = BPETokenizer.load(named) if named is not None and named.endswith(".json") else None
    if named is None:
        assert checkpoint is not None
        data = None if config is None else data_of(config)
        text = getattr(data, "text", data)
        if not isinstance(text, Text):
            raise ValueError("the checkpoint does not say which one its data had; --tokenizer names it")
        text.prepare_data()
        text.setup("test")
        trained_on, here = checkpoint.parent.parent / "corpus.json", text._cached() / "corpus.json"
        # a tokenizer that is trained on the corpus is another one as soon as the corpus is
        if text.tokenizer == "bpe" and trained_on.is_file() and _hash(trained_on) != _hash(here):
            raise ValueError("the corpus of the run has changed, and its tokenizer with it; --tokenizer names it")
        encoder = text.encoder
    if not isinstance(encoder, BPETokenizer):
        raise ValueError("bytes are no tokenizer of transformers")
    eos = encoder.inner.id_to_token(encoder.eos_id)
    PreTrainedTokenizerFast(tokenizer_object=encoder.inner, eos_token=eos).save_pretrained(args.out)


def _hash(corpus: Path) -> str:
    return str(json.loads(corpus.read_text("utf-8"))["hash"])


def data_of(config: Mapping[str, Any]) -> Any:
    """Build the data that a config names."""
    from lightning.pytorch import LightningDataModule

    from zoo.checks import import_class

    return import_class(config["class_path"], "data", LightningDataModule)(**config.get("init_args", {}))


def read(checkpoint: Path) -> tuple[DynaMoE, Any]:
    """Build the method of a checkpoint; its data's config comes with it, or None.

    Raises:
        UsageError: If it is of another method, or has no routers.
    """
    import torch

    from zoo.methods.dynamoe.module import DynaMoE

    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    hp = content.get("hyper_parameters", {})
    if "router_units" not in hp or hp.get("objective") != "dynamoe":
        raise UsageError(f"moefy: {checkpoint} has no routers", "accepted: a run of dynamoe with objective dynamoe")
    method = DynaMoE(**{name: value for name, value in hp.items() if not name.startswith("_")})
    method.load_state_dict(content["state_dict"])
    return method, content.get("zoo", {}).get("config", {}).get("data")


def text(args: argparse.Namespace, model: str | None) -> Any:
    """Text in the model's tokens.

    Raises:
        UsageError: If it is not known which these are.
    """
    from datamodules.text import Text

    tokenizer = args.tokenizer or model
    if tokenizer is None:
        raise UsageError("moefy: the tokenizer of the run is not known", "--tokenizer says which one")
    return Text(args.corpus, tokenizer, block_size=args.length, batch_size=args.batch_size, data_seed=args.seed)


def train(args: argparse.Namespace) -> DynaMoE:
    """Sort the neurons of a dense model and train routers for it."""
    import torch
    from lightning.pytorch import Trainer

    from zoo.methods.dynamoe.module import DynaMoE

    torch.manual_seed(args.seed)
    data = text(args, args.source)
    method = DynaMoE(
        args.source,
        experts=args.experts,
        similarity=args.similarity,
        router_units=args.router_units,
        router_lr=args.router_lr,
        freeze_backbone=True,
        unrouted_fraction=0.0,
        warmup_steps=min(10, args.router_steps // 4),
        vocab_size=data.vocab_size,
    )
    with tempfile.TemporaryDirectory() as folder:  # what the data write about themselves is of no use here
        trainer = Trainer(
            max_steps=args.router_steps,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(method, data)
    return method
