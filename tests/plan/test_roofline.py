"""The time of one collective, by hand: a network of 12.5 GB/s and links of 100 GB/s in a node."""

import dataclasses

import numpy as np
import pytest

from baichuan_jax.hardware.accelerators import Topology, parse_topology
from baichuan_jax.plan.rates import RATES
from baichuan_jax.plan.roofline import Collective, collective_seconds

# 200 Gb/s, and 200 GB/s of an A800's NVLink, at half their rate.
HALF = dataclasses.replace(
    RATES["a100"], inter_node=0.5, intra_node=0.5, inter_latency_us=5.0, intra_latency_us=20.0
)
HOP = 5e-6


def seconds_of(kind: str, size: float, topology: Topology, groups: np.ndarray) -> float:
    crosses = bool((groups // topology.devices_per_node != groups[:, :1] // 8).any())
    link = "inter_node" if crosses else "intra_node"
    return collective_seconds(Collective(kind, size, "?", link), groups, topology, HALF)


TWO = parse_topology("a800:2x8")
ALL = np.arange(16)[None]
RAILS = np.arange(16).reshape(2, 8).T


def test_what_all_to_all_sends_to_other_nodes_leaves_by_each_devices_own_card():
    # Half of each device's 1.6 GB is for the eight devices of the other node.
    assert seconds_of("all-to-all", 1.6e9, TWO, ALL) == pytest.approx(0.8e9 / 12.5e9 + HOP)
    assert seconds_of("all-to-all", 1.6e9, TWO, RAILS) == pytest.approx(0.8e9 / 12.5e9 + HOP)
    within = np.arange(16).reshape(2, 8)
    assert seconds_of("all-to-all", 1.6e9, TWO, within) == pytest.approx(1.4e9 / 100e9 + 2e-5)


def test_a_permute_sends_all_of_it_to_one_device():
    ring = np.stack([np.arange(16), np.roll(np.arange(16), -1)], axis=1)
    assert seconds_of("collective-permute", 1e9, TWO, ring) == pytest.approx(1e9 / 12.5e9 + HOP)
    assert seconds_of("collective-permute", 1e9, TWO, ring[:7]) == pytest.approx(0.01 + 2e-5)


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter"])
def test_a_ring_over_nodes_is_bound_by_its_cards_or_by_the_links_inside(kind):
    # Of 1.5 GB that each device passes on, an eighth is on the ring of its own card, and seven
    # eighths on those of the seven other cards.
    assert seconds_of(kind, 1.6e9, TWO, ALL) == pytest.approx(1.5e9 / 8 / 12.5e9 + HOP)
    fast = TWO.with_network(800.0, None)
    assert seconds_of(kind, 1.6e9, fast, ALL) == pytest.approx(1.5e9 * 7 / 8 / 100e9 + HOP)
    # One device a node: nothing goes over the links inside.
    assert seconds_of(kind, 1.6e9, fast, RAILS) == pytest.approx(0.8e9 / 50e9 + HOP)


def test_hops_of_a_ring_are_those_between_nodes_and_twice_for_a_sum():
    topology = parse_topology("a800:128x8")
    rails = np.arange(1024).reshape(128, 8).T
    passed = 1.28e9 * 127 / 128
    gathered = seconds_of("all-gather", 1.28e9, topology, rails)
    assert gathered == pytest.approx(passed / 12.5e9 + 127 * HOP)
    summed = seconds_of("all-reduce", 1.28e9, topology, rails)
    assert summed == pytest.approx(2 * passed / 12.5e9 + 254 * HOP)
    # A small sum takes a tree of 7 levels, up and down, with four times a hop's time; a small
    # gather has only the ring.
    small = seconds_of("all-reduce", 128.0, topology, rails)
    assert small == pytest.approx(2 * 7 * 4 * HOP, rel=1e-3)
    assert seconds_of("all-gather", 128.0, topology, rails) == pytest.approx(127 * HOP, rel=1e-3)


def test_more_bytes_never_take_less_time():
    """No jump where NCCL changes from a tree to a ring."""
    topology = parse_topology("a800:512x8")
    rails = np.arange(4096).reshape(512, 8).T
    sizes = np.geomspace(1e3, 1e10, 500)
    times = np.array([seconds_of("all-reduce", size, topology, rails) for size in sizes])
    assert (np.diff(times) > 0).all()
    assert (times[1:] / times[:-1]).max() < sizes[1] / sizes[0] + 1e-9
