"""``pytest -m faults`` ends with a table: what was injected, what happened, what was lost."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

ROW = "fault"


def pytest_itemcollected(item: pytest.Item) -> None:
    for marker in item.iter_markers("faults"):
        fault, happens, lost = marker.args
        item.user_properties.append((ROW, [fault, happens, lost]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if "faults" not in (config.getoption("markexpr") or ""):
        return
    rows: dict[tuple[str, ...], Counter] = defaultdict(Counter)
    kills: Counter = Counter()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties:
                if name == ROW:
                    rows[tuple(value)][outcome] += 1
                elif name == "kills":
                    kills += Counter(value)
    write = terminalreporter.write_line
    terminalreporter.section("faults")
    write("| fault | what happens | what is lost | tests |")
    write("|---|---|---|---|")
    for row, outcomes in sorted(rows.items()):
        write(f"| {' | '.join(row)} | {', '.join(f'{n} {outcome}' for outcome, n in outcomes.items())} |")
    if kills:
        write(f"\n{kills.total()} kills: {', '.join(f'{n} {phase}' for phase, n in kills.items())}")
