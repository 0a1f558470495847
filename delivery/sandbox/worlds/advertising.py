"""A seeded advertising world: lines in campaigns, with a saturating true response to spend.

Here belong the truth (`World.true_value`, the only place that knows what spend earns), the incumbent who sets
budgets, the optimum under the truth, and the files that an advertising platform would export of it. Not here:
policies and estimates (they may see the exported rows only), servers. The choices and their sources are in
docs/world_advertising.md.
"""

import gzip
import io
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv

Floats = np.ndarray[Any, np.dtype[np.float64]]
Micros = np.ndarray[Any, np.dtype[np.int64]]
Setting = Literal["easy", "hard"]

CENT = 10_000  # micros
DELIVERED = 0.98  # mean share of a budget that is spent
DEMAND_CHASE = 0.7  # how strongly the hard incumbent's budgets follow demand (exponent)
ORDER_SPREAD = 0.7  # coefficient of variation of one order's value
DAY_NOISE = 0.10  # sd of the log of a line's own unforeseeable daily shock
CAMPAIGN_NOISE = 0.05  # the same, shared by a campaign's lines
COMPETITOR_PRICE = 1.4  # a click's price where the new competitor bids, from the drift day on
COMPETITOR_FORMATS = ("search", "shopping")

SEGMENTS = ("new", "returning", "loyal", "lapsed", "lookalike")
# format: (click-through rate, price of a click, placements)
FORMATS: dict[str, tuple[float, float, tuple[str, ...]]] = {
    "search": (0.032, 1.80, ("results_top", "results_other")),
    "shopping": (0.0086, 0.66, ("product_grid", "product_detail")),
    "display": (0.0046, 0.60, ("in_feed", "sidebar")),
    "video": (0.006, 0.50, ("pre_roll", "in_stream")),
}

ROWS = pa.schema(
    [
        ("date", pa.date32()),
        ("line_id", pa.string()),
        ("campaign", pa.string()),
        ("segment", pa.string()),
        ("format", pa.string()),
        ("placement", pa.string()),
        ("impressions", pa.int64()),
        ("clicks", pa.int64()),
        ("cost", pa.float64()),
        ("revenue", pa.float64()),
        ("budget", pa.float64()),
        ("explore_multiplier", pa.float64()),
        ("explore_probability", pa.float64()),
        ("exported_at", pa.timestamp("us")),
    ]
)
"""One row a line a day, as exported. Money in currency units; `explore_probability` is null where nothing was
randomised.
"""


@dataclass(frozen=True)
class Waves:
    """Smooth pseudo-random paths, a sum of cosines: any day can be had without the days before it. Shapes (series,
    waves).
    """

    amplitude: Floats
    period: Floats
    phase: Floats

    @classmethod
    def draw(cls, rng: np.random.Generator, series: int, sd: float, shortest: float, longest: float) -> "Waves":
        shape = (series, 4)
        amplitude = np.full(shape, sd * np.sqrt(2 / shape[1]))
        return cls(amplitude, rng.uniform(shortest, longest, shape), rng.uniform(0, 2 * np.pi, shape))

    def at(self, t: float) -> Floats:
        return np.asarray((self.amplitude * np.cos(2 * np.pi * t / self.period + self.phase)).sum(axis=1))


