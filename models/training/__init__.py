"""Fitting: candidates and their twins, hyper-parameter search, distillation.

Belongs here: who is fitted on which rows. Does not: the learners (``models.learners``), measuring (``models.evaluation``).
"""
