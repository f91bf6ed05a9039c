"""The options of `fit`, `validate`, `test` and `predict`, read from the command line without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from zoo.errors import UsageError, did_you_mean

WANDB_MODES = ("offline", "online", "disabled")

#: Options with a value that are ours; everything else is a key of the config.
OWN = {"config": "configs", "run_dir": "run_dir", "resume": "resume", "wandb": "wandb"}


@dataclass
class Options:
    """One call of a trainer command.

    Attributes:
        command: `fit`, `validate`, `test` or `predict`.
        configs: Config files or names, from left to right.
        overrides: Dotted option and raw value (None for a bare flag), in the order given.
        run_dir: Directory of the run, or None for a new one below `runs/`.
        resume: Directory of the run to continue.
        wandb: `offline`, `online` or `disabled`; None follows `WANDB_MODE`, and is offline without it.
        show: `""`, `config` (print it and stop) or `help`.
    """

    command: str
    configs: list[str] = field(default_factory=list)
    overrides: list[tuple[str, str | None]] = field(default_factory=list)
    run_dir: str | None = None
    resume: str | None = None
    wandb: str | None = None
    show: str = ""


def parse_options(command: str, argv: Sequence[str]) -> Options:
    """Read `argv` of a trainer command.

    Raises:
        UsageError: For words that are no options and options without their value.
    """
    options = Options(command)
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            options.show = "help"
            continue
        if word == "--print_config":
            options.show = "config"
            continue
        if word == "-c":
            word = "--config"
        if not word.startswith("--") or word == "--":
            raise UsageError(
                f"{word!r} is not an option of {command}", "options look like --config suave/smoke or --model.lr 0.1"
            )
        key, has_value, value = word[2:].partition("=")
        text: str | None = value if has_value else None
        if text is None and words and not words[0].startswith("--"):
            text = words.pop(0)
        if key in OWN:
            if not text:
                raise UsageError(f"--{key} needs a value")
            if key == "config":
                options.configs.append(text)
            else:
                setattr(options, OWN[key], text)
        else:
            options.overrides.append((key, text))
    if options.wandb is not None and options.wandb not in WANDB_MODES:
        raise UsageError(f"--wandb {options.wandb!r} is not a mode", did_you_mean(options.wandb, WANDB_MODES))
    return options
