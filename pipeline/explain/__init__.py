"""From a value that stands downstream back to its rows, and what would have changed it.

Belongs here: lineage and counterfactuals. Does not: a model's own contributions (``models.booster``).
"""
