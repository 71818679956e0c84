"""`python -m bench`: measures, prints the table, and of a full run writes bench/results.md, anew
after each scenario."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bench.cluster_scenarios import CLUSTER_SCENARIOS
from bench.errors import BenchError
from bench.machine import choose_cores, other_work, versions
from bench.report import Row, console_line, write_results
from bench.scenarios import SCENARIOS as OWN_SCENARIOS
from bench.scenarios import open_bench
from bench.store_scenarios import STORE_SCENARIOS
from bench.subjects import DEFAULT_COMMAND
from bench.trigger_scenarios import TRIGGER_SCENARIOS

SCENARIOS = {**OWN_SCENARIOS, **STORE_SCENARIOS, **TRIGGER_SCENARIOS, **CLUSTER_SCENARIOS}
RESULTS = Path(__file__).parent / "results.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 every bar met, 1 one not met or not measured, 2 usage."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("scenario", nargs="*", help="which to run; all of them by default")
    parser.add_argument("--quick", action="store_true", help="once and briefly; writes nothing")
    parser.add_argument("--list", action="store_true", help="name the scenarios and end")
    parser.add_argument(
        "--command",
        type=shlex.split,
        default=list(DEFAULT_COMMAND),
        help="starts the server instead of `notifyd serve`; {config} is its settings file",
    )
    asked = parser.parse_args(arguments)
    if asked.list:
        for name, scenario in SCENARIOS.items():
            print(f"{name:10} {' '.join((scenario.__doc__ or '').split())}")
        return 0
    unknown = [name for name in asked.scenario if name not in SCENARIOS]
    if unknown:
        parser.error(f"no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    chosen = [name for name in SCENARIOS if not asked.scenario or name in asked.scenario]
    signal.signal(signal.SIGTERM, _end)
    rows: list[Row] = []
    took: dict[str, float] = {}
    full = len(chosen) == len(SCENARIOS) and not asked.quick
    warning = other_work()
    if warning:
        print(f"beware: {warning}")
    try:
        with open_bench(choose_cores(), asked.command, quick=asked.quick) as bench:
            for name in chosen:
                print(f"\n{name}", flush=True)
                began = time.monotonic()
                try:
                    for row in SCENARIOS[name](bench):
                        rows.append(row)
                        print(console_line(row), flush=True)
                except BenchError as e:
                    rows.append(Row(name, "measured", "failed", False, str(e).splitlines()[0]))
                    print(f"failed: {e}", flush=True)
                took[name] = time.monotonic() - began
                print(f"{'':9}took {took[name]:.0f} s", flush=True)
                if full:
                    checked = [*rows, bench.checks.row] if bench.checks.runs else rows
                    missing = chosen[len(took) :]
                    write_results(RESULTS, checked, versions(), warning, took=took, missing=missing)
            if bench.checks.runs:
                rows.append(bench.checks.row)
                print(f"\n{console_line(bench.checks.row)}")
    except BenchError as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1
    return 1 if any(row.met is False for row in rows) else 0


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(1)  # unwinds, so that every server is ended


if __name__ == "__main__":
    sys.exit(main())
