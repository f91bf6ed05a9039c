"""write the features that a SimSiam run gives to the test images"""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo import UsageError


def main(argv: list[str]) -> int:
    """`zoo simsiam-features RUN`: write `features.pt` into the run directory."""
    parser = argparse.ArgumentParser(prog="zoo simsiam-features", description="Features of the test images.")
    parser.add_argument("run", type=Path, help="directory of a SimSiam run")
    args = parser.parse_args(argv)
    if not (args.run / "config.yaml").is_file():
        raise UsageError(f"{args.run} holds no run", "give the directory that `zoo fit` printed")

    import torch

    import zoo

    result = zoo.run("predict", resume=args.run)
    features = torch.cat(result.trainer.predict_loop.predictions)
    torch.save(features, args.run / "features.pt")
    print(f"wrote {args.run / 'features.pt'}: {tuple(features.shape)}")
    return 0
