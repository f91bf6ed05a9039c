"""What a class takes, in a few lines: read from its signature and its docstring, without jsonargparse."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass, replace

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
    """Return the first paragraph of a class's docstring and its options, from source files alone.

    Options of its bases are among them where the class has no constructor, or one that passes keywords on.
    """
    module_name, _, class_name = entry.value.partition(":")
    return description_of(entry), list(_options(module_name, class_name).values())


def description_of(entry: registry.Entry) -> str:
    """Return the first paragraph of a class's docstring, from its source file alone."""
    module_name, _, class_name = entry.value.partition(":")
    source = Source.of(module_name)
    node = source.class_node(class_name) if source else None
    return (ast.get_docstring(node) or "").split("\n\n")[0] if node else ""


@dataclass(frozen=True)
class Source:
    """A parsed module that was not imported.

    Attributes:
        name: Dotted name of the module.
        package: What its relative imports start from.
        tree: Its syntax tree.
    """

    name: str
    package: str
    tree: ast.Module

    @classmethod
    def of(cls, name: str) -> Source | None:
        """Read a module; None where there is no source that can be read."""
        path = registry.source_path(name)
        if path is None:
            return None
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            return None
        return cls(name, name if path.name == "__init__.py" else name.rpartition(".")[0], tree)

    def class_node(self, name: str) -> ast.ClassDef | None:
        """The class of that name which the module defines itself."""
        return next((n for n in self.tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)

    def origin(self, expression: ast.expr) -> tuple[str, str] | None:
        """Module and name behind a base class such as `Base`, `pl.Callback` or `Base[int]`; None if it is not clear."""
        if isinstance(expression, ast.Subscript):
            return self.origin(expression.value)
        head, *rest = ast.unparse(expression).split(".")
        if not rest and self.class_node(head) is not None:
            return self.name, head
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom):
                up = self.package.split(".")[: 1 - node.level or None] if node.level else []
                module = ".".join([*up, *([node.module] if node.module else [])])
                for alias in node.names:
                    if (alias.asname or alias.name) == head:
                        *inner, last = [alias.name, *rest]
                        return ".".join([module, *inner]), last
            elif isinstance(node, ast.Import) and rest:
                for alias in node.names:
                    if head == (alias.asname or alias.name.split(".")[0]):
                        *inner, last = rest
                        return ".".join([alias.name if alias.asname else head, *inner]), last
        return None


def _options(module_name: str, class_name: str, depth: int = 12) -> dict[str, Option]:
    """Options of a class by name; `depth` bounds how many bases and imports are followed."""
    source = Source.of(module_name) if depth else None
    if source is None:
        return {}
    node = source.class_node(class_name)
    if node is None:  # a package that passes on what another module defines
        origin = source.origin(ast.Name(class_name))
        return _options(*origin, depth - 1) if origin else {}
    texts = argument_texts(ast.get_docstring(node) or "")
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    out = _own_options(init, texts) if init else {}
    if init is None or init.args.kwarg is not None:
        for base in node.bases:
            origin = source.origin(base)
            inherited = _options(*origin, depth - 1) if origin else {}
            for name, option in inherited.items():
                out.setdefault(name, replace(option, text=texts.get(name, option.text)))
    return out


def _own_options(init: ast.FunctionDef, texts: dict[str, str]) -> dict[str, Option]:
    positional = [a for a in (*init.args.posonlyargs, *init.args.args) if a.arg != "self"]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(init.args.defaults))
    defaults = [*missing, *init.args.defaults, *init.args.kw_defaults]
    return {
        a.arg: Option(
            a.arg,
            ast.unparse(a.annotation) if a.annotation else "",
            ast.unparse(d) if d is not None else "",
            texts.get(a.arg, ""),
        )
        for a, d in zip([*positional, *init.args.kwonlyargs], defaults, strict=True)
    }


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
