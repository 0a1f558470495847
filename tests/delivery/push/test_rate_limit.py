"""Rate limit, backoff, circuit breaker and Retry-After, on a clock that only sleeping moves."""

from __future__ import annotations

import random
import threading

from delivery.push.rate_limit import Backoff, Breaker, Bucket, Pause
from tests.support.fakes import Clock


def test_a_rate_is_kept_over_any_time() -> None:
    clock = Clock()
    bucket = Bucket(10.0, monotonic=clock.monotonic, sleep=clock.sleep)
    began = clock.monotonic()
    times = []
    for _ in range(100):
        bucket.take()
        times.append(clock.monotonic() - began)
    assert abs(times[-1] - 9.0) < 0.01, "ten at once, then ten a second"
    clock.sleep(100)
    before = clock.monotonic()
    for _ in range(20):
        bucket.take()
    assert clock.monotonic() - before >= 0.999, "a long silence does not save up more than a second"


def test_a_slow_rate_allows_one_call_at_a_time() -> None:
    clock = Clock()
    bucket = Bucket(0.5, monotonic=clock.monotonic, sleep=clock.sleep)
    for _ in range(3):
        bucket.take()
    assert clock.monotonic() == 1004.0


def test_threads_share_one_rate() -> None:
    clock = Clock()
    waits: list[float] = []
    bucket = Bucket(10.0, monotonic=clock.monotonic, sleep=waits.append)
    threads = [threading.Thread(target=lambda: [bucket.take() for _ in range(10)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(waits) == 30 and abs(max(waits) - 3.0) < 0.01


def test_no_rate_never_waits() -> None:
    clock = Clock()
    Bucket(None, monotonic=clock.monotonic, sleep=clock.sleep).take()
    assert clock.monotonic() == 1000.0


def test_waits_are_drawn_below_a_bound_that_doubles() -> None:
    backoff = Backoff(0.2, 20.0, random.Random(1))
    for tried, bound in ((1, 0.2), (2, 0.4), (5, 3.2), (8, 20.0), (5000, 20.0)):
        drawn = [backoff.wait(tried) for _ in range(300)]
        assert min(drawn) >= 0 and bound * 0.9 < max(drawn) <= bound


def test_a_breaker_opens_after_failures_in_a_row_and_one_probe_decides() -> None:
    clock = Clock()
    breaker = Breaker(3, 10.0, monotonic=clock.monotonic)
    for who in ("a", "b"):
        breaker.failed(who)
    breaker.succeeded()
    for who in ("a", "b", "b", "a", "b"):
        breaker.failed(who)
    assert breaker.closed and breaker.wait() == 0
    breaker.failed("c")
    assert not breaker.closed and breaker.wait() == 10.0 and not breaker.half_open
    clock.sleep(4)
    breaker.failed("d")  # an answer to an earlier call, late
    assert breaker.wait() == 6.0
    clock.sleep(6)
    assert breaker.half_open and breaker.wait() == 0
    breaker.failed("d")
    assert breaker.wait() == 10.0 and not breaker.half_open
    clock.sleep(10)
    breaker.succeeded()
    assert breaker.closed and not breaker.half_open


def test_the_longest_pause_that_was_asked_for_is_kept() -> None:
    clock = Clock()
    pause = Pause(monotonic=clock.monotonic)
    assert pause.wait() == 0
    pause.ask(5)
    pause.ask(1)
    pause.ask(-3)
    assert pause.wait() == 5
    clock.sleep(5)
    assert pause.wait() == 0
