"""Two shortcuts in Lightning's `self.log`, which every logged name and step pays for.

* What is on the right device already is not moved there again. Lightning 2.6 walks through all attributes of a logged
  value at every call (`_ResultMetric.to`), a good part of a millisecond.
* The signature of `training_step` is read once. Lightning inspects it at every call, to find out whether it takes a
  `dataloader_iter`.

`tests/test_quick_log.py` fails when these places are not there any more; a release without them is left as it is.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.core import module
from lightning.pytorch.trainer.connectors.logger_connector import result
from torch import Tensor

_core: Any = module
_metric: Any = getattr(result, "_ResultMetric", None)
_move: Any = getattr(_metric, "to", None)
_inspect: Any = getattr(_core, "is_param_in_hook_signature", None)
#: Attributes of a logged tensor that hold tensors.
_HELD = ("value", "cumulated_batch_size", "_forward_cache", "_computed")
#: Function -> question -> what its signature answers.
_signatures: WeakKeyDictionary[Any, dict[Any, bool]] = WeakKeyDictionary()


def _to(self: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and isinstance(args[0], torch.device) and not kwargs:
        held = [getattr(self, name, None) for name in _HELD]
        if isinstance(held[0], Tensor) and all(x.device == args[0] for x in held if isinstance(x, Tensor)):
            return self
    return _move(self, *args, **kwargs)


def _has_parameter(hook_fx: Any, param: str, explicit: bool = False, min_args: int | None = None) -> bool:
    try:
        answers = _signatures.setdefault(getattr(hook_fx, "__func__", hook_fx), {})
    except TypeError:  # a callable that cannot be referenced weakly
        return bool(_inspect(hook_fx, param, explicit, min_args))
    question = (param, explicit, min_args)
    if question not in answers:
        answers[question] = _inspect(hook_fx, param, explicit, min_args)
    return answers[question]


def install() -> None:
    """Take the shortcuts from now on; a second call does nothing."""
    if _move is not None:
        _metric.to = _to
    if _inspect is not None:
        _core.is_param_in_hook_signature = _has_parameter
