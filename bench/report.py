"""The rows of the table, and how they are written down."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One line: what was measured, the bar it has to meet, and the figures behind the ratio.

    `met` is None where there is no bar, or nothing could be measured.
    """

    title: str
    bar: str
    measured: str
    met: bool | None
    details: str = ""

    @property
    def verdict(self) -> str:
        """`met`, `not met`, or a dash."""
        if self.met is None:
            return "-"
        return "met" if self.met else "NOT MET"


def console_line(row: Row) -> str:
    """A row for a terminal."""
    line = f"{row.verdict:8} {row.measured:>18}  bar {row.bar:10} {row.title}"
    return f"{line}\n{'':9}{row.details}" if row.details else line


def write_results(
    path: Path,
    rows: Sequence[Row],
    versions: Mapping[str, str],
    warning: str | None,
    *,
    took: Mapping[str, float],
    missing: Sequence[str],
) -> None:
    """Writes the table as Markdown; nothing in it names the machine. `took` are seconds of each
    scenario, `missing` those that did not run (yet)."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    table = ["| | bar | measured | |", "|---|---|---|---|"]
    details = []
    for number, row in enumerate(rows, 1):
        table.append(f"| {row.title} | {row.bar} | {row.measured} | {row.verdict} |")
        if row.details:
            details.append(f"{number}. {row.title}: {row.details}")
    text = [
        "# What `make bench` measured",
        "",
        f"{today}, {os.cpu_count()} cores: the server on one, the load on another. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
        "Ratios are of measurements taken in turn in one run: the median, and in brackets the "
        "lowest and highest. Absolute figures belong to this machine; compare ratios only.",
        "",
        *([f"Beware: {warning}.", ""] if warning else []),
        *([f"Incomplete: {', '.join(missing)} did not run.", ""] if missing else []),
        *table,
        "",
        "## The figures behind them",
        "",
        *details,
        "",
        "It took " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in took.items()) + ".",
        "",
        "How it is measured stands in the docstrings of `bench/scenarios.py` and at the top of "
        "`bench/load.c`.",
    ]
    path.write_text("\n".join(text) + "\n")
