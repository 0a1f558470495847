"""The ledger's tables. Belongs here: columns and keys. Does not: how a database gets them (``delivery/migrations``).

``sequence`` numbers batches, ``n`` the decisions of one batch, ``seq`` the events. Columns ``entity``, ``unit``, ``target``,
``actor`` and ``approver`` hold digests (``delivery.ledger.pseudonyms``), never names. Times are naive UTC.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
)  # fmt: skip

metadata = MetaData()
VERSION_TABLE = "ledger_version"
"""Not Alembic's own name for it: MLflow and Dagster use that one, perhaps in the same database."""


def _batch() -> Column[int]:
    return Column("sequence", Integer, ForeignKey("batches.sequence"), primary_key=True, autoincrement=False)


def _event() -> Column[int]:
    return Column("seq", Integer, ForeignKey("events.seq"), primary_key=True, autoincrement=False)


meta = Table("meta", metadata, Column("name", String, primary_key=True), Column("value", Text, nullable=False))

events = Table(
    "events", metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", DateTime, nullable=False),
    Column("kind", String, nullable=False, index=True),
    Column("body", Text, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
)  # fmt: skip

names = Table(
    "names", metadata,
    Column("digest", String(32), primary_key=True),
    Column("kind", String, nullable=False),
    Column("name", Text, nullable=False),
    sqlite_with_rowid=False,
)  # fmt: skip

batches = Table(
    "batches", metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("batch_id", String, nullable=False, unique=True),
    Column("workflow", String, nullable=False, index=True),
    Column("kind", String, nullable=False),
    Column("day", Date, nullable=False),
    Column("digest", String, nullable=False),
    Column("status", String, nullable=False),
    Column("step", String, nullable=False),
    Column("as_of", DateTime, nullable=False),
    Column("decided_at", DateTime, nullable=False),
    Column("run_id", String, nullable=False),
    Column("record", Text, nullable=False),
    Column("findings", Text, nullable=False),
    Column("pools", Text),
    Column("reverses", String),
    Column("root", String(64), nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("changed", BigInteger, nullable=False),
    Column("recorded_at", DateTime, nullable=False),
    Column("seq", Integer, ForeignKey("events.seq"), nullable=False),
    # What delivery makes of it; each change has its event.
    Column("system", String),
    Column("delivery", String, nullable=False),
    Column("counts", Text),
    Column("superseded_by", String),
    Column("retired", Boolean, nullable=False),
)  # fmt: skip

decisions = Table(
    "decisions", metadata,
    _batch(),
    Column("n", Integer, primary_key=True, autoincrement=False),
    Column("decision_id", String, nullable=False, index=True),
    Column("entity", String(32), nullable=False),
    Column("unit", String(32)),
    Column("arm", String),
    Column("arm_probability", Float(53)),
    Column("perturbation", Float(53)),
    Column("perturbation_probability", Float(53)),
    Column("before", BigInteger),
    Column("after", BigInteger),
    Column("changed", SmallInteger, nullable=False),
    Column("review", SmallInteger),
    Column("expected_gain", Float(53)),
    Column("reasons", Text),
    sqlite_with_rowid=False,
)  # fmt: skip

deliveries = Table(
    "deliveries", metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("n", Integer, primary_key=True, autoincrement=False),
    Column("state", String, nullable=False),
    Column("target", String(32)),
    Column("expected", BigInteger),
    Column("sent", BigInteger),
    Column("prior", BigInteger),
    Column("observed", BigInteger),
    Column("verified_at", DateTime),
    Column("attempts", Integer, nullable=False),
    Column("repeats", Integer, nullable=False),
    Column("says", Text),
    Column("says_digest", String(32)),
    ForeignKeyConstraint(["sequence", "n"], ["decisions.sequence", "decisions.n"]),
    sqlite_with_rowid=False,
)  # fmt: skip

attempts = Table(
    "attempts", metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("n", Integer, primary_key=True, autoincrement=False),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("value", BigInteger),
    Column("expected", BigInteger),
    Column("idempotency_key", String, nullable=False),
    Column("started_at", DateTime, nullable=False),
    Column("ended_at", DateTime),
    Column("outcome", String),
    Column("window_ms", Float(53)),
    Column("says", Text),
    Column("says_digest", String(32)),
    ForeignKeyConstraint(["sequence", "n"], ["deliveries.sequence", "deliveries.n"]),
    sqlite_with_rowid=False,
)  # fmt: skip

conflicts = Table(
    "conflicts", metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("n", Integer, primary_key=True, autoincrement=False),
    Column("state", String, nullable=False),
    Column("expected", BigInteger),
    Column("found", BigInteger),
    Column("sent", BigInteger),
    Column("at", DateTime, nullable=False),
    ForeignKeyConstraint(["sequence", "n"], ["deliveries.sequence", "deliveries.n"]),
    sqlite_with_rowid=False,
)  # fmt: skip

acknowledged = Table(
    "acknowledged", metadata,
    Column("system", String, primary_key=True),
    Column("entity", String(32), primary_key=True),
    Column("target", String(32)),
    Column("value", BigInteger),
    Column("verified_at", DateTime, nullable=False),
    Column("sequence", Integer, ForeignKey("batches.sequence"), nullable=False),
    Column("n", Integer, nullable=False),
    Index("acknowledged_target", "system", "target"),
)  # fmt: skip

retired_values = Table(
    "retired_values", metadata,
    Column("system", String, primary_key=True),
    Column("entity", String(32), primary_key=True),
    Column("target", String(32)),
    Column("value", BigInteger),
    Column("verified_at", DateTime, nullable=False),
    Column("sequence", Integer, ForeignKey("batches.sequence"), nullable=False),
    Column("n", Integer, nullable=False),
)  # fmt: skip
"""The rows of ``acknowledged`` whose deliveries the newest retention, or one before it, had removed; its event seals them."""

# Tables whose rows repeat an event's body, one to one; free text stands in the event as a digest.

approvals = Table(
    "approvals", metadata, _event(),
    Column("batch_id", String, nullable=False, index=True),
    Column("digest", String, nullable=False),
    Column("approver", String(32), nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", DateTime, nullable=False),
    Column("expires_at", DateTime, nullable=False),
)  # fmt: skip

approvers = Table(
    "approvers", metadata, _event(),
    Column("approver", String(32), nullable=False),
    Column("active", Boolean, nullable=False),
    Column("secret_hash", Text),
    Column("at", DateTime, nullable=False),
)  # fmt: skip

rollbacks = Table(
    "rollbacks", metadata, _event(),
    Column("batch_id", String, nullable=False),
    Column("action", String, nullable=False),
    Column("actor", String(32), nullable=False),
    Column("reason", Text, nullable=False),
    Column("trigger", String, nullable=False),
    Column("evidence", Text, nullable=False),
    Column("at", DateTime, nullable=False),
)  # fmt: skip

switches = Table(
    "switches", metadata, _event(),
    Column("workflow", String, nullable=False, index=True),
    Column("stopped", Boolean, nullable=False),
    Column("actor", String(32), nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", DateTime, nullable=False),
)  # fmt: skip

promotions = Table(
    "promotions", metadata, _event(),
    Column("workflow", String, nullable=False, index=True),
    Column("version", Integer),
    Column("action", String, nullable=False),
    Column("actor", String(32), nullable=False),
    Column("evidence", Text, nullable=False),
    Column("at", DateTime, nullable=False),
)  # fmt: skip

leases = Table(
    "leases", metadata,
    Column("system", String, primary_key=True),
    Column("fence", BigInteger, nullable=False),
    Column("held", Boolean, nullable=False),
    Column("host", String, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started", String, nullable=False),
    Column("expires_at", DateTime, nullable=False),
)  # fmt: skip
