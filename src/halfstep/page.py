"""One HTML page that needs nothing else: the frame and the looks of all reports."""

from __future__ import annotations

import html

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2430; background: #fff; margin: 0 auto; max-width: 1100px;
       padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; }
p, li { max-width: 50rem; } .soft { color: #5d6778; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; margin: .6rem 0; }
th, td { text-align: right; padding: .3rem .45rem; border-bottom: 1px solid #e3e8f0; vertical-align: top; }
th { font-weight: 600; color: #5d6778; } td.left, th.left { text-align: left; }
"""


def page(title: str, body: str, style: str, *, head: str = "") -> str:
    """The page's HTML: `title` is text, all else HTML and CSS as it is."""
    meta = f"<meta charset='utf-8'><title>{html.escape(title)}</title>"
    meta += f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{style}</style>"
    return f"<!doctype html><html lang='en'><head>{meta}{head}</head><body>{body}</body></html>\n"
