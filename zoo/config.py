"""Config files and command-line overrides become one plain dictionary, before anything heavy is imported.

Order of authority: defaults < checkpoint < config files from left to right < command line. Dictionaries are merged
deeply, lists are replaced, and a key that ends in `+` appends to the list below it. Names of the registry are
replaced by class paths, so that what is saved can be replayed without the name.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from zoo import registry
from zoo.errors import UsageError, did_you_mean

TOP_LEVEL = (
    "seed_everything",
    "model",
    "data",
    "trainer",
    "checkpoint",
    "ckpt_path",
)

#: Key in a config -> registry group whose names it accepts.
NAMED = {"model": "methods", "data": "datamodules", "trainer.callbacks": "callbacks", "trainer.logger": "loggers"}

#: A value that begins so is the text of a template, `{question} ..`: YAML would make a mapping of it, or nothing.
_PLACEHOLDER = re.compile(r"\{\w+\}")


class Loader(yaml.SafeLoader):
    """Safe YAML, with `1e-3` read as a number and a key given twice refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        nodes = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # `<<: *other` may come often
        keys = [self.construct_object(key, deep=True) for key in nodes]
        for key, key_node in zip(keys, nodes, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = copy.deepcopy(yaml.SafeLoader.yaml_implicit_resolvers)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML without ever building anything but plain data.

    Raises:
        UsageError: If it is not YAML, with file and line.
    """
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{where}{line}: not YAML that can be read safely: {problem}") from error
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise UsageError(f"{where}: not YAML that can be read safely: {error}") from error


def shipped_configs() -> dict[str, list[Path]]:
    """Return the configs that come with the installed packages: `suave/smoke` -> files, one for each package."""
    found: dict[str, list[Path]] = {}
    for entry in registry.entries("configs"):
        module = registry.source_path(entry.value.partition(":")[0])
        if entry.problem or module is None:
            continue
        root = module.parent / "configs"
        for path in sorted(root.glob("**/*.yaml")):
            if path.name != "claims.yaml":
                found.setdefault(path.relative_to(root).with_suffix("").as_posix(), []).append(path)
    return found


def resolve_config(name: str | Path, relative_to: Path | None = None) -> Path:
    """Return the file for a path or for a shipped config such as `suave/smoke`.

    Raises:
        UsageError: If there is no such file or name; the closest names are given.
    """
    text = str(name)
    for base in [relative_to] if relative_to else [Path()]:
        path = base / text
        if path.is_file():
            return path
    key = text.removeprefix("configs/").removesuffix(".yaml")
    shipped = shipped_configs()
    if key in shipped:
        if len(shipped[key]) > 1:
            raise UsageError(
                f"config {key!r} is shipped by several packages",
                "give the path: " + " or ".join(map(str, shipped[key])),
            )
        return shipped[key][0]
    raise UsageError(f"config {text!r} is neither a file nor a shipped config", did_you_mean(key, shipped))


def load_file(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read one config file with the file it is based on (`config: base.yaml`), names resolved.

    Raises:
        UsageError: If it cannot be read, is no mapping, is based on itself or holds a list under `config:`.
    """
    here = path.resolve()
    if here in chain:
        raise UsageError(f"{path}: config is based on itself: " + " -> ".join(p.name for p in (*chain, here)))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read config {path}: {error}") from error
    content = parse_yaml(text, str(path))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UsageError(
            f"{path}: a config is a mapping with keys {', '.join(TOP_LEVEL[:4])}, got a {type(content).__name__}"
        )
    base = content.pop("config", None)
    if isinstance(base, list):
        raise UsageError(
            f"{path}: `config:` takes one file, got a list", "give several --config options, or chain files"
        )
    if base is not None and not isinstance(base, str):
        raise UsageError(f"{path}: `config:` takes the name of a file, got {base!r}")
    check_keys(content, str(path))
    given = {key: value for key, value in content.items() if value is not None or key == "seed_everything"}
    content = resolve_names(given, str(path))
    if base is None:
        return content
    return merge(load_file(resolve_config(base, path.parent), (*chain, here)), content)


def check_keys(content: Mapping[str, Any], where: str) -> None:
    """Refuse unknown keys at the top of a config."""
    for key in content:
        plain = str(key).removesuffix("+")
        if plain not in TOP_LEVEL:
            raise UsageError(f"{where}: unknown key {key!r}", did_you_mean(str(key), [*TOP_LEVEL, "config"]))
    for key in ("model", "data", "trainer", "checkpoint"):
        value = content.get(key)
        if value is not None and not isinstance(value, dict | str if key in ("model", "data") else dict):
            raise UsageError(f"{where}: {key}: expected a mapping, got {value!r}")
    path = content.get("ckpt_path")
    if path is not None and not isinstance(path, str):
        raise UsageError(f"{where}: ckpt_path: expected the path of a checkpoint, got {path!r}")


def resolve_names(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Replace names of the registry by `{class_path, init_args}` wherever a class is expected."""
    content = dict(content)
    for key in ("model", "data"):
        if content.get(key) is not None:
            content[key] = as_class(content[key], key, where)
    if isinstance(content.get("trainer"), dict):
        trainer = dict(content["trainer"])
        for key in list(trainer):
            group_key = f"trainer.{str(key).removesuffix('+')}"
            if group_key in NAMED and not isinstance(trainer[key], bool | None):
                items = trainer[key] if isinstance(trainer[key], list) else [trainer[key]]
                trainer[key] = [as_class(item, group_key, where) for item in items]
        content["trainer"] = trainer
    return content


def as_class(value: Any, key: str, where: str) -> dict[str, Any]:
    """Return `{class_path, init_args}` for a name, a class path, or a mapping that holds either.

    Raises:
        UsageError: If the name is not registered, or the mapping has other keys or, in a list, no class.
    """
    if isinstance(value, str):
        value = {"class_path": value}
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {key}: expected a name or a mapping with class_path, got {value!r}")
    extra = set(value) - {"class_path", "init_args"}
    if extra:
        raise UsageError(
            f"{where}: {key}: unknown key {sorted(map(str, extra))[0]!r}",
            "accepted: class_path, init_args (the options of the class)",
        )
    if not isinstance(value.get("init_args") or {}, dict):
        raise UsageError(f"{where}: {key}.init_args: expected a mapping, got {value['init_args']!r}")
    if "class_path" not in value and key not in ("model", "data"):  # these lie over others of the same key
        raise UsageError(f"{where}: {key}: an item without class_path: {value!r}")
    named = {"class_path": class_path(value["class_path"], key, where)} if "class_path" in value else {}
    return {**named, "init_args": dict(value.get("init_args") or {})}


def class_path(name: Any, key: str, where: str) -> str:
    """Return the dotted path for a registered name; a dotted path stays as it is."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.:-]+", name):
        raise UsageError(f"{where}: {key}: expected the name of a class, got {name!r}")
    if re.fullmatch(r"\w+(\.\w+)+", name):
        return name
    try:
        return registry.find(NAMED[key], name).class_path
    except UsageError as error:
        raise UsageError(f"{where}: {key}: {error.message}", error.hint) from error


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `below` overlaid with `above`.

    Mappings merge deeply, `key+` appends to a list, another `class_path` drops the options of the class below. Where
    there is nothing to append to yet, `key+` stays, for what may come to lie below; `settled` ends that.
    """
    out = dict(below)
    for key, value in above.items():
        if isinstance(key, str) and key.endswith("+"):
            known = key[:-1] if key[:-1] in out else key
            old = out.get(known)
            out[known] = [*(old if isinstance(old, list) else []), *(value if isinstance(value, list) else [value])]
        elif isinstance(value, dict) and isinstance(out.get(key), dict):
            old = out[key]
            other_class = "class_path" in value and "class_path" in old and value["class_path"] != old["class_path"]
            out[key] = dict(value) if other_class else merge(old, value)
        else:
            out.pop(f"{key}+", None)
            out[key] = copy.deepcopy(value)
    return out


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config under which nothing will be laid any more: `key+` becomes `key`."""
    out = {key: settled(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    for key in [key for key in out if isinstance(key, str) and key.endswith("+")]:
        out[key[:-1]] = out.pop(key)
    return out


def _typed_value(text: str, where: str) -> Any:
    """Read the value of an option: YAML, or a template that YAML would stumble over."""
    if not text or _PLACEHOLDER.match(text):
        return text
    try:
        return parse_yaml(text, where)
    except UsageError as error:
        raise UsageError(error.message, quote_hint(where)) from error


def quote_hint(option: str) -> str:
    """Return how to give text that YAML takes for something else."""
    return f"text that YAML takes for something else goes into quotes of its own: {option} \"'...'\""


def override(option: str, text: str | None) -> dict[str, Any]:
    """Return the config fragment of one option: `model.lr`, `"0.1"` -> `{model: {init_args: {lr: 0.1}}}`."""
    where = f"--{option}"
    value: Any = True if text is None else _typed_value(text, where)
    parts = option.split(".")
    if text is None and (parts[0] == "ckpt_path" or parts in (["model"], ["data"])):
        raise UsageError(f"{where} needs a value")
    if parts == ["ckpt_path"]:
        value = text  # a file may be called `10`
    if not all(parts):
        raise UsageError(f"{where}: not an option", "options look like --model.lr 0.1 or --trainer.max_steps 100")
    if parts[0] in ("model", "data"):
        if len(parts) == 1:
            return resolve_names({parts[0]: text}, where)
        if parts[1] == "class_path":
            return resolve_names({parts[0]: {"class_path": text}}, where)
        if parts[1] != "init_args":
            parts.insert(1, "init_args")
        if len(parts) == 2:
            raise UsageError(f"{where}: say which option, e.g. --{option}.lr 0.1")
    for part in reversed(parts):
        value = {part: value}
    check_keys(value, where)
    return resolve_names(value, where)


def option_text(key: str, value: Any) -> str:
    """Return `key=value` in the words of the command line: what `override` reads as this very value."""
    if isinstance(value, PurePath):
        value = str(value)
    if isinstance(value, str) and not _reads_as_itself(key, value):
        return f"{key}={json.dumps(value, ensure_ascii=False)}"
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _reads_as_itself(key: str, text: str) -> bool:
    if key in ("model", "data", "model.class_path", "data.class_path", "ckpt_path"):  # never read as YAML
        return True
    try:
        return bool(_typed_value(text, key) == text)
    except UsageError:
        return False


@dataclass
class Layers:
    """The layers of a config with the place that set each key.

    Attributes:
        merged: The config after all layers.
        origin: Dotted key -> file or option that set it last.
        changed: Dotted keys that a stored config, at the bottom, has otherwise or not at all.
    """

    merged: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)

    def add(self, content: Mapping[str, Any], where: str) -> None:
        """Lay `content` on top."""
        self.merged = merge(self.merged, content)
        for key in flatten(content):
            self.origin[key.replace("+", "")] = where

    def place(self, key: str) -> str:
        """Return where `key`, or the nearest key above or below it, was set."""
        for known, where in reversed(self.origin.items()):
            if known == key or known.startswith(f"{key}."):
                return where
        return self.place(key.rpartition(".")[0]) if "." in key else "the defaults"


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted keys of nested mappings; lists and empty mappings are values."""
    out: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, old value, new value) for the keys of both whose values differ."""
    a, b = flatten(old), flatten(new)
    return [(key, a[key], b[key]) for key in a if key in b and a[key] != b[key]]


def additions(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return (key, value) for the options of model and data that are new: the defaults were in force."""
    a, b = flatten(old), flatten(new)
    return [(key, b[key]) for key in b if key not in a and key.startswith(("model.init_args.", "data.init_args."))]


def load_layers(files: Sequence[str | Path], overrides: Iterable[tuple[str, str | None]]) -> Layers:
    """Read config files from left to right, then command-line options."""
    layers = typed_layers(files, overrides)
    layers.merged = settled(layers.merged)
    return layers


def typed_layers(files: Sequence[str | Path], overrides: Iterable[tuple[str, str | None]]) -> Layers:
    """Do as `load_layers` does, for a config that is laid on another one: `key+` is still there, to append to that."""
    layers = Layers()
    for name in files:
        path = resolve_config(name)
        layers.add(load_file(path), str(path))
    for option, text in overrides:
        layers.add(override(option, text), f"--{option}")
    return layers
