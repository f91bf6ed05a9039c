"""What all models for the lm-evaluation-harness share: batches, windows, blanks, stop strings, and tables."""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.harness import QUIET, Letters, Request, importable, needs_harness, write_tasks


class Bigrams:
    """A model by hand: what follows a token depends on it and on how many tokens stand before."""

    def __init__(self) -> None:
        self.table = torch.randn(12, 12, generator=torch.Generator().manual_seed(0)) * 2
        self.batches: list[tuple[int, int]] = []

    def rows(self, ids: list[int]) -> Tensor:
        """Logits after each token of a text, `[T, V]`."""
        return torch.stack([torch.roll(self.table[token], place % 3) for place, token in enumerate(ids)])

    def naive(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood, a token at a time."""
        total, greedy, ids = 0.0, True, list(context)
        for token in continuation:
            last = self.rows(ids)[-1]
            total += float(last.log_softmax(-1)[token])
            greedy &= int(last.argmax()) == token
            ids.append(token)
        return total, greedy

    def most_likely(self, ids: list[int], count: int) -> list[int]:
        """Greedy continuation."""
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self.rows(ids)[-1].argmax()))
        return ids[-count:]


@pytest.fixture
def harness() -> Iterator[Any]:
    with importable("zoo.harness") as module:
        yield module


def model_of(harness: Any, **options: Any) -> Any:
    """A model for the harness, with what it was asked in `inner.batches`."""

    class Model(harness.HarnessLM):
        inner = Bigrams()

        def logits(self, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
            assert not ids[~mask].any()
            assert bool((mask.long().diff(dim=1) <= 0).all()), "padding stands at the end"
            self.inner.batches.append((len(ids), int(mask.sum())))
            return torch.stack([self.inner.rows(row.tolist()) for row in ids])[:, -keep:]

        def greedy(self, ids: Tensor, count: int) -> Iterator[int]:
            yield from self.inner.most_likely(ids[0].tolist(), count)

    return Model(Letters(), **{"context": 20, "batch_size": 3, **options})


PAIRS = [("abc", "de"), ("a", "bcdefghij"), ("abcdefg", "h"), ("", "ab"), ("abc", ""), ("k", "k"), ("abcabc", "jjj")]


def test_likelihoods_of_a_batch_are_those_of_each_text_alone(harness: Any) -> None:
    lm = model_of(harness)
    found = lm.loglikelihood([Request(pair) for pair in PAIRS])
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        ids = Letters().encode([context or "l", continuation])
        expected, is_greedy = lm.inner.naive(*ids)
        assert value == pytest.approx(expected, abs=1e-4), (context, continuation)
        assert greedy is is_greedy
    assert [rows for rows, _ in lm.inner.batches] == [3, 3], "an empty continuation is certain, without the model"
    best = Letters().decode(lm.inner.most_likely([0, 1], 3))
    assert [greedy for _, greedy in lm.loglikelihood([Request(("ab", best)), Request(("ab", "aaa"))])] == [True, False]


def test_a_long_prompt_loses_its_beginning_and_a_long_continuation_is_refused(harness: Any) -> None:
    lm = model_of(harness, context=5)
    ((value, _),) = lm.loglikelihood([Request(("abcdefgh", "ij"))])
    assert value == pytest.approx(lm.inner.naive([4, 5, 6, 7], [8, 9])[0], abs=1e-4), "five tokens are read"
    with pytest.raises(ValueError, match="a continuation has 6 tokens; accepted: 5 at most"):
        lm.loglikelihood([Request(("a", "bcdefg"))])


def test_blanks_go_with_the_continuation_and_the_prefix_before_the_text(harness: Any) -> None:
    class Words(Letters):
        pieces = (" a", " b", " ", "a", "b")

        def encode(self, texts: Any) -> list[list[int]]:
            return [[self.pieces.index(piece) for piece in re.findall(" ?[ab]| ", text)] for text in texts]

    lm = model_of(harness, prefix=[10])
    lm.tokenizer = Words()
    assert lm.pair("a ", "b") == ([10, 3], [1]), "never a lone blank before a word"
    assert lm.pair("", "a") == ([10], [3])
    lm.prefix = []
    assert lm.pair("", "a") == ([11], [3]), "something has to stand before"


@pytest.mark.parametrize("prefix", [[], [4]])
def test_whole_texts_are_read_in_windows_of_which_the_last_is_full(harness: Any, prefix: list[int]) -> None:
    lm = model_of(harness, context=4, prefix=prefix)
    ids = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    start = prefix or [11]
    # the example in the harness's own documentation
    windows = [(start, [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    texts = [Request((Letters().decode(ids),)), Request(("",)), Request(("ab",))]
    found = lm.loglikelihood_rolling(texts)
    assert found[0] == pytest.approx(sum(lm.inner.naive(*window)[0] for window in windows), abs=1e-4)
    assert found[1] == 0
    assert found[2] == pytest.approx(lm.inner.naive(start, [0, 1])[0], abs=1e-4)
    assert max(tokens for rows, tokens in lm.inner.batches) <= 3 * 4


@needs_harness
@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize("length", [1, 4, 5, 8, 11])
def test_the_windows_are_those_of_the_harness(harness: Any, length: int) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    lm = model_of(harness, context=4)
    ids = [i % 11 for i in range(length)]
    windows = [make_disjoint_window(w) for w in get_rolling_token_windows(ids, 11, 4, 1)]
    (found,) = lm.loglikelihood_rolling([Request((Letters().decode(ids),))])
    assert found == pytest.approx(sum(lm.inner.naive(*window)[0] for window in windows), abs=1e-4)


def test_answers_end_at_a_stop_string_or_the_end_token(harness: Any) -> None:
    lm = model_of(harness, max_new_tokens=6)
    whole = Letters().decode(lm.inner.most_likely([0, 1], 6))
    cut = whole.partition("l")[0]
    stop = cut[1:3]
    answers = lm.generate_until(
        [
            Request(("ab", {"until": []})),
            Request(("ab", {"until": [stop, "zz"]})),
            Request(("ab", {"until": cut[2], "max_gen_toks": 6})),
            Request(("ab", {"max_new_tokens": 2, "do_sample": False, "temperature": 0.0})),
        ]
    )
    assert len(cut) >= 3, "the table by hand must not end at once"
    assert answers == [cut, cut.partition(stop)[0], cut.partition(cut[2])[0], cut[:2]]


def test_what_is_not_accepted(harness: Any) -> None:
    lm = model_of(harness)
    with pytest.raises(ValueError, match="do_sample: True is not accepted; accepted: False"):
        lm.generate_until([Request(("ab", {"do_sample": True}))])
    with pytest.raises(ValueError, match="max_gen_toks: 20 is not accepted; accepted: less than 20"):
        lm.generate_until([Request(("ab", {"max_gen_toks": 20}))])
    with pytest.raises(ValueError, match="batch_size: 0 is not accepted"):
        model_of(harness, batch_size=0)


def test_the_mean_is_over_tasks_that_count_right_answers(harness: Any) -> None:
    results = {
        "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.75, "sample_len": 4},
        "b": {"exact_match,strict": 0.25, "exact_match,none": 1.0, "exact_match_stderr,none": "N/A"},
        "c": {"word_perplexity,none": 12.0},
    }
    found = harness.metrics(results)
    assert found == {
        "accuracy": 0.75, "a/acc": 0.5, "a/acc_stderr": 0.1, "a/acc_norm": 0.75,
        "b/exact_match (strict)": 0.25, "b/exact_match": 1.0, "c/word_perplexity": 12.0,
    }  # fmt: skip
    assert "accuracy" not in harness.metrics({"c": results["c"]})


def test_tables_are_written_as_json_and_csv(harness: Any, tmp_path: Path) -> None:
    rows = [{"theta": 0.5, "accuracy": 0.25}, {"theta": "full width", "accuracy": 0.5, "t/acc": 1.0}]
    harness.write_table(tmp_path / "new" / "t.json", rows, {"model": "m"})
    assert json.loads((tmp_path / "new" / "t.json").read_text()) == {"model": "m", "rows": rows}
    harness.write_table(tmp_path / "t.csv", rows, {})
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["theta", "accuracy", "t/acc"],
            ["0.5", "0.25", ""],
            ["full width", "0.5", "1.0"],
        ]
    with pytest.raises(ValueError, match=r"t.txt is no name of a table; accepted: .csv, .json"):
        harness.write_table(tmp_path / "t.txt", rows, {})


def test_without_the_harness_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "zoo.harness", raising=False)
    with pytest.raises(ImportError, match="pip install 'method-zoo\\[lm-eval\\]'"):
        importlib.import_module("zoo.harness")


@needs_harness
@pytest.mark.filterwarnings(*QUIET)
def test_the_real_harness_gives_the_naive_numbers(harness: Any, tmp_path: Path) -> None:
    lm = model_of(harness, context=40)

    def best(question: str, choices: list[str]) -> int:
        values = [lm.inner.naive(*Letters().encode([question, choice]))[0] for choice in choices]
        return values.index(max(values))

    questions = ["ab", "cde", "fgh", "ijk"]
    choices = ["c", "de", "fgh"]
    answers = [Letters().decode(lm.inner.most_likely(Letters().encode([q])[0], 4)).partition("l")[0] for q in questions]
    texts = ["abcdef", "ghij"]
    tasks = {
        "letters_choice": (
            "multiple_choice",
            # right for the first three, wrong for the last
            [{"question": q, "choices": choices, "answer": (best(q, choices) + (q == "ijk")) % 3} for q in questions],
        ),
        "letters_next": (
            "loglikelihood",
            [{"question": q, "answer": a or "a"} for q, a in zip(questions, answers, strict=True)],
        ),
        "letters_answer": (
            "generate_until",
            [
                {"question": q, "answer": a if i % 2 else a + "a"}
                for i, (q, a) in enumerate(zip(questions, answers, strict=True))
            ],
        ),
        "letters_text": ("loglikelihood_rolling", [{"answer": text} for text in texts]),
    }
    folder = write_tasks(tmp_path / "tasks", tasks)
    found = harness.evaluate(lm, list(tasks), include=folder, shipped=False)
    assert found["letters_choice/acc"] == 0.75
    assert found["letters_choice/acc_stderr"] > 0
    greedy = [lm.inner.naive(*Letters().encode([q, a or "a"]))[1] for q, a in zip(questions, answers, strict=True)]
    assert found["letters_next/acc"] == sum(greedy) / 4
    assert found["letters_answer/exact_match"] == 0.5
    nats = sum(lm.inner.naive([11], Letters().encode([text])[0])[0] for text in texts)
    bits = -nats / sum(map(len, texts)) / torch.tensor(2.0).log().item()
    assert found["letters_text/bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert found["accuracy"] == pytest.approx((0.75 + sum(greedy) / 4 + 0.5) / 3)
    assert harness.evaluate(lm, ["letters_choice"], include=folder, limit=3, shipped=False)["letters_choice/acc"] == 1.0
    task = folder / "letters_choice.yaml"
    task.write_text(task.read_text() + "unsafe_code: true\n")
    with pytest.raises(ValueError, match="unsafe"):
        harness.evaluate(lm, ["letters_choice"], include=folder, shipped=False)
    assert harness.evaluate(lm, ["letters_choice"], include=folder, shipped=False, run_code=True)["accuracy"] == 0.75
    with pytest.raises(ValueError, match="tasks: nonsense not known to the harness; accepted"):
        harness.evaluate(lm, ["letters_choice", "nonsense"], include=folder, shipped=False)
