"""Sets, corpus, held-out documents and prompts of a synthetic world."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from datamodules.loading import Batches, keyed_generator
from datamodules.perplexity_sets.batches import (
    CorpusBatches,
    DocumentBatches,
    PromptBatches,
    Sentences,
    SetBatches,
    Sets,
)
from datamodules.perplexity_sets.loaders import SetsDataModule
from datamodules.perplexity_sets.worlds import BOS, EOS, PAD, WORLDS, World
from zoo.nn.sampling import left_pad

SOURCES = ("corpus", "sets")


def make_sets(world: World, anchors: int, candidates: int, seed: int) -> Sets:
    """Make sets of the training split by slot replacement: the k-th negative is the k-th positive with other words.

    Args:
        world: The world.
        anchors: How many sets `A`; each is about the noun of its anchor.
        candidates: Positives and negatives of each.
        seed: Seed of the draws.
    """
    generator = keyed_generator(seed, "anchors")
    noun = torch.randint(len(world.nouns), (anchors,), generator=generator)
    rows = noun.repeat_interleave(candidates)
    positives = world.draw(rows, torch.zeros(len(rows), 2, 2, dtype=torch.bool), "train", generator)
    negatives = world.replace_slots(positives, "train", generator)
    count = torch.full((anchors,), candidates)

    def pool(rendered: tuple[Tensor, Tensor]) -> Sentences:
        tokens, length = rendered
        return Sentences(tokens.view(anchors, candidates, -1), length.view(anchors, candidates), count)

    return Sets(pool(world.render(positives)), pool(world.render(negatives)), world.group_of(noun), matched=True)


class PerplexitySets(SetsDataModule):
    """A synthetic world: a corpus to train a base model on, or sets of wanted and unwanted text to tune it with.

    Validation and testing have two loaders: wanted and unwanted documents whose first sentence no training text begins
    with. Prompts are such first sentences.

    Args:
        world: `toxicity` (the unwanted words are placeholders) or `formality` (informal verbs are unwanted).
        source: What training reads: `corpus` or `sets`.
        positives: Positives `p` of an anchor.
        negatives: Hard negatives `n` of an anchor: the positives with every word replaced by an unwanted one.
        random_negatives: Negatives `r` of an anchor that are about nouns of other groups.
        num_anchors: Anchors in the training sets.
        candidates: Positives, and negatives, that are made for each anchor; each step draws some of them.
        corpus_size: Documents of an epoch of the corpus.
        unwanted_share: Share of documents of the corpus with unwanted words.
        unwanted_strength: Probability of an unwanted word in a slot of such a document.
        switch_share: Share of such documents whose second sentence is wanted again.
        val_documents: Held-out documents of each kind in validation.
        test_documents: The same in testing.
        val_prompts: Prompts of each kind in validation.
        test_prompts: The same in testing.
        batch_size: Anchors, or documents of the corpus, of a global batch.
        eval_batch_size: Documents, or prompts, of a batch in evaluation.
        num_workers: Loader processes.
        data_seed: Seed of all draws.

    Raises:
        ValueError: If a value is out of range or an anchor has fewer members than are drawn.
    """

    def __init__(
        self,
        world: str = "toxicity",
        source: str = "sets",
        positives: int = 5,
        negatives: int = 5,
        random_negatives: int = 0,
        num_anchors: int = 400,
        candidates: int = 15,
        corpus_size: int = 21600,
        unwanted_share: float = 0.4,
        unwanted_strength: float = 0.85,
        switch_share: float = 0.05,
        val_documents: int = 200,
        test_documents: int = 1000,
        val_prompts: int = 200,
        test_prompts: int = 800,
        batch_size: int = 4,
        eval_batch_size: int = 200,
        num_workers: int = 0,
        data_seed: int = 0,
    ) -> None:
        super().__init__(positives, negatives, random_negatives, num_workers, data_seed)
        if world not in WORLDS:
            raise ValueError(f"world: {world!r} is unknown; accepted: {', '.join(WORLDS)}")
        if source not in SOURCES:
            raise ValueError(f"source: {source!r} is unknown; accepted: {', '.join(SOURCES)}")
        for key, drawn in (("positives", positives), ("negatives", negatives)):
            if drawn > candidates:
                raise ValueError(f"{key}: {drawn} of each anchor are asked for, it has {candidates} (candidates)")
        for key, count in (
            ("val_documents", val_documents),
            ("test_documents", test_documents),
            ("val_prompts", val_prompts),
            ("test_prompts", test_prompts),
            ("eval_batch_size", eval_batch_size),
        ):
            if count < 1:
                raise ValueError(f"{key}: {count} is not accepted; accepted: 1 or more")
        for key, share in (
            ("unwanted_share", unwanted_share),
            ("unwanted_strength", unwanted_strength),
            ("switch_share", switch_share),
        ):
            if not 0 <= share <= 1:
                raise ValueError(f"{key}: {share} is not accepted; accepted: 0 to 1")
        size = num_anchors if source == "sets" else corpus_size
        if not 1 <= batch_size <= size:
            raise ValueError(f"batch_size: {batch_size} is not accepted; accepted: 1 to {size}")
        self.world, self.source, self.batch_size, self.eval_batch_size = (
            WORLDS[world],
            source,
            batch_size,
            eval_batch_size,
        )
        self.num_anchors, self.candidates, self.corpus_size = num_anchors, candidates, corpus_size
        self.mixture = (unwanted_share, unwanted_strength, switch_share)
        self.num_documents = {"val": val_documents, "test": test_documents}
        self.num_prompts = {"val": val_prompts, "test": test_prompts}

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.world.vocabulary)

    @property
    def pad_id(self) -> int:
        """Token that fills rows."""
        return PAD

    @property
    def eos_id(self) -> int:
        """Token that ends a document."""
        return EOS

    @property
    def groups(self) -> list[str]:
        """Names of the groups of nouns."""
        return list(self.world.groups)

    @property
    def unwanted_words(self) -> list[str]:
        """The unwanted lexicon."""
        return list(self.world.unwanted)

    def decode(self, tokens: Tensor) -> list[str]:
        """Return the text of each row `[D, T]`."""
        return self.world.decode(tokens)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the tokens of prompts `[D, T]`, padded on the left, and where they are, bool `[D, T]`.

        Raises:
            ValueError: If a word is none of the world's.
        """
        token = self.world.token
        if unknown := {word for text in texts for word in text.split()} - token.keys():
            raise ValueError(
                f"{len(unknown)} words of a prompt are unknown to this world; accepted: its {len(token)} words"
            )
        rows = [torch.tensor([BOS, *(token[word] for word in text.split())]) for text in texts]
        return left_pad(rows, PAD)

    def judge(self, prompts: Sequence[str], texts: Sequence[str]) -> dict[str, Tensor]:
        """Say what only this world can say of continuations, see `World.judge`."""
        return self.world.judge(prompts, texts)

    def training_batches(self) -> Batches:
        """Batches of the sets or of the corpus."""
        if self.source == "corpus":
            return CorpusBatches(self.world, self.corpus_size, self.batch_size, self.data_seed, *self.mixture)
        sets = make_sets(self.world, self.num_anchors, self.candidates, self.data_seed)
        return SetBatches(sets, self.positives, self.negatives, self.random_negatives, self.batch_size, self.data_seed)

    def document_batches(self, split: str, unwanted: bool) -> DocumentBatches:
        """Held-out documents, all of them wanted or all unwanted."""
        generator = keyed_generator(self.data_seed, "documents", split, int(unwanted))
        drawn = self.world.documents(self.num_documents[split], unwanted, split, generator)
        return DocumentBatches(*self.world.render(drawn), self.eval_batch_size)

    def prompt_batches(self, split: str) -> PromptBatches:
        """Held-out prompts, the unwanted ones first."""
        count = self.num_prompts[split]
        drawn = [
            self.world.prompts(count, kind, split, keyed_generator(self.data_seed, "prompts", split, int(kind)))
            for kind in (True, False)
        ]
        tokens, group = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        unwanted = torch.arange(2 * count) < count
        return PromptBatches(tokens, torch.ones_like(tokens, dtype=torch.bool), unwanted, group, self.eval_batch_size)
