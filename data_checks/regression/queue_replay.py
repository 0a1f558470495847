"""What a queue would have come to under another order: the same arrivals, hands and efforts, served anew.

Belongs here: the deterministic service of one team's week, the ticket queue as a user of ``data_checks.regression.replay``. Does not:
what a replay must yield (that module), tests and verdicts on it (``data_checks/regression/matched_test.py``), reading tables.

Times are hours on any one axis. A replay uses the hands that were seen at work, never the ones that were planned.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data_checks.regression.replay import Bools, Floats, Ints, Replayed

LEAST_WORK = 0.05
"""Hours that an open ticket is expected to need still, where more than its category's mean has been worked on it."""


@dataclass(frozen=True)
class Shifts:
    """The hands of one team as they were seen at work: in [opens, closes) so many; ascending, apart from each other."""

    opens: Floats
    closes: Floats
    hands: Floats
    """As they were seen; NaN: not known."""
    expected: Floats | None = None
    """As they were expected before the week began: what counts of a shift that is still to come. None: as ``hands``."""

    def known(self, now: float) -> Shifts:
        """As they can be known at ``now``."""
        if self.expected is None:
            return self
        return Shifts(self.opens, self.closes, np.where(self.opens < now, self.hands, self.expected))


@dataclass(frozen=True)
class TeamWeek:
    """One team's week with every ticket that was open in it; arrays of shape (tickets,)."""

    team: int
    week: int
    treated: bool
    start: float
    """The week's first morning; ``end``: where the next one begins."""
    end: float
    opened: Floats
    due: Floats
    resolved: Floats
    """NaN: not yet; so is ``effort``, in hours, while a ticket is open."""
    effort: Floats
    done: Floats
    """Hours worked on it before ``start``; what is begun is finished first, under any order."""
    category: Ints
    usual: Floats
    """Key in the status quo's order, the smallest first, and of equal ones the oldest; ``asked``: in the order asked for. Shape
    (tickets,), or (shifts, tickets) where an order is given anew before each shift."""
    asked: Floats
    moved: Bools
    """It came from another team."""
    shifts: Shifts | None
    """None: no roster."""
    counts_from: float = -math.inf
    """What comes due before (in the wash-out of a draw) is served and not counted."""
    label: str = ""
    """What people call the unit and its week; empty: by their numbers."""

    @property
    def called(self) -> str:
        """For a reason."""
        return self.label or f"team {self.team} in week {self.week}"


def serve(opened: Floats, work: Floats, key: Floats, shifts: Shifts) -> tuple[Floats, Floats]:
    """When each ticket is done if free hands always take the smallest key, of equal ones the oldest (inf: not in these shifts),
    and the hours that each still needs then.

    Work is not interrupted but by the end of a shift, and goes on first thing in the next one. ``key``: shape (tickets,), or
    (shifts, tickets): the order that holds from each shift's beginning on.
    """
    n = len(opened)
    arriving = np.argsort(opened, kind="stable").tolist()
    at, left = opened.tolist(), work.tolist()
    queue: list[tuple[float, float, int]] = []
    done, came = [math.inf] * n, 0
    given = [key.tolist()] if key.ndim == 1 else key.tolist()
    for number, (opens, closes, hands) in enumerate(
        zip(shifts.opens.tolist(), shifts.closes.tolist(), shifts.hands.tolist(), strict=True)
    ):
        if number < len(given):
            keys = given[number]
            queue = [(-math.inf if first == -math.inf else keys[i], since, i) for first, since, i in queue]
            heapq.heapify(queue)
        free = [opens] * int(hands)
        unfinished = []
        while free and free[0] < closes:
            now = free[0]
            while came < n and at[arriving[came]] <= now:
                i = arriving[came]
                heapq.heappush(queue, (keys[i], at[i], i))
                came += 1
            if not queue:
                if came == n or at[arriving[came]] >= closes:
                    break
                heapq.heapreplace(free, at[arriving[came]])
                continue
            i = heapq.heappop(queue)[2]
            end = now + left[i]
            if end <= closes:
                done[i], left[i] = end, 0.0
            else:
                left[i], end = end - closes, closes
                unfinished.append(i)
            heapq.heapreplace(free, end)
        for i in unfinished:
            heapq.heappush(queue, (-math.inf, at[i], i))
    return np.array(done, dtype=np.float64), np.array(left, dtype=np.float64)


@dataclass(frozen=True)
class _Week:
    """One team's week at an instant."""

    n: float = 0.0
    base: float = 0.0
    pol: float = 0.0
    actual: float = 0.0
    effort: float = math.nan
    moved: float = math.nan
    hours: float = 0.0
    base_hours: float = 0.0


