"""Equations as MathML, which browsers draw themselves: the pages need no network and no script."""

from __future__ import annotations

import html
import re

#: What `pymdownx.arithmatex` leaves with `generic: true`.
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
#: Commands that the converter does not know.
SUBSTITUTES = {r"\\arg(?![A-Za-z])": r"\\mathrm{arg}\\,"}


def convert(latex: str, display: str) -> str:
    """Return MathML for LaTeX.

    Raises:
        ValueError: If it is not understood.
    """
    from latex2mathml.converter import convert as to_mathml

    text = html.unescape(latex).strip()
    for pattern, known in SUBSTITUTES.items():
        text = re.sub(pattern, known, text)
    try:
        drawn = str(to_mathml(text, display=display))
    except Exception as error:  # the converter has a class of its own for each mistake
        raise ValueError(f"equation {latex.strip()!r}: {type(error).__name__} {error}") from error
    unknown = re.search(r">(\\[A-Za-z]+)<", drawn)
    if unknown:
        raise ValueError(f"equation {latex.strip()!r}: {unknown[1]} is not known")
    return drawn


def replace_equations(page: str) -> str:
    """Replace the equations of an HTML page.

    Raises:
        ValueError: If one is not understood.
    """
    page = DISPLAY.sub(lambda match: f'<div class="equation">{convert(match[1], "block")}</div>', page)
    return INLINE.sub(lambda match: convert(match[1], "inline"), page)
