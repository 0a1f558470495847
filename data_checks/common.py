"""What the checks share: a page that opens offline.

Belongs here: helpers that more than one check needs. Does not: anything that judges.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2rem;color:#1c1e21;background:#fff}
h1{font-size:1.3rem;margin:0 0 .3rem}p{margin:.2rem 0 1rem}
table{border-collapse:collapse}
th,td{text-align:left;vertical-align:top;padding:.35rem .7rem;border-bottom:1px solid #e3e5e8}
th{position:sticky;top:0;background:#f4f5f7}td.n{text-align:right;font-variant-numeric:tabular-nums}
tr.bad td:first-child{color:#b3261e;font-weight:600}tr.warn td:first-child{color:#8a5a00;font-weight:600}
tr.good td:first-child{color:#1b6e3c}code{background:#f4f5f7;padding:0 .2rem}
"""


def shown(value: Any) -> str:
    """A value as a person reads it: figures short, nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {shown(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(shown(v) for v in value)
    return str(value)


def page(title: str, lead: Sequence[str], columns: Sequence[str], rows: Iterable[tuple[str, Sequence[Any]]]) -> str:
    """One HTML page with one table. ``rows``: (``good`` | ``warn`` | ``bad``, cells).

    It asks nothing of the network and runs no script, so values from the data can do nothing; the same input gives the
    same bytes.
    """

    def cell(value: Any) -> str:
        kind = ' class="n"' if isinstance(value, int | float) and not isinstance(value, bool) else ""
        return f"<td{kind}>{html.escape(shown(value))}</td>"

    body = "\n".join(f'<tr class="{kind}">{"".join(map(cell, cells))}</tr>' for kind, cells in rows)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n"
        + "".join(f"<p>{html.escape(text)}</p>\n" for text in lead)
        + f"<table><thead><tr>{''.join(f'<th>{html.escape(c)}</th>' for c in columns)}</tr></thead><tbody>\n{body}\n"
        "</tbody></table></body></html>\n"
    )