def replay_week(one: TeamWeek, means: Floats, now: float, *, logged: bool = True) -> _Week:
    """The week as it stood at ``now``, served anew from its first morning on under either order.

    Args:
        means: Mean hours of effort by category, of the pre-period.
        logged: Serve resolved tickets with the effort that was logged; else every ticket with its category's mean, so that
            nothing that an arm may change enters the replay but the arrivals and the roster.

    A ticket counts in the week in which it comes due. Whether one still open will be late is forecast by serving the queue that
    stands now in the status quo's order, in both arms: a forecast that knew the arm would not be exchangeable.
    """
    assert one.shifts is not None, "a week without a roster is not replayed"
    there, s = one.opened <= now, one.shifts.known(now)
    opened, due, done, category = one.opened[there], one.due[there], one.done[there], one.category[there]
    with np.errstate(invalid="ignore"):
        ended = one.resolved[there] <= now
    resolved = np.where(ended, one.resolved[there], np.inf)
    effort = np.where(ended & np.isfinite(one.effort[there]), one.effort[there], means[category])
    left = np.maximum((effort if logged else means[category]) - done, LEAST_WORK)
    begun = done > 0
    usual, asked = (np.where(begun, -np.inf, key[..., there]) for key in (one.usual, one.asked))
    base, pol = (serve(opened, left, key, s)[0] for key in (usual, asked))
    counted = (due >= max(one.start, one.counts_from)) & (due < one.end)
    known = ended | (due <= now)
    finish = resolved
    if (counted & ~known).any():
        still, later = ~ended, s.closes > now
        rest = Shifts(np.maximum(s.opens[later], now), s.closes[later], s.hands[later])
        order = usual if usual.ndim == 1 else usual[later]
        finish = resolved.copy()
        finish[still] = serve(opened[still], left[still], order[..., still], rest)[0]
    by = min(now, one.end)
    mine = ended & (resolved <= by)
    ratio = np.log(np.maximum(effort[mine], 1e-3) / means[category[mine]])
    return _Week(
        n=float(counted.sum()),
        base=float((counted & (base > due)).sum()),
        pol=float((counted & (pol > due)).sum()),
        actual=float((counted & (finish > due)).sum()),
        effort=float(ratio.mean()) if len(ratio) else math.nan,
        moved=float(one.moved[there].mean()) if len(opened) else math.nan,
        hours=float(left[mine].sum()),
        base_hours=min(float(left[done_ <= by].sum()) for done_ in (base, pol)),
    )


@dataclass(frozen=True)
class QueueReplay:
    """The ticket queue: teams' weeks under arms, and their weeks before, from which a team's own level is taken.

    means: Mean effort by category in the pre-period, hours, above 0.
    logged: As `replay_week` takes it.
    """

    weeks: Sequence[TeamWeek]
    before: Sequence[TeamWeek]
    means: Floats
    logged: bool = True
    _settled: dict[tuple[int, int], _Week] = field(default_factory=dict, repr=False, compare=False)
    _levels: dict[int, tuple[float, float, float]] = field(default_factory=dict, repr=False, compare=False)

    def at(self, now: float) -> Replayed:
        """As `Replay.at`. Where a roster lacks, the reasons say whose, and that week is left out."""
        begun = [(i, w) for i, w in enumerate(self.weeks) if w.start < now]
        lacking = sorted({w.called for _, w in begun if not _rostered(w)})
        lacking += sorted({w.label or f"team {w.team} before the start" for w in self.before if not _rostered(w)})
        reasons = (f"no roster of hands seen at work: {', '.join(lacking)}",) if lacking else ()
        kept = [(i, w) for i, w in begun if _rostered(w)]
        found = [self._week(i, w, now) for i, w in kept]
        levels = self._own() if kept else {}
        own = np.array([levels.get(w.team, (0.0, 0.0, 1.0)) for _, w in kept]).reshape(-1, 3)

        def of(name: str) -> Floats:
            return np.array([getattr(one, name) for one in found], dtype=np.float64)

        return Replayed(
            unit=np.array([w.team for _, w in kept], dtype=np.int64),
            epoch=np.array([w.week for _, w in kept], dtype=np.int64),
            treated=np.array([w.treated for _, w in kept], dtype=bool),
            n=of("n"), base=of("base"), pol=of("pol"), actual=of("actual"), own=own[:, 0], effort=of("effort") - own[:, 1],
            moved=of("moved"), hours=of("hours"), base_hours=of("base_hours"), reasons=reasons,
            pace=own[:, 2],
        )  # fmt: skip

    def shifted(self, shift: float) -> QueueReplay:
        """The same with the logs of the treated arm's efforts less ``shift``: as if they had been logged as the other arm's are."""
        factor = math.exp(-shift)
        weeks = [replace(w, effort=w.effort * factor) if w.treated else w for w in self.weeks]
        return QueueReplay(weeks, self.before, self.means, self.logged, _levels=self._own())

    def _week(self, i: int, one: TeamWeek, now: float) -> _Week:
        """A week that is over changes only when one of its tickets is resolved."""
        if now < one.end:
            return replay_week(one, self.means, now, logged=self.logged)
        key = i, int((one.resolved <= now).sum())
        if key not in self._settled:
            self._settled[key] = replay_week(one, self.means, now, logged=self.logged)
        return self._settled[key]

    def _own(self) -> dict[int, tuple[float, float, float]]:
        """By team: (actual - base)/n, the mean log effort and the hours over the replay's of the weeks before."""
        if not self._levels:
            last = max((w.end for w in self.before), default=0.0)
            teams: dict[int, list[_Week]] = {}
            for one in self.before:
                if _rostered(one):
                    teams.setdefault(one.team, []).append(replay_week(one, self.means, last, logged=self.logged))
            for team, weeks in teams.items():
                n = math.fsum(w.n for w in weeks)
                efforts = [w.effort for w in weeks if math.isfinite(w.effort)]
                level = math.fsum(w.actual - w.base for w in weeks) / n if n else 0.0
                hours, replayed = (math.fsum(getattr(w, name) for w in weeks) for name in ("hours", "base_hours"))
                pace = hours / replayed if hours and replayed else 1.0
                self._levels[team] = level, math.fsum(efforts) / len(efforts) if efforts else 0.0, pace
        return self._levels


def _rostered(one: TeamWeek) -> bool:
    """Whether the hands of every shift are known."""
    return one.shifts is not None and len(one.shifts.hands) > 0 and bool(np.isfinite(one.shifts.hands).all())
