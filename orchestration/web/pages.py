"""What each page shows, as parts.

Belongs here: choosing and ordering what the ledger and the lake know. Does not: figures, or an act (``orchestration.web.acts``).
Each function takes the site, what the address gave, and a token for its forms; it returns a title and the parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, date, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.compute as pc
from starlette.exceptions import HTTPException

from common.page import Field, Form, Link, Part, State, Table, Text
from delivery.ledger import BatchRow, Event, Ledger
from delivery.ledger.database import Unknown
from orchestration.web.site import Site
from pipeline import dispatch
from pipeline.decisions import batch_review, in_effect
from pipeline.explain import render, trace
from pipeline.lifecycle import retraining
from pipeline.monitoring import loop_health
from pipeline.workflow import Workflow

NAV = (Link("Today", "/"), Link("Find a decision", "/find"))
DAYS_SHOWN = 60
FOUND = 50
"""Decisions that a search lists."""
SEARCHED_DAYS = 30
LARGEST = 20

Page = tuple[str, list[Part]]


def today(site: Site, given: Mapping[str, str], token: str) -> Page:
    """Each workflow: where its newest day stands, what waits for whom, what is open."""
    loaded, now = site.workflows(), site.clock()
    rows: list[tuple[State, list[Any]]] = []
    parts: list[Part] = []
    with site.ledger() as book:
        for workflow in loaded.workflows:
            health = loop_health.examine(book, workflow, until=now)
            rows.append(_where_it_stands(book, workflow, health.now))
            parts += _loop(site, workflow, health)
    wrong = [f"{name} is left out, its files have a mistake: {why}" for name, why in sorted(loaded.refused.items())]
    table = Table(["workflow", "newest day", "decided by", "batch", "sent", "waits for"], rows)
    return "Today", [Text(wrong), table, *parts]


def _where_it_stands(book: Ledger, workflow: Workflow, now: Mapping[str, Any]) -> tuple[State, list[Any]]:
    name = Link(workflow.name, f"/{quote(workflow.name)}/")
    newest = max(
        in_effect.told(book.batches(workflow.name, kind="decision")).values(), key=lambda b: b.order_key, default=None
    )
    if newest is None:
        return "warn", [name, None, None, None, None, "nothing was decided yet"]
    waits: list[str] = []
    if now["stopped"]:
        waits.append(f"stopped by {now['stopped']['by']}")
    waits += [f"{one['approvals_missing']} approval(s) for {one['day']}" for one in now["held"]]
    waits += [f"version {one['version']} is on hold" for one in now["on_hold"]]
    waits += [f"{one['batch'] or 'a version'} is to be taken back" for one in now["condemned"]]
    waits += [f"a push of {one['day']} is not complete" for one in now["open_pushes"]]
    state: State = "bad" if now["stopped"] or now["condemned"] else "warn" if waits else "good"
    batch = Link(newest.status, _batch_page(newest))
    day = Link(newest.day.isoformat(), _day_page(workflow.name, newest.day))
    return state, [name, day, newest.step, batch, _sent(newest), "; ".join(waits) or "nobody"]


def _sent(batch: BatchRow, back: Mapping[str, BatchRow] | None = None) -> str:
    """Whether a batch was sent and what became of it; ``back``: rollbacks by the batch that they take back."""
    undone = (back or {}).get(batch.batch_id)
    if undone is not None:
        return "taken back" if undone.delivery == "COMPLETE" else "being taken back"
    counts = ", ".join(f"{n} {state.lower().replace('_', ' ')}" for state, n in sorted(batch.counts.items()))
    return {"NONE": "no", "OPEN": "not complete", "COMPLETE": "yes"}[batch.delivery] + (f": {counts}" if counts else "")


def _loop(site: Site, workflow: Workflow, health: loop_health.Health) -> list[Part]:
    at, name = site.addresses, quote(workflow.name)
    links = [
        Link("days", f"/{name}/"),
        Link("assets in Dagster", f"{at['Dagster']}/asset-groups"),
        Link("versions in MLflow", f"{at['MLflow']}/#/models/{name}"),
        Link("drift in Evidently", at["Evidently"]),
    ]
    held = [
        Link(f"look at and approve the batch of {one['day']}", f"/batch/{quote(one['batch'])}")
        for one in health.now["held"]
    ]
    first, *rest = loop_health.lines(health)
    return [Text([first, *(line.strip() for line in rest), *held, *links], bullets=True, title=workflow.name)]


def days(site: Site, given: Mapping[str, str], token: str) -> Page:
    """The newest days of a workflow, the newest first."""
    workflow = _workflow(site, given["workflow"])
    with site.ledger() as book:
        batches = book.batches(workflow.name, kind="decision")
        health = loop_health.examine(book, workflow, until=site.clock())
        back = _rollbacks(book, workflow.name)
    told = in_effect.told(batches)
    verdicts = _by_day(site, workflow, "regression", ("day", "verdict"))
    drift = _by_day(site, workflow, "drift", ("day", "spoke"))
    rows: list[tuple[State, list[Any]]] = []
    for one in sorted(health.days, key=lambda d: d["day"], reverse=True)[:DAYS_SHOWN]:
        day, batch = one["day"], told.get(one["day"])
        said = sorted({row["verdict"] for row in verdicts.get(day, ())})
        spoke = any(row["spoke"] for row in drift.get(day, ()))
        state: State = "bad" if batch is None or "ROLLBACK" in said else "warn" if one["late"] or spoke else "good"
        rows.append((state, [
            Link(day.isoformat(), _day_page(workflow.name, day)), one["step"] or "not decided",
            "late" if one["late"] else "in time", None if batch is None else batch.changed,
            None if batch is None else _sent(batch, back), one["overrides"], "yes" if spoke else "no", ", ".join(said),
        ]))  # fmt: skip
    head = ["day", "decided by", "deadline", "changed", "sent", "people's changes", "drift alert", "guard"]
    return f"{workflow.name}: its days", [Table(head, rows), *_version_forms(workflow.name, health.now, token)]


def _version_forms(name: str, now: Mapping[str, Any], token: str) -> list[Part]:
    """The kill switch, and a form for every version on hold or blocked."""
    act, button = ("resume", "Let it send again") if now["stopped"] else ("stop", "Stop sending")
    note = (
        "Stopped: nothing is sent."
        if now["stopped"]
        else "The kill switch: a push under way ends after its wave. A guard's rollback waits until it is let go on."
    )
    forms: list[Part] = [_form(act, button, token, {"workflow": name}, note)]
    says = {one["version"]: one["says"] for one in now["on_hold"]}
    says |= {number: f"version {number} was rolled back and is blocked" for number in now["blocked"]}
    for number, said in sorted(says.items()):
        hidden = {"workflow": name, "version": str(number)}
        forms.append(_form("lift", f"Let version {number} go on", token, hidden, f"{said}."))
    return forms


def day(site: Site, given: Mapping[str, str], token: str) -> Page:
    """One day: what arrived, how it looked, what was decided and sent, what became of it."""
    workflow, on = _workflow(site, given["workflow"]), _day(given["day"])
    name = workflow.name
    with site.ledger() as book:
        batches = [b for b in book.batches(name) if b.day == on]
        back = _rollbacks(book, name)
        triggers = [e for e in book.events(retraining.KIND, name) if e.body.get("day") == on.isoformat()]
    around = [
        Link("the day before", _day_page(name, on - timedelta(days=1))),
        Link("the day after", _day_page(name, on + timedelta(days=1))),
    ]
    return f"{name}, {on}", [
        _arrived(site, workflow, on),
        Text(_judged(site, workflow, on), bullets=True, title="How it looked"),
        Table(
            ["batch", "kind", "decided by", "status", "rows", "changed", "sent"],
            [("", [Link(b.batch_id, _batch_page(b)), b.kind, b.step, b.status, b.rows, b.changed, _sent(b, back)]) for b in batches],
            title="Decided and taken back",
        ),
        Text([str(e.body.get("text") or e.body.get("reason")) for e in _asked(triggers)], bullets=True, title="Why a retraining was asked for"),
        Text(_reports(site, name, on), bullets=True, title="Pages of the stages"),
        Text(around, bullets=True, title="Other days"),
    ]  # fmt: skip


def _asked(triggers: Sequence[Event]) -> list[Event]:
    return [e for e in triggers if e.body.get("action") == "asked"]


def _arrived(site: Site, workflow: Workflow, on: date) -> Table:
    """The files that landed between this day's end and the next."""
    head = ["file", "status", "rows", "accepted", "quarantined", "landed (UTC)", "remark"]
    table = workflow.table("files")
    rows: list[tuple[State, list[Any]]] = []
    if site.lake.exists(table):
        first = (in_effect.over(on) - timedelta(days=1)).replace(tzinfo=UTC)
        where = (pc.field("landed_at") >= first) & (pc.field("landed_at") < first + timedelta(days=1))
        for f in site.lake.read(table, where=where).sort_by("path").to_pylist():
            state: State = "bad" if f["status"] == "refused" else "warn" if f["quarantined"] else "good"
            rows.append(
                (
                    state,
                    [
                        f["path"],
                        f["status"],
                        f["rows"],
                        f["accepted"],
                        f["quarantined"],
                        f"{f['landed_at']:%Y-%m-%d %H:%M}",
                        f["reason"],
                    ],
                )
            )
    return Table(head, rows, title="What arrived")


