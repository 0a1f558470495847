"""The connectors there are: which settings belong to which, and how one is opened.

Belongs here: the list. Does not: any one system, or when to send what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field

from delivery.connectors import file_drop, google_ads, helpdesk, rest, sql_table
from delivery.connectors.base import Connector, Writes

ConnectorSettings = Annotated[
    google_ads.GoogleAdsSettings
    | helpdesk.HelpdeskSettings
    | rest.RestSettings
    | sql_table.SqlTableSettings
    | file_drop.FileDropSettings,
    Field(discriminator="kind"),
]
_MODULES = {
    "google_ads": google_ads,
    "helpdesk": helpdesk,
    "rest": rest,
    "sql_table": sql_table,
    "file_drop": file_drop,
}


def mapping(settings: ConnectorSettings, folder: Path) -> str:
    """What gives a value its meaning in that system (``base.meaning``), from the settings alone: no secret, no call.

    Raises Misconfigured where a file that they name cannot be read.
    """
    return str(_MODULES[settings.kind].mapping(settings, folder))


def writes(settings: ConnectorSettings, folder: Path) -> Writes:
    """Which field of which system it writes, from the settings alone. Raises Misconfigured where a file cannot be read."""
    written: Writes = _MODULES[settings.kind].writes(settings, folder)
    return written


def connect(
    settings: ConnectorSettings, *, environ: Mapping[str, str], folder: Path, clock: Callable[[], datetime]
) -> Connector:
    """Open the connector that the settings describe.

    ``environ``: where secrets are looked up by the names in the settings; ``folder``: the workflow's, for files that it
    names. Raises Misconfigured naming what is missing.
    """
    opened: Connector = _MODULES[settings.kind].connect(settings, environ=environ, folder=folder, clock=clock)
    return opened
