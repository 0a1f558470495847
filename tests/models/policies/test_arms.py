"""The draw of the arms, their epochs, and the perturbations of exploring."""

import hashlib
from datetime import date, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.policies.arms import ARMS, Arms, draw, epoch_of, normalised, perturb
from tests.support.properties import examples

SHARES = {"holdout": 0.1, "champion": 0.7, "explore": 0.2}


def drawn(units, epoch="2026-01-01", design="cohort", shares=SHARES, **more):
    table = draw(units, workflow="ad_budget", design=design, epoch=epoch, shares=shares, **more)
    assert table.column_names == ["unit", "arm", "arm_probability"]
    assert table["unit"].to_pylist() == list(units)
    return dict(zip(table["unit"].to_pylist(), table["arm"].to_pylist(), strict=True)), table


def test_shares_come_out_as_asked_within_chance():
    units = [f"unit-{i}" for i in range(20_000)]
    arms, table = drawn(units)
    for arm, share in SHARES.items():
        found = sum(a == arm for a in arms.values())
        assert abs(found - share * 20_000) < 4.5 * np.sqrt(20_000 * share * (1 - share))
    assert {r["arm"]: r["arm_probability"] for r in table.to_pylist()} == pytest.approx(SHARES)


def test_a_unit_keeps_its_arm_whatever_the_order_and_whoever_else_is_drawn():
    units = [f"unit-{i}" for i in range(500)]
    alone, _ = drawn(units)
    more, _ = drawn([f"new-{i}" for i in range(300)] + units[::-1])
    assert {u: more[u] for u in units} == alone


def test_another_epoch_or_workflow_is_an_independent_draw():
    units = [f"unit-{i}" for i in range(4_000)]
    first, _ = drawn(units, shares={"holdout": 1, "champion": 1})
    second, _ = drawn(units, epoch="2026-01-15", shares={"holdout": 1, "champion": 1})
    same = sum(first[u] == second[u] for u in units)
    assert abs(same - 2_000) < 4.5 * np.sqrt(1_000)
    other = draw(
        units, workflow="ticket_priority", design="cohort", epoch="2026-01-01", shares={"holdout": 1, "champion": 1}
    )
    assert abs(sum(first[r["unit"]] == r["arm"] for r in other.to_pylist()) - 2_000) < 4.5 * np.sqrt(1_000)


def test_the_draw_is_the_hash_of_workflow_epoch_and_unit():
    """Written out again: a changed draw would silently move entities between arms in the middle of an epoch."""
    units = [f"unit-{i}" for i in range(200)]
    arms, _ = drawn(units)
    for unit in units:
        digest = hashlib.sha256(b'["ad_budget", "2026-01-01", "arm"]\0' + unit.encode()).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        assert arms[unit] == ("holdout" if position < 0.1 else "champion" if position < 0.8 else "explore")


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    weights=st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any),
    epoch=st.integers(0, 1000),
)
@settings(max_examples=examples(100))
def test_every_stratum_gets_each_arms_share_rounded_down_or_up(sizes, weights, epoch):
    strata = [f"s{s}" for s, size in enumerate(sizes) for _ in range(size)]
    units = [f"unit-{i}" for i in range(len(strata))]
    shares = dict(zip(ARMS, weights, strict=True))
    arms, _ = drawn(units, epoch=str(epoch), shares=shares, strata=strata)
    for s, size in enumerate(sizes):
        members = [arms[u] for u, label in zip(units, strata, strict=True) if label == f"s{s}"]
        for arm, share in normalised(shares).items():
            assert np.floor(share * size - 1e-9) <= members.count(arm) <= np.ceil(share * size + 1e-9)


def test_a_stratified_draw_gives_every_unit_the_recorded_probability():
    units, strata = [f"unit-{i}" for i in range(7)], ["a", "a", "a", "b", "b", "b", "b"]
    counts = dict.fromkeys(units, 0)
    for epoch in range(3_000):
        arms, _ = drawn(units, epoch=str(epoch), strata=strata)
        for unit in units:
            counts[unit] += arms[unit] == "explore"
    assert all(abs(c - 600) < 4.5 * np.sqrt(3_000 * 0.2 * 0.8) for c in counts.values())


def test_what_was_drawn_earlier_in_the_epoch_is_kept_when_units_join():
    units, strata = [f"unit-{i}" for i in range(40)], ["a", "b"] * 20
    first, table = drawn(units, strata=strata)
    joined, _ = drawn([*units, *(f"new-{i}" for i in range(15))], strata=[*strata, *["a"] * 15], keep=table)
    assert {u: joined[u] for u in units} == first
    assert len(joined) == 55 and set(joined.values()) <= set(SHARES)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"units": ["a", "b", "a"]}, "'a' stands more than once"),
        ({"shares": {"holdout": -1.0}}, "holdout is -1.0"),
        ({"shares": {"control": 1.0}}, "unknown arm 'control'"),
        ({"shares": {"holdout": 0.0}}, "no arm has a share"),
        ({"strata": ["x"]}, "1 labels for 2 units"),
        ({"design": "entity", "strata": ["x", "y"]}, "one by one"),
        ({"design": "rct"}, "'rct' is unknown"),
    ],
)
def test_a_draw_that_makes_no_sense_is_refused(more, says):
    with pytest.raises(ValueError, match=says):
        drawn(**({"units": ["a", "b"]} | more))


