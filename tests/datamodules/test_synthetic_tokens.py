"""Random tokens: shapes, shifted labels, the same for the same seed, other order in another epoch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from datamodules.synthetic_tokens import SyntheticTokens


def make(**changes: Any) -> SyntheticTokens:
    module = SyntheticTokens(**{"vocab_size": 50, "seq_len": 12, "batch_size": 3, "num_batches": 4, **changes})
    module.setup("fit")
    return module


def epoch(module: SyntheticTokens, number: int = 0) -> list[dict[str, torch.Tensor]]:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return list(loader)


def test_batches() -> None:
    batches = epoch(make())
    assert len(batches) == 4
    for batch in batches:
        assert batch["input_ids"].shape == batch["labels"].shape == (3, 12)
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])  # next tokens
    values = torch.cat([batch["input_ids"] for batch in batches])
    assert (int(values.min()), int(values.max())) >= (0, 40)
    assert int(values.max()) < 50


def test_seed_decides_tokens_and_epoch_their_order() -> None:
    a, b, c = epoch(make()), epoch(make()), epoch(make(data_seed=1))
    assert all(torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0]["input_ids"], c[0]["input_ids"])
    later = epoch(make(), 1)
    rows = [sorted(tuple(r.tolist()) for x in batches for r in x["input_ids"]) for batches in (a, later)]
    assert rows[0] == rows[1]
    assert not torch.equal(a[0]["input_ids"], later[0]["input_ids"])


def test_evaluation_data_are_others_and_fixed() -> None:
    module = make(eval_batches=2)
    val, again = list(module.val_dataloader()), list(module.val_dataloader())
    assert len(val) == 2
    assert all(torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(val, again, strict=True))
    seen = {tuple(r.tolist()) for x in epoch(module) for r in x["input_ids"]}
    assert not seen & {tuple(r.tolist()) for x in val for r in x["input_ids"]}
    assert not torch.equal(val[0]["input_ids"], next(iter(module.test_dataloader()))["input_ids"])


@pytest.mark.parametrize("key", ["vocab_size", "seq_len", "batch_size", "num_batches", "eval_batches"])
def test_bad_sizes(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: 0 is not accepted; accepted: 1 or more"):
        SyntheticTokens(**{key: 0})
