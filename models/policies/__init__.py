"""From scores to decisions: the arms, budgets, priorities.

Belongs here: pure functions of scores and what stands. Does not: scores (``models.learners``), the lake, sending.
"""
