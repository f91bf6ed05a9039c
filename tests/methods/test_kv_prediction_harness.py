"""KV prediction in the lm-evaluation-harness: likelihoods and answers of predicted caches, and the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.kv_prediction_toy import fit_on_text
from tests.methods.test_kv_prediction_module import make
from tests.support.harness import QUIET, Letters, Request, importable, needs_harness, write_tasks
from zoo.main import main
from zoo.methods.kv_prediction.export import Loaded
from zoo.methods.kv_prediction.generation import generate


@pytest.fixture
def adapter() -> Iterator[Any]:
    """The adapter's class."""
    with importable("zoo.methods.kv_prediction.lm_eval_adapter") as module:
        yield module.KVPredictionLM


def logprobs(model: Any, ids: list[int], base: bool = False) -> torch.Tensor:
    """Log-probabilities after each token, with a predicted cache or the base's own, `[T, V]`."""
    row = torch.tensor([ids])
    with torch.no_grad():
        logits = model.base.logits(model.base(row)[0]) if base else model.predicted_logits(row)
    return logits[0].log_softmax(-1)


def naive(model: Any, context: list[int], continuation: list[int], base: bool = False) -> tuple[float, bool]:
    """Log-likelihood of one continuation, and whether greedy decoding gives it."""
    after = logprobs(model, [*context, *continuation][:-1], base)[-len(continuation) :]
    greedy = bool((after.argmax(-1) == torch.tensor(continuation)).all())
    return float(after[range(len(continuation)), continuation].sum()), greedy


@pytest.mark.parametrize("base", [False, True])
def test_likelihoods_are_those_of_predicted_caches_or_of_the_base(adapter: Any, base: bool) -> None:
    model = make()
    lm = adapter(Loaded(model.base, *model.pair), Letters(), use_base=base, batch_size=2)
    best = Letters().decode([int(logprobs(model, [0, 1, 2], base)[-1].argmax())])
    pairs = [("abcd", "efg"), ("abc", best), ("a", "bcdefgh")]
    for pair, (value, greedy) in zip(pairs, lm.loglikelihood([Request(p) for p in pairs]), strict=True):
        expected, is_greedy = naive(model, *Letters().encode(pair), base)
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy is is_greedy
    assert naive(model, *Letters().encode(["abcd", "efg"]), base) != naive(
        model, *Letters().encode(["abcd", "efg"]), not base
    )


@pytest.mark.parametrize("base", [False, True])
def test_answers_are_greedy_up_to_a_stop(adapter: Any, base: bool) -> None:
    model = make()
    lm = adapter(Loaded(model.base, *model.pair), Letters(), use_base=base)
    prompt = "abcdabcd"
    tokens = generate(model, torch.tensor(Letters().encode([prompt])), 6, with_base=base)[0].tolist()
    whole = Letters().decode(tokens).partition("l")[0]
    assert lm.generate_until([Request((prompt, {"until": [], "max_gen_toks": 6}))]) == [whole]
    if whole:
        stop = whole[-1]
        (found,) = lm.generate_until([Request((prompt, {"until": [stop], "max_gen_toks": 6}))])
        assert found == whole.partition(stop)[0]
    with pytest.raises(ValueError, match="max_gen_toks: 40 is not accepted; accepted: less than 40"):
        lm.generate_until([Request((prompt, {"max_gen_toks": 40}))])


def test_texts_longer_than_the_context_are_read_in_windows(adapter: Any) -> None:
    model = make()
    lm = adapter(Loaded(model.base, *model.pair), Letters())
    ids = [i % 10 for i in range(50)]  # the context has 40
    (whole,) = lm.loglikelihood_rolling([Request((Letters().decode(ids),))])
    parts = naive(model, [11], ids[:40])[0] + naive(model, ids[9:40], ids[40:])[0]
    assert whole == pytest.approx(parts, abs=1e-4)


@needs_harness
@pytest.mark.filterwarnings(*QUIET)
def test_the_real_harness_on_a_trained_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    run = fit_on_text(tmp_path)
    questions = ["The fox ", "A dog ", "On and "]
    tasks = {
        "foxes_choice": (
            "multiple_choice",
            [{"question": q, "choices": ["runs", "sits", "on"], "answer": i} for i, q in enumerate(questions)],
        ),
        "foxes_next": ("loglikelihood", [{"question": q, "answer": "on"} for q in questions]),
        "foxes_answer": ("generate_until", [{"question": q, "answer": "on"} for q in questions]),
    }
    folder = write_tasks(tmp_path / "tasks", tasks)
    command = ["harness", str(run), "--tasks", ",".join(tasks), "--include", str(folder)]
    command += ["--only-included", "--out", str(tmp_path / "table.json")]
    assert main(command) == 0
    content = json.loads((tmp_path / "table.json").read_text())
    assert [row["cache"] for row in content["rows"]] == ["predicted", "base"]
    assert content["tasks"] == list(tasks)
    assert "lm-eval" in content["versions"]

    from zoo.commands.generate import load

    model, encoder = load(run)
    for row in content["rows"]:
        base = row["cache"] == "base"
        # a choice goes with the blank before it
        pairs = [encoder.encode([q.rstrip(), f" {choice}"]) for q in questions for choice in ("runs", "sits", "on")]
        values = torch.tensor([naive(model, *pair, base)[0] for pair in pairs]).reshape(3, 3)
        assert row["foxes_choice/acc"] == float((values.argmax(1) == torch.arange(3)).double().mean())
        assert row["foxes_answer/exact_match"] == 0
    assert "predicted" in capsys.readouterr().out


def test_commands_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for words, message in (
        (["--limit", "0"], "--limit 0"),
        (["--shots", "-1"], "--shots -1"),
        (["--out", "t.txt"], "--out t.txt"),
        (["--include", str(tmp_path / "none")], "is no folder"),
    ):
        assert main(["harness", str(tmp_path), "--tasks", "t", *words]) == 2
        assert message in capsys.readouterr().err
    with importable("zoo.harness"):
        assert main(["harness", str(tmp_path), "--tasks", "t"]) == 2
        assert "no run with a checkpoint in" in capsys.readouterr().err
        assert main(["harness", str(tmp_path), "--tasks", "t", "--thresholds", "0.5"]) == 2
        assert "--thresholds is for a directory of zoo moefy" in capsys.readouterr().err
