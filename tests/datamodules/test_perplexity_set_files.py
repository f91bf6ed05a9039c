"""Sets from files as batches of tokens; a model of transformers that writes sets; the command with a scorer; a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo.main
from datamodules.perplexity_sets.files import PerplexitySetFiles
from datamodules.perplexity_sets.making import Lexicon, replace_slots
from datamodules.perplexity_sets.records import Anchor, SetRecord, read_records, write_records
from datamodules.perplexity_sets.writers import TransformersWriter
from tests.support.sentences import LEXICON, write

# ---------------------------------------------------------------- a model writes


WORDS = ["<pad>", "<end>", "USER", "ASSISTANT", ":", "soup", "calm", "kind", "Paraphrase", "<unk>"]


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """A model that writes `kind` and ends, with a tokenizer of ten words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from zoo.nn.lm import build_lm

    torch.manual_seed(0)
    lm = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    model: Any = build_lm(lm, len(WORDS))
    with torch.no_grad():  # the state at a position says which of the two comes next, by the position alone
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(20 * model.transformer.wte.weight[WORDS.index("kind")])
    model.save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_of_transformers_writes(small_model: Path) -> None:
    writer = TransformersWriter(str(small_model), max_new_tokens=4)
    seen: list[Any] = []
    writer.model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"]), with_kwargs=True)
    assert writer("soup calm", 3) == ["kind kind kind kind"] * 3
    assert [WORDS[t] for t in seen[0][0]] == ["USER", ":", "soup", "calm", "ASSISTANT", ":"]
    assert seen[0].shape[0] == 3, "one batch"
    assert writer.sampling == {"temperature": 1.0, "top_k": 25, "top_p": 1.0}
    writer.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    writer("calm", 1)
    assert [WORDS[t] for t in seen[4][0]] == ["calm"]
    with pytest.raises(ValueError, match="template: it lacks {prompt}"):
        TransformersWriter(str(small_model), template="x")


def test_the_command_scores_and_drops_what_contradicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    anchors = write(tmp_path / "anchors.txt", "the soup is calm")
    (tmp_path / "words.txt").write_text("tox01\n")
    command = ["sets", anchors, str(tmp_path / "sets.jsonl"), "--lexicon", write(tmp_path / "lexicon.json", LEXICON)]
    command += ["--scorer", "words", "--word-list", str(tmp_path / "words.txt"), "--drop-contradicted"]
    assert zoo.main.main(command) == 0
    (record,) = read_records(tmp_path / "sets.jsonl")
    assert len(record.positives) == 3
    assert record.negatives == ("the soup is tox01",)
    fields = json.loads((tmp_path / "sets.jsonl").read_text())
    assert (fields["scores"], fields["scores_toxic"]) == ([0, 0, 0], [0.25])
    assert "tox" not in capsys.readouterr().out


# ---------------------------------------------------------------- the datamodule


def make_files(tmp_path: Path, anchors: int = 6) -> dict[str, str]:
    lexicon = Lexicon(LEXICON)

    def records(split: str, count: int) -> list[SetRecord]:
        texts = [f"the {split} number {i} seems calm and old" for i in range(count)]
        made = [replace_slots(Anchor(f"{split}-{i}", "ab"[i % 2], t), lexicon, 4, 0) for i, t in enumerate(texts)]
        return [record for record in made if record is not None]

    for split, count in (("train", anchors), ("heldout", 8)):
        write_records(tmp_path / f"{split}.jsonl", records(split, count))
    return {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "heldout")}


def make_data(tmp_path: Path, **changes: Any) -> PerplexitySetFiles:
    files = {s: str(tmp_path / f"{s}.jsonl") for s in ("train", "heldout")}
    if not (tmp_path / "train.jsonl").exists():
        make_files(tmp_path)
    arguments: dict[str, Any] = {**files, "positives": 3, "negatives": 2, "val_share": 0.5}
    return PerplexitySetFiles(**(arguments | {"batch_size": 2, "eval_batch_size": 3} | changes))


def test_batches_hold_the_sentences_of_the_file(tmp_path: Path) -> None:
    data = make_data(tmp_path, random_negatives=2)
    train, _ = data.records
    batches = data.training_batches()
    assert len(batches) == 3
    for index in range(3):
        batch = batches.batch(4, index)
        assert batch["sizes"] == [3, 2, 2]
        assert batch["input_ids"].shape[:2] == (2, 7)
        for anchor, ids, mask in zip(batch["anchor_id"], batch["input_ids"], batch["attention_mask"], strict=True):
            record = train[int(anchor)]
            assert ids.gather(1, mask.sum(1, keepdim=True) - 1).eq(data.eos_id).all(), "every sentence ends"
            assert ids[:, 0].eq(data.eos_id).all(), "bytes have no token to begin with"
            texts = data.decode(ids.where(mask, data.pad_id))
            assert set(texts[:3]) <= set(record.positives)
            assert set(texts[3:5]) <= set(record.negatives)
            assert len(set(texts[:3])) == 3
            others = {text for r in train if r.group != record.group for text in r.negatives}
            assert set(texts[5:]) <= others
    seen = torch.cat([batches.batch(0, i)["anchor_id"] for i in range(3)])
    assert sorted(seen.tolist()) == list(range(6))


