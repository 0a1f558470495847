"""Moving the aliases of a registry by hand, as a person does in MLflow's pages or a program beside the product.

Belongs here: what tests do to aliases. Does not: the life of a version, which the product keeps in the ledger
(``pipeline.lifecycle.promotion``).
"""

from __future__ import annotations

from datetime import date

from models.registry import CHAMPION, PREVIOUS, ModelBlocked, Registry, Version


def promote(registry: Registry, version: Version) -> bool:
    """Move the alias ``champion``; who held it becomes ``previous_champion``.

    A version trained for an earlier day than the champion (a backfill) takes no alias: False. It counts for the days
    between, see ``Registry.as_of``. Raises ModelBlocked for a version that was rolled back.
    """
    if version.blocked:
        raise ModelBlocked(
            f"model {version.name!r} version {version.number} was rolled back ({version.blocked}) and is not promoted again"
        )
    current = registry.by_alias(version.name, CHAMPION)
    if current is not None and current.trained_day > version.trained_day and current.trained_day != date.max:
        return False
    if current is not None and current.number != version.number:
        registry.client.set_registered_model_alias(version.name, PREVIOUS, str(current.number))
    registry.client.set_registered_model_alias(version.name, CHAMPION, str(version.number))
    return True


def step_back(registry: Registry, name: str, number: int, reason: str) -> Version | None:
    """Block a version and give its aliases to the versions before it; returns the champion that then counts.

    Rerunnable. None where no version that may decide is left: the days after are decided by the rule. Raises
    ModelMissing where there is no such version.
    """
    harmful = registry.by_number(name, number)
    registry.block(name, number, reason)
    champion, previous = registry.by_alias(name, CHAMPION), registry.by_alias(name, PREVIOUS)
    if harmful.number not in {v.number for v in (champion, previous) if v is not None}:
        return champion
    heirs = [v for v in registry.versions(name) if v.passed and not v.blocked and v.trained_day <= harmful.trained_day]
    heirs.sort(key=lambda v: (v.trained_day, v.number), reverse=True)
    if champion is not None and not champion.blocked:
        heirs = [champion, *(v for v in heirs if v.number != champion.number)]
    elif previous is not None and not previous.blocked:
        heirs = [previous, *(v for v in heirs if v.number != previous.number)]
    for alias, heir in zip((CHAMPION, PREVIOUS), [*heirs[:2], None, None], strict=False):
        if heir is not None:
            registry.client.set_registered_model_alias(name, alias, str(heir.number))
        elif registry.by_alias(name, alias) is not None:
            registry.client.delete_registered_model_alias(name, alias)
    return heirs[0] if heirs else None
