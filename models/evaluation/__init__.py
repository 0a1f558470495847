"""Whether a candidate is better: paired losses, off-policy value, conformal sets, the gate.

Belongs here: measuring on held-out rows and what follows. Does not: fitting (``models.training``, ``models.learners``).
"""
