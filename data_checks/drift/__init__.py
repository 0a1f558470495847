"""How far a day's rows lie from those of a reference: on every row, against what chance alone gives, in Evidently's pictures.

Belongs here: compressing columns, distances, null shares, volume, new and vanished categories and columns, the verdict of a
day, the report and its place in an Evidently workspace. Does not: what chance alone gives (``data_checks.drift.calibration``),
choosing the windows (``assets.drift``) or what follows from drift (``pipeline.lifecycle.retraining``).

Distances only, never p-values of the usual tests: with enough rows every difference is significant. A column is judged by the
Wasserstein distance in standard deviations of the reference (numbers, winsorised: a few ratios to nearly nothing would be both
the deviation and the distance) or the Jensen-Shannon distance (categories). It has
drifted when the distance passes an effect floor *and* is not what resampled reference days give, corrected over all columns.
"""

from data_checks.drift.columns import Baseline
from data_checks.drift.judge import Findings, Volume, measure, volume
from data_checks.drift.report import drift, save, sentence
from data_checks.drift.spec import DRAWN_ROWS, DriftImpossible, DriftReport, DriftSpec, settled

__all__ = [
    "DRAWN_ROWS", "Baseline", "DriftImpossible", "DriftReport", "DriftSpec", "Findings", "Volume", "drift", "measure", "save",
    "sentence", "settled", "volume",
]  # fmt: skip
