"""Entities that share a target become one item, after one reading of them all.

Belongs here: putting together what shares a target before anything is sent. Does not: a target that is found to be shared later
(``delivery.push.worker``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from delivery.push import evidence, waves
from delivery.push.reconciliation import Final, Item
from delivery.push.run import Done, Run


def grouped(run: Run, items: Sequence[Item]) -> list[Item]:
    """Read everything once and put together what shares a target; settles what needs no write, returns the rest."""
    if not items:
        return []
    verified_at = run.clock()
    readings = run.read_all([i.key for i in items])
    by_target: dict[str, list[Item]] = {}
    alone = []
    for item in items:
        if item.key in readings and readings[item.key].state != "missing":
            by_target.setdefault(readings[item.key].target, []).append(item)
        else:
            alone.append(item)
    gone = [item for item in alone if item.key in readings]
    if len(gone) > 1 and not by_target:
        run.why = run.why or run.all_missing(len(gone))
    for item in gone:
        item.alone = bool(by_target)
    out, over = alone, []
    for target, sharing in by_target.items():
        first = together(target, sharing)
        if len({i.after for i in sharing}) > 1:
            said = " and ".join(f"{i.key} ({i.after})" for i in sharing)
            over.append(Done(first, Final("REJECTED", f"{said} share {target} and want different values", None)))
            continue
        if run.batch.pools is not None and len(set(first.arms)) > 1:
            said = " and ".join(f"{i.key} ({', '.join(i.arms)})" for i in sharing)
            over.append(Done(first, Final("REJECTED", f"{said} share {target} and are in different arms", None)))
            continue
        judged = None if first.maybe else evidence.judge(run, first, readings[first.key])
        if isinstance(judged, Final):
            over.append(Done(first, judged, verified_at=verified_at))
        else:
            out.append(first)
    waves.settle(run, over)
    return out


def together(target: str, sharing: Sequence[Item]) -> Item:
    """One item for all that share a target; what one of them has begun, all have."""
    sharing = sorted(sharing, key=lambda i: i.deliveries[0].n)
    begun = next((i for i in sharing if i.maybe), next((i for i in sharing if i.sent), sharing[0]))
    gains = [i.gain for i in sharing if i.gain is not None]
    return replace(
        begun, deliveries=tuple(d for i in sharing for d in i.deliveries), key=sharing[0].key, target=target,
        arms=tuple(sorted({a for i in sharing for a in i.arms})), gain=sum(gains) if gains else None,
        due=max(i.due for i in sharing), prior=next((i.prior for i in sharing if i.prior is not None), None),
    )  # fmt: skip
