"""The card of a method: the facts that `zoo list` and `zoo info` show, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Version of the contract between the zoo and its methods. A plugin declares the one it was written for.
ZOO_API = "1"


@dataclass(frozen=True)
class Card:
    """What a method is, where it comes from and what it promises.

    The card is the class attribute `card` of a method and is written with literals only, so that `zoo list` can read
    it from the source file without importing torch.

    Args:
        title: Title of the paper, or of the method where there is none.
        summary: One line, at most 100 characters, without a full stop.
        arxiv: arXiv identifier such as `"2306.07483"`, or `""`.
        year: Year of the publication.
        batch: Import path of the `TypedDict` that the training step takes: `"datamodules.images.ImageBatch"`.
        kind: A few words: `"vision, semi-supervised"`.
        links: Facts that the datamodule provides to the constructor: `{"num_classes": "num_classes"}` gives the
            datamodule attribute on the right to the constructor argument on the left. The attribute must be there
            before `setup` runs.
        skip_checks: Conformance checks that the method cannot meet: `{check id: reason in words}`.
        check_options: Options under which a check is made that the defaults cannot meet, instead of skipping it:
            `{check id: {"model.mix": False}}`.
        check: Function that looks into nested options before anything is built, `"package.module:function"`: it takes
            the given options and raises `ValueError("key.in.options: value ...; accepted: ...")`.
        compiles: Whether `torch.compile` is supported.
        extra: Name of the optional-dependency group that the method needs, or `""`.
        search: Search space, for `zoo dashboard --sweep`: constructor arguments (or dotted options such as
            `data.batch_size`) with `{"values": [...]}` or `{"min": 1e-3, "max": 1e-1, "log": True}`.
        objective: What a search is for: `"maximize val/acc"`.
    """

    title: str
    summary: str
    arxiv: str = ""
    year: int = 0
    batch: str = ""
    kind: str = ""
    links: Mapping[str, str] = field(default_factory=dict)
    skip_checks: Mapping[str, str] = field(default_factory=dict)
    check_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    check: str = ""
    compiles: bool = False
    extra: str = ""
    search: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    objective: str = ""
