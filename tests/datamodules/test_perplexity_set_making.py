"""Files of sets with line numbers, and making them: by words of a lexicon, and by an endpoint. No torch in here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import zoo.main
from datamodules.perplexity_sets import making
from datamodules.perplexity_sets.making import Filters, Lexicon, ask, replace_slots, rouge_l, sentence_of
from datamodules.perplexity_sets.records import (
    Anchor,
    SetRecord,
    read_anchors,
    read_record,
    read_records,
    refuse_overlap,
    write_records,
)
from datamodules.perplexity_sets.writers import EndpointWriter
from tests.support.endpoint import Endpoint, chat, serving
from tests.support.sentences import LEXICON, write

RECORD: dict[str, Any] = {"input": "the soup is calm", "id": "food-1", "group": "food"}
RECORD |= {"paraphrases": ["the soup is kind"], "paraphrases_toxic": ["the soup is tox01"]}


# ---------------------------------------------------------------- records


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    record = read_record(json.dumps(RECORD | {"scores": [0.1], "Größe": "ignored"}))
    assert record == SetRecord("food-1", "food", "the soup is calm", ("the soup is kind",), ("the soup is tox01",))
    other = SetRecord("food-2", "food", "süß", ("a", "b"), ("c",))
    assert write_records(tmp_path / "new" / "sets.jsonl", [record]) == 1
    assert write_records(tmp_path / "new" / "sets.jsonl", [other]) == 1
    assert read_records(tmp_path / "new" / "sets.jsonl") == [record, other]
    fields = json.loads((tmp_path / "new" / "sets.jsonl").read_text().splitlines()[0])
    assert fields == RECORD


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON: .* at column"),
        ("[1]", "a list; accepted: an object"),
        ({"input": "x"}, "field 'id' is missing"),
        (RECORD | {"group": 3}, "field 'group' is a int; accepted: a text that is not empty"),
        (RECORD | {"input": "  "}, "field 'input' is empty; accepted: a text that is not empty"),
        ({k: v for k, v in RECORD.items() if k != "paraphrases"}, "field 'paraphrases' is missing"),
        (
            RECORD | {"paraphrases": "the soup is kind"},
            "field 'paraphrases' is empty; accepted: a list|a list of texts",
        ),
        (RECORD | {"paraphrases": ["fine", ""]}, "item 2 of field 'paraphrases' is empty; accepted: a text"),
        (RECORD | {"paraphrases_toxic": [None]}, "item 1 of field 'paraphrases_toxic' is a NoneType"),
        (RECORD | {"paraphrases_toxic": ["The soup  is kind"]}, "1 of its sentences are wanted and unwanted at once"),
        (RECORD | {"id": "a"}, "id 'a' is that of line 1 too"),
        (RECORD | {"id": "b", "paraphrases": []}, "anchor 'b' has 0 positives and 1 negatives, asked for are 1 and 1"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(line: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "sets.jsonl", RECORD | {"id": "a"}, "", line)
    with pytest.raises(ValueError, match=f"^sets.jsonl, line 3: .*(?:{message})") as caught:
        read_records(path, 1, 1)
    assert "tox01" not in str(caught.value), "no message quotes a sentence"


def test_short_anchors_are_dropped_where_that_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "sets.jsonl", RECORD, RECORD | {"id": "b", "paraphrases": ["x y", "z"]})
    assert [record.id for record in read_records(path, 2, 1, "drop")] == ["b"]
    with pytest.raises(ValueError, match="no anchor is left with 2 positives and 2 negatives"):
        read_records(path, 2, 2, "drop")
    with pytest.raises(FileNotFoundError, match="no file of sets at .*none.jsonl"):
        read_records(tmp_path / "none.jsonl")


def test_anchors_and_unwanted_sentences_in_both_files_are_refused() -> None:
    def record(id: str, text: str, negative: str) -> SetRecord:
        return SetRecord(id, "food", text, ("kind",), (negative,))

    train = [record("a", "the soup", "tox01"), record("b", "the stew", "tox02")]
    refuse_overlap(train, [record("c", "the cake", "tox03")])
    for leak in (record("a", "the cake", "tox03"), record("c", "The  Soup", "tox03")):
        with pytest.raises(ValueError, match=r"heldout: 1 of its anchors are anchors of train too \([ac]\)"):
            refuse_overlap(train, [leak])
    with pytest.raises(ValueError, match=r"heldout: unwanted sentences of 1 of its anchors are in train too \(c\)"):
        refuse_overlap(train, [record("c", "the cake", "TOX02")])


def test_anchors_are_counted_by_group(tmp_path: Path) -> None:
    lines = [{"input": f"s {i}", "group": "ab"[i % 2]} for i in range(6)]
    anchors = read_anchors(write(tmp_path / "anchors.jsonl", *lines), per_group=2)
    assert [(a.id, a.text) for a in anchors] == [("a-1", "s 0"), ("b-1", "s 1"), ("a-2", "s 2"), ("b-2", "s 3")]
    assert len(read_anchors(tmp_path / "anchors.jsonl", per_group=0)) == 6
    plain = read_anchors(write(tmp_path / "anchors.txt", "one", "", " two "))
    assert plain == [Anchor("all-1", "all", "one"), Anchor("all-2", "all", "two")]
    wrong_lines = {"{": "line 2: accepted", '{"input": "x"}': "line 2: accepted: an object with input and group"}
    for wrong, message in {**wrong_lines, '{"input": "", "group": "a"}': "line 2: input and group must be"}.items():
        with pytest.raises(ValueError, match=message):
            read_anchors(write(tmp_path / "wrong.jsonl", lines[0], wrong))
    with pytest.raises(ValueError, match="no anchor in it"):
        read_anchors(write(tmp_path / "empty.txt", ""))


# ---------------------------------------------------------------- by replacing words


def test_slots_are_replaced_word_for_word() -> None:
    lexicon = Lexicon(LEXICON)
    anchor = Anchor("food-1", "food", "The soup seems calm and old today")
    record = replace_slots(anchor, lexicon, candidates=8, seed=0)
    assert record is not None
    assert (
        len(record.positives) == len(record.negatives) == len(set(record.positives)) == len(set(record.negatives)) == 8
    )
    for wanted, unwanted in zip(record.positives, record.negatives, strict=True):
        places = [i for i, (a, b) in enumerate(zip(wanted.split(), unwanted.split(), strict=True)) if a != b]
        assert places == [2, 3, 5], "every slot, and nothing else"
        assert [w for i, w in enumerate(wanted.split()) if i not in places] == ["the", "soup", "and", "today"]
        for place, kind in zip(places, ("verb", "adjective", "adjective"), strict=True):
            assert wanted.split()[place] in LEXICON[kind]["wanted"]
            assert unwanted.split()[place] in LEXICON[kind]["unwanted"]
    assert "the soup seems calm and old today" not in record.positives
    assert replace_slots(anchor, lexicon, 8, seed=0) == record
    assert replace_slots(anchor, lexicon, 8, seed=1) != record
    assert replace_slots(Anchor("x", "food", "nothing here"), lexicon, 8, 0) is None
    few = replace_slots(Anchor("x", "food", "the soup looks"), lexicon, 8, 0)
    assert few is not None
    assert few.positives == ("the soup seems",), "short lists give what they can"


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({}, "no kind of words"),
        ({"verb": ["a"]}, "'verb' needs a list 'wanted' of words"),
        ({"verb": {"wanted": ["a"], "unwanted": []}}, "'verb' needs a list 'unwanted'"),
        ({"verb": {"wanted": ["a", "A"], "unwanted": ["b"]}}, "a word of the wanted ones of 'verb' is there twice"),
        ({"verb": {"wanted": ["a"], "unwanted": ["a"]}}, "a word of the unwanted ones of 'verb' is there twice"),
    ],
)
def test_a_wrong_lexicon_is_refused(kinds: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lexicon(kinds)


def test_lexicons_are_read(tmp_path: Path) -> None:
    assert Lexicon.read(write(tmp_path / "l.json", LEXICON)).kind_of["looks"] == "verb"
    with pytest.raises(ValueError, match="l.json, line 2: no JSON"):
        Lexicon.read(write(tmp_path / "l.json", "{"))
    with pytest.raises(ValueError, match="l.json: accepted"):
        Lexicon.read(write(tmp_path / "l.json", [1]))
    with pytest.raises(FileNotFoundError, match="no lexicon at"):
        Lexicon.read(tmp_path / "none.json")


# ---------------------------------------------------------------- by a language model


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    assert rouge_l("the cat sat", "the cat sat") == 1
    assert rouge_l("A b x d", "a b c d e") == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert rouge_l("b a", "a b") == pytest.approx(0.5)
    assert rouge_l("", "a") == 0


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("A soup.", "A soup."),
        ('\n\n1. "A soup."\n2. A stew.', "A soup."),
        ("- A soup.", "A soup."),
        ("  “A soup.”  ", "A soup."),
        ("\n \n", ""),
    ],
)
def test_the_first_line_of_an_answer_is_its_sentence(answer: str, sentence: str) -> None:
    assert sentence_of(answer) == sentence


def test_filters_follow_the_released_script() -> None:
    answers = ["The soup is HOT", "the soup is hot", "The soup is calm.", "", "the SOUP is calm", "one two three four"]
    assert Filters()("the soup is calm", answers) == ["the soup is hot", "the soup is calm.", "one two three four"]
    assert Filters(keep=1)("the soup is calm", answers) == ["the soup is hot"]
    assert Filters(lower=False)("x", ["The Soup"]) == ["The Soup"]
    assert Filters(most_words=3)("the soup is calm", answers) == []
    assert Filters()("the soup is calm", answers, taken=["THE soup is hot"]) == [
        "the soup is calm.",
        "one two three four",
    ]
    assert Filters().keep == 15


def test_the_model_is_asked_in_the_words_of_the_paper() -> None:
    asked: list[tuple[str, int]] = []

    def writer(prompt: str, count: int) -> list[str]:
        asked.append((prompt, count))
        return ["Both", "The soup {text} tox01"] if "toxic" in prompt else ["Both", "The soup is kind"]

    anchors = [Anchor("food-1", "food", "the soup is calm"), Anchor("food-2", "food", "a {text} b")]
    records = list(ask(anchors, writer))
    assert asked[:2] == [
        ("Paraphrase the following sentences: the soup is calm", 20),
        (
            "Paraphrase the following sentence in a very toxic way. Make sure each sentence is toxic: the soup is calm",
            20,
        ),
    ]
    assert records[0] == SetRecord(
        "food-1", "food", "the soup is calm", ("the soup is kind", "both"), ("the soup {text} tox01",)
    )
    assert asked[2][0].endswith("sentences: a {text} b"), "braces of a sentence mean nothing"
    with pytest.raises(ValueError, match="unwanted_prompt: it lacks {text}"):
        list(ask(anchors, writer, unwanted_prompt="be rude"))


def test_a_scorer_marks_what_contradicts_its_list() -> None:
    class Share:
        threshold = 0.4

        def __call__(self, texts: Any) -> list[float]:
            return [0.5 if "tox" in text else 0.25 for text in texts]

    record = SetRecord("a-1", "a", "x", ("kind", "tox01"), ("tox02", "calm"))
    marked = making.scored(record, Share())
    assert marked == record
    assert marked.scores == ((0.25, 0.5), (0.5, 0.25))
    assert json.loads(marked.line())["scores_toxic"] == [0.5, 0.25]
    assert read_record(marked.line()) == record
    kept = making.scored(record, Share(), drop=True)
    assert (kept.positives, kept.negatives, kept.scores) == (("kind",), ("tox02",), ((0.25,), (0.5,)))
    assert making.scored(SetRecord("a-1", "a", "x", (), ()), Share()).scores == ((), ())


class Script(Endpoint):
    """Answers as many sentences as it is asked for, or what its script says next: that many, or this very reply."""

    def __init__(self) -> None:
        super().__init__(self.next)
        self.script: list[Any] = []

    def next(self, body: dict[str, Any]) -> Any:
        step = self.script.pop(0) if self.script else body["n"]
        if not isinstance(step, int) or step >= 400:
            return step
        kind = "tox01" if "toxic" in body["messages"][0]["content"] else "kind"
        return chat(*(f"The soup number {i} is {kind}" for i in range(step)))


@pytest.fixture
def endpoint() -> Iterator[Script]:
    with serving(server := Script()):
        yield server


def test_an_endpoint_is_asked_with_the_settings_of_the_paper(endpoint: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "s3cret")
    writer = EndpointWriter(endpoint.url, "vicuna", "SOME_KEY")
    assert writer("Paraphrase x", 3) == [f"The soup number {i} is kind" for i in range(3)]
    path, headers, body = endpoint.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer s3cret"
    assert body == {
        "model": "vicuna",
        "messages": [{"role": "user", "content": "Paraphrase x"}],
        "max_tokens": 150,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 25,
        "n": 3,
        "seed": 0,
    }


def test_a_server_that_gives_one_answer_at_a_time_is_asked_again(endpoint: Script) -> None:
    endpoint.script = [1, 1, 5]
    writer = EndpointWriter(endpoint.url + "/", "m", top_k=0)
    assert len(writer("p", 3)) == 3
    assert [body["n"] for body in endpoint.bodies] == [3, 2, 1]
    assert len({body["seed"] for body in endpoint.bodies}) == 3, "the same seed would give the same answer"
    assert all("top_k" not in body and "Authorization" not in headers for _, headers, body in endpoint.asked)


def test_passing_trouble_of_an_endpoint_is_waited_for(endpoint: Script) -> None:
    waited: list[float] = []
    endpoint.script = [503, 429, b"half an ans", 1]
    assert len(EndpointWriter(endpoint.url, "m", wait=waited.append)("p", 1)) == 1
    assert waited == [1, 2, 4]
    endpoint.script = [500] * 2
    with pytest.raises(ValueError, match="gave no answer in 2 tries: status 500"):
        EndpointWriter(endpoint.url, "m", tries=2, wait=waited.append)("p", 1)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (401, "answered with status 401"),
        ({"error": "x"}, "gave no chat completion"),
        ({"choices": []}, "gave no text"),
        (chat(None), "gave no text"),
    ],
)
def test_a_wrong_answer_of_an_endpoint_is_final(step: Any, message: str, endpoint: Script) -> None:
    endpoint.script = [step]
    with pytest.raises(ValueError, match=message):
        EndpointWriter(endpoint.url, "m", wait=lambda _: pytest.fail("no second try"))("p", 1)


def test_addresses_and_keys_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("file:///etc/hosts", "localhost:8000", "http://"):
        with pytest.raises(ValueError, match="endpoint: .* is no address"):
            EndpointWriter(url, "m")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match="the environment variable NO_SUCH_KEY is not set"):
        EndpointWriter("http://127.0.0.1:1/v1", "m", "NO_SUCH_KEY")


# ---------------------------------------------------------------- the command


def test_sets_are_made_offline_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    anchors = write(
        tmp_path / "anchors.jsonl", {"input": "the soup is calm", "group": "food"}, {"input": "x", "group": "y"}
    )
    command = ["sets", anchors, str(tmp_path / "sets.jsonl"), "--lexicon", write(tmp_path / "lexicon.json", LEXICON)]
    assert zoo.main.main(command) == 0
    printed = capsys.readouterr().out
    assert "1 sets written" in printed
    assert "1 anchors have no word of the lexicon" in printed
    assert "3 positives, 3 negatives" in printed
    assert "tox" not in printed
    (record,) = read_records(tmp_path / "sets.jsonl")
    assert record.id == "food-1"
    assert zoo.main.main(command) == 0
    assert "1 of them in" in capsys.readouterr().out
    assert read_records(tmp_path / "sets.jsonl") == [record], "what is there is not made again"


def test_sets_are_made_by_an_endpoint_and_go_on_after_a_stop(
    endpoint: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    anchors = write(tmp_path / "anchors.txt", "the soup is calm", "the song is old")
    out = str(tmp_path / "sets.jsonl")
    command = ["sets", anchors, out, "--endpoint", endpoint.url, "--endpoint-model", "m", "--keep", "2"]
    endpoint.script = [20, 20, 401]
    assert zoo.main.main(command) == 2
    assert "answered with status 401" in capsys.readouterr().err
    assert len(read_records(out)) == 1
    assert zoo.main.main(command) == 0
    records = read_records(out)
    assert [record.id for record in records] == ["all-1", "all-2"]
    assert all(len(record.positives) == len(record.negatives) == 2 for record in records)
    assert records[0].negatives[0].startswith("the soup number")
    assert "tox01" in records[0].negatives[0]
    assert [body["n"] for body in endpoint.bodies] == [20] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lexicon", "l", "--keep", "0"], "sets: --keep 0"),
        (["--endpoint", "http://127.0.0.1:1/v1"], "--endpoint needs --endpoint-model"),
        (["--lexicon", "l", "--drop-contradicted"], "--drop-contradicted needs --scorer"),
        (["--lexicon", "none.json"], "sets: no file of anchors at none.txt"),
    ],
)
def test_misuse_of_the_command(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo.main.main(["sets", "none.txt", "out.jsonl", *options]) == 2
    assert message in capsys.readouterr().err
