"""What would have changed a decision: the smallest change of one feature, or of one of the policy's limits.

Belongs here: the search, and that every answer is proved by deciding again. Does not: what is said of it
(``pipeline.explain.trace``), or how a decision is made (``pipeline.decisions.decide``, ``models``).

A feature moves within what the day's entities showed, everything else held fixed (columns that upstream computes from one
another included): the values on a grid are tried from the nearest on, and between the last that changes nothing and
the first that changes the decision the place is found by bisection. A change of the decision is another priority, or a
budget that differs by at least ``MATERIAL`` of what stood before. The search looks at a bounded number of re-decisions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from data_checks import guardrails
from models import catalog
from models.booster import Because, is_number
from models.policies.base import Limit
from pipeline import point_in_time
from pipeline.decisions import decide, replay
from pipeline.workflow import Workflow

MOST = 600
"""Re-decisions for one explanation; fewer where a day holds so many entities that each takes long."""
FEATURES_TRIED, FEATURES_SHOWN, LIMITS_SHOWN = 12, 3, 5
_GRID, _HALVINGS, _FINE = 8, 30, 1e-3
_FACTORS = (1.03, 1.2, 1.6, 4.0)


@dataclass(frozen=True)
class Inputs:
    """Everything that one decision was made from, found again."""

    row: dict[str, Any]
    """The decision's columns as recorded."""
    workflow: Workflow
    day: date
    features: pa.Table
    """The whole day's, in the order of their keys."""
    scores: pa.Table
    drawn: pa.Table
    step: str
    learner: Any
    """What scored: a learner, the rule, or None for the step ``no_change``."""
    scores_in: Callable[[pa.Table], pa.Table] | None = None
    """In a batch with a canary: the scores that count with other arms drawn."""


@dataclass(frozen=True)
class Turn:
    """One change that changes the decision; everything else stays as it was."""

    name: str
    now: float
    value: float
    """With this the decision is another one; proved by deciding the whole day again."""
    unchanged_at: float
    """With this it is still the same one, proved likewise: the turn lies between."""
    becomes: int | None
    """What the decision would be; None: the entity would not be decided on."""
    size: float
    """How far that is: for a feature in standard deviations of the day's values, for a limit as a share of itself."""


@dataclass
class WouldChange:
    """What the search found. ``redecisions`` of at most ``most`` were made, the proofs among them."""

    features: list[Turn] = field(default_factory=list)
    limits: list[Turn] = field(default_factory=list)
    arms: dict[str, int | None] = field(default_factory=dict)
    """By arm: what the decision would be had the entity's unit been drawn into that arm instead."""
    guardrails: list[dict[str, Any]] = field(default_factory=list)
    """For each limit of the batch that is set: what was observed, and from which value on the batch's status changes."""
    tried: list[str] = field(default_factory=list)
    limits_tried: list[str] = field(default_factory=list)
    says: list[str] = field(default_factory=list)
    redecisions: int = 0
    most: int = 0
    stopped: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class _After(Protocol):
    def __call__(self, value: float, *, whole: bool = False) -> int | None:
        """What the decision is with this value; ``whole``: by deciding the whole day, outside the bound."""


class _Enough(Exception):
    """The search has used up its re-decisions."""


@dataclass(frozen=True)
class _Question:
    """One number that may be moved, nearest values first on either side."""

    name: str
    now: float
    sides: Sequence[Sequence[float]]
    unit: float
    """What a distance is measured in."""
    whole_numbers: bool
    after: _After


