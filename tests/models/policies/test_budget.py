"""The allocation against independent solvers, its certificate, and the decisions of a day with their reasons."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.optimize import linprog

from models.policies.allocation import MICROS, Plan, allocate
from models.policies.arms import Explore
from models.policies.budget import BudgetPolicy, decide
from tests.support.properties import examples

SHAPES = ("concave", "s_shaped", "flat", "ties", "wild")


def curves(rng, n, k, largest=10_000_000_000, shape="mixed"):
    """Random piecewise-linear curves of one or all shapes on uneven grids; spends in micros, values in currency."""
    unit = rng.integers(k, largest, n)
    grid = np.sort(rng.uniform(0, 1, (n, k)), axis=1)
    spends = np.floor(grid * unit[:, None]).astype(np.int64) + np.arange(k)
    x = spends / spends[:, -1:]
    size = rng.lognormal(0, 1, (n, 1)) * spends[:, -1:] / MICROS
    bent = rng.uniform(0.1, 0.95, (n, 1))
    made = {
        "concave": x**bent,
        "s_shaped": x**4 / (x**4 + bent**4),
        "flat": np.minimum(x, bent),
        "ties": np.cumsum(
            np.diff(spends, axis=1, prepend=0) * np.sort(rng.integers(0, 3, (n, k)), axis=1)[:, ::-1], axis=1
        )
        / np.maximum(spends[:, -1:], 1),
        "wild": np.cumsum(rng.normal(0.2, 1, (n, k)), axis=1) / k,
    }
    kind = rng.integers(0, len(SHAPES), n) if shape == "mixed" else np.full(n, SHAPES.index(shape))
    values = np.choose(kind[:, None], [made[s] for s in SHAPES]) * size
    ties = kind == SHAPES.index("ties")
    values[ties] = (made["ties"] * spends[:, -1:] / MICROS)[ties]  # slopes of exactly 0, 1 or 2: equal over lines
    return spends, values


def bounds(rng, spends):
    """before inside the curve, floor and cap that leave it possible, a largest change or none."""
    low, high = spends[:, 0], spends[:, -1]
    before = rng.integers(low, high + 1)
    floor = np.where(rng.uniform(size=len(low)) < 0.5, 0, rng.integers(low, before + 1))
    cap = np.where(rng.uniform(size=len(low)) < 0.5, 2**60, rng.integers(before, high + 1))
    return before, floor, cap, rng.choice([None, 0.0, 0.1, 0.3, 2.0], p=[0.2, 0.05, 0.25, 0.3, 0.2])


def cut(spends, values, before, floor, cap, change):
    """The same bounds written down again, one line at a time, for the solvers to compare with."""
    lines = []
    for x, v, b, least, most in zip(spends, values, before, floor, cap, strict=True):
        step = spends.max() * 9 if change is None else int(b * change + 1e-6)
        low, high = max(int(x[0]), int(least), int(b) - step), min(int(x[-1]), int(most), int(b) + step)
        inside = np.unique(np.concatenate([[low, high], x[(x > low) & (x < high)]]))
        lines.append((inside, np.interp(inside, x, v)))
    return lines


def highs(lines, total, target=None):
    """Weights on the points of each curve: as a linear programme this is the problem on the concave envelopes."""
    x, v = (np.concatenate([line[i] for line in lines]).astype(float) for i in (0, 1))
    owner = np.repeat(np.arange(len(lines)), [len(line[0]) for line in lines])
    one = (owner == np.arange(len(lines))[:, None]).astype(float)
    scale, worth = max(x.max(), 1), max(np.abs(v).max(), 1e-9)
    if target is None:
        more = {"A_eq": np.vstack([one, x / scale]), "b_eq": np.append(np.ones(len(lines)), total / scale)}
    else:
        required = target * x / MICROS
        size = max(np.abs(v - required).max(), 1e-9)
        more = {
            "A_eq": one,
            "b_eq": np.ones(len(lines)),
            "A_ub": np.vstack([x / scale, (required - v) / size]),
            "b_ub": [total / scale, 0],
        }
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    for method, presolve in (
        ("highs", True),
        ("highs", False),
        ("highs-ipm", True),
        ("highs-ipm", False),
    ):  # it may give up on one
        found = linprog(-v / worth, **more, bounds=(0, None), method=method, options=tight | {"presolve": presolve})
        if found.status in (0, 2):
            return None if found.status == 2 else -found.fun * worth
    raise AssertionError(found.message)


def best_of_all(lines, total, target=None):
    """Every whole micro of every line tried (dynamic programme over micros, on the curves themselves)."""
    best = np.full(total + 1, -np.inf)
    best[0] = 0.0
    for x, v in lines:
        nxt = np.full(total + 1, -np.inf)
        for s in range(int(x[0]), min(int(x[-1]), total) + 1):
            nxt[s:] = np.maximum(nxt[s:], best[: total + 1 - s] + np.interp(s, x, v))
        best = nxt
    if target is None:
        return best[min(total, sum(int(x[-1]) for x, _ in lines))]
    good = best >= target * np.arange(total + 1) / MICROS - 1e-9
    return best[good].max() if good.any() else None


def check(plan: Plan, lines, total, target=None):
    """What holds of every plan, whatever the instance."""
    assert plan.spend.dtype == np.int64 and int(plan.spend.sum()) + plan.unspent == total
    if plan.feasible:
        assert plan.unspent >= 0
        assert all(x[0] <= s <= x[-1] for s, (x, _) in zip(plan.spend, lines, strict=True))
        worth = sum(np.interp(s, x, v) for s, (x, v) in zip(plan.spend, lines, strict=True))
        assert plan.value == pytest.approx(worth, rel=1e-10, abs=1e-9)
        assert plan.gap == max(0.0, plan.bound - plan.value)
        if target is not None:
            assert worth >= target * plan.spend.sum() / MICROS * (1 - 1e-11) - 1e-9


def same(found, wanted, lines):
    """Equal to 1e-9 of the largest figure in play (a sum of gains and losses may itself be near zero)."""
    return abs(found - wanted) <= 1e-9 * max(abs(wanted), sum(np.abs(v).max() for _, v in lines))


@pytest.mark.parametrize("shape", [*SHAPES, "mixed"])
def test_the_bound_is_the_optimum_of_the_envelope_problem(shape):
    rng, off = np.random.default_rng(SHAPES.index(shape) if shape in SHAPES else 99), 0
    for case in range(70):
        n, k = int(rng.integers(1, 60)), int(rng.integers(1, 10))
        spends, values = curves(rng, n, k, shape=shape)
        before, floor, cap, change = bounds(rng, spends)
        lines = cut(spends, values, before, floor, cap, change)
        low, high = (sum(int(x[i]) for x, _ in lines) for i in (0, -1))
        total = int(before.sum()) if case % 2 else int(rng.integers(low, high + 1))
        plan = allocate(spends, values, total=total, floor=floor, cap=cap, before=before, largest_change=change)
        check(plan, lines, total)
        wanted = highs(lines, total)
        assert plan.feasible and plan.unspent == 0
        if plan.method.startswith("envelope"):
            assert same(plan.bound, wanted, lines)
        assert plan.bound <= wanted + 1e-9 * max(1, abs(wanted)) + 1e-9 * sum(np.abs(v).max() for _, v in lines)
        off += not plan.method.startswith("envelope, exact")
        if plan.method.endswith("exact"):
            assert plan.gap <= 1e-9 * max(1.0, abs(plan.value))
    assert (off > 0) == (shape in ("s_shaped", "wild", "mixed"))


def test_only_one_line_ends_off_its_points_and_without_the_exact_search_the_gap_is_that_lines(monkeypatch):
    monkeypatch.setattr("models.policies.allocation.EXACT_POINTS", 0)
    rng = np.random.default_rng(5)
    for _ in range(60):
        spends, values = curves(rng, int(rng.integers(2, 80)), 9)
        before, floor, cap, change = bounds(rng, spends)
        lines = cut(spends, values, before, floor, cap, change)
        plan = allocate(
            spends, values, total=int(before.sum()), floor=floor, cap=cap, before=before, largest_change=change
        )
        check(plan, lines, int(before.sum()))
        assert same(plan.bound, highs(lines, int(before.sum())), lines)
        between = [i for i, (s, (x, _)) in enumerate(zip(plan.spend, lines, strict=True)) if s not in x]
        assert len(between) <= 1
        if plan.gap > 1e-6:
            assert len(between) == 1 or plan.method == "envelope"
            assert plan.gap <= max(np.ptp(v) for _, v in lines)


@pytest.mark.slow
def test_under_a_target_return_the_bound_is_the_optimum_with_both_constraints(monkeypatch):
    monkeypatch.setattr("models.policies.allocation.EXACT_POINTS", 0)
    rng, seen = np.random.default_rng(6), {"infeasible": 0, "return binds": 0, "money binds": 0, "neither": 0}
    for case in range(300):
        n, k = int(rng.integers(1, 40)), int(rng.integers(2, 10))
        spends, values = curves(rng, n, k)
        before, floor, cap, change = bounds(rng, spends)
        lines = cut(spends, values, before, floor, cap, change)
        low, high = (sum(int(x[i]) for x, _ in lines) for i in (0, -1))
        total = int(rng.integers(low, high + 1)) if case % 3 else 2 * high
        worth = sum(v.max() for _, v in lines)
        target = max(0.0, worth / max(high, 1) * MICROS * rng.lognormal(0, 0.7))
        plan = allocate(
            spends,
            values,
            total=total,
            floor=floor,
            cap=cap,
            before=before,
            largest_change=change,
            target_return=target,
        )
        wanted = highs(lines, total, target)
        if wanted is None:
            assert not plan.feasible and plan.reason
            seen["infeasible"] += 1
            continue
        if not plan.feasible:  # there is a plan on the envelopes only
            assert "envelopes" in plan.reason and same(plan.bound, wanted, lines)
            continue
        check(plan, lines, total, target)
        assert same(plan.bound, wanted, lines)
        assert plan.shadow_price >= 0 and plan.return_price >= 0
        seen["return binds" if plan.return_price else "money binds" if plan.shadow_price else "neither"] += 1
        assert not (plan.return_price and plan.shadow_price)
        if plan.return_price:
            eased = highs(lines, total, target * (1 - 1e-6))
            relaxed = target * 1e-6 * plan.spend.sum() / MICROS
            assert eased - wanted <= plan.return_price * relaxed * 1.01 + 1e-8 * sum(np.abs(v).max() for _, v in lines)
    assert min(seen.values()) >= 15, seen


@pytest.mark.parametrize("target", [None, 0.4, 1.0])
def test_few_lines_are_solved_exactly_on_the_curves_themselves(target):
    rng, methods, refused = np.random.default_rng(7), set(), 0
    for case in range(120):
        n, k = int(rng.integers(1, 6)), int(rng.integers(2, 7))
        spends, values = curves(rng, n, k, largest=40, shape=("mixed", "s_shaped", "wild")[case % 3])
        values = np.round(values * MICROS, 3)
        before, floor, cap, change = bounds(rng, spends)
        lines = cut(spends, values, before, floor, cap, change)
        total, price = int(before.sum()), None if target is None else target * MICROS
        plan = allocate(
            spends, values, total=total, floor=floor, cap=cap, before=before, largest_change=change, target_return=price
        )
        check(plan, lines, total, price)
        wanted = best_of_all(lines, total, price)
        if wanted is None:
            refused += 1
            assert not plan.feasible
            continue
        if not plan.feasible:
            # the micros here are so few that whole ones may meet a return that the search's one free line cannot
            assert target is not None and wanted <= plan.bound + 1e-9
            continue
        methods.add(plan.method)
        assert plan.value <= wanted + 1e-9 <= plan.bound + 2e-9
        assert wanted - plan.value <= plan.gap + 1e-9
        if target is None:
            assert plan.value == pytest.approx(wanted, abs=1e-9)
            assert plan.method.endswith("exact")
    assert "branch and bound, exact" in methods and (target is None or refused > 0)


@given(seed=st.integers(0, 2**32), n=st.integers(1, 30), k=st.integers(1, 9), target=st.sampled_from([None, 0.5]))
@settings(max_examples=examples(80))
def test_the_order_of_the_lines_changes_nothing(seed, n, k, target):
    rng = np.random.default_rng(seed)
    spends, values = curves(rng, n, k)
    before, floor, cap, change = bounds(rng, spends)
    order = rng.permutation(n)
    first, second = (
        allocate(
            spends[o], values[o], total=int(before.sum()), floor=floor[o], cap=cap[o], before=before[o],
            largest_change=change, target_return=target,
        )
        for o in (np.arange(n), order)
    )  # fmt: skip
    assert first.feasible == second.feasible
    if first.feasible and "stopped" not in first.method + second.method:
        near = {"rel": 1e-9, "abs": 1e-9 * np.abs(values).sum()}
        assert second.bound == pytest.approx(first.bound, **near)
        assert second.value == pytest.approx(first.value, **near) or first.gap + second.gap > 0


def two_lines(values, total, **more):
    spends = np.array([[0, 10, 20], [0, 10, 20]]) * MICROS
    n = np.array([20, 20]) * MICROS
    plain = {"floor": n * 0, "cap": n, "before": n // 2, "largest_change": None}
    return allocate(spends, np.array(values, dtype=float), total=total * MICROS, **(plain | more))


def test_the_shadow_price_is_what_the_next_unit_of_money_earns():
    values = [[0, 40, 60], [0, 30, 35]]  # slopes 4, 2 and 3, 0.5
    for total, price in ((5, 4), (10, 3), (15, 3), (20, 2), (25, 2), (30, 0.5), (35, 0.5)):
        plan = two_lines(values, total)
        assert plan.shadow_price == pytest.approx(price) and plan.unspent == 0
        assert two_lines(values, total + 1).value - plan.value == pytest.approx(price)
    assert two_lines(values, 40).shadow_price == 0
    over = two_lines(values, 50)
    assert (over.unspent, over.shadow_price, over.feasible) == (10 * MICROS, 0, True)
    assert "10.00 cannot be spent" in over.reason and "40.00" in over.reason


def test_without_a_target_flat_and_losing_segments_are_filled_last_and_with_one_never():
    values = [[0, 10, 10], [0, 10, 5]]
    for total, price, value in ((25, 0, 20), (35, -0.5, 17.5)):
        plan = two_lines(values, total)
        assert (plan.unspent, plan.value, plan.shadow_price) == (0, pytest.approx(value), pytest.approx(price))
    capped = two_lines(values, 35, target_return=0.1)
    assert capped.unspent == 15 * MICROS and capped.value == 20 and capped.shadow_price == capped.return_price == 0
    assert "15.00 is left" in capped.reason


def test_a_target_return_stops_spending_and_has_a_price():
    values = [[0, 40, 50], [0, 30, 35]]  # slopes 4, 1 and 3, 0.5
    plan = two_lines(values, 40, target_return=3.0)
    # 70 earned with 20 spent leaves 10 of slack; each further unit of the first line costs 2 of it
    assert plan.spend.tolist() == [15 * MICROS, 10 * MICROS] and plan.unspent == 15 * MICROS
    assert plan.return_price == pytest.approx(0.5) and plan.shadow_price == 0
    assert not two_lines(values, 40, target_return=3.0, floor=np.array([20, 10]) * MICROS).feasible


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"floor": np.array([12, 0]) * MICROS, "cap": np.array([11, 20]) * MICROS},
            r"1 lines .* line 0 .* 12.00 and at most 11.00",
        ),
        (
            {"floor": np.array([0, 15]) * MICROS, "largest_change": 0.3},
            r"line 1 must get at least 15.00 and at most 13.00",
        ),
        ({"floor": np.array([9, 9]) * MICROS, "total": 17}, r"lower bounds sum to 18.00, the total is 17.00"),
        ({"target_return": 5.0, "floor": np.array([1, 1]) * MICROS}, r"returns 5 for each unit"),
    ],
)
def test_what_cannot_be_met_is_said_and_the_status_quo_kept(more, says):
    plan = two_lines([[0, 40, 50], [0, 30, 35]], **({"total": 20} | more))
    assert not plan.feasible and plan.method == "none"
    assert plan.spend.tolist() == [10 * MICROS, 10 * MICROS]
    assert re.search(says, plan.reason), plan.reason


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"values": [[0, np.nan]]}, "line 0 has a value that is not finite"),
        ({"spends": [[5, 4]]}, "line 0 has spends that descend"),
        ({"spends": [[5, 5]]}, "two values at one spend"),
        ({"spends": [[-1, 4]]}, "negative spend"),
        ({"values": [[0.0, 1.0, 2.0]]}, "must both be"),
        ({"before": [-1]}, "negative money"),
        ({"floor": [0, 0]}, "floor and cap"),
        ({"total": -1}, "total is -1"),
        ({"largest_change": np.nan}, "largest_change is nan"),
        ({"target_return": np.inf}, "target_return is inf"),
    ],
)
def test_malformed_curves_are_refused_naming_the_line(change, says):
    good = {
        "spends": [[0, 4]],
        "values": [[0.0, 1.0]],
        "total": 2,
        "floor": [0],
        "cap": [4],
        "before": [2],
        "largest_change": None,
    }
    given_ = {k: np.array(v) if isinstance(v, list) else v for k, v in (good | change).items()}
    with pytest.raises(ValueError, match=says):
        allocate(given_.pop("spends"), given_.pop("values"), **given_)


def test_nothing_to_allocate_leaves_the_total_unspent():
    none = np.zeros(0, dtype=np.int64)
    plan = allocate(
        np.zeros((0, 3), int), np.zeros((0, 3)), total=7, floor=none, cap=none, before=none, largest_change=0.3
    )
    assert plan.unspent == 7 and plan.feasible


# --- one day's decisions


def a_day(seed=0, n=400, broken=True):
    rng = np.random.default_rng(seed)
    before = rng.integers(1, 500, n) * 1_370_000 + rng.integers(0, 9, n)
    multiplier = rng.choice([0.87, 1.0, 1.13], n)
    arm = rng.choice(["holdout", "champion", "challenger", "explore"], n, p=[0.2, 0.4, 0.2, 0.2])
    features = pa.table(
        {
            "entity_id": [f"line-{i:04d}" for i in range(n)],
            "unit": [f"campaign-{i}" for i in range(n)],
            "budget_micros": before,
            "explore_multiplier_today": np.where(arm == "explore", multiplier, 1.0),
        }
    )
    spends = (before[:, None] * np.linspace(0.5, 1.5, 9)).astype(np.int64)
    values = (
        before[:, None]
        / MICROS
        * rng.lognormal(1, 0.5, (n, 1))
        * (spends / before[:, None]) ** rng.uniform(0.1, 0.9, (n, 1))
    )
    x, v = [list(map(int, s)) for s in spends], [list(map(float, s)) for s in values]
    ids = features["entity_id"].to_pylist()
    if broken:
        champion = np.flatnonzero(arm == "champion")
        v[champion[0]][3] = float("nan")
        x[champion[1]] = x[champion[1]][:4]
        x[champion[2]], v[champion[2]] = x[champion[2]][:3], v[champion[2]][:3]
        ids[champion[3]] = "somebody else"
        x[champion[4]], v[champion[4]] = x[champion[4]][2:7], v[champion[4]][2:7]  # a shorter curve is as good
        v[champion[5]][2] = None
    order = rng.permutation(n)
    scores = pa.table({"entity_id": ids, "spends": x, "values": v}).take(order)
    arms = pa.table({"unit": features["unit"], "arm": arm, "arm_probability": np.full(n, 0.25)}).take(
        rng.permutation(n)
    )
    return features, scores, arms, arm


SPEC = {"largest_daily_change": 0.3}


def test_every_arm_keeps_its_own_pool_to_the_micro():
    features, scores, arms, arm = a_day()
    decisions, certificates = decide(
        features, scores, arms, SPEC, explore=Explore(step=0.1), key="ad_budget/2026-01-01"
    )
    before, after = (decisions[c].to_numpy() for c in ("before", "after"))
    assert decisions["arm"].to_pylist() == arm.tolist()
    for name in ("holdout", "champion", "challenger", "explore"):
        mine = arm == name
        assert before[mine].sum() == after[mine].sum() == certificates[name]["pool"] == certificates[name]["spent"]
        assert certificates[name]["unspent"] == 0 and certificates[name]["lines"] == mine.sum()
    assert (after[arm == "holdout"] == before[arm == "holdout"]).all()
    assert (np.abs(after - before) <= 0.3 * before + 1e-6).all()
    assert decisions["changed"].to_pylist() == (after != before).tolist()
    assert certificates["champion"]["value"] > certificates["champion"]["value_before"]
    assert certificates["champion"]["bound"] >= certificates["champion"]["value"]
    json.dumps(certificates, allow_nan=False)


def test_lines_without_a_usable_curve_keep_the_status_quo_and_say_why():
    features, scores, arms, arm = a_day()
    rows = decide(features, scores, arms, SPEC)[0].to_pylist()
    champion = np.flatnonzero(arm == "champion")
    for at, why in (
        (0, "not usable"),
        (1, "not usable"),
        (2, "does not reach today's budget"),
        (3, "gave no response curve"),
        (5, "not usable"),
    ):
        row = rows[champion[at]]
        assert row["after"] == row["before"] and not row["changed"]
        assert (
            row["reasons"] == [r for r in row["reasons"] if why in r]
            and f"{row['before'] / MICROS:.2f}" in row["reasons"][0]
        )
    assert rows[champion[0]]["expected_gain"] is None
    good = rows[champion[4]]
    assert good["expected_gain"] is not None and "pool" in good["reasons"][0]


def test_no_scores_at_all_change_nothing():
    features, _, arms, _ = a_day()
    decisions, certificates = decide(features, pa.table({}), arms, SPEC)
    assert not any(decisions["changed"].to_pylist())
    assert all(decisions["reasons"].to_pylist())
    assert certificates["champion"]["movable"] == 0


def test_a_reason_carries_the_figures_of_its_line():
    features = pa.table({"entity_id": ["a", "b"], "unit": ["a", "b"], "budget_micros": [100 * MICROS, 50 * MICROS]})
    scores = pa.table(
        {
            "entity_id": ["b", "a"],
            "spends": [[25_000_000, 50_000_000, 75_000_000], [50_000_000, 100_000_000, 150_000_000]],
            "values": [[50.0, 75.0, 95.0], [250.0, 400.0, 500.0]],
        }
    )
    arms = pa.table(
        {"entity_id": ["a", "b"], "unit": ["a", "b"], "arm": ["champion"] * 2, "arm_probability": [1.0, 1.0]}
    )
    up, down = decide(features, scores, arms, SPEC)[0].to_pylist()
    assert (up["after"], down["after"]) == (115 * MICROS, 35 * MICROS)
    assert up["reasons"] == [
        "Budget raised from 100.00 to 115.00 (+15.00%): the extra 15.00 is expected to earn 30.00, or 2.00 for "
        "each unit of money; "
        "the next unit of money in the champion pool earns 2.00."
    ]
    assert down["reasons"] == [
        "Budget lowered from 50.00 to 35.00 (-30.00%): the 15.00 taken away was expected to earn 15.00, or 1.00 "
        "for each unit of money; "
        "the next unit of money in the champion pool earns 2.00.",
        "It goes no further: a line moves by at most 30% a day.",
    ]
    assert up["expected_gain"] == pytest.approx(30) and down["expected_gain"] == pytest.approx(-15)


def test_exploring_takes_todays_multiplier_out_and_may_swing_within_the_daily_change():
    features, scores, arms, arm = a_day()
    mine = arm == "explore"
    before = features["budget_micros"].to_numpy().copy()
    last = np.ones(len(before))
    status_quo = before[mine] / features["explore_multiplier_today"].to_numpy()[mine]
    for day in range(30):
        decisions, _ = decide(features, scores, arms, SPEC, explore=Explore(step=0.2), key=f"ad_budget/{day}")
        after = decisions["after"].to_numpy()
        assert after[mine].sum() == before[mine].sum()
        assert (np.abs(after - before)[mine] <= 0.3 * before[mine] + 1).all()
        last[mine] = decisions["perturbation"].to_numpy(zero_copy_only=False)[mine]
        before = after
        features = features.set_column(2, "budget_micros", pa.array(before)).set_column(
            3, "explore_multiplier_today", pa.array(last)
        )
    drift = before[mine] / last[mine] / status_quo
    assert (
        np.ptp(drift) < 0.02
    )  # thirty draws later the status quo is where it was, but for what the first day could not take out
    moved = decisions.filter(pa.array(mine))
    assert set(moved["perturbation_probability"].to_pylist()) <= {0.5, 1.0}
    assert "step of 20% is held to 13.0%" in moved["reasons"].to_pylist()[0][-1]
    assert all(r["perturbation"] is None for r in decisions.filter(pa.array(~mine)).to_pylist())


def test_an_infeasible_arm_keeps_its_status_quo_and_the_certificate_says_why():
    features, scores, arms, arm = a_day(broken=False)
    decisions, certificates = decide(features, scores, arms, SPEC | {"target_return": 1e6})
    assert not any(decisions["changed"].to_pylist())
    assert not certificates["champion"]["feasible"] and "1e+06" in certificates["champion"]["reason"]
    assert "no feasible plan" in decisions["reasons"].to_pylist()[int(np.argmax(arm == "champion"))][0]


def test_a_ceiling_reports_what_it_leaves():
    features, scores, arms, arm = a_day(broken=False)
    decisions, certificates = decide(features, scores, arms, SPEC | {"target_return": 3.5})
    left = certificates["champion"]["unspent"]
    assert left > 0 and certificates["champion"]["return_price"] > 0
    mine = arm == "champion"
    assert decisions["before"].to_numpy()[mine].sum() - decisions["after"].to_numpy()[mine].sum() == left
    assert f"{left / MICROS:,.2f} is left" in decisions["reasons"].to_pylist()[int(np.argmax(mine))][-1]


def test_floor_and_cap_columns_hold_and_a_conflict_keeps_the_line():
    features, scores, arms, arm = a_day(broken=False)
    before = features["budget_micros"].to_numpy()
    cap = [None if i % 2 else int(b) for i, b in enumerate(before)]
    floor = (before * 9) // 10
    champion = int(np.argmax(arm == "champion"))
    floor[champion] = 2 * before[champion]
    features = features.append_column("cap_micros", pa.array(cap, pa.int64())).append_column(
        "floor_micros", pa.array(floor)
    )
    decisions, certificates = decide(
        features, scores, arms, SPEC | {"cap": "cap_micros", "floor": "floor_micros", "cap_share": 1.2}
    )
    after, decided = decisions["after"].to_numpy(), np.isin(arm, ["champion", "challenger"])
    decided[champion] = False
    most = np.array([b * 1.2 if c is None else c for b, c in zip(before, cap, strict=True)])
    assert (floor[decided] <= after[decided]).all() and (after[decided] <= most[decided]).all()
    assert after[champion] == before[champion] and "cannot be met at once" in decisions["reasons"][champion].as_py()[0]
    texts = [t for row in decisions["reasons"].to_pylist() for t in row]
    assert any("this is its cap" in t for t in texts) and any("this is its floor" in t for t in texts)
    assert certificates["champion"]["unspent"] == 0


def test_the_same_day_in_another_order_gives_every_line_the_same_decision():
    features, scores, arms, _ = a_day()
    more = {"explore": Explore(step=0.1), "key": "k"}
    order = np.random.default_rng(1).permutation(features.num_rows)
    first = decide(features, scores, arms, SPEC, **more)[0].to_pylist()
    second = decide(features.take(order), scores, arms, SPEC, **more)[0].to_pylist()
    assert [first[i]["after"] for i in order] == [row["after"] for row in second]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.drop_columns("budget_micros"), "column 'budget_micros' is missing"),
        (lambda f: pa.concat_tables([f, f.slice(0, 1)]), "more than once"),
        (lambda f: f.set_column(1, "unit", pa.array(["x"] * f.num_rows)), "'x' has no arm"),
        (lambda f: f.set_column(2, "budget_micros", pa.array([None] * f.num_rows, pa.int64())), "'line-0000' is null"),
        (lambda f: f.set_column(2, "budget_micros", pa.array([-5] * f.num_rows)), "money is zero or more"),
        (lambda f: f.drop_columns("explore_multiplier_today"), "column 'explore_multiplier_today' is missing"),
    ],
)
def test_features_that_cannot_be_decided_on_are_refused(change, says):
    features, scores, arms, _ = a_day()
    with pytest.raises(ValueError, match=says):
        decide(change(features), scores, arms, SPEC, explore=Explore(step=0.1), key="k")


def test_an_unknown_key_of_the_policy_is_refused():
    with pytest.raises(ValidationError, match="largest_change"):
        decide(*a_day()[:3], {"largest_change": 0.3})
    assert all(f.description for n, f in BudgetPolicy.model_fields.items() if n != "kind")


@pytest.mark.parametrize("seed", range(5))
def test_a_plan_in_whole_cents_keeps_its_pools_and_bounds(seed):
    cent = 10_000
    features, scores, arms, arm = a_day(broken=False)
    rng = np.random.default_rng(seed)
    before = rng.integers(1, 50_000, features.num_rows) * cent
    curves = before[:, None] * np.linspace(0.5, 1.5, 5)
    worth = (curves / MICROS) ** rng.uniform(0.2, 0.9, (len(before), 1))
    scores = pa.table(
        {"entity_id": features["entity_id"], "spends": curves.astype(np.int64).tolist(), "values": worth.tolist()}
    )
    features = features.set_column(features.schema.get_field_index("budget_micros"), "budget_micros", pa.array(before))
    spec = SPEC | {"unit_micros": cent}

    decisions, certificates = decide(features, scores, arms, spec, explore=Explore(step=0.1), key="k")
    finer, finer_certificates = decide(features, scores, arms, SPEC, explore=Explore(step=0.1), key="k")

    after = decisions["after"].to_numpy()
    assert not (after % cent).any() and (finer["after"].to_numpy() % cent).any()
    assert (np.abs(after - before) <= 0.3 * before).all()
    for name in ("holdout", "champion", "challenger", "explore"):
        assert after[arm == name].sum() == before[arm == name].sum()
    lost = finer_certificates["champion"]["value"] - certificates["champion"]["value"]
    assert 0 <= lost < 1e-4 * certificates["champion"]["value"] and certificates["champion"]["gap"] >= lost - 1e-9


CENT = 10_000


def in_cents(seed: int, n: int, odd: list[int]) -> tuple[pa.Table, pa.Table, pa.Table, np.ndarray]:
    """A day in whole cents but for the lines of ``odd`` (their numbers)."""
    features, _, arms, arm = a_day(seed=seed, n=n, broken=False)
    rng = np.random.default_rng(seed)
    before = rng.integers(1, 50_000, n) * CENT
    before[odd] += rng.integers(1, CENT, len(odd))
    curves = before[:, None] * np.linspace(0.5, 1.5, 5)
    worth = (curves / MICROS) ** rng.uniform(0.2, 0.9, (n, 1)) * rng.uniform(0.5, 3, (n, 1))
    ids = features["entity_id"]
    scores = pa.table({"entity_id": ids, "spends": curves.astype(np.int64).tolist(), "values": worth.tolist()})
    return (
        features.set_column(features.schema.get_field_index("budget_micros"), "budget_micros", pa.array(before)),
        scores,
        arms,
        arm,
    )


@settings(max_examples=examples(60))
@given(st.integers(0, 2**20), st.integers(8, 60), st.data())
def test_a_few_lines_off_the_cent_grid_take_no_other_line_off_it(seed, n, data):
    odd = sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=n)))
    features, scores, arms, arm = in_cents(seed, n, odd)
    spec = SPEC | {"unit_micros": CENT}
    decisions, certificates = decide(features, scores, arms, spec, explore=Explore(step=0.1), key="k")
    before, after = (decisions[c].to_numpy() for c in ("before", "after"))
    off = before % CENT > 0
    assert not (after[~off] % CENT).any(), "a line in whole cents is decided in whole cents, whatever the others hold"
    assert not ((after - before) % CENT).any(), "what a line holds beyond whole cents stays with it"
    assert (np.abs(after - before) <= 0.3 * before + 1).all()
    for name in np.unique(arm):
        mine = arm == name
        assert after[mine].sum() == before[mine].sum() == certificates[name]["pool"]
        if 2 * off[mine].sum() <= mine.sum():
            assert (after[mine & off] == before[mine & off]).all(), "the platform would refuse it: it is kept"
    said = decisions["reasons"].to_pylist()
    for i in np.flatnonzero(off & (after == before) & (arm != "holdout")):
        assert said[i]
    perturbed = decisions["perturbation"].to_pylist()
    assert all((perturbed[i] is None) == (arm[i] != "explore") for i in range(n))


@pytest.mark.parametrize("name", ["champion", "explore"])
def test_the_one_odd_line_is_kept_and_says_why_while_the_others_move_in_cents(name):
    features, scores, arms, arm = in_cents(3, 200, [])
    line = int(np.argmax(arm == name))
    features, scores, arms, arm = in_cents(3, 200, [line])
    decisions, _ = decide(features, scores, arms, SPEC | {"unit_micros": CENT}, explore=Explore(step=0.1), key="k")
    before, after, mine = decisions["before"].to_numpy(), decisions["after"].to_numpy(), arm == name
    assert after[line] == before[line] and "not in whole steps of 0.01" in decisions["reasons"][line].as_py()[0]
    moved = after != before
    assert moved[mine].sum() > 0.5 * mine.sum() and not (after[moved] % CENT).any()


def test_where_most_budgets_are_no_whole_cents_each_moves_by_whole_cents():
    features, scores, arms, arm = a_day(broken=False)
    decisions, _ = decide(features, scores, arms, SPEC | {"unit_micros": CENT}, explore=Explore(step=0.1), key="k")
    before, after = (decisions[c].to_numpy() for c in ("before", "after"))
    assert (before % CENT > 0).mean() > 0.9
    for name in ("champion", "challenger", "explore"):
        mine = arm == name
        assert (after != before)[mine].mean() > 0.5 and after[mine].sum() == before[mine].sum()
    assert not ((after - before) % CENT).any()


def test_a_line_whose_budget_is_an_older_days_is_decided_on_but_not_explored():
    features, scores, arms, arm = a_day(broken=False)
    age = np.zeros(features.num_rows, dtype=np.int64)
    age[::2] = 3
    features = features.append_column("budget_age", pa.array(age))
    decisions, _ = decide(
        features, scores, arms, SPEC | {"spend_age": "budget_age"}, explore=Explore(step=0.1), key="k"
    )
    before, after = (decisions[c].to_numpy() for c in ("before", "after"))
    old, champion, explore = age > 0, arm == "champion", arm == "explore"
    assert (after != before)[old & champion].any() and (after != before)[~old & explore].any()
    assert (after == before)[old & explore].all() and after[explore].sum() == before[explore].sum()
    perturbation, chance = (
        decisions[c].to_numpy(zero_copy_only=False) for c in ("perturbation", "perturbation_probability")
    )
    assert (perturbation[old & explore] == 1).all() and (chance[old & explore] == 1).all(), (
        "no slope is learned from it"
    )
    assert "an older day's" in decisions["reasons"][int(np.argmax(old & explore))].as_py()[0]


def with_intervals(scores, share):
    """Scores whose intervals are so wide, as shares of the value at the middle of their curves; NaN: none."""
    middle = np.array([v[len(v) // 2] if v else np.nan for v in scores["values"].to_pylist()], dtype=float)
    low, high = middle * (1 - share / 2), middle * (1 + share / 2)
    sure = np.where(np.isnan(low), np.nan, 0.9)
    columns = {"value_low": low, "value_high": high, "confidence": sure}
    return pa.table(
        {
            **{c: scores[c] for c in scores.column_names},
            **{c: pa.array(v, from_pandas=True) for c, v in columns.items()},
        }
    )


def test_a_line_whose_interval_is_too_wide_keeps_its_budget_and_says_why():
    n, spends = 60, [80_000_000, 100_000_000, 120_000_000]
    rng = np.random.default_rng(4)
    level = rng.uniform(50, 500, n)
    names = [f"l{i:02d}" for i in range(n)]
    features = pa.table({"entity_id": names, "budget_micros": [100_000_000] * n, "explore_multiplier_today": [1.0] * n})
    values = (level[:, None] * np.array([0.9, 1.0, 1.08])).tolist()
    scores = pa.table({"entity_id": names, "spends": [spends] * n, "values": values})
    arms = pa.table({"entity_id": names, "unit": names, "arm": ["champion"] * 50 + ["holdout"] * 10,
                     "arm_probability": [0.5] * n})  # fmt: skip
    share = np.where(np.arange(n) % 3 == 0, 1.5, 0.5)
    share[1] = np.nan
    told = with_intervals(scores, share)
    plain, _ = decide(features, scores, arms, SPEC)
    off, _ = decide(features, told, arms, SPEC)
    assert off.drop_columns(["reasons"]).equals(plain.drop_columns(["reasons"])), "null: nobody is held"
    held, certificates = decide(features, told, arms, SPEC | {"largest_doubt": 1.0})
    wide = (share > 1) & (np.arange(n) < 50)
    after, before = np.array(held["after"]), np.array(held["before"])
    assert (after[wide] == before[wide]).all()
    assert (after != before)[:50][~wide[:50]].any()
    assert certificates["champion"]["movable"] == 50 - wide.sum()
    assert certificates["champion"]["spent"] == certificates["champion"]["pool"]
    rows = held.to_pylist()
    low, high = level[0] * 0.25, level[0] * 1.75
    assert rows[0]["reasons"] == [
        "Kept at 100.00: what it earns is too uncertain, the interval is wider than 100% of what is expected.",
        f"At today's budget its day is worth between {low:.2f} and {high:.2f} (90%).",
    ]
    assert rows[0]["expected_gain"] == 0.0
    assert not any("worth between" in said for said in rows[1]["reasons"])
    assert len(rows[59]["reasons"]) == 1, "a holdout line says why it is kept"
    none, _ = decide(features, told.drop_columns(["confidence"]), arms, SPEC | {"largest_doubt": 1.0})
    assert none.equals(plain)
