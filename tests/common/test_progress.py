"""A run over many days says which stage and day it is at; a run whose output is for a machine does not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import dagster as dg
import pytest
from typer.testing import CliRunner

from common import progress


@pytest.fixture
def home(ads: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    bench = ads.copy(tmp_path / "home")
    monkeypatch.setenv("SIGNALBOX_HOME", str(bench.root))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster"))
    yield bench


@pytest.mark.parametrize("as_json", [False, True])
def test_a_range_of_days_shows_where_it_is(home: Any, as_json: bool) -> None:
    from orchestration.cli.command import app

    first, last = home.days[-3], home.days[-1]
    clock = f"{last + timedelta(days=1)}T04:00:00"
    asked = ["run", "ad_budget", "prepare", "--since", str(first), "--day", str(last), "--now", clock]
    ran = CliRunner().invoke(app, [*asked, "--json"] if as_json else asked)
    assert ran.exit_code == 0, ran.output
    told = re.findall(r"^(?:events: \w+(?: \w+)?|features|outcomes) \d+/3 .*$", ran.stderr, re.M)
    if as_json:
        assert not told and json.loads(ran.stdout)
        return
    assert f"features 1/3 {first}" in told and f"outcomes 1/3 {first}" in told
    assert any(line.startswith("events: files read 1/3") for line in told)


def test_each_tells_of_every_day_in_turn_and_gives_it_on() -> None:
    heard: list[progress.Step] = []
    with progress.heard_by(heard.append):
        assert list(progress.each("features", [("a", 1), ("b", 2)], 2)) == [("a", 1), ("b", 2)]
    assert heard == [progress.Step("features", 1, 2, "a"), progress.Step("features", 2, 2, "b")]
    assert list(progress.each("features", ["c"], 1)) == ["c"] and len(heard) == 2, "nobody listens any more"


def test_a_stage_tells_it_from_within_a_run() -> None:
    heard: list[progress.Step] = []

    @dg.op
    def work() -> None:
        for _ in progress.each("work", range(3), 3):
            pass

    @dg.job(executor_def=dg.in_process_executor)
    def job() -> None:
        work()

    with progress.heard_by(heard.append):
        assert job.execute_in_process().success
    assert [step.number for step in heard] == [1, 2, 3]