class _World:
    """One decision that can be made again with something changed."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.count = inputs, 0
        workflow, entity = inputs.workflow, inputs.row["entity_id"]
        chosen = decide.of_policy(workflow, inputs.features)
        found = chosen.filter(pc.equal(chosen["entity_id"], entity))
        if found.num_rows != 1:
            raise replay.ReplayImpossible(
                f"{workflow.name}: the features of {inputs.day} hold {entity!r} {found.num_rows} times among what is "
                "decided on"
            )
        self.chosen, self.row = chosen, found.select(inputs.features.schema.names)
        self.policy, self.kind = workflow.policy, catalog.policy(workflow.policy.kind)
        self.before, self.after = inputs.row["before"], inputs.row["after"]
        self.whole = (inputs.features, inputs.scores, workflow)
        self.near = self._peers(chosen) or self.whole
        self.most = min(MOST, max(80, 4_000_000 // max(1, self.near[0].num_rows)))
        self.allowed = self.most

    def _peers(self, chosen: pa.Table) -> tuple[pa.Table, pa.Table, Workflow] | None:
        """The rows that this decision competes with (its arm's pool, its team's queue): others cannot touch it.

        None where deciding these alone does not give the recorded decision.
        """
        workflow, scores = self.inputs.workflow, self.inputs.scores
        arm = self.inputs.drawn.filter(pc.equal(self.inputs.drawn["arm"], self.inputs.row["arm"]))
        mine = self.kind.competes_with(self.policy, chosen, self.row, arm["unit"].combine_chunks())
        rows = chosen.filter(mine)
        if scores.num_rows:
            scores = scores.filter(pc.is_in(scores["entity_id"], value_set=rows["entity_id"].combine_chunks()))
        every = workflow.model_copy(update={"policy": self.policy.model_copy(update={"decide_on": "true"})})
        near = rows.select(self.inputs.features.schema.names), scores, every
        self.near = near
        found = self._decided(self.row, None, near, None, None)
        return near if found is not None and found["after"] == self.after else None

    def _decided(
        self,
        row: pa.Table,
        score: pa.Table | None,
        world: tuple[pa.Table, pa.Table, Workflow],
        change: Callable[[Workflow], Workflow] | None,
        drawn: pa.Table | None,
    ) -> dict[str, Any] | None:
        features, scores, workflow = world
        self.count += 1
        if drawn is not None and self.inputs.scores_in is not None:
            scores = self.inputs.scores_in(drawn)
        if score is not None:
            features = _put(features, row)
            scores = _put(scores, score)
        decided, _ = decide.decide(
            change(workflow) if change is not None else workflow,
            self.inputs.day,
            features,
            scores,
            drawn if drawn is not None else self.inputs.drawn,
            self.inputs.step,
        )
        mine = decided.filter(pc.equal(decided["entity_id"], self.inputs.row["entity_id"])).to_pylist()
        return mine[0] if mine else None

    def becomes(
        self,
        row: pa.Table | None = None,
        score: pa.Table | None = None,
        change: Callable[[Workflow], Workflow] | None = None,
        drawn: pa.Table | None = None,
        *,
        whole: bool = False,
        bound: bool = True,
    ) -> int | None:
        """What the decision is with one row, its score, the workflow, or the arms changed.

        ``whole``: by deciding the whole day rather than what the decision competes with. Raises _Enough where ``bound``
        and the re-decisions are used up.
        """
        if bound and self.count >= self.allowed:
            raise _Enough
        found = self._decided(
            self.row if row is None else row, score, self.whole if whole else self.near, change, drawn
        )
        return found["after"] if found is not None else None

    def differs(self, after: int | None) -> bool:
        """Whether that counts as another decision."""
        if after is None or self.after is None:
            return after is not self.after
        return bool(abs(after - self.after) >= self.kind.least_change(self.before))


def _put(table: pa.Table, row: pa.Table) -> pa.Table:
    """The table with ``row`` in the place of the row of the same key."""
    keys = [k for k in point_in_time.keys_of(table.schema.names) if k in row.schema.names]
    place = None
    for key in keys:
        same = pc.equal(table[key], row[key][0])
        place = same if place is None else pc.and_(place, same)
    at = pc.index(place, True).as_py()
    return pa.concat_tables(
        [table.slice(0, at), row.select(table.schema.names).cast(table.schema), table.slice(at + 1)]
    )


def search(inputs: Inputs, because: Because | None, decisions: pa.Table | None = None) -> WouldChange:
    """What would have changed a decision, within a bounded number of re-decisions.

    ``because``: why the score is what it is, which orders the features; ``decisions``: the whole batch as decided again,
    for the limits of the batch. Raises ReplayImpossible where the entity's features are not there.
    """
    found = WouldChange()
    kind = inputs.workflow.policy.kind
    if "counterfactual" in catalog.policy(kind).absent:
        found.says.append(f"What would have changed it was not searched: {catalog.why_not(kind, 'counterfactual')}.")
        return found
    world = _World(inputs)
    found.most = world.most + 4 * (FEATURES_SHOWN + LIMITS_SHOWN) + len(inputs.workflow.arms.shares)
    arm = inputs.row["arm"]
    if decisions is not None:
        found.guardrails = of_guardrails(decisions, inputs.workflow.guardrails)
    if inputs.step == "no_change":
        found.says.append(
            "The batch's step is 'no change': no score was used, so no feature, limit or arm would have changed it."
        )
        return found
    found.arms = _other_arms(world)
    if arm == "holdout":
        found.says.append(
            "It was in the arm holdout, which keeps the status quo whatever the score says: no feature and no limit of "
            "the policy would have changed it, only another arm."
        )
    elif arm == "explore":
        found.says.append(
            "It was in the arm explore, which draws around the status quo by a fair coin and reads no score: no feature "
            "of the score would have changed it; the limits of the draw and another arm would."
        )
    if arm != "holdout":
        questions = list(_limits(world))
        found.limits_tried = [one.name for one in questions]
        world.allowed = world.most // 2  # so that the features have their share
        found.limits, found.stopped = _turns(world, questions, LIMITS_SHOWN)
    if arm not in ("holdout", "explore") and inputs.learner is not None:
        asked = list(_features(world, because))
        found.tried = [one.name for one in asked]
        world.allowed = world.most
        found.features, stopped = _turns(world, asked, FEATURES_SHOWN)
        found.stopped = found.stopped or stopped
    if found.stopped:
        found.says.append(
            f"The search stopped after {world.most} re-decisions: a smaller change may exist; what it had found stands."
        )
    found.redecisions = world.count
    return found


def _turns(world: _World, questions: Sequence[_Question], shown: int) -> tuple[list[Turn], bool]:
    """The smallest changes first, each proved by deciding the whole day again; and whether the bound was reached."""
    found: list[tuple[Turn, _Question]] = []
    stopped = False
    try:
        for one in questions:
            for side in one.sides:
                turn = _turn(world, one, side)
                found += [(turn, one)] if turn is not None else []
    except _Enough:
        stopped = True
    proved: list[Turn] = []
    for turn, one in sorted(found, key=lambda pair: (pair[0].size, pair[0].name, pair[0].value))[: 2 * shown]:
        if len(proved) == shown:
            break
        becomes = one.after(turn.value, whole=True)
        if world.differs(becomes) and not world.differs(one.after(turn.unchanged_at, whole=True)):
            figures = (turn.now, turn.value, turn.unchanged_at)
            now, value, same = map(int, figures) if one.whole_numbers else figures
            proved.append(replace(turn, now=now, value=value, unchanged_at=same, becomes=becomes))
    return proved, stopped


def _turn(world: _World, one: _Question, side: Sequence[float]) -> Turn | None:
    """The first value on a side that changes the decision, and the last before it that does not."""
    same, other = one.now, None
    for value in side:
        if world.differs(one.after(value)):
            other = value
            break
        same = value
    if other is None:
        return None
    for _ in range(_HALVINGS):
        apart = abs(other - same)
        if apart <= (1 if one.whole_numbers else _FINE * abs(other - one.now)):
            break
        middle = math.floor((same + other) / 2) if one.whole_numbers else (same + other) / 2
        if world.differs(one.after(middle)):
            other = middle
        else:
            same = middle
    other = _short(world, one, same, other)
    return Turn(one.name, one.now, other, same, one.after(other), abs(other - one.now) / one.unit)


def _short(world: _World, one: _Question, same: float, other: float) -> float:
    """The value with as few digits as it can have without going noticeably farther than it must."""
    if one.whole_numbers:
        return other
    for digits in range(2, 12):
        value = float(f"{other:.{digits}g}")
        beyond = (value - other) * (1 if other > one.now else -1)
        if 0 <= beyond <= 2 * _FINE * abs(other - one.now) and world.differs(one.after(value)):
            return value
    return other


def _other_arms(world: _World) -> dict[str, int | None]:
    """What each other arm would have made of the entity, its whole unit moved there with its money."""
    inputs, row = world.inputs, world.inputs.row
    drawn, out = inputs.drawn, {}
    mine = pc.equal(drawn["unit"], row["unit"])
    for arm in inputs.workflow.arms.shares:
        if arm != row["arm"] and inputs.workflow.arms.shares[arm]:
            moved = pc.if_else(mine, pa.scalar(arm, pa.string()), drawn["arm"])
            other = drawn.set_column(drawn.schema.get_field_index("arm"), "arm", moved)
            out[str(arm)] = world.becomes(drawn=other, whole=True, bound=False)
    return out


# --- features ---------------------------------------------------------------------------------------------------------


def _candidates(world: _World, because: Because | None) -> list[str]:
    """Numeric columns that can move the decision, those that moved its score most first; not the status quo itself."""
    policy, schema = world.policy, world.row.schema
    status_quo = world.kind.stands_in(policy)
    said = [v for v in policy.model_dump().values() if isinstance(v, str) and v in schema.names]
    weight: dict[str, float] = {name: 0.0 for name in world.inputs.workflow.features.numeric}
    for head in because.heads if because is not None else ():
        total = sum(map(abs, head.effects.values())) or 1.0
        for name, effect in head.effects.items():
            weight[name] = weight.get(name, 0.0) + abs(effect) / total * (1.0 if head.decides else 0.5)
    for name in (*(because.reads if because is not None else ()), *said):
        weight[name] = weight.get(name, 0.0) + 1.0
    kept = [n for n in weight if n in schema.names and n not in status_quo and is_number(schema.field(n).type)]
    return sorted(kept, key=lambda n: (-weight[n], n))


def _as_number(value: Any) -> float | None:
    return None if value is None or (isinstance(value, float) and not math.isfinite(value)) else float(value)


def _variants(row: pa.Table, name: str, values: Sequence[float]) -> pa.Table:
    """The row once for each value of one column."""
    kind = row.schema.field(name).type
    whole = not pa.types.is_floating(kind)
    column = pa.array([bool(v) if pa.types.is_boolean(kind) else int(v) if whole else v for v in values], kind)
    many = row.take(pa.array([0] * len(values)))
    return many.set_column(row.schema.get_field_index(name), name, column)


def _steps(now: float, seen: Sequence[float]) -> list[list[float]]:
    """Values seen above and below, each nearest first and thinned to a few with the farthest among them."""
    out = []
    for side in (sorted(v for v in seen if v > now), sorted((v for v in seen if v < now), reverse=True)):
        few = len(side) <= _GRID
        out.append(side if few else [side[round(i * (len(side) - 1) / (_GRID - 1))] for i in range(_GRID)])
    return out


def _key(value: Any) -> Any:
    """What tells two scores apart: the last digits of a sum depend on how many rows are scored together."""
    if isinstance(value, dict | list | tuple):
        return tuple(_key(v) for v in (value.values() if isinstance(value, dict) else value))
    return f"{value:.12g}" if isinstance(value, float) else value


def _features(world: _World, because: Because | None) -> Iterator[_Question]:
    """The features that can matter: whose values, as others showed them, change the score or are read by the policy."""
    learner, chooses = world.inputs.learner, set(re.findall(r"\w+", world.policy.decide_on))
    read = {v for v in world.policy.model_dump().values() if isinstance(v, str)} | chooses
    base = _key(learner.score(world.row).to_pylist()[0])
    known: dict[Any, int | None] = {base: world.after}
    told: dict[tuple[str, float], tuple[Any, pa.Table]] = {}

    def score(name: str, values: Sequence[float]) -> None:
        fresh = [v for v in values if (name, v) not in told]
        if fresh:
            scored = learner.score(_variants(world.row, name, fresh))
            for i, (value, line) in enumerate(zip(fresh, scored.to_pylist(), strict=True)):
                told[name, value] = _key(line), scored.slice(i, 1)

    def asking(name: str) -> _After:
        def after(value: float, *, whole: bool = False) -> int | None:
            score(name, [value])
            key, line = told[name, value]
            if whole:
                return world.becomes(_variants(world.row, name, [value]), line, whole=True, bound=False)
            if name in read:  # the policy reads it as well: the score alone does not tell
                key = name, value, key
            if key not in known:
                # who is decided on at all is asked of the whole day
                known[key] = world.becomes(_variants(world.row, name, [value]), line, whole=name in chooses)
            return known[key]

        return after

    given = 0
    for name in _candidates(world, because):
        now = _as_number(world.row[name][0].as_py())
        column = world.inputs.features[name]
        seen = sorted({v for v in map(_as_number, column.unique().to_pylist()) if v is not None})
        if now is None or len(seen) < 2 or given == FEATURES_TRIED:
            continue
        sides = _steps(now, seen)
        score(name, [v for side in sides for v in side])
        if name in read or any(told[name, v][0] != base for side in sides for v in side):
            given += 1
            spread = pc.stddev(column.cast(pa.float64())).as_py() or 1.0
            whole_numbers = not pa.types.is_floating(world.row.schema.field(name).type)
            yield _Question(name, now, sides, spread, whole_numbers, asking(name))


# --- limits -----------------------------------------------------------------------------------------------------------


def _around(now: float, low: float, high: float) -> list[list[float]]:
    """Values above and below a limit within what it may be, nearest first."""
    up = [now * f for f in _FACTORS] if now > 0 else [0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0]
    down = [now / f for f in _FACTORS]
    above = [v for v in up if now < v <= high]
    below = [v for v in down if low <= v < now]
    above += [high] if math.isfinite(high) and high not in above and high > now else []
    below += [low] if low not in below and low < now else []
    return [above, below]


def _limits(world: _World) -> Iterator[_Question]:
    """The limits that the workflow sets and that can touch this decision."""
    workflow, arm = world.inputs.workflow, world.inputs.row["arm"]
    known: dict[tuple[str, float], int | None] = {}

    def question(limit: Limit, name: str, make: Callable[[Workflow, float], Workflow]) -> _Question:
        def after(value: float, *, whole: bool = False) -> int | None:
            if whole:
                return world.becomes(change=lambda w: make(w, value), whole=True, bound=False)
            if (name, value) not in known:
                known[name, value] = world.becomes(change=lambda w: make(w, value))
            return known[name, value]

        now, low, high = limit.now, limit.low, limit.high
        sides = _around(now, low, high)
        if limit.whole:
            sides = [
                [float(v) for v in range(int(now) + 1, int(min(high, now + 5)) + 1)],
                [float(v) for v in range(int(now) - 1, int(low) - 1, -1)],
            ]
        if limit.inside:
            sides = [[v for v in side if low < v < high] for side in sides]
        return _Question(name, float(now), sides, abs(now) or 1.0, limit.whole, after)

    for limit in world.kind.limits(world.policy, world.row, arm):
        change = lambda w, v, limit=limit: w.model_copy(update={"policy": limit.change(w.policy, v)})  # noqa: E731
        yield question(limit, f"policy.{limit.field}", change)
    explore = workflow.arms.explore
    if arm == "explore" and explore is not None and world.kind.explored is not None:

        def stepped(w: Workflow, v: float) -> Workflow:
            arms = w.arms.model_copy(update={"explore": explore.model_copy(update={"step": v})})
            return w.model_copy(update={"arms": arms})

        yield question(Limit("step", explore.step, explore.step * 0.01, 0.99, stepped), "arms.explore.step", stepped)


_GUARDS = {
    "rows": "max_rows",
    "changed": "max_changed",
    "share changed": "max_share_changed",
    "share of units": "max_share_units",
    "change": "max_change",
    "absolute change": "max_absolute_change",
    "total change": "max_total_change",
    "net change": "max_net_change",
}


def of_guardrails(decisions: pa.Table, spec: guardrails.Guardrails) -> list[dict[str, Any]]:
    """Each limit of the batch that is set: observed, whether it binds, and the value from which the status changes.

    ``least_that_passes`` is proved by judging the batch again with it, and with the next smaller value. A limit of the
    batch never changes a decision, it changes whether the batch waits for a person.
    """
    asked = [f for f in _GUARDS.values() if getattr(spec, f) is not None]
    tight = guardrails.check(decisions, spec.model_copy(update=dict.fromkeys(asked, 0)))
    out = []
    for name, field_ in _GUARDS.items():
        if field_ not in asked:
            continue
        limit = getattr(spec, field_)
        seen = [f["observed"] for f in tight.findings if f["name"] == name and f["status"] == "HELD"]
        observed = max(seen, key=lambda v: math.inf if isinstance(v, str) else v, default=0)

        def holds(value: float, field_: str = field_, name: str = name) -> bool:
            found = guardrails.check(decisions, spec.model_copy(update={field_: value})).findings
            return any(f["name"] == name and f["status"] == "HELD" for f in found)

        line: dict[str, Any] = {
            "name": f"guardrails.{field_}",
            "limit": limit,
            "observed": observed,
            "holds": holds(limit),
        }
        if not isinstance(observed, str) and observed > 0:
            below = observed - 1 if isinstance(observed, int) else math.nextafter(observed, 0.0)
            if not holds(observed) and holds(below):
                line["least_that_passes"] = observed
        out.append(line)
    return out
