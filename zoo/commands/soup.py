"""average checkpoints or model folders into one model"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from zoo.errors import UsageError

DESCRIPTION = """\
Average the weights of models that were fine-tuned from one model: checkpoints of sft, reward_model or salsa (.ckpt),
folders of transformers or .safetensors files, or folders of LoRA adapters of peft. Files are averaged a piece at a
time, so that the memory does not grow with the model. The result is a model as any other, e.g. a reference of RLHF.
"""
#: Of a model folder, what is not weights, nor written here.
SKIPPED = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def main(argv: list[str]) -> int:
    """Write the average of the members to a folder."""
    parser = argparse.ArgumentParser(prog="zoo soup", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "members", nargs="+", type=Path, metavar="MEMBER", help="checkpoint, folder or .safetensors file"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write, which is not there yet"
    )
    parser.add_argument("--alpha", type=float, help="of two members the weight of the second (default: 0.5)")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="weight of each member; they sum to 1")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise UsageError(f"--out {args.out}: is there already", "choose another folder")
    from zoo.methods.salsa.soup import soup_weights

    scratch = args.out.with_name(args.out.name + ".part")
    try:
        weights = soup_weights(len(args.members), args.alpha, args.weights)
        scratch.mkdir(parents=True)
        make(args.members, weights, scratch)
    except ValueError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise UsageError(str(error)) from error
    except FileExistsError as error:
        raise UsageError(f"{scratch}: is left of another call", "remove it") from error
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    about = {"members": [str(member) for member in args.members], "weights": weights}
    (scratch / "soup.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    scratch.rename(args.out)
    print(f"written: {args.out}")
    return 0


def make(members: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Write the average into the folder `out`.

    Raises:
        ValueError: If the members do not fit together or cannot be read.
    """
    if all((member / ADAPTER).is_file() for member in members):
        adapters(members, weights, out)
        return
    from zoo.methods.salsa.networks import lm_state, load_lm
    from zoo.methods.salsa.soup import Member, file_member, memory_member, write_soup

    same_kind([member for member in members if member.suffix == ".ckpt"])
    opened: list[Member] = []
    for number, member in enumerate(members):
        if member.suffix == ".ckpt":
            model, base = load_lm(str(member))
            opened.append(memory_member(str(member), lm_state(model), base))
            if number == 0:
                model.config.save_pretrained(out)
        else:
            opened.append(file_member(member))
    write_soup(opened, weights, out / "model.safetensors")
    if members[0].is_dir():
        for file in members[0].iterdir():
            if file.is_file() and not file.name.endswith(SKIPPED):
                shutil.copy(file, out / file.name)


def same_kind(checkpoints: Sequence[Path]) -> None:
    """Require that either all checkpoints are of reward models or none is.

    Raises:
        ValueError: If not, naming one of each; or if one cannot be read.
    """
    from zoo.methods.salsa.networks import read_checkpoint

    kinds = {path: read_checkpoint(path.expanduser()).get("zoo", {}).get("method", "") for path in checkpoints}
    rewards = [path for path, kind in kinds.items() if kind == "reward_model"]
    others = [path for path in checkpoints if path not in rewards]
    if rewards and others:
        raise ValueError(
            f"{rewards[0]} is a reward model and {others[0]} is not ({kinds[others[0]] or 'unknown method'}): "
            "a soup is made of models of one kind"
        )


def adapters(members: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Average folders of LoRA adapters; the rank of the result is the sum of the ranks.

    Raises:
        ValueError: If they do not fit together.
    """
    from safetensors.torch import load_file, save_file

    from zoo.methods.salsa.soup import adapter_soup

    read = [
        (load_file(member / ADAPTER), json.loads((member / ADAPTER_CONFIG).read_text("utf-8"))) for member in members
    ]
    tensors, config = adapter_soup(read, weights)
    save_file(tensors, out / ADAPTER, {"format": "pt"})
    (out / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
