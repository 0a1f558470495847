"""The connectors there are: one table, from which follow the settings that a workflow may give and the module that opens them.

Belongs here: the table. Does not: any one system, or when to send what.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from delivery.connectors import file_drop, google_ads, helpdesk, rest, sql_table
from delivery.connectors.base import Connector, ConnectorModule, Settings, Writes

_MODULES: dict[str, ConnectorModule] = {
    "google_ads": google_ads,
    "helpdesk": helpdesk,
    "rest": rest,
    "sql_table": sql_table,
    "file_drop": file_drop,
}
if TYPE_CHECKING:
    ConnectorSettings = Settings
else:
    ConnectorSettings = Annotated[
        reduce(operator.or_, (module.SETTINGS for module in _MODULES.values())), Field(discriminator="kind")
    ]


def mapping(settings: ConnectorSettings, folder: Path) -> str:
    """What gives a value its meaning in that system (``base.meaning``), from the settings alone: no secret, no call.

    Raises Misconfigured where a file that they name cannot be read.
    """
    return _MODULES[settings.kind].mapping(settings, folder)


def writes(settings: ConnectorSettings, folder: Path) -> Writes:
    """Which field of which system it writes, from the settings alone. Raises Misconfigured where a file cannot be read."""
    return _MODULES[settings.kind].writes(settings, folder)


def writer(settings: ConnectorSettings, folder: Path) -> Callable[[int], object] | None:
    """How it puts a decision's number, from the settings alone: a function that raises ValueError, in words for people, for
    a number that it cannot write. None: it writes any. Raises Misconfigured where a file is missing or cannot be read."""
    ask = getattr(_MODULES[settings.kind], "writer", None)
    found: Callable[[int], object] | None = ask(settings, folder) if ask is not None else None
    return found


def connect(
    settings: ConnectorSettings, *, environ: Mapping[str, str], folder: Path, clock: Callable[[], datetime]
) -> Connector:
    """Open the connector that the settings describe.

    ``environ``: where secrets are looked up by the names in the settings; ``folder``: the workflow's, for files that it
    names. Raises Misconfigured naming what is missing.
    """
    return _MODULES[settings.kind].connect(settings, environ=environ, folder=folder, clock=clock)
