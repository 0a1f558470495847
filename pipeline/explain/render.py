"""The words in which a terminal tells the chain of a decision.

Belongs here: lines from the links of ``pipeline.explain.trace``. Does not: finding them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data_checks import guardrails
from models.policies.allocation import money_text
from models.policies.base import MATERIAL

STANDS, REASONS = "What stands downstream", "The decision, and its reasons"
AGAIN, TURNS = "Made again", "What would have changed it"
"""Titles of the sections that a person reads first."""
FILES_SHOWN, ROWS_SHOWN = 3, 6
"""Of the files and source rows that are listed, how many a terminal shows."""


def lines(said: Mapping[str, Any]) -> Iterator[str]:
    """The chain as indented lines."""
    decision = said["decision"]
    value = money_text if decision["money"] else str

    def indented(depth: int, link: Iterator[str]) -> Iterator[str]:
        first = True
        for line in link:
            yield "  " * depth + ("← " if first and depth else "  " if depth else "") + line
            first = False

    yield headline(said)
    links = [link for _, link in _links(said, value)]
    for depth, link in enumerate(links):
        yield from indented(depth, link)
    if "forgotten" in decision:
        yield decision["forgotten"]
    yield from _replay_lines(said["replay"], value)
    yield from _would_change_lines(said["would_change"], decision, value)
    if "gone" not in said.get("reverses", {"gone": ""}):
        yield "It reverses:"
        yield from ("  " + line for line in lines(said["reverses"]))


def headline(said: Mapping[str, Any]) -> str:
    """The decision in one line: workflow, day, entity, before and after."""
    decision = said["decision"]
    value = money_text if decision["money"] else str
    name = decision["entity_id"] if decision["entity_id"] is not None else "(name forgotten)"
    moved = f"{_shown(decision['before'], value)} → {_shown(decision['after'], value)}"
    return f"{decision['workflow']}, {decision['day']}: {name}: {moved}"


def sections(said: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The chain as titles with their lines, for a page: what the lines of a terminal say, without their indentation."""
    decision = said["decision"]
    value = money_text if decision["money"] else str
    for title, link in _links(said, value):
        yield title, list(link)
    if "forgotten" in decision:
        yield "Forgotten", [decision["forgotten"]]
    yield AGAIN, list(_replay_lines(said["replay"], value))
    _, *turns = _would_change_lines(said["would_change"], decision, value)
    yield TURNS, [turn.strip() for turn in turns]


def _links(said: Mapping[str, Any], value: Callable[[Any], str]) -> list[tuple[str, Iterator[str]]]:
    """The links of the chain, from downstream back."""
    decision = said["decision"]
    links = [
        (STANDS, _downstream_lines(said["downstream"], value)),
        ("How it was delivered", _delivery_lines(said["deliveries"], value)),
        ("Its batch", _batch_lines(said["batch"], said["approvals"])),
        (REASONS, _decision_lines(decision, value)),
    ]
    if decision["kind"] == "rollback":
        return [*links, ("The rollback", _rollback_lines(said))]
    return [
        *links,
        ("The score", _score_lines(said["score"])),
        ("The model", _model_lines(said["model"])),
        ("The tables", _table_lines(said["tables"])),
        ("The source rows", _source_lines(said["sources"])),
    ]


def _shown(value: Any, words: Callable[[Any], str]) -> str:
    return "nothing" if value is None else words(value)


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.2f}"
    return "null" if value is None else str(value)


def _when(text: str | None) -> str:
    return f"{text.replace('T', ' ').partition('.')[0]} UTC" if text else "at a time that is not recorded"


def _short(digest: Any) -> str:
    return f"{str(digest)[:12]}…" if digest else "(none)"


def _downstream_lines(said: Mapping[str, Any], value: Callable[[Any], str]) -> Iterator[str]:
    if "gone" in said:
        yield f"Downstream: gone: {said['gone']}"
    elif "state" in said:
        read = f"read back {_when(said['verified_at'])}" if said["verified_at"] else "not read back"
        yield f"Downstream: {_shown(said['observed'], value)}, {read} ({said['state']})"
        if said.get("says"):
            yield f"it says: {said['says']}"
    else:
        yield f"Downstream: {said['says']}"
    if "instead" in said:
        other = said["instead"]
        yield (
            f"not what acted that day: decision {other['decision_id']} of batch {other['batch_id']} did, and "
            f"{_shown(other['standing'], value)} stood"
        )
    elif said.get("acted") is False:
        yield "nothing of its batch has been sent: this decision has not acted"
    if "now" in said:
        now = said["now"]
        stands = "as decided" if now["as_decided"] else "not what was decided"
        stands = "not by this decision" if said.get("acted") is False else stands
        yield f"now: {_shown(now['value'], value)} ({now['state']}, {stands}){': ' + now['says'] if now['says'] else ''}"


