"""Published measurements of training steps near ours, with the settings that their sources state.

`plan_validation.py` predicts each of them. A run is here where its source states model, rows of a
pass, accumulation, sharding, recomputation, number of GPUs and speed, and, over several nodes, the
network; a `note` names what is not stated, or what our step does otherwise.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Run(NamedTuple):
    """A published measurement, and the step of ours that it is compared with."""

    name: str
    topology: str
    tokens_per_second: float
    """Of one GPU."""
    rows: int
    """Of a device in one forward and backward pass."""
    length: int
    """Tokens of a row."""
    settings: dict[str, object]
    source: str
    accumulation: int = 1
    """Passes of a step."""
    fsdp: int = 8
    """Devices that share one copy of the state."""
    hardware: Mapping[str, float] = MappingProxyType({})
    """What differs from the data sheet of the topology's GPU."""
    network: str = "RDMA"
    """How nodes talk: RDMA (InfiniBand, RoCE) or TCP."""
    note: str = ""
    overlaps: bool = True
    """Whether its collectives run beside compute as ours do. Otherwise what it waits would pass for
    a slower network, so it is predicted but tells nothing of the network."""

    @property
    def nodes(self) -> int:
        return int(self.topology.split(":")[1].split("x")[0])

    @property
    def kind(self) -> str:
        """The table's rates that hold for its GPU."""
        # An A800 is an A100 with slower NVLink.
        return self.topology.split(":")[0].replace("a800", "a100")

    @property
    def series(self) -> tuple[str, str]:
        """Equal for the runs of one source and model: their kernels are the same."""
        return self.source, str(self.settings)

    @property
    def seconds(self) -> float:
        """Of a step, as measured."""
        return self.rows * self.accumulation * self.length / self.tokens_per_second


def _swiglu(hidden: int, layers: int, heads: int, intermediate: int, vocab: int) -> dict:
    return {
        "model.hidden_size": hidden,
        "model.num_layers": layers,
        "model.num_heads": heads,
        "model.intermediate_size": intermediate,
        "model.vocab_size": vocab,
    }


# Our block is a SwiGLU one with a key and a value for each head. Where the published block has
# another form, the inner width makes up for it: then the products' operations and the bytes of the
# weights are the published ones. MPT's feed-forward of 8 D^2 weights is a SwiGLU of width 8/3 D;
# grouped keys and values of width K save 2 D (D - K) weights, which is 2/3 (D - K) of the width.
MPT_1B = _swiglu(2048, 24, 16, 5464, 50368)
MPT_3B = _swiglu(2560, 32, 20, 6824, 50368)
MPT_7B = _swiglu(4096, 32, 32, 10920, 50368)
MPT_13B = _swiglu(5120, 40, 40, 13656, 50368)
LLAMA2_7B = _swiglu(4096, 32, 32, 11008, 32000)
LLAMA2_13B = _swiglu(5120, 40, 40, 13824, 32000)
INTERNLM_7B = _swiglu(4096, 32, 32, 11008, 103168)
TINYLLAMA = _swiglu(2048, 22, 32, 4440, 32000)
NONE, FULL = {"model.remat": "none"}, {"model.remat": "full"}

# The 40-GB card has slower memory too. Its nodes have 1,600 Gb/s, 200 a GPU, as the table has.
A100_40 = {"memory_gib": 39.4, "memory_bandwidth": 1555.0}
# 4 x 100 Gb/s a node of 8.
GBPS_50 = {"inter_node_gbps": 50.0}
GBPS_100 = {"inter_node_gbps": 100.0}

FOUNDRY = "mosaicml/llm-foundry scripts/train/benchmarking/README.md"
IBM = "foundation-model-stack/fms-fsdp README.md; pytorch.org/blog/maximizing-training-throughput"
IBM_EAGER = "pytorch.org/blog/maximizing-training"
INTERNLM = "InternLM/InternLM doc/en/train_performance.md"
TITAN = "pytorch/torchtitan docs/performance.md (commit 0413364)"
BAICHUAN = "baichuan-inc/Baichuan-7B README.md"
TOOLBOX = "NVIDIA/JAX-Toolbox docs/frameworks/maxtext/README.md"
MAXTEXT = "AI-Hypercomputer/maxtext src/maxtext/configs/gpu/a3/llama_2_7b/README.md"
TINY = "jzhang38/TinyLlama README.md, pretrain/tinyllama.py"
MPT_CARD = "huggingface.co/mosaicml/mpt-7b"

