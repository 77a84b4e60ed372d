"""A grid of coloured cells as SVG; each cell says its own number when pointed at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from poemerge.report.html import Safe, esc

__all__ = ["diverging", "heatmap"]

_LOW, _MIDDLE, _HIGH = (179, 88, 6), (240, 240, 240), (5, 84, 140)
"""Orange, light grey, blue: told apart with every kind of colour blindness; the ends differ in grey too."""


def diverging(value: float) -> tuple[str, str]:
    """Colours of a cell and of text on it, for a `value` from −1 (orange) over 0 (grey) to 1 (blue)."""
    value = max(-1.0, min(1.0, value))
    end = _HIGH if value > 0 else _LOW
    share = abs(value)
    mixed = [round(middle + (other - middle) * share) for middle, other in zip(_MIDDLE, end, strict=True)]
    # WCAG's relative luminance; at 0.179 black and white have the same contrast, 4.58.
    linear = [part / 3294.6 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in mixed]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#{:02x}{:02x}{:02x}".format(*mixed), "#000000" if luminance > 0.179 else "#ffffff"


def heatmap(
    identity: str,
    title: str,
    description: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    colour: Callable[[float], float],
    tip: Callable[[int, int, float], str],
    text: Callable[[float], str] | None = None,
    groups: Sequence[str] | None = None,
) -> Safe:
    """The grid `values [row, column]`; None is an empty cell.

    Arguments: `colour` maps a value into [−1, 1]; `tip` is what a cell says when pointed at; `text` what is written in
    it; `groups` names runs of columns, drawn above with a gap between them in place of the columns' own names.
    """
    cell = 44 if text is not None else max(9, min(22, 760 // max(len(columns), 1)))
    height = 26
    left = 14 + round(7.6 * max(map(len, rows), default=0))  # wide enough for any sans-serif of 12 px
    slanted = groups is None
    top = 14 + (round(3.9 * max(map(len, columns), default=0)) + 12 if slanted else 18)
    starts, place = [], float(left)
    for number in range(len(columns)):
        if groups is not None and number and groups[number] != groups[number - 1]:
            place += 6
        starts.append(place)
        place += cell
    width = round(place + (round(3.2 * len(columns[-1])) + 16 if slanted and columns else 8))
    parts = []
    for number, name in enumerate(columns if slanted else ()):
        x = starts[number] + cell / 2
        parts.append(
            f'<text class="ink" font-size="11" transform="translate({x:.1f} {top - 6}) rotate(-38)">{esc(name)}</text>'
        )
    for number, name in enumerate(groups or ()):
        if number == 0 or (groups or ())[number - 1] != name:
            parts.append(f'<text class="soft" font-size="11" x="{starts[number]:.1f}" y="{top - 8}">{esc(name)}</text>')
    for r, name in enumerate(rows):
        y = top + r * height
        middle = f'y="{y + height / 2 + 4:.1f}"'
        parts.append(f'<text class="ink" font-size="12" x="{left - 8}" {middle} text-anchor="end">{esc(name)}</text>')
        for c in range(len(columns)):
            value = values[r][c]
            if value is None:
                continue
            fill, ink = diverging(colour(value))
            x = starts[c]
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{cell - 1}" height="{height - 1}" fill="{fill}">'
                f"<title>{esc(tip(r, c, value))}</title></rect>"
            )
            if text is not None:
                parts.append(
                    f'<text font-size="11" x="{x + (cell - 1) / 2:.1f}" {middle} text-anchor="middle" '
                    f'style="fill:{ink}" pointer-events="none">{esc(text(value))}</text>'
                )
    return Safe(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + len(rows) * height + 4}" role="img" '
        f'style="max-width:{max(width, 320)}px" aria-labelledby="{identity}-title {identity}-desc">'
        f'<title id="{identity}-title">{esc(title)}</title><desc id="{identity}-desc">{esc(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )
