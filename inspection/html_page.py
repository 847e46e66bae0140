"""A page in one file: pictures inside it, tables that sort by click, nothing fetched from anywhere.

Every function returns HTML with all text escaped, so that names from a file cannot become markup.
"""

import base64
import html
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

Cell = str | int | float | None

CSS = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1d2329; --soft: #5b6670; --line: #d5dbe1;
  --panel: #f4f6f8; --link: #0060a0; --warn: #fff2cc; --warn-line: #c08a00; }
@media (prefers-color-scheme: dark) { :root { --page: #15191d; --text: #e4e8ec; --soft: #9aa6b1;
  --line: #39424b; --panel: #1f252b; --link: #7cc0f5; --warn: #3d3210; --warn-line: #d8a520; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0 auto; max-width: 72rem; padding: 1.25rem 1rem 4rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 0.5rem; padding-top: 0.75rem;
  border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: 0.5rem 0; overflow-wrap: anywhere; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; list-style: none; padding: 0;
  margin: 0.75rem 0; }
nav a { display: inline-block; padding: 0.25rem 0; }
.note { background: var(--warn); border-left: 4px solid var(--warn-line); padding: 0.6rem 0.9rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 0.6rem;
  margin: 1rem 0; }
.figures div { background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: 0.55rem 0.8rem; }
.figures dt { color: var(--soft); font-size: 0.85rem; }
.figures dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1rem 0; }
figcaption, caption { color: var(--soft); font-size: 0.9rem; text-align: left; padding: 0.35rem 0; }
caption { position: sticky; left: 0; padding: 0.45rem 0.7rem; }
.scroll { overflow-x: auto; max-width: 100%; border: 1px solid var(--line); border-radius: 6px; }
.scroll:focus-visible, button:focus-visible, a:focus-visible { outline: 2px solid var(--link);
  outline-offset: 2px; }
.scroll img { display: block; width: 100%; height: auto; background: #ffffff; }
.table { width: fit-content; margin: 1rem 0; }
.tall { max-height: 32rem; overflow-y: auto; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.28rem 0.7rem; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
thead th { position: sticky; top: 0; background: var(--page); border-bottom: 2px solid var(--soft);
  z-index: 1; }
td:not(.number) { white-space: normal; min-width: 5rem; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: inherit; position: sticky; left: 0; background: var(--page); }
.number { text-align: right; }
tbody tr:hover > * { background: var(--panel); }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0;
  padding: 0.3rem 0; cursor: pointer; }
th button::after { content: "\\2195"; display: inline-block; width: 1em; margin-left: 0.3em;
  color: var(--soft); font-weight: 400; }
th[aria-sort=ascending] button::after { content: "\\2191"; color: inherit; }
th[aria-sort=descending] button::after { content: "\\2193"; color: inherit; }
@media print { .scroll, .tall { overflow: visible; max-height: none; } nav { display: none; } }
"""

# Numbers first sort downwards, names upwards; another click turns it round. Missing values stay last.
SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const numeric = head.classList.contains("number");
    const now = head.getAttribute("aria-sort");
    const up = now ? now === "descending" : !numeric;
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
      return up ? order : -order;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
  }));
}
"""

# Nothing may be fetched: what the page shows is in the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Column:
    """A table's column: its heading, and for numbers how they are written (a format specification)."""

    heading: str
    number: str | None = None


@dataclass(frozen=True)
class Section:
    """A part of a page: its heading and its HTML."""

    heading: str
    body: str


def paragraph(text: str, *, note: bool = False) -> str:
    """A paragraph; as a `note` it stands out."""
    kind = ' class="note"' if note else ""
    return f"<p{kind}>{html.escape(text)}</p>\n"


def key_figures(figures: Sequence[tuple[str, str]]) -> str:
    """(what, value) pairs as a row of tiles."""
    tiles = (f"<div><dt>{html.escape(a)}</dt><dd>{html.escape(b)}</dd></div>" for a, b in figures)
    return f'<dl class="figures">{"".join(tiles)}</dl>\n'


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[Cell]],
    *,
    sorted_by: int | None = None,
    tall: bool = False,
) -> str:
    """A table that a click on a heading sorts; None and NaN are shown as a dash.

    Args:
        sorted_by: the column that `rows` are sorted by already (numbers downwards, text upwards).
        tall: show some rows at a time, and scroll through the rest.
    """
    heads = "".join(_heading(column, index == sorted_by) for index, column in enumerate(columns))
    body = "\n".join(_row(row, columns) for row in rows)
    label = html.escape(caption, quote=True)
    kind = "scroll table tall" if tall else "scroll table"
    return (
        f'<div class="{kind}" tabindex="0" role="region" aria-label="{label}">'
        f"<table data-sortable><caption>{label}</caption>\n"
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n"
    )


def _row(values: Sequence[Cell], columns: Sequence[Column]) -> str:
    first, *others = (_cell(*pair) for pair in zip(values, columns, strict=True))
    return f'<tr><th scope="row"{first}</th>' + "".join(f"<td{cell}</td>" for cell in others) + "</tr>"


def _heading(column: Column, sorted_now: bool) -> str:
    kind = ' class="number"' if column.number is not None else ""
    way = "ascending" if column.number is None else "descending"
    state = f' aria-sort="{way}"' if sorted_now else ""
    return f'<th scope="col"{kind}{state}><button type="button">{html.escape(column.heading)}</button></th>'


def _cell(value: Cell, column: Column) -> str:
    """A cell from its tag's attributes on, without the end tag."""
    if column.number is None:
        return f">{html.escape(str(value or ''))}"
    if value is None or math.isnan(value):
        return ' class="number" data-value="">-'
    return f' class="number" data-value="{float(value)!r}">{format(value, column.number)}'


def picture(png: bytes, alt: str, caption: str, *, least_width_px: int = 0) -> str:
    """A PNG file inside the page.

    Args:
        alt: what it shows, for those who cannot see it.
        least_width_px: on a narrower screen it keeps this width and scrolls in its box.
    """
    width, height = struct.unpack(">II", png[16:24])  # the PNG header: room is kept before it is decoded
    data = base64.b64encode(png).decode("ascii")
    size = f'width="{width}" height="{height}" style="min-width:{least_width_px}px"'
    label = html.escape(caption, quote=True)
    return (
        f'<figure style="max-width:{width + 2}px">'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt, quote=True)}" {size}></div>'
        f"<figcaption>{label}</figcaption></figure>\n"
    )


def page(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """The whole document.

    Args:
        introduction: HTML that stands between the title and the list of sections.
    """
    links = "".join(
        f'<li><a href="#part{number}">{html.escape(section.heading)}</a></li>'
        for number, section in enumerate(sections, start=1)
    )
    parts = "".join(
        f'<section aria-labelledby="part{number}">\n'
        f'<h2 id="part{number}">{html.escape(section.heading)}</h2>\n{section.body}</section>\n'
        for number, section in enumerate(sections, start=1)
    )
    name = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{name}</title>\n<style>{CSS}</style>\n</head>\n<body>\n'
        f'<header>\n<h1>{name}</h1>\n{introduction}<nav aria-label="Sections"><ul>{links}</ul></nav>\n'
        f"</header>\n<main>\n{parts}</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
