"""Words and files for sets of wanted and unwanted sentences; unwanted words are stand-ins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LEXICON = {
    "adjective": {"wanted": ["calm", "kind", "old", "new"], "unwanted": ["tox01", "tox02", "tox03"]},
    "verb": {"wanted": ["seems", "looks"], "unwanted": ["toxes", "toxed"]},
}


def write(path: Path, *lines: Any) -> str:
    """Write a file, lines that are no texts as JSON; return its path."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)
