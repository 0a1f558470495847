"""The life of a model's version: trained, judged by the gate, shadow, canary, champion, retired; and what asks for the next.

Belongs here: state and promotion by the ledger, the gate's rows and terms, retraining, search, distillation. Does not: fitting
and measuring (``models``), or what live outcomes say (``pipeline.monitoring``).
"""
