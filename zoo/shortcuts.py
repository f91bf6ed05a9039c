"""Shortcuts through what Lightning does around every step: the same calls and the same numbers, in less time.

Networks of a few milliseconds feel what Lightning 2.6 spends on its own dispatch (`benchmarks/step_overhead.py`).

* A value that is logged again, by the same hook with the same arguments, is stored at once. `self.log` otherwise checks
  name, value, hook and arguments anew and walks through all attributes of the stored metric.
* What is on the right device already is not moved there again (`_ResultMetric.to`).
* A callback is called for the hooks that it has, and a module for those; calls of empty methods are left out.
* The signature of a step function is read once. Lightning inspects it at every call.

A profiler (`--trainer.profiler simple`) sees every call: then hooks go the long way. `tests/test_shortcuts.py` fails
when these places are not there any more; a release without them is left as it is.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.core import module
from lightning.pytorch.loops import training_epoch_loop
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector import result
from torch import Tensor

_call: Any = call
_core: Any = module
_steps: Any = training_epoch_loop
_metric: Any = getattr(result, "_ResultMetric", None)
_move: Any = getattr(_metric, "to", None)
_log: Any = LightningModule.log
_inspect: Any = getattr(_core, "is_param_in_hook_signature", None)
_callbacks: Any = getattr(_call, "_call_callback_hooks", None)
_module_hook: Any = getattr(_call, "_call_lightning_module_hook", None)
#: Attributes of a logged tensor that hold tensors.
_HELD = ("value", "cumulated_batch_size", "_forward_cache", "_computed")
#: Hooks around a step that do nothing in `LightningModule`.
_EMPTY = (
    "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_validation_batch_start", "on_validation_batch_end",
)  # fmt: skip
#: Function -> question -> what its signature answers.
_signatures: WeakKeyDictionary[Any, dict[Any, bool]] = WeakKeyDictionary()


def _has(owner: Any, base: type, hook: str) -> bool:
    """Whether an object has a hook of its own, by class or by assignment."""
    return hook in owner.__dict__ or getattr(type(owner), hook, None) is not getattr(base, hook, None)


def _call_callbacks(
    trainer: Any, hook_name: str, *args: Any, monitoring_callbacks: bool | None = None, **kwargs: Any
) -> None:
    if type(trainer.profiler) is not PassThroughProfiler:
        _callbacks(trainer, hook_name, *args, monitoring_callbacks=monitoring_callbacks, **kwargs)
        return
    having = [callback for callback in trainer.callbacks if _has(callback, Callback, hook_name)]
    if monitoring_callbacks is not None:
        having = [c for c in having if isinstance(c, (EarlyStopping, Checkpoint)) is monitoring_callbacks]
    if not having:
        return
    pl_module = trainer.lightning_module
    state = {} if pl_module is None else pl_module.__dict__
    outer = state.get("_current_fx_name")
    state["_current_fx_name"] = hook_name
    for callback in having:
        function = getattr(callback, hook_name)
        if callable(function):
            function(trainer, trainer.lightning_module, *args, **kwargs)
    state["_current_fx_name"] = outer


def _call_module(trainer: Any, hook_name: str, *args: Any, pl_module: Any = None, **kwargs: Any) -> Any:
    if hook_name in _EMPTY and type(trainer.profiler) is PassThroughProfiler:
        owner = pl_module or trainer.lightning_module
        if owner is not None and not _has(owner, LightningModule, hook_name):
            return None
    return _module_hook(trainer, hook_name, *args, pl_module=pl_module, **kwargs)


def _log_again(self: Any, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
    """Lightning's `self.log`; the short way for a scalar of a step that was logged before in the same manner."""
    if torch.compiler.is_compiling():  # Lightning's own way is made for being traced
        _log(self, name, value, *args, **kwargs)
        return
    trainer, hook = self._trainer, self._current_fx_name
    results = None if trainer is None or self._fabric is not None or trainer.barebones else trainer._results
    if results is None or type(value) is not Tensor or value.dim():
        _log(self, name, value, *args, **kwargs)
        return
    stored = results.get(f"{hook}.{name}")
    asked = (args, kwargs)
    connector = trainer._logger_connector
    if (
        stored is not None
        and stored.__dict__.get("_asked") == asked
        and results.dataloader_idx is None
        and value.dtype == torch.float32
        and value.device == stored.value.device
        and not connector.should_reset_tensors(hook)
    ):
        stored.value = stored._forward_cache = value.detach().clone()
        stored._computed, stored.has_reset = None, False
        stored._update_count += 1
        connector._current_fx = hook
        return
    _log(self, name, value, *args, **kwargs)
    stored = results.get(f"{hook}.{name}")
    # what is kept over an epoch, synchronised, or reduced in another type takes the long way each time
    if stored is not None and stored.is_tensor:
        meta = stored.meta
        simple = meta.on_step and not meta.on_epoch and not meta.enable_graph and not meta.sync.should
        stored._asked = asked if simple else None


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


#: Where the shortcuts go: owner, attribute, Lightning's own, ours. A release that lacks a place keeps what it has.
PLACES: list[tuple[Any, str, Any, Any]] = [
    (_metric, "to", _move, _to),
    (LightningModule, "log", _log, _log_again),
    (_call, "_call_callback_hooks", _callbacks, _call_callbacks),
    (_call, "_call_lightning_module_hook", _module_hook, _call_module),
    (_core, "is_param_in_hook_signature", _inspect, _has_parameter),
    (_steps, "is_param_in_hook_signature", _inspect, _has_parameter),
]


def install() -> None:
    """Take the shortcuts from now on; a second call does nothing."""
    for owner, name, original, ours in PLACES:
        if original is not None and hasattr(owner, name):
            setattr(owner, name, ours)


def uninstall() -> None:
    """Go Lightning's own way again."""
    for owner, name, original, _ in PLACES:
        if original is not None and hasattr(owner, name):
            setattr(owner, name, original)
