"""Comparing two models: intervals over whole days that hold what they say, and slices that noise alone does not name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.evaluation import paired
from models.evaluation.bootstrap import Days, autocorrelation
from models.evaluation.paired import discoveries, groups, harm, losses, slices
from tests.support.properties import examples

SEED = 11


def days(day: Any, **changed: Any) -> Days:
    return Days(np.asarray(day, np.int64), **{"draws": 2000, "seed": SEED, **changed})


def week(rng: np.random.Generator, rows: int = 20, n: int = 7, shock: float = 0.0) -> tuple[Days, Any]:
    """``n`` days of losses; a day's rows share a shock."""
    day = np.repeat(np.arange(n), rows)
    return days(day), 1 + shock * rng.standard_normal(n)[day] + 0.1 * rng.standard_normal(n * rows)


def test_the_harm_is_the_difference_as_a_share_of_what_the_other_loses() -> None:
    found = harm(days([1, 1, 2, 2]), np.array([2.0, 2, 2, 2]), np.array([1.0, 1, 1, 1]))
    assert found.point == found.low == found.high == 1.0 and found.proven and found.p_worse == 0.0
    assert (found.days, found.rows) == (2, 4)


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1e6), st.floats(0.01, 1e6)), min_size=2, max_size=60))
@settings(max_examples=examples(60))
def test_an_interval_holds_its_point_and_turning_the_models_round_turns_the_sign(rows: list[Any]) -> None:
    day, a, b = (np.array(x) for x in zip(*rows, strict=True))
    found = harm(days(day), a, b)
    assert found.point == pytest.approx((a.sum() - b.sum()) / b.sum())
    if found.low is not None and found.high is not None:
        assert found.low <= found.point <= found.high
    assert harm(days(day), b, b).point == 0.0
    flat = days(day).interval(lambda x: x, days(day).sums(a - b))
    turned = days(day).interval(lambda x: x, days(day).sums(b - a))
    assert flat.point == -turned.point
    if flat.low is not None and turned.high is not None:
        assert flat.low == pytest.approx(-turned.high, rel=1e-9, abs=1e-6)


def test_identical_models_tie_even_where_nobody_loses_anything() -> None:
    nothing = np.zeros(6)
    found = harm(days([1, 1, 2, 2, 3, 3]), nothing, nothing)
    assert (found.point, found.low, found.high, found.proven) == (0.0, 0.0, 0.0, False)


def test_one_day_says_nothing_of_how_sure_it_is() -> None:
    found = harm(days([5, 5, 5]), np.array([9.0, 9, 9]), np.ones(3))
    assert found.point == 8.0 and found.low is None and found.high is None and not found.proven and found.p_worse == 1.0
    assert "1 day" in str(found)


def test_the_same_seed_gives_the_same_interval_and_another_one_nearly_the_same() -> None:
    _, a = week(np.random.default_rng(1), shock=0.2)
    _, b = week(np.random.default_rng(2), shock=0.2)
    day = np.repeat(np.arange(7), 20)
    one = harm(days(day), a, b)
    assert one == harm(days(day), a, b)
    other = harm(days(day, seed=SEED + 1), a, b)
    assert other != one and other.low == pytest.approx(one.low, abs=0.05)


def test_the_order_of_the_rows_changes_nothing() -> None:
    rng = np.random.default_rng(3)
    a, b, day = np.abs(rng.standard_normal(140)), np.abs(rng.standard_normal(140)), np.repeat(np.arange(7), 20)
    order = rng.permutation(140)
    one, other = harm(days(day), a, b), harm(days(day[order]), a[order], b[order])
    assert one.low == pytest.approx(other.low) and one.point == pytest.approx(other.point)


def test_of_a_hundred_weeks_without_a_difference_few_prove_one() -> None:
    """A day's rows share its ups and downs: taken for independent they would prove a difference three times in four."""
    rng, false, naive, rounds = np.random.default_rng(4), 0, 0, 400
    for _ in range(rounds):
        days_of, noise = week(rng, shock=0.3)
        difference = noise - 1
        found = days_of.interval(lambda x: x / 140, days_of.sums(difference))
        false += bool(found.low is not None and found.high is not None and (found.low > 0 or found.high < 0))
        naive += abs(difference.mean()) > 1.96 * difference.std() / np.sqrt(140)
    print(f"{rounds} weeks: {false / rounds:.1%} outside a 95% interval by day, {naive / rounds:.1%} by row")
    assert false / rounds <= 0.08, "plain percentiles of seven days are outside in 12%"
    assert naive / rounds > 0.5


