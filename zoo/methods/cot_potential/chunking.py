"""Where a trace is cut: always between tokens, never by tokenising text again."""

from __future__ import annotations

import re
from collections.abc import Sequence

from zoo.errors import did_you_mean

#: Ways of cutting. The paper's way is not known; twenty equal chunks are our default for texts.
CHUNKERS = ("equal_k", "every_m_tokens", "newline", "sentence", "step_token")


def cut_trace(pieces: Sequence[str], answer_start: int, chunker: str, size: int = 20, token: str = "") -> list[int]:
    """Return the boundaries `0 = t_0 < .. < t_K = T` of a trace; the answer is a chunk of its own.

    Args:
        pieces: Text of each token.
        answer_start: Position of the first token of the answer; `T` if there is none.
        chunker: One of `CHUNKERS`: `size` equal chunks, chunks of `size` tokens, after line breaks, after the end of a
            sentence, or after each token whose text is `token`.
        size: See `chunker`.
        token: See `chunker`.

    Raises:
        ValueError: If the chunker is unknown or its option is out of range.
    """
    if chunker not in CHUNKERS:
        raise ValueError(f"chunker: {chunker!r} is not accepted; {did_you_mean(chunker, CHUNKERS)}")
    if size < 1:
        raise ValueError(f"chunk_size: {size} is not accepted; accepted: 1 or more")
    if chunker == "step_token" and not token:
        raise ValueError("step_token: empty with chunker: step_token; accepted: the text of a token")
    total, body = len(pieces), min(answer_start, len(pieces))
    if chunker == "equal_k":
        inner = [round(i * body / size) for i in range(1, size)]
    elif chunker == "every_m_tokens":
        inner = list(range(size, body, size))
    elif chunker == "newline":
        inner = [i + 1 for i, piece in enumerate(pieces[:body]) if "\n" in piece]
    elif chunker == "sentence":
        inner = _sentence_ends(pieces[:body])
    else:
        inner = [i + 1 for i, piece in enumerate(pieces[:body]) if piece == token]
    return sorted({0, *inner, body, total})


def _sentence_ends(pieces: Sequence[str]) -> list[int]:
    """Positions after a full stop, question or exclamation mark that a space, a line break or nothing follows."""
    ends = []
    for i, piece in enumerate(pieces):
        following = pieces[i + 1] if i + 1 < len(pieces) else " "
        inside = re.search(r"[.!?][\"')\]]*\s", piece)
        at_end = re.search(r"[.!?][\"')\]]*$", piece) and following[:1].isspace()
        if inside or at_end:
            ends.append(i + 1)
    return ends
