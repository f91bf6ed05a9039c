"""What the files of contrastive perplexity have in common."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from callbacks.text_scorers import read_words
from zoo.config import load_layers

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted(
    path.stem for path in (REPOSITORY / "configs/contrastive_perplexity").glob("*.yaml") if path.stem != "claims"
)
#: Listed for a second meaning of theirs: terms of Python and of experiments.
HARMLESS = {"len", "knob", "strip"}
OURS = re.compile(r"contrastive|perplexity_set|controlled_generation|text_scorers|text_sources|support/sentences")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_arm_is_measured_by_the_same_callback(name: str) -> None:
    callbacks = load_layers([f"contrastive_perplexity/{name}"], []).merged["trainer"]["callbacks"]
    assert sum(c["class_path"].endswith("ControlledGeneration") for c in callbacks) == 1


def test_no_listed_word_stands_in_a_file() -> None:
    pytest.importorskip("better_profanity")
    listed = {word.lower() for word in read_words(None)} - HARMLESS
    words = {word for word in listed if re.fullmatch(r"\w+", word)}
    parts = ("benchmarks", "callbacks", "configs", "datamodules", "docs", "examples", "results", "tests", "zoo")
    files = [path for part in parts for path in (REPOSITORY / part).rglob("*") if path.is_file()]
    files = [path for path in files if OURS.search(str(path.relative_to(REPOSITORY)))]
    files = [path for path in files if path.suffix in (".py", ".yaml", ".md", ".json", ".jsonl", ".txt")]
    assert len(files) > 40
    found: set[str] = set()
    for path in files:
        text = path.read_text(encoding="utf-8").lower()
        there = set(re.findall(r"[^\W_]+", text)) | set(re.findall(r"\w+", text))
        phrase = any(re.search(rf"(?<!\w){re.escape(p)}(?!\w)", text) for p in listed - words if p in text)
        if phrase or there & words:
            found.add(str(path.relative_to(REPOSITORY)))
    if found:  # without the words themselves
        pytest.fail(f"listed words in {', '.join(sorted(found))}", pytrace=False)
