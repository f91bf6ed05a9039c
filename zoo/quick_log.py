"""A shortcut in Lightning's `self.log`: what is on the right device already is not moved there again.

Lightning 2.6 walks through all attributes of a logged value at every call (`_ResultMetric.to`), which takes a good part
of a millisecond for each name and step. `tests/test_quick_log.py` fails when the class is not there any more.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.trainer.connectors.logger_connector import result
from torch import Tensor

_move: Any = result._ResultMetric.to
#: Attributes of a logged tensor that hold tensors.
_HELD = ("value", "cumulated_batch_size", "_forward_cache", "_computed")


def _to(self: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and isinstance(args[0], torch.device) and not kwargs:
        held = [getattr(self, name, None) for name in _HELD]
        if isinstance(held[0], Tensor) and all(x.device == args[0] for x in held if isinstance(x, Tensor)):
            return self
    return _move(self, *args, **kwargs)


def install() -> None:
    """Take the shortcut from now on; a second call does nothing."""
    result._ResultMetric.to = _to  # type: ignore[method-assign]
