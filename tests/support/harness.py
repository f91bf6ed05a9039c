"""For tests of models in the lm-evaluation-harness: a stand-in where it is not installed, and tasks of its own form."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="the extra lm-eval is not installed")
#: What the harness and its metrics warn of when they are imported.
QUIET = ("ignore::DeprecationWarning", "ignore::SyntaxWarning", "ignore::FutureWarning", "ignore::UserWarning")
OURS = (
    "zoo.harness",
    "zoo.methods.dynamoe.zero_shot",
    "zoo.methods.kv_prediction.lm_eval_adapter",
)


class Request(NamedTuple):
    """What the harness hands over, as far as it is used."""

    args: tuple[Any, ...]


class Letters:
    """Twelve letters, of which the last is the end token."""

    eos_id = 11

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [["abcdefghijkl".index(c) for c in text] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join("abcdefghijkl"[i] for i in ids)


@contextlib.contextmanager
def importable(module: str) -> Iterator[Any]:
    """Import a module of ours that builds on the harness; where that is not installed, on a base class without ways."""
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            stub = types.ModuleType("lm_eval.api.model")
            stub.LM = type("LM", (), {})  # type: ignore[attr-defined]
            for name in ("lm_eval", "lm_eval.api"):
                patch.setitem(sys.modules, name, types.ModuleType(name))
            patch.setitem(sys.modules, "lm_eval.api.model", stub)
            for name in OURS:
                patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(module)
    if not INSTALLED:
        for name in OURS:
            sys.modules.pop(name, None)


def write_tasks(folder: Path, tasks: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]]) -> Path:
    """Write tasks as their users do: a YAML file and a file of examples each.

    Args:
        folder: Where to; it is made.
        tasks: Kind of requests and examples of each task: `question`, `answer` (a text; of a multiple choice its
            number), and `choices`; of whole texts only `answer`.
    """
    folder.mkdir()
    for name, (kind, examples) in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
        task: dict[str, Any] = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "output_type": kind,
            "doc_to_text": "" if kind == "loglikelihood_rolling" else "{{question}}",
            "doc_to_target": "answer" if kind == "multiple_choice" else "{{answer}}",
            "target_delimiter": "",
        }
        if kind == "multiple_choice":
            task["doc_to_choice"] = "{{choices}}"
        if kind == "generate_until":
            task |= {"generation_kwargs": {"until": ["!"], "max_gen_toks": 4, "do_sample": False}}
            task |= {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return folder