def test_heldout_anchors_are_divided_and_no_sentence_of_them_is_trained_on(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    found: dict[tuple[str, bool], list[str]] = {}
    for split in ("val", "test"):
        for unwanted in (False, True):
            batches = data.document_batches(split, unwanted)
            ids = [batches.batch(0, i)["input_ids"] for i in range(len(batches))]
            found[split, unwanted] = [text for part in ids for text in data.decode(part)]
            assert all(("tox" in text) == unwanted for text in found[split, unwanted])
    assert not set(found["val", True]) & set(found["test", True])
    train, heldout = data.records
    assert sum(map(len, found.values())) == sum(len(r.positives) + len(r.negatives) for r in heldout)
    trained = {text for r in train for text in (*r.positives, *r.negatives)}
    assert not trained & {text for texts in found.values() for text in texts}


def test_prompts_are_unwanted_sentences_then_anchors(tmp_path: Path) -> None:
    data = make_data(tmp_path, val_share=0.0, prompts_per_anchor=2, eval_batch_size=100, max_prompt_length=20)
    prompts = data.prompt_batches("test").batch(0, 0)
    assert prompts["prompt_is_unwanted"].tolist() == [True] * 16 + [False] * 8
    assert prompts["prompt_mask"][:, -1].all()
    assert prompts["prompt_ids"].shape[1] == 20
    texts = data.decode(prompts["prompt_ids"])
    _, heldout = data.records
    assert all(r.input.endswith(text) for r, text in zip(heldout, texts[16:], strict=True)), "a long one lost its start"
    assert [data.groups[g] for g in prompts["group"][16:].tolist()] == [r.group for r in heldout]
    with pytest.raises(ValueError, match="none of its anchors falls to val with val_share 0.0"):
        data.prompt_batches("val")


def test_long_sentences_are_cut(tmp_path: Path) -> None:
    batch = make_data(tmp_path, max_length=12).training_batches().batch(0, 0)
    assert batch["input_ids"].shape[2] == 12
    assert batch["input_ids"][:, :, -1].eq(256).all()


def test_a_tokenizer_of_transformers(tmp_path: Path, small_model: Path) -> None:
    data = make_data(tmp_path, tokenizer=str(small_model))
    assert (data.vocab_size, data.eos_id, data.pad_id) == (len(WORDS), 1, 1)
    ids, mask = data.encode(["soup calm", "kind"])
    assert ids.tolist() == [[1, 5, 6], [1, 1, 7]]
    assert mask.tolist() == [[True] * 3, [False, True, True]]
    assert data.decode(ids) == ["soup calm", "kind"]
    assert data.decode(torch.tensor([[7, 1, 6], [1, 1, 1]])) == ["kind", ""], "nothing counts after the end"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"positives": 5},
            r"train.jsonl, line 1: anchor 'train-0' has 4 positives and 4 negatives, asked for are 5 and 2",
        ),
        ({"negatives": 9}, "train.jsonl, line 1: anchor 'train-0' has 4 positives"),
        ({"positives": 5, "short_anchors": "drop"}, "no anchor is left"),
        ({"short_anchors": "keep"}, "short_anchors: 'keep' is unknown; accepted: refuse, drop"),
        ({"positives": 0}, "positives: 0"),
        ({"val_share": 1.2}, "val_share: 1.2"),
        ({"max_length": 1}, "max_length: 1 is not accepted; accepted: 2 or more"),
        ({"batch_size": 7}, r"batch_size: 7 is not accepted; accepted: 1 to 6 \(anchors\)"),
        ({"random_negatives": 4}, "random_negatives: 4 anchors of other groups are asked for, the largest group has 3"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_data(tmp_path, **changes).training_batches()


def test_overlap_of_train_and_heldout_is_refused(tmp_path: Path) -> None:
    files = make_files(tmp_path)
    with pytest.raises(ValueError, match="heldout: 6 of its anchors are anchors of train too"):
        make_data(tmp_path, heldout=files["train"]).setup("fit")


def test_a_run_on_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_files(tmp_path)
    options = ["--config", "contrastive_perplexity/smoke", "--run_dir", str(tmp_path / "run")]
    options += ["--data", "perplexity_set_files", "--data.train", files["train"], "--data.heldout", files["heldout"]]
    options += ["--data.val_share", "0.5", "--data.positives", "3", "--data.negatives", "3", "--trainer.max_steps", "3"]
    options += ["--trainer.log_every_n_steps", "1"]
    options += ["--model.lm.max_position_embeddings", "256"]
    (tmp_path / "words.txt").write_text("tox01\ntox02\ntox03\ntoxes\ntoxed\n")
    callback = {"class_path": "controlled_generation", "init_args": {"word_list": str(tmp_path / "words.txt")}}
    options += ["--trainer.callbacks", json.dumps([callback])]
    assert zoo.main.main(["fit", *options]) == 0, capsys.readouterr().err
    assert zoo.main.main(["test", "--resume", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    assert "tox0" not in printed.out + printed.err
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert {"test/unwanted_rate", "test/sim", "test/ppl_wanted", "test/unwanted_rate_a"} <= metrics.keys()
