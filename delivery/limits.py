"""Limits of a change, judged against what stands downstream when it is sent rather than against what was read when it was decided.

Belongs here: the judgement, as pure functions over numbers. Does not: limits over a finished batch before anything is sent
(``data_checks.guardrails``), or sending (``delivery.push``). A batch carries the limits it was decided under in its record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

RECORDED = "limits"
"""Where a batch's record holds them."""


@dataclass(frozen=True)
class Limits:
    """What the guardrails of a workflow allow; None: no limit. Values are in the unit of the decision, shares of what stands."""

    max_change: float | None = None
    max_absolute_change: int | None = None
    max_total_change: float | None = None
    max_net_change: float | None = None
    keep_sign: bool = False

    @staticmethod
    def recorded(record: Mapping[str, Any]) -> Limits:
        """Those that a batch was decided under; none where its record holds none (it is older than they are)."""
        known = {f.name for f in fields(Limits)}
        return Limits(**{k: v for k, v in dict(record.get(RECORDED) or {}).items() if k in known})

    def broken(self, stands: int, before: int | None, after: int, *, approved: bool = False) -> str:
        """Why ``after`` may not be set where ``stands`` stands, though it was decided from ``before``; empty where it may.

        ``approved``: a person has agreed to the change from ``before``, over the limits or not: one that is no larger is
        within what was agreed to.
        """
        if self.keep_sign and (after < 0 <= stands or stands < 0 < after):
            return f"{stands} stands there, and {after} would reverse its sign"
        size = abs(after - stands)
        if approved and before is not None and size <= abs(after - before):
            return ""
        if self.max_absolute_change is not None and size > self.max_absolute_change:
            return f"{stands} stands there: a change to {after} is larger than {self.max_absolute_change}, which is allowed"
        if self.max_change is not None and size > self.max_change * abs(stands):
            share = f"{size / abs(stands):.0%} of it" if stands else "a change from nothing"
            return f"{stands} stands there: a change to {after} is {share}, and {self.max_change:.0%} is allowed"
        return ""

    def broken_in_total(self, rows: Iterable[tuple[str, int, int | None, int]]) -> str:
        """Why a whole batch may not be sent where this stands: (arm, stands, before, after) of every decision; empty where it may.

        What was judged, or approved, is the change from ``before``: only a larger one is held against the limits.
        """
        if self.max_total_change is None and self.max_net_change is None:
            return ""
        whole = size = decided = 0
        net: dict[str, list[int]] = {}
        for arm, stands, before, after in rows:
            begun = stands if before is None else before
            whole, size, decided = whole + abs(stands), size + abs(after - stands), decided + abs(after - begun)
            held = net.setdefault(arm, [0, 0, 0])
            held[0], held[1], held[2] = held[0] + stands, held[1] + begun, held[2] + after
        what = "what stands downstream is not what it was decided from: its changes would be"
        limit = self.max_total_change
        if limit is not None and size > decided and size > limit * whole:
            return f"{what} {_share(size, whole)} of the total, and {limit:.1%} is allowed"
        limit = self.max_net_change
        for arm, (stood, begun, after) in sorted(net.items()):
            moved = abs(after - stood)
            if limit is not None and moved > abs(after - begun) and moved > limit * abs(stood):
                return f"{what} {_share(moved, abs(stood))} of arm {arm} in sum, and {limit:.1%} is allowed"
        return ""


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "endlessly much"
