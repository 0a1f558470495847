"""The generated advertising world: what the sandbox and every measurement in it rely on."""

import csv
import gzip
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from delivery.sandbox.worlds.advertising import (
    CAMPAIGN_NOISE,
    CENT,
    DAY_NOISE,
    ORDER_SPREAD,
    Setting,
    World,
    explore,
    export_day,
    history,
)

DAY = date(2026, 3, 4)


def read(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("setting", ["easy", "hard"])
def test_the_same_arguments_give_the_same_bytes(setting: Setting, tmp_path: Path) -> None:
    first, second = (history(World(3, setting, 24), DAY, 6) for _ in range(2))
    for offset in range(6):
        day = DAY + timedelta(days=offset)
        assert (
            export_day(first, tmp_path / "a", day).read_bytes() == export_day(second, tmp_path / "b", day).read_bytes()
        )
    assert not first.equals(history(World(4, setting, 24), DAY, 6))


def test_a_day_does_not_depend_on_where_the_history_began() -> None:
    world = World(3, "hard", 24)
    later = history(world, DAY + timedelta(days=4), 2)
    assert history(world, DAY, 6).slice(4 * 24).combine_chunks().equals(later.combine_chunks())


@pytest.mark.parametrize("setting", ["easy", "hard"])
def test_money_is_never_negative_and_whole_cents_and_cost_stays_within_budget(setting: Setting) -> None:
    rows = history(World(5, setting), DAY, 20).to_pandas()
    assert (rows["revenue"] >= 0).all() and (rows["cost"] >= 0).all() and (rows["budget"] > 0).all()
    assert (rows["cost"] <= rows["budget"]).all()
    assert (rows["clicks"] <= rows["impressions"]).all() and (rows["clicks"] >= 0).all()
    for column in ("cost", "revenue", "budget"):
        assert np.abs(rows[column] * 100 - np.rint(rows[column] * 100)).max() < 1e-6
    assert not rows.duplicated(["date", "line_id"]).any()


def test_small_lines_have_many_days_of_zero_and_large_ones_vary_more_than_counting_explains() -> None:
    world = World(6, "hard")
    revenue = history(world, DAY, 60, explore_share=0.0)["revenue"].to_numpy().reshape(60, 200)
    small, large = world.level < np.quantile(world.level, 0.03), world.level > np.quantile(world.level, 0.9)
    assert np.mean(revenue[:, small] == 0) > 0.2
    assert np.mean(revenue[:, large] == 0) == 0
    days = [DAY + timedelta(days=d) for d in range(60)]
    expected = np.array([world.expected_value(world.incumbent_budgets(day), day) for day in days])
    assert (revenue / expected).mean() == pytest.approx(1, abs=0.03)
    counting = world._order * (1 + ORDER_SPREAD**2) / expected
    excess = ((revenue / expected - 1) ** 2 - counting)[:, np.argsort(-world.level)[:60]].mean()
    assert excess == pytest.approx(DAY_NOISE**2 + CAMPAIGN_NOISE**2, abs=0.004) and excess > 0.007


def test_response_rises_saturates_and_is_bounded() -> None:
    world = World(7, "hard", 16)
    ratios = np.linspace(0.02, 20, 400)
    for line in range(16):
        spend = np.tile(world.reference, (400, 1))
        spend[:, line] = ratios * world.reference[line]
        value = np.array([world.true_value(s, DAY) for s in spend])
        total, own = value.sum(1), value[:, line]
        assert (np.diff(own) > 0).all() and (np.diff(total) > 0).all()
        assert (np.diff(total, 2) < 0).all()
        assert own.max() < world.level[line] * world.demand(DAY)[line] / (1 - world.elasticity[line])
        neighbours = (world.campaign == world.campaign[line]) & (np.arange(16) != line)
        assert (np.diff(value[:, neighbours], axis=0) < 0).all(), "a campaign's lines share demand"
        assert np.ptp(value[:, world.campaign != world.campaign[line]], axis=0).max() == 0


def test_elasticity_at_the_reference_is_what_the_world_says() -> None:
    world = World(8, "hard", 16)
    value = world.true_value(world.reference, DAY)
    for line in range(16):
        more = world.reference.copy()
        more[line] *= 1 + 1e-6
        measured = (world.true_value(more, DAY)[line] / value[line] - 1) / 1e-6
        share = value[line] / value[world.campaign == world.campaign[line]].sum()
        crowded = 1 - world.crowding[world.campaign[line]] * share
        assert measured == pytest.approx(world.elasticity[line] * crowded, rel=1e-4)
    assert World(8, "hard").elasticity.min() >= 0.15 and World(8, "hard").elasticity.max() <= 0.95


def test_spending_nothing_earns_nothing() -> None:
    world = World(9, "easy", 16)
    rows = world.step(DAY, np.zeros(16, dtype=np.int64))
    assert rows["revenue"].to_numpy().sum() == rows["cost"].to_numpy().sum() == rows["clicks"].to_numpy().sum() == 0
    assert world.true_value(np.zeros(16), DAY).tolist() == [0.0] * 16


def test_the_hard_incumbent_equalises_average_return_and_chases_demand_the_easy_one_does_neither() -> None:
    spread, chased = {}, {}
    for setting in ("easy", "hard"):
        world = World(10, setting)
        days = [DAY + timedelta(days=d) for d in range(56)]
        budgets = np.array([world.incumbent_budgets(day) for day in days]) / 1e6
        value = np.array([world.expected_value(world.incumbent_budgets(day), day) for day in days])
        spread[setting] = np.log(value.sum(0) / budgets.sum(0)).std()
        demand = np.log([world.demand(day) for day in days])
        moved = np.log(budgets) - np.log(budgets).mean(0)
        chased[setting] = np.corrcoef(moved.ravel(), (demand - demand.mean(0)).ravel())[0, 1]
    assert spread["hard"] < 0.12 < 0.8 < spread["easy"]
    assert chased["hard"] > 0.9 and abs(chased["easy"]) < 0.1


def test_the_incumbent_goes_on_from_what_was_changed_and_forgets_exploration() -> None:
    world = World(11, "hard", 24)
    untouched, tomorrow = world.incumbent_budgets(DAY), DAY + timedelta(days=1)
    changed = untouched.copy()
    changed[3] *= 2
    rows = world.step(DAY, changed, multipliers=np.ones(24))
    ratio = world.incumbent_budgets(tomorrow, rows) / world.incumbent_budgets(tomorrow)
    assert ratio[3] == pytest.approx(2, rel=1e-3) and np.delete(ratio, 3) == pytest.approx(np.ones(23), rel=2e-2)

    explored, multiplier, probability = explore(untouched, step=0.2, share=1.0, rng=np.random.default_rng(1))
    rows = world.step(DAY, explored, multipliers=multiplier, probabilities=probability)
    assert world.incumbent_budgets(tomorrow, rows) / world.incumbent_budgets(tomorrow) == pytest.approx(
        np.ones(24), rel=2e-2
    )
    with pytest.raises(ValueError, match=r"lacks 1 lines, the first is line-0024"):
        world.incumbent_budgets(tomorrow, rows.slice(0, 23))


def test_optimum_agrees_with_an_independent_solver() -> None:
    from scipy.optimize import minimize

    for seed in range(3):
        world = World(seed, "easy", 12)
        before = world.incumbent_budgets(DAY)
        floor, cap, total = before // 2, before * 3, int(before.sum())
        found = world.optimum(DAY, total, floor, cap)
        scale = before / 1e6
        solved = minimize(
            lambda r, w=world, s=scale: -w.expected_value(r * s * 1e6, DAY).sum() / 1e3,
            np.ones(12),
            bounds=[(0.5, 3.0)] * 12,
            constraints={"type": "eq", "fun": lambda r, s=scale: (r * s).sum() / s.sum() - 1},
            options={"ftol": 1e-13, "maxiter": 500},
        )
        assert world.expected_value(found, DAY).sum() >= -solved.fun * 1e3 * (1 - 1e-7)
        assert found.sum() == total and (found >= floor).all() and (found <= cap).all()


def test_no_shift_of_money_between_two_lines_improves_the_optimum() -> None:
    world = World(12, "hard", 40)
    before = world.incumbent_budgets(DAY)
    floor, cap = before // 2, before + before // 2
    best = world.optimum(DAY, int(before.sum()), floor, cap)
    value, rng = world.expected_value(best, DAY).sum(), np.random.default_rng(0)
    for _ in range(500):
        giver, taker = rng.choice(40, 2, replace=False)
        amount = min(best[giver] - floor[giver], cap[taker] - best[taker], int(rng.integers(1, 50)) * 1_000_000)
        other = best.copy()
        other[giver] -= amount
        other[taker] += amount
        assert world.expected_value(other, DAY).sum() <= value * (1 + 1e-9)
    assert value > world.expected_value(before, DAY).sum()


def test_an_optimum_that_cannot_be_is_refused() -> None:
    world = World(1, "easy", 8)
    budgets = world.incumbent_budgets(DAY)
    with pytest.raises(ValueError, match="floors sum to"):
        world.optimum(DAY, int(budgets.sum()) - 1, budgets, budgets)
    assert (world.optimum(DAY, int(budgets.sum()) + 5, budgets, budgets) == budgets).all(), "caps bind before the total"


def test_exploration_is_fair_logged_and_keeps_the_total() -> None:
    budgets = World(13, "hard").incumbent_budgets(DAY)
    rng = np.random.default_rng(5)
    draws = [explore(budgets, step=0.2, share=0.6, rng=rng) for _ in range(2000)]
    multipliers = np.array([m for _, m, _ in draws])
    for drawn, chance in ((0.8, 0.3), (1.0, 0.4), (1.2, 0.3)):
        hit = np.isclose(multipliers, drawn)
        assert np.abs(hit.mean(0) - chance).max() < 0.06
        assert all(np.allclose(p[np.isclose(m, drawn)], chance) for _, m, p in draws)
    totals = np.array([after.sum() for after, _, _ in draws])
    assert np.abs(totals - budgets.sum()).max() <= 0.2 * budgets.max() + 200 * CENT
    assert all((after % CENT == 0).all() for after, _, _ in draws)


def test_history_logs_what_was_randomised() -> None:
    world = World(14, "hard", 24)
    rows = history(world, DAY, 3, explore_step=0.1, explore_share=0.5)
    base = np.concatenate([world.incumbent_budgets(DAY + timedelta(days=d)) for d in range(3)]) / 1e6
    assert rows["budget"].to_numpy() / base == pytest.approx(rows["explore_multiplier"].to_numpy(), abs=2e-3)
    assert set(np.round(rows["explore_multiplier"].to_numpy(), 6)) == {0.9, 1.0, 1.1}
    assert rows["explore_probability"].null_count == 0
    unexplored = history(world, DAY, 3, explore_share=0.0)
    assert unexplored["explore_probability"].null_count == 72 and set(unexplored["explore_multiplier"].to_pylist()) == {
        1.0
    }


def test_luck_does_not_depend_on_budgets_so_policies_compare_on_the_same_days() -> None:
    world = World(15, "easy", 40)
    budgets = world.incumbent_budgets(DAY)
    more = budgets.copy()
    more[7] *= 2
    plain, richer = world.step(DAY, budgets).to_pandas(), world.step(DAY, more).to_pandas()
    elsewhere = world.campaign != world.campaign[7]
    assert plain[elsewhere].equals(richer[elsewhere])
    assert richer["revenue"][7] > plain["revenue"][7]


def test_a_broken_schema_renames_revenue_and_switches_to_cents(tmp_path: Path) -> None:
    rows = history(World(16, "easy", 24), DAY, 1)
    good, broken = (
        read(export_day(rows, tmp_path / "good", DAY)),
        read(export_day(rows, tmp_path / "broken", DAY, break_schema=True)),
    )
    assert "revenue" in good[0] and "revenue" not in broken[0]
    assert [int(b["revenue_usd"]) for b in broken] == [round(float(g["revenue"]) * 100) for g in good]
    rest = [c for c in good[0] if c != "revenue"]
    assert [[g[c] for c in rest] for g in good] == [[b[c] for c in rest] for b in broken]


def test_an_export_holds_the_day_asked_for_and_an_absent_day_is_refused(tmp_path: Path) -> None:
    rows = history(World(17, "easy", 24), DAY, 3)
    tomorrow = DAY + timedelta(days=1)
    path = export_day(rows, tmp_path, tomorrow)
    written = read(path)
    assert path.read_bytes()[4:8] == bytes(4), "the gzip header holds no time of writing"
    assert {r["date"] for r in written} == {tomorrow.isoformat()} and len(written) == 24
    assert all(r["exported_at"].startswith((tomorrow + timedelta(days=1)).isoformat()) for r in written)
    with pytest.raises(ValueError, match="no rows of 2026-04-01"):
        export_day(rows, tmp_path, date(2026, 4, 1))


def test_a_new_competitor_changes_prices_mix_and_value_from_its_day_on() -> None:
    drift = DAY + timedelta(days=5)
    calm, drifted = (history(World(18, "hard", 80, drift_on=on), DAY, 10, explore_share=0.0) for on in (None, drift))
    assert calm.slice(0, 400).equals(drifted.slice(0, 400))

    def after(rows: pa.Table) -> tuple[float, float, float]:
        late = rows.slice(400).to_pandas()
        contested = late[late["format"].isin(["search", "shopping"])]
        price = contested["cost"].sum() / contested["clicks"].sum()
        return price, contested["cost"].sum() / late["cost"].sum(), contested["revenue"].sum() / contested["cost"].sum()

    (price, share, earned), (new_price, new_share, newly_earned) = after(calm), after(drifted)
    assert new_price / price == pytest.approx(1.4, rel=0.05)
    assert new_share / share == pytest.approx(0.75, rel=0.02)
    assert newly_earned / earned < 0.9


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="setting 'medium' is unknown"):
        World(1, "medium")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lines is 0"):
        World(1, "easy", 0)
    with pytest.raises(ValueError, match="budgets_micros must be 8 amounts"):
        World(1, "easy", 8).step(DAY, np.full(7, CENT))
    with pytest.raises(ValueError, match=r"step is 1\.5"):
        explore(np.full(8, CENT), step=1.5, share=0.5, rng=np.random.default_rng(0))
