"""The circuit breaker against its definition, under any order of calls, ends and time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.gateway.clients.breaker import CircuitBreaker, Permit

THRESHOLD, PAUSE = 3, 10.0


class Breaking(RuleBasedStateMachine):
    """What must hold of calls that overlap: at most one probe, never a call during the pause."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = CircuitBreaker(THRESHOLD, PAUSE)
        self.now = 0.0
        self.under_way: list[Permit] = []
        self.opened_at: float | None = None

    @rule(seconds=st.floats(0, 2 * PAUSE))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def call(self) -> None:
        was_open = self.breaker.open
        permit = self.breaker.enter(self.now)
        if permit is not None:
            self.under_way.append(permit)
            assert permit is (Permit.PROBE if was_open else Permit.CALL)
        if self.opened_at is not None and self.now < self.opened_at + PAUSE:
            assert permit is None

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), succeeded=st.sampled_from([True, False, None]))
    def end(self, data: st.DataObject, succeeded: bool | None) -> None:
        index = data.draw(st.integers(0, len(self.under_way) - 1))
        permit = self.under_way.pop(index)
        was_open = self.breaker.open
        self.breaker.leave(permit, succeeded, self.now)
        if succeeded:
            assert not self.breaker.open
        if permit is Permit.PROBE and succeeded is False:
            assert self.breaker.open
        newly = self.breaker.open and (not was_open or (permit is Permit.PROBE and succeeded is False))
        self.opened_at = self.now if newly else self.opened_at if self.breaker.open else None

    @invariant()
    def one_probe(self) -> None:
        assert self.under_way.count(Permit.PROBE) <= 1


TestBreaking = Breaking.TestCase
TestBreaking.settings = settings(max_examples=200, deadline=None)


@given(st.lists(st.booleans(), max_size=40))
def test_it_opens_after_so_many_failures_in_a_row_and_no_sooner(outcomes: list[bool]) -> None:
    breaker = CircuitBreaker(THRESHOLD, PAUSE)
    in_a_row = 0
    for succeeded in outcomes:
        permit = breaker.enter(0.0)
        assert (permit is None) == (in_a_row >= THRESHOLD)
        if permit is None:
            return
        breaker.leave(permit, succeeded, 0.0)
        in_a_row = 0 if succeeded else in_a_row + 1


def opened() -> CircuitBreaker:
    breaker = CircuitBreaker(1, PAUSE)
    permit = breaker.enter(0.0)
    assert permit is Permit.CALL
    breaker.leave(permit, False, 0.0)
    assert breaker.open
    return breaker


def test_one_probe_after_the_pause_decides() -> None:
    for succeeds in (True, False):
        breaker = opened()
        assert breaker.enter(PAUSE - 0.01) is None
        assert breaker.enter(PAUSE) is Permit.PROBE
        assert breaker.enter(PAUSE + 100) is None  # one at a time
        breaker.leave(Permit.PROBE, succeeds, PAUSE + 100)
        assert breaker.open is not succeeds
        assert breaker.enter(PAUSE + 101) is (Permit.CALL if succeeds else None)


def test_a_probe_that_told_nothing_leaves_it_to_the_next() -> None:
    breaker = opened()
    assert breaker.enter(PAUSE) is Permit.PROBE
    breaker.leave(Permit.PROBE, None, PAUSE + 1)
    assert breaker.open
    assert breaker.enter(PAUSE + 1) is Permit.PROBE
