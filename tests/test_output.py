"""Tables on standard output, in a terminal and in a log."""

from __future__ import annotations

import pytest
from rich.table import Table

from zoo.output import table_console


def test_a_table_in_a_log_keeps_its_cells_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    cells = ["a-claim-with-quite-a-long-name-out-of-distribution", "median of a_long_run_name 0.505", "+0.2 ± 0.018"]
    table = Table(*("claim", "left", "difference"))
    table.add_row(*cells)
    table_console().print(table)
    line = next(line for line in capsys.readouterr().out.splitlines() if cells[0] in line)
    assert all(cell in line for cell in cells)


def test_columns_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert table_console().width == 60
