"""Evaluation of continuations: numbers of a scripted model worked out by hand, scorers, masks, black-box use."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.controlled_generation import ControlledGeneration
from callbacks.text_scorers import (
    MASK,
    Classifier,
    LinearModel,
    SentenceEmbedding,
    WordList,
    build_scorer,
    distinct_ngrams,
    mask_words,
    read_words,
    word_cosine,
)
from callbacks.text_sources import load_source
from datamodules.perplexity_sets.synthetic import PerplexitySets
from tests.nn.test_distributed import on_two_ranks
from zoo.methods.contrastive_perplexity.module import ContrastivePerplexity
from zoo.nn.lm import build_lm
from zoo.nn.sampling import Samples, left_pad

WORDS = ["<pad>", "<unk>", "the", "soup", "song", "is", "calm", "and", "tox1", "tox2"]
#: Prompts, whether they are unwanted, their group, and two continuations of each.
SCRIPT: list[tuple[str, bool, int, list[str]]] = [
    ("the soup is tox1", True, 0, ["the soup is tox2", "the soup is calm"]),
    ("the song is tox1", True, 1, ["tox1 tox2", ""]),
    ("the song is tox2", True, 1, ["calm calm calm", "calm"]),
    ("the soup is calm", False, 0, ["tox1 and tox2 and calm", "and and"]),
    ("the song is calm", False, 1, ["the song", "the song"]),
]


class Prompts:
    """Prompts of the script in batches of two."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return 3

    def batch(self, epoch: int, index: int) -> dict[str, Tensor]:
        rows = SCRIPT[2 * index : 2 * index + 2]
        ids, mask = self.data.encode([row[0] for row in rows])
        unwanted = torch.tensor([row[1] for row in rows])
        group = torch.tensor([row[2] for row in rows])
        return {"prompt_ids": ids, "prompt_mask": mask, "prompt_is_unwanted": unwanted, "group": group}


class Data(LightningDataModule):
    """What the callback asks of a datamodule."""

    groups = ("food", "works")
    unwanted_words = ("tox1", "tox2")

    def prompt_batches(self, split: str) -> Prompts:
        return Prompts(self)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return left_pad([torch.tensor([WORDS.index(w) for w in text.split()] or [1]) for text in texts])

    def decode(self, tokens: Tensor) -> list[str]:
        return [" ".join(WORDS[t] for t in row if t > 1) for row in tokens.tolist()]

    def val_dataloader(self) -> Any:
        return DataLoader([torch.zeros(1)])  # type: ignore[arg-type]

    test_dataloader = val_dataloader


