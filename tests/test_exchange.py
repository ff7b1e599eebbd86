"""What replicas exchange in a step: the numbers are one device's, and each thing goes once."""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build
from test_step import assert_same, initial_state, with_settings

from baichuan_jax.config.schema import Config, MeshConfig
from baichuan_jax.data.loader import document_arrays
from baichuan_jax.exchange import sum_gradients
from baichuan_jax.plan import hlo
from baichuan_jax.plan.roofline import axes_of
from baichuan_jax.resilience.causes import BadHost
from baichuan_jax.resilience.digests import compare_digests
from baichuan_jax.sharding import REPLICAS, Layout, make_mesh
from baichuan_jax.step import Steps

# Meshes are (data, fsdp, context, tensor, state).
ONE = (1, 1, 1, 1)
ROWS, LENGTH = 24, 32


def configured(config: Config, *, masked: bool = False, micro: int | None = None, **model):
    """tiny_config with 24 rows a step, which 1 to 4 micro-batches divide."""
    return with_settings(
        config,
        model=model,
        data={"document_mask": masked},
        train={
            "global_batch_size": ROWS,
            "context_length": LENGTH,
            "micro_batch_size": micro,
        },
        optimizer={"eps": 1e-2},  # a large one keeps AdamW from magnifying roundings
    )


def accumulated(config: Config, shape: tuple[int, ...], micro_batches: int) -> Config:
    """The configuration whose step has so many micro-batches on this mesh."""
    data, fsdp, _, _, *state = shape
    rows = ROWS // (data * fsdp * math.prod(state)) // micro_batches
    return with_settings(config, train={"micro_batch_size": rows})


@functools.cache
def batches() -> list[dict[str, np.ndarray]]:
    """Arrays [24, T] for two steps; documents end at token 3, and some labels are ignored."""
    rows = np.random.default_rng(5).integers(0, 512, (2, ROWS, LENGTH + 1)).astype(np.int32)
    rows[rows % 11 == 0] = 3
    found = []
    for step in rows:
        labels = step[:, 1:].copy()
        labels[0, :5] = labels[-1, -9:] = -100
        found.append({"inputs": step[:, :-1], "labels": labels, **document_arrays(step[:, :-1], 3)})
    return found


