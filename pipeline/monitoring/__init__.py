"""What became of decisions: labels joined with predictions, verdicts of the guard, the loop's health.

Belongs here: which outcomes meet which predictions, comparisons of arms, one row a day on the loop itself. Does not: the figures
(``data_checks``), rolling back (``delivery.rollback``).
"""
