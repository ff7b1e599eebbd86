"""The reader of profiler traces: a real trace of this CPU, and a GPU's written by hand.

The GPU's has the layout that the docstring of device_trace.py states.
"""

import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh
from launches import REPOSITORY, environment

from baichuan_jax.hardware.accelerators import parse_topology
from baichuan_jax.plan import hlo
from baichuan_jax.plan.prediction import Prediction, predict
from baichuan_jax.plan.rates import rates_for
from baichuan_jax.sharding import AXES

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from gpu_stages import device_trace as reader

# jaxlib 0.11.2 under Python 3.12, at the first read of an event's stats; as an error it would abort
# the process.
pytestmark = pytest.mark.filterwarnings(
    "ignore:builtin type event_stats has no __module__:DeprecationWarning"
)

# A child: the profiler keeps threads, and the tests' backend has eight devices. Its loop runs a
# product five times.
PROGRAM = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp

def step(a, b):
    x = jnp.tanh(a @ b)
    x = jax.lax.fori_loop(0, 5, lambda _, y: jnp.sin(y @ b) / 100, x)
    return x @ a.T

a, b = jnp.ones((300, 400)), jnp.ones((400, 400))
compiled = jax.jit(step).lower(a, b).compile()
Path(sys.argv[1], "step.hlo").write_text(compiled.as_text())
other = jax.jit(lambda x: x * 2 + 1).lower(a).compile()
jax.block_until_ready((compiled(a, b), other(a)))
jax.profiler.start_trace(sys.argv[1])
for _ in range(3):
    jax.block_until_ready(compiled(a, b))
