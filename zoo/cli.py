"""`fit`, `validate`, `test` and `predict`: LightningCLI behind our config layer, and every workaround for it.

Workarounds, each with the upstream issue and a test in `tests/test_cli.py`:

* `_parse_ckpt_path` does nothing here: Lightning lets the checkpoint beat the command line (PL#21455).
* The classes are known before the parser is built, so that errors are not wrapped in Unions (jsonargparse#695).
* `SaveConfigCallback` is off: it refuses to overwrite and blocks resumes (PL#7679, PL#17115).
* `args` are given as a dictionary; Lightning warns about `sys.argv` although it is not read (PL#20722).
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from zoo import registry, runs
from zoo.checks import check_nested, check_options, import_class, parameters
from zoo.collector import paused_collector
from zoo.config import Layers, additions, differences, load_file, merge, settled, typed_layers
from zoo.errors import UsageError
from zoo.options import Options

#: Callbacks that every run has; one given in a config replaces that of its class.
DEFAULT_CALLBACKS = ("resume_checkpoint", "run_summary", "nonfinite_guard", "preemption", "figures", "progress")
#: `checkpoint: {every_n_steps: 10}` sets options of this callback without a list.
CHECKPOINT_CALLBACK = "resume_checkpoint"
DEFAULT_LOGGERS = ("csv", "wandb")
TRAINER_DEFAULTS = {
    # our loaders know their rank; Lightning would shuffle evaluation data (PL#13342) and hide the loader's state
    "use_distributed_sampler": False,
    # a check before a resume would draw random numbers
    "num_sanity_val_steps": 0,
    # the resume checkpoint does it
    "enable_checkpointing": False,
    # one line about the size is enough; `zoo info` shows the rest
    "enable_model_summary": False,
}
DIFFERENCES_SHOWN = 10


def run_command(options: Options) -> runs.RunResult:
    """Run one trainer command and return what it left.

    Raises:
        UsageError: For every mistake that the user can mend.
    """
    if options.show == "help":
        return _show_help(options)
    with paused_collector():
        layers, checkpoint = compose(options)
        classes = resolve_classes(layers)
        from zoo.job import Job
    if options.show == "config":
        print(yaml.safe_dump(replayable(layers.merged), sort_keys=False), end="")
        return runs.RunResult(Path())
    check_accelerator(layers)
    return Job(options, layers, classes, checkpoint).run()


def compose(options: Options) -> tuple[Layers, Path | None]:
    """Return the config of a call, with what a resumed run or a checkpoint brings at the bottom, and the checkpoint."""
    typed = typed_layers(options.configs, options.overrides)
    layers, checkpoint = Layers(), None
    evaluates = options.command != "fit" and options.run_dir and not typed.merged.get("ckpt_path")
    if evaluates and (Path(str(options.run_dir)) / "config.yaml").is_file():
        options.resume = options.run_dir
    if options.command == "fit" and options.resume is None and runs.restarts():
        _go_on_after_restart(options, typed)
    if options.resume is not None:
        run_dir = Path(options.resume)
        if not (run_dir / "config.yaml").is_file():
            raise UsageError(f"--resume {run_dir}: not the directory of a run: there is no config.yaml in it")
        if typed.merged.get("ckpt_path"):
            raise UsageError(
                "--resume and --ckpt_path exclude each other", "--resume finds the newest checkpoint of the run itself"
            )
        file = runs.newest_config(run_dir)
        stored = load_file(file)
        refuse_another_method(str(run_dir), stored, typed.merged, "leave out --config: the run brings its own")
        layers.add(stored, str(file))
        layers.changed = _report("this resume differs from the run", stored, typed)
        checkpoint = newest_readable(run_dir)
        if checkpoint is None and options.command == "fit":
            print(f"note: {run_dir} has no checkpoint yet; starting from the beginning", file=sys.stderr)
        # a run that was never to be fitted, such as the analysis of a given model, goes on with what its config names
        fits = runs.read_json(run_dir / "run.json").get("begun_by", "fit") == "fit"
        if checkpoint is None and options.command != "fit" and fits:
            raise UsageError(f"{run_dir} has no checkpoint to {options.command}", "fit it first")
    elif typed.merged.get("ckpt_path"):
        checkpoint = Path(typed.merged["ckpt_path"])
        stored = checkpoint_config(checkpoint, typed.merged)
        layers.add(stored, str(checkpoint))
        layers.changed = _report("the config differs from the checkpoint and wins", stored, typed)
    layers.merged = settled(merge(layers.merged, typed.merged))
    layers.origin |= typed.origin
    layers.merged.pop("ckpt_path", None)
    for key in ("model", "data"):
        if not layers.merged.get(key, {}).get("class_path"):
            group = {"model": "methods", "data": "datamodules"}[key]
            names = ", ".join(sorted({e.name for e in registry.entries(group)}))
            raise UsageError(f"no {key} is given", f"--config suave/smoke, or --{key} NAME with one of: {names}")
    return layers, checkpoint


def _go_on_after_restart(options: Options, typed: Layers) -> None:
    """Turn a fit that a launcher starts once more into a resume of the run that it had begun."""
    model = typed.merged.get("model", {}).get("class_path")
    if options.run_dir is None and model is None:
        return  # no model is given, as is said soon
    name = config_name(options)
    directory = Path(options.run_dir or runs.choose_run_dir(display_name("methods", model), name))
    if (directory / "config.yaml").is_file() and not runs.RunDirectory(directory).unused:
        options.resume, options.run_dir = str(directory), None
        if runs.global_rank() == 0:
            print(f"note: this job was started before; going on with the run in {directory}", file=sys.stderr)


def config_name(options: Options) -> str:
    """Return the name that a new run has by the config it is started with."""
    return runs.slug(Path(options.configs[0]).stem) if options.configs else "custom"


def newest_readable(run_dir: Path) -> Path | None:
    """Return the newest checkpoint of a run that can be read, and say so when newer ones cannot."""
    from callbacks.resume_checkpoint import checkpoints_newest_first, is_readable

    found = checkpoints_newest_first(run_dir)
    for path in found:
        if is_readable(path):
            return path
        print(f"warning: {path} is damaged; trying the one before", file=sys.stderr)
    if found:
        raise UsageError(f"none of the {len(found)} checkpoints in {run_dir / 'checkpoints'} can be read")
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it; tensors stay on the disk until they are used.

    Raises:
        UsageError: If it is missing or no checkpoint.
    """
    import torch

    if not path.is_file():
        raise UsageError(f"--ckpt_path {path}: there is no such file")
    if not zipfile.is_zipfile(path):
        raise UsageError(
            f"--ckpt_path {path}: not a checkpoint", "a file that torch.save has written, as fit leaves them"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UsageError(
            f"--ckpt_path {path}: cannot be read as a checkpoint: {str(error).splitlines()[0][:200]}"
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UsageError(f"--ckpt_path {path}: not a Lightning checkpoint")
    return content


def checkpoint_config(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options stored in a checkpoint as the layer below the config.

    Raises:
        UsageError: If the checkpoint belongs to another method than the config names.
    """
    content = read_checkpoint(path)
    stored = content.get("zoo", {}).get("config") or {}
    refuse_another_method(f"--ckpt_path {path}", stored, config)
    kept = {key: stored[key] for key in ("model", "data") if key in stored}
    return migrate(kept, content)


def refuse_another_method(what: str, stored: Mapping[str, Any], config: Mapping[str, Any], hint: str = "") -> None:
    """See that the config names no other method than the one of a run or checkpoint.

    Raises:
        UsageError: If it does.
    """
    theirs, ours = (layer.get("model", {}).get("class_path") for layer in (stored, config))
    if ours and theirs and ours != theirs:
        of, given = display_name("methods", theirs), display_name("methods", ours)
        raise UsageError(f"{what} is of {of}, the config is of {given}", hint)


def migrate(stored: dict[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """Let the method bring options of an older version up to date; refuse those it no longer has."""
    import lightning.pytorch as pl

    if "model" not in stored:
        return stored
    cls = import_class(stored["model"]["class_path"], "model", pl.LightningModule)
    init_args = dict(stored["model"].get("init_args", {}))
    if hasattr(cls, "migrate"):
        init_args = cls.migrate(init_args, content.get("zoo", {}).get("method_version", 1))
    unknown = [name for name in init_args if name not in parameters(cls)]
    if unknown:
        raise UsageError(
            f"the checkpoint sets {unknown[0]!r}, which {cls.__name__} no longer has",
            "use the version that wrote it, or give the method a migrate(init_args, version)",
        )
    return {**stored, "model": {**stored["model"], "init_args": init_args}}


def display_name(group: str, class_path: str) -> str:
    """Return the registered name of a class, or its path."""
    return next((e.name for e in registry.entries(group) if e.class_path == class_path), class_path)


def resolve_classes(layers: Layers) -> dict[str, type]:
    """Import model and data, complete the defaults, and check every option of the config."""
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import Logger

    config = layers.merged
    classes = {
        "model": import_class(config["model"]["class_path"], "model", pl.LightningModule),
        "data": import_class(config["data"]["class_path"], "data", pl.LightningDataModule),
    }
    for key, cls in classes.items():
        linked = links(classes["model"]) if key == "model" else {}
        check_options(f"{key}.init_args", cls, config[key].get("init_args", {}), layers, provided=linked)
    check_nested("model.init_args", classes["model"], config["model"].get("init_args", {}), layers)
    trainer = config["trainer"] = {**TRAINER_DEFAULTS, **(config.get("trainer") or {})}
    trainer["callbacks"] = _callbacks(trainer.get("callbacks"), config.get("checkpoint") or {})
    if trainer.get("logger") in (None, True):
        trainer["logger"] = [_named("loggers", name) for name in DEFAULT_LOGGERS]
    plain = {k: v for k, v in trainer.items() if k not in ("callbacks", "logger", "plugins", "strategy", "profiler")}
    check_options("trainer", pl.Trainer, plain, layers)
    for key, base in (("callbacks", pl.Callback), ("logger", Logger)):
        for item in trainer[key] or []:
            cls = import_class(item["class_path"], f"trainer.{key}", base)
            check_options(f"trainer.{key}", cls, item.get("init_args", {}), layers)
    seed = config.setdefault("seed_everything", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(
            f"{layers.place('seed_everything')}: seed_everything: expected a whole number >= 0, got {seed!r}"
        )
    return classes


def check_accelerator(layers: Layers) -> None:
    """See that this machine has the accelerator that the config asks for, before anything is started or fetched.

    Raises:
        UsageError: If it has not.
    """
    from lightning.pytorch.accelerators import AcceleratorRegistry

    wanted = layers.merged["trainer"].get("accelerator", "auto")
    known = {name: AcceleratorRegistry[name]["accelerator"] for name in AcceleratorRegistry.available_accelerators()}
    if wanted not in (*known, "gpu"):  # `auto`, an object, or a word that Lightning explains
        return
    here = sorted(name for name, accelerator in known.items() if accelerator.is_available())
    if wanted in here or (wanted == "gpu" and {"cuda", "mps"} & set(here)):
        return
    place = layers.place("trainer.accelerator")
    raise UsageError(
        f"{place}: trainer.accelerator: {wanted} is not available here; accepted: {', '.join(here)} "
        f"(add --trainer.accelerator {here[0]})"
    )


def links(model_class: object) -> dict[str, str]:
    """Constructor arguments of a method that the data provide."""
    return dict(getattr(getattr(model_class, "card", None), "links", {}))


def _named(group: str, name: str) -> dict[str, Any]:
    # ours, whatever a plugin calls its own
    own = registry.find(group, f"{registry.OWN_DISTRIBUTION}:{name}")
    return {"class_path": own.class_path, "init_args": {}}


def _callbacks(given: Any, checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = given if isinstance(given, list) else []
    defaults = [_named("callbacks", name) for name in DEFAULT_CALLBACKS]
    own = {item["class_path"] for item in defaults}
    last = {item["class_path"]: item for item in given}
    # the stored config of a run lists all of them, and one of each is enough
    given = [item for item in given if item["class_path"] not in own or item is last[item["class_path"]]]
    out = [item for item in defaults if item["class_path"] not in last] + given
    for item in out:
        if item["class_path"] == _named("callbacks", CHECKPOINT_CALLBACK)["class_path"]:
            item["init_args"] = {**item.get("init_args", {}), **checkpoint}
    return out


def replayable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that gives the same run again."""
    order = ("seed_everything", "model", "data", "checkpoint", "trainer")
    return {key: config[key] for key in order if key in config}


def _report(title: str, stored: Mapping[str, Any], typed: Layers) -> list[str]:
    """Print what differs from a stored config; returns the keys."""
    new = settled(merge(stored, typed.merged))
    changed, added = differences(stored, new), additions(stored, new)
    lines = [f"  {key}: {_change(old, value)}" for key, old, value in changed]
    lines += [f"  {key}: the default -> {value!r}" for key, value in added]
    if lines and runs.global_rank() == 0:
        print(f"{title}:", file=sys.stderr)
        for line in lines[:DIFFERENCES_SHOWN]:
            print(line, file=sys.stderr)
        if len(lines) > DIFFERENCES_SHOWN:
            print(f"  ... and {len(lines) - DIFFERENCES_SHOWN} more", file=sys.stderr)
    return [key for key, *_ in (*changed, *added)]


def _change(old: Any, new: Any) -> str:
    """Say what is new; of lists of classes only the items that come and go."""

    def names(items: list[Any], others: list[Any], sign: str) -> list[str]:
        return [f"{sign}{item['class_path'].rpartition('.')[2]}" for item in items if item not in others]

    if all(isinstance(value, list) and value and isinstance(value[0], dict) for value in (old, new)):
        return ", ".join([*names(old, new, "-"), *names(new, old, "+")]) or "another order"
    return f"{old!r} -> {new!r}"


def _show_help(options: Options) -> runs.RunResult:
    """Print what a command takes: our options and those of the classes that the config names."""
    from zoo.explain import command_help

    print(command_help(options))
    return runs.RunResult(Path())
