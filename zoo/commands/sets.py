"""make sets of wanted and unwanted sentences from anchors

The sets of `contrastive_perplexity`, in the file format that the datamodule `perplexity_set_files` reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import UsageError

if TYPE_CHECKING:
    from datamodules.perplexity_sets.records import Anchor, SetRecord

DESCRIPTION = """\
Make positives and hard negatives for anchors: by words of a lexicon (offline), by a model of transformers, or by an
OpenAI-compatible endpoint. Prompts and settings are those of arXiv 2401.08491 and its released script. What a model
writes is never printed. A run that was stopped goes on where it was.
"""


def main(argv: list[str]) -> int:
    """Write the sets and say how many there are."""
    args = parse(argv)
    try:
        from datamodules.perplexity_sets.records import read_anchors, read_records, write_records

        anchors = read_anchors(args.anchors, args.per_group)
        done = {record.id for record in read_records(args.out)} if has_records(args.out) else set()
        left = [anchor for anchor in anchors if anchor.id not in done]
        print(f"{len(anchors)} anchors, {len(anchors) - len(left)} of them in {args.out} already", flush=True)
        made: list[tuple[int, int]] = []
        count = write_records(args.out, counted(score(args, make(args, left)), made))
    except (ValueError, OSError) as error:
        raise UsageError(f"sets: {error}") from error
    print(f"{count} sets written to {args.out}; {len(left) - count} anchors have no word of the lexicon")
    if made:
        fewest = [min(sizes) for sizes in zip(*made, strict=True)]
        print(f"the smallest has {fewest[0]} positives, {fewest[1]} negatives")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="zoo sets", description=DESCRIPTION)
    parser.add_argument("anchors", type=Path, help="wanted sentences: .jsonl with input and group, or one a line")
    parser.add_argument("out", type=Path, help="file of sets, .jsonl; records are added to it")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--lexicon", type=Path, help='{"adjective": {"wanted": [...], "unwanted": [...]}, ...}')
    source.add_argument("--model", help="path or name of a language model of transformers")
    source.add_argument("--endpoint", help="address of an endpoint up to the version, http://host:port/v1")
    parser.add_argument("--endpoint-model", default="", help="name of the model at the endpoint")
    parser.add_argument("--key-variable", default="", help="environment variable that holds the endpoint's key")
    parser.add_argument("--per-group", type=int, default=500, help="most anchors of a group; 0 for all")
    parser.add_argument("--candidates", type=int, default=20, help="answers to each prompt")
    parser.add_argument("--keep", type=int, default=15, help="sentences kept of each kind, the closest by ROUGE-L")
    parser.add_argument("--keep-case", action="store_true", help="do not lower-case what a model writes")
    parser.add_argument("--wanted-prompt", help="prompt of the positives; {text} stands for the anchor")
    parser.add_argument("--unwanted-prompt", help="prompt of the negatives")
    parser.add_argument("--template", help="what a model without a chat template is given; {prompt} in it")
    parser.add_argument("--max-new-tokens", type=int, default=150)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=25)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scorer", help="words, linear, or a classifier of transformers: its scores are written too")
    parser.add_argument("--label", type=int, default=1, help="index of the classifier's unwanted class")
    parser.add_argument("--word-list", help="file of unwanted words for the scorer words")
    parser.add_argument("--drop-contradicted", action="store_true", help="leave out sentences that it finds misplaced")
    args = parser.parse_args(argv)
    for name, least in (("per_group", 0), ("candidates", 1), ("keep", 1), ("max_new_tokens", 1)):
        if (value := getattr(args, name)) < least:
            raise UsageError(f"sets: --{name.replace('_', '-')} {value}", f"accepted: {least} or more")
    if args.drop_contradicted and not args.scorer:
        raise UsageError("sets: --drop-contradicted needs --scorer", "accepted: words, linear, or a classifier")
    if args.endpoint and not args.endpoint_model:
        raise UsageError("sets: --endpoint needs --endpoint-model", "the name that the server knows the model by")
    return args


def has_records(file: Path) -> bool:
    """Whether a file has something in it."""
    return file.is_file() and file.stat().st_size > 0


def make(args: argparse.Namespace, anchors: list[Anchor]) -> Iterator[SetRecord]:
    """Yield the sets of anchors; one without a word of the lexicon has none."""
    from datamodules.perplexity_sets import making

    if args.lexicon:
        lexicon = making.Lexicon.read(args.lexicon)
        sets = (making.replace_slots(anchor, lexicon, args.keep, args.seed) for anchor in anchors)
        yield from (record for record in sets if record is not None)
        return
    prompts = {"wanted_prompt": args.wanted_prompt, "unwanted_prompt": args.unwanted_prompt}
    filters = making.Filters(keep=args.keep, lower=not args.keep_case)
    given = {name: prompt for name, prompt in prompts.items() if prompt}
    yield from making.ask(anchors, build_writer(args), args.candidates, filters, **given)


def score(args: argparse.Namespace, records: Iterator[SetRecord]) -> Iterator[SetRecord]:
    """Add scores where a scorer is named."""
    if not args.scorer:
        yield from records
        return
    from callbacks.text_scorers import build_scorer, read_words
    from datamodules.perplexity_sets.making import scored

    words = read_words(args.word_list) if args.scorer == "words" else []
    scorer = build_scorer(args.scorer, words, args.label)
    for record in records:
        yield scored(record, scorer, args.drop_contradicted)


def build_writer(args: argparse.Namespace) -> Any:
    """Return the language model that is asked."""
    from datamodules.perplexity_sets.writers import EndpointWriter, TransformersWriter

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    settings: dict[str, Any] = {name: getattr(args, name) for name in names}
    if args.endpoint:
        return EndpointWriter(args.endpoint, args.endpoint_model, args.key_variable, **settings)
    return TransformersWriter(args.model, **({"template": args.template} if args.template else {}), **settings)


def counted(records: Iterator[SetRecord], sizes: list[tuple[int, int]]) -> Iterator[SetRecord]:
    """Pass records on and keep the sizes of their sets."""
    for record in records:
        sizes.append((len(record.positives), len(record.negatives)))
        yield record
