"""Measures drift: all rows at least 20 times faster than Evidently on them, distances equal; false alarms and shifts found by size.

Belongs here: columns of many shapes, the comparison with Evidently as it comes, the counts. Does not: anything that the product
imports.

Run: ``python -m benchmarks.drift [--rows 1000000] [--days 30] [--sizes 200 2000 200000] [--preset-days 10] [--months 100]
[--only speed|alarms|months]``. Asked: 20 times faster with every distance within 0.002 and at most 2 GB; at most 1 false alarm in
the days at each size; every shift found within two days at 2,000 rows a day and more; in months whose days are not independent
(a common effect of each day, growth) at most 1 episode in 30 days, each with its own trailing reference, and shifts in them found.
Evidently's preset (``DataDriftPreset()``, nothing set) judges the same days of the first two parts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from data_checks import drift
from data_checks.drift import columns as drift_columns
from data_checks.drift import report as drift_report
from pipeline.lake import Lake

START = date(2026, 1, 5)
REFERENCE_DAYS = 28
CATEGORIES = (2, 3, 5, 8, 10, 12, 20, 30, 40, 6, 4, 50)
NUMERIC = (
    *(f"normal_{n}" for n in range(14)),
    *(f"lognormal_{n}" for n in range(10)),
    *(f"pareto_{n}" for n in range(5)),
    *(f"zeros_{n}" for n in range(8)),
    "poisson_0",
)
CATEGORICAL = tuple(f"category_{k}" for k in CATEGORIES)
IMPORTANT = "normal_3"
IMPORTANCES = {**dict.fromkeys((*NUMERIC, *CATEGORICAL), 0.75 / 49), IMPORTANT: 0.25}
FASTER, CLOSE, MEMORY_GB = 20.0, 0.002, 2.0
Change = Callable[[str, np.ndarray], np.ndarray]


def column(name: str, rows: int, draw: np.random.Generator) -> np.ndarray:
    """Values of one of the fifty columns: bell-shaped, heavy-tailed (Pareto 2.5), zero-inflated, counts, 2 to 50 categories."""
    kind, _, number = name.rpartition("_")
    n = int(number)
    if kind == "normal":
        return draw.normal(5 * n, 1 + n, rows)
    if kind == "lognormal":
        return draw.lognormal(1, 0.5 + n / 10, rows)
    if kind == "pareto":
        return draw.pareto(2.5, rows)
    if kind == "zeros":
        return np.where(draw.random(rows) < 0.7 + 0.03 * n, 0.0, draw.lognormal(2, 1, rows))
    if kind == "poisson":
        return draw.poisson(3, rows).astype(float)
    shares = np.ones(n) if n == 50 else 1 / np.arange(1, n + 1)
    return draw.choice(n, rows, p=shares / shares.sum()).astype(np.int8)


def day(
    number: int, rows: int, seed: int, change: Change | None = None, names: tuple[str, ...] = (*NUMERIC, *CATEGORICAL)
) -> pa.Table:
    """A day of the fifty columns; ``change`` may alter a column's values (NaN: null)."""
    draw = np.random.default_rng([seed, number])
    said = pa.array([START + timedelta(days=number)], pa.date32())
    columns: dict[str, Any] = {"day": said.take(pa.array(np.zeros(rows, np.int8)))}
    for name in names:
        values = column(name, rows, draw)
        values = values if change is None else change(name, values)
        columns[name] = pa.array(values, pa.float32() if name in NUMERIC else pa.int8(), from_pandas=True)
    return pa.table(columns)


def _nulled(name: str, values: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(values)) % 10 == 0, values, np.nan) if name == "lognormal_2" else values


def _unit(name: str, values: np.ndarray) -> np.ndarray:
    return values * 100 if name == "lognormal_4" else values


def _vanished(name: str, values: np.ndarray) -> np.ndarray:
    # the tenth of ten categories, 3.4% of the rows
    return np.where(values == 9, 0, values).astype(np.int8) if name == "category_10" else values


def _shifted(name: str, values: np.ndarray) -> np.ndarray:
    return values + 0.2 * 4 if name == IMPORTANT else values


SHIFTS: Mapping[str, tuple[str, Change]] = {
    "0.2 sd in one important column": (IMPORTANT, _shifted),
    "a vanished category (3.4%)": ("category_10", _vanished),
    "a column 90% null": ("lognormal_2", _nulled),
    "a unit change (x100)": ("lognormal_4", _unit),
}
SPEC = drift.DriftSpec(window_days=1)  # a day by itself; every floor as it comes


