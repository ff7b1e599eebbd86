"""Predictions for many rates at once, and the interval that the assumptions' ranges make of them.

The schedules are written by hand. The oracle of a sample is the prediction of its numbers alone.
"""

import dataclasses

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from baichuan_jax.config.schema import ConfigError
from baichuan_jax.hardware.accelerators import parse_topology
from baichuan_jax.plan import __main__ as plan_command
from baichuan_jax.plan import hlo, interval
from baichuan_jax.plan.interval import SCHEDULE, spread
from baichuan_jax.plan.prediction import predict, slowest_of
from baichuan_jax.plan.rates import (
    ASSUMPTIONS,
    MEASURED_RANGE,
    NETWORK,
    RATE_NAMES,
    RATES,
    Assumption,
    Rates,
    assumptions_for,
    rates_for,
)
from baichuan_jax.sharding import AXES

# Both links at once, a loop whose sum ends in it, products, traffic, and a synchronous gather.
PROGRAM = """HloModule step, is_scheduled=true

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%turn (state: (f32[1000,1000])) -> (f32[1000,1000]) {
  %state = (f32[1000,1000]{1,0}) parameter(0)
  %b = f32[1000,1000]{1,0} get-tuple-element(%state), index=0
  %start = f32[1000,1000]{1,0} all-reduce-start(%b), replica_groups={{0,2},{1,3}}, to_apply=%sum
  %product = f32[1000,1000]{1,0} dot(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %added = f32[1000,1000]{1,0} add(%product, %b)
  %done = f32[1000,1000]{1,0} all-reduce-done(%start)
  ROOT %next = (f32[1000,1000]{1,0}) tuple(%added)
}

%more (state: (f32[1000,1000])) -> pred[] {
  %again = (f32[1000,1000]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: f32[1000,1000]) -> (f32[1000,1000]) {
  %a = f32[1000,1000]{1,0} parameter(0)
  %scatter = f32[1000,1000]{1,0} all-reduce-start(%a), replica_groups={{0,1},{2,3}}, to_apply=%sum
  %first = (f32[1000,1000]{1,0}) tuple(%a)
  %loop = (f32[1000,1000]{1,0}) while(%first), condition=%more, body=%turn, BACKEND
  %scattered = f32[1000,1000]{1,0} all-reduce-done(%scatter)
  %gather = f32[2000,1000]{1,0} all-gather(%a), replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %last = (f32[1000,1000]{1,0}) get-tuple-element(%loop), index=0
}
""".replace("BACKEND", 'backend_config={"known_trip_count":{"n":"3"}}')
CLUSTER = parse_topology("a800:2x2")


def mesh_of(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(name, 1) for name in AXES), AXES)


MESH = mesh_of(data=2, fsdp=2)


def spread_of(assumptions: dict[str, Assumption], topology=CLUSTER) -> interval.Spread:
    return spread(hlo.parse(PROGRAM), MESH, topology, assumptions)


def test_arrays_of_rates_are_predicted_as_each_of_their_samples():
    rng, program = np.random.default_rng(0), hlo.parse(PROGRAM)
    rates = {name: rng.uniform(0.05, 1.0, 50) for name in RATE_NAMES}
    rates["matmul"] = rng.uniform(0.002, 0.1, 50)
    found = predict(program, MESH, CLUSTER, Rates(**rates))
    # Samples of both kinds: the loop's sum is hidden, and it is waited for.
    assert len(np.unique(found.collectives[1].exposed_seconds > 0)) == 2
    for place in range(50):
        alone = {name: float(values[place]) for name, values in rates.items()}
        one = predict(program, MESH, CLUSTER, Rates(**alone))
        for name in ("seconds", "exposed_seconds", "contention_seconds", "memory_seconds"):
            assert getattr(one, name) == getattr(found, name)[place]
        assert [item.seconds for item in one.collectives] == [
            item.seconds[place] for item in found.collectives
        ]


def test_one_array_among_numbers_is_enough():
    program, rates = hlo.parse(PROGRAM), RATES["a100"]
    shares = np.array([0.2, rates.intra_node])
    found = predict(program, MESH, CLUSTER, dataclasses.replace(rates, intra_node=shares))
    assert found.seconds[1] == predict(program, MESH, CLUSTER, rates).seconds < found.seconds[0]


def test_the_slowest_of_several_devices_is_later_than_one():
    """Closed forms of the expected maximum of 2 and 3, and the table of 1,000 (Harter 1961)."""
    assert slowest_of(1) == pytest.approx(0, abs=1e-9)
    assert slowest_of(2) == pytest.approx(1 / np.sqrt(np.pi), abs=1e-6)
    assert slowest_of(3) == pytest.approx(3 / (2 * np.sqrt(np.pi)), abs=1e-6)
    assert slowest_of(1000) == pytest.approx(3.24144, abs=1e-5)


