"""How many processor seconds it takes to land 1,000,000 rows of each workflow: read, judged, written to the lake.

Belongs here: files as the shipped workflows' upstream systems leave them, one a day, and the timing of one whole ``ingest``.
Does not: whether the right rows land (tests/pipeline/ingest/test_landing.py).
Run: ``python -m benchmarks.landing [--rows 1000000] [--days 20] [--against CHECKOUT]``; with another checkout the same files
are landed by its code, too, and must not take less.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

START = date(2026, 3, 2)
SLOWER = 1.05  # of processor seconds measured on a shared machine


def advertising(path: Path, day: date, rows: int, draw: np.random.Generator) -> None:
    """A day of the ad platform's export: one row a line."""
    number = np.arange(rows)
    impressions = draw.poisson(2_000, rows)
    clicks = draw.binomial(impressions, 0.03)
    cost, factor = np.round(clicks * draw.lognormal(-1, 0.4, rows), 2), np.array(["1", "0.8", "1.2"])
    arm = draw.choice(3, rows, p=[0.8, 0.1, 0.1])
    table = pa.table(
        {
            "date": pa.array([day] * rows, pa.date32()),
            "line_id": [f"line-{n:07d}" for n in number],
            "campaign": [f"campaign-{n // 12:06d}" for n in number],
            "segment": np.array(["new", "returning", "loyal"])[number % 3],
            "format": np.array(["video", "banner", "native", "search"])[number % 4],
            "placement": np.array(["feed", "story", "side"])[number % 5 % 3],
            "impressions": impressions,
            "clicks": clicks,
            "cost": cost,
            "revenue": np.round(cost * draw.lognormal(0.7, 0.5, rows), 2),
            "budget": np.round(cost * 1.2 + 1, 2),
            "explore_multiplier": factor[arm],
            "explore_probability": pa.array(np.full(rows, 0.5), mask=arm == 0),
            "exported_at": [f"{day + timedelta(days=1)} 01:30:00"] * rows,
        }
    )
    text = io.BytesIO()
    pa.csv.write_csv(table, text, pa.csv.WriteOptions(quoting_style="needed"))
    path.write_bytes(gzip.compress(text.getvalue(), 6, mtime=0))


def tickets(path: Path, day: date, rows: int, draw: np.random.Generator) -> None:
    """A day of the help desk's export: an object a line, one an update of a ticket."""
    start = datetime.combine(day, datetime.min.time())
    seconds = np.sort(draw.integers(0, 86_400, rows)).tolist()
    opened = draw.exponential(4, rows).tolist()
    picks = draw.integers(0, 1_000_000, (rows, 12)).tolist()
    hours = np.round(draw.exponential(3, rows), 2).tolist()
    lines = []
    for n in range(rows):
        p, state = picks[n], ("open", "open", "waiting", "resolved", "closed")[picks[n][0] % 5]
        at, done = start + timedelta(seconds=seconds[n]), state in ("resolved", "closed")
        began = at - timedelta(days=opened[n])
        record = {
            "ticket_id": f"T{p[1]:07d}",
            "updated_at": f"{at:%Y-%m-%d %H:%M:%S}",
            "exported_at": f"{day + timedelta(days=1)} 01:30:00",
            "state": state,
            "opened_at": f"{began:%Y-%m-%d %H:%M:%S}",
            "due_at": f"{began + timedelta(days=3):%Y-%m-%d %H:%M:%S}" if p[2] % 10 else "",
            "priority": 1 + p[3] % 5,
            "impact": 1 + p[4] % 3,
            "urgency": 1 + p[5] % 3,
            "team": f"Team {p[6] % 40}",
            "category": f"Category {p[7] % 25}",
            "subcategory": f"Subcategory {p[7] % 120}",
            "symptom": f"Symptom {p[8] % 200}" if p[8] % 4 else "",
            "contact_type": ("Phone", "E-mail", "Self service")[p[9] % 3],
            "location": f"Site {p[10] % 60}",
            "caller": f"Caller {p[11] % 5_000}",
            "opened_by": f"Agent {p[2] % 300}",
            "assignee": f"Agent {p[3] % 300}" if p[3] % 7 else "",
            "reassignments": p[4] % 6,
            "reopens": p[5] % 2,
            "updates": 1 + p[6] % 20,
            "sla_missed": p[7] % 4 == 0 if done else "",
            "effort_hours": hours[n] if done else "",
        }
        lines.append(json.dumps(record) + "\n")
    path.write_bytes(gzip.compress("".join(lines).encode(), 6, mtime=0))