def put(config: Config, steps: Steps, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch in micro-batches on the mesh."""
    accumulation = config.accumulation_steps(config.mesh)
    return {
        name: jax.device_put(batch[name].reshape(accumulation, -1, LENGTH), steps.batch_sharding)
        for name in steps.batch_shapes
    }


def trained(config: Config, shape: tuple[int, ...]):
    """(loss, norm) of two steps, and the parameters after them."""
    initial = initial_state(config.model)
    config, steps = build(config, shape)
    state = jax.device_put(initial, steps.state_shardings)
    curve = []
    for batch in batches():
        state, metrics = steps.train(state, put(config, steps, batch), steps.request())
        curve.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(curve), jax.device_get(state.params)


@pytest.fixture(scope="module")
def on_one_device():
    """What one device makes of a configuration, by what changes its numbers."""
    found = {}

    def get(config: Config):
        key = (config.model.num_layers, config.data.document_mask)
        if key not in found:
            found[key] = trained(config, ONE)
        return found[key]

    return get


STATES = [(1, 1, 1, 1, 2), (1, 1, 1, 1, 4), (1, 1, 1, 1, 8)]
MIXED = [
    *((2, 1, 1, 1, 2), (1, 2, 1, 1, 2), (1, 1, 2, 1, 2), (1, 1, 1, 2, 2), (2, 2, 1, 1, 2)),
    *((1, 2, 1, 2, 2), (1, 1, 2, 2, 2), (2, 1, 2, 1, 2), (1, 2, 1, 1, 4), (2, 1, 1, 1, 4)),
]
COPIES = [(4, 1, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1), (2, 1, 1, 2)]
# (mesh, micro-batches, blocks, scan_layers, remat, documents)
USUAL = [
    ((2, 1, 1, 1, 2), 3, 3, False, "none", True),
    ((1, 2, 1, 2, 2), 2, 2, True, "none", False),
    ((1, 1, 1, 1, 4), 1, 1, False, "full", False),
]
EVERY = [
    *((shape, count, 3, False, "none", False) for shape in STATES[:2] for count in (1, 2, 3)),
    *((shape, count, 2, True, "full", True) for shape in STATES[:2] for count in (1, 2, 3)),
    *((STATES[2], count, 2, scan, "none", False) for count in (1, 3) for scan in (True, False)),
    *((STATES[0], 4, 2, scan, "none", False) for scan in (True, False)),
    *((shape, 3, 2, scan, "none", True) for shape in MIXED for scan in (True, False)),
    *((shape, 1, 3, False, "full", False) for shape in MIXED),
    # Copies alone: all-reduces instead of gathers and scatters.
    *((shape, count, 3, False, "none", False) for shape in COPIES for count in (1, 2, 3)),
    *((COPIES[0], count, 2, True, "full", False) for count in (2, 3)),
    # Without a second or third block nothing waits for one.
    *(
        (shape, count, blocks, False, "none", False)
        for shape in (STATES[0], COPIES[1], (1, 4, 1, 1))
        for count in (1, 2)
        for blocks in (1, 2)
    ),
]


@pytest.mark.parametrize(
    ("shape", "micro_batches", "blocks", "scan", "remat", "masked"),
    [
        *USUAL,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in USUAL),
    ],
    ids=str,
)
def test_what_is_exchanged_gives_the_single_device_loss_gradients_and_parameters(
    tiny_config, on_one_device, shape, micro_batches, blocks, scan, remat, masked
):
    model = {"num_layers": blocks}
    config = configured(tiny_config, masked=masked, scan_layers=scan, remat=remat, **model)
    got = trained(accumulated(config, shape, micro_batches), shape)
    # Of unrolled blocks the norm is summed block by block: 4e-6 apart on one device alone, too.
    wanted = on_one_device(configured(tiny_config, masked=masked, **model))
    assert_same(got, wanted, rtol=1e-5)


def summed(shape: tuple[int, ...], sum_dtype: str, rows: np.ndarray) -> np.ndarray:
    """The gradient of sum(rows * w) for w, whose own type is bfloat16: a sum of the rows alone."""
    config = MeshConfig(*shape)
    layout = Layout(make_mesh(config, jax.devices()[: math.prod(config.shape)]), (), sum_dtype)
    axes = {"layers": [{"w": ("embed", "mlp")}]}

    def loss_sum(weights, batch, batch_axes, exchange):
        added = exchange.added and exchange.added["layers"][0]
        block = exchange.arrive(weights["layers"][0], added)
        loss = jnp.sum(batch["labels"].reshape(-1, *block["w"].shape) * block["w"])
        return loss, {"layers": [block]}

    params = {"layers": [{"w": jnp.ones((16, LENGTH // 16))}]}
    add_up = functools.partial(sum_gradients, loss_sum, layout=layout, dtype=jnp.bfloat16)
    call = jax.jit(lambda params, batch: add_up(params, axes, batch)[1])
    gradient = call(params, {"labels": rows})["layers"][0]["w"]
    assert gradient.dtype == jnp.float32
    return np.asarray(gradient).ravel()


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (1, 1, 1, 1, 8), (2, 1, 1, 1, 4)], ids=str)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_are_summed_in_the_type_that_is_set(shape, micro_batches):
    """Between replicas; the sum over a replica's own micro-batches is float32 always."""
    rows = np.random.default_rng(2).normal(size=(micro_batches, ROWS, LENGTH)).astype(np.float32)
    wanted = rows.sum((0, 1), dtype=np.float64)
    error = lambda found: np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error(summed(shape, "float32", rows)) < 1e-6
    assert 1e-4 < error(summed(shape, "bfloat16", rows)) < 2e-2  # bfloat16 keeps 8 bits


@pytest.mark.parametrize(
    ("shape", "scan"),
    [
        (ONE, False),
        pytest.param(ONE, True, marks=pytest.mark.slow),
        pytest.param((2, 2, 1, 1, 2), False, marks=pytest.mark.slow),
        pytest.param((1, 8, 1, 1), True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_bfloat16_model_trains_with_a_float32_sum(tiny_config, shape, scan):
    """Near one device's numbers with the model's own type."""
    config = configured(tiny_config, dtype="bfloat16", scan_layers=scan, micro=ROWS // 8)
    wide = with_settings(config, train={"gradient_dtype": "float32"})
    np.testing.assert_allclose(trained(wide, shape)[0], trained(config, ONE)[0], rtol=1e-2)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 1, 2, 2),
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in (STATES[2], MIXED[4])),
    ],
    ids=str,
)
def test_evaluation_gathers_what_replicas_share(tiny_config, on_one_device, shape):
    config = configured(tiny_config, micro=1)
    (loss, _), _ = on_one_device(configured(tiny_config))[0]
    config, steps = build(config, shape)
    state = jax.device_put(initial_state(config.model), steps.state_shardings)
    total, count = steps.evaluate(state.params, put(config, steps, batches()[0]))
    assert int(count) == ROWS * LENGTH - 14
    assert float(total) / int(count) == pytest.approx(loss, rel=1e-6)


class Exchanged(NamedTuple):
    """A collective of a compiled program."""

    kind: str
    axes: str
    bytes: float  # of one device's operands
    loops: tuple[int, ...]  # turns of each loop around it, the outermost first


def exchanges(program: hlo.Program, steps: Steps) -> Iterator[Exchanged]:
    """The collectives of a program, in loops and outside."""

    def inside(computation: hlo.Computation, loops: tuple[int, ...]) -> Iterator[Exchanged]:
        for item in computation.instructions:
            kind = item.opcode.removesuffix("-start")
            if kind in hlo.COLLECTIVES:
                groups = hlo.replica_groups(item.attributes, steps.layout.mesh.size)
                axes = axes_of(groups, steps.layout.mesh, kind == "collective-permute")
                size = sum(hlo.shape_bytes(computation.shape_of(name)) for name in item.operands)
                yield Exchanged(kind, axes, size, loops)
            for name in item.called if item.opcode in ("while", "call") else ():
                turns = (program.trip_count(computation, item),) if item.opcode == "while" else ()
                yield from inside(program.computations[name], loops + turns)

    return inside(program.entry, ())


def sizes_of(steps: Steps, of_element: int, parts: int) -> float:
    """Bytes of all matrices, split among so many devices."""
    leaves = jax.tree.leaves_with_path(steps.state_shapes.params)
    return sum(
        leaf.size * of_element / parts for path, leaf in leaves if "norm" not in path[-1].key
    )


@pytest.mark.parametrize(
    ("shape", "scan", "micro_batches"),
    [
        ((2, 2, 1, 1, 2), False, 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ((2, 2, 1, 1, 2), True, 3),
                ((2, 1, 1, 1, 2), False, 6),
                ((2, 1, 1, 1, 2), True, 6),
                ((2, 1, 1, 1, 4), False, 1),
                ((1, 2, 1, 1, 4), False, 3),
                ((1, 1, 1, 1, 4), False, 2),
                ((1, 1, 1, 1, 4), True, 6),
                ((4, 1, 1, 1), False, 6),
                ((4, 1, 1, 1), True, 2),
            ]
        ),
    ],
    ids=str,
)
def test_replicas_gather_and_sum_once_a_step(
    tiny_config, shape, scan, micro_batches, compiled_anew, capfd
):
    """Whatever the number of micro-batches: a loop over those in the middle has none of it."""
    config = configured(tiny_config, num_layers=3, scan_layers=scan)
    config, steps = build(accumulated(config, shape, micro_batches), shape)
    text = steps.lower().compile().as_text()
    assert "rematerialization" not in capfd.readouterr().err  # GSPMD gathers nothing for want
    sizes = config.mesh
    inner = sizes.fsdp * sizes.tensor
    # Norms are summed in an all-reduce; the loss and its count are a few numbers.
    norms = 4 * (2 * 3 + 1) * config.model.hidden_size
    scalars = 128  # losses, counts, parts of the norm
    sent: dict[tuple[str, str], float] = {}
    for item in exchanges(hlo.parse(text), steps):
        if {*item.axes.split("+")}.isdisjoint(REPLICAS) or item.bytes < 1000:
            continue
        # A scan sums what a layer has, in the last micro-batch's loop over layers.
        assert item.loops in ((), (3,) if scan else ())
        key = item.kind, item.axes
        sent[key] = sent.get(key, 0) + item.bytes * math.prod(item.loops)
    if sizes.state > 1:
        assert sent.pop(("all-gather", "state")) == sizes_of(steps, 4, inner * sizes.state)
        assert sent.pop(("reduce-scatter", "state")) == sizes_of(steps, 4, inner)
    if sizes.data > 1:
        summed = sent.pop(("all-reduce", "data"))
        assert summed == pytest.approx(sizes_of(steps, 4, inner * sizes.state), abs=norms + scalars)
    # And the loss of each replica.
    assert sum(sent.values()) <= norms + scalars, sent


