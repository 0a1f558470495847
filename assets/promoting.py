"""What becomes of a version: from the gate to shadow, canary, champion, and back; the ledger is the truth, aliases follow it.

Belongs here: the steps of a version's life, and bringing the registry's aliases in line with the ledger. Does not: judging
(``models.gate``, ``data_checks.regression``), MLflow's own calls (``models.registry``), or what starts a step
(``orchestration.automation``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from assets.workflow import Workflow
from delivery.ledger import Ledger
from models.registry import Registry, Version


def admit(
    workflow: Workflow, registry: Registry, ledger: Ledger, version: Version, *, evidence: Mapping[str, Any], actor: str
) -> str:
    """A version has been judged by its gate: give it its first place, and record that. Returns the place.

    ``refused`` (it did not pass), ``champion``, or ``none`` (a backfill: older than the champion, it takes no alias).
    """
    if not version.passed:
        return "refused"
    if not registry.promote(version):
        return "none"
    # MLflow's aliases have no history: the ledger is the truth about what was live when
    ledger.promotion(workflow.name, version.number, "promoted", actor, {**evidence, "digest": version.digest})
    return "champion"