def judge(current: pa.Table, baseline: drift.Baseline) -> drift.Findings:
    """A day beside the reference, without Evidently's pictures."""
    return drift.measure(
        current, baseline, numeric=NUMERIC, categorical=CATEGORICAL, spec=SPEC, importances=IMPORTANCES
    )


def reference(rows: int, seed: int) -> drift.Baseline:
    """28 days, compressed."""
    table = pa.concat_tables([day(n, rows, seed) for n in range(REFERENCE_DAYS)])
    return drift.Baseline(table, numeric=NUMERIC, categorical=CATEGORICAL)


def clean_days(baseline: drift.Baseline, rows: int, seed: int, days: int) -> tuple[int, int, int]:
    """Nothing changes: alarms (days on which drift was found), days that spoke, columns flagged on any day."""
    spoke: list[bool] = []
    alarms = flagged = 0
    for n in range(REFERENCE_DAYS, REFERENCE_DAYS + days):
        found = judge(day(n, rows, seed), baseline)
        spoke.append(found.spoke)
        alarms += drift.settled(spoke, bool(found.grave), SPEC)
        flagged += sum(e["drifted"] for e in found.entries.values())
    return alarms, sum(spoke), flagged


def found_after(
    baseline: drift.Baseline, rows: int, seed: int, name: str, change: Change, within: int = 2
) -> int | None:
    """How many days of a shift it takes until drift is found and the column named; None: not within that many."""
    spoke: list[bool] = []
    for n in range(within):
        found = judge(day(REFERENCE_DAYS + n, rows, seed, change), baseline)
        spoke.append(found.spoke)
        if found.entries[name]["drifted"] and drift.settled(spoke, bool(found.grave), SPEC):
            return n + 1
    return None


def preset(before: pa.Table, now: pa.Table) -> tuple[int, bool]:
    """Evidently's preset as it comes: how many columns it calls drifted, and whether it calls the day drifted."""
    drift_report._evidently()
    import evidently
    from evidently.presets import DataDriftPreset

    numeric, categorical = _columns(now)
    definition = evidently.DataDefinition(numerical_columns=numeric, categorical_columns=categorical)
    sides = [evidently.Dataset.from_pandas(t.drop_columns(["day"]).to_pandas(), definition) for t in (now, before)]
    with np.errstate(all="ignore"):
        said = evidently.Report([DataDriftPreset()]).run(*sides).dict()
    value = said["metrics"][0]["value"]
    return int(value["count"]), bool(value["share"] >= 0.5)


def _wide(rows: int, seed: int, days: int, lake: str, table: str, shift: float) -> None:
    """``rows`` × 20 columns over ``days`` days, into Delta."""
    names = ("normal_0", "normal_5", "normal_9", "lognormal_0", "lognormal_2", "lognormal_4", "lognormal_6", "pareto_0", "zeros_0",
             "zeros_3", "zeros_6", "poisson_0", "normal_2", "normal_7", *CATEGORICAL[:5], "category_50")  # fmt: skip
    for n in range(days):
        size = rows // days + (n < rows % days)
        made = day(n + seed, size, seed, lambda name, v: v + shift * 2 if name in NUMERIC else v, names)
        typed = [f.with_type(pa.float64()) if f.name in NUMERIC else f for f in made.schema]
        made = made.cast(pa.schema([f.with_type(pa.string()) if f.name in CATEGORICAL else f for f in typed]))
        Lake(lake).replace_days(table, made, [START + timedelta(days=n + seed)])


def _columns(table: pa.Table) -> tuple[list[str], list[str]]:
    return [c for c in table.schema.names if c in NUMERIC], [c for c in table.schema.names if c in CATEGORICAL]


def _reported(sides: list[pa.Table]) -> dict[str, float | None]:
    """The report as the product makes it, with Evidently's plots."""
    numeric, categorical = _columns(sides[0])
    report = drift.drift(*sides, numeric=numeric, categorical=categorical, spec=drift.DriftSpec())
    return {n: c["distance"] for n, c in report.columns.items()}


def _as_it_comes(sides: list[pa.Table]) -> dict[str, float | None]:
    """The same metrics, plots and distances by Evidently, given every row, winsorised as the product does."""
    numeric, _ = _columns(sides[0])
    now, before = (t.drop_columns(["day"]).to_pandas() for t in sides)
    for name in numeric:
        low, high = drift_columns._bounds(np.sort(before[name].to_numpy()), drift.DriftSpec().winsorise)
        now[name], before[name] = now[name].clip(low, high), before[name].clip(low, high)
    whole = {
        n: ("numeric" if n in numeric else "categorical", drift_report._Pair(now[n], before[n], 0.1))
        for n in now.columns
    }
    return dict(drift_report._run(whole, 0.5)[1])