jax.block_until_ready(other(a))
jax.profiler.stop_trace()
"""


def prediction_of(program: hlo.Program) -> Prediction:
    topology = parse_topology("h100:1x1")
    return predict(program, AbstractMesh((1,) * len(AXES), AXES), topology, rates_for(topology))


def test_a_trace_of_this_cpu_has_every_product_as_often_as_it_ran(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    trace = reader.read_trace(tmp_path)
    program = hlo.parse((tmp_path / "step.hlo").read_text())
    products = {
        item.name: 3 * times
        for where, item, times, _ in program.walk()
        if program.flops(where, item)
    }
    assert sorted(products.values()) == [3, 3, 15]
    assert {name: trace.instructions[name].count for name in products} == products
    assert all(trace.instructions[name].seconds > 0 for name in products)

    assert (trace.platform, trace.module) == ("cpu", "jit_step")
    assert trace.other_modules
    assert not any("jit_step" in name for name in trace.other_modules)
    assert 0 < trace.busy_seconds <= trace.span_seconds
    # Nothing is dropped, and nothing counted twice: what instructions took of their own fits into
    # the threads' busy time.
    everything = sum(each.seconds for each in trace.lines.values())
    ours = sum(each.seconds for each in trace.instructions.values())
    assert ours + sum(each.seconds for each in trace.other_modules.values()) == pytest.approx(
        everything
    )
    # Both are sums of the same times; the last digit depends on the order.
    assert everything <= trace.busy_seconds * len(trace.lines) * (1 + 1e-9)
    assert all(line.startswith("/host:CPU / ") for line in trace.lines)

    rows = reader.compare(trace.instructions, 3, program, prediction_of(program))
    found = {row.name: row for row in rows}
    assert {row.name for row in rows if row.group == reader.PRODUCTS} == set(products)
    for name, count in products.items():
        assert found[name].measured_count == found[name].predicted_count == count / 3
        assert found[name].measured_seconds == pytest.approx(trace.instructions[name].seconds / 3)
        assert found[name].op_name.endswith("dot_general")
    total = reader.by_group(rows)[-1]
    assert total.measured_seconds == pytest.approx(ours / 3)
    with pytest.raises(ValueError, match="jit_step"):
        reader.read_trace(tmp_path, module="jit_stop")


def event(name: str, start_us: float, microseconds: float, **stats: str) -> str:
    """One event of a line, as CUPTI's collector writes it.

    Names and values of stats are references into the plane's tables.
    """
    texts = "".join(
        f"stats {{ metadata_id: {number(key)} ref_value: {number(value)} }} "
        for key, value in stats.items()
    )
    place = f"offset_ps: {int(start_us * 1e6)} duration_ps: {int(microseconds * 1e6)}"
    return f"events {{ metadata_id: {number(name)} {place} {texts}}}\n"


NUMBERS: dict[str, int] = {}


def number(text: str) -> int:
    return NUMBERS.setdefault(text, len(NUMBERS) + 1)


def plane(name: str, **lines: str) -> str:
    tables = "".join(
        f"{kind} {{ key: {index} value {{ id: {index} name: {text!r} }} }}\n"
        for text, index in NUMBERS.items()
        for kind in ("event_metadata", "stat_metadata")
    )
    inner = "".join(
        f"lines {{ id: {index} name: {line!r} {events} }}\n"
        for index, (line, events) in enumerate(lines.items())
    )
    return f"planes {{ name: {name!r} {inner} {tables} }}\n"


def profile(text: str) -> jax.profiler.ProfileData:
    data = jax.profiler.ProfileData
    return data.from_serialized_xspace(data.text_proto_to_serialized_xspace(text))


KERNEL = {"kernel_details": "regs:128", "hlo_module": "jit_step", "program_id": "7"}


def gpu_profile() -> jax.profiler.ProfileData:
    """Two steps of 100 us.

    A cuBLAS product that launches two kernels, our attention on a second stream, copies, and the
    derived lines.
    """
    compute, beside, derived = "", "", ""
    for start in (0.0, 100.0):
        compute += event("sm90_gemm", start, 40.0, hlo_op="custom-call.3", **KERNEL)
        compute += event("splitKreduce", start + 40, 5.0, hlo_op="custom-call.3", **KERNEL)
        program = {"hlo_module": "jit_step", "program_id": "7"}
        copy = {"memcpy_details": "kind", "hlo_op": "copy.2", **program}
        compute += event("MemcpyD2D", start + 45, 5.0, **copy)
        call = {"hlo_op": "call.1::custom-call.4", **KERNEL}
        beside += event("attention_forward_kernel", start + 30, 30.0, **call)
        derived += event("custom-call.3", start, 45.0, hlo_op="custom-call.3", **KERNEL)
    compute += event("MemoryAlloc", 210.0, 0.0)
    convert = {"hlo_op": "fusion.1", "hlo_module": "jit_convert", "program_id": "3"}
    compute += event("loop_add_fusion", 220.0, 2.0, **convert)
    compute += event("a_kernel_of_a_library", 230.0, 1.0, kernel_details="regs:1")
    copies = event("MemcpyH2D", 0.0, 500.0, memcpy_details="kind")
    lines = {
        "Stream #14(MemcpyD2D,Compute)": compute,
        "Stream #15(Compute)": beside,
        "Stream #16(MemcpyH2D)": copies,
    }
    return profile(
        plane("/host:CPU")
        + plane("/device:GPU:0", **lines, **{"XLA Ops": derived, "Steps": derived})
    )


def test_a_gpus_streams_are_read_once_and_nothing_is_dropped():
    trace = reader.summarise(gpu_profile(), "here")
    assert (trace.platform, trace.module) == ("gpu", "jit_step")
    microseconds = {
        name: (round(each.seconds * 1e6, 6), each.count)
        for name, each in trace.instructions.items()
    }
    assert microseconds == {"custom-call.3": (90, 2), "custom-call.4": (60, 2), "copy.2": (10, 2)}
    assert trace.kernels["custom-call.3"] == {"sm90_gemm": 2, "splitKreduce": 2}
    assert {name: each.count for name, each in trace.unnamed.items()} == {
        "MemcpyH2D": 1,
        "a_kernel_of_a_library": 1,
    }
    assert trace.other_modules["jit_convert(3)"].seconds == pytest.approx(2e-6)
    # By hand: [0, 60], [100, 160], [220, 222], [230, 231]; the copy from the host is not the
    # device's work.
    assert trace.busy_seconds == pytest.approx(123e-6)
    assert trace.span_seconds == pytest.approx(231e-6)
    assert set(trace.lines) == {
        f"/device:GPU:0 / Stream #{name}"
        for name in ("14(MemcpyD2D,Compute)", "15(Compute)", "16(MemcpyH2D)")
    }
    everything = [
        *trace.instructions.values(),
        *trace.unnamed.values(),
        *trace.other_modules.values(),
    ]
    assert sum(each.seconds for each in everything) == pytest.approx(
        sum(each.seconds for each in trace.lines.values())
    )


def test_a_cpus_loop_keeps_only_what_its_parts_leave():
    inner = {"hlo_module": "jit_step", "program_id": "7"}
    line = event("while.1", 0.0, 100.0, hlo_op="while.1", **inner) + event(
        "dot.1", 10.0, 60.0, hlo_op="dot.1", **inner
    )
    line += event("end: dot.1", 70.0, 1.0) + event("dot.2", 100.0, 10.0, hlo_op="dot.2", **inner)
    trace = reader.summarise(profile(plane("/host:CPU", thread=line)), "here")
    assert {name: round(each.seconds * 1e6, 6) for name, each in trace.instructions.items()} == {
        "dot.1": 60,
        "while.1": 40,
        "dot.2": 10,
    }
    assert trace.busy_seconds == pytest.approx(110e-6)


def test_a_trace_without_device_activity_is_refused(tmp_path):
    with pytest.raises(ValueError, match="CUPTI"):
        reader.summarise(profile(plane("/host:CPU") + plane("/device:GPU:0")), "here")
    with pytest.raises(FileNotFoundError, match="holds 0"):
        reader.read_trace(tmp_path)


STEP = """HloModule jit_step, is_scheduled=true

