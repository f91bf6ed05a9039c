"""Text: cleaning, splitting by document, tokenizers, packing, and the cache of tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from datamodules.text import (
    BPETokenizer,
    ByteTokenizer,
    Document,
    Text,
    TextBlocks,
    clean,
    corpus_files,
    docstrings,
    pack,
    paragraphs,
    split_of,
    token_stream,
)

PROSE = "The quick brown fox number {} jumps over the lazy dog and goes home, as foxes of this kind will do."


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    (root / "sub").mkdir(parents=True)
    for i in range(40):
        (root / "sub" / f"{i}.txt").write_text("\n\n".join(PROSE.format(i * 100 + j) for j in range(5)))
    lines = [json.dumps({"text": PROSE.format(f"line {i}")}) for i in range(10)]
    (root / "more.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_prose_is_what_stays() -> None:
    text = f"short\n\n{'1234567890' * 9}\n\n   {PROSE}\n   second line\n\n\n{PROSE} again"
    assert list(paragraphs(text)) == [f"{PROSE}\nsecond line", f"{PROSE} again"]


def test_docstrings_are_found_and_other_strings_are_not() -> None:
    source = 'def f():\n    r"""One."""\n    x = """no docstring"""\n\nclass A:\n    """Two\n    lines."""\n'
    assert docstrings(source) == "One.\n\nTwo\n    lines."


def test_a_paragraph_stays_once_in_the_corpus() -> None:
    one, two = PROSE.format(1), PROSE.format(2)
    documents = [Document("a", f"{one}\n\n{two}\n\n{one}"), Document("b", two), Document("c", "no")]
    assert clean(documents) == [Document("a", f"{one}\n\n{two}")]


def test_the_split_follows_from_the_name_in_the_asked_proportions() -> None:
    parts = [split_of(f"file{i}.py", 0.1, 0.3) for i in range(4000)]
    assert parts == [split_of(f"file{i}.py", 0.1, 0.3) for i in range(4000)]
    assert parts.count("val") / 4000 == pytest.approx(0.1, abs=0.02)
    assert parts.count("test") / 4000 == pytest.approx(0.3, abs=0.03)
    assert {split_of(f"file{i}", 0, 0) for i in range(99)} == {"train"}


def test_bytes_and_bpe_give_the_text_back() -> None:
    text = "naïve — Grüße, 東京 \n\t x"
    bpe = BPETokenizer.train([PROSE.format(i) for i in range(50)], 300)
    assert bpe.vocab_size == 300
    for tokenizer in (ByteTokenizer(), bpe):
        (ids,) = tokenizer.encode([text])
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer.vocab_size
        assert tokenizer.eos_id not in ids
    assert len(bpe.encode([PROSE])[0]) < len(PROSE) / 2


def test_training_a_tokenizer_gives_the_same_one_again() -> None:
    texts = [PROSE.format(i) for i in range(50)]
    a, b = (BPETokenizer.train(texts, 290).inner.to_str() for _ in range(2))
    assert a == b


def test_packing_predicts_every_token_once() -> None:
    stream = token_stream([Document("a", "abcde"), Document("b", "fghij")], ByteTokenizer())
    assert stream.tolist() == [*b"abcde", 256, *b"fghij", 256]
    blocks = pack(stream, 3)
    assert blocks[:, :-1].tolist() == [[*b"abc"], [*b"de", 256], [*b"fgh"]]
    assert blocks[:, 1:].flatten().tolist() == stream[1:10].tolist()
    assert pack(stream[:3], 3).shape == (0, 4)


def test_batches_are_shuffled_in_training_and_in_order_in_evaluation() -> None:
    blocks = torch.arange(7 * 4, dtype=torch.int32).reshape(7, 4)
    train, evaluation = TextBlocks(blocks, 2, seed=3), TextBlocks(blocks, 2, seed=None)
    assert (len(train), len(evaluation)) == (3, 4)
    seen = torch.cat([evaluation.batch(0, i)["input_ids"] for i in range(4)])
    assert torch.equal(seen, blocks[:, :-1].long())
    first, second = ([train.batch(epoch, i) for i in range(3)] for epoch in (0, 1))
    rows = torch.cat([b["input_ids"][:, 0] for b in first])
    assert len(rows.unique()) == 6
    assert not torch.equal(rows, torch.cat([b["input_ids"][:, 0] for b in second]))
    assert torch.equal(first[1]["labels"], train.batch(0, 1)["labels"])
    assert torch.equal(first[0]["input_ids"][:, 1:], first[0]["labels"][:, :-1])


def test_ranks_see_slices_of_one_batch() -> None:
    blocks = torch.arange(8 * 3).reshape(8, 3)
    whole = TextBlocks(blocks, 4, seed=1).batch(2, 1)["input_ids"]
    parts = []
    for rank in range(2):
        batches = TextBlocks(blocks, 4, seed=1)
        batches.rank, batches.world_size = rank, 2
        parts.append(batches.batch(2, 1)["input_ids"])
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_documents_are_never_in_two_parts(folder: Path, tokenizer: str) -> None:
    data = Text(str(folder), tokenizer, 300, block_size=16, batch_size=2, val_fraction=0.2, test_fraction=0.2)
    assert data.vocab_size == (257 if tokenizer == "bytes" else 300)
    data.setup("fit")
    described = json.loads((data._cached() / "corpus.json").read_text())
    names = [set(described["documents"][part]) for part in ("train", "val", "test")]
    assert len(set.union(*names)) == sum(map(len, names)) == 50
    assert all(names)
    assert data.encoder.vocab_size == data.vocab_size
    assert data.encoder.eos_id == data.eos_id
    words = data.encoder.decode(data.blocks["val"][:, 1:].flatten().tolist())
    mine = {int(n.split("/")[1][:-4]) for n in names[1] if n.startswith("sub")}
    assert all(f"number {100 * i + 1} " in words for i in sorted(mine)[:2])
    assert not any(f"number {100 * i + 1} " in words for i in range(40) if i not in mine)


def test_tokens_come_from_the_cache_until_a_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Text:
        return Text(str(folder), "bpe", 300, block_size=16, batch_size=2)

    first = make()
    first.setup("fit")
    with monkeypatch.context() as patched:
        patched.setattr(Text, "documents", lambda self: pytest.fail("read again"))
        again = make()
        again.setup("fit")
    assert torch.equal(first.blocks["train"], again.blocks["train"])
    assert first.tokenizer_id == again.tokenizer_id
    (folder / "sub" / "0.txt").write_text(PROSE.format("of another kind"))
    changed = make()
    assert changed.tokenizer_id != first.tokenizer_id
    changed.setup("fit")
    assert len(changed.blocks["train"]) < len(first.blocks["train"])


def test_a_saved_tokenizer_is_taken(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    BPETokenizer.train([PROSE], 270).inner.save(str(path))
    data = Text(str(folder), str(path), block_size=16, batch_size=2)
    assert data.vocab_size == 270
    data.setup("fit")
    assert int(data.blocks["train"].max()) < 270


def test_a_data_set_of_the_datasets_library_is_read(folder: Path) -> None:
    pytest.importorskip("datasets")
    data = Text(f"hf:{folder / 'more.jsonl'}", "bytes", block_size=16, batch_size=2)
    assert [d.text for d in data.documents()] == [PROSE.format(f"line {i}") for i in range(10)]
    with pytest.raises(ValueError, match="text_column: 'words' is not in .* accepted: text"):
        Text(f"hf:{folder / 'more.jsonl'}", "bytes", text_column="words").documents()


def test_the_python_corpus_is_on_this_machine() -> None:
    names = [name for name, _ in corpus_files("python")]
    assert "pydoc_data/topics.py" in names
    assert "json/__init__.py" in names
    assert not any("site-packages" in name for name in names)


def test_evaluation_blocks_are_spread_evenly(folder: Path) -> None:
    every = Text(str(folder), "bytes", block_size=16, batch_size=2, test_fraction=0.3)
    some = Text(str(folder), "bytes", block_size=16, batch_size=2, test_fraction=0.3, eval_blocks=4)
    every.setup("test")
    some.setup("test")
    count = len(every.blocks["test"])
    assert torch.equal(some.blocks["test"], every.blocks["test"][[0, count // 4, count // 2, 3 * count // 4]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size: 0 is not accepted; accepted: 1 or more"),
        ({"vocab_size": 99}, "vocab_size: 99 is not accepted; accepted: 257 or more"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "together less than 1"),
    ],
)
def test_values_out_of_range_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Text(**options)  # type: ignore[arg-type]


def test_a_corpus_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no text for corpus .*accepted: python, packages"):
        Text(str(tmp_path / "absent")).prepare_data()


def test_more_asked_than_there_is(folder: Path) -> None:
    with pytest.raises(ValueError, match="batch_size: 100000 is more than the"):
        Text(str(folder), "bytes", block_size=16, batch_size=100_000).setup("fit")