def _judged(site: Site, workflow: Workflow, on: date) -> list[str]:
    lines = []
    for row in _rows(site, workflow, "scoring", on):
        why = f": {'; '.join(row['reasons'])}" if row["reasons"] else ""
        version = f", version {row['model_version']}" if row["model_version"] is not None else ""
        lines.append(f"Scored by {row['step']}{version}{why}")
    lines += [f"Drift: {row['text']}" for row in _rows(site, workflow, "drift", on)]
    lines += [f"Performance: {text}" for text in dict.fromkeys(
        f"{row['metric']} ({row['kind']}): {row['text']}" for row in _rows(site, workflow, "performance", on) if row["text"]
    )]  # fmt: skip
    said = {(row["comparison"], row["verdict"]) for row in _rows(site, workflow, "regression", on)}
    lines += [f"Guard: {comparison}: {verdict}" for comparison, verdict in sorted(said)]
    lines += [f"Shadow: {row['text']}" for row in _rows(site, workflow, "shadow", on)]
    return lines


def _reports(site: Site, name: str, on: date) -> list[Link]:
    at = Path(site.reports, name, on.isoformat())
    return [
        Link(p.stem.replace("-", " "), f"/{quote(name)}/{on}/{quote(p.name)}")
        for p in sorted(at.glob("*.html") if at.is_dir() else ())
    ]