EAGER = "eager PyTorch: norms, activations and sums are kernels of their own, which ours fuses"
FULL_SHARD = "FSDP gathers again for the backward pass, ours keeps what it gathered; eager PyTorch"
# llm-foundry's H100 tables name no network either: the table's 400 Gb/s.
H100_FOUNDRY = "network not stated; gradients reduced in float32, ours in bfloat16; eager PyTorch"
ZERO_1 = "every GPU holds all weights (ZeRO-1 in a node); ours gathers them over NVLink"
EXPOSED = "its sums hardly overlap so short a backward pass, ours do"


def _foundry(
    size: str,
    model: dict,
    gpus: int,
    tokens_per_second: float,
    rows: int,
    remat: dict,
    *,
    kind: str = "a100",
    length: int = 2048,
    accumulation: int = 1,
    small: bool = False,
    note: str = "",
) -> Run:
    """A row of llm-foundry's tables: full shard over all GPUs. small: the card of 40 GB."""
    card = f"{kind.upper()}-{40 if small else 80}GB"
    recomputed = ", recomputed" if remat is FULL else ""
    passes = f"{accumulation}x" if accumulation > 1 else ""
    return Run(
        f"MPT-{size}, {gpus} {card}, {passes}{rows}x{length}{recomputed}",
        f"{kind}:{gpus // 8}x8",
        tokens_per_second,
        rows,
        length,
        {**model, **remat},
        f"{FOUNDRY}, {card}",
        accumulation,
        fsdp=gpus,
        hardware=A100_40 if small else {},
        note=note,
    )


def _internlm(
    gpus: int, tokens_per_second: float, rows: int, passes: int, remat: dict, note: str = ZERO_1
) -> Run:
    """A row of InternLM's table: its 7B model, zero1=8, 4 x 100 Gb/s a node."""
    recomputed = ", recomputed" if remat is FULL else ""
    return Run(
        f"InternLM-7B, {gpus} A100-80GB, {passes}x{rows}x2048{recomputed}",
        f"a100:{gpus // 8}x8",
        tokens_per_second,
        rows,
        2048,
        {**INTERNLM_7B, **remat},
        INTERNLM,
        passes,
        hardware=GBPS_50,
        note=note,
        overlaps=note is not EXPOSED,
    )


def _maxtext(nodes: int, tflops: float) -> Run:
    """A row of MaxText's table, which has TFLOP/s a GPU; a3-highgpu-8g has 4 x 200 Gb/s a node."""
    # A token, as MaxText counts: all parameters, and attention without its causal mask.
    flops = 6 * 6.738e9 + 12 * 32 * 4096 * 4096
    return Run(
        f"Llama2-7B, {nodes} x A3",
        f"h100:{nodes}x8",
        tflops * 1e12 / flops,
        4,
        4096,
        {**LLAMA2_7B, **NONE},
        MAXTEXT,
        hardware=GBPS_100,
        network="TCP",
    )


