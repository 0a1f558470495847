"""What a ledger says, without when and by which code: one digest a workflow and day, to compare two state folders by.

Belongs here: the content of decisions, batches and promotions, read from the tables themselves, so that it needs no module
of the product and goes on working when they move. Does not: whether a ledger is whole (``signalbox verify``).

``python -m tests.support.ledger_content STATE_FOLDER [--lines]`` prints the digests; ``--lines`` prints what they are over, for
``diff``. Left out are times, ids and digests of runs, batches, decisions and code, and addresses of systems. A change of
behaviour changes a digest; the same days lived twice by the same code give the same ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

_BATCHES = (
    "SELECT sequence, workflow, day, kind, step, status, delivery, rows, changed, counts FROM batches ORDER BY sequence"
)
_DECISIONS = (
    "SELECT coalesce(n.name, d.entity), d.arm, d.before, d.after, d.changed, d.reasons FROM decisions d "
    "LEFT JOIN names n ON n.digest = d.entity WHERE d.sequence = ? ORDER BY 1"
)
_BATCH_ID = re.compile(r"(\d{4}-\d\d-\d\d)-[0-9a-f]{12}(\.\d+)?")
"""The end of a batch's id, which follows from its digest and so from the code: a rollback's reasons name it."""
_PROMOTIONS = "SELECT workflow, version, action FROM promotions ORDER BY seq"


def lines(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(workflow, day, one line of JSON), batches in their order with their decisions by entity; day "promotions" at last."""
    with closing(sqlite3.connect(f"{(folder / 'ledger.db').resolve().as_uri()}?mode=ro", uri=True)) as database:
        for sequence, workflow, day, *batch in database.execute(_BATCHES).fetchall():
            *head, counts = batch
            states = dict(sorted(json.loads(counts or "{}").items()))
            yield workflow, day, json.dumps(["batch", *head, states])
            for *values, reasons in database.execute(_DECISIONS, (sequence,)):
                said = [_BATCH_ID.sub(r"\1", reason) for reason in json.loads(reasons or "[]")]
                yield workflow, day, json.dumps(["decision", *values, said], ensure_ascii=False)
        for workflow, version, action in database.execute(_PROMOTIONS):
            yield workflow, "promotions", json.dumps(["promotion", version, action])


def digests(folder: Path) -> dict[str, str]:
    """ "workflow day" → digest (16 hex digits) over its lines, and ``all`` over everything; sorted."""
    found: dict[str, hashlib._Hash] = {}
    for workflow, day, line in lines(folder):
        found.setdefault(f"{workflow} {day}", hashlib.sha256()).update(line.encode() + b"\n")
    told = {name: whole.hexdigest()[:16] for name, whole in sorted(found.items())}
    return {**told, "all": hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}


def main() -> None:
    """Print the digests of a state folder, or what they are over."""
    folder = Path(sys.argv[1])
    if "--lines" in sys.argv[2:]:
        for one in lines(folder):
            print(*one)
    else:
        for name, digest in digests(folder).items():
            print(digest, name)


if __name__ == "__main__":
    main()