class World:
    """The truth about `lines` advertising lines. Everything is a pure function of the arguments: the same call gives
    the same bytes.

    Args:
        seed: Draws the lines and every day's luck. A day's luck does not depend on the budgets (common random
            numbers), so two policies can be compared on the same luck.
        setting: `easy`: budgets ignore return and stay put, returns range widely (`return_spread`), elasticities
            0.1-0.95. `hard`: average return is equal over lines (at the reference demand), budgets chase demand,
            elasticities 0.15-0.95.
        lines: How many.
        origin: The day on which trend is zero.
        return_spread: Easy only: sd of the log of lines' value per unit of spend.
        drift_on: From this day a new competitor bids on search and shopping: clicks cost more, the same spend earns
            less, and the incumbent moves budget to the other formats. None: never.
    """

    def __init__(
        self,
        seed: int,
        setting: Setting = "easy",
        lines: int = 200,
        *,
        origin: date = date(2026, 1, 1),
        return_spread: float = 1.3,
        drift_on: date | None = None,
    ) -> None:
        if setting not in ("easy", "hard"):
            raise ValueError(f"setting {setting!r} is unknown: use 'easy' or 'hard'")
        if lines < 1:
            raise ValueError(f"lines is {lines}: a world needs at least one")
        self.seed, self.setting, self.lines, self.origin, self.drift_on = seed, setting, lines, origin, drift_on
        rng = np.random.default_rng([seed, 0])
        campaigns = -(-lines // 8)
        self.campaign = np.arange(lines) % campaigns
        formats, width = list(FORMATS), len(str(lines))
        segment_of = np.arange(campaigns) % len(SEGMENTS)
        format_of = rng.integers(0, len(formats), lines)
        side = rng.integers(0, 2, lines)
        self.line_id = np.array([f"line-{i + 1:0{max(width, 4)}d}" for i in range(lines)])
        self.campaign_id = np.array([f"campaign-{c + 1:02d}" for c in self.campaign])
        self.segment = np.array(SEGMENTS)[segment_of[self.campaign]]
        self.format = np.array(formats)[format_of]
        self.placement = np.array([FORMATS[f][2][s] for f, s in zip(self.format, side, strict=True)])

        # Half of the spread of elasticities lies between segments and formats; the normal score keeps the margin
        # uniform.
        score = (
            np.sqrt(0.25) * rng.standard_normal(len(SEGMENTS))[segment_of[self.campaign]]
            + np.sqrt(0.25) * rng.standard_normal(len(formats))[format_of]
            + np.sqrt(0.5) * rng.standard_normal(lines)
        )
        ranks = (np.argsort(np.argsort(score, kind="stable"), kind="stable") + rng.uniform(0, 1, lines)) / lines
        lowest = 0.15 if setting == "hard" else 0.10
        self.elasticity: Floats = lowest + (0.95 - lowest) * ranks
        """Elasticity of a line's value to its own spend at the reference spend, its campaign's crowding held fixed."""

        size = np.exp(rng.normal(np.log(600), 0.9, lines)) * np.where(rng.uniform(size=lines) < 0.1, 0.05, 1.0)
        self.reference: Floats = np.maximum(np.round(size, 2), 5.0)
        """Spend (currency a day) at which `elasticity` holds; the incumbent's budget at the reference demand."""
        returns = np.full(lines, 2.5) if setting == "hard" else 2.5 * np.exp(return_spread * rng.standard_normal(lines))
        self.level: Floats = self.reference * returns
        """Expected value (currency a day) at the reference spend and demand."""
        self.crowding: Floats = rng.uniform(0.05, 0.20, campaigns)
        """How far a campaign's lines take value from one another: its total grows as (sum over its lines) ** (1 -
        crowding).
        """
        self._week = (rng.uniform(0.05, 0.25, campaigns), rng.uniform(0, 2 * np.pi, campaigns))
        self._trend = rng.normal(0, 0.15, lines)
        self._campaign_waves = Waves.draw(rng, campaigns, 0.10, 25, 90)
        self._line_waves = Waves.draw(rng, lines, 0.07, 20, 60)
        self._ctr = np.array([FORMATS[f][0] for f in self.format]) * np.exp(rng.normal(0, 0.25, lines))
        self._cpc = np.array([FORMATS[f][1] for f in self.format]) * np.exp(rng.normal(0, 0.25, lines))
        self._order = 90 * np.exp(rng.normal(0, 0.25, campaigns))[self.campaign]
        self._contested = np.isin(self.format, COMPETITOR_FORMATS)

    def _since_origin(self, day: date) -> int:
        return (day - self.origin).days

    def _luck(self, day: date, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, purpose, day.toordinal()])

    def _drifted(self, day: date) -> bool:
        return self.drift_on is not None and day >= self.drift_on

    def demand(self, day: date) -> Floats:
        """Factor on every line's value that day: week, trend and slow waves; 1 is the reference."""
        t = self._since_origin(day)
        swing, phase = self._week
        campaign = swing * np.cos(2 * np.pi * t / 7 + phase) + self._campaign_waves.at(t)
        out: Floats = np.exp(campaign[self.campaign] + self._line_waves.at(t) + self._trend * t / 365)
        return out

    def click_price(self, day: date) -> Floats:
        """Expected price of a click, currency."""
        price = self._cpc * (1 + 0.05 * np.cos(2 * np.pi * self._since_origin(day) / 7))
        return np.asarray(np.where(self._contested, price * COMPETITOR_PRICE, price) if self._drifted(day) else price)

    def _alone(self, spend: Floats) -> Floats:
        """Value at `spend` relative to the reference, were there no other line: r / ((1 - e) r + e), a Hill curve of
        slope one.
        """
        ratio = spend / self.reference
        return np.asarray(ratio / ((1 - self.elasticity) * ratio + self.elasticity))

    def _potential(self, day: date) -> Floats:
        pressure = np.where(self._contested, 1 / COMPETITOR_PRICE, 1.0) if self._drifted(day) else 1.0
        return np.asarray(self.level * self.demand(day) * pressure)

    def true_value(self, spend: Floats, day: date) -> Floats:
        """Expected value of every line that day, if the lines spend `spend` (both currency, shape (lines,)). The one
        place that knows.

        A line alone earns level x demand x r / ((1 - e) r + e) with r = spend / reference: increasing, concave,
        bounded, of elasticity e at r = 1. A campaign's lines share demand: with x the values alone, X their sum and
        X0 that sum at the reference spends, each line gets x (X / X0) ** -crowding. The total is concave in all
        spends jointly, so `optimum` is the global one.
        """
        potential = self._potential(day)
        value = potential * self._alone(np.asarray(spend, dtype=float))
        together, at_reference = self._by_campaign(value), self._by_campaign(potential)
        crowded = np.divide(together, at_reference, out=np.ones_like(together), where=together > 0) ** -self.crowding
        return np.asarray(value * crowded[self.campaign])

    def _by_campaign(self, x: Floats) -> Floats:
        return np.asarray(np.bincount(self.campaign, weights=x, minlength=len(self.crowding)), dtype=float)

    def expected_value(self, budgets_micros: Micros, day: date) -> Floats:
        """`true_value` when the budgets (micros, shape (lines,)) are spent as far as they usually are."""
        return self.true_value(np.asarray(budgets_micros) / 1e6 * DELIVERED, day)

    def incumbent_budgets(self, day: date, history: pa.Table | None = None) -> Micros:
        """What the people in charge set for `day` if left alone, micros, whole cents.

        Easy: the reference, with a small jitter. Hard: the reference times demand ** 0.7, as foreseen with a small
            error. After the drift day
        a quarter of the contested formats' money moves to the others. With `history` (rows as exported) they go on
        from the newest budgets in it, exploration taken out, and move each as their own plan moves between the two
            days: what a policy has changed stays changed.
        """
        plan = self._plan(day)
        if history is not None and history.num_rows:
            newest = max(history.column("date").to_pylist())
            rows = history.filter(pa.compute.equal(history.column("date"), pa.scalar(newest, pa.date32())))
            at = {line: i for i, line in enumerate(rows.column("line_id").to_pylist())}
            missing = [line for line in self.line_id.tolist() if line not in at]
            if missing:
                raise ValueError(
                    f"history of {newest} lacks {len(missing)} lines, the first is {missing[0]}: give whole days"
                )
            order = np.array([at[line] for line in self.line_id.tolist()])
            multiplier = rows.column("explore_multiplier").to_numpy()[order]
            plan = rows.column("budget").to_numpy()[order] / multiplier * plan / self._plan(newest)
        return np.maximum(np.rint(plan * 100), 1).astype(np.int64) * CENT

    def _plan(self, day: date) -> Floats:
        guess = self._luck(day, 1).normal(0, 0.03, self.lines)
        plan = self.reference * np.exp(guess)
        if self.setting == "hard":
            plan = plan * self.demand(day) ** DEMAND_CHASE
        if self._drifted(day) and self._contested.any() and not self._contested.all():
            moved = 0.25 * plan[self._contested].sum()
            plan = np.where(self._contested, 0.75 * plan, plan * (1 + moved / plan[~self._contested].sum()))
        return np.asarray(plan / DELIVERED)

    def step(
        self,
        day: date,
        budgets_micros: Micros,
        *,
        multipliers: Floats | None = None,
        probabilities: Floats | None = None,
    ) -> pa.Table:
        """One day happens under these budgets (micros, shape (lines,)); the rows (`ROWS`) that the platform exports
        of it.

        `multipliers` and `probabilities` are what the caller randomised (already contained in the budgets) and are
        only passed through; NaN or None: nothing was. Value is a compound of orders: their number Poisson around an
        over-dispersed mean, so that small lines have many days of zero. More budget under the same luck never earns a
        line less, other lines' budgets held fixed.
        """
        from scipy.special import gammaincinv, pdtrik

        budgets, luck = self._amounts(budgets_micros), self._luck(day, 2)
        uniform = luck.uniform(1e-9, 1 - 1e-9, (2, self.lines))
        normal = luck.standard_normal((4, self.lines))
        together = luck.standard_normal(len(self.crowding))[self.campaign]
        unspent = luck.beta(2, 98, self.lines)  # mean 1 - DELIVERED

        budget = budgets / 1e6
        cost = np.floor(budget * (1 - unspent) * 100) / 100
        spread = DAY_NOISE**2 + CAMPAIGN_NOISE**2
        shock = np.exp(DAY_NOISE * normal[0] + CAMPAIGN_NOISE * together - spread / 2)
        mean_orders = self.true_value(cost, day) * shock / self._order
        orders = np.where(mean_orders > 0, np.ceil(pdtrik(uniform[0], np.maximum(mean_orders, 1e-12))), 0)
        shape = orders / ORDER_SPREAD**2
        revenue = np.where(
            orders > 0, gammaincinv(np.maximum(shape, 1e-9), uniform[1]) * self._order * ORDER_SPREAD**2, 0
        )
        clicks = np.floor(cost / (self.click_price(day) * np.exp(0.05 * normal[1])))
        impressions = np.ceil(clicks / (self._ctr * np.exp(0.08 * normal[2] - 0.1)))
        exported = datetime.combine(day + timedelta(days=1), time(1, 30))
        ones = np.ones(self.lines)
        return pa.table(
            [
                pa.array([day] * self.lines, pa.date32()),
                self.line_id,
                self.campaign_id,
                self.segment,
                self.format,
                self.placement,
                impressions.astype(np.int64),
                clicks.astype(np.int64),
                cost,
                np.round(revenue, 2),
                budget,
                ones if multipliers is None else np.asarray(multipliers, dtype=float),
                pa.array(
                    np.full(self.lines, np.nan) if probabilities is None else np.asarray(probabilities, dtype=float),
                    from_pandas=True,
                ),
                pa.array([exported] * self.lines, pa.timestamp("us")),
            ],
            schema=ROWS,
        )

    def _amounts(self, budgets_micros: Micros) -> Micros:
        budgets = np.asarray(budgets_micros, dtype=np.int64)
        if budgets.shape != (self.lines,) or (budgets < 0).any():
            got = f"got shape {budgets.shape}, the least is {budgets.min(initial=0)}"
            raise ValueError(f"budgets_micros must be {self.lines} amounts >= 0, {got}")
        return budgets

    def optimum(self, day: date, total: int, floor: Micros, cap: Micros) -> Micros:
        """Budgets (micros) that maximise the day's total expected value: at most `total`, each between `floor` and
        `cap`. The truth decides.

        The campaigns' crowding enters as a price on their lines, found by fixed-point iteration; given these, a
        bisection on the shadow price of money solves all lines in closed form. The problem is concave, so what
        satisfies the first-order conditions is the optimum.
        """
        low, high = np.asarray(floor) / 1e6 * DELIVERED, np.asarray(cap) / 1e6 * DELIVERED
        if int(np.sum(floor)) > total or (low > high).any():
            got = f"floors sum to {int(np.sum(floor))} micros, the total is {total}"
            raise ValueError(f"no allocation: {got}, {int((low > high).sum())} caps are below their floor")
        money = min(total / 1e6 * DELIVERED, float(high.sum()))
        potential, e = self._potential(day), self.elasticity
        at_reference = self._by_campaign(potential)
        price = 1 - self.crowding
        spend = np.clip(self.reference, low, high)
        for _ in range(100):
            root = np.sqrt(potential * e * price[self.campaign] / self.reference)
            lower, upper = 1e-9, 1e9  # sqrt of the shadow price
            for _ in range(100):
                middle = np.sqrt(lower * upper)
                spend = np.clip(self.reference * (root / middle - e) / (1 - e), low, high)
                lower, upper = (middle, upper) if spend.sum() > money else (lower, middle)
            before = price
            together = self._by_campaign(potential * self._alone(spend))
            price = (1 - self.crowding) * (together / at_reference) ** -self.crowding
            if np.max(np.abs(price - before)) < 1e-12:
                break
        budgets = np.clip(np.floor(spend / DELIVERED * 1e6).astype(np.int64), floor, cap)
        return _hand_out(budgets, total - int(budgets.sum()), np.asarray(floor), np.asarray(cap))