A100_SINGLE = [
    _foundry("7B", MPT_7B, 8, 4641, 6, NONE, accumulation=2),
    _foundry("7B", MPT_7B, 8, 3684, 16, FULL, length=4096, accumulation=2),
    _foundry("7B", MPT_7B, 8, 3206, 8, FULL, length=8192, accumulation=2),
    _foundry("13B", MPT_13B, 8, 2262, 2, NONE, accumulation=3),
    _foundry("3B", MPT_3B, 8, 10811, 10, NONE, accumulation=2, note=EAGER),
    _foundry("1B", MPT_1B, 8, 20513, 14, NONE, accumulation=4, note=EAGER),
    _foundry("7B", MPT_7B, 8, 3679, 12, FULL, accumulation=4, small=True),
    _internlm(8, 3314, 8, 1, FULL),
    _internlm(8, 4103, 2, 4, NONE),
]
A100_MANY = [
    _foundry("7B", MPT_7B, 16, 3645, 16, FULL, small=True),
    _foundry("7B", MPT_7B, 32, 3725, 18, FULL, small=True),
    _foundry("7B", MPT_7B, 128, 3623, 18, FULL, small=True),
    _foundry("13B", MPT_13B, 16, 1993, 10, FULL, small=True),
    _foundry("13B", MPT_13B, 128, 1972, 16, FULL, small=True),
    _foundry("3B", MPT_3B, 16, 9750, 5, NONE, small=True, note=FULL_SHARD),
    _foundry("3B", MPT_3B, 128, 9538, 6, NONE, small=True, note=FULL_SHARD),
    _foundry("1B", MPT_1B, 16, 19085, 8, NONE, small=True, note=FULL_SHARD),
    _foundry("1B", MPT_1B, 128, 18647, 10, NONE, small=True, note=FULL_SHARD),
    Run(
        "Llama2-7B, 128 A100-80GB, 2x4096, torch.compile",
        "a100:16x8",
        4550,
        2,
        4096,
        {**LLAMA2_7B, **NONE},
        IBM,
        hardware=GBPS_50,
        note="hybrid shard in nodes, as ours",
    ),
    Run(
        "Llama2-7B, 128 A100-80GB, 2x4096, eager",
        "a100:16x8",
        3700,
        2,
        4096,
        {**LLAMA2_7B, **NONE},
        IBM_EAGER,
        hardware=GBPS_50,
        note="eager PyTorch: RMSNorm, RoPE and SwiGLU are not fused",
    ),
    Run(
        "Llama2-13B, 64 A100-80GB, 2x4096",
        "a100:8x8",
        2162,
        2,
        4096,
        {**LLAMA2_13B, **NONE},
        TITAN,
        fsdp=64,
        note=f"network not stated: the table's 200 Gb/s; {FULL_SHARD}",
    ),
    _internlm(128, 3260, 8, 1, FULL),
    _internlm(512, 3199, 8, 1, FULL),
    _internlm(1024, 3163, 8, 1, FULL),
    _internlm(1024, 2796, 4, 1, FULL, EXPOSED),
    _internlm(1024, 2341, 2, 1, FULL, EXPOSED),
    _internlm(1024, 2346, 2, 1, NONE, EXPOSED),
    _internlm(1024, 3625, 2, 4, NONE),
    Run(
        "MPT-7B, the training run, 440 A100-40GB",
        "a100:55x8",
        1e12 / (9.5 * 86400 * 440),
        4,
        2048,
        {**MPT_7B, **FULL},
        MPT_CARD,
        hardware=A100_40,
        note="1T tokens in 9.5 days: with loading, evaluation, checkpoints and failures",
    ),
    Run(
        "Baichuan-7B itself, 1,000 A800-80GB, 1x4096",
        "a800:125x8",
        # 182 TFLOP/s a GPU, at 6 operations a weight and attention counted without its mask.
        182e12 / (6 * 6.738e9 + 12 * 32 * 4096 * 4096),
        1,
        4096,
        {"model.vocab_size": 64000, **NONE},
        BAICHUAN,
        note="network and recomputation not stated: 200 Gb/s a GPU, nothing recomputed",
    ),
    Run(
        "TinyLlama, 16 A100-40GB, 8x8x2048",
        "a100:2x8",
        24000,
        8,
        2048,
        {**TINYLLAMA, **NONE},
        TINY,
        8,
        fsdp=16,
        hardware=A100_40,
        note="network not stated: the table's 200 Gb/s",
    ),
]
H100_SINGLE = [
    Run(
        "Llama2-7B, DGX H100", "h100:1x8", 8 / 0.721 * 1024, 2, 4096, {**LLAMA2_7B, **NONE}, TOOLBOX
    ),
    _maxtext(1, 492),
    _foundry("7B", MPT_7B, 8, 10643, 6, NONE, kind="h100"),
    _foundry("13B", MPT_13B, 8, 4792, 2, NONE, kind="h100", note=EAGER),
    _foundry("1B", MPT_1B, 8, 45455, 14, NONE, kind="h100", note=EAGER),
]
H100_MANY = [
    *(_maxtext(*row) for row in [(2, 422), (4, 407), (8, 409), (16, 375)]),
    _foundry("7B", MPT_7B, 128, 10475, 6, NONE, kind="h100", note=H100_FOUNDRY),
    _foundry("7B", MPT_7B, 512, 9670, 6, NONE, kind="h100", note=H100_FOUNDRY),
    _foundry("13B", MPT_13B, 64, 4800, 2, NONE, kind="h100", note=H100_FOUNDRY),
    _foundry("13B", MPT_13B, 128, 5080, 16, FULL, kind="h100", note=H100_FOUNDRY),
    _foundry("3B", MPT_3B, 128, 23422, 8, NONE, kind="h100", note=H100_FOUNDRY),
    _foundry("3B", MPT_3B, 512, 21664, 8, NONE, kind="h100", note=H100_FOUNDRY),
    Run(
        "Llama2-7B, 96 H100-80GB, 2x4096, torch.compile",
        "h100:12x8",
        9600,
        2,
        4096,
        {**LLAMA2_7B, **NONE},
        IBM,
        hardware=GBPS_100,
        note="hybrid shard in nodes, as ours",
    ),
]
RUNS = [*A100_SINGLE, *A100_MANY, *H100_SINGLE, *H100_MANY]
