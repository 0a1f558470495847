"""Errors of the stages in words: what a server that is down raises, and the sentence that is shown of an error.

Belongs here: what more than one module says of errors. Does not: errors that one module raises, which stand there.
"""

from __future__ import annotations

import re


def unreachable() -> tuple[type[Exception], ...]:
    """What is raised where the registry's server or database does not answer as it should."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)


def first_line(error: Exception) -> str:
    """The first line of an error, without the user and password of an address in it."""
    return re.sub(r"://[^/@\s]*@", "://…@", str(error).partition("\n")[0])