def test_no_device_makes_a_whole_matrix(tiny_config):
    """tensor splits every matrix that a replica computes with, fsdp and state what it stores."""
    config = configured(tiny_config, num_layers=3, scan_layers=False)
    config, steps = build(accumulated(config, (1, 2, 1, 2, 2), 3), (1, 2, 1, 2, 2))
    assert not whole_matrices(steps, steps.lower().compile().as_text())


def whole_matrices(steps: Steps, text: str) -> set[tuple[int, ...]]:
    """Shapes in a device's program that are those of a whole matrix, or of a stack of them."""
    shapes = set()
    for path, leaf in jax.tree.leaves_with_path(steps.state_shapes.params):
        if "norm" not in path[-1].key:
            whole = tuple(sorted(leaf.shape))
            stacked = "layers" in jax.tree_util.keystr(path)
            shapes |= {whole, tuple(sorted(leaf.shape[1:]))} if stacked else {whole}
    found = {tuple(sorted(size for size in dims if size > 1)) for _, dims in hlo.shape_arrays(text)}
    return shapes & found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_sums_are_sent_in_the_type_that_is_set(tiny_config, dtype):
    """Read before compilation: a CPU sums bfloat16 in float32. None: as the model computes."""
    config = configured(tiny_config, dtype="bfloat16", scan_layers=False)
    config = with_settings(config, train={"gradient_dtype": dtype})
    _, steps = build(config, (2, 2, 1, 1, 2))
    text = steps.lower().as_text()
    found: dict[str, set[str]] = {}
    for kind, dims, of in re.findall(
        r'"stablehlo.(all_gather|all_reduce|reduce_scatter)".*?-> tensor<((?:\d+x)*)(\w+)>',
        text,
        re.S,
    ):
        if dims.count("x") > 1:  # not norms, loss and count
            found.setdefault(kind, set()).add(of)
    of_sum = {{"float32": "f32"}.get(dtype, "bf16")}
    assert found == {"reduce_scatter": of_sum, "all_reduce": of_sum, "all_gather": {"bf16"}}