ENTRY %main (a: bf16[1,1024,8,128], b: f32[1000,1000]) -> f32[1000,1000] {
  %a = bf16[1,1024,8,128]{3,2,1,0} parameter(0)
  %b = f32[1000,1000]{1,0} parameter(1)
  %custom-call.4 = bf16[1,1024,8,128]{3,2,1,0} custom-call(%a), custom_call_target="triton_kernel_call", metadata={op_name="jit(step)/attention_forward/call"}
  %custom-call.5 = bf16[1,1024,8,128]{3,2,1,0} custom-call(%a), custom_call_target="triton_kernel_call", metadata={op_name="jit(step)/rms_norm/call"}
  %custom-call.3 = f32[1000,1000]{1,0} custom-call(%b, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  ROOT %copy.2 = f32[1000,1000]{1,0} copy(%custom-call.3)
}
"""  # noqa: E501


def test_both_sides_are_joined_by_name_and_what_one_lacks_is_shown():
    program = hlo.parse(STEP)
    prediction = prediction_of(program)
    bounds = {
        "custom-call.4": "kernel",
        "custom-call.5": "kernel",
        "custom-call.3": "matmul",
        "copy.2": "memory",
    }
    assert {name: prediction.bounds[name] for name in bounds} == bounds
    assert set(prediction.bounds) == set(prediction.costs)
    trace = reader.summarise(gpu_profile(), "here")
    rows = reader.compare(
        {**trace.instructions, "command_buffer": (8e-6, 2)}, 2, program, prediction
    )
    assert {row.name: row.group for row in rows} == {
        "custom-call.3": reader.PRODUCTS,
        "custom-call.4": "attention forward",
        "copy.2": reader.COPIES,
        "command_buffer": reader.UNPREDICTED,
        "custom-call.5": reader.UNMEASURED,
    }
    product = rows[0]
    assert product.measured_seconds == pytest.approx(45e-6)
    assert product.predicted_seconds == pytest.approx(prediction.costs["custom-call.3"])
    assert product.difference == pytest.approx(45e-6 - prediction.costs["custom-call.3"])
    groups = {row.name: row for row in reader.by_group(rows)}
    assert groups[reader.UNMEASURED].predicted_seconds == pytest.approx(
        prediction.costs["custom-call.5"]
    )
    assert groups["in all"].measured_seconds == pytest.approx((90 + 60 + 10 + 8) / 2 * 1e-6)
    assert groups["in all"].predicted_seconds == pytest.approx(prediction.seconds)
    assert [row.name for row in reader.largest_differences(rows, 2)] == [
        "custom-call.3",
        "custom-call.4",
    ]
