"""Write what was learned in the form of transformers: `Aimv2VisionModel`, or `Aimv2Model` for LiT.

python -m zoo.methods.aimv2.export runs/.../checkpoints/step=N.ckpt FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zoo.methods.aimv2.encoder import Trunk
from zoo.methods.aimv2.module import AIMv2
from zoo.methods.aimv2.towers import Towers
from zoo.methods.aimv2.weights import export_trunk, lit_to_transformers, vision_config


def text_config(towers: Towers) -> dict[str, Any]:
    """Values of the `Aimv2TextConfig` that fits a text tower."""
    tower = towers.text
    block: Any = tower.blocks[0]
    return {
        "vocab_size": tower.embedding.num_embeddings,
        "hidden_size": tower.embedding.embedding_dim,
        "intermediate_size": block.ffn.gate.out_features,
        "num_hidden_layers": len(tower.blocks),
        "num_attention_heads": block.attention.heads,
        "max_position_embeddings": len(tower.positions),
        "eos_token_id": tower.eos_id,
    }


def export_lit(trunk: Trunk, towers: Towers, folder: str | Path) -> None:
    """Write trunk and towers of LiT as a folder that `Aimv2Model.from_pretrained` reads.

    Raises:
        ValueError: If the image tower has no attention pool, as after `objective: clip`.
    """
    from transformers import Aimv2Config, Aimv2Model

    if towers.pool is None:
        raise ValueError("objective: 'clip' pools by a mean, which Aimv2Model has not; accepted: lit")
    config = Aimv2Config(
        text_config=text_config(towers),
        vision_config=vision_config(trunk, use_head=True),
        projection_dim=towers.image_projection.out_features,
    )
    model = Aimv2Model(config)
    model.load_state_dict(lit_to_transformers(trunk, towers))
    model.save_pretrained(folder)


def export(checkpoint: str | Path, folder: str | Path) -> str:
    """Write a checkpoint of `aimv2` as a folder of transformers and return the name of the class that reads it.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"no checkpoint at {checkpoint}")
    model = AIMv2.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    if model.hparams["objective"] == "lit":
        assert model.towers is not None
        export_lit(model.trunk, model.towers, folder)
        return "Aimv2Model"
    export_trunk(model.trunk, folder)
    return "Aimv2VisionModel"


def main(words: list[str] | None = None) -> None:
    """Read the command line and export."""
    parser = argparse.ArgumentParser(description="Write a checkpoint of aimv2 as a folder of transformers.")
    parser.add_argument("checkpoint", help="checkpoint of a run of aimv2")
    parser.add_argument("folder", help="folder to write")
    args = parser.parse_args(words)
    print(f"{args.folder}: read it with transformers.{export(args.checkpoint, args.folder)}.from_pretrained")


if __name__ == "__main__":
    main()
