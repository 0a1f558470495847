"""Another version than the one that stands, to try whether a system heeds a condition at all.

Belongs here: making one of a version's own shape. Does not: sending it (``rest``).
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime

_TIME = (
    r"(?P<iso>\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?)?)|(?P<http>[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d)"
    r"|(?<!\d)(?P<bare>(19|20)\d\d(0[1-9]|1[0-2])[0-3]\d[T ]?[0-2]\d[0-5]\d([0-5]\d)?)(?!\d)"
)


def another(token: str) -> str:
    """A version like this one, and not this one: of its own shape, so that it is turned away for what it says.

    Where the version is a time or a number it is an earlier one. A system may turn down only what is older than what stands
    (If-Unmodified-Since, `version >= current`): it keeps its promise, and a later version would be let through.
    """
    time = re.search(_TIME, token, re.ASCII)
    if time is not None and (earlier := _day_before(time)) is not None:
        return f"{token[: time.start()]}{earlier}{token[time.end() :]}"
    if re.fullmatch(r"[1-9][0-9]{0,18}", token):
        return str(int(token) - 1)
    if lowered := list(re.finditer(r"([1-9])(0*)(?![0-9])", token)):
        last, (digit, noughts) = lowered[-1], lowered[-1].groups()
        return f"{token[: last.start()]}{int(digit) - 1}{'9' * len(noughts)}{token[last.end() :]}"
    # nothing is before nought, and letters have no order that is known
    found = next(f for kind in (r"\d", "[A-Za-z]", ".") if (f := list(re.finditer(kind, token, re.ASCII))))
    at_, char = found[-1].start(), found[-1][0]
    other = "9" if char.isdigit() else "b" if char == "a" else "a"
    return f"{token[:at_]}{other}{token[at_ + 1 :]}"


def _day_before(time: re.Match[str]) -> str | None:
    """A time in a text a day earlier, in the same form; None where it is no time."""
    shown = time[0]
    try:
        if time["http"]:
            return format_datetime(parsedate_to_datetime(f"{shown} GMT") - timedelta(days=1), usegmt=True)[:-4]
        moment = datetime.fromisoformat(shown[:10] if time["iso"] else f"{shown[:4]}-{shown[4:6]}-{shown[6:8]}")
        before = (moment - timedelta(days=1)).date().isoformat()
        return before + shown[10:] if time["iso"] else before.replace("-", "") + shown[8:]
    except (ValueError, OverflowError):
        return None
