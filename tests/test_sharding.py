"""The sharding of every parameter of the 7B model, and the order of devices in a mesh."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh
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

# Written by hand: what the 7B meshes must do with each parameter. A change of the rules has to
# change this table.
GOLDEN = {
    "embedding": P("tensor", "fsdp"),
    "layers/attention_norm": P(None, None),
    "layers/w_pack": P(None, "fsdp", None, "tensor", None),
    "layers/w_out": P(None, "tensor", None, "fsdp"),
    "layers/mlp_norm": P(None, None),
    "layers/w_gate": P(None, "fsdp", "tensor"),
    "layers/w_up": P(None, "fsdp", "tensor"),
    "layers/w_down": P(None, "tensor", "fsdp"),
    "final_norm": P(None),
    "lm_head": P("fsdp", "tensor"),
}


@pytest.mark.parametrize(
    ("name", "devices", "shape", "largest_share"),
    [
        ("baichuan_7b_a800", 1024, (128, 8, 1, 1), 1 / 8),
        ("baichuan_7b_v5p", 128, (8, 16, 1, 1), 1 / 16),
    ],
)
def test_every_parameter_of_the_7b_meshes_lies_as_written(name, devices, shape, largest_share):
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.mesh.resolve(devices).shape == shape
    layout = Layout(AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 4))
    _, shapes, axes = abstract_model(config.model)
    specs = jax.tree.map(lambda _, names: layout.spec(names), shapes, axes)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): spec
        for path, spec in jax.tree.leaves_with_path(specs)
    }
    assert found == GOLDEN
    for path, leaf in jax.tree.leaves_with_path(shapes):
        spec = found[jax.tree_util.keystr(path, simple=True, separator="/")]
        sizes = dict(zip(AXES, shape, strict=True))
        for size, axis in zip(leaf.shape, spec, strict=True):
            assert size % sizes.get(axis, 1) == 0
        if leaf.size > 1e6:
            assert np.prod([1 / sizes[axis] for axis in spec if axis]) == largest_share


def test_two_logical_axes_may_not_share_a_mesh_axis():
    layout = Layout(AbstractMesh((1, 1, 1, 1), AXES))
    with pytest.raises(ValueError, match="twice"):
        layout.spec(("vocab", "heads"))
    with pytest.raises(ValueError, match="twice"):
        layout.spec(("batch", "embed"))
    assert layout.spec(("batch", "length", "heads", None)) == P(
        ("data", "fsdp"), "context", "tensor", None
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
            ("data", "fsdp"), None
        )


def test_an_axis_is_split_where_its_mesh_axes_have_several_devices():
    assert not is_split("length")
    with activate(Layout(AbstractMesh((2, 1, 2, 1), AXES))):
        assert [axis for axis in RULES if is_split(axis)] == ["batch", "group", "length"]
    with activate(Layout(AbstractMesh((2, 1, 1, 1), AXES), batch_axes=("fsdp",))):
        assert not is_split("batch")  # the vmapped axis holds data


def nodes(count: int, local: int) -> list[SimpleNamespace]:
    """Devices of several nodes, in the order in which jax might list them: any."""
    devices = [
        SimpleNamespace(process_index=n, id=n * local + i, platform="gpu")
        for n in range(count)
        for i in range(local)
    ]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


def test_fsdp_groups_stay_in_a_node_and_data_groups_run_along_rails(monkeypatch):
    devices = nodes(4, 8)
    monkeypatch.setattr(
        "baichuan_jax.sharding.Mesh", lambda array, axes, axis_types: SimpleNamespace(devices=array)
    )
    mesh = make_mesh(MeshConfig(-1, 4, 1, 2), devices)
    assert mesh.devices.shape == (4, 4, 1, 2)
    for replica in range(4):
        assert {d.process_index for d in mesh.devices[replica].flat} == {replica}
    for position in np.ndindex(4, 1, 2):
        rail = mesh.devices[(slice(None), *position)]
        assert len({d.id % 8 for d in rail}) == 1
    assert crosses_nodes(mesh) == []
    wide = make_mesh(MeshConfig(-1, 16, 1, 1), devices)
    assert crosses_nodes(wide) == ["fsdp"]


def test_a_real_mesh_has_the_axes_in_order():
    mesh = make_mesh(MeshConfig(2, 2, 1, 2))
    assert isinstance(mesh, Mesh)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == (2, 2, 1, 2)
    assert set(mesh.axis_types) == {AxisType.Auto}
