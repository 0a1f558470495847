"""From features to decisions: scoring, the fallback chain, deciding, and deciding again from the records (replay).

Belongs here: what is decided for a day, and what acted on one. Does not: which version scores (``pipeline.lifecycle``), sending
(``pipeline.dispatch``).
"""
