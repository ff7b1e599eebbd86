"""The TPU kernels compiled for v5p by libtpu, which needs no TPU.

Under scan, remat and shard_map, with gradients.
"""

import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from baichuan_jax.config.schema import MeshConfig
from baichuan_jax.kernels.attention.api import attention
from baichuan_jax.kernels.rms_norm.api import rms_norm
from baichuan_jax.model import rope_tables
from baichuan_jax.sharding import Layout, activate, make_mesh

pytestmark = [
    pytest.mark.usefixtures("compiled_anew"),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed (requirements-tpu.txt names its version)",
    ),
]


@pytest.fixture(scope="module")
def tpus():
    """The four chips of a v5p host.

    By default libtpu locks a file against a second process, and asks a metadata server, which does
    not exist here.
    """
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc("v5p:2x2x1", "tpu").devices


def kernels_of(
    tpus, mesh: MeshConfig, *, T: int, N: int, H: int, dtype: str, masked: bool
) -> set[str]:
    """Kernels in the compiled gradient of two blocks of norm, attention and residual."""
    devices = tpus[: int(np.prod(mesh.shape))]
    layout = Layout(make_mesh(mesh, devices))
    B, D = 4, N * H

    def loss(x_BTD, weight_LD, segments_BT):
        def block(carry, weight_D):
            x_BTD, out_BTD = carry
            with activate(layout):
                y_BTD, x_BTD = rms_norm(x_BTD, weight_D, eps=1e-6, residual=out_BTD)
                heads = y_BTD.reshape(B, T, N, H)
                out = attention(
                    jnp.stack((heads, 2 * heads, 3 * heads), axis=2),
                    rope_tables(jnp.arange(T)[None], H, 10_000.0),
                    segment_ids=segments_BT if masked else None,
                )
            return (x_BTD, out.reshape(B, T, D)), None

        (x_BTD, out_BTD), _ = jax.lax.scan(jax.checkpoint(block), (x_BTD, x_BTD), weight_LD)
        return jnp.sum((x_BTD + out_BTD).astype(jnp.float32))

    def argument(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(*axes))

    arguments = (
        argument((B, T, D), dtype, "batch", "length", "hidden"),
        argument((2, D), "float32", "layers", "norm"),
        argument((B, T), "int32", "batch", "length"),
    )
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile().as_text()
    assert "while" in text
    return {
        re.sub(r"\.\d+$", "", name)
        for name in re.findall(r"%(\S+) = .*custom_call_target=\"tpu_custom_call\"", text)
    }


@pytest.mark.parametrize(
    ("shape", "T", "N", "H", "dtype", "masked"),
    [
        ((1, 1, 1, 1), 1024, 2, 64, "bfloat16", False),
        ((1, 2, 2, 1), 4096, 2, 128, "bfloat16", True),
        ((2, 1, 1, 2), 1024, 2, 128, "float32", True),
        ((1, 1, 4, 1), 1000, 1, 64, "float32", False),  # 250 tokens a device
    ],
    ids=str,
)
def test_a_step_compiles_for_v5p_with_these_kernels(tpus, shape, T, N, H, dtype, masked):
    kind = "_segmented" if masked else ""
    assert kernels_of(tpus, MeshConfig(*shape), T=T, N=N, H=H, dtype=dtype, masked=masked) == {
        "rms_norm_forward",
        "rms_norm_backward",
        f"splash_mha_fwd{kind}_residuals",
        f"splash_mha_dkv{kind}_no_residuals",
    }


def test_long_rows_get_separate_backward_kernels(tpus):
    names = kernels_of(
        tpus, MeshConfig(1, 1, 1, 1), T=16384, N=1, H=128, dtype="bfloat16", masked=False
    )
    assert {"splash_mha_dq_no_residuals", "splash_mha_dkv_no_residuals"} < names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("D", [96, 4096, 16384, 32768])
def test_rms_norm_fits_into_vmem(tpus, D, dtype):
    device = jax.sharding.SingleDeviceSharding(tpus[0])
    # Too many rows for XLA to put them into VMEM whole.
    x = jax.ShapeDtypeStruct((1024, D), dtype, sharding=device)
    weight = jax.ShapeDtypeStruct((D,), "float32", sharding=device)
    layout = Layout(make_mesh(MeshConfig(1, 1, 1, 1), tpus[:1]))

    def loss(x, residual, weight):
        with activate(layout):
            y, total = rms_norm(x, weight, eps=1e-6, residual=residual, implementation="pallas")
        return jnp.sum((y + total).astype(jnp.float32))

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, weight).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
