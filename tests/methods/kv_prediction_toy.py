"""A run of KV prediction on a little text, for what is done with one afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zoo

SHORT: dict[str, Any] = {"trainer.max_steps": 2, "trainer.limit_val_batches": 1, "trainer.enable_model_summary": False}


def fit_on_text(folder: Path) -> Path:
    """Train for two steps on bytes of files in `folder`; returns the run."""
    (folder / "texts").mkdir()
    for i in range(40):
        prose = "\n\n".join(f"Paragraph {i} {j} of a text about foxes and dogs, on and on and on." for j in range(4))
        (folder / "texts" / f"{i}.txt").write_text(prose)
    data = {"corpus": str(folder / "texts"), "tokenizer": "bytes", "prompt_length": 24, "block_size": 32}
    given = {f"data.init_args.{key}": value for key, value in {**data, "batch_size": 4, "val_fraction": 0.2}.items()}
    overrides = {**SHORT, "data.class_path": "text_prompts", **given}
    zoo.run("fit", config="kv_prediction/smoke", overrides=overrides, run_dir=folder / "run", wandb="disabled")
    return folder / "run"