@pytest.mark.parametrize(("name", "standard_deviations"), [("2x2", 0), ("1x8", 0), ("128x8", 1.82)])
def test_stragglers_cost_what_a_node_of_eight_does_not_have(name, standard_deviations):
    program, topology = hlo.parse(PROGRAM), parse_topology(f"a800:{name}")
    rates = dataclasses.replace(RATES["a100"], straggler=0.0)
    mesh = mesh_of(data=topology.num_devices // 2, fsdp=2)
    before = predict(program, mesh, topology, rates)
    after = predict(program, mesh, topology, dataclasses.replace(rates, straggler=0.01))
    added = after.seconds - before.seconds
    assert added == pytest.approx(0.01 * standard_deviations * before.seconds, rel=5e-3)
    assert after.straggler_seconds == pytest.approx(added)
    assert before.straggler_seconds == 0


@pytest.mark.parametrize("kind", ASSUMPTIONS)
def test_every_default_lies_in_its_range_and_has_a_source(kind):
    assert set(ASSUMPTIONS[kind]) == set(RATE_NAMES)
    for item in ASSUMPTIONS[kind].values():
        assert item.low <= item.value <= item.high
        assert item.source
    assert dataclasses.asdict(RATES[kind]) == {
        name: item.value for name, item in ASSUMPTIONS[kind].items()
    }


def test_the_interval_is_the_same_each_time_and_contains_the_point():
    assumptions = assumptions_for(CLUSTER) | {SCHEDULE: Assumption(0.0, 0.0, 0.06, "by hand")}
    found, again = spread_of(assumptions), spread_of(assumptions)
    assert (found.samples == again.samples).all()
    point = predict(hlo.parse(PROGRAM), MESH, CLUSTER, rates_for(CLUSTER)).seconds
    low, high = np.percentile(found.samples, interval.PERCENTILES)
    assert low < point < high
    # Alone at its value, an assumption changes nothing.
    assert found.alone[SCHEDULE][0] == found.networks[200.0] == point
    assert found.alone[SCHEDULE] == (point, pytest.approx(1.06 * point))


def test_a_wider_range_widens_the_interval():
    narrow = assumptions_for(CLUSTER)
    wide = narrow | {"inter_node": narrow["inter_node"]._replace(low=0.3, high=1.0)}
    ends = [np.percentile(spread_of(each).samples, interval.PERCENTILES) for each in (narrow, wide)]
    assert ends[1][0] < ends[0][0] < ends[0][1] < ends[1][1]


def test_given_rates_have_no_range_and_measured_ones_a_small_one():
    given = dataclasses.asdict(rates_for(CLUSTER)) | {NETWORK: 200.0}
    fixed = assumptions_for(CLUSTER, measured={"matmul": 0.5}, given=given)
    assert all(item == (given[name],) * 3 + ("given",) for name, item in fixed.items())
    assert np.ptp(spread_of(fixed).samples) == 0
    measured = assumptions_for(CLUSTER, measured={"matmul": 0.5})["matmul"]
    assert measured.value == 0.5
    ends = [0.5 * (1 - MEASURED_RANGE), 0.5 * (1 + MEASURED_RANGE)]
    assert [measured.low, measured.high] == pytest.approx(ends)
    assert "measured" in measured.source


@pytest.mark.parametrize("kind", ["a800:2x2", "h100:2x2"])
@pytest.mark.parametrize("how", ["measured", "given"])
def test_stragglers_belong_to_the_network_they_were_fitted_with(kind, how):
    topology = parse_topology(kind)
    high = assumptions_for(topology)["straggler"].high
    found = assumptions_for(topology, **{how: {"inter_node": 0.8}})["straggler"]
    assert found[:3] == (0, 0, high)
    assert "fitted with inter_node" in found.source
    # Theirs is kept, and without another network's share so is the default.
    both = {"inter_node": 0.8, "straggler": 0.01}
    assert assumptions_for(topology, **{how: both})["straggler"].value == 0.01
    for other in (None, {NETWORK: 50.0}, {"matmul": 0.7}):
        kept = assumptions_for(topology, **{how: other})["straggler"]
        assert kept == ASSUMPTIONS[topology.hardware.name.replace("a800", "a100")]["straggler"]


def test_a_tpus_stragglers_were_fitted_with_nothing():
    topology = parse_topology("v5p:2x2")
    found = assumptions_for(topology, given={"inter_node": 0.8})["straggler"]
    assert found == ASSUMPTIONS["tpu"]["straggler"]


def test_a_network_is_predicted_as_a_plan_for_it_would_be():
    found = spread_of(assumptions_for(CLUSTER))
    for gbps, seconds in found.networks.items():
        topology = CLUSTER.with_network(gbps, None)
        one = predict(hlo.parse(PROGRAM), MESH, topology, rates_for(topology))
        assert seconds == pytest.approx(one.seconds, rel=1e-12)
    # TPUs have none.
    tpu = parse_topology("v5p:2x2")
    assert NETWORK not in assumptions_for(tpu)
    assert spread_of(assumptions_for(tpu), tpu).networks == {}


def test_a_nodes_network_is_that_of_its_gpus_together():
    topology = parse_topology("a800:2x8")
    assert topology.with_network(None, 800.0) == topology.with_network(100.0, None)
    assert topology.with_network(100.0, None).node_gbps == 800
    assert topology.with_network(None, None).node_gbps == 1600


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a800:2x8", "inter_node_gbps=200", "node_gbps=1600"], "are one number"),
        (["v5p:4x4x8", "node_gbps=1600"], "without a network"),
        (["v5p:4x4x8", "inter_node_gbps=200"], "without a network"),
        (["a800:2x8", "node_gbps=4"], r"node_gbps=4 is 0\.5 Gb/s a GPU"),
        (["a800:2x8", "inter_node_gbps=2e11"], r"from 1 to 10,000; the unit is 10\^9 bits"),
    ],
)
def test_a_network_that_cannot_be_meant_is_refused(options, message):
    config = "--config=configs/baichuan_7b_a800.yaml"
    topology, *network = options
    argv = [config, f"--topology={topology}", *(f"--hardware.{item}" for item in network)]
    with pytest.raises(ConfigError, match=message):
        plan_command.main(argv)
