"""What a grid's nested values may be, told before it is read: a wrong type is a sentence, not an arithmetic error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_options(options: Mapping[str, Any]) -> None:
    """Check the grid in the options of the method.

    Raises:
        ValueError: For the first value of a wrong type: key, value and what is accepted.
    """
    if options.get("grid") is not None:
        check_grid(options["grid"], "grid.")


def check_grid(content: Any, where: str = "") -> None:
    """Check sizes, prices and the name of the device of a grid or a plan.

    Args:
        content: The grid; what is no mapping at all is left to its reader.
        where: Begins the keys in errors, with a dot at the end.

    Raises:
        ValueError: For the first value of a wrong type.
    """
    if not isinstance(content, Mapping):
        return
    prices = _mapping(content.get("prices"), f"{where}prices", "{NAME: dollars an hour}")
    for gpu, price in prices.items():
        if not _number(price) or not price > 0:
            raise _reject(f"{where}prices.{gpu}", price, "a number above 0")
    if not isinstance(content.get("gpu") or "", str):
        raise _reject(f"{where}gpu", content["gpu"], "the name of a device, such as H100-80GB")
    for name, values in _mapping(content.get("sizes"), f"{where}sizes", "{NAME: {width: 128, depth: 2}}").items():
        key = f"{where}sizes.{name}"
        for option, value in _mapping(values, key, "{width: 128, depth: 2, vocab_size: 2048}").items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise _reject(f"{key}.{option}", value, "a whole number")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mapping(value: Any, key: str, example: str) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise _reject(key, value, example)
    return value or {}


def _reject(key: str, value: Any, accepted: str) -> ValueError:
    return ValueError(f"{key}: {value!r} is not accepted; accepted: {accepted}")
