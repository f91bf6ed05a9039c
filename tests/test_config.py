"""Layers of a config: authority, names, lists, and no traceback whatever is written into a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import config
from zoo.errors import UsageError
from zoo.options import parse_options


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_later_files_win_and_the_command_line_wins_over_all(tmp_path: Path) -> None:
    a = write(tmp_path / "a.yaml", {"trainer": {"max_steps": 1, "log_every_n_steps": 5}, "seed_everything": 1})
    b = write(tmp_path / "b.yaml", {"trainer": {"max_steps": 2}})
    layers = config.load_layers([a, b], [("trainer.max_steps", "3")])
    assert layers.merged == {"trainer": {"max_steps": 3, "log_every_n_steps": 5}, "seed_everything": 1}
    assert layers.place("trainer.max_steps") == "--trainer.max_steps"
    assert layers.place("trainer.log_every_n_steps") == str(a)


def test_the_place_of_an_option_does_not_matter() -> None:
    first = parse_options("fit", ["--trainer.max_steps=3", "--config", "x.yaml"])
    last = parse_options("fit", ["-c", "x.yaml", "--trainer.max_steps", "3"])
    assert (
        (first.configs, first.overrides) == (last.configs, last.overrides) == (["x.yaml"], [("trainer.max_steps", "3")])
    )


def test_a_list_can_be_extended_without_losing_the_first(tmp_path: Path) -> None:
    callbacks = [{"class_path": "some.module.A", "init_args": {"x": 1}}]
    a = write(tmp_path / "a.yaml", {"trainer": {"callbacks": callbacks}})
    b = write(tmp_path / "b.yaml", {"trainer": {"callbacks+": [{"class_path": "some.module.B"}]}})
    merged = config.load_layers([a, b], [("trainer.callbacks+", "progress")]).merged
    paths = [item["class_path"] for item in merged["trainer"]["callbacks"]]
    assert paths == ["some.module.A", "some.module.B", "callbacks.progress.Progress"]
    replaced = config.load_layers([a], [("trainer.callbacks", "progress")]).merged
    assert [item["class_path"] for item in replaced["trainer"]["callbacks"]] == ["callbacks.progress.Progress"]


def test_another_class_drops_the_options_of_the_one_below(tmp_path: Path) -> None:
    a = write(tmp_path / "a.yaml", {"model": {"class_path": "m.A", "init_args": {"lr": 1.0}}})
    same = config.load_layers([a], [("model.wd", "1e-3")]).merged
    assert same["model"] == {"class_path": "m.A", "init_args": {"lr": 1.0, "wd": 1e-3}}
    other = config.load_layers([a], [("model", "m.B"), ("model.wd", "0.5")]).merged
    assert other["model"] == {"class_path": "m.B", "init_args": {"wd": 0.5}}


def test_inheritance_in_the_file(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", {"trainer": {"max_steps": 1, "max_epochs": 7}})
    child = write(tmp_path / "child.yaml", {"config": "base.yaml", "trainer": {"max_steps": 2}})
    assert config.load_file(child) == {"trainer": {"max_steps": 2, "max_epochs": 7}}
    write(tmp_path / "loop.yaml", {"config": "loop.yaml"})
    with pytest.raises(UsageError, match="based on itself"):
        config.load_file(tmp_path / "loop.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("config: [a.yaml, b.yaml]\n", "`config:` takes one file, got a list"),
        ("- a\n- b\n", "a config is a mapping"),
        ("trainer: {max_steps: 1\n", "line 2: not YAML"),
        ("trainer: {}\ntrainer: {}\n", "'trainer' is given twice"),
        ("trainr: {}\n", "did you mean 'trainer'"),
        ("model: 3\n", "model: expected a mapping"),
        ("model: {class_path: csvv, lr: 3}\n", "unknown key 'lr'"),
        ("trainer: {logger: csvv}\n", "did you mean 'csv'"),
        ("model: !!python/object/apply:os.system ['true']\n", "not YAML that can be read safely"),
        ("data: {class_path: 'a b'}\n", "expected the name of a class"),
        ("\x00\x01", "not YAML"),
    ],
)
def test_mistakes_get_a_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path / "bad.yaml", content)
    with pytest.raises(UsageError) as error:
        config.load_file(path)
    assert message in str(error.value)
    assert "bad.yaml" in str(error.value)


def test_numbers_with_exponents_are_numbers() -> None:
    assert config.parse_yaml("[1e-3, 2E5, 1.5e+2, 1e, 0x1F]", "here") == [1e-3, 2e5, 150.0, "1e", 31]


def test_unknown_config_names_the_closest() -> None:
    with pytest.raises(UsageError, match="neither a file nor a shipped config"):
        config.resolve_config("suave/no_such_config")


keys = st.sampled_from(
    ["model", "data", "trainer", "class_path", "init_args", "callbacks", "callbacks+", "logger", "config", "lr", ""]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(keys, values, max_size=5))
def test_no_content_gives_a_traceback(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("c") / "random.yaml"
    path.write_text(yaml.safe_dump(content))
    try:
        loaded = config.load_file(path)
    except UsageError as error:
        assert 0 < len(str(error)) < 1500  # noqa: PT017
    else:
        assert set(loaded) <= {"model", "data", "trainer", *config.TOP_LEVEL}


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abm.+odelct-=_", max_size=14), st.none() | st.text(max_size=10))
def test_no_option_gives_a_traceback(option: str, text: str | None) -> None:
    try:
        config.override(option, text)
    except UsageError as error:
        assert str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{question}", "{question}"),
        ("{question} Think.", "{question} Think."),
        ("{question}: {answer}", "{question}: {answer}"),
        ("'Q: {question}'", "Q: {question}"),
        (r'"{question}\n"', "{question}\n"),
        ("{}", {}),
        ("{a: 1}", {"a": 1}),
        ("{a, b}", {"a": None, "b": None}),
        ("[1, 2]", [1, 2]),
    ],
)
def test_templates_are_text_and_the_rest_is_yaml(text: str, value: Any) -> None:
    assert config.override("data.template", text) == {"data": {"init_args": {"template": value}}}


def test_text_that_yaml_cannot_read_is_told_how_to_be_quoted() -> None:
    with pytest.raises(UsageError, match=r"quotes of its own: --data.template \"'\.\.\.'\""):
        config.override("data.template", "@{question}")


mappings = st.recursive(
    st.integers() | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
).filter(lambda x: isinstance(x, dict))


@given(mappings, mappings)
def test_merge_keeps_its_inputs_and_is_idempotent(below: dict[str, Any], above: dict[str, Any]) -> None:
    before = copy.deepcopy((below, above))
    once = config.merge(below, above)
    assert (below, above) == before
    assert config.merge(once, above) == once
    assert config.merge(below, {}) == below


@pytest.mark.parametrize(
    "value",
    [
        1, 0.5, 1e-05, True, None, "suave", "1", "true", "a b", "", [1, "x"], {"a": [None]}, "Question: why?", "on",
        "a #b", "[a", "{text} is a text", "Question: a: b", "2024", "1e-3", "über 🙂", "'quoted'", '"quoted"', " a ",
        "<<",
    ],
)  # fmt: skip
def test_options_are_read_back_as_they_were(value: object) -> None:
    key, _, raw = config.option_text("model.init_args.x", value).partition("=")
    assert config.override(key, raw) == {"model": {"init_args": {"x": value}}}


def test_paths_and_names_are_read_back() -> None:
    assert config.override("model.init_args.x", config.option_text("x", Path("a b/c")).partition("=")[2]) == {
        "model": {"init_args": {"x": "a b/c"}}
    }
    assert config.option_text("ckpt_path", "10") == "ckpt_path=10"
    assert config.override("ckpt_path", "10") == {"ckpt_path": "10"}


def test_appended_items_wait_for_the_list_below(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", {"trainer": {"callbacks+": ["figures"]}})
    write(tmp_path / "a.yaml", {"config": base.name, "trainer": {"callbacks+": ["progress"]}})
    typed = config.typed_layers([tmp_path / "a.yaml"], [("trainer.callbacks+", "online_probe")])
    below = config.resolve_names({"trainer": {"callbacks": ["collapse_monitor"]}}, "")

    def names(merged: dict[str, Any]) -> list[str]:
        return [item["class_path"].rpartition(".")[2] for item in config.settled(merged)["trainer"]["callbacks"]]

    assert names(config.merge(below, typed.merged)) == ["CollapseMonitor", "Figures", "Progress", "OnlineProbe"]
    assert names(typed.merged) == ["Figures", "Progress", "OnlineProbe"]
    replaced = config.merge(typed.merged, below)
    assert names(replaced) == ["CollapseMonitor"]
    only = config.load_layers([], [("model", "suave"), ("trainer.callbacks+", "figures")])
    assert list(only.merged["trainer"]) == ["callbacks"]


def test_keys_may_be_merged_as_yaml_does(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "model: &m\n  class_path: suave\ndata:\n  <<: *m\n  class_path: fashion_mnist\n")
    assert config.load_file(path)["data"]["class_path"].endswith("FashionMNIST")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("checkpoint: 5", "checkpoint: expected a mapping, got 5"),
        ("trainer: {callbacks: [{init_args: {dpi: 5}}]}", "trainer.callbacks: an item without class_path"),
        ("ckpt_path: true", "ckpt_path: expected the path of a checkpoint, got True"),
        ("model: .foo", "model: unknown name '.foo' in methods"),
        ("nonsense:", "unknown key 'nonsense'"),
    ],
)
def test_shapes_are_checked(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        config.load_file(write(tmp_path / "a.yaml", content))


@pytest.mark.parametrize("option", ["ckpt_path", "model", "data"])
def test_options_without_their_value(option: str) -> None:
    with pytest.raises(UsageError, match=f"--{option} needs a value"):
        config.override(option, None)


def test_an_empty_key_is_as_one_left_out(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", {"model": "suave"})
    path = write(tmp_path / "a.yaml", f"config: {base.name}\nmodel:\ndata:\n")
    assert set(config.load_file(path)) == {"model"}
