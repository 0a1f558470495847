"""Google's errors, as the advertising API of this machine answers them.

Belongs here: what an error names, a call that is refused, the words for each HTTP status. Does not: which call is refused why
(``advertising_api``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FAILURE = "type.googleapis.com/google.ads.searchads360.v23.errors.SearchAds360Failure"
BAD_REQUEST = "type.googleapis.com/google.rpc.BadRequest"
STATUS = {  # HTTP → (google.rpc name, words, the error in its details)
    400: ("INVALID_ARGUMENT", "Request contains an invalid argument.", None),
    401: ("UNAUTHENTICATED", "Request had invalid authentication credentials.", None),
    403: ("PERMISSION_DENIED", "The caller does not have permission", None),
    404: ("NOT_FOUND", "Requested entity was not found.", None),
    409: ("ABORTED", "The operation was aborted.", ("databaseError", "CONCURRENT_MODIFICATION")),
    429: ("RESOURCE_EXHAUSTED", "Resource has been exhausted.", ("quotaError", "RESOURCE_TEMPORARILY_EXHAUSTED")),
    500: ("INTERNAL", "Internal error encountered.", ("internalError", "INTERNAL_ERROR")),
    503: ("UNAVAILABLE", "The service is currently unavailable.", ("internalError", "TRANSIENT_ERROR")),
    504: ("DEADLINE_EXCEEDED", "Deadline expired.", ("internalError", "DEADLINE_EXCEEDED")),
}


@dataclass(frozen=True)
class ApiError:
    """One error about an operation (or the call, ``operation`` None)."""

    kind: str
    reason: str
    operation: int | None = None
    path: tuple[str, ...] = ()
    trigger: str | None = None
    message: str = ""
    retry_delay_s: float | None = None


class Refused(Exception):
    """A call that is answered with an error."""

    def __init__(
        self,
        status: int,
        errors: Sequence[ApiError] = (),
        message: str = "",
        violations: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.errors, self.message, self.violations = status, tuple(errors), message, tuple(violations)
