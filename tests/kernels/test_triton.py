"""The Triton kernels: their numbers in the interpreter, and ahead-of-time compilation for GPUs."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies

from baichuan_jax.config.schema import ConfigError, KernelsConfig, MeshConfig, ModelConfig
from baichuan_jax.hardware.flops import ATTENTION_PRODUCTS
from baichuan_jax.kernels import triton_bridge as bridge
from baichuan_jax.kernels.__main__ import main
from baichuan_jax.kernels.attention.api import attention
from baichuan_jax.kernels.attention.reference import apply_rope
from baichuan_jax.kernels.inspect import sass
from baichuan_jax.kernels.inspect.resources import bound_of, list_launches
from baichuan_jax.kernels.rms_norm.api import rms_norm
from baichuan_jax.model import Transformer, rope_tables
from baichuan_jax.sharding import Layout, activate, make_mesh

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("compiled_anew")


def needs(*modules):
    """Skips where a module is missing; of "a or b" either serves."""
    missing = [
        names
        for names in modules
        if not any(importlib.util.find_spec(name) for name in names.split(" or "))
    ]
    return pytest.mark.skipif(
        bool(missing), reason=f"not installed: {', '.join(missing)} (requirements-plan.txt)"
    )


CUDA = "jax_cuda12_plugin or jax_cuda13_plugin"


@needs("triton")
def test_numbers_in_the_interpreter():
    """Every test of interpreted.py, in a process that imports triton as an interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", HERE / "interpreted.py", "-q", "-p", "no:cacheprovider"],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs("triton")
def test_the_interpreter_says_that_triton_was_imported_to_compile():
    from baichuan_jax.kernels.triton_interpreter import interpret

    (launch, *_) = list_launches("float32", 64, 80)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 in the environment before"):
        interpret(launch)


TARGET = """
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 9 }}
gpu_device_info {{
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: 167936
  shared_memory_per_block_optin: 166912 l2_cache_size: 41943040
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 2039000000000 device_memory_size: 85899345920
  cuda_compute_capability {{ major: {} minor: 0 }}
}}"""


def gpus(major: int, count: int) -> list:
    """GPUs of compute capability major.0 as jax describes them: good for compiling."""
    jax.devices()  # lets jax find its plugins first
    return topologies.get_topology_desc(
        "gpu", "cuda", target_config=TARGET.format(major), topology=f"1x1x{count}"
    ).devices


@pytest.fixture(autouse=True)
def no_driver(monkeypatch):
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


@needs("triton", "jax_triton", CUDA)
@pytest.mark.parametrize(
    ("major", "shape", "T", "H", "dtype", "masked"),
    [
        (8, (1, 1, 1, 1), 256, 128, "bfloat16", False),
        (8, (1, 2, 2, 2), 200, 64, "float32", True),
        (8, (2, 1, 1, 2), 256, 64, "float16", True),
        (9, (1, 2, 1, 1), 200, 128, "bfloat16", True),
    ],
    ids=str,
)
def test_a_step_compiles_with_these_kernels(major, shape, T, H, dtype, masked):
    """Two blocks of norm, attention and residual with gradients: `auto` takes the kernels.

    Under scan, remat and shard_map.
    """
    layout = Layout(make_mesh(MeshConfig(*shape), gpus(major, int(np.prod(shape)))))
    B, N = 4, 2

    def loss(x_BTD, weight_LD, segments_BT):
        def block(carry, weight_D):
            x_BTD, out_BTD = carry
            with activate(layout):
                y_BTD, x_BTD = rms_norm(out_BTD, weight_D, eps=1e-6, residual=x_BTD)
                heads = y_BTD.reshape(B, T, N, H)
                out = attention(
                    jnp.stack((heads, 2 * heads, 3 * heads), axis=2),
                    rope_tables(jnp.arange(T)[None], H, 10_000.0),
                    segment_ids=segments_BT if masked else None,
                )
            return (x_BTD, out.reshape(B, T, N * H)), None

        (x_BTD, out_BTD), _ = jax.lax.scan(jax.checkpoint(block), (x_BTD, x_BTD), weight_LD)
        return jnp.sum((x_BTD + out_BTD).astype(jnp.float32))

    def argument(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(*axes))

    arguments = (
        argument((B, T, N * H), dtype, "batch", "length", "hidden"),
        argument((2, N * H), "float32", "layers", "norm"),
        argument((B, T), "int32", "batch", "length"),
    )
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile().as_text()
    calls = re.findall(r"custom_call_target=\"(triton_kernel_call\w*)\"", compiled)
    # In two loops: norm and attention forward; both again and, backward, attention's two and the
    # norm's. RoPE on keys goes before attention, both times; a split sequence turns them in XLA.
    split = shape[2] > 1
    assert len(calls) == (7 if split else 9), calls
    # The packed projection and its gradient are written in place, without a copy.
    packed = re.escape(f"[{B // shape[0] // shape[1]},{T},3,{N // shape[3]},{H}]")
    if not split:
        assert len(re.findall(rf"{packed}.* output_to_operand_aliasing=", compiled)) == 5
    assert not re.findall(rf"{packed}\S* copy\(", compiled)
    assert "while" in compiled


