"""Text for language models: corpora that are on every machine, tokenizers that need no network, blocks of one length.

A corpus is a list of named documents. Which one is meant is a word: `python` (topics of the language reference and
docstrings of the standard library), `packages` (docstrings of installed packages), `hf:NAME` (a data set of the hub) or
a path. Documents, never parts of one, are divided into training, validation and test.

Longer than other files: corpora, tokenizers and blocks stand together because what is kept in the cache is keyed by all
three, and a change of one must be seen by the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from datamodules.loading import Batches, ResumableLoader, ZooDataModule, epoch_permutation

#: Packages whose docstrings are the corpus `packages`; the zoo needs all of them.
PACKAGES = ("matplotlib", "numpy", "scipy", "timm", "torch", "torchmetrics", "torchvision", "transformers")
#: Parts of a split.
SPLITS = ("train", "val", "test")
#: Label of a position that does not count.
IGNORE = -100
_SKIPPED = {"site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "__pycache__"}
_DOCSTRING = re.compile(r'^[ \t]*[rR]?"""(.*?)"""', re.DOTALL | re.MULTILINE)
_SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
_VERSION = 1  # of what is kept in the cache


class TextBatch(TypedDict):
    """`B` blocks of `T` tokens."""

    input_ids: Tensor
    """int64 `[B, T]`."""
    labels: Tensor
    """int64 `[B, T]`, already shifted: what follows `input_ids[:, : t + 1]`; -100 where nothing counts."""


class Document(NamedTuple):
    """A text with a name that is the same on every machine."""

    name: str
    text: str


# Corpora


def paragraphs(text: str, min_chars: int = 60, min_letters: float = 0.75) -> Iterator[str]:
    """Yield the paragraphs of a text that are prose: long enough, mostly letters and blanks."""
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in paragraph.strip().splitlines()]
        joined = "\n".join(lines)
        if len(joined) < min_chars:
            continue
        if sum(c.isalpha() or c.isspace() for c in joined) >= min_letters * len(joined):
            yield joined


def docstrings(source: str) -> str:
    """Return the triple-quoted strings that begin a line of a Python file, with blank lines between them."""
    return "\n\n".join(match.group(1) for match in _DOCSTRING.finditer(source))


def _python_files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*.py") if not _SKIPPED & set(p.relative_to(root).parts))


def corpus_files(corpus: str) -> list[tuple[str, Path]]:
    """Return the files of a corpus with their names in it, sorted by name.

    Args:
        corpus: `python`, `packages`, or the path of a file or folder of .txt, .md, .rst (a document each) or .jsonl
            (a document a line, under the key `text`).

    Raises:
        FileNotFoundError: If there are none.
    """
    paths = sysconfig.get_paths()
    found: list[tuple[str, Path]] = []
    if corpus == "python":
        root = Path(paths["stdlib"])
        found = [(str(p.relative_to(root)), p) for p in _python_files(root)]
        topics = root / "pydoc_data" / "topics.py"
        found += [("pydoc_data/topics.py", topics)] if topics.is_file() else []
    elif corpus == "packages":
        for package in PACKAGES:
            homes = [Path(paths[kind]) for kind in ("purelib", "platlib") if (Path(paths[kind]) / package).is_dir()]
            for home in homes[:1]:
                found += [(str(p.relative_to(home)), p) for p in _python_files(home / package)]
    else:
        root = Path(corpus).expanduser()
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in _SUFFIXES)
        found = [(p.name if p == root else str(p.relative_to(root)), p) for p in files]
    if not found:
        raise FileNotFoundError(
            f"no text for corpus {corpus!r}; accepted: python, packages, hf:NAME, or a file or folder with "
            f"{', '.join(_SUFFIXES)} files"
        )
    return sorted(found)


def _read(name: str, path: Path) -> Iterator[Document]:
    if path.name == "topics.py":
        import ast

        assigned = next(n for n in ast.parse(path.read_text("utf-8")).body if isinstance(n, ast.Assign))
        for topic, text in ast.literal_eval(assigned.value).items():
            yield Document(f"{name}:{topic}", text)
    elif path.suffix == ".py":
        yield Document(name, docstrings(path.read_text("utf-8", errors="ignore")))
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for i, line in enumerate(lines):
                yield Document(f"{name}:{i}", json.loads(line)["text"])
    else:
        yield Document(name, path.read_text("utf-8", errors="replace"))


def _read_hub(name: str, config: str | None, split: str, column: str) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"corpus: 'hf:{name}' needs the extra: pip install 'method-zoo[data]'") from error
    source = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
    local = Path(name).expanduser()
    if local.suffix in source and local.is_file():
        rows = load_dataset(source[local.suffix], data_files=str(local), split="train")
    else:
        rows = load_dataset(name, config, split=split)
    if column not in rows.column_names:
        raise ValueError(f"text_column: {column!r} is not in {name}; accepted: {', '.join(rows.column_names)}")
    for i, text in enumerate(rows[column]):
        yield Document(f"{name}:{i}", text)


def clean(documents: Iterable[Document]) -> list[Document]:
    """Keep the prose of each document, every paragraph once in the corpus; documents without any are left out."""
    seen: set[str] = set()
    kept: list[Document] = []
    for document in documents:
        new = [p for p in dict.fromkeys(paragraphs(document.text)) if p not in seen]
        seen.update(new)
        if new:
            kept.append(Document(document.name, "\n\n".join(new)))
    return kept


def split_of(name: str, val_fraction: float, test_fraction: float) -> str:
    """Return the part of the split that a document belongs to: a function of its name alone."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "test" if place < test_fraction else "val" if place < test_fraction + val_fraction else "train"


