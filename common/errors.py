"""The one family of errors that a person may read, without secrets, and the sentence that is shown of any other.

Belongs here: the base class, redaction, what a server that is down raises. Does not: errors that one module raises, which stand
there and derive from ``SignalboxError``.
"""

from __future__ import annotations

import os
import re
from urllib.parse import quote

_SECRET_NAME = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIALS?)(?:_|$)|^PGPASSWORD$", re.IGNORECASE)
"""Environment variables whose value is taken for a secret, by their name."""
_SHORTEST_SECRET = 8
"""Shorter values are left alone: they stand in ordinary words."""


def redacted(text: str) -> str:
    """``text`` with … for the user and password of each address, and for the value of each environment variable that is a secret by its name."""
    text = re.sub(r"://[^/@\s]*@", "://…@", text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name):
            for shape in (value, quote(value, safe="")):
                text = text.replace(shape, "…")
    return text


class SignalboxError(Exception):
    """What a person can mend: the message names the thing, the place and the way out, and holds no secret.

    The command prints it as a sentence, without a traceback, and exits with 1.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(redacted(one) if isinstance(one, str) else one for one in args))


def unreachable() -> tuple[type[Exception], ...]:
    """What is raised where the registry's server or database does not answer as it should."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)


def first_line(error: Exception) -> str:
    """The first line of an error, without a secret."""
    return redacted(str(error).partition("\n")[0])
