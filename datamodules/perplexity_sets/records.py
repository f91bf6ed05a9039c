"""Files of sets: one record a line, an anchor with its wanted and unwanted paraphrases, as the released code has them.

    {"input": "...", "id": "group-3", "group": "...", "paraphrases": ["..."], "paraphrases_toxic": ["..."]}

Other fields are kept out of the way and not read. The names of the last two are those of the paper's data; for another
attribute they hold the wanted and the unwanted sentences all the same. No message quotes a sentence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SetRecord:
    """An anchor and its sets.

    Args:
        id: Name of the anchor, the only one in its file.
        group: What it is about.
        input: The anchor itself, a wanted sentence.
        positives: Wanted sentences of the same meaning.
        negatives: Unwanted sentences of the same meaning.
        scores: How unwanted a scorer finds each positive and each negative; written, and not read again.
    """

    id: str
    group: str
    input: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    scores: tuple[tuple[float, ...], tuple[float, ...]] | None = field(default=None, compare=False)

    def line(self) -> str:
        """Return the record as a line of a file."""
        values: dict[str, Any] = {"input": self.input, "id": self.id, "group": self.group}
        values |= {"paraphrases": list(self.positives), "paraphrases_toxic": list(self.negatives)}
        if self.scores is not None:
            values |= {"scores": list(self.scores[0]), "scores_toxic": list(self.scores[1])}
        return json.dumps(values, ensure_ascii=False) + "\n"


def normal(text: str) -> str:
    """Return a text as it is compared: lower case, single blanks."""
    return " ".join(text.lower().split())


def read_record(line: str) -> SetRecord:
    """Read a line.

    Raises:
        ValueError: If it is no record; the message names the field, without the place.
    """
    try:
        values: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(values, dict):
        raise ValueError(f"a {type(values).__name__}; accepted: an object with input, id, paraphrases, ...")
    texts = {}
    for name in ("id", "group", "input"):
        if name not in values:
            raise ValueError(f"field {name!r} is missing")
        if not isinstance(values[name], str) or not values[name].strip():
            raise ValueError(f"field {name!r} is {_kind(values[name])}; accepted: a text that is not empty")
        texts[name] = values[name]
    lists = []
    for name in ("paraphrases", "paraphrases_toxic"):
        if name not in values:
            raise ValueError(f"field {name!r} is missing")
        if not isinstance(values[name], list):
            raise ValueError(f"field {name!r} is {_kind(values[name])}; accepted: a list of texts")
        for number, text in enumerate(values[name], start=1):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"item {number} of field {name!r} is {_kind(text)}; accepted: a text that is not empty"
                )
        lists.append(tuple(values[name]))
    if both := len(set(map(normal, lists[0])) & set(map(normal, lists[1]))):
        raise ValueError(f"{both} of its sentences are wanted and unwanted at once")
    return SetRecord(**texts, positives=lists[0], negatives=lists[1])


def _kind(value: Any) -> str:
    """Say what a value is without quoting it."""
    if isinstance(value, str):
        return "a text" if value.strip() else "empty"
    return f"a {type(value).__name__}"


def read_records(
    path: str | Path, positives: int = 0, negatives: int = 0, short_anchors: str = "refuse"
) -> list[SetRecord]:
    """Read a file of records.

    Args:
        path: The file; empty lines do not count.
        positives: Least number of positives of an anchor.
        negatives: Least number of negatives.
        short_anchors: What happens to an anchor with fewer: `refuse` or `drop`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no record, an id is there twice, an anchor is too short, or none is left; with the
            file and the number of the line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file of sets at {file}; `zoo sets` makes one")
    lines: dict[str, int] = {}
    kept: list[SetRecord] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = read_record(line)
            if record.id in lines:
                raise ValueError(f"id {record.id!r} is that of line {lines[record.id]} too")
            short = len(record.positives) < positives or len(record.negatives) < negatives
            if short and short_anchors == "refuse":
                raise ValueError(
                    f"anchor {record.id!r} has {len(record.positives)} positives and {len(record.negatives)} "
                    f"negatives, asked for are {positives} and {negatives}; short_anchors drop leaves it out"
                )
        except ValueError as error:
            raise ValueError(f"{file.name}, line {number}: {error}") from error
        lines[record.id] = number
        if not short:
            kept.append(record)
    if not kept:
        raise ValueError(f"{file.name}: no anchor is left with {positives} positives and {negatives} negatives")
    return kept


def refuse_overlap(train: Sequence[SetRecord], heldout: Sequence[SetRecord]) -> None:
    """Refuse held-out anchors, or their unwanted sentences, that training sees.

    Raises:
        ValueError: If there are some, with their ids.
    """
    ids, inputs = {record.id for record in train}, {normal(record.input) for record in train}
    shared = [record.id for record in heldout if record.id in ids or normal(record.input) in inputs]
    if shared:
        raise ValueError(
            f"heldout: {len(shared)} of its anchors are anchors of train too ({', '.join(shared[:3])}); "
            "accepted: no anchor in both"
        )
    seen = {normal(text) for record in train for text in record.negatives}
    leaked = [record.id for record in heldout if any(normal(text) in seen for text in record.negatives)]
    if leaked:
        raise ValueError(
            f"heldout: unwanted sentences of {len(leaked)} of its anchors are in train too ({', '.join(leaked[:3])})"
        )


@dataclass(frozen=True)
class Anchor:
    """A sentence that sets are made for.

    Args:
        id: Its name, `group-k`.
        group: What it is about.
        text: The sentence.
    """

    id: str
    group: str
    text: str


def read_anchors(path: str | Path, per_group: int = 500) -> list[Anchor]:
    """Read anchors: a `.jsonl` with `input` and `group` in each line, or any other file with a sentence a line.

    Args:
        path: The file.
        per_group: Most anchors of a group, the first ones of the file; 0 for all.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is wrong, with its number, or there is none.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file of anchors at {file}")
    counts: dict[str, int] = {}
    anchors: list[Anchor] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        group, text = "all", line.strip()
        if file.suffix == ".jsonl":
            try:
                values = json.loads(line)
                group, text = values["group"], values["input"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{file.name}, line {number}: accepted: an object with input and group") from error
            if not all(isinstance(value, str) and value.strip() for value in (group, text)):
                raise ValueError(f"{file.name}, line {number}: input and group must be texts that are not empty")
        count = counts[group] = counts.get(group, 0) + 1
        if not per_group or count <= per_group:
            anchors.append(Anchor(f"{group}-{count}", group, text))
    if not anchors:
        raise ValueError(f"{file.name}: no anchor in it")
    return anchors


def write_records(path: str | Path, records: Iterable[SetRecord]) -> int:
    """Append records to a file as they come, and return how many; a run that was stopped loses none of them."""
    file, count = Path(path).expanduser(), 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        for record in records:
            out.write(record.line())
            out.flush()
            count += 1
    return count