def _timed(lake: str, report: Callable[[list[pa.Table]], Any], times: int, answer: Any) -> None:
    """From the tables to the report, after one of 1,000 rows (imports, caches); sends (seconds, CPU seconds) of each time,
    the process's peak memory in GB (reading the tables too) and the distances."""
    sides = [Lake(lake).read(t) for t in ("current", "reference")]
    report([side.slice(0, 1_000) for side in sides])
    took = []
    for _ in range(times):
        began, busy = time.perf_counter(), time.process_time()
        found = report(sides)
        took.append((time.perf_counter() - began, time.process_time() - busy))
    answer.send((took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, found))


def speed(rows: int) -> bool:
    """Both on the same tables, one process each, in turn; whether what was asked is met."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as lake:
        _wide(rows, 100, 7, lake, "current", 0.1)
        _wide(rows, 1, 28, lake, "reference", 0.0)
        answers = []
        for report, times in ((_reported, 5), (_as_it_comes, 1)):
            mine, other = spawn.Pipe()
            process = spawn.Process(target=_timed, args=(lake, report, times, other))
            process.start()
            answers.append(mine.recv())
            process.join()
    (each, peak, distances), (their_each, their_peak, whole) = answers
    (ours, our_cpu), (theirs, their_cpu) = (np.median(t, axis=0) for t in (each, their_each))
    farthest = max(distances, key=lambda n: abs(distances[n] - whole[n]))
    apart = abs(distances[farthest] - whole[farthest])
    ok = bool(theirs / ours >= FASTER and apart <= CLOSE and peak <= MEMORY_GB)
    print(
        f"{rows:,} x {len(distances)} beside {rows:,} x {len(distances)}, from Arrow tables to the report with plots; nothing is kept "
        "from one time to the next"
    )
    print(
        f"here, median of {len(each)}   {ours:6.2f} s ({min(t for t, _ in each):.2f} to {max(t for t, _ in each):.2f}) "
        f"{our_cpu:6.2f} CPU s  {peak:.2f} GB"
    )
    print(f"Evidently, all rows {theirs:6.2f} s {their_cpu:6.2f} CPU s  {their_peak:.2f} GB")
    said = f"{theirs / ours:.1f} times faster ({their_cpu / our_cpu:.1f} by CPU; asked {FASTER:.0f})"
    print(f"{said}, farthest distance {apart:.5f} ({farthest}; asked {CLOSE}), memory asked {MEMORY_GB:.0f} GB: "
          f"{'met' if ok else 'NOT met'}")  # fmt: skip
    return ok


def alarms(sizes: list[int], days: int, preset_days: int, seed: int) -> bool:
    """Counts with nothing changed, and with each shift, by rows a day."""
    ok = True
    for rows in sizes:
        began = time.perf_counter()
        before = pa.concat_tables([day(n, rows, seed) for n in range(REFERENCE_DAYS)])
        baseline = drift.Baseline(before, numeric=NUMERIC, categorical=CATEGORICAL)
        false, spoke, flagged = clean_days(baseline, rows, seed, days)
        ok &= false <= 1
        print(
            f"{rows:>7,} rows a day, seed {seed}: {false} false alarms in {days} clean days of 50 columns; {spoke} days spoke, "
            f"{flagged} of {50 * days} columns flagged; {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        for what, (name, change) in SHIFTS.items():
            took = found_after(baseline, rows, seed + 1, name, change)
            ok &= rows < 2_000 or took is not None
            print(f"        {what}: {f'found on day {took}' if took else 'not found within two days'}", flush=True)
        if rows > 2_000:
            print("        Evidently's preset: not run at this size")
            continue
        theirs = [preset(before, day(REFERENCE_DAYS + n, rows, seed)) for n in range(preset_days)]
        print(
            f"        Evidently's preset: {sum(c > 0 for c, _ in theirs)} of {preset_days} clean days with a drifted column, "
            f"{sum(c for c, _ in theirs)} of {50 * preset_days} columns, {sum(d for _, d in theirs)} days drifted",
            flush=True,
        )
    return ok


# --- months whose days are not independent ----------------------------------------------------------------------------

AMOUNTS = tuple(f"amount_{n}" for n in range(3))
RATIOS = tuple(f"ratio_{n}" for n in range(5))
KINDS = {"kind_5": 5, "kind_12": 12}
MONTH_GAINS = {**dict.fromkeys((*AMOUNTS, *RATIOS, *KINDS), 0.75 / 9), "ratio_0": 0.25}
DAY_ROWS, MONTH_DAYS, WATCHED = 200, 30, 9
DAY_SD, DAY_RHO, GROWTH = 0.15, 0.7, 0.01
WORLDS: Mapping[str, str] = {
    "calm": "nothing moves",
    "common": f"all columns move together for a day (sd {DAY_SD}, AR {DAY_RHO})",
    "independent": f"every column has a day effect of its own (sd {DAY_SD}, AR {DAY_RHO})",
    "growth": "the three amounts grow by 1% a day",
    "growth of all": "every column of numbers grows by 1% a day",
    "more rows": "the rows grow by 1% a day",
    "weekends": "all columns move by half a deviation at weekends",
}
MONTH_SHIFTS: Mapping[str, tuple[tuple[str, ...], float, float]] = {
    "0.2 sd in the important column": (("ratio_0",), 0.2, 0.0),
    "0.5 sd in the important column": (("ratio_0",), 0.5, 0.0),
    "0.5 sd in three columns": (RATIOS[1:4], 0.5, 0.0),
    "1 sd in three columns": (RATIOS[1:4], 1.0, 0.0),
    "a unit change (x100) of one amount": (AMOUNTS[:1], 4.6, 0.0),
    "an amount 90% null": (AMOUNTS[:1], 0.0, 0.9),
}


def autocorrelated(draw: np.random.Generator, days: int, columns: int) -> np.ndarray:
    """Day effects (days x columns) with a standard deviation of DAY_SD and an autocorrelation of DAY_RHO."""
    found = draw.normal(size=(days, columns)) * DAY_SD
    for n in range(1, days):
        found[n] = DAY_RHO * found[n - 1] + np.sqrt(1 - DAY_RHO**2) * found[n]
    return found


def month(world: str, seed: int, days: int, shift: str | None = None, from_day: int = 0) -> list[pa.Table]:
    """``days`` days of a world, a table each; from ``from_day`` on with a shift.

    Amounts are lognormal (a deviation is one of their logarithm), ratios normal about 3, kinds a normal number cut into
    equal parts. The same seed draws the same days whatever the shift."""
    draw = np.random.default_rng([seed, sorted(WORLDS).index(world)])
    names = (*AMOUNTS, *RATIOS, *KINDS)
    effect = np.zeros((days, len(names)))
    if world == "common":
        effect += autocorrelated(draw, days, 1)
    elif world == "independent":
        effect += autocorrelated(draw, days, len(names))
    elif world == "weekends":
        effect += 0.5 * (np.arange(days)[:, None] % 7 >= 5)
    elif world == "growth":
        effect[:, : len(AMOUNTS)] += np.log1p(GROWTH) * np.arange(days)[:, None]
    moved, far, nulls = MONTH_SHIFTS[shift] if shift else ((), 0.0, 0.0)
    tables = []
    for n in range(days):
        rows = round(DAY_ROWS * (1 + GROWTH) ** n) if world == "more rows" else DAY_ROWS
        columns: dict[str, Any] = {"day": pa.array([START + timedelta(days=n)], pa.date32()).take(pa.array([0] * rows))}
        for at, name in enumerate(names):
            late = name in moved and n >= from_day
            x = draw.normal(size=rows) + effect[n, at] + far * late
            if name in KINDS:
                columns[name] = pa.array(np.searchsorted(_cuts(KINDS[name]), x).astype(np.int8))
                continue
            x = np.exp(x) if name in AMOUNTS else 3 + x
            x = x * (1 + GROWTH) ** n if world == "growth of all" else x
            gone = np.arange(rows) < rows * nulls * late
            columns[name] = pa.array(np.where(gone, np.nan, x), from_pandas=True)
        tables.append(pa.table(columns))
    return tables


def _cuts(parts: int) -> np.ndarray:
    from scipy.special import ndtri

    return np.asarray(ndtri(np.arange(1, parts) / parts))


def lived(days: list[pa.Table], spec: drift.DriftSpec, first: int, watched: int) -> list[bool]:
    """Whether drift was found on each of ``watched`` days from ``first`` on, as the asset judges them: trailing."""
    numeric, kinds = (*AMOUNTS, *RATIOS), tuple(KINDS)
    spoke, found = [], []
    for n in range(first, first + watched):
        cut = n + 1 - spec.window_days
        before, now = (pa.concat_tables(days[a:b]) for a, b in ((cut - spec.reference_days, cut), (cut, n + 1)))
        baseline = drift.Baseline(
            before, numeric=numeric, categorical=kinds, block=spec.window_days, winsorise=spec.winsorise
        )
        one = drift.measure(now, baseline, numeric=numeric, categorical=kinds, spec=spec, importances=MONTH_GAINS)
        spoke.append(one.spoke)
        found.append(drift.settled(spoke, bool(one.grave), spec))
    return found


def episodes(found: list[bool], apart: int) -> int:
    """How often drift is found anew: days of which no ``apart`` quiet ones lie between are one episode."""
    at = np.flatnonzero(found)
    return int(len(at) > 0) + int((np.diff(at) > apart).sum())


def month_settings() -> Mapping[str, drift.DriftSpec]:
    """The defaults, and what ships for ad_budget, over the columns of these worlds."""
    from pipeline.workflow import FOLDER, load

    shipped = load(FOLDER / "ad_budget").drift.model_copy(update={"numeric": None, "categorical": None})
    return {"default": drift.DriftSpec(), "as ad_budget": shipped}


def _lived(job: tuple[str, drift.DriftSpec, int, str | None]) -> list[bool]:
    world, spec, seed, shift = job
    start = spec.window_days + spec.reference_days
    watched, at = (MONTH_DAYS, 0) if shift is None else (WATCHED, start + spec.m)
    return lived(month(world, seed, start + MONTH_DAYS, shift, at), spec, at or start, watched)


def months(count: int, seed: int, processes: int, worlds: list[str], shifted: list[str]) -> bool:
    """Episodes of clean months in ``worlds``; how many days each shift takes in ``shifted`` ones."""
    ok = True
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for called, spec in month_settings().items():
            print(
                f"{called}: window {spec.window_days} of {spec.reference_days} days, {DAY_ROWS} rows a day, {len(MONTH_GAINS)} columns",
                flush=True,
            )
            for world in worlds:
                runs = pool.map(_lived, [(world, spec, seed + n, None) for n in range(count)])
                counts = np.array([episodes(found, spec.m) for found in runs])
                error = 1.96 * counts.std() / np.sqrt(count)
                ok &= bool(counts.mean() <= 1)
                print(
                    f"  {world} ({WORLDS[world]}): {counts.mean():.2f} episodes in {MONTH_DAYS} days (+-{error:.2f}), "
                    f"in {_share(int((counts > 0).sum()), count)} of the months any, {np.mean([sum(f) for f in runs]):.1f} days found",
                    flush=True,
                )
            for world in shifted:
                for shift in MONTH_SHIFTS:
                    runs = pool.map(_lived, [(world, spec, seed + n, shift) for n in range(count)])
                    took = [found.index(True) + 1 for found in runs if any(found)]
                    median = (
                        f"median day {np.median(took):g}, nine in ten by day {np.quantile(took, 0.9):.0f}"
                        if took
                        else "never"
                    )
                    print(
                        f"    {world}, {shift}: {_share(len(took), count)} found in {WATCHED} days, {median}",
                        flush=True,
                    )
    return ok


def _share(k: int, n: int) -> str:
    """A share with its 95% interval (Wilson)."""
    z, p = 1.96, k / n
    middle, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n) / (1 + z * z / n),
    )
    return f"{p:.0%} ({max(middle - half, 0):.0%} to {min(middle + half, 1):.0%})"


def main() -> int:
    """Print all parts; 1 where something asked for is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 2_000, 200_000])
    parser.add_argument("--preset-days", type=int, default=10)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--months", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worlds", nargs="*", default=list(WORLDS), choices=tuple(WORLDS))
    parser.add_argument("--shifted", nargs="*", default=["calm", "common"], choices=tuple(WORLDS))
    parser.add_argument("--only", choices=("speed", "alarms", "months"))
    args = parser.parse_args()
    ok = True
    if args.only in (None, "speed"):
        ok &= speed(args.rows)
    if args.only in (None, "alarms"):
        ok &= alarms(args.sizes, args.days, args.preset_days, args.seed)
    if args.only in (None, "months"):
        ok &= months(args.months, args.seed, args.processes, args.worlds, args.shifted)
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