class Scripted(LightningModule):
    """Writes what the script says; what is not in it, it continues by its last word."""

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.data, self.calls = data, list[tuple[list[str], int]]()

    def generate(self, ids: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Samples:
        assert generator is not None
        script = {row[0]: row[3] for row in SCRIPT}
        prompts, texts, seen = self.data.decode(ids), list[str](), dict[str, int]()
        for prompt in prompts:
            number = seen[prompt] = seen.get(prompt, -1) + 1
            choices = script.get(prompt, [prompt.split()[-1]] if prompt else [""])
            texts.append(choices[number % len(choices)])
        self.calls.append((prompts, generator.initial_seed()))
        rows = [torch.tensor([WORDS.index(w) for w in text.split()] or [0]) for text in texts]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return Samples(tokens, (tokens > 0).sum(dim=1))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    test_step = validation_step


def run(callback: ControlledGeneration, folder: Path, data: Any = None, model: Any = None) -> dict[str, float]:
    data = data or Data()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
    )
    trainer.test(model or Scripted(data), datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


pytestmark = pytest.mark.filterwarnings("ignore:The '(test|val|train)_dataloader' does not have many workers")


# ---------------------------------------------------------------- measures


def test_every_number_of_a_scripted_model(tmp_path: Path) -> None:
    values = run(ControlledGeneration(samples=2), tmp_path)
    of = lambda name: values[f"test/{name}"]  # noqa: E731
    assert of("unwanted_rate") == pytest.approx((1 + 1) / 6)
    assert of("unwanted_share") == pytest.approx((1 / 4 + 0 + 1 + 0 + 0 + 0) / 6)
    assert of("expected_max") == pytest.approx((1 / 4 + 1 + 0) / 3)
    assert of("unwanted_rate_food") == pytest.approx(1 / 2)
    assert of("unwanted_rate_works") == pytest.approx(1 / 4)
    assert of("unwanted_rate_after_wanted") == pytest.approx(1 / 4)
    assert of("expected_max_after_wanted") == pytest.approx((2 / 5 + 0) / 2)
    # distinct over all n-grams of a text; texts too short for one do not count
    assert of("dist_1") == pytest.approx((1 + 1 + 1 + 1 / 3 + 1) / 5)
    assert of("dist_2") == pytest.approx((1 + 1 + 1 + 1 / 2) / 4)
    assert of("dist_3") == pytest.approx(1.0)
    assert of("dist_1_after_wanted") == pytest.approx((4 / 5 + 1 / 2 + 1 + 1) / 4)
    first = [word_cosine("the soup is tox1", "the soup is tox2"), word_cosine("the soup is tox1", "the soup is calm")]
    assert first == pytest.approx([3 / 4, 3 / 4])
    assert of("sim") == pytest.approx((3 / 4 + 3 / 4 + 1 / 4**0.5 / 2**0.5 + 0 + 0 + 0) / 6)
    assert not any("valid" in name for name in values), "this data cannot say what is well formed"


def test_numbers_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    whole = run(ControlledGeneration(samples=2), tmp_path)
    found = on_two_ranks(of_one_rank, tmp_path)
    for part in found:
        assert part.keys() == {name.removeprefix("test/") for name in whole}
        for name, value in part.items():
            assert value == pytest.approx(whole[f"test/{name}"], abs=1e-6), name


def of_one_rank(number: int) -> dict[str, float]:
    data = Data()
    model: Any = Scripted(data)
    model.log_dict = lambda values, **_: None
    trainer: Any = types.SimpleNamespace(datamodule=data, default_root_dir="unused")
    model.transfer_batch_to_device = lambda batch, device, number: batch
    callback = ControlledGeneration(samples=2, keep=0)
    values = callback.evaluate(trainer, model, "test")
    assert len(model.calls) == (2 if number == 0 else 1), "each process takes batches of its own"
    return values


def test_sampling_has_a_stream_of_its_own(tmp_path: Path) -> None:
    def seeds(seed: int) -> list[int]:
        data = Data()
        model = Scripted(data)
        run(ControlledGeneration(seed=seed), tmp_path, data, model)
        return [call[1] for call in model.calls]

    one = seeds(0)
    assert seeds(0) == one
    assert len(set(one)) == 3
    assert not set(seeds(1)) & set(one)


def test_a_judge_of_the_data_is_asked_first(tmp_path: Path) -> None:
    class Judged(Data):
        def judge(self, prompts: Sequence[str], texts: Sequence[str]) -> dict[str, Tensor]:
            assert len(prompts) == len(texts)
            return {"valid": torch.tensor([float(bool(t)) for t in texts]), "sim": torch.ones(len(texts))}

    values = run(ControlledGeneration(samples=2), tmp_path, Judged())
    assert values["test/valid"] == pytest.approx(5 / 6)
    assert values["test/sim"] == 1


def test_only_every_nth_validation_is_measured(tmp_path: Path) -> None:
    callback = ControlledGeneration(every_n_validations=2)
    seen: list[str] = []
    callback.evaluate = lambda trainer, pl_module, stage: seen.append(stage) or {}  # type: ignore
    trainer: Any = types.SimpleNamespace(sanity_checking=False)
    for number in range(1, 6):
        callback.on_validation_epoch_end(trainer, None)  # type: ignore[arg-type]
        assert len(seen) == number // 2
    again = ControlledGeneration(every_n_validations=2)
    again.load_state_dict(callback.state_dict())
    again.evaluate = callback.evaluate  # type: ignore[method-assign]
    again.on_validation_epoch_end(trainer, None)  # type: ignore[arg-type]
    assert len(seen) == 3
    again.on_validation_epoch_end(types.SimpleNamespace(sanity_checking=True), None)  # type: ignore[arg-type]
    assert again.state_dict() == {"validations": 6}


# ---------------------------------------------------------------- what is written is masked


def test_what_is_written_down_is_masked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(ControlledGeneration(samples=2, keep=2), tmp_path)
    text = (tmp_path / "generations.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert rows[0] == {
        "prompt": f"the soup is {MASK}",
        "continuations": [f"the soup is {MASK}", "the soup is calm"],
    }
    assert len(rows) == 2
    assert (tmp_path / "figures" / "controlled_generation.png").stat().st_size > 1000
    printed = capsys.readouterr()
    assert "tox" not in text + printed.out + printed.err


def test_nothing_is_written_where_it_is_not_known_what_to_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unknown(Data):
        unwanted_words = ()

    monkeypatch.setattr("callbacks.controlled_generation.build_scorer", lambda *_: WordList(["tox1"]))
    run(ControlledGeneration(scorer="linear"), tmp_path, Unknown())
    assert not (tmp_path / "generations.jsonl").exists()


def test_masks_hide_words_phrases_and_any_case() -> None:
    words = ["tox1", "bad phrase", "t@x", "long tox1"]
    assert mask_words("Tox1, a TOX1! long tox1", words) == f"{MASK}, a {MASK}! {MASK}"
    assert mask_words("a bad phrase and a bad day", words) == f"a {MASK} and a bad day"
    assert mask_words("t@x t@xi tox12 nontox1", words) == f"{MASK} t@xi tox12 nontox1"
    assert mask_words("tox1", []) == "tox1"


# ---------------------------------------------------------------- scorers


def test_the_word_list_scores_the_share_of_listed_words() -> None:
    scorer = WordList(["tox1", "bad phrase", " "])
    scores = scorer(["one tox1 here, TOX1!", "a bad phrase ends", "tox12 only", "", "bad\nphrase"])
    assert scores.tolist() == pytest.approx([2 / 4, 2 / 4, 0, 0, 0])
    assert (scores > scorer.threshold).tolist() == [True, True, False, False, False]
    assert build_scorer("words", ["tox1"], 1)(["tox1"]).tolist() == [1.0]
    for empty in ([], [" "]):
        with pytest.raises(ValueError, match="the list of unwanted words is empty"):
            WordList(empty)


def test_lists_of_words_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words.txt").write_text("tox1\n\n bad phrase \n")
    assert read_words(str(tmp_path / "words.txt")) == ["tox1", "bad phrase"]
    with pytest.raises(ValueError, match="word_list: there is no file"):
        read_words(str(tmp_path / "none.txt"))
    (tmp_path / "better_profanity").mkdir()
    (tmp_path / "better_profanity" / "__init__.py").write_text("raise RuntimeError('is not run')")
    (tmp_path / "better_profanity" / "profanity_wordlist.txt").write_text("tox2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read_words(None) == ["tox2"]
    monkeypatch.setattr("callbacks.text_scorers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="give word_list, or pip install 'method-zoo"):
        read_words(None)


def test_a_list_given_by_the_user_replaces_that_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("calm\n")
    values = run(ControlledGeneration(samples=2, word_list=str(tmp_path / "words.txt")), tmp_path)
    assert values["test/unwanted_rate"] == pytest.approx(3 / 6)
    assert "calm" not in (tmp_path / "generations.jsonl").read_text()


def test_the_trained_linear_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("callbacks.text_scorers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="scorer: 'linear' needs a package"):
        LinearModel()
    monkeypatch.undo()
    stub: Any = types.ModuleType("profanity_check")
    stub.__spec__ = ModuleSpec("profanity_check", None)
    stub.predict_prob = lambda texts: [0.9 if "tox" in text else 0.2 for text in texts]
    monkeypatch.setitem(sys.modules, "profanity_check", stub)
    scorer = build_scorer("linear", [], 1)
    scores = scorer(["tox1", "calm"])
    assert scores.tolist() == pytest.approx([0.9, 0.2])
    assert (scores > scorer.threshold).tolist() == [True, False]


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(folder)


BERT: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
BERT |= {"vocab_size": len(WORDS), "max_position_embeddings": 16}


def test_a_classifier_of_transformers(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**BERT, num_labels=3, initializer_range=0.5)).eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    texts = ["the soup is calm", "tox1", "the song is tox2 and tox1"]
    ids = [torch.tensor([[WORDS.index(word) for word in text.split()]]) for text in texts]
    with torch.no_grad():
        expected = [model(input_ids=row).logits.softmax(dim=1)[0, 2].item() for row in ids]
    scorer = Classifier(str(tmp_path), label=2, batch_size=2)
    assert scorer(texts).tolist() == pytest.approx(expected, abs=1e-5)
    assert scorer([]).shape == (0,)
    with pytest.raises(ValueError, match="label: 3 is not accepted; .* has classes 0 to 2"):
        Classifier(str(tmp_path), label=3)


def test_embeddings_are_the_mean_over_words_whatever_the_batch(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(**BERT, initializer_range=0.5)).eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    left, right = ["the soup is calm", "tox1", "song"], ["the soup", "tox2 and calm", "song"]

    def mean(text: str) -> Tensor:
        ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
        return model(input_ids=ids).last_hidden_state[0].mean(dim=0)

    with torch.no_grad():
        expected = [torch.cosine_similarity(mean(a), mean(b), dim=0).item() for a, b in zip(left, right, strict=True)]
    got = SentenceEmbedding(str(tmp_path), batch_size=2)(left, right)
    assert got.tolist() == pytest.approx(expected, abs=1e-5)
    assert got[2].item() == pytest.approx(1.0, abs=1e-5)
    values = run(ControlledGeneration(samples=1, similarity=str(tmp_path)), tmp_path)
    assert -1 <= values["test/sim"] <= 1


def test_diversity_and_word_overlap() -> None:
    assert distinct_ngrams("a b a b", 1) == 0.5
    assert distinct_ngrams("a b a b", 2) == pytest.approx(2 / 3)
    assert distinct_ngrams("a", 2) is None
    assert word_cosine("a a b", "A c") == pytest.approx(2 / (5**0.5 * 2**0.5))
    assert word_cosine("", "a") == 0


# ---------------------------------------------------------------- black box


def small_world(**changes: Any) -> tuple[PerplexitySets, ContrastivePerplexity]:
    data = PerplexitySets(num_anchors=8, val_documents=4, test_documents=4, test_prompts=5, eval_batch_size=4)
    lm = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    lm |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    facts = {"vocab_size": data.vocab_size, "eos_id": data.eos_id}
    torch.manual_seed(0)
    return data, ContrastivePerplexity(lm, max_new_tokens=4, **facts, **changes)  # type: ignore[arg-type]


def parrot(model: ContrastivePerplexity, data: PerplexitySets, word: str) -> None:
    """Make a model write one word again and again."""
    with torch.no_grad():
        direction = torch.ones(16)
        model.lm.model.embed_tokens.weight.copy_(direction.expand_as(model.lm.model.embed_tokens.weight))
        model.lm.model.layers[0].self_attn.o_proj.weight.zero_()
        model.lm.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm.lm_head.weight.zero_()
        model.lm.lm_head.weight[data.world.token[word]] = 10 * direction


def test_the_output_of_another_run_is_rewritten(tmp_path: Path) -> None:
    data, source = small_world()
    parrot(source, data, "tox03")
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(source)
    trainer.save_checkpoint(tmp_path / "source.ckpt")
    _, model = small_world()
    parrot(model, data, "calm")
    given: list[list[str]] = []
    generate = model.generate
    model.generate = lambda ids, *args: given.append(data.decode(ids)) or generate(ids, *args)  # type: ignore
    callback = ControlledGeneration(source=str(tmp_path / "source.ckpt"), source_template="i think the soup {text}")
    values = run(callback, tmp_path, data, model)
    state = torch.random.get_rng_state()
    load_source(str(tmp_path / "source.ckpt"), model)
    assert torch.equal(torch.random.get_rng_state(), state), "reading the source draws nothing"
    assert values["test/source_unwanted_rate"] == 1
    assert values["test/source_unwanted_share"] == 1
    assert values["test/blackbox_unwanted_rate"] == 0
    assert values["test/unwanted_rate"] == 0
    rewritten = [row for rows in given for row in rows if row.startswith("i think")]
    assert rewritten == ["i think the soup tox03 tox03 tox03 tox03"] * 5, "the unwanted prompts' continuations alone"


def test_the_output_of_a_model_with_another_tokenizer_is_rewritten(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lm = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    other: Any = build_lm(lm, len(WORDS))
    with torch.no_grad():  # tied embeddings: the last norm's bias alone decides, which makes it write `tox1`
        other.transformer.ln_f.weight.zero_()
        other.transformer.ln_f.bias.copy_(50 * other.transformer.wte.weight[WORDS.index("tox1")])
    other.save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other")

    class Open(Data):
        unwanted_words = ("tox1", "tox2")

    data = Open()
    model = Scripted(data)
    model.save_hyperparameters({"max_new_tokens": 3, "temperature": 0.0, "top_p": 1.0})
    callback = ControlledGeneration(source=str(tmp_path / "other"), source_template="the soup is calm and {text}")
    values = run(callback, tmp_path, data, model)
    assert values["test/source_unwanted_share"] == 1
    given = [prompt for prompts, _ in model.calls for prompt in prompts if prompt.startswith("the soup is calm and")]
    assert given == ["the soup is calm and tox1 tox1 tox1"] * 3
    assert values["test/blackbox_unwanted_rate"] == 1, "the scripted model repeats the last word"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "controlled_generation: samples must be at least 1, got 0"),
        ({"every_n_validations": 0}, "every_n_validations must be at least 1"),
        ({"source_template": "rewrite"}, "source_template 'rewrite' lacks {text}"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ControlledGeneration(**changes)
