"""The simulated help desk lived through the product's own path: exports land, days are decided and sent, the desk serves what it got.

Belongs here: a desk whose version is honest or turns the order around, for tests of what the guard sees of it. Does not: what a test
asks, the world (``delivery/sandbox/worlds/tickets.py``).

Scores are made up from what a ticket's features show, so that no model has to be trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from delivery.ledger import Attempt, Ledger, Result
from delivery.sandbox.worlds import tickets
from pipeline import dispatch, ingest, point_in_time
from pipeline.decisions import decide, tables
from pipeline.lake import Lake
from pipeline.lifecycle import hold
from pipeline.monitoring import verdicts
from pipeline.workflow import FOLDER, Workflow, load
from tests.support.fakes import dead_holder
from tests.support.ledgers import KEY, Clock

Kind = Literal["honest", "harmful"]


class TicketDeskHarness:
    """``before`` days are served without decisions; then each ``live`` day decides and sends. ``shares``: of holdout and champion."""

    def __init__(
        self, folder: Path, kind: Kind, *, seed: int = 1, teams: int = 12, load_: float = 0.95, before: int = 21,
        shares: Mapping[str, float] | None = None, workflow: Workflow | None = None,
    ) -> None:  # fmt: skip
        said = workflow or load(FOLDER / "ticket_priority")
        policy = said.policy.model_copy(update={"review": "uncertainty", "largest_drop": None})
        arms = said.arms.model_copy(update={"shares": dict(shares or said.arms.shares)})
        guardrails = said.guardrails.model_copy(update={"max_share_changed": 1.0})
        features = said.features.model_copy(update={"lookback_days": 21})
        outcomes = said.outcomes.model_copy(update={"lookback_days": 45})
        assert said.regression is not None, "the shipped workflow is guarded"
        regression = said.regression.model_copy(update={"pre_days": 14, "permutations": 999})
        self.workflow = said.model_copy(
            update={
                "regression": regression, "policy": policy, "arms": arms, "guardrails": guardrails, "features": features, "outcomes": outcomes,
            }
        )  # fmt: skip
        self.kind: Kind = kind
        self.world = tickets.World(seed, load=load_, teams=teams)
        self.lake, self.landing = Lake(str(folder / "lake")), folder / "landing"
        self.clock = Clock()
        self.ledger = Ledger.open(f"sqlite:///{folder / 'ledger.db'}", key=KEY, clock=self.clock)
        self.first = said.start + timedelta(days=before)
        """The first day that is decided."""
        self.day = said.start
        for _ in range(before):
            self._serve({})
        self.ingest()
        self.clock.now = self.morning(self.first) - timedelta(hours=1)
        self.ledger.promotion(said.name, 1, "promoted", "anna", {"reason": "a test"})

    def morning(self, day: date, hour: int = 4) -> datetime:
        return datetime.combine(day + timedelta(days=1), time(hour))

    def _serve(self, priorities: Mapping[str, int]) -> None:
        rows = self.world.step(self.day, priorities)
        tickets.export_day(rows, self.landing / self.workflow.name / "export", self.day)
        self.day += timedelta(days=1)

    def ingest(self) -> None:
        """What has landed becomes events."""
        ingest.ingest(self.workflow, self.lake, self.landing, now=self.morning(self.day - timedelta(days=1)))

    def live(self) -> date:
        """One more day: it is served, and decided on the morning after. Returns it."""
        day = self.day
        stood = self._sent(day - timedelta(days=1)) if day > self.first else {}
        self._serve(stood)
        self.ingest()
        self.clock.now = self.morning(day)
        for stage, made in (("features", point_in_time.features), ("outcomes", point_in_time.outcomes)):
            built = pa.concat_tables([t for _, t in made(self.workflow, self.lake, [day])])
            self.lake.replace_days(self.workflow.table(stage), built, [day])
        self._score(day)
        batch = decide.decide_day(self.workflow, self.lake, day, ledger=self.ledger)
        decide.write_batch(self.workflow, self.lake, day, batch, decided_at=self.clock.now, run_id="test")
        row = dispatch.record(self.workflow, self.ledger, day, batch, decided_at=self.clock.now, run_id="test")
        if not hold.standing(self.ledger, self.workflow.name):
            self._push(row.batch_id)
        return day

    def judge(self, day: date) -> verdicts.Judged | None:
        """The guard's verdict by the cut-off of a day, as its asset asks for it."""
        found = verdicts.judge_day(self.workflow, self.lake, self.ledger, day)
        return found[0] if found else None

    def _sent(self, day: date) -> dict[str, int]:
        """What was sent of a day and changes an open ticket."""
        batches = [b for b in self.ledger.batches(self.workflow.name) if b.day == day and b.acted]
        wanted: dict[str, int] = {}
        for batch in batches:
            wanted |= {d.entity: int(d.after) for d in self.ledger.deliveries(batch.batch_id) if d.entity}
        return wanted

    def _score(self, day: date) -> None:
        rows = self.lake.read(self.workflow.table("features"), days=[day])
        left = np.nan_to_num(np.asarray(rows["hours_to_due"].cast(pa.float64()).fill_null(0.0)))
        # what is lost by waiting: most where a ticket is due within the day, per hour of work as the subcategory tells it
        soon = 1 / (1 + np.exp(np.clip((np.abs(left - 10.0) - 15.0) / 5.0, -30, 30)))
        work = np.array([{"change": 3.0, "failure": 2.0}.get(s, 1.0) for s in rows["subcategory"].to_pylist()])
        cost = np.array([{1: 4.0, 2: 2.0}.get(i, 1.0) for i in rows["impact"].to_pylist()])
        place = np.argsort(np.argsort(soon * cost / work, kind="stable")) / max(len(left), 1)
        if self.kind == "honest":
            gain, effort = 0.05 + 0.9 * place, work
        else:  # what presses goes last, and the rest before whatever arrives
            gain, effort = np.where(place < 0.7, 0.9 - place, 0.0), np.full(len(left), 0.01)
        scores = pa.table(
            {
                "entity_id": rows["entity_id"], "moment": rows["moment"], "p_miss": gain,
                "p_miss_now": np.zeros(len(left)), "p_miss_later": gain, "effort_hours": effort,
                "uncertainty": np.zeros(len(left)), "day": pa.array([day] * len(left), pa.date32()),
                "scoring_id": [f"scored {day}"] * len(left),
            }
        )  # fmt: skip
        version = self.lake.replace_days(self.workflow.table("scores"), scores, [day])
        said: dict[str, Any] = dict.fromkeys(tables.SCORING.names)
        said |= {
            "day": day, "step": "champion", "reasons": [], "model_version": 1, "model_digest": "d" * 64, "late": False,
            "features_version": self.lake.version(self.workflow.table("features")), "scores_version": version,
            "scoring_id": f"scored {day}",
        }  # fmt: skip
        self.lake.replace_days(
            self.workflow.table("scoring"), pa.Table.from_pylist([said], schema=tables.SCORING), [day]
        )

    def _push(self, batch_id: str) -> None:
        """Every change is sent, and read back as it was sent."""
        ledger, now = self.ledger, self.clock()
        lease = ledger.lease("fake", holder=dead_holder())
        ledger.open_push(lease, batch_id)
        rows = ledger.deliveries(batch_id)
        ledger.begin(lease, batch_id, [Attempt(d.n, d.after, d.before, f"{batch_id}-{d.n}", now) for d in rows])
        ledger.settle(lease, batch_id, [
            Result(d.n, "ACKED", sent=d.after, prior=d.before, observed=d.after, verified_at=now, ended_at=now) for d in rows
        ])  # fmt: skip
        ledger.close_push(lease, batch_id, True)
        ledger.release(lease)

    def held_out(self, day: date) -> int:
        """How many units the day's epoch holds out."""
        rows = self.lake.read(self.workflow.table("decisions"), days=[day])
        held = rows.filter(pc.equal(rows["arm"], "holdout"))
        return len(pc.unique(held["unit"]))