def _delivery_lines(said: Mapping[str, Any], value: Callable[[Any], str]) -> Iterator[str]:
    if "gone" in said:
        yield f"Delivery: gone: {said['gone']}"
        return
    if not said["each"]:
        yield "Delivery: none"
    for one in said["each"]:
        tries = one["tries"]
        count = "attempts gone" if "gone" in tries else f"attempts: {len(tries['each'])}"
        differs = "" if one["sent"] in (None, one["after"]) else f", sent {value(one['sent'])} (replanned)"
        yield (
            f"Delivery {one['state']}, {count}, expected {_shown(one['expected'], value)}, "
            f"found {_shown(one['prior'], value)} before the first write{differs}"
        )
        if "gone" in tries:
            yield f"gone: {tries['gone']}"
        for t in tries.get("each", ()):
            took = "" if t["window_ms"] is None else f", {t['window_ms']:.1f} ms between read and write"
            answer = t["outcome"] or "no answer recorded"
            words = f": {t['says']}" if t.get("says") else ""
            yield f"{_when(t['started_at'])}: {_shown(t['value'], value)} → {answer}{took}{words}"


def _batch_lines(said: Mapping[str, Any], approvals: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Batch {said['batch_id']} ({said['kind']}), {said.get('status', 'status unknown')}, step {said['step']}, "
        f"{said.get('changed', '?')} of {said.get('rows', '?')} changed, digest {_short(said.get('digest'))}"
    )
    if "gone" in said:
        yield f"gone: {said['gone']}"
    if said.get("decided_at"):
        yield f"decided {_when(said['decided_at'])} in run {said.get('run_id')}"
    yield from (f"step {said['step']}: {reason}" for reason in said.get("step_reasons") or ())
    for finding in said.get("findings") or ():
        yield f"guardrail {guardrails.sentence(finding)}"
    if not said.get("findings"):
        yield "no guardrail spoke against it"
    for one in said.get("rolled_back_by") or ():
        yield f"rolled back by {one['batch_id']} ({one['delivery']})"
    if "gone" in approvals:
        yield f"approvals gone: {approvals['gone']}"
    for one in approvals.get("given", ()):
        who = one["approver"] if one["approver"] is not None else "(name forgotten)"
        yield f"approved by {who} {_when(one['at'])}: {one['reason']} (valid until {_when(one['expires_at'])})"
    if not approvals.get("given", True):
        needed = {"READY": "it needed nobody", "HELD": "it waits for a person", "REFUSED": "nobody may approve it"}
        yield f"nobody approved it: {needed.get(said.get('status', ''), 'whether it needed to be is not known')}"


def _decision_lines(said: Mapping[str, Any], value: Callable[[Any], str]) -> Iterator[str]:
    moved = f"{_shown(said['before'], value)} → {_shown(said['after'], value)}"
    probability = "" if said["arm_probability"] is None else f" (probability {_figure(said['arm_probability'])})"
    yield f"Decision {moved}, arm {said['arm']}{probability}, expected gain {_figure(said['expected_gain'])}"
    if said["perturbation"] is not None:
        yield (
            f"perturbed by {_figure(said['perturbation'])} (probability {_figure(said['perturbation_probability'])})"
        )
    if said["review"]:
        yield "left to people (review)"
    yield from said["reasons"] or ()


def _score_lines(said: Mapping[str, Any]) -> Iterator[str]:
    if "gone" in said:
        yield f"Score: gone: {said['gone']}"
        return
    if "says" in said:
        yield f"Score: {said['says']}"
        return
    yield f"Score by {said['step']}: {said['rests_on']}"
    if "unused" in said:
        yield said["unused"]
    for head in said["heads"]:
        role = "" if head["decides"] else ", not the choice itself"
        yield (
            f"{head['name']}: {head['quantity']} {_figure(head['score'])} {head['unit']} "
            f"(baseline {_figure(head['baseline'])}); on it rests {head['rests']}{role}"
        )
        for one in head["moved_most"]:
            yield f"  {one['effect']:+.4f} {one['feature']} = {_figure(one['value'])}"
        yield f"  {head['all_others']:+.4f} {head['others']} other features"
    told = {**{k: v for k, v in said["score"].items() if not isinstance(v, list)}, **said["parts"]}
    yield "figures: " + ", ".join(f"{k} {_figure(v)}" for k, v in told.items())
    if said["features"]:
        yield "read beside: " + ", ".join(f"{k} = {_figure(v)}" for k, v in said["features"].items())


def _model_lines(said: Mapping[str, Any]) -> Iterator[str]:
    if "says" in said:
        yield f"Model: {said['says']}"
        return
    yield f"Model {said['name']} version {said['version']}, digest {_short(said['digest'])}"
    if "gone" in said:
        yield f"gone: {said['gone']}"
        return
    if not said["same_digest"]:
        yield "the registry now holds another digest under this number"
    yield f"trained on what was known on {said['trained_day']}, gate {'passed' if said['passed_gate'] else 'refused'}"
    if "arm" in said:
        yield said["arm"]
    run = said["run"]
    about = (
        f"gone: {run['gone']}"
        if "gone" in run
        else f"{run['name']}, {run['status']}, started {_when(run['started_at'])}"
    )
    yield f"MLflow run {said['run_id']}: {about}"


