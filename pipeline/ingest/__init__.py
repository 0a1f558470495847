"""Landing: files as they come become events, quarantined rows and a manifest of files.

Belongs here: ``files`` (bytes), ``readers`` (rows), ``row_rules`` (the contract, row by row), ``manifest`` (which content
stands under which path), ``landing`` (a run: each content landed whole and once), ``landing_step`` (how a run changes the tables),
``quarantine_share`` (how much stands in quarantine). Does not: what a workflow's SQL and contract say (its folder does), Dagster,
and what later stages make of the events.

A file is refused as a whole (FileRefused, recorded in the manifest with the reason) when it cannot be read as declared;
a row is quarantined when it breaks a rule.
"""

from pipeline.ingest.files import (
    MAX_BYTES,
    FileChanged,
    FileRefused,
    LandingFile,
    Snapshot,
    day_of,
    discover,
    snapshot,
    without_secrets,
)
from pipeline.ingest.landing import IngestResult, RemapResult, ingest, remap
from pipeline.ingest.manifest import FILES, FileRecord, standing_quarantine
from pipeline.ingest.quarantine_share import Share, shares
from pipeline.ingest.readers import MAX_COLUMNS, Raw, read_rows
from pipeline.ingest.row_rules import QUARANTINE, Judged, Landing, event_columns, judge

__all__ = [
    "FILES",
    "MAX_BYTES",
    "MAX_COLUMNS",
    "QUARANTINE",
    "FileChanged",
    "FileRecord",
    "FileRefused",
    "IngestResult",
    "Judged",
    "Landing",
    "LandingFile",
    "Raw",
    "RemapResult",
    "Share",
    "Snapshot",
    "day_of",
    "discover",
    "event_columns",
    "ingest",
    "judge",
    "read_rows",
    "remap",
    "shares",
    "snapshot",
    "standing_quarantine",
    "without_secrets",
]