def batch(site: Site, given: Mapping[str, str], token: str) -> Page:
    """One batch: what it changes in sum and the largest changes, what was objected, what became of it; and what may be done."""
    with site.ledger() as book:
        row = book.batch(given["batch"])
        workflow = _workflow(site, row.workflow)
        seen = batch_review.review(book, workflow, row.batch_id, site.clock(), LARGEST)
        back = _rollbacks(book, workflow.name)
    say = batch_review.teller(workflow)
    b = seen.batch
    lines: list[str | Link] = [
        f"{b.kind} of {b.day}, decided by {b.step}; {b.status}; digest {b.digest}",
        f"{b.rows} decisions, {b.changed} change something; sent: {_sent(b, back)}",
        seen.standing.text,
        Link(f"the day {b.day}", _day_page(b.workflow, b.day)),
    ]
    if seen.stopped:
        lines.append(f"{b.workflow} is stopped by {seen.stopped.actor or loop_health.NOBODY}: {seen.stopped.reason}")
    parts: list[Part] = [
        Text(lines, bullets=True),
        Text(seen.objections, bullets=True, title="What its guardrails said"),
        Table(
            ["arm", "decisions", "change", "before", "after", "up", "down"],
            [
                ("", [arm, t["entities"], t["changed"], *(say(t[k]) for k in ("before", "after", "up", "down"))])
                for arm, t in seen.totals.items()
            ],
            title="In sum, by arm",
        ),
        Table(
            ["decision", "entity", "arm", "before", "after", "stands", "reasons"],
            [
                ("", [Link(d["decision_id"], f"/decision/{quote(d['decision_id'])}"), d["entity_id"], d["arm"],
                      say(d["before"]), say(d["after"]), say(d["stands"]), " ".join(d["reasons"] or ())])
                for d in seen.largest if d["before"] != d["after"]
            ],
            title="The largest changes",
        ),
        Table(
            ["entity", "state", "before", "after", "stands", "why"],
            [("warn", [d.entity, d.state, say(d.before), say(d.after), say(d.stands), d.says]) for d in seen.not_as_intended[:LARGEST]],
            title=f"Not as intended ({len(seen.not_as_intended)})",
        ),
    ]  # fmt: skip
    if b.status == "HELD" and not seen.standing.ok and b.delivery == "NONE":
        parts.append(
            _form(
                "approve",
                "Approve",
                token,
                {"batch": b.batch_id, "digest": b.digest},
                "Let it go, for exactly the content above.",
            )
        )
    if undone := back.get(b.batch_id):
        parts.append(Text([Link(f"its rollback {undone.batch_id}", _batch_page(undone))]))
    elif b.kind == "decision" and b.acted:
        parts.append(Text([Link("Take it back: see first what would change", f"/batch/{quote(b.batch_id)}/rollback")]))
    return f"{b.workflow}: batch {b.batch_id}", parts


