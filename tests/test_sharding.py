"""The sharding of every parameter of the 7B model, and the order of devices in a mesh."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from baichuan_jax.config.files import load_config
from baichuan_jax.config.schema import MeshConfig
from baichuan_jax.model import abstract_model
from baichuan_jax.sharding import (
    AXES,
    RULES,
    Layout,
    activate,
    constrain,
    crosses_nodes,
    is_split,
    make_mesh,
)

CONFIGS = Path(__file__).parents[1] / "configs"

# Written by hand: how the 7B meshes must store each parameter. A change of the rules has to change
# this table.
EMBED = ("fsdp", "state")
GOLDEN = {
    "embedding": P("tensor", EMBED),
    "layers/attention_norm": P(None, None),
    "layers/w_pack": P(None, EMBED, None, "tensor", None),
    "layers/w_out": P(None, "tensor", None, EMBED),
    "layers/mlp_norm": P(None, None),
    "layers/w_gate": P(None, EMBED, "tensor"),
    "layers/w_up": P(None, EMBED, "tensor"),
    "layers/w_down": P(None, "tensor", EMBED),
    "final_norm": P(None),
    "lm_head": P(EMBED, "tensor"),
}


@pytest.mark.parametrize(
    ("name", "devices", "state", "shape", "largest_share"),
    [
        ("baichuan_7b_a800", 1024, 1, (128, 1, 8, 1, 1), 1 / 8),
        ("baichuan_7b_a800", 1024, 128, (1, 128, 8, 1, 1), 1 / 1024),
        ("baichuan_7b_v5p", 128, 1, (8, 1, 16, 1, 1), 1 / 16),
        ("baichuan_7b_v5p", 128, 2, (4, 2, 16, 1, 1), 1 / 32),
    ],
)
def test_every_parameter_of_the_7b_meshes_lies_as_written(
    name, devices, state, shape, largest_share
):
    config = load_config(CONFIGS / f"{name}.yaml")
    mesh = dataclasses.replace(config.mesh, data=-1, state=state)
    config = dataclasses.replace(config, mesh=mesh)
    assert config.mesh.resolve(devices).shape == shape
    layout = Layout(AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES)))
    _, shapes, axes = abstract_model(config.model)
    specs = jax.tree.map(lambda _, names: layout.stored_spec(names), shapes, axes)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): spec
        for path, spec in jax.tree.leaves_with_path(specs)
    }
    assert found == GOLDEN
    sizes = dict(zip(AXES, shape, strict=True))
    for path, leaf in jax.tree.leaves_with_path(shapes):
        spec = found[jax.tree_util.keystr(path, simple=True, separator="/")]
        groups = [(axis,) if isinstance(axis, str) else axis or () for axis in spec]
        parts = [math.prod(sizes[axis] for axis in group) for group in groups]
        for size, count in zip(leaf.shape, parts, strict=True):
            assert size % count == 0
        if leaf.size > 1e6:
            assert 1 / math.prod(parts) == largest_share


def test_a_replica_computes_with_weights_that_state_does_not_split():
    """A gather over `state` gives each device of fsdp contiguous rows."""
    mesh = make_mesh(MeshConfig(fsdp=2, context=1, tensor=2, state=2))
    layout = Layout(mesh)
    assert layout.replicas == 2
    assert layout.spec(("mlp", "embed")) == P("tensor", "fsdp")
    assert layout.split_over_state(("mlp", "embed")) == 1
    assert layout.split_over_state(("layers", "norm")) is None
    stored = NamedSharding(mesh, layout.stored_spec(("embed", None))).devices_indices_map((8, 3))
    computed = layout.sharding("embed", None).devices_indices_map((8, 3))
    for fsdp in range(2):
        groups = [mesh.devices[0, state, fsdp, 0, 0] for state in range(2)]
        parts = [stored[device][0].indices(8) for device in groups]
        assert [(start, stop) for start, stop, _ in parts] == [
            (4 * fsdp, 4 * fsdp + 2),
            (4 * fsdp + 2, 4 * fsdp + 4),
        ]
        assert {computed[device][0].indices(8) for device in groups} == {
            (4 * fsdp, 4 * fsdp + 4, 1)
        }


def test_two_logical_axes_may_not_share_a_mesh_axis():
    layout = Layout(AbstractMesh((1,) * len(AXES), AXES))
    with pytest.raises(ValueError, match="twice"):
        layout.spec(("vocab", "heads"))
    with pytest.raises(ValueError, match="twice"):
        layout.spec(("batch", "embed"))
    assert layout.spec(("batch", "length", "heads", None)) == P(
        ("data", "state", "fsdp"), "context", "tensor", None
    )


def test_the_rules_name_mesh_axes_only():
    for axes in RULES.values():
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            assert axis in AXES


def test_without_a_mesh_constrain_changes_nothing():
    x = np.ones((2, 3))
    assert constrain(x, "batch", "hidden") is x
    with activate(Layout(make_mesh(MeshConfig(2, 1, 1, 1), jax.devices()[:2]))):
        assert constrain(jax.numpy.ones((2, 3)), "batch", "hidden").sharding.spec == P(
            ("data", "state", "fsdp"), None
        )


def test_an_axis_is_split_where_its_mesh_axes_have_several_devices():
    assert not is_split("length")
    with activate(Layout(AbstractMesh((2, 1, 1, 2, 1), AXES))):
        assert [axis for axis in RULES if is_split(axis)] == ["batch", "group", "length"]
    with activate(Layout(AbstractMesh((1, 2, 1, 1, 1), AXES))):
        assert [axis for axis in RULES if is_split(axis)] == ["batch", "group"]
    with activate(Layout(AbstractMesh((2, 2, 1, 1, 1), AXES), batch_axes=("fsdp",))):
        assert not is_split("batch")  # the vmapped axis holds data and state


def nodes(count: int, local: int) -> list[SimpleNamespace]:
    """Devices of several nodes, in the order in which jax might list them: any."""
    devices = [
        SimpleNamespace(process_index=n, id=n * local + i, platform="gpu")
        for n in range(count)
        for i in range(local)
    ]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


@pytest.mark.parametrize("state", [1, 2, 4])
def test_fsdp_groups_stay_in_a_node_and_replicas_run_along_rails(monkeypatch, state):
    devices = nodes(4, 8)
    monkeypatch.setattr(
        "baichuan_jax.sharding.Mesh", lambda array, axes, axis_types: SimpleNamespace(devices=array)
    )
    mesh = make_mesh(MeshConfig(-1, 4, 1, 2, state=state), devices)
    assert mesh.devices.shape == (4 // state, state, 4, 1, 2)
    replicas = mesh.devices.reshape(4, 4, 1, 2)
    for replica in range(4):
        assert {d.process_index for d in replicas[replica].flat} == {replica}
    for position in np.ndindex(4, 1, 2):
        rail = replicas[(slice(None), *position)]
        assert len({d.id % 8 for d in rail}) == 1
    assert crosses_nodes(mesh) == []
    wide = make_mesh(MeshConfig(-1, 16, 1, 1), devices)
    assert crosses_nodes(wide) == ["fsdp"]


def test_a_real_mesh_has_the_axes_in_order():
    mesh = make_mesh(MeshConfig(2, 1, 1, 2, state=2))
    assert isinstance(mesh, Mesh)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == (2, 2, 1, 1, 2)
    assert set(mesh.axis_types) == {AxisType.Auto}