@needs("triton", "jax_triton", CUDA)
def test_code_for_an_older_gpu_is_assembled_for_the_one_that_runs_it(monkeypatch, tmp_path):
    """In bridge.compile_as(80) an H100 gets the A100's code and blocks.

    Before and after it each GPU gets its own.
    """
    from jax_triton import triton_lib

    from baichuan_jax.kernels.attention.triton import attention as triton_attention

    library = triton_lib.triton_kernel_call_lib
    make, made = library.TritonKernel, []

    def record(*arguments):
        made.append((arguments[6], re.search(r"\.target (\w+)", arguments[4])[1], arguments[4]))
        return make(*arguments)

    monkeypatch.setattr(library, "TritonKernel", record)

    def gradient():
        """A new function, which jax has not traced yet."""
        return jax.jit(jax.grad(lambda q: jnp.sum(triton_attention(q, q, q).astype(jnp.float32))))

    def lower(major, jitted):
        made.clear()
        layout = Layout(make_mesh(MeshConfig(1, 1, 1, 1), gpus(major, 1)))
        shape = jax.ShapeDtypeStruct(
            (1, 512, 1, 128), "bfloat16", sharding=layout.sharding("batch", "length", "heads", None)
        )
        with activate(layout):
            jitted.lower(shape)
            return {(capability, target) for capability, target, _ in made}

    jitted = gradient()
    assert lower(9, jitted) == {(90, "sm_90a")}
    with bridge.compile_as(80):
        assert lower(9, jitted) == {(90, "sm_80")}  # traced again
        assert len(made) == 3
        assert bridge.compute_capability() == 80
    for number, (_, _, ptx) in enumerate(made):
        (tmp_path / f"{number}.ptx").write_text(ptx)
        for target in ("sm_90", "sm_90a"):
            source, binary = tmp_path / f"{number}.ptx", tmp_path / "cubin"
            command = [bridge.ptxas(), f"--gpu-name={target}", source, "-o", binary]
            assert subprocess.run(command).returncode == 0
    assert lower(9, gradient()) == set()  # jax-triton kept what it made first
    assert lower(8, gradient()) == {(80, "sm_80")}
    with bridge.compile_as(90), pytest.raises(ValueError, match="sm_90 does not run on sm_80"):
        lower(8, gradient())
    assert triton_lib.triton_kernel_call_lib is library


# The shares of the peak that docs/kernels.md gives, bfloat16: forward, and backward with its seven
# products where five are asked for.
BOUNDS = {
    ("sm_80", 128): (0.94, 0.61),
    ("sm_80", 64): (0.96, 0.69),
    ("sm_90", 128): (0.92, 0.69),
    ("sm_90", 64): (0.87, 0.69),
}


@needs("triton")
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("head_dim", [128, pytest.param(64, marks=pytest.mark.slow)])
def test_nothing_spills_and_the_bound_holds(target, head_dim):
    """From the assembler: no spills, the tensor cores for every product, the bounds of the docs."""
    import triton

    chip = sass.CHIPS[target]
    cycles = ideal = 0.0
    for launch in list_launches("bfloat16", head_dim, chip.capability):
        assembled = sass.assemble(launch, chip)
        # triton 3.6 spills a few bytes in some of them; never in a loop, where it would cost time.
        inside = [opcode for loop in assembled.loops for opcode in loop]
        assert not [code for code in inside if code.startswith(("LDL", "STL"))], launch.name
        assert assembled.spilled_bytes <= (0 if triton.__version__ >= "3.7" else 32), launch.name
        if launch.name.startswith("rms_norm") or launch.name == "attention_rope":
            assert assembled.tensor_core_instructions == 0
            assert bound_of(launch, assembled, chip).unit == "memory"
            continue
        H, Q, K = (launch.constants[name] for name in "HQK")
        products = ATTENTION_PRODUCTS[launch.name]
        for loop in assembled.loops:
            if target == "sm_80":
                found = sum(opcode.startswith("HMMA.16816.F32.BF16") for opcode in loop)
                executed = found * launch.num_warps * 4096  # operations of each
            else:  # HGMMA.64xNx16: four warps multiply 64 x 16 with 16 x N
                wide = [opcode for opcode in loop if opcode.startswith("HGMMA.64x")]
                columns = sum(int(opcode.split("x")[1]) for opcode in wide)
                executed = columns * 2 * 64 * 16 * launch.num_warps // 4
            assert executed == products * 2 * Q * K * H, launch.name
        limit = bound_of(launch, assembled, chip)
        if launch.name == "attention_forward":
            assert limit.share_of_peak > BOUNDS[target, head_dim][0]
        else:
            cycles, ideal = cycles + limit.cycles, ideal + limit.ideal_cycles
        assert assembled.blocks_per_multiprocessor(launch.num_warps, chip) * launch.num_warps >= 8
    assert 5 / 7 * ideal / cycles > BOUNDS[target, head_dim][1]


LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/                   MUFU.EX2 R9, R8 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/                   STG.E.128 [R2.64], R8 ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
"""


def test_a_listing_is_split_into_loops_and_counted():
    outside, loops = sass.split_loops(LISTING)
    assert loops == [["LDSM.16.M88.4", "HMMA.16816.F32.BF16", "MUFU.EX2", "BRA"]]
    assert outside == ["MOV", "BRA", "STG.E.128", "EXIT", "BRA"]
    # Two warps on each partition: one matrix product of 16 x 8 x 16 takes 8 cycles there, and 512
    # bytes for each of 8 warps 32 of all.
    assert sass.busy_cycles(loops[0], 8, sass.CHIPS["sm_80"]) == {
        "issue": 8,
        "tensor": 16,
        "mufu": 16,
        "shared memory": 32,
    }
    assert sass.cached_bytes(outside, 8) == 8 * 32 * 16


def test_programs_that_are_resident():
    chip = sass.CHIPS["sm_80"]
    for registers, shared, warps, wanted in (
        (255, 40_000, 4, 2),
        (212, 98_304, 8, 1),
        (32, 8_192, 8, 8),
        (64, 81_000, 4, 2),
    ):
        assembled = sass.Assembled(registers, 0, shared, [], [])
        assert assembled.blocks_per_multiprocessor(warps, chip) == wanted


def test_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"sm_80, sm_90: triton is not installed; pip install triton==3.9.0"
    ):
        main(["--targets", "sm_80"])


@needs(CUDA)
def test_xla_fuses_swiglu_and_rope():
    """For CUDA, forward and backward: all elementwise work of each is one fusion.

    None of the intermediate arrays is written.
    """
    device = gpus(8, 1)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def work(function, shape, count):
        """Results of all instructions of the compiled program that write memory."""
        arguments = [jax.ShapeDtypeStruct(shape, "bfloat16", sharding=sharding)] * count
        text = jax.jit(function).lower(*arguments).compile().as_text()
        found = re.findall(r"%\S+ = (\(.*?\)|\S+) ([a-z\-]+)\(", text[text.index("ENTRY") :])
        free = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant")
        assert {kind for _, kind in found if kind not in free} == {"fusion"}, found
        return [results for results, kind in found if kind == "fusion"]

    def swiglu(gate, up, dy):
        y, pull = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
        return y, *pull(dy)

    def rope(q, dq):
        tables = rope_tables(jnp.arange(512)[None], 128, 1e4)
        turned, pull = jax.vjp(lambda q: apply_rope(q, tables), q)
        return turned, pull(dq)

    # Each is read once and written once, in bfloat16: nothing of float32 leaves the registers.
    (results,) = work(swiglu, (2, 512, 1024), 3)
    assert re.findall(r"(\w+)\[", results) == ["bf16"] * 3
    assert [
        re.findall(r"(\w+\[[\d,]+\])", results) for results in work(rope, (2, 512, 4, 128), 2)
    ] == [["bf16[2,512,4,128]"]] * 2


def test_forced_kernels_reach_the_model():
    """The blocks use kernels.rms_norm and kernels.attention: on a CPU a forced one is refused."""
    config = ModelConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=1
    )
    for kernels in (KernelsConfig(rms_norm="triton"), KernelsConfig(attention="triton")):
        with pytest.raises(ConfigError, match="triton cannot serve: Triton needs a GPU"):
            jax.eval_shape(
                lambda kernels=kernels: Transformer(config, nnx.Rngs(params=0), kernels)(
                    np.zeros((1, 4), np.int32)
                )
            )