def test_of_weeks_whose_days_are_like_the_day_before_few_prove_a_difference_that_is_none() -> None:
    """Differences of neighbouring days go together (0.4): taken for independent they lie outside in one week of five."""
    rng, outside, rounds = np.random.default_rng(6), 0, 400
    for _ in range(rounds):
        luck = rng.standard_normal(7)
        for n in range(1, 7):
            luck[n] = 0.4 * luck[n - 1] + np.sqrt(1 - 0.4**2) * luck[n]
        days_of = days(np.arange(7))
        found = days_of.interval(lambda x: x / 7, days_of.sums(luck))
        outside += bool(found.low is not None and found.high is not None and (found.low > 0 or found.high < 0))
    print(f"{rounds} weeks, autocorrelation 0.4: {outside / rounds:.1%} outside a 95% interval")
    assert outside / rounds <= 0.12, "15% of these weeks without what their going together adds"


def test_autocorrelation_is_drawn_to_what_is_usual_and_none_is_found_where_no_day_differs() -> None:
    rising, turns = np.arange(28.0)[:, None], np.tile([1.0, -1.0], 14)[:, None]
    assert autocorrelation(np.full((7, 1), 0.3)) == 0.0
    assert autocorrelation(rising) == pytest.approx((28 + 14 * 0.3) / 42, abs=0.05) and autocorrelation(turns) == 0.0
    few = np.random.default_rng(2).standard_normal((7, 2000))
    assert abs(np.mean(autocorrelation(few)) - 0.2) < 0.1, "a week moves it little"


def test_too_few_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="2000"):
        harm(days([1, 2], draws=100), np.ones(2), np.ones(2) * 2)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["brier", "log_loss"])
def test_the_mean_of_the_row_losses_is_the_metric(metric: str) -> None:
    from models.learners.duration import figures

    rng = np.random.default_rng(5)
    p, missed = rng.uniform(size=300), (rng.uniform(size=300) < 0.4).astype(float)
    found = losses("duration", metric, p, missed)
    assert found is not None and found.mean() == pytest.approx(figures(missed, p)[metric])


def test_a_metric_that_is_no_mean_over_rows_has_no_losses() -> None:
    assert losses("duration", "roc_auc", np.ones(2), np.ones(2)) is None
    found = losses("response", "mae", np.array([1.0, 5.0]), np.array([2.0, 2.0]))
    assert found is not None and found.tolist() == [1.0, 3.0]


def test_a_row_without_an_outcome_judges_nobody() -> None:
    rows, actual = paired.known("duration", pa.table({"missed": pa.array([True, None, False]), "n": [1, 2, 3]}))
    assert rows["n"].to_pylist() == [1, 3] and actual.tolist() == [1.0, 0.0]


# --- slices and groups ------------------------------------------------------------------------------------------------


def sliced(extra: float, *, seed: int = 6, names: int = 6, min_rows: int = 50) -> list[paired.Slice]:
    """Losses of equal models, but for ``extra`` in the slice `a`; 7 days x 10 rows a slice."""
    rng = np.random.default_rng(seed)
    day = np.repeat(np.arange(7), 10 * names)
    name = np.tile(np.repeat([chr(97 + i) for i in range(names)], 10), 7)
    theirs = rng.uniform(0.5, 1.5, len(day))
    mine = theirs * (1 + 0.1 * rng.standard_normal(len(day))) + np.where(name == "a", extra, 0.0)
    table = pa.table({"kind": pa.array(np.where(name == "b", None, name)), "day": day})
    return slices(table, ["kind"], days(day), mine, theirs, min_rows=min_rows, alpha=0.05)


def test_a_slice_that_is_worse_is_found_and_the_others_are_not() -> None:
    found = sliced(0.3)
    assert [s.value for s in found] == ["(none)", "a", "c", "d", "e", "f"]
    assert [s.value for s in found if s.real] == ["a"]
    (worst,) = [s for s in found if s.real]
    assert worst.harm.proven and worst.harm.point == pytest.approx(0.3, abs=0.05) and worst.harm.rows == 70
    assert worst.mine > worst.theirs


def test_equal_models_have_hardly_ever_a_slice_that_is_worse() -> None:
    named = sum(any(s.real for s in sliced(0.0, seed=100 + n)) for n in range(60))
    print(f"{named} of 60 comparisons of equal models named a slice")
    assert named <= 6


def test_a_small_slice_is_left_out() -> None:
    assert sliced(0.3, min_rows=71) == []


