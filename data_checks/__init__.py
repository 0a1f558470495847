"""Is the data as it was promised, does it look as it did, do scores and arms do well, and may this batch be sent.

Belongs here: contracts, drift, performance, the regression guard, guardrails: pure judgements over tables. Does not: anything of
Dagster, acting on a verdict.
"""
