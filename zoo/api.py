"""Runs from Python: the same path as the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from zoo.config import option_text
from zoo.options import Options, parse_options
from zoo.runs import RunResult


def run(
    command: str,
    *,
    config: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
    overrides: Mapping[str, Any] | None = None,
    run_dir: str | PathLike[str] | None = None,
    resume: str | PathLike[str] | None = None,
    wandb: str | None = None,
) -> RunResult:
    """Run `fit`, `validate`, `test` or `predict`, exactly as the command line does.

    Args:
        command: What to run.
        config: Config files or shipped names (`"suave/smoke"`), merged from left to right.
        overrides: Dotted keys and values laid over the configs: `{"model.lr": 0.1, "trainer.max_steps": 10}`.
        run_dir: Directory of the run; a new one below `runs/` if None.
        resume: Directory of the run to continue.
        wandb: `offline` (default), `online` or `disabled`.

    Returns:
        Directory, final metrics, model and trainer.

    Raises:
        UsageError: If names, options or files are wrong, as on the command line.
    """
    from zoo import registry

    registry.claim_packages()
    from zoo.cli import run_command

    own = {"run_dir": run_dir, "resume": resume, "wandb": wandb}
    options: Options = parse_options(command, words(config, overrides or {}, own))
    return run_command(options)


def words(
    config: str | PathLike[str] | Sequence[str | PathLike[str]],
    overrides: Mapping[str, Any],
    own: Mapping[str, Any],
) -> list[str]:
    """Return the options of a call as the command line takes them.

    Args:
        config: Config files or shipped names.
        overrides: Dotted keys and values.
        own: Further options (`run_dir`, `resume`, `wandb`); None leaves one out.
    """
    files = [config] if isinstance(config, str | PathLike) else list(config)
    out = [word for file in files for word in ("--config", str(file))]
    out += [f"--{option_text(key, value)}" for key, value in overrides.items()]
    return out + [f"--{key}={value}" for key, value in own.items() if value is not None]
