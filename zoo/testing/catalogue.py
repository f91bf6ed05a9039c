"""All checks, in the order in which they run."""

from __future__ import annotations

from zoo.testing import card, checkpoint, config, golden, misuse, ranks, training
from zoo.testing.kit import Check

CHECKS: tuple[Check, ...] = (
    card.importable,
    card.imports,
    card.card,
    card.constructor,
    card.documented,
    config.configs,
    config.claims,
    training.smoke,
    card.hyperparameters,
    training.finite,
    training.metrics,
    training.gradients,
    card.figures,
    config.no_warnings,
    checkpoint.checkpoint,
    golden.golden,
    misuse.misuse,
    training.falls,
    training.bf16,
    training.accumulation,
    config.replay,
    checkpoint.resume,
    ranks.ranks,
    checkpoint.resume_epoch,
    checkpoint.resume_workers,
    checkpoint.resume_ranks,
    ranks.ranks_evaluation,
    ranks.sharded,
    training.workers,
    training.compiles,
)