def test_a_column_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(KeyError, match=r"'team' is missing.*kind"):
        slices(pa.table({"kind": ["a"]}), ["team"], days([1]), np.ones(1), np.ones(1), min_rows=1, alpha=0.05)


@given(st.lists(st.floats(0, 1), max_size=30), st.floats(0.01, 0.5))
@settings(max_examples=examples(100))
def test_discoveries_are_those_below_the_largest_rank_that_passes(p: list[float], alpha: float) -> None:
    found = discoveries(p, alpha)
    ranked = sorted(p)
    passing = [k for k in range(1, len(p) + 1) if ranked[k - 1] <= alpha * k / len(p)]
    limit = ranked[passing[-1] - 1] if passing else -1.0
    assert found == [x <= limit for x in p]


def test_groups_say_how_often_they_are_decided_for_and_against() -> None:
    table = pa.table({"city": ["x", "x", "x", "x", "y", "y", "z"]})
    mine, theirs = np.array([1.0, 2, -1, 0, -1, -3, 1]), np.zeros(7)
    found = groups(table, ["city"], mine, theirs, min_rows=2)
    assert [(g.value, g.rows, g.mine, g.theirs) for g in found] == [
        ("x", 4, (0.5, 0.25), (0.0, 0.0)), ("y", 2, (0.0, 1.0), (0.0, 0.0)),
    ]  # fmt: skip


# --- kinds, sameness, disagreement --------------------------------------------------------------------------------------


@dataclass
class Says:
    """A model that says given amounts, in files of a given name."""

    levels: Any
    name: str = "a"

    def score(self, rows: pa.Table) -> pa.Table:
        levels = np.asarray(self.levels, dtype=np.float64)
        return pa.table({"level": levels, "values": np.outer(levels, [0.5, 1.0]).tolist(), "step": ["x"] * len(levels)})

    def files(self) -> dict[str, bytes]:
        return {"model.txt": self.name.encode()}


def test_models_are_the_same_by_their_files_or_by_every_score_but_for_rounding() -> None:
    rows = pa.table({"n": [1, 2, 3]})
    one = Says([1.0, 2.0, np.nan])
    assert paired.same(one, one, rows) and paired.same(one, Says([7.0, 8.0, 9.0]), rows), "the same files"
    assert paired.same(one, Says([1.0 + 1e-9, 2.0, np.nan], "b"), rows)
    assert not paired.same(one, Says([1.0 + 1e-5, 2.0, np.nan], "b"), rows)
    assert not paired.same(one, Says([1.0, 2.0, 3.0], "b"), rows)
    assert not paired.same(Says([], "a"), Says([], "b"), rows.slice(0, 0)), "no row says that they are"


def test_amounts_disagree_by_their_share_so_that_the_largest_line_is_not_all_that_counts() -> None:
    rows = pa.table({"n": range(100)})
    level = np.ones(100)
    level[0] = 1000.0
    plain = lambda a, b: float(np.mean((a - b) ** 2))  # noqa: E731
    small, large = level.copy(), level.copy()
    small[1:] *= 2.0  # every line but the largest says twice as much
    large[0] *= 1.1  # the largest says a tenth more, and no other line anything else
    assert plain(large, level) > 100 * plain(small, level)
    apart = [paired.disagreement("response", Says(one), Says(level), rows)[0] for one in (small, large)]
    assert apart[0] > apart[1] > 0
    tripled, _ = paired.disagreement("response", Says(3 * small), Says(3 * level), rows)
    assert tripled == pytest.approx(apart[0]), "no currency"
    assert paired.disagreement("response", Says(level), Says(level), rows) == (0.0, 100)
    assert paired.disagreement("response", Says(level * 0), Says(level * 0), rows) == (0.0, 100)
    assert np.isnan(paired.disagreement("response", Says([]), Says([]), rows.slice(0, 0))[0])


def test_models_disagree_on_the_rows_that_both_score_and_no_other_row_counts() -> None:
    rows = pa.table({"n": range(4)})
    one, other = [1.0, np.nan, 3.0, 5.0], [2.0, 2.0, 3.0, np.nan]
    both = paired.disagreement("response", Says([1.0, 3.0]), Says([2.0, 3.0]), rows.slice(0, 2))
    assert both[0] > 0 and paired.disagreement("response", Says(one), Says(other), rows) == both
    far, compared = paired.disagreement("response", Says([np.nan] * 4), Says(other), rows)
    assert np.isnan(far) and compared == 0
