"""What a supervisor does while its launch runs: every case of a pure function."""

import math

import pytest

from baichuan_jax.resilience.policy import REJOIN_SECONDS
from baichuan_jax.resilience.waiting import (
    EXIT_SECONDS,
    PARTING_SECONDS,
    Action,
    Seen,
    Status,
    next_action,
)

HERE = frozenset({0, 1})
NOTHING = Action()


def play(*moments: tuple[float, Status]) -> list[Action]:
    """The actions of a supervisor that sees these at these times."""
    seen, actions = Seen(), []
    for now, status in moments:
        action, seen = next_action(status, seen, now)
        actions.append(action)
    return actions


def test_while_all_run_nothing_happens_and_once_none_runs_the_wait_is_over():
    assert play((0.0, Status(HERE)), (1e6, Status(HERE))) == [NOTHING] * 2
    assert play((0.0, Status(frozenset(), codes=(0, 0)))) == [Action(done=True)]
    # A host without processes: the coordinator was lost before it could start them.
    assert play((0.0, Status(frozenset()))) == [Action(done=True)]


@pytest.mark.parametrize("code", [1, 70, 76, 77, 130, -9, -6])
def test_after_a_failure_anywhere_the_others_get_a_while_and_are_killed(code):
    failed = Status(HERE, codes=(code,))
    moments = [(100.0, failed), (100.0 + EXIT_SECONDS, failed), (100.1 + EXIT_SECONDS, failed)]
    assert play(*moments) == [NOTHING, NOTHING, Action(kill=HERE)]


def test_the_while_begins_with_the_first_failure():
    one, two = Status(HERE, codes=(76,)), Status(HERE, codes=(76, 70))
    moments = [(0.0, one), (EXIT_SECONDS - 1, two), (EXIT_SECONDS + 1, two)]
    assert play(*moments) == [NOTHING, NOTHING, Action(kill=HERE)]


@pytest.mark.parametrize("code", [0, 75])
def test_after_a_good_end_the_others_get_longer(code):
    good = Status(HERE, codes=(code,))
    moments = [(0.0, good), (EXIT_SECONDS + 1, good), (PARTING_SECONDS + 1, good)]
    assert play(*moments) == [NOTHING, NOTHING, Action(kill=HERE)]


def test_a_failure_after_a_good_end_shortens_the_while():
    moments = [(0.0, Status(HERE, codes=(75,))), (5.0, Status(HERE, codes=(75, 70)))]
    moments += [(6.0 + EXIT_SECONDS, Status(HERE, codes=(75, 70)))]
    assert play(*moments) == [NOTHING, NOTHING, Action(kill=HERE)]


def test_a_silent_process_is_killed_at_once_but_only_where_the_launch_has_failed():
    silent = frozenset({1, 7})  # 7 has ended meanwhile
    assert play((0.0, Status(HERE, silent=silent))) == [NOTHING]
    assert play((0.0, Status(HERE, silent=silent, codes=(0,)))) == [NOTHING]
    (action,) = play((0.0, Status(HERE, silent=silent, codes=(76,))))
    assert action == Action(kill=frozenset({1}))


def test_more_hosts_must_stay_ready_before_the_launch_is_asked_to_grow_and_it_is_asked_once():
    ready = Status(HERE, can_grow=True)
    later = [REJOIN_SECONDS - 1, REJOIN_SECONDS + 1, REJOIN_SECONDS + 2, 1000.0]
    actions = play((0.0, ready), *[(now, ready) for now in later])
    assert actions == [NOTHING, NOTHING, Action(grow=True), NOTHING, NOTHING]


def test_hosts_that_go_away_again_begin_the_count_anew():
    ready, alone = Status(HERE, can_grow=True), Status(HERE)
    moments = [(0.0, ready), (4.0, alone), (5.0, ready), (5.0 + REJOIN_SECONDS, ready)]
    assert play(*moments) == [NOTHING] * 4


def test_a_launch_that_ends_is_not_asked_to_grow():
    ending = Status(HERE, codes=(75,), can_grow=True)
    assert play((0.0, ending), (REJOIN_SECONDS + 1, ending)) == [NOTHING] * 2


def test_what_was_asked_for_stays_asked_for():
    ready = Status(HERE, can_grow=True)
    _, seen = next_action(ready, Seen(growable=0.0), REJOIN_SECONDS + 1)
    assert seen.growable == math.inf
    _, seen = next_action(Status(HERE), seen, REJOIN_SECONDS + 2)
    assert seen.growable == math.inf
