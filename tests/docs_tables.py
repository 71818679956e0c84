"""The tables of docs/ that are made from the code: `python -m tests.docs_tables` writes them anew.

Each stands between two comments in its page; everything around it is written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from notifyd.metrics import Metrics
from notifyd.options import Option, options, sections

DOCS = Path(__file__).parents[1] / "docs"

_OBVIOUS = {"a text that is not empty", "a list", "a list that is not empty", "a table"}


class Table(NamedTuple):
    """A page, the name between its comments, and what stands there."""

    page: str
    name: str
    make: Callable[[], str]


def option_tables() -> str:
    """A heading and a table for each section of the settings."""
    known = list(options())
    parts = []
    for section, struct in sections().items():
        rows = [
            f"| `{option.name}` | {_default(option)} | {_cell(option.meaning)}{_takes(option)} |"
            for option in known
            if option.section == section
        ]
        about = (struct.__doc__ or "").split("\n\n")[0]
        head = [f"### {section}", "", about, "", "| option | default | meaning |", "|---|---|---|"]
        parts.append("\n".join([*head, *rows]))
    return "\n\n".join(parts)


def metric_table() -> str:
    """Every metric in one table."""
    rows = []
    for metric in Metrics().describe():
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "–"
        rows.append(f"| `{metric.name}` | {metric.type} | {labels} | {_cell(metric.help)} |")
    return "\n".join(["| metric | type | labels | meaning |", "|---|---|---|---|", *rows])


def _default(option: Option) -> str:
    value = option.default
    if value is None or value in ([], {}):
        return "–"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _takes(option: Option) -> str:
    if option.unit is None and option.expects in _OBVIOUS:
        return ""
    said = option.expects if option.unit is None else f"{option.unit}, {option.expects}"
    return f" ({_cell(said)})"


def _cell(text: str) -> str:
    """Text for a cell: its stars are stars, but for those that are code already."""
    pieces = text.replace("|", "\\|").split("`")
    pieces[::2] = [piece.replace("*", "\\*") for piece in pieces[::2]]
    return "`".join(pieces)


TABLES = (
    Table("configuration.md", "options", option_tables),
    Table("metrics.md", "metrics", metric_table),
)


def with_table(text: str, table: Table) -> str:
    """`text` with the table as the code has it; raises ValueError where its place is missing."""
    begin, end = f"<!-- {table.name}: made by python -m tests.docs_tables -->", "<!-- end -->"
    pattern = re.compile(f"(?<={re.escape(begin)}\n).*?(?={re.escape(end)})", re.DOTALL)
    made, count = pattern.subn(lambda _: f"\n{table.make()}\n\n", text)
    if count != 1:
        raise ValueError(f"{table.page} has {count} places for the table {table.name}")
    return made


def main() -> None:
    """Write every table anew."""
    for table in TABLES:
        page = DOCS / table.page
        page.write_text(with_table(page.read_text("utf-8"), table), "utf-8")


if __name__ == "__main__":
    main()
