"""A push within pools: decreases first, proven; then the increases for which there is money.

Belongs here: the order, and what each target may hold. Does not: the arithmetic (``delivery.push.pools``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from delivery.connectors.base import Reading
from delivery.push import grouping, pools, waves
from delivery.push.reconciliation import Final, Item
from delivery.push.run import Done, Run
from delivery.push.types import PushError


def send_within_pools(run: Run, items: Sequence[Item], limits: Mapping[str, int], floors: Mapping[str, int]) -> None:
    """Decreases first, proven; then the increases for which there is money, whatever lands and whatever fails."""
    decisions = run.timed(run.ledger.decisions, run.batch.batch_id).select(["entity_id", "arm", "before", "after"])
    rows = decisions.to_pylist()
    without = sorted({str(r["arm"]) for r in rows if r["arm"] not in limits})
    if without:
        raise PushError(f"batch {run.batch.batch_id} has decisions in {', '.join(without)}, an arm without a pool")
    items = grouping.grouped(run, items)
    for item in waves.run_waves(run, [i for i in items if i.maybe], "free"):
        item.value, item.maybe = item.after, False
    waves.run_waves(run, [i for i in items if not i.open_end and not increases(i)], "send")
    while rest := [i for i in items if not i.open_end and increases(i)]:
        if run.why or not run.nap_until(max([i.clear_at for i in items if i.sent], default=0.0)):
            return
        keys = [r["entity_id"] for r in rows if r["entity_id"] is not None]
        readings = run.read_all(keys)
        if len(readings) < len(set(keys)):
            run.why = run.why or "the live total could not be read: no increase was sent"
            return
        changed = [i for i in rest if readings[i.key].state != "open" or readings[i.key].value != i.expected]
        back = waves.run_waves(run, changed, "free")
        ready = [i for i in rest if i not in changed]
        if not ready:
            if len(back) == len(changed):
                run.why = run.why or "values downstream change while they are read: no increase was sent"
                return
            continue
        totals = pools.live(holdings(run, rows, readings, items, floors))
        planned = pools.plan(
            [pools.Increase(i.key, i.arms[0], i.expected or 0, i.after, i.gain) for i in ready],
            pools.headroom(limits, totals), run.settings.unit,
        )  # fmt: skip
        of = {i.key: i for i in ready}
        full = [of[p.increase.key] for p in planned if p.full]
        if full:
            waves.run_waves(run, full, "send")
            continue
        # Nothing fits as a whole. What is left is shared out only when nothing can give money back any more.
        unsettled = {a for i in items if not i.done and i not in ready for a in i.arms} | {
            a for i in back for a in i.arms
        }
        part, none = [], []
        for one in planned:
            item = of[one.increase.key]
            if one.increase.arm in unsettled:
                item.left = True
                run.note = f"increases of arm {one.increase.arm} wait for deliveries that are not settled"
            elif one.value is not None:
                item.value = one.value
                part.append(item)
                run.replanned.append((item.key, item.after, one.value))
            elif not any(p.value is not None and p.increase.arm == one.increase.arm for p in planned):
                none.append(Done(item, Final("SKIPPED", no_money(one.increase.arm, limits, totals), item.expected)))
        waves.settle(run, none)
        waves.run_waves(run, part, "send")


def holdings(
    run: Run,
    rows: Sequence[Mapping[str, Any]],
    readings: Mapping[str, Reading],
    items: Sequence[Item],
    floors: Mapping[str, int],
) -> list[pools.Holding]:
    """What each target may hold: what it shows, and what of ours may still arrive there or not be visible yet."""
    arms: dict[str, set[str]] = {}
    values: dict[str, list[int | None]] = {}
    mine: dict[str, list[int | None]] = {}
    # What a rollback cannot find stands there for all we know, and holds its money.
    ours = {item.key: item.expected for item in items if item.rollback and not item.done}
    for item in items:
        if (item.maybe and not item.done) or (item.sent and run.can.stale_reads_s > 0):
            mine.setdefault(item.target, []).append(item.value)
    for n, row in enumerate(rows):
        key = row["entity_id"]
        if key is None:
            target, held = f"erased {n}", [max(row["before"] or 0, row["after"] or 0)]
        else:
            reading = readings[key]
            target = reading.target if reading.state != "missing" else f"missing {key}"
            held = [0 if reading.value is None and reading.state != "open" else reading.value]
            held += [ours[key]] if key in ours and reading.state == "missing" else []
            held += [floors[key]] if key in floors else []
        arms.setdefault(target, set()).add(row["arm"])
        values.setdefault(target, mine.get(target, [])[:]).extend(held)
    return [pools.Holding(t, tuple(sorted(arms[t])), tuple(values[t])) for t in values]


def increases(item: Item) -> bool:
    """By what must stand there: nothing else is ever written over."""
    return item.after > (item.expected or 0)


def no_money(arm: str, limits: Mapping[str, int], totals: pools.Totals) -> str:
    if arm in totals.unreadable:
        return f"what {', '.join(totals.unreadable[arm][:3])} holds cannot be read, so no increase in arm {arm} is safe"
    return f"no money left in the pool of arm {arm}: {totals.most.get(arm, 0)} of {limits[arm]} is held"
