"""Building blocks of a page that is one file: cards, tables, figures, sections, the document, and writing it.

Nothing is asked of any server: style and figures are in the page, and its Content-Security-Policy makes the browser
refuse whatever else. All texts are escaped here; ``svg`` of :func:`figure` and ``parts`` are taken as they are.
"""

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from megatron_camopd.config.program import cleaned_up
from tools.run_report.figures import colour_variables

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_LIGHT = "--page: #f4f5f7; --card: #ffffff; --soft: #57606a; --line: #d5d9de; --link: #0b5cad"
_DARK = "--page: #0d1117; --card: #161b22; --soft: #9aa4af; --line: #30363d; --link: #6cb6ff"
_STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(0.75rem, 3vw, 2rem) 3rem; max-width: 78rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.25rem; padding-top: 0.5rem; }
p { margin: 0.35rem 0; max-width: 60rem; overflow-wrap: anywhere; }
.soft, figcaption, caption { color: var(--soft); }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; margin: 0.75rem 0 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.9rem, 1fr)); gap: 0.75rem; margin: 1.25rem 0; }
.cards div, figure, .table { background: var(--card); border: 1px solid var(--line); border-radius: 0.5rem; }
.cards div { padding: 0.6rem 0.85rem; }
dl, dt, dd { margin: 0; }
dt { color: var(--soft); font-size: 0.875rem; }
dd { font-size: 1.3rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
dd + dd { color: var(--soft); font-size: 0.8125rem; line-height: 1.4; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); gap: 1rem;
  margin-top: 0.9rem; }
figure { margin: 0; padding: 0.9rem clamp(0.5rem, 2vw, 1rem) 0.8rem; display: flex;
  flex-direction: column; min-width: 0; }
figure h3 { font-size: 1rem; margin: 0 0 0.4rem; }
figure svg { display: block; width: 100%; height: auto; margin-bottom: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important; }
figcaption { font-size: 0.875rem; line-height: 1.45; margin-top: 0.5rem; }
.table { overflow-x: auto; margin-top: 0.9rem; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; width: 100%; }
caption { text-align: left; padding: 0.6rem 0.85rem; font-size: 0.875rem; }
caption span { display: inline-block; position: sticky; left: 0.85rem; max-width: min(60rem, calc(100vw - 4rem)); }
th, td { padding: 0.3rem 0.85rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
td { overflow-wrap: anywhere; min-width: 8rem; }
thead th { border-top: 0; }
tbody th { font-weight: 400; color: var(--soft); min-width: 9rem; }
@media print { body { background: none; } figure, .cards div { break-inside: avoid; } }
"""


def section(heading: str, name: str, parts: Iterable[str], intro: str = "") -> str:
    """A section with the anchor ``name``; ``parts``: what the functions below made."""
    lead = f'<p class="soft">{escape(intro)}</p>' if intro else ""
    return (
        f'<section id="{name}" aria-labelledby="{name}-heading">\n'
        f'<h2 id="{name}-heading">{escape(heading)}</h2>{lead}\n{"\n".join(parts)}\n</section>'
    )


def figure(svg: str, title: str, caption: str) -> str:
    """A figure of :func:`tools.run_report.figures.svg_text` in a card, with title and caption."""
    return f"<figure><h3>{escape(title)}</h3>\n{svg}\n<figcaption>{escape(caption)}</figcaption></figure>"


def figures(cards: Iterable[str]) -> str:
    """Figures beside each other where the window is wide enough."""
    return f'<div class="figures">\n{"\n".join(cards)}\n</div>'


def cards(entries: Iterable[tuple[str, str, str]]) -> str:
    """(heading, value, remark) each as a card."""
    shown = (
        f"<div><dt>{escape(heading)}</dt><dd>{escape(value)}</dd><dd>{escape(remark)}</dd></div>"
        for heading, value, remark in entries
    )
    return f'<dl class="cards">\n{"\n".join(shown)}\n</dl>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table whose first column names the rows; wider than the window, it scrolls by itself."""
    assert all(len(row) == len(header) for row in rows)
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = (
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{escape(caption)}"><table>\n'
        f"<caption><span>{escape(caption)}</span></caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{'\n'.join(lines)}\n</tbody></table></div>"
    )


def paragraphs(texts: Iterable[str]) -> str:
    """Return escaped ``texts`` as HTML paragraphs."""
    return "\n".join(f"<p>{escape(text)}</p>" for text in texts)


def navigation(places: Iterable[tuple[str, str]]) -> str:
    """Links to (anchor, heading) in this page."""
    links = "\n".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading in places)
    return f'<nav aria-label="Sections">\n{links}\n</nav>'


def document(title: str, lead: Iterable[str], parts: Iterable[str], style: str = "") -> str:
    """The whole page: HTML5, light or dark as the reader's system is set.

    lead: what follows the title; style: further CSS that ``parts`` need.
    """
    light, dark = f"{_LIGHT}; {colour_variables(dark=False)}", f"{_DARK}; {colour_variables(dark=True)}"
    whole_style = (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ @media not print {{ :root {{ {dark} }} }} }}{_STYLE}{style}"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{whole_style}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(title)}</h1>\n{'\n'.join(lead)}\n</header>\n"
        f"<main>\n{'\n'.join(parts)}\n</main>\n</body>\n</html>\n"
    )


def write(path: Path, content: str | bytes) -> None:
    """Write a file; a reader sees the old one or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with cleaned_up(lambda: temporary.unlink(missing_ok=True)):
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
