"""Who was outvoted where: the experts' shares of the weights by matrix, and how far each matrix's energy fell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from poemerge.checkpoints.roles import ROLES, block, role
from poemerge.report.heatmap import heatmap
from poemerge.report.html import Safe, Section, esc, figure, paragraph, subheading, table
from poemerge.report.style import GREY, OURS, svg_of
from poemerge.report.style import figure as new_figure

__all__ = ["weights_section"]

WIDEST = 160
"""Columns of the grid; deeper models are shown block by block, their matrices averaged."""
SPANS = (1.25, 2.0, 8.0)
"""How many times an equal share the full colour may stand for: the least that holds every cell, or the last."""
OUTVOTED = 0.25
"""An expert whose share is below this part of an equal share counts as outvoted in a matrix."""

Line = Mapping[str, Any]


def weights_section(ledger: Sequence[Line]) -> Section | None:
    """The grid expert × matrix, the most outvoted, and the energies; None where no matrix was merged with weights."""
    lines = [line for line in ledger if line.get("weights")]
    if not lines:
        return None
    lines = sorted(lines, key=_depth)
    experts = sorted({name for line in lines for name in line["weights"]})
    body = [
        _grid(lines, experts),
        subheading("How often each expert was outvoted"),
        _outvoted(lines, experts),
        subheading("Energy"),
        _energy(lines),
    ]
    return Section("weights", "Who was outvoted where", Safe("".join(body)))


def _depth(line: Line) -> tuple[int, int, str]:
    number = block(line["name"])
    return (-1 if number is None else number, ROLES.index(role(line["name"])), line["name"])


def _relative(line: Line, expert: str) -> float | None:
    """The expert's share over an equal one: 1 is an equal say, 0 none."""
    share = line["weights"].get(expert)
    return None if share is None else float(share) * len(line["weights"])


def _grid(lines: Sequence[Line], experts: Sequence[str]) -> Safe:
    names = {line["name"]: line for line in lines}
    blocks = [_block_name(line) for line in lines]
    if len(lines) <= WIDEST:
        columns, groups = list(names), blocks
        values = [[_relative(line, expert) for line in lines] for expert in experts]
    else:
        columns = groups = list(dict.fromkeys(blocks))
        values = []
        for expert in experts:
            row: list[float | None] = []
            for wanted in columns:
                inside = [_relative(line, expert) for line, own in zip(lines, blocks, strict=True) if own == wanted]
                there = [value for value in inside if value is not None]
                row.append(sum(there) / len(there) if there else None)
            values.append(row)
    numbers = [name if name == "outside" else f"block {name}" if i == 0 else name for i, name in enumerate(groups)]
    if len(lines) <= WIDEST:
        first = groups[0]
        numbers = [f"block {name}" if name == first and name != "outside" else name for name in groups]
    lowest = min(
        (
            (value, experts[r], columns[c])
            for r, row in enumerate(values)
            for c, value in enumerate(row)
            if value is not None
        )
    )
    description = (
        f"{len(experts)} experts by {len(columns)} columns in order of depth. The least say: {lowest[1]} in "
        f"{lowest[2]}, {lowest[0]:.2f} of an equal share."
    )
    known = [value for row in values for value in row if value is not None]
    span = next((one for one in SPANS if all(1 / one <= value <= one for value in known)), SPANS[-1])
    drawn = heatmap(
        "weights",
        "Share of the weights by expert and matrix",
        description,
        experts,
        columns,
        values,
        colour=lambda value: math.log(max(value, 1e-6)) / math.log(span),
        tip=lambda r, c, value: f"{experts[r]} in {columns[c]}: {value:.2f} × an equal share",
        groups=numbers,
    )
    caption = (
        "The weight of each expert in the product, matrix by matrix, in order of depth"
        + (" and within a block: " + ", ".join(_roles_of(lines)) if len(lines) <= WIDEST else ", averaged by block")
        + f". Grey: an equal share; blue: up to {span:g} times that; orange: down to {1 / span:g} of it"
        + (", outvoted" if span == SPANS[-1] else "")
        + ". Point at a cell for its figure."
    )
    return figure(drawn, caption, wide=True)


def _block_name(line: Line) -> str:
    number = block(line["name"])
    return "outside" if number is None else str(number)


def _roles_of(lines: Sequence[Line]) -> list[str]:
    found = {role(line["name"]) for line in lines}
    return [name for name in ROLES if name in found]


def _outvoted(lines: Sequence[Line], experts: Sequence[str]) -> Safe:
    rows: list[list[object]] = []
    for expert in experts:
        own = [(value, line["name"]) for line in lines if (value := _relative(line, expert)) is not None]
        below = sum(value < OUTVOTED for value, _ in own)
        least, most = min(own), max(own)
        rows.append(
            [
                expert,
                f"{sum(value for value, _ in own) / len(own):.2f}",
                f"{below} of {len(own)}",
                _where(*least),
                _where(*most),
            ]
        )
    rows.sort(key=lambda row: float(str(row[1])))
    headings = ["expert", "mean share ÷ equal", f"below {OUTVOTED:g} of equal", "least", "most"]
    return table(headings, rows)


def _where(value: float, name: str) -> Safe:
    return Safe(f"{value:.2f}<small>{esc(name.removesuffix('.weight'))}</small>")


def _energy(lines: Sequence[Line]) -> Safe:
    """Energy over the steps where the ledger has the trace, else from first to last; and the outcomes."""
    found = [line for line in lines if line.get("energy_first")]
    steps = sorted(int(line["steps"]) for line in found)
    outcomes: dict[str, int] = {}
    for line in lines:
        outcomes[line["outcome"]] = outcomes.get(line["outcome"], 0) + 1
    words = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    if not found:
        return paragraph(f"Outcomes: {words}.")
    risen = sum(line["energy_last"] > line["energy_first"] * (1 + 1e-9) for line in found if line["energy_first"] > 0)
    told = paragraph(
        f"Outcomes: {words}. Steps: {steps[0]} to {steps[-1]}, median {steps[len(steps) // 2]}. "
        + ("The energy rose nowhere." if not risen else f"The energy ended above its start in {risen} matrices.")
    )
    with new_figure(8.6, 2.9) as (drawn, axes):
        for line in found:
            trace = line.get("energy") or [line["energy_first"], line["energy_last"]]
            places = range(len(trace)) if line.get("energy") else [0, line["steps"]]
            change = [100 * (value / trace[0] - 1) for value in trace]
            axes.plot(list(places), change, color=OURS, linewidth=0.9, alpha=0.45)
        axes.axhline(0.0, color=GREY, linewidth=0.8)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("energy, % from the start")
        axes.ticklabel_format(axis="y", useOffset=False, style="plain")
    ratios = sorted(line["energy_last"] / line["energy_first"] for line in found)
    svg = svg_of(
        drawn,
        "energy",
        "Energy by step",
        f"{len(found)} matrices; the energy at the end is {ratios[0]:.4f} to {ratios[-1]:.4f} of that at the start, "
        f"median {ratios[len(ratios) // 2]:.4f}.",
    )
    return Safe(told + figure(Safe(svg), "A line for each matrix; the start is the Gaussian solution."))
