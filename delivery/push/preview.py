"""The dry run: what a push would change now, exactly.

Belongs here: its rows and notes. Does not: writing anything anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from delivery.connectors.base import Reading, Written
from delivery.push import open_items, pool_phase, pools, reconciliation, sending, superseding
from delivery.push.reconciliation import Final, Gone, Item, Send
from delivery.push.run import Run, chunks
from delivery.push.types import DiffRow, PushError


def look(run: Run) -> tuple[list[DiffRow], list[str]]:
    """The rows of a dry run, and what would keep the push from beginning."""
    run.obeys_switch = False  # it only reads
    notes: list[str] = []
    others = [one for one in run.ledger.batches(run.batch.workflow) if one.system in (None, run.system)]
    if run.batch.kind == "decision":
        if (
            instead := superseding.instead_of(run, [one for one in others if one.batch_id != run.batch.batch_id])
        ) is not None:
            notes.append(instead[1])
        elif pending := run.pending():
            notes.append(pending)
    back = run.ledger.would_take_back(run.system, run.batch.batch_id) if run.batch.kind == "decision" else []
    items, gone = open_items.look_up(run, run.batch, {one.batch_id: one for one in others}, also=back)
    rows = [row(d.item, None, d.final.state, d.final.says) for d in gone if d.final is not None]
    decisions: list[dict[str, Any]] = []
    if run.batch.pools is not None:
        decisions = run.ledger.decisions(run.batch.batch_id).select(["entity_id", "arm", "before", "after"]).to_pylist()
    readings = run.read_all(
        [*(i.key for i in items), *(r["entity_id"] for r in decisions if r["entity_id"] is not None)]
    )
    if run.why:
        raise PushError(run.why)
    if len(items) > 1 and all(readings[i.key].state == "missing" for i in items):
        notes.append(run.all_missing(len(items)))
    sends = []
    by_target: dict[str, list[Item]] = {}
    for item in items:
        by_target.setdefault(readings[item.key].target, []).append(item)
    for target, sharing in by_target.items():
        if target and len({i.after for i in sharing}) > 1:
            said = " and ".join(f"{i.key} ({i.after})" for i in sharing)
            rows += [
                row(i, readings[i.key], "REJECTED", f"{said} share {target} and want different values") for i in sharing
            ]
            continue
        for item in sharing:
            reading = readings[item.key]
            item.clear_at, item.target = 0.0, target
            judged = reconciliation.judge(item, reading, at=run.monotonic(), stale_s=0.0)
            if isinstance(judged, Final):
                rows.append(row(item, reading, judged.state, judged.says))
            elif isinstance(judged, Send):
                sends.append(item)
            elif isinstance(judged, Gone):
                rows.append(row(item, reading, "PENDING", judged.says))
            else:
                rows.append(row(item, reading, "UNKNOWN", "an earlier write is not settled, the push would find out"))
    rows += would_send(run, sends, readings, decisions)
    order = {i.key: n for n, i in enumerate(items)}
    return sorted(rows, key=lambda row: order.get(row.entity, -1)), notes


def would_send(
    run: Run, sends: Sequence[Item], readings: Mapping[str, Reading], decisions: Sequence[Mapping[str, Any]]
) -> list[DiffRow]:
    """The rows of what would be written, after the pools and the system's own check."""
    rows = []
    if run.batch.pools is not None:
        shown = dict(readings)
        for item in sends:
            if not pool_phase.increases(item):
                shown[item.key] = replace(readings[item.key], value=item.after)
        totals = pools.live(pool_phase.holdings(run, decisions, shown, [], {}))
        wanted = {i.key: i for i in sends if pool_phase.increases(i)}
        for one in pools.plan(
            [pools.Increase(i.key, i.arms[0], i.expected or 0, i.after, i.gain) for i in wanted.values()],
            pools.headroom(run.batch.pools, totals), run.settings.unit,
        ):  # fmt: skip
            item = wanted[one.increase.key]
            if one.value is None:
                said = pool_phase.no_money(one.increase.arm, run.batch.pools, totals)
                rows.append(row(item, readings[item.key], "SKIPPED", said))
                sends = [i for i in sends if i is not item]
            else:
                item.value = one.value
    refused: dict[str, Written] = {}
    if run.can.validate_only:
        for chunk in chunks(sends, run.can.bulk_write):
            run.bucket.take()
            answers = run.connector.apply(
                [sending.write_of(run, i, readings[i.key]) for i in chunk], validate_only=True
            )
            refused |= {a.key: a for a in answers if a.outcome == "refused"}
    for item in sends:
        answer = refused.get(item.key)
        if answer is not None:
            rows.append(row(item, readings[item.key], "REJECTED", answer.says))
        else:
            why = "" if item.value == item.after else f"decided were {item.after}; the pool has no money for more"
            rows.append(row(item, readings[item.key], "SEND", why))
    return rows


def row(item: Item, reading: Reading | None, action: str, why: str) -> DiffRow:
    now = None if reading is None else reading.value
    arm = ", ".join(item.arms) or None
    return DiffRow(item.key or "(erased)", arm, now, item.value if action == "SEND" else None, action, why)
