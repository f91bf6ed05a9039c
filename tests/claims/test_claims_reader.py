"""Every mistake in a claims file is named with its place and what is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zoo.claims import reader
from zoo.claims.reader import claims_files, find_claims, load_plan
from zoo.errors import UsageError


def test_a_plan_holds_what_the_file_says(world, make_claim) -> None:
    runs = world.body["runs"]
    runs["b"] |= {"commands": ["test"], "alone": True}
    second = make_claim("at-least", right=0.25, aggregate="min", left={"run": "a", "metric": "x", "times": 2})
    report = [{"statement": "Accuracy", "runs": "a", "metrics": ["test/acc"], "paper": "Table 2"}]
    plan = load_plan(world.write(runs=runs, claims=[make_claim(), second], report=report))
    assert (plan.method, plan.scale, plan.seeds) == ("fake", "cpu", (0, 1))
    assert plan.runs["a"].commands == ("fit", "test")
    assert plan.runs["b"].commands == ("test",)
    assert plan.runs["b"].alone
    assert plan.claims[0].margin == 0.1
    assert plan.claims[0].aggregate == "mean"
    assert plan.claims[1].right.number == 0.25
    assert plan.claims[1].left.times == 2
    assert plan.claims[1].aggregate == "min"
    assert plan.reports[0].runs == ("a",)


def test_needs_come_first_and_placeholders_are_needs(world, make_claim) -> None:
    base = world.body["runs"]["a"]["config"]
    runs = {
        "a": {"config": base, "overrides": {"model.init_args.path": "${b.checkpoint}"}},
        "c": {"config": base},
        "b": {"config": base, "needs": ["sft"]},
        "sft": {"config": base},
    }
    only_a = make_claim("only-a", right=0.5)
    plan = load_plan(world.write(runs=runs, claims=[make_claim(), only_a]))
    order = list(plan.runs)
    assert order.index("sft") < order.index("b") < order.index("a")
    assert plan.runs["a"].needs == ("b",)
    assert [run.name for run in plan.needed(["only-a"])] == ["sft", "b", "a"]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"sedes": [1]}, "unknown key 'sedes'.*did you mean 'seeds'"),
    "seeds": ({"seeds": [0, 0]}, "seeds: expected different numbers"),
    "seed type": ({"seeds": ["x"]}, "seeds: expected a list of whole numbers"),
    "no runs": ({"runs": {}}, "runs: expected a mapping"),
    "run key": ({"runs": {"a": {"configs": "x"}}}, "runs.a: unknown key 'configs'.*config"),
    "command": ({"commands": ["train"]}, "commands: 'train' is not known.*fit"),
    "circle": ({"runs": {"a": {"config": "x", "needs": ["a"]}}}, "needs itself: a -> a"),
    "needs": ({"runs": {"a": {"config": "x", "needs": ["z"]}}}, "'z' is not known"),
    "placeholder": ({"runs": {"a": {"config": "x", "overrides": {"k": "${a.weights}"}}}}, "'weights'.*checkpoint"),
    "run name": ({"runs": {"a/b": {"config": "x"}}}, "named by letters"),
    "nothing": ({"claims": []}, "nothing to reproduce"),
    "report": ({"report": [{"statement": "s", "runs": ["zz"], "metrics": ["m"]}]}, "report.0..runs: 'zz'"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(world, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_plan(world.write(**changes))
    text = str(caught.value).replace("\n", " ")
    assert str(world.claims) in text
    import re

    assert re.search(message, text), text


CLAIM_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "run": ({"left": {"run": "zz", "metric": "m"}}, "left.run: 'zz' is not known"),
    "key": ({"left": {"run": "a", "metirc": "m"}}, "unknown key 'metirc'.*metric"),
    "margin": ({"margin": "much"}, "margin: expected a number, got 'much'"),
    "bool margin": ({"margin": True}, "margin: expected a number"),
    "aggregate": ({"aggregate": "mode"}, "'mode' is not known.*median"),
    "constants": ({"left": 1, "right": 2}, "has to be the metric of a run"),
    "id": ({"id": "A b"}, "lower-case words and numbers joined by hyphens"),
    "statement": ({"statement": ""}, "statement: expected a text"),
    "note": ({"note": True}, "note: expected a text"),
}


@pytest.mark.parametrize(("changes", "message"), CLAIM_MISTAKES.values(), ids=CLAIM_MISTAKES)
def test_mistakes_in_claims_are_named(world, make_claim, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"(?s)claims.0..*{message}"):
        load_plan(world.write(claims=[make_claim(**changes)]))


def test_an_id_is_given_once(world, make_claim) -> None:
    with pytest.raises(UsageError, match="'a-beats-b' is given twice"):
        load_plan(world.write(claims=[make_claim(), make_claim()]))


def test_unknown_scale_and_claim_name_what_there_is(world) -> None:
    with pytest.raises(UsageError, match=r"(?s)no scale 'gpu'.*cpu"):
        load_plan(world.claims, "gpu")
    with pytest.raises(UsageError, match=r"(?s)no claim 'a-beat-b'.*did you mean 'a-beats-b'"):
        load_plan(world.claims).needed(["a-beat-b"])


def test_claims_of_a_plugin_are_found_by_name(make_distribution, world) -> None:
    text = world.claims.read_text()
    files = {"theirs/__init__.py": "", "theirs/configs/fake/claims.yaml": text}
    make_distribution("their-plugin", {"zoo.configs": {"theirs": "theirs"}}, files)
    assert find_claims("fake").read_text() == text
    assert find_claims(str(world.claims)) == world.claims
    with pytest.raises(UsageError, match="has no claims.yaml"):
        find_claims("nothing_like_it")


def test_every_shipped_claims_file_can_be_read() -> None:
    from zoo.claims.campaign import fingerprints
    from zoo.claims.reader import scales

    for name, paths in claims_files().items():
        for path in paths:
            for scale in scales(path)["scales"]:
                plan = load_plan(path, scale)
                assert plan.method == name
                assert set(fingerprints(plan, plan.seeds)) == set(plan.runs)


def test_a_file_is_parsed_once_and_read_anew_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, parse = tmp_path / "claims.yaml", reader.parse_yaml
    parsed: list[str] = []

    def counted(text: str, where: str) -> Any:
        parsed.append(text)
        return parse(text, where)

    monkeypatch.setattr(reader, "parse_yaml", counted)
    path.write_text("method: a\nscales: {cpu: {seeds: [0]}}\n")
    first = reader.scales(path)
    first["scales"]["cpu"]["seeds"].append(7)
    assert reader.scales(path)["scales"] == {"cpu": {"seeds": [0]}}, "what one reader does to it is its own affair"
    assert len(parsed) == 1
    path.write_text("method: a\nscales: {cpu: {seeds: [1]}}\n")
    assert reader.scales(path)["scales"] == {"cpu": {"seeds": [1]}}