def corpus_hash(documents: Iterable[Document]) -> str:
    """Return a hash of names and texts, hexadecimal."""
    digest = hashlib.sha256()
    for document in documents:
        for part in document:
            digest.update(part.encode() + b"\0")
    return digest.hexdigest()


# Tokenizers


class Tokenizer(Protocol):
    """What the datamodules need of a tokenizer."""

    vocab_size: int
    eos_id: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, without special ones."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens."""


class ByteTokenizer:
    """The bytes of UTF-8 are the tokens; 256 ends a document."""

    vocab_size, eos_id = 257, 256

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the bytes of each text."""
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some bytes; the end token and broken characters are replaced."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class BPETokenizer:
    """A tokenizer of the `tokenizers` library.

    Args:
        tokenizer: `tokenizers.Tokenizer`.
        eos: Its token that ends a document.
    """

    def __init__(self, tokenizer: Any, eos: str = "<|endoftext|>") -> None:
        self.inner = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        eos_id = tokenizer.token_to_id(eos)
        if eos_id is None:
            raise ValueError(f"the tokenizer has no token {eos!r} that could end a document")
        self.eos_id: int = eos_id

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Train byte-level BPE with `vocab_size` tokens, the 256 bytes and the end token among them."""
        from tokenizers import Tokenizer as Inner
        from tokenizers import decoders, models, pre_tokenizers, trainers

        tokenizer = Inner(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str) -> BPETokenizer:
        """Read a `tokenizer.json`, or the tokenizer of a `transformers` model by path or name.

        Raises:
            ValueError: If it cannot be loaded or has no end token.
        """
        if path.endswith(".json"):
            from tokenizers import Tokenizer as Inner

            return cls(Inner.from_file(str(Path(path).expanduser())))
        from transformers import AutoTokenizer

        try:
            fast = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except OSError as error:
            raise ValueError(f"tokenizer: {path!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        if fast.eos_token is None:
            raise ValueError(f"tokenizer: {path!r} has no token that ends a document")
        return cls(fast.backend_tokenizer, fast.eos_token)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, without special ones."""
        return [e.ids for e in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, special ones left out."""
        return str(self.inner.decode(list(ids)))


# Tokens


def token_stream(documents: Sequence[Document], tokenizer: Tokenizer) -> Tensor:
    """Tokens of all documents in a row, each with an end token after it; int32 `[N]`."""
    encoded = tokenizer.encode([document.text for document in documents])
    parts = [torch.tensor([*ids, tokenizer.eos_id], dtype=torch.int32) for ids in encoded]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)