Write = Callable[[Path, date, int, np.random.Generator], None]
EXPORTS: dict[str, tuple[str, Write]] = {
    "ad_budget": ("advertising_{day}.csv.gz", advertising),
    "ticket_priority": ("tickets-{day}.jsonl.gz", tickets),
}


def write(root: Path, workflow: str, rows: int, days: int) -> None:
    """The files of some days with ``rows`` rows in all, the same every time."""
    name, export = EXPORTS[workflow]
    folder = root / workflow / "export"
    folder.mkdir(parents=True)
    for n in range(days):
        day = START + timedelta(days=n)
        share = rows * (n + 1) // days - rows * n // days
        export(folder / name.format(day=day.isoformat()), day, share, np.random.default_rng([7, n]))


def land(root: Path, workflow: str) -> tuple[float, int, int]:
    """Processor seconds (user and system) of one ingest into a new lake, rows accepted and quarantined."""
    from pipeline.ingest import ingest
    from pipeline.lake import Lake
    from pipeline.workflow import FOLDER, load

    loaded, now = load(FOLDER / workflow), datetime(2026, 6, 1, 2)
    with tempfile.TemporaryDirectory(prefix="signalbox-bench-") as lake:
        before = resource.getrusage(resource.RUSAGE_SELF)
        done = ingest(loaded, Lake(lake), root, now=now)
        after = resource.getrusage(resource.RUSAGE_SELF)
    if done.refused:
        raise SystemExit(f"{workflow}: refused {done.refused}")
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return spent, done.accepted, done.quarantined


def measure(root: Path, workflow: str, checkout: Path) -> tuple[float, int, int]:
    """The same in a process of its own, by the code of a checkout."""
    told = [sys.executable, str(Path(__file__).resolve()), "--land", str(root), workflow]
    done = subprocess.run(
        told, cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: {done.stderr[-2000:]}")
    spent, accepted, quarantined = json.loads(done.stdout.splitlines()[-1])
    return float(spent), int(accepted), int(quarantined)


def main() -> int:
    """1 where another checkout lands the same rows in fewer processor seconds (beyond the noise)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--days", type=int, default=20, help="files, one a day")
    parser.add_argument("--rounds", type=int, default=2, help="the best of so many counts")
    parser.add_argument("--against", type=Path, help="another checkout, such as a worktree of an earlier commit")
    parser.add_argument("--land", nargs=2, metavar=("ROOT", "WORKFLOW"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.land:
        print(json.dumps(land(Path(asked.land[0]), asked.land[1])))
        return 0
    here = Path(__file__).resolve().parents[1]
    slower = False
    for workflow in EXPORTS:
        with tempfile.TemporaryDirectory(prefix="signalbox-bench-") as folder:
            root = Path(folder)
            write(root, workflow, asked.rows, asked.days)
            checkouts = [here] if asked.against is None else [here, asked.against.resolve()]
            found = [[measure(root, workflow, c) for c in checkouts] for _ in range(asked.rounds)]
        best = [min(r[n][0] for r in found) for n in range(len(checkouts))]
        accepted, quarantined = found[0][0][1:]
        said = (
            f"{workflow}: {best[0]:.1f} processor seconds for {accepted:,} rows accepted, {quarantined:,} quarantined"
        )
        if asked.against is not None:
            slower |= best[0] > SLOWER * best[1]
            said += f"; {best[1]:.1f} by {asked.against} ({found[0][1][1]:,} accepted): {best[0] / best[1]:.2f} of it"
        print(said, flush=True)
    return int(slower)


if __name__ == "__main__":
    raise SystemExit(main())
