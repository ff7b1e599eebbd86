"""Slow hosts are named after several rounds, and only where slowness costs anything."""

from baichuan_jax.resilience.stragglers import FLOOR_SECONDS, ROUNDS, Straggler, Stragglers


def test_a_slow_process_is_named_once_after_several_rounds():
    stragglers = Stragglers()
    slow, quick = {0: 0.02, 1: 0.02, 2: 0.12, 3: 0.02}, dict.fromkeys(range(4), 0.02)
    for _ in range(ROUNDS - 1):
        assert stragglers.look(slow) == []
    assert stragglers.look(slow) == [Straggler(2, 0.12, 0.02)]
    assert stragglers.look(slow) == []
    assert stragglers.look(quick) == []
    for _ in range(ROUNDS - 1):
        assert stragglers.look(slow) == []
    assert stragglers.look(slow) == [Straggler(2, 0.12, 0.02)]


def test_slow_now_and_then_below_the_floor_or_one_of_two_is_not_named():
    stragglers = Stragglers()
    for number in range(4 * ROUNDS):
        assert stragglers.look({0: 0.02, 1: 0.02, 2: 0.12 if number % 2 else 0.02}) == []
        assert stragglers.look({0: 1e-4, 1: 1e-4, 2: 1e-4 + FLOOR_SECONDS / 2}) == []
        assert stragglers.look({0: 0.02, 1: 5.0}) == []