def pack(stream: Tensor, block_size: int) -> Tensor:
    """Cut a stream `[N]` into `[M, block_size + 1]`: inputs and, shifted by one, labels.

    Blocks share one token, so that every token but the first is predicted once. What is left at the end is dropped.
    """
    count = max((len(stream) - 1) // block_size, 0)
    if not count:
        return stream.new_empty(0, block_size + 1)
    return stream[: count * block_size + 1].unfold(0, block_size + 1, block_size)


class TextBlocks(Batches):
    """Packed blocks, as they are in evaluation and shuffled by `(seed, epoch)` in training.

    Args:
        blocks: `[M, block_size + 1]` from `pack`.
        batch_size: Blocks in a (global) batch.
        seed: Seed of the order; None keeps it, and then a last batch may be smaller.
    """

    def __init__(self, blocks: Tensor, batch_size: int, seed: int | None) -> None:
        self.blocks, self.batch_size, self.seed = blocks, batch_size, seed

    def __len__(self) -> int:
        whole, rest = divmod(len(self.blocks), self.batch_size)
        return whole + (self.seed is None and rest > 0)

    def batch(self, epoch: int, index: int) -> TextBatch:
        chosen = torch.arange(index * self.batch_size, min((index + 1) * self.batch_size, len(self.blocks)))
        if self.seed is not None:
            chosen = epoch_permutation(len(self.blocks), self.seed, epoch)[chosen]
        block = self.blocks[chosen[self.rows(len(chosen))]].long()
        return {"input_ids": block[:, :-1].contiguous(), "labels": block[:, 1:].contiguous()}


class Text(ZooDataModule):
    """Blocks of text for causal language models; batches are `TextBatch`.

    Which files were read and the hash of the cleaned corpus are written to `corpus.json` in the run directory. The
    tokens are kept in `$ZOO_CACHE` (else `~/.cache/method-zoo`) and made anew when a file of the corpus changes.

    Args:
        corpus: `python`: topics of the language reference and docstrings of the standard library, about 2 million
            characters. `packages`: docstrings of the installed packages that the zoo needs, about ten times as many.
            `hf:NAME`: a data set of the hub or a local .json, .parquet, .csv file. Else the path of a file or folder of
            .txt, .md, .rst or .jsonl files.
        tokenizer: `bytes`; `bpe`: byte-level BPE trained on the training part; a tokenizer.json; or name or path of a
            `transformers` model, whose tokenizer is taken.
        vocab_size: Tokens of `bpe`; other tokenizers have their own number.
        block_size: Tokens of a block.
        batch_size: Blocks in a (global) batch.
        eval_batch_size: Blocks in a batch of evaluation.
        val_fraction: Fraction of the documents for validation.
        test_fraction: Fraction of the documents for test.
        eval_blocks: Most blocks of validation and of test, evenly spread; null for all.
        hub_config: Configuration of a data set of the hub.
        hub_split: Its split that is divided into the three parts.
        text_column: Its column that holds the text.
        num_workers: Loader processes; 0 is best for tokens in memory.
        data_seed: Seed of the order.
    """

    blocks: dict[str, Tensor]
    encoder: Tokenizer

    def __init__(
        self,
        corpus: str = "python",
        tokenizer: str = "bpe",
        vocab_size: int = 2048,
        block_size: int = 256,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        eval_blocks: int | None = None,
        hub_config: str | None = None,
        hub_split: str = "train",
        text_column: str = "text",
        num_workers: int = 0,
        data_seed: int = 0,
    ) -> None:
        super().__init__(num_workers, data_seed)
        for key, value, least in (
            ("block_size", block_size, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("eval_blocks", 1 if eval_blocks is None else eval_blocks, 1),
            ("vocab_size", vocab_size, 257 if tokenizer == "bpe" else 1),
        ):
            if value < least:
                raise ValueError(f"{key}: {value} is not accepted; accepted: {least} or more")
        if val_fraction < 0 or test_fraction < 0 or val_fraction + test_fraction >= 1:
            raise ValueError(
                f"val_fraction: {val_fraction} and test_fraction: {test_fraction} are not accepted; accepted: 0 or "
                "more, together less than 1"
            )
        self.corpus, self.tokenizer, self.block_size = corpus, tokenizer, block_size
        self.batch_size, self.eval_batch_size, self.eval_blocks = batch_size, eval_batch_size, eval_blocks
        self.fractions = (val_fraction, test_fraction)
        self.hub = (hub_config, hub_split, text_column)
        self._asked_vocab = vocab_size
        self._loaded = BPETokenizer.load(tokenizer) if tokenizer not in ("bytes", "bpe") else None
        self.blocks = {}

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the end token among them."""
        if self.tokenizer == "bpe":
            return self._asked_vocab
        return ByteTokenizer.vocab_size if self._loaded is None else self._loaded.vocab_size

    @property
    def eos_id(self) -> int:
        """Token that ends a document."""
        if self.tokenizer == "bpe":
            return 0
        return ByteTokenizer.eos_id if self._loaded is None else self._loaded.eos_id

    @property
    def tokenizer_id(self) -> str:
        """Hash of what the tokenizer follows from: two data with the same one agree on the meaning of tokens."""
        if self.tokenizer == "bytes":
            return "bytes"
        if self._loaded is not None:
            return hashlib.sha256(self._loaded.inner.to_str().encode()).hexdigest()[:16]
        return hashlib.sha256(repr((self._key, self._asked_vocab)).encode()).hexdigest()[:16]

    @cached_property
    def _key(self) -> Any:
        """What the cleaned documents and their split follow from, without reading them."""
        if self.corpus.startswith("hf:"):
            return (_VERSION, self.corpus, self.hub, self.fractions)
        states = [(name, path.stat()) for name, path in corpus_files(self.corpus)]
        return (_VERSION, [(name, state.st_size, state.st_mtime_ns) for name, state in states], self.fractions)

    def documents(self) -> list[Document]:
        """Read and clean the corpus."""
        if self.corpus.startswith("hf:"):
            return clean(_read_hub(self.corpus.removeprefix("hf:"), *self.hub))
        return clean(document for name, path in corpus_files(self.corpus) for document in _read(name, path))

    def prepare_data(self) -> None:
        """Look for the files of the corpus; tokenize them if that is not in the cache."""
        self._cached()

    def _cached(self) -> Path:
        """Return the folder that holds tokens, tokenizer and a description of the corpus; make it if need be."""
        key = hashlib.sha256(repr((self._key, self.tokenizer_id)).encode()).hexdigest()[:20]
        home = Path(os.environ.get("ZOO_CACHE") or Path.home() / ".cache" / "method-zoo") / "text"
        folder = home / key
        if folder.is_dir():
            return folder
        from safetensors.torch import save_file

        documents = self.documents()
        parts = {part: [d for d in documents if split_of(d.name, *self.fractions) == part] for part in SPLITS}
        encoder = self._loaded or ByteTokenizer()
        if self.tokenizer == "bpe":
            encoder = BPETokenizer.train((d.text for d in parts["train"]), self._asked_vocab)
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            streams = {part: token_stream(parts[part], encoder) for part in SPLITS}
            save_file(streams, made / "tokens.safetensors")
            if isinstance(encoder, BPETokenizer):
                encoder.inner.save(str(made / "tokenizer.json"))
            description = {
                "corpus": self.corpus,
                "hash": corpus_hash(documents),
                "characters": sum(len(d.text) for d in documents),
                "tokens": {part: len(stream) for part, stream in streams.items()},
                "documents": {part: [d.name for d in parts[part]] for part in SPLITS},
            }
            (made / "corpus.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
            try:
                made.rename(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
        return folder

    def setup(self, stage: str) -> None:
        """Read the tokens and cut them into blocks."""
        if self.blocks:
            return
        from safetensors.torch import load_file

        folder = self._cached()
        self.encoder = self._loaded or ByteTokenizer()
        if self.tokenizer == "bpe":
            self.encoder = BPETokenizer.load(str(folder / "tokenizer.json"))
        streams = load_file(folder / "tokens.safetensors")
        self.blocks = {part: pack(streams[part], self.block_size) for part in SPLITS}
        for part in SPLITS[1:]:
            self.blocks[part] = _spread(self.blocks[part], self.eval_blocks)
        if stage == "fit":
            if len(self.blocks["train"]) < self.batch_size:
                raise ValueError(
                    f"batch_size: {self.batch_size} is more than the {len(self.blocks['train'])} blocks of "
                    f"{self.block_size} tokens that corpus {self.corpus!r} has for training"
                )
            self._describe(folder)

    def _describe(self, folder: Path) -> None:
        """Copy the description of the corpus to the run directory."""
        if self.trainer is not None and self.trainer.is_global_zero:
            run = Path(self.trainer.default_root_dir)
            run.mkdir(parents=True, exist_ok=True)
            (run / "corpus.json").write_bytes((folder / "corpus.json").read_bytes())

    def _loader(self, part: str) -> ResumableLoader:
        if part == "train":
            return self.loader(TextBlocks(self.blocks[part], self.batch_size, self.data_seed))
        return self.loader(TextBlocks(self.blocks[part], self.eval_batch_size, None), same_every_epoch=True)

    def train_dataloader(self) -> ResumableLoader:
        """Blocks in shuffled order."""
        return self._loader("train")

    def val_dataloader(self) -> ResumableLoader:
        """Blocks of the validation documents."""
        return self._loader("val")

    def test_dataloader(self) -> ResumableLoader:
        """Blocks of the test documents."""
        return self._loader("test")

    def predict_dataloader(self) -> ResumableLoader:
        """Blocks of the test documents."""
        return self._loader("test")


def _spread(blocks: Tensor, count: int | None) -> Tensor:
    """Keep `count` blocks, evenly spread over all."""
    if count is None or count >= len(blocks):
        return blocks
    return blocks[torch.arange(count) * len(blocks) // count]
