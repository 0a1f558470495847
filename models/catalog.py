"""The kinds of model and of policy that a workflow.yaml may name: one line each, the module that declares it.

Belongs here: which there are, and finding one by its kind. Does not: what any of them is (``models.learners``, ``models.policies``).
"""

from __future__ import annotations

from importlib import import_module

from models.learners.base import Kind, Learner, Scorer
from models.policies.base import Policy, name_of

LEARNER_MODULES = (
    "duration",
    "response",
)
"""Modules of ``models.learners`` with a ``KIND``."""
POLICY_MODULES = (
    "budget",
    "priority",
)
"""Modules of ``models.policies`` with a ``KIND``."""

KINDS: dict[str, Kind] = {
    one.name: one for one in (import_module(f"models.learners.{module}").KIND for module in LEARNER_MODULES)
}
POLICIES: dict[str, Policy] = {
    name_of(one): one for one in (import_module(f"models.policies.{module}").KIND for module in POLICY_MODULES)
}


def why_not(kind: str, ability: str) -> str:
    """Why a kind of model or of policy lacks an ability, as it declares; who would have used it says so."""
    known = KINDS.get(kind) or POLICIES.get(kind)
    said = known.absent.get(ability) if known else None
    return said or f"models.catalog declares no reason why kind {kind!r} has no {ability}"


def learner(kind: str) -> type[Learner]:
    """The model's class of a kind."""
    return KINDS[kind].learner


def rule(kind: str) -> type[Scorer]:
    """The baseline rule's class of a kind."""
    return KINDS[kind].rule


def policy(kind: str) -> Policy:
    """The policy of a kind."""
    return POLICIES[kind]
