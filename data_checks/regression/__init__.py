"""The regression guard: does an arm do harm, judged every day beside another arm, with a known chance of a false alarm.

``guard`` gives the verdict, ``effects`` the estimates of each design, ``sequential`` the bounds that may be looked at every day,
``power`` what a design would find.

Belongs here: judging arms. Does not: reading tables, drawing arms, rolling back.
"""

from data_checks.regression.effects import Metric, RegressionSpec
from data_checks.regression.guard import LOOKS, Judgement, judge, sample_ratio
from data_checks.regression.power import Power, power, sentence
from data_checks.regression.sequential import left

__all__ = [
    "LOOKS",
    "Judgement",
    "Metric",
    "Power",
    "RegressionSpec",
    "judge",
    "left",
    "power",
    "sample_ratio",
    "sentence",
]