def rollback(site: Site, given: Mapping[str, str], token: str) -> Page:
    """What taking a batch back would change now; nothing is written. Asks the downstream system what stands there."""
    with site.ledger() as book:
        row = book.batch(given["batch"])
        workflow = _workflow(site, row.workflow)
        which = dispatch.selection(book, batch=row.batch_id, workflow=None, since=None, model=None)
        diffs = dispatch.try_roll_back(book, which, clock=site.clock)
    say, head = batch_review.teller(workflow), ["entity", "what", "now", "would be", "why"]
    rows: list[tuple[State, list[Any]]] = [
        ("" if one.action == "SEND" else "warn", [one.entity, one.action, say(one.now), say(one.would), one.why])
        for diff in diffs for one in sorted(diff.rows, key=lambda r: (r.action != "SEND", -abs((r.would or 0) - (r.now or 0))))
    ]  # fmt: skip
    sent = sum(one.action == "SEND" for diff in diffs for one in diff.rows)
    if not sent:
        return f"Take back batch {row.batch_id}", [
            Text(["Nothing of it is to be taken back."]),
            Table(head, rows[:200]),
        ]
    return f"Take back batch {row.batch_id}", [
        Text([f"{sent} of {len(rows)} values would be sent back. What somebody changed since is left alone. Nothing was written."]),
        Table(head, rows[:200], title="The largest first"),
        _form("rollback", "Take it back", token, {"batch": row.batch_id}, "Sends the values above, and reads each back."),
    ]  # fmt: skip


def decision(site: Site, given: Mapping[str, str], token: str) -> Page:
    """Why: what stands downstream and who set it, the reasons, then back to the source rows, made again to the bit.

    What would have changed it is searched for where it is asked for (``search``): that takes seconds.
    """
    search, here = "search" in given, f"/decision/{quote(given['decision'])}"
    with site.ledger() as book:
        found = trace.explain(book, site.lake, site.registry(), given["decision"], search=search).as_dict()
    chain = dict(render.sections(found))
    first = (render.STANDS, render.REASONS, render.TURNS, render.AGAIN)
    links: list[str | Link] = [
        Link(f"its batch {found['batch']['batch_id']}", f"/batch/{quote(found['batch']['batch_id'])}")
    ]
    if not search:
        links.append(Link("search for what would have changed it (takes seconds)", f"{here}?search=yes"))
        del chain[render.TURNS]
    if "gone" not in found.get("reverses", {"gone": ""}):
        other = found["reverses"]["decision_id"]
        links.append(Link(f"the decision that it reverses, {other}", f"/decision/{quote(other)}"))
    ordered = [*(title for title in first if title in chain), *(title for title in chain if title not in first)]
    parts: list[Part] = [Text(chain[title], bullets=True, title=title) for title in ordered]
    return render.headline(found), [Text(links, bullets=True), *parts]


