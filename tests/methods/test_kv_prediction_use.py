"""What a user does with a trained pair: the command that continues a prompt, and the lm-evaluation-harness."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import zoo
from tests.methods.test_kv_prediction_module import make
from zoo.main import main
from zoo.methods.kv_prediction.export import Loaded

SHORT: dict[str, Any] = {"trainer.max_steps": 2, "trainer.limit_val_batches": 1, "trainer.enable_model_summary": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kvp") / "run"
    config = "kv_prediction/smoke"
    zoo.run("fit", config=config, overrides=SHORT, run_dir=folder, wandb="disabled")
    return folder


def test_a_prompt_is_continued_with_both_caches_and_times_are_told(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["generate", str(run), "3 1 1 4 4 3 1 10", "--max-new-tokens", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[predicted cache] ")
    assert lines[2].startswith("[base] ")
    assert all(len(line.partition("] ")[2].split()) == 5 for line in (lines[0], lines[2]))
    assert "TTFT" in lines[1]
    assert "TTFT" in lines[3]
    assert lines[4].startswith("time to first token: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "what now"], "the prompt 'what now'"),
        (["RUN", "3 99"], "accepted: 0 to 11"),
        (["RUN", ""], "a prompt of no tokens is not accepted"),
        (["RUN", "3 " * 70], "70 tokens and 32 more are too long for the base; accepted: 64 in all"),
        (["RUN", "3", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["nowhere", "3"], "no run with a checkpoint in nowhere"),
    ],
)
def test_prompts_and_runs_that_cannot_be(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *[str(run) if word == "RUN" else word for word in words]]) == 2
    assert message in capsys.readouterr().err


def test_text_is_continued_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    for i in range(40):
        prose = "\n\n".join(f"Paragraph {i} {j} of a text about foxes and dogs, on and on and on." for j in range(4))
        (tmp_path / "texts" / f"{i}.txt").write_text(prose)
    data = {"class_path": "text_prompts", "init_args": {"corpus": str(tmp_path / "texts"), "tokenizer": "bytes"}}
    data["init_args"] |= {"prompt_length": 24, "block_size": 32, "batch_size": 4, "val_fraction": 0.2}  # type: ignore[operator]
    config = tmp_path / "text.yaml"
    import yaml

    from zoo.config import load_layers

    smoke = load_layers(["kv_prediction/smoke"], []).merged
    config.write_text(yaml.safe_dump({**smoke, "data": data}))
    zoo.run("fit", config=config, overrides=SHORT, run_dir=tmp_path / "run", wandb="disabled")
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "A text about", "--max-new-tokens", "4"]) == 0
    assert "TTFT" in capsys.readouterr().out


# ---------------------------------------------------------------- the harness


class Request(NamedTuple):
    """What the harness hands over, as far as it is used."""

    args: tuple[Any, ...]


class Letters:
    """Twelve letters and an end token that is one of them."""

    eos_id = 11

    def encode(self, texts: Any) -> list[list[int]]:
        return [["abcdefghijkl".index(c) for c in text] for text in texts]

    def decode(self, ids: Any) -> str:
        return "".join("abcdefghijkl"[i] for i in ids)


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter's class; where the harness is not installed, with a base class in its place."""
    if importlib.util.find_spec("lm_eval") is None:
        stub = types.ModuleType("lm_eval.api.model")
        stub.LM = type("LM", (), {})  # type: ignore[attr-defined]
        for name, module in (
            ("lm_eval", types.ModuleType("lm_eval")),
            ("lm_eval.api", types.ModuleType("lm_eval.api")),
        ):
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, "lm_eval.api.model", stub)
    monkeypatch.delitem(sys.modules, "zoo.methods.kv_prediction.lm_eval_adapter", raising=False)
    yield importlib.import_module("zoo.methods.kv_prediction.lm_eval_adapter").KVPredictionLM
    sys.modules.pop("zoo.methods.kv_prediction.lm_eval_adapter", None)


def test_the_harness_gets_likelihoods_of_predicted_caches(adapter: Any) -> None:
    model = make()
    loaded = Loaded(model.base, *model.pair)
    (value, greedy), (certain, is_greedy) = adapter(loaded, Letters()).loglikelihood(
        [Request(("abcd", "efg")), Request(("abc", best(model, "abc")))]
    )
    ids = torch.tensor([[0, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        logprobs = model.predicted_logits(ids)[0, 3:].log_softmax(-1)
    assert value == pytest.approx(float(logprobs[range(3), [4, 5, 6]].sum()), abs=1e-5)
    assert greedy == bool((logprobs.argmax(-1) == torch.tensor([4, 5, 6])).all())
    assert is_greedy
    assert certain < 0
    with torch.no_grad():
        own = model.base.logits(model.base(ids)[0])[0, 3:].log_softmax(-1)
    ((upper, _),) = adapter(loaded, Letters(), use_base=True).loglikelihood([Request(("abcd", "efg"))])
    assert upper == pytest.approx(float(own[range(3), [4, 5, 6]].sum()), abs=1e-5)


def best(model: Any, context: str) -> str:
    ids = torch.tensor(Letters().encode([context]))
    with torch.no_grad():
        return Letters().decode([int(model.predicted_logits(ids)[0, -1].argmax())])


def test_the_harness_gets_greedy_answers_up_to_a_stop(adapter: Any) -> None:
    from zoo.methods.kv_prediction.generation import generate

    model = make()
    lm = adapter(Loaded(model.base, *model.pair), Letters())
    prompt = "abcdabcd"
    whole = Letters().decode(generate(model, torch.tensor(Letters().encode([prompt])), 6)[0].tolist()).partition("l")[0]
    assert lm.generate_until([Request((prompt, {"until": [], "max_gen_toks": 6}))]) == [whole]
    if whole:
        stop = whole[-1]
        (found,) = lm.generate_until([Request((prompt, {"until": [stop], "max_gen_toks": 6}))])
        assert found == whole.partition(stop)[0]
    with pytest.raises(ValueError, match="do_sample: True is not accepted"):
        lm.generate_until([Request((prompt, {"do_sample": True}))])
    with pytest.raises(ValueError, match="max_gen_toks: 40 is not accepted; accepted: less than 40"):
        lm.generate_until([Request((prompt, {"max_gen_toks": 40}))])


def test_the_harness_gets_whole_texts_in_windows(adapter: Any) -> None:
    model = make()
    lm = adapter(Loaded(model.base, *model.pair), Letters())
    text = "abcdefghij" * 5  # 50 tokens, the context has 40
    (whole,) = lm.loglikelihood_rolling([Request((text,))])
    parts = lm.loglikelihood([Request(("l", text[:39])), Request((text[38], text[39:]))])
    assert whole == pytest.approx(sum(value for value, _ in parts), abs=1e-4)


def test_without_the_harness_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "zoo.methods.kv_prediction.lm_eval_adapter", raising=False)
    with pytest.raises(ImportError, match="pip install 'method-zoo\\[lm-eval\\]'"):
        importlib.import_module("zoo.methods.kv_prediction.lm_eval_adapter")
