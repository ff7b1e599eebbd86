"""The Triton kernels in Triton's interpreter on the CPU, against the plain operators and finite differences; all that surrounds them
(derivatives, vmap, shard_map) is as on a GPU.

Run by test_triton.py in a process of its own: triton decides at its import whether it compiles or interprets. The interpreter computes
bfloat16 on its raw bits, so float32 and float16 stand for it here.
"""

import os

assert os.environ["TRITON_INTERPRET"] == "1"

import jax
import numpy as np
import pytest
import torch
from test_attention import assert_close, documents, inputs, value_and_gradients

from baichuan_jax.kernels import reference
from baichuan_jax.kernels.triton import bridge
from baichuan_jax.kernels.triton.attention import attention


@pytest.fixture(autouse=True)
def interpreter():
    with bridge.run_with(interpret):
        yield


def interpret(launch):
    """Run a kernel in the interpreter, on torch's CPU tensors. What it does not write is NaN."""

    def run(*arrays):
        tensors = [torch.from_numpy(np.array(array)) for array in arrays]
        outputs = [torch.full(out.shape, float("nan"), dtype=getattr(torch, out.dtype.name)) for out in launch.outputs]
        launch.kernel[launch.grid](*tensors, *outputs, **launch.constants)
        return [output.numpy() for output in outputs]

    return jax.pure_callback(run, list(launch.outputs), *launch.arrays)


# Half of float16's 11 bits are lost where the kernel rounds weights to it, which the plain operator does too, at another scale.
TOLERANCE = {"float32": 3e-6, "float16": 4e-3}


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "segments"])
@pytest.mark.parametrize(
    ("B", "T", "N", "H", "dtype"),
    [
        (2, 1, 1, 64, "float32"),
        (1, 77, 2, 64, "float32"),
        (1, 200, 2, 128, "float16"),
        (2, 128, 1, 128, "float32"),
        (1, 256, 1, 64, "float16"),
    ],
    ids=str,
)
def test_attention_equals_reference(B, T, N, H, dtype, masked):
    q, k, v, weight = inputs(B, T, N, H, dtype)
    segments = documents(B, T) if masked else None
    got = value_and_gradients(lambda q, k, v, s: attention(q, k, v, s, s), q, k, v, weight, segments)
    wanted = value_and_gradients(lambda q, k, v, s: reference.attention(q, k, v, s, s), q, k, v, weight, segments)
    assert got[0].dtype == dtype
    assert_close(got, wanted, TOLERANCE[dtype])
