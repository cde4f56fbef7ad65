"""Self-contained HTML pages, without a script or a link: one style, tables, images as data."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from moa.analysis.plots import FAINT, INK, MUTED

STYLE = f"""
:root {{ color-scheme: light dark; --ink: {INK}; --muted: {MUTED}; --faint: {FAINT}; --page: white; }}
@media screen and (prefers-color-scheme: dark) {{
:root {{ --ink: #e6e9ee; --muted: #a3adba; --faint: #39414d; --page: #14181f; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 68rem;
margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin: 1.5rem 0 .4rem; }} p {{ color: var(--muted); }}
p.first {{ font-size: 1.1rem; color: var(--ink); }} img {{ max-width: 100%; }}
table {{ border-collapse: collapse; font-size: .9rem; display: block; overflow-x: auto; margin: .6rem 0; }}
td, th {{ padding: .2rem .75rem; border-bottom: 1px solid var(--faint); text-align: right; }}
td:first-child, th:first-child {{ text-align: left; position: sticky; left: 0; background: var(--page); }}
td:first-child:nth-last-child(2) + td {{ text-align: left; }} p, h1 {{ overflow-wrap: anywhere; }}
@media (max-width: 40rem) {{ body {{ margin: 1rem auto; }} td, th {{ padding: .2rem .45rem; }} }}
@media print {{ body {{ max-width: none; margin: 0; }} img, tr, section {{ break-inside: avoid; }}
table {{ display: table; font-size: .68rem; }} td, th {{ padding: .1rem .3rem; }}
h2, h3 {{ break-after: avoid; }} * {{ print-color-adjust: exact; }} }}
"""


def page(title: str, parts: Sequence[str], style: str = "") -> str:
    """A whole page under its heading; `style` adds to the common one."""
    name = html.escape(title)
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}{style}</style>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return head + "\n".join([f"<h1>{name}</h1>", *parts, ""])


def element(tag: str, text: str, name: str = "") -> str:
    """Text in an element of the CSS class `name`."""
    name = f' class="{name}"' if name else ""
    return f"<{tag}{name}>{html.escape(text)}</{tag}>"


def image(file: bytes | Path, alt: str = "", form: str = "png") -> str:
    """The image in the page itself; `form` is how its bytes are written."""
    data = file.read_bytes() if isinstance(file, Path) else file
    return f"<img alt='{html.escape(alt)}' src='data:image/{form};base64,{base64.b64encode(data).decode()}'>"


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head where it has more than two cells."""
    lines = []
    for index, row in enumerate(rows):
        tag = "th" if index == 0 and len(row) > 2 else "td"
        lines.append(f"<tr>{''.join(element(tag, cell) for cell in row)}</tr>")
    return f"<table>{''.join(lines)}</table>"
