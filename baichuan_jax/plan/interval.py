"""How far a prediction may be off: the same program, predicted under many assumptions.

In: a compiled program and its assumptions (rates.py). Out: seconds of a step for samples of all
assumptions, for each assumption alone at its ends, and for other networks. Each assumption is drawn
by itself. Its central value is the median: half of the samples lie between low and the value, half
between the value and high, evenly on each side. One seed serves all plans, so that two runs print
the same and a wider range never narrows an interval by luck. All samples are predicted in one pass
over the program (prediction.predict).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from baichuan_jax.hardware.accelerators import Topology
from baichuan_jax.plan.hlo import Program
from baichuan_jax.plan.prediction import predict
from baichuan_jax.plan.rates import NETWORK, RATE_NAMES, Assumption, rates_of

SAMPLES = 2000
SEED = 20261128
# Of a 90 % interval.
PERCENTILES = (5.0, 95.0)
# Gb/s a GPU: what clusters have. Each is predicted as well.
NETWORKS = (50.0, 100.0, 200.0, 400.0)
# The assumption that is no rate of the hardware: by which share the step is longer where the
# schedule does not match the real times.
SCHEDULE = "schedule"


@dataclass(frozen=True)
class Spread:
    """Seconds of a step under other assumptions than the central ones."""

    samples: np.ndarray
    """[SAMPLES]; every assumption is drawn from its range."""
    alone: dict[str, tuple[float, float]]
    """By assumption: with it at its low and at its high, and all others at their values."""
    networks: dict[float, float]
    """By Gb/s a GPU; empty for TPUs."""


def spread(
    program: Program,
    mesh: Mesh | AbstractMesh,
    topology: Topology,
    assumptions: Mapping[str, Assumption],
) -> Spread:
    """Predict a compiled step under samples of its assumptions.

    assumptions: every rate by name, and where they matter NETWORK and SCHEDULE.
    """
    draws = np.random.default_rng(SEED).random((len(assumptions), SAMPLES))
    networks = NETWORKS if NETWORK in assumptions else ()
    columns: dict[str, np.ndarray] = {}
    for place, (name, item) in enumerate(assumptions.items()):
        alone = np.full(2 * len(assumptions), float(item.value))
        alone[2 * place : 2 * place + 2] = item.low, item.high
        others = networks if name == NETWORK else (item.value,) * len(networks)
        # The quantiles of a distribution whose median is the value; a range of one number stays it.
        drawn = np.interp(draws[place], (0.0, 0.5, 1.0), (item.low, item.value, item.high))
        columns[name] = np.concatenate([alone, others, drawn])
    rates: dict[str, Any] = {name: columns[name] for name in RATE_NAMES}
    # A share of a network of half the rate is half the share of the whole one.
    if NETWORK in columns:
        gbps = columns[NETWORK] / topology.hardware.inter_node_gbps
        rates["inter_node"] = rates["inter_node"] * gbps
    predicted = predict(program, mesh, topology, replace(rates_of(assumptions), **rates))
    seconds = predicted.seconds * (1 + columns.get(SCHEDULE, np.zeros(())))
    ends, rest = np.split(seconds, [2 * len(assumptions)])
    pairs = [(float(low), float(high)) for low, high in ends.reshape(-1, 2)]
    return Spread(
        samples=rest[len(networks) :],
        alone=dict(zip(assumptions, pairs, strict=True)),
        networks=dict(zip(networks, map(float, rest), strict=False)),
    )
