"""What a class takes, in a few lines: read from its signature and its docstring, without jsonargparse."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass
from pathlib import Path

from zoo import registry
from zoo.options import Options

HELP = """\
usage: zoo {command} --config FILE_OR_NAME [--config MORE] [--model.OPTION VALUE] [--trainer.OPTION VALUE] ...

  --config NAME        a file or a shipped config (zoo list); several are merged from left to right
  --model NAME         a method of the registry or a class path;   --model.lr 0.1 sets one of its options
  --data NAME          a datamodule, likewise
  --trainer.KEY VALUE  any argument of lightning's Trainer; --trainer.callbacks+=NAME appends a callback
  --checkpoint.every_n_steps N   steps between two resume checkpoints
  --seed_everything N  seed of the run
  --ckpt_path FILE     start from a checkpoint (its options stand below those of the config)
  --run_dir DIR        directory of the run; default runs/<method>/<config>/<time>-<id>
  --resume DIR         go on with the run in DIR: its config, its newest checkpoint, its W&B run
  --wandb MODE         offline (default), online or disabled
  --print_config       print the config that this call would run, and stop
  --debug              show tracebacks
"""


@dataclass(frozen=True)
class Option:
    """One constructor argument: name, annotation, default (`""` if required) and the text of its docstring."""

    name: str
    annotation: str
    default: str
    text: str


def options_of(entry: registry.Entry) -> tuple[str, list[Option]]:
    """Return the first paragraph of a class's docstring and its options, from the source file alone."""
    module_name, _, class_name = entry.value.partition(":")
    path = registry.source_path(module_name)
    node = _class_node(path, class_name) if path else None
    if node is None:
        return "", []
    doc = ast.get_docstring(node) or ""
    texts = argument_texts(doc)
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is None:
        return doc.split("\n\n")[0], []
    arguments = [a for a in (*init.args.args, *init.args.kwonlyargs) if a.arg != "self"]
    defaults: list[ast.expr | None] = [*init.args.defaults, *init.args.kw_defaults]
    defaults = [*[None] * (len(arguments) - len(defaults)), *defaults]
    return doc.split("\n\n")[0], [
        Option(
            a.arg,
            ast.unparse(a.annotation) if a.annotation else "",
            ast.unparse(d) if d is not None else "",
            texts.get(a.arg, ""),
        )
        for a, d in zip(arguments, defaults, strict=True)
    ]


def _class_node(path: Path, class_name: str) -> ast.ClassDef | None:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    return next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name), None)


def argument_texts(doc: str) -> dict[str, str]:
    """Return the texts of the `Args:` section of a Google-style docstring."""
    doc = inspect.cleandoc(doc)
    match = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", doc, flags=re.MULTILINE)
    out: dict[str, str] = {}
    name = ""
    for line in (match[1] if match else "").splitlines():
        start = re.match(r"^ {4}([\w, *]+?)(?: \(.*?\))?: (.*)$", line)
        if start:
            name = start[1]
            for part in name.split(","):
                out[part.strip()] = start[2].strip()
        elif name and line.strip():
            for part in name.split(","):
                out[part.strip()] += " " + line.strip()
    return out


def command_help(options: Options) -> str:
    """Return the help of a trainer command; with a config, the options of its method and data too."""
    from zoo.config import load_layers

    text = HELP.format(command=options.command)
    merged = load_layers(options.configs, options.overrides).merged
    for key, group in (("model", "methods"), ("data", "datamodules")):
        path = merged.get(key, {}).get("class_path")
        entry = next((e for e in registry.entries(group) if e.class_path == path), None)
        if entry is not None:
            text += f"\n--{key}.OPTION of {entry.name}:\n" + option_table(options_of(entry)[1])
    return text


def option_table(options: list[Option], width: int = 100) -> str:
    """Return the options as aligned lines, texts wrapped."""
    import textwrap

    lines = []
    for option in options:
        kind = f"{option.annotation} = {option.default}" if option.default else f"{option.annotation}, required"
        lines.append(f"  {option.name}: {kind}")
        lines += textwrap.wrap(option.text, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines) + "\n"