@pytest.mark.parametrize(
    ("shape", "owners"),
    [
        ((2, 2, 1, 1, 2), {0: [0], 1: [1]}),
        pytest.param((4, 1, 1, 1, 2), {0: [0], 1: [1], 2: [2], 3: [3]}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_flipped_bit_in_one_part_of_a_shared_copy_is_seen(tiny_config, shape, owners):
    """Copies are compared, each of which several replicas hold together."""
    config, steps = build(configured(tiny_config), shape)
    batch = put(config, steps, batches()[0])
    params = jax.device_put(initial_state(config.model), steps.state_shardings).params
    right = jax.device_get(steps.check(params, batch)).tolist()
    assert right == right[:1] * shape[0]
    leaf = params["layers"]["w_up"]
    # The second part that `state` makes, of the second copy.
    device = steps.layout.mesh.devices[1, 1, 0, 0, 0]
    parts = [shard.data for shard in leaf.addressable_shards]
    place = [shard.device for shard in leaf.addressable_shards].index(device)
    bits = np.asarray(parts[place]).copy()
    bits.view(np.uint32)[0, 0, 0] ^= 1 << 22
    parts[place] = jax.device_put(bits, device)
    wrong = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
    layers = params["layers"] | {"w_up": wrong}
    found = jax.device_get(steps.check(params | {"layers": layers}, batch)).tolist()
    assert found[1] != right[1]
    assert found[:1] + found[2:] == right[:1] + right[2:]
    with pytest.raises(BadHost) as caught:
        compare_digests(found, owners)
    # Of two copies nothing tells which is wrong.
    assert caught.value.processes == ((0, 1) if shape[0] == 2 else (1,))
