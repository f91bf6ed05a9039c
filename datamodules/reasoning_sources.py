"""Where real problems come from: JSONL and Parquet files, data sets of the hub, CHAMP, tasks of reasoning-gym."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """A format.

    Attributes:
        question: Name of the question's field.
        answer: Name of the reference answer's field.
        form: Form of the answers; empty for a guess by the reference.
        hub: Name of the data set for `datasets`.
        split: Its split.
        part: Name of its part (`config`), where it has several.
    """

    question: str
    answer: str
    form: str = ""
    hub: str = ""
    split: str = "test"
    part: str | None = None


SOURCES = {
    "jsonl": Source("question", "answer"),
    "champ": Source("text", "answer"),
    "aime": Source("problem", "answer", "integer", "HuggingFaceH4/aime_2024", "train"),
    "math500": Source("problem", "answer", "math", "HuggingFaceH4/MATH-500"),
    "gpqa": Source("Question", "Correct Answer", "choice", "Idavidrein/gpqa", "train", "gpqa_diamond"),
    "humaneval": Source("prompt", "test", "code", "openai/openai_humaneval"),
    "reasoning_gym": Source("question", "answer"),
}


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines of a JSONL file, with their places."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; accepted: a JSONL file")
    out = []
    # not splitlines: texts may hold other characters that end lines
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: accepted: an object in each line")
            out.append((f"{path}:{number}", row))
    return out


def _read_rows(name: str, path: str, count: int, seed: int) -> list[dict[str, Any]]:
    """A JSONL or Parquet file, or a data set of the hub."""
    if path and not path.endswith(".parquet"):
        return [row for _, row in read_lines(Path(path).expanduser())]
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("data sets need the library datasets: pip install 'method-zoo[data]'") from error
    if path:
        file = Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {path}; accepted: a JSONL or Parquet file")
        return list(load_dataset("parquet", data_files=str(file), split="train"))
    source = SOURCES[name]
    return list(load_dataset(source.hub, source.part, split=source.split))


def _read_champ(name: str, path: str, count: int, seed: int) -> list[dict[str, Any]]:
    """The 270 competition problems of CHAMP."""
    try:
        import champ_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("CHAMP is the package champ-dataset: pip install 'method-zoo[math]'") from error
    problems = champ_dataset.load("v0").problems.values()
    return [{"key": p.identifier, "text": p.text, "answer": p.answer} for p in problems]


def _read_gym(name: str, path: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Generated problems of a task of reasoning-gym, which judges answers itself: often several are right."""
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "these tasks are the package reasoning-gym: pip install 'method-zoo[reasoning]'"
        ) from error
    try:
        rows = reasoning_gym.create_dataset(path, size=count or 100, seed=seed)
    except ValueError as error:
        raise ValueError(f"path: {path!r} is no task of reasoning-gym: {error}") from error
    return [{**row, "scorer": partial(rows.score_answer, entry=row)} for row in rows]


_READERS = {"champ": _read_champ, "reasoning_gym": _read_gym}


def read_source(name: str, path: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of a source, with its own names of the fields.

    Args:
        name: One of `SOURCES`.
        path: JSONL or Parquet file, or the name of a task; empty for the package or the hub.
        count: Problems that are wanted; 0 for all.
        seed: Of problems that are generated.

    Raises:
        FileNotFoundError: If the file is not there.
        ModuleNotFoundError: If a package is not installed, with the way to get it.
        ValueError: If there are no problems, or a line is none.
    """
    rows = _READERS.get(name, _read_rows)(name, path, count, seed)
    if not rows:
        raise ValueError(f"{path or name}: there are no problems")
    return rows[: count or None]
