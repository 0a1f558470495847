"""Taking batches back: a rollback is a push of the values that stood before, newest batch first.

Belongs here: which batches, what each of their deliveries goes back to, what the result was, and closing one that cannot come
to its end. Does not: sending (``delivery.push`` does, under the rules of any push), moving a model's alias or stopping a
workflow (the caller does). Rerunnable: the rollback of a batch is itself a batch, with an id that follows from it, recorded
before anything is sent.

``api`` takes back and closes; ``selection`` says which batches, ``prior_values`` what they go back to, ``newer_batches`` what is left
alone, ``outcome`` what became of it; ``preview`` is the dry run.
"""

from delivery.rollback.api import close, roll_back
from delivery.rollback.preview import dry_run
from delivery.rollback.prior_values import undone
from delivery.rollback.selection import choose, rollback_id
from delivery.rollback.types import Batch, Left, Model, RollbackError, RollbackReport, RolledBack, Selection, Since

__all__ = [
    "Batch", "Left", "Model", "RollbackError", "RollbackReport", "RolledBack", "Selection", "Since", "choose", "close", "dry_run",
    "roll_back", "rollback_id", "undone",
]  # fmt: skip