def _hand_out(budgets: Micros, left: int, floor: Micros, cap: Micros) -> Micros:
    """Spread the rounding rest (micros, either sign) over the lines with room, in order."""
    room = cap - budgets if left > 0 else budgets - floor
    before = np.cumsum(room) - room
    given = np.clip(abs(left) - before, 0, room)
    return np.asarray(budgets + np.sign(left) * given)


def explore(
    budgets_micros: Micros, *, step: float, share: float, rng: np.random.Generator
) -> tuple[Micros, Floats, Floats]:
    """Randomise a share of the budgets by +-`step`: (budgets in micros, whole cents; multipliers; probability of the
    multiplier drawn).

    Lines are drawn with probability `share` each; the drawn are sorted by budget and paired with their neighbour, one
    goes up and one down by the toss of a coin. So each sign has probability one half, and the total moves by no more
    than `step` x the largest budget (plus cents), usually far less. Every line has a probability: `share` / 2 for
    either sign, 1 - `share` for the 1.
    """
    if not 0 < step < 1 or not 0 <= share <= 1:
        raise ValueError(f"step is {step}, share is {share}: step must lie between 0 and 1, share from 0 to 1")
    budgets = np.asarray(budgets_micros)
    drawn = np.flatnonzero(rng.uniform(size=len(budgets)) < share)
    drawn = drawn[np.argsort(-budgets[drawn], kind="stable")]
    coins = np.where(rng.uniform(size=-(-len(drawn) // 2)) < 0.5, 1.0, -1.0)
    sign = np.repeat(coins, 2)[: len(drawn)] * np.where(np.arange(len(drawn)) % 2, -1, 1)
    multiplier = np.ones(len(budgets))
    multiplier[drawn] = 1 + step * sign
    probability = np.where(multiplier == 1, 1 - share, share / 2)
    after = np.where(multiplier == 1, budgets, np.maximum(np.rint(budgets * multiplier / CENT), 1) * CENT)
    return after.astype(np.int64), multiplier, probability


def history(world: World, start: date, days: int, *, explore_step: float = 0.2, explore_share: float = 0.5) -> pa.Table:
    """`days` days from `start` under the incumbent, a share of lines explored each day: rows (`ROWS`) sorted by date
    and line.
    """
    tables = []
    for offset in range(days):
        day = start + timedelta(days=offset)
        budgets = world.incumbent_budgets(day)
        if explore_share > 0:
            rng = np.random.default_rng([world.seed, 3, day.toordinal()])
            budgets, multipliers, probabilities = explore(budgets, step=explore_step, share=explore_share, rng=rng)
            tables.append(world.step(day, budgets, multipliers=multipliers, probabilities=probabilities))
        else:
            tables.append(world.step(day, budgets))
    return pa.concat_tables(tables) if tables else ROWS.empty_table()


def export_day(rows: pa.Table, folder: Path, day: date, *, break_schema: bool = False) -> Path:
    """Write the rows of `day` as `advertising_<day>.csv.gz`, the same bytes for the same rows, and return the path.

    With `break_schema` the upstream team has shipped a change unannounced: `revenue` is called `revenue_usd` and
    holds whole cents.
    """
    day_rows = rows.filter(pa.compute.equal(rows.column("date"), pa.scalar(day, pa.date32())))
    if not day_rows.num_rows:
        raise ValueError(f"no rows of {day}: generate that day before exporting it")
    if break_schema:
        at = day_rows.schema.get_field_index("revenue")
        cents = np.rint(day_rows.column("revenue").to_numpy() * 100).astype(np.int64)
        day_rows = day_rows.set_column(at, "revenue_usd", pa.array(cents))
    text = io.BytesIO()
    pa.csv.write_csv(day_rows, text, pa.csv.WriteOptions(quoting_style="needed"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"advertising_{day.isoformat()}.csv.gz"
    path.write_bytes(gzip.compress(text.getvalue(), 6, mtime=0))
    return path
