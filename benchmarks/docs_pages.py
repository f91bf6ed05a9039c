"""What it takes to write the pages of all methods and their overview: claims files read once, and read at each use.

python benchmarks/docs_pages.py [--out results/bench/docs_pages.json]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from zoo.bench.report import comparison, write_bench
from zoo.claims import reader
from zoo.pages.method import assemble, method_names, overview

RESULTS = Path("results")


def seconds(parsed: Any) -> float:
    """Return the processor time of all pages, with `parsed` in the place of the reader's cache."""
    kept: Any = reader._parsed
    kept.cache_clear()
    reader._parsed = parsed
    started = time.process_time()
    try:
        for name in method_names():
            assemble(name, "", RESULTS)
        overview(RESULTS)
    finally:
        reader._parsed = kept
    return time.process_time() - started


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/bench/docs_pages.json"))
    args = parser.parse_args()
    ours: Any = reader._parsed
    spent = {"each": seconds(ours.__wrapped__), "once": seconds(ours)}
    print(spent)
    what = "processor time of writing all pages of methods, with claims files parsed at each use, over once"
    write_bench(
        args.out, comparison("docs_pages", what, spent["each"] / spent["once"], "", ">=", 3, {"seconds": spent})
    )


if __name__ == "__main__":
    main()
