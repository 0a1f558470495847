"""What every stage's asset shares: its key, partitions, days and how check results are folded over days.

Belongs here: Dagster idiom used by more than one stage. Does not: anything that one stage alone needs.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import date, timedelta
from typing import Any

import dagster as dg
from pydantic import Field

from pipeline.workflow import Workflow

# Backfill policies and pools are beta in this Dagster; the range in pyproject.toml keeps to the version that was tried.
warnings.filterwarnings("ignore", category=dg.BetaWarning)


class DayConfig(dg.Config):
    """What a person may ask of a day's run in the Launchpad."""

    again: bool = Field(
        default=False,
        description="Decide a day anew that was sent and whose effect lasts; without it such a day is only compared",
    )


def key(workflow: Workflow, stage: str) -> dg.AssetKey:
    """Assets are keyed [workflow, stage]."""
    return dg.AssetKey([workflow.name, stage])


def partitions(workflow: Workflow) -> dg.DailyPartitionsDefinition:
    """One partition a day (UTC), there once the day has closed."""
    return dg.DailyPartitionsDefinition(start_date=workflow.start.isoformat(), timezone="UTC")


def days(context: dg.AssetExecutionContext) -> list[date]:
    """The days that a run was asked for, in order."""
    return sorted(date.fromisoformat(k) for k in context.partition_keys)


def stage(
    workflow: Workflow,
    name: str,
    *,
    deps: Sequence[str],
    description: str,
    kinds: set[str],
    checks: Mapping[str, tuple[bool, str]] | None = None,
    **more: Any,
) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """``@asset`` with everything that the stages share. ``checks`` maps a check's name to (blocking, description)."""
    asset_key = key(workflow, name)
    made: Callable[[Callable[..., Any]], dg.AssetsDefinition] = dg.asset(
        key=asset_key,
        deps=[key(workflow, d) for d in deps],
        description=description,
        kinds=kinds,
        group_name=workflow.name,
        owners=[workflow.owner],
        partitions_def=partitions(workflow),
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[
            dg.AssetCheckSpec(check, asset=asset_key, blocking=blocking, description=text)
            for check, (blocking, text) in (checks or {}).items()
        ],
        **more,
    )
    return made


def unjudged(day: date, judged: Collection[date], since: date, most: int, why: str) -> tuple[bool, str]:
    """Whether a judgement has been missing for less than ``most`` days in a row, and that in words.

    ``judged``: days that were judged. ``since``: the first day that could be; before it nobody waits for one. ``why``: what
    the day itself says.
    """
    newest = max((d for d in judged if d <= day), default=None)
    waited = (day - max(newest or date.min, since - timedelta(days=1))).days
    if newest == day or waited < most:
        return True, "judged" if newest == day else f"not judged: {why}"
    told = f"the last day that was is {newest}" if newest else "none ever was"
    return False, f"not judged for {waited} days, {most} are the limit ({told}): {why}"


def folded(
    name: str, by_day: Mapping[date, tuple[bool, str]], *, metadata: Mapping[str, Any] | None = None, warn: bool = False
) -> dg.AssetCheckResult:
    """One check result over the days of a run: it passes when every day does, and names those that do not."""
    failed = {day: text for day, (passed, text) in by_day.items() if not passed}
    shown = failed or {day: text for day, (_, text) in by_day.items()}
    lines = [f"{day}: {text}" for day, text in list(shown.items())[:10]]
    if len(shown) > 10:
        lines.append(f"… and {len(shown) - 10} more days")
    return dg.AssetCheckResult(
        check_name=name,
        passed=not failed,
        severity=dg.AssetCheckSeverity.WARN if warn else dg.AssetCheckSeverity.ERROR,
        description="\n".join(lines) or "no days",
        metadata={"days": len(by_day), "failed_days": len(failed), **(metadata or {})},
    )