def find(site: Site, query: str) -> Page | str:
    """Decisions whose id or entity begins with ``query``, the newest first; the address of the one where there is one."""
    asked = query.strip()
    form = Form(
        "/find", "Find", [Field("q", "Entity or decision; its beginning is enough", "search", asked)], method="get"
    )
    if not asked:
        return "Find a decision", [form]
    with site.ledger() as book:
        try:
            book.decision(asked)
            return f"/decision/{quote(asked)}"
        except Unknown:
            pass
    found: list[dict[str, Any]] = []
    for workflow in site.workflows().workflows:
        table = workflow.table("decisions")
        if not site.lake.exists(table):
            continue
        newest = max(site.lake.read(workflow.table("batches"), columns=["day"])["day"].to_pylist(), default=None)
        if newest is None:
            continue
        begins = pc.starts_with(pc.field("entity_id"), pattern=asked) | pc.starts_with(
            pc.field("decision_id"), pattern=asked
        )
        rows = site.lake.read(
            table, days=[newest - timedelta(days=n) for n in range(SEARCHED_DAYS)], where=begins,
            columns=["day", "decision_id", "entity_id", "arm", "before", "after"],
        )  # fmt: skip
        say = batch_review.teller(workflow)
        found += [
            {**row, "workflow": workflow.name, "before": say(row["before"]), "after": say(row["after"])}
            for row in rows.to_pylist()
        ]
    if len(found) == 1:
        return f"/decision/{quote(found[0]['decision_id'])}"
    found.sort(key=lambda r: (r["day"], r["entity_id"], r["decision_id"]), reverse=True)
    listed = Table(
        ["decision", "workflow", "day", "entity", "arm", "before", "after"],
        [("", [Link(r["decision_id"], f"/decision/{quote(r['decision_id'])}"), *(r[k] for k in ("workflow", "day", "entity_id", "arm", "before", "after"))])
         for r in found[:FOUND]],
    )  # fmt: skip
    says = f"{len(found)} decisions of the newest {SEARCHED_DAYS} days begin so." + (
        f" The newest {FOUND}:" if len(found) > FOUND else ""
    )
    return f"Decisions of {asked}", [form, Text([says]), listed]


# --- what pages share -------------------------------------------------------------------------------------------------


def _form(act: str, button: str, token: str, hidden: Mapping[str, str], note: str) -> Form:
    fields = [
        Field("reason", "Why, in a sentence; it stands in the ledger"),
        Field("name", "Your name as an approver"),
        Field("secret", "Your secret", "password"),
    ]
    return Form(f"/act/{act}", button, fields, {"token": token, **hidden}, note)


def _workflow(site: Site, name: str) -> Workflow:
    found = site.workflow(name)
    if found is None:
        raise HTTPException(404)
    return found


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise HTTPException(404) from None


def _day_page(workflow: str, on: date) -> str:
    return f"/{quote(workflow)}/{on}/"


def _rollbacks(book: Ledger, workflow: str) -> dict[str, BatchRow]:
    return {b.reverses: b for b in book.batches(workflow, kind="rollback") if b.reverses is not None}


def _batch_page(batch: BatchRow) -> str:
    return f"/batch/{quote(batch.batch_id)}"


def _rows(site: Site, workflow: Workflow, table: str, on: date) -> list[dict[str, Any]]:
    name = workflow.table(table)
    return site.lake.read(name, days=[on]).to_pylist() if site.lake.exists(name) else []


def _by_day(site: Site, workflow: Workflow, table: str, columns: Sequence[str]) -> dict[date, list[dict[str, Any]]]:
    name = workflow.table(table)
    found: dict[date, list[dict[str, Any]]] = {}
    if site.lake.exists(name):
        for row in site.lake.read(name, columns=list(columns)).to_pylist():
            found.setdefault(row["day"], []).append(row)
    return found
