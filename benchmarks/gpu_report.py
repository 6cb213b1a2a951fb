"""Part `report` of `benchmarks/gpu.py`: the JSON files of the other parts as Markdown tables for docs/results.md."""

import json
from pathlib import Path
from typing import Any

COLUMNS = {
    "train": ("tokens_per_second", "ms_per_step", "mfu_of_sheet", "mfu_of_measured", "peak_gb", "estimated_gb"),
    "sample": ("us_per_position", "pixels_per_s", "of_floor", "seconds_to_build", "peak_gb"),
    "attention": ("forward", "backward"),
    "checkpoint": ("gb", "stall_ms", "stored_s"),
    "palette": ("seconds", "mse"),
}
"""Columns of the table of each part; other measurements become lines."""


def markdown(out: Path) -> str:
    """Every report in `out`: a table of the measurements that have the part's columns, and a line for each other."""
    texts = []
    for part in ("where", "tests", *COLUMNS, "learn"):
        path = out / f"{part}.json"
        if path.exists():
            texts.append(f"### {part}\n\n{_part(json.loads(path.read_text()))}")
    return "\n\n".join(texts)


def _part(report: dict[str, Any]) -> str:
    columns = COLUMNS.get(report["part"], ())
    measured = {name: value for name, value in report.items() if name not in ("part", "toy")}
    rows = {name: v for name, v in measured.items() if isinstance(v, dict) and any(c in v for c in columns)}
    present = [c for c in columns if any(c in v for v in rows.values())]
    lines = []
    if rows:
        lines += [f"| {' | '.join(['', *present])} |", "|" + " --- |" * (len(present) + 1)]
        lines += [f"| {name} | {' | '.join(_cell(v.get(c)) for c in present)} |" for name, v in rows.items()]
        lines.append("")
    lines += [f"* {name}: {_cell(value)}" for name, value in measured.items() if name not in rows]
    return "\n".join(lines).strip()


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(v)}" for name, v in value.items() if name != "where")
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value).replace("\n", " ")