def test_epochs_follow_one_another_and_only_redraws_wash_out():
    start = date(2026, 3, 1)
    found = [epoch_of(start + timedelta(days=d), start, 14, 3) for d in range(31)]
    assert found[0] == found[13] == ("2026-03-01", False)
    assert found[14] == found[16] == ("2026-03-15", True)
    assert found[17] == found[27] == ("2026-03-15", False)
    assert found[28] == ("2026-03-29", True)
    with pytest.raises(ValueError, match="before the workflow's start"):
        epoch_of(date(2026, 2, 28), start, 14, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"epoch": 13}, "cohort needs at least 14 days"),
        ({"washout": 14}, "leave nothing"),
        ({"design": "entity", "washout": 2}, "nothing carries over"),
        ({"explore": None}, "say its step"),
        ({"explore": {"step": 0.2, "level": 1}}, "Extra inputs"),
        ({"unit_column": "campaign"}, "Extra inputs"),
        ({"shares": {"control": 1.0}}, "control"),
    ],
)
def test_a_wrong_arms_section_is_refused(change, says):
    good = {
        "design": "cohort",
        "unit": "campaign",
        "epoch": 14,
        "washout": 3,
        "shares": SHARES,
        "explore": {"step": 0.2},
    }
    assert Arms.model_validate(good).explore.step == 0.2
    with pytest.raises(ValidationError, match=says):
        Arms.model_validate(good | change)


@st.composite
def explored(draw):
    n = draw(st.integers(0, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    base = rng.integers(0, 10 ** rng.integers(1, 12, n))
    low = np.floor(base * rng.choice([0.0, 0.7, 0.95, 1.0], n)).astype(np.int64)
    high = np.ceil(base * rng.choice([1.0, 1.05, 1.3, 9.0], n)).astype(np.int64)
    return [f"line-{i}" for i in range(n)], base, low, high, draw(st.sampled_from([0.01, 0.2, 0.5]))


@given(explored(), st.text(max_size=5))
@settings(max_examples=examples(100))
def test_exploring_keeps_the_money_to_the_micro_and_stays_inside_the_bounds(case, key):
    names, base, low, high, step = case
    found = perturb(names, base, low, high, step=step, key=key)
    assert found.after.sum() == base.sum()
    assert ((low <= found.after) & (found.after <= high)).all()
    assert (np.abs(found.after - base) <= step * base).all()
    assert (np.where(found.after == base, found.multiplier == 1, found.multiplier * base - found.after < 1e-3)).all()
    assert set(found.probability) <= {0.5, 1.0} and ((found.probability == 0.5) == (found.after != base)).all()
    mirrored = 2 * base - found.after  # had the coin fallen the other way
    assert ((low <= mirrored) & (mirrored <= high)).all()
    order = np.random.default_rng(0).permutation(len(names))
    again = perturb([names[i] for i in order], base[order], low[order], high[order], step=step, key=key)
    assert (again.after == found.after[order]).all()


def test_the_signs_are_fair_coins_and_uncorrelated_over_days():
    n, days = 100, 400
    names, base = [f"line-{i}" for i in range(n)], np.arange(1, n + 1) * 1_000_000
    up = np.array([perturb(names, base, base * 0, base * 2, step=0.2, key=f"w/{d}").after > base for d in range(days)])
    assert abs(up.sum() - n * days / 2) == 0  # one up for one down
    assert np.abs(up.mean(axis=0) - 0.5).max() < 4.5 * 0.5 / np.sqrt(days)
    assert np.abs(np.mean(up[1:] == up[:-1]) - 0.5) < 4.5 * 0.5 / np.sqrt((days - 1) * n / 2)


def test_units_that_enter_an_epoch_one_by_one_do_not_all_get_the_arm_of_the_first():
    first = [f"unit-{i}" for i in range(20)]
    arms, kept = drawn(first, strata=[""] * 20)
    late = [f"late-{i}" for i in range(60)]
    for unit in late:
        everybody = [*kept["unit"].to_pylist(), unit]
        found, kept = drawn(everybody, strata=[""] * len(everybody), keep=kept)
        assert {u: found[u] for u in arms} == arms
        arms = found
    counts = {arm: sum(arms[u] == arm for u in late) for arm in SHARES}
    assert all(abs(counts[arm] - share * 60) < 4 * np.sqrt(60 * share) for arm, share in SHARES.items()), counts
