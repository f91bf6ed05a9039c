"""Sharding a method that knows nothing of it gives what DDP gives."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from callbacks.resume_checkpoint import newest_checkpoint
from tests.callbacks.test_preemption import two_ranks
from tests.callbacks.toy import Toy, resume_callback
from zoo.nn.fsdp2 import FullyShardedStrategy, blocks


class Plain(Toy):
    """The toy without batch norm, dropout and the EMA, which are not the same on shards."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero:
            torch.save(self.state_dict(), Path(self.trainer.default_root_dir) / "export.pt")


def test_two_sharded_ranks_equal_ddp(tmp_path: Path) -> None:
    states = []
    for name, strategy in (
        ("sharded", partial(FullyShardedStrategy, min_parameters=10)),
        ("ddp", partial(DDPStrategy, process_group_backend="gloo")),
    ):
        folder = tmp_path / name
        folder.mkdir()
        assert two_ranks(folder, lambda rank: [resume_callback()], make=Plain, strategy=strategy) == [0, 0]
        found = newest_checkpoint(folder)
        assert found is not None
        states.append(torch.load(found, weights_only=True)["state_dict"])
        exported = torch.load(folder / "export.pt", weights_only=True)
        torch.testing.assert_close(exported, states[-1], rtol=0, atol=0)
    torch.testing.assert_close(states[0], states[1])


def test_blocks_are_the_large_members_inner_first() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(9, 9), nn.ReLU()))
    assert blocks(net, 50) == [net[1][0], net[1]]  # type: ignore[index]


def test_a_holder_of_parts_is_no_block() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Sequential(nn.Linear(9, 9))

    layers = nn.ModuleList([Holder()])
    assert blocks(layers, 50) == [layers[0].parts[0]]  # type: ignore[index,union-attr]