def _table_lines(said: Mapping[str, Any]) -> Iterator[str]:
    yield "Tables: " + ", ".join(f"{one['table']} version {one['version']}" for one in said["each"])
    for one in said["each"]:
        if "gone" in one:
            yield f"{one['table']}: gone: {one['gone']}"
        elif "says" in one:
            yield f"{one['table']}: {one['says']}"
        else:
            yield f"{one['table']}: written {_when(one['written_at'])}"
    same = "the code of now" if said["same_code"] else "other code than now"
    yield f"workflow.yaml {_short(said['spec_digest'])}, commit {_short(said['code_commit'])}, {same}"


def _source_lines(said: Mapping[str, Any]) -> Iterator[str]:
    if "gone" in said:
        yield f"Files: gone: {said['gone']}"
        return
    if said["rows"] is None:
        yield f"Files: {said['says']}"
    else:
        yield f"Files: {said['rows']} rows of {said['files_of_it']} files name it in the column {said['column']}"
    yield (
        f"known by {_when(said['cutoff'])} within {said['lookback_days']} days, where all entities have {said['events_known']} "
        f"rows in {said['files_known']} files (events version {said['events_version']})"
    )
    for one in said["files"][:FILES_SHOWN]:
        yield f"{one['file']} (SHA-256 {_short(one['sha256'])}, landed {_when(one['landed_at'])}): {one['rows']} rows"
    if len(said["files"]) > FILES_SHOWN:
        yield f"and {said['files_of_it'] - FILES_SHOWN} more files"
    if said["listed"]:
        shown = said["listed"][:ROWS_SHOWN]
        places = ", ".join(f"{r['file'].rsplit('/', 1)[-1]}:{r['row']}" for r in shown)
        more = said["rows"] - len(shown)
        yield f"rows, newest first: {places}" + (f", and {more} more" if more else "")


def _rollback_lines(said: Mapping[str, Any]) -> Iterator[str]:
    yield f"Rollback of batch {said['rollback']['reverses']}"
    asked = said["rollback"]["asked"]
    if "gone" in asked:
        yield f"who asked for it is gone: {asked['gone']}"
    for one in asked.get("each", ()):
        who = one.get("actor") or "(name forgotten)"
        yield f"{one.get('action', 'asked')} by {who} ({one.get('trigger')}) {_when(one.get('at'))}: {one.get('reason')}"
    if "gone" in said.get("reverses", {}):
        yield f"gone: {said['reverses']['gone']}"


def _replay_lines(said: Mapping[str, Any], value: Callable[[Any], str]) -> Iterator[str]:
    if "gone" in said:
        yield f"Replay: gone: {said['gone']}"
    elif "from" in said:
        same = "which gives this decision" if said["equal"] else "which does not give this decision"
        yield f"Replay: {said['from']}: {_shown(said['prior'], value)}, {same}"
    elif said["equal"]:
        other = "" if said["same_code"] else ", though the code is another one"
        yield f"Replay: the same decision to the bit{other}"
    else:
        yield f"Replay: differs in {said['differs_in']}: {_shown(said['again'], value)} now; the code is " + (
            "the same" if said["same_code"] else "another one"
        )


def _would_change_lines(
    said: Mapping[str, Any], decision: Mapping[str, Any], value: Callable[[Any], str]
) -> Iterator[str]:
    yield "What would have changed it:"
    if "gone" in said:
        yield f"  gone: {said['gone']}"
        return
    yield from (f"  {line}" for line in said["says"])
    if "redecisions" not in said:
        return

    def becomes(after: Any) -> str:
        return "it would not be decided on" if after is None else f"it becomes {value(after)}"

    for what, turns, tried in (
        ("feature", said["features"], said["tried"]),
        ("limit", said["limits"], said["limits_tried"]),
    ):
        for one in turns:
            far = f"{one['size']:.2g} standard deviations" if what == "feature" else f"{one['size']:.2%} of it"
            yield (
                f"  {what} {one['name']}: {one['now']!r} → {one['value']!r} ({far}): {becomes(one['becomes'])}; "
                f"at {_figure(one['unchanged_at'])} it is still the same"
            )
        if tried and not turns:
            within = " within what was seen" if what == "feature" else ""
            yield f"  {what}: none found{within} (tried: {', '.join(tried)})"
    for arm, after in said["arms"].items():
        yield f"  arm {arm} (with its whole unit): {becomes(after)}"
    for one in said["guardrails"]:
        waits = "the batch waits for a person" if one["holds"] else "it does not hold the batch"
        from_ = (
            f"; a limit from {_figure(one['least_that_passes'])} on lets it pass" if "least_that_passes" in one else ""
        )
        yield f"  {one['name']}: limit {_figure(one['limit'])}, observed {_figure(one['observed'])}: {waits}{from_}"
    if decision["money"]:
        yield f"  (a budget counts as changed from {MATERIAL:.0%} of what stood before on)"
    yield f"  ({said['redecisions']} re-decisions of at most {said['most']})"
