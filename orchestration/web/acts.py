"""What forms ask for: approve a held batch, stop and resume a workflow, let a version go on, take a batch back.

Belongs here: who asks, proven by an approver's secret, and what is said of the outcome. Does not: doing it (``delivery``,
``pipeline.dispatch``), or whether the form is one of ours (``orchestration.web.app``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from common.errors import SignalboxError
from common.page import Link, Part, Text
from delivery import approvals
from delivery.ledger import Ledger
from orchestration.web.site import Site
from pipeline import dispatch
from pipeline.lifecycle import promotion

Page = tuple[str, list[Part]]


class NotAsked(SignalboxError, ValueError):
    """A form lacks something, or names what is not there."""


def approve(site: Site, form: Mapping[str, str]) -> Page:
    """Let a held batch go. Refused where its content is not the one that the page showed any more."""
    with site.ledger() as book:
        batch = book.batch(_given(form, "batch"))
        if batch.digest != form.get("digest"):
            raise NotAsked(f"batch {batch.batch_id} is not what the page showed any more: look at it again")
        workflow = site.workflow(batch.workflow)
        if workflow is None or workflow.delivery is None:
            raise NotAsked(f"{batch.workflow} is no workflow that delivers: its workflow.yaml is gone or wrong")
        spec = workflow.delivery.approval
        stands = approvals.approve(
            book, batch.batch_id, _given(form, "name"), _given(form, "secret"), _given(form, "reason"),
            valid_for=timedelta(hours=spec.valid_hours), four_eyes=spec.four_eyes,
        )  # fmt: skip
    return "Approved", [Text([stands.text, Link("the batch", f"/batch/{batch.batch_id}")])]


def stop(site: Site, form: Mapping[str, str]) -> Page:
    """Nothing of a workflow is sent any more."""
    return _switch(site, form, stopped=True)


def resume(site: Site, form: Mapping[str, str]) -> Page:
    """A stopped workflow sends again."""
    return _switch(site, form, stopped=False)


def _switch(site: Site, form: Mapping[str, str], *, stopped: bool) -> Page:
    workflow = _workflow_named(site, form)
    with site.ledger() as book:
        name, reason = _proven(book, form)
        book.switch(workflow, stopped, name, reason)
    said = f"{workflow} is {'stopped' if stopped else 'running again'} ({name}: {reason})"
    return "Stopped" if stopped else "Running again", [Text([said, Link("its days", f"/{workflow}/")])]


def lift(site: Site, form: Mapping[str, str]) -> Page:
    """Let a version that is on hold, or was rolled back and is blocked, go on; it is not promoted by this alone."""
    name, number = _workflow_named(site, form), _given(form, "version")
    if not number.isdecimal():
        raise NotAsked(f"{number!r} is no version of a model")
    with site.ledger() as book:
        who, reason = _proven(book, form)
        behind = promotion.lift(name, site.registry(), book, int(number), actor=who, reason=reason)
    late = (
        [f"MLflow does not know of it yet ({behind}); the ledger counts, and the next reconcile tells it."]
        if behind
        else []
    )
    return "Lifted", [
        Text([f"{name} version {number} may go on ({who}: {reason})", *late, Link("its days", f"/{name}/")])
    ]


def rollback(site: Site, form: Mapping[str, str]) -> Page:
    """Push the prior values of one batch; can be asked for again until it is complete."""
    with site.ledger() as book:
        which = dispatch.selection(book, batch=_given(form, "batch"), workflow=None, since=None, model=None)
        name, reason = _proven(book, form)
        report = dispatch.roll_back(
            book, site.registry(), which, actor=name, reason=reason, trigger="person", run_id="web", clock=site.clock,
            sleep=time.sleep,
        )  # fmt: skip
    title = "Taken back" if report.complete else "NOT complete: ask for it again"
    return title, [Text(dispatch.lines(report), bullets=True), Text([Link("the batch", f"/batch/{form['batch']}")])]


def _workflow_named(site: Site, form: Mapping[str, str]) -> str:
    workflow = site.workflow(_given(form, "workflow"))
    if workflow is None:
        raise NotAsked(f"{form['workflow']} is no workflow")
    return workflow.name


def _given(form: Mapping[str, str], name: str) -> str:
    if not (value := form.get(name, "").strip() if name != "secret" else form.get(name, "")):
        raise NotAsked(f"the form lacks {name}: fill it in")
    return value


def _proven(book: Ledger, form: Mapping[str, str]) -> tuple[str, str]:
    """The name of the approver who asks, and why."""
    name, reason, secret = _given(form, "name"), " ".join(_given(form, "reason").split()), _given(form, "secret")
    if secret in reason:
        raise NotAsked("the reason holds the secret; reasons are stored for all to read: leave it out")
    approvals.authenticate(book, name, secret)
    return approvals.known_as(name), reason


ACTS: dict[str, Callable[[Site, Mapping[str, str]], Page]] = {
    "approve": approve,
    "stop": stop,
    "resume": resume,
    "lift": lift,
    "rollback": rollback,
}
