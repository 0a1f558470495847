"""How many examples a property test tries, and whether they are the same every time.

In CI (the default) they are the same every time: a run that is red stays red, and one that is green was not lucky. With
``SIGNALBOX_SOAK=25`` in the environment (``make soak``) they are drawn at random, 25 times as many. Belongs here: the two
profiles. Does not: any property. ``tests/test_properties.py`` keeps that nothing else decides it.
"""

from __future__ import annotations

import os

from hypothesis import settings

SOAK = int(os.environ.get("SIGNALBOX_SOAK") or 0)
"""Times as many examples as in CI; 0: not a soak."""
MINUTES = float(os.environ.get("SIGNALBOX_SOAK_MINUTES") or 60)
"""After these a soak begins no further test."""


def examples(ordinary: int) -> int:
    """How many examples to try where ``ordinary`` are enough in CI."""
    return ordinary * max(1, SOAK)


def load_profile() -> None:
    """Make every ``settings(...)`` that is written afterwards begin with the profile's values."""
    settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True, database=None)
    settings.register_profile(
        "soak", deadline=None, derandomize=False, print_blob=True, database=None, max_examples=examples(100)
    )
    settings.load_profile("soak" if SOAK else "ci")
