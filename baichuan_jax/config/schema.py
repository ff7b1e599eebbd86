"""The settings of a run: one frozen dataclass a section, each setting with its default.

A default is the original Baichuan-7B's where the original had such a setting. Every class refuses
values that cannot be right (`__post_init__`, ConfigError), and `Config` those that contradict each
other. config/files.py reads them from YAML files and the command line. The docstring below a field
is its text in --help and in docs/configuration.md; after a change, run
`python docs/write_configuration.py`.
"""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from baichuan_jax.config.messages import hide_secrets, printable

TASKS = ("mmlu", "ceval", "agieval", "gaokao")  # tests that `evaluate` can score

# Sizes, steps and positions are 32-bit numbers on devices; jax takes seeds of 64.
MOST = (1 << 31) - 1
MOST_SEED = (1 << 63) - 1
# The ends of float32, in which numbers are computed with: beyond them 0 or infinity is left.
TINIEST, HUGEST = 1e-30, 1e30
# Rows are counted by weights as whole multiples of the smallest, a float in between.
MOST_APART = 1e12
# Blocks that are compiled one by one where they are not looped over: minutes of the compiler.
MOST_UNROLLED = 256


class ConfigError(ValueError):
    """A setting or an input that cannot be right.

    Commands exit with code 78, and no supervisor restarts them: another launch would fail too. The
    message is one line without secrets: names of files and texts in it may have breaks, which are
    shown as escapes, and addresses passwords.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(hide_secrets(message), one_line=True))


def require(holds: bool, message: str) -> None:
    """Raise ConfigError with this message unless the condition holds."""
    if not holds:
        raise ConfigError(message)


def is_address(text: str) -> bool:
    """Whether a text is host:port, or unix: and a socket's absolute path."""
    if text.startswith("unix:/"):
        return True
    host, _, port = text.rpartition(":")
    return host != "" and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16


def at_least(minimum: int, most: int = MOST) -> Callable[[str], int]:
    """The type of an option of a command that takes whole numbers from `minimum` to `most`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = minimum - 1
        if not minimum <= number <= most:
            # argparse names the option before this.
            raise argparse.ArgumentTypeError(
                f"{text[:60]!r} must be a whole number, {minimum} or more and {most} at most"
            )
        return number

    return parse


def between(least: float = TINIEST, most: float = HUGEST) -> Callable[[str], float]:
    """The type of an option of a command that takes any number from `least` to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text[:60]!r} must be a number from {least:g} to {most:g}"
            )
        return value

    return parse


def _positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}={value} must be greater than 0")
        require_computable(f"{section}.{name}", value)


def _not_negative(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{section}.{name}={value} must not be negative")
        require_computable(f"{section}.{name}", value)


def require_computable(name: str, value: float) -> None:
    """Refuse a number, 0 or more, that devices cannot count to or compute with."""
    if isinstance(value, int):
        require(value <= MOST, f"{name}={value} is too large: the most is 2^31 - 1")
    # NaN compares with nothing.
    holds = value == 0 or TINIEST <= value <= HUGEST
    require(holds, f"{name}={value} must lie between {TINIEST:g} and {HUGEST:g}")


def _not_empty(section: str, config: Any, *names: str) -> None:
    for name in names:
        name_of = f"{section}.{name}" if section else name
        require(getattr(config, name) != "", f"{name_of} is empty; give a name, or leave it out")


@dataclass(frozen=True)
class ModelConfig:
    """The model: Baichuan-7B's sizes by default."""

    # Sizes: config.json of baichuan-inc/Baichuan-7B.
    vocab_size: int = 64000
    """Rows of the embedding and columns of the head; at least the tokenizer's pieces."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    intermediate_size: int = 11008
    """Inner width of the SwiGLU block."""
    num_layers: int = 32
    """Transformer blocks."""
    num_heads: int = 32
    """Attention heads; head_dim = hidden_size / num_heads."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square inside RMSNorm."""
    # A constant in the original's modeling_baichuan.py; LLaMA's too.
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths."""
    initializer_range: float = 0.02
    """Standard deviation of every initial matrix."""
    # <unk> in the original's tokenizer, which byte fallback keeps out of all text.
    pad_token_id: int | None = 0
    """Its embedding row gets no gradient (the original's padding_idx); null: every row learns."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of activations and of weights in matrix products; parameters, norms, softmax and loss
    are float32 in either case."""
    # The default needs the least memory; `plan --search` finds the fastest that fits.
    remat: Literal["none", "matmuls", "full"] = "full"
    """What the backward pass recomputes: nothing, all but the matrix products, or whole blocks."""
    scan_layers: bool = True
    """Compile one block and loop over it (fast to compile), or unroll all blocks, 256 at most;
    results are equal."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def block_weights(self) -> int:
        """Weights of one block's matrices: Q, K, V and output, then SwiGLU's gate, up and down."""
        return 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, by formula."""
        # The embedding and the head are two matrices: they are not tied.
        block = self.block_weights + 2 * self.hidden_size  # two norms
        return 2 * self.vocab_size * self.hidden_size + self.num_layers * block + self.hidden_size

    def __post_init__(self) -> None:
        # Checked here and not where they are used: a wrong size fails before any device starts.
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        _positive("model", self, *sizes, "rope_theta", "initializer_range")
        _not_negative("model", self, "rms_norm_eps")
        require(
            self.hidden_size % self.num_heads == 0,
            f"model.num_heads={self.num_heads} does not divide "
            f"model.hidden_size={self.hidden_size}; choose a number of heads that does",
        )
        require(
            self.head_dim % 2 == 0,
            f"head_dim = hidden_size/num_heads = {self.hidden_size}/{self.num_heads} = "
            f"{self.head_dim} is odd; the rotary embedding turns pairs of channels",
        )
        require(
            self.scan_layers or self.num_layers <= MOST_UNROLLED,
            f"model.scan_layers=false would compile each of model.num_layers={self.num_layers} "
            f"blocks, and {MOST_UNROLLED} is the most; set --model.scan_layers true",
        )
        require(
            self.pad_token_id is None or 0 <= self.pad_token_id < self.vocab_size,
            f"model.pad_token_id={self.pad_token_id} is outside the vocabulary of "
            f"model.vocab_size={self.vocab_size}",
        )


@dataclass(frozen=True)
class TrainConfig:
    """Steps, batch and loss."""

    # 1.2e12 tokens / (1024 rows x 4096 tokens).
    num_steps: int = 286_000
    """Optimiser steps of the whole run, where the learning rate's schedule ends. The default makes
    1.2T tokens."""
    context_length: int = 4096
    """Tokens in a row."""
    # 4M tokens, LLaMA's batch.
    global_batch_size: int = 1024
    """Rows in a step, over all devices."""
    micro_batch_size: int | None = None
    """Rows a device holds in one forward and backward pass; fewer than its share accumulates
    gradients. null: its whole share."""
    # Float32 logits of a chunk take 256 MiB at a vocabulary of 64,000.
    loss_chunk_size: int = 1024
    """Tokens whose logits exist at once on a device."""
    # Off: the original's loss has no such term.
    z_loss: float = 0.0
    """Weight of the squared log-normaliser in the loss (PaLM used 1e-4)."""
    # One seed for both: jax's keys and the loader's order draw from different streams.
    seed: int = 42
    """Seed of the initial weights and of the order of the data; a run keeps the one it began
    with."""
    # A sum of 128 in bfloat16 has an error of 1.5 % (docs/benchmarks.md).
    gradient_dtype: Literal["float32", "bfloat16"] | None = None
    """Type in which gradients are summed over devices; null: model.dtype. Replicas add
    up their micro-batches in float32."""
    # Off: atomic additions in GPU kernels are faster, and their order varies.
    deterministic: bool = False
    """On GPUs: use only kernels that give the same bits every time (slower). A CPU always does."""
    schedule_profile: str | None = None
    """A file that `plan` wrote for this configuration: on GPUs XLA's scheduler takes the latencies
    of collectives from it."""

    def __post_init__(self) -> None:
        sizes = ("num_steps", "context_length", "global_batch_size", "loss_chunk_size")
        _positive("train", self, *sizes)
        if self.micro_batch_size is not None:
            _positive("train", self, "micro_batch_size")
        _not_negative("train", self, "z_loss")
        require(0 <= self.seed <= MOST_SEED, f"train.seed={self.seed} must be from 0 to 2^63 - 1")
        _not_empty("train", self, "schedule_profile")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and clipping."""

    # This and what follows: LLaMA-7B's values (Touvron et al. 2023, section 2.2).
    learning_rate: float = 3e-4
    """Peak, reached after the warm-up."""
    final_learning_rate_ratio: float = 0.1
    """The cosine ends at this share of the peak."""
    # A rate too high for fresh weights makes the first steps diverge.
    warmup_steps: int = 2000
    """Steps of linear warm-up."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: float = 0.95
    """Decay of AdamW's mean of squared gradients."""
    # torch's default.
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    decay_norms: bool = True
    """Decay the norms' weights too, as the original did."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    def __post_init__(self) -> None:
        _positive("optimizer", self, "learning_rate", "eps", "clip_norm")
        _not_negative("optimizer", self, "warmup_steps", "weight_decay")
        # A decay of 1 would divide by zero in the bias correction.
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            # As float32, in which it is computed with.
            require(
                0 <= value <= 1 - 2**-24,
                f"optimizer.{name}={value} must lie in [0, 1), and differ from 1 in float32",
            )
        ratio = self.final_learning_rate_ratio
        require(0 <= ratio <= 1, f"optimizer.final_learning_rate_ratio={ratio} must lie in [0, 1]")


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer."""

    path: str | None = None
    """A SentencePiece model. null: that of init_from's weights, or one is trained on the training
    text at first use."""
    # Enough for the bundled text; a small vocabulary keeps a small model's head small.
    vocab_size: int = 8192
    """Pieces of the tokenizer that is trained where neither path nor init_from is given."""

    def __post_init__(self) -> None:
        _not_empty("tokenizer", self, "path")
        _positive("tokenizer", self, "vocab_size")


@dataclass(frozen=True)
class DataConfig:
    """Corpora, and how they become rows of tokens."""

    # A weight is a share of rows, not of text: a small corpus of weight 1 is repeated more often.
    train: dict[str, float] = field(default_factory=dict)
    """Corpora and their sampling weights: globs of text or JSONL files (also .gz, .zst), or folders
    of packed rows."""
    validation: dict[str, float] = field(default_factory=dict)
    """The same for the validation loss; must share no document with the training text. Weights are
    ignored: rows are read in order."""
    text_field: str = "text"
    """The JSONL field or Parquet column that holds a document's text; outer.inner: a field inside
    another."""
    cache_dir: str = "cache"
    """Folder of trained tokenizers and packed rows, which later runs on the same text use again."""
    # Off as in the original, whose rows join documents with EOS and nothing else.
    document_mask: bool = False
    """Attend within documents only, positions counted from each document's start. The original
    attends across."""
    num_workers: int = 0
    """Processes that tokenise and pack; 0: one for each core."""
    skip: list[list[int]] = field(default_factory=list)
    """[begin, end] pairs of positions (batches, from 0) that are left out, end not included: data
    that broke an earlier run. A position behind the run means the batch that had it then, one ahead
    counts batches of today's size."""

    def __post_init__(self) -> None:
        for name in ("train", "validation"):
            for path, weight in getattr(self, name).items():
                require(
                    0 < weight < math.inf,
                    f"data.{name}: the weight of {path!r} is {weight}; it must be greater than 0",
                )
                require(
                    path != "", f"data.{name} has an empty name; give files or a folder of rows"
                )
            weights = getattr(self, name).values()
            require(
                not weights or max(weights) <= MOST_APART * min(weights),
                f"data.{name}: the weights go from {min(weights, default=0)} to "
                f"{max(weights, default=0)}; the largest may be {MOST_APART:g} times the smallest",
            )
        _not_empty("data", self, "text_field", "cache_dir")
        _not_negative("data", self, "num_workers")
        for window in self.skip:
            require(
                len(window) == 2 and 0 <= window[0] < window[1] <= MOST,
                f"data.skip: {window} must be [begin, end], 0 <= begin < end < 2^31",
            )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1: all that are left."""

    data: int = -1
    """Replicas with a copy of the state each, across nodes: gradients are averaged over them."""
    # Shards exchange parameters in every step, so they belong on the fastest links.
    fsdp: int = 1
    """Shards of parameters and optimiser state, inside a node; the batch is split along it too."""
    context: int = 1
    """Pieces of every sequence."""
    tensor: int = 1
    """Pieces of heads, hidden units and vocabulary, inside a node."""
    # Half of a step's network traffic, gathering the weights, then runs beside the forward pass.
    state: int = 1
    """Replicas that share one copy of parameters and optimiser state, a part each, across nodes; in
    all there are data x state replicas."""

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """In the order of sharding.AXES; make_mesh varies the last one fastest."""
        return (self.data, self.state, self.fsdp, self.context, self.tensor)

    @property
    def batch_shards(self) -> int:
        """Devices along which the rows of a batch are split."""
        return self.data * self.state * self.fsdp

    def __post_init__(self) -> None:
        require(
            all(0 < size <= MOST or size == -1 for size in self.shape)
            and self.shape.count(-1) <= 1,
            f"mesh sizes (data, state, fsdp, context, tensor)={self.shape} must be positive and "
            "less than 2^31, one of them -1 at most",
        )

    def resolve(self, num_devices: int) -> "MeshConfig":
        """This mesh with its -1 filled in. Raises ConfigError where num_devices does not fit."""
        # The product of the sizes that are given.
        known = 1
        for size in self.shape:
            known *= size if size > 0 else 1
        free = -1 in self.shape
        require(
            num_devices % known == 0 if free else num_devices == known,
            f"mesh (data, state, fsdp, context, tensor)={self.shape} needs "
            f"{'a multiple of ' if free else ''}{known} devices and there are {num_devices}; "
            f"set mesh.* so that the product is {num_devices}",
        )
        sizes = {
            name: getattr(self, name) for name in ("data", "state", "fsdp", "context", "tensor")
        }
        return replace(
            self,
            **{name: num_devices // known for name, size in sizes.items() if size == -1},
        )


@dataclass(frozen=True)
class KernelsConfig:
    """Implementations of operators."""

    attention: Literal["auto", "reference", "blockwise", "triton", "cudnn", "pallas"] = "auto"
    """Implementation of attention. A named one that cannot serve this model and device is an
    error."""
    rms_norm: Literal["auto", "reference", "triton", "pallas"] = "auto"
    """Implementation of RMSNorm and the residual addition before it. A named one that cannot serve
    is an error."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    # By default the interval follows the clock: it is right for any step time and any cluster.
    every: int | None = None
    """Steps between checkpoints; the last step is always saved. null: from what saves cost and how
    often faults come (Young/Daly)."""
    # Several, since a rollback after a loss spike may need one from before the newest.
    keep_last: int = 3
    """How many of the newest checkpoints are kept."""
    keep_every: int | None = None
    """Checkpoints at multiples of this many steps are kept for good."""
    # Storage is slow and shared; a host's own disk is fast, and lost with the host.
    local_dir: str | None = None
    """Folder of your own on each host's disk, or in /dev/shm, for copies of the newest state beside
    the checkpoints; $VARIABLES are replaced by the host's environment."""
    local_every: int | None = None
    """Steps between copies in local_dir. A start takes the newest state there is, from any host."""

    @property
    def local_path(self) -> Path | None:
        """local_dir with this host's environment put in. Raises ConfigError where it lacks some."""
        if self.local_dir is None:
            return None
        path = os.path.expandvars(self.local_dir)
        # It would become a folder of that very name where the run was started: on shared storage.
        require(
            "$" not in path,
            f"checkpoint.local_dir={path} names a variable that is not set on this host; set it, "
            "or name the folder itself",
        )
        return Path(path)

    def __post_init__(self) -> None:
        _positive("checkpoint", self, "keep_last")
        for name in ("every", "local_every", "keep_every"):
            if getattr(self, name) is not None:
                _positive("checkpoint", self, name)
        require(
            (self.local_dir is None) == (self.local_every is None),
            f"checkpoint.local_dir={self.local_dir} and checkpoint.local_every={self.local_every}: "
            "set both or neither",
        )
        _not_empty("checkpoint", self, "local_dir")
        require(
            self.local_every != 1,
            "checkpoint.local_every=1: a copy counts two steps after it was made; set 2 or more",
        )
        if self.keep_every is not None and self.every is not None:
            require(
                self.keep_every % self.every == 0,
                f"checkpoint.keep_every={self.keep_every} is no multiple of "
                f"checkpoint.every={self.every}: nothing would be saved there",
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """The validation loss, and multiple-choice tests during a run."""

    every: int = 500
    """Steps between evaluations; the last step is always evaluated."""
    # The same rows each time, so that the losses of a run can be compared.
    num_batches: int = 16
    """Batches of validation rows each time; fewer where the text ends."""
    # A test costs a pass over all its prompts; few subjects or a limit keep an evaluation short.
    tasks: dict[str, str] = field(default_factory=dict)
    """Tests to score each time and the folders of their data: mmlu, ceval, agieval, gaokao (see
    docs/evaluation.md)."""
    subjects: dict[str, list[str]] = field(default_factory=dict)
    """Only these subjects of a test: {mmlu: [anatomy, astronomy]}; a test that is not named here is
    asked whole."""
    limit: int | None = None
    """Questions of each subject, from its beginning; null: all."""

    def __post_init__(self) -> None:
        _positive("evaluate", self, "every", "num_batches")
        if self.limit is not None:
            _positive("evaluate", self, "limit")
        for task in self.tasks:
            require(
                task in TASKS,
                f"evaluate.tasks has {task!r} and must have some of {', '.join(TASKS)}",
            )
        for task in self.subjects:
            require(
                task in self.tasks, f"evaluate.subjects has {task!r}, which evaluate.tasks has not"
            )
            require(
                self.subjects[task] != [],
                f"evaluate.subjects names no subject of {task!r}; name some, or leave the test out "
                "of evaluate.tasks",
            )


@dataclass(frozen=True)
class SampleConfig:
    """Texts that the finished model writes."""

    prompts: list[str] = field(default_factory=list)
    """Texts that the finished model continues."""
    # A line or two: enough to see whether the model writes its languages.
    max_new_tokens: int = 48
    """Tokens of each continuation."""

    def __post_init__(self) -> None:
        _positive("sample", self, "max_new_tokens")
        for prompt in self.prompts:
            require(prompt != "", "sample.prompts has an empty text; give some text to continue")
        # The samples of a run are recorded by their prompts.
        twice = [prompt for prompt in self.prompts if self.prompts.count(prompt) > 1]
        require(not twice, f"sample.prompts has a text twice: {twice[:1]}; leave one out")


@dataclass(frozen=True)
class MetricsConfig:
    """Where metrics are written, beside the run's metrics.jsonl."""

    # On: it costs little, and a run without it cannot be drawn there later.
    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""
    wandb_project: str | None = None
    """Weights & Biases project to log to; needs the wandb package."""
    # None: from the table of accelerators, or measured on a CPU.
    peak_tflops: float | None = None
    """Dense bfloat16 TFLOP/s of one device, for an accelerator that hardware/accelerators.py
    lacks. MFU is a share of it."""

    def __post_init__(self) -> None:
        _not_empty("metrics", self, "wandb_project")
        if self.peak_tflops is not None:
            _positive("metrics", self, "peak_tflops")


@dataclass(frozen=True)
class ProfileConfig:
    """Profiler traces."""

    steps: list[int] = field(default_factory=list)
    """[first, last]: write a jax.profiler trace of these steps. SIGUSR1 traces the next three."""

    def __post_init__(self) -> None:
        require(
            not self.steps
            or (len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1] <= MOST),
            f"profile.steps={self.steps} must be [first, last] with 1 <= first <= last",
        )


@dataclass(frozen=True)
class ResilienceConfig:
    """Faults: which time limits and which numbers count as one."""

    # Waiting costs the whole cluster; a false alarm costs one restart.
    hang_seconds: float = 20.0
    """A phase of a step (data, dispatch, wait) may last this long, or five times its longest so
    far; then the process exits with 76. A checkpoint and an evaluation may last ten times as
    long."""
    # Long: a first start may pack a corpus or compile for half an hour.
    start_seconds: float = 1800.0
    """The same limit for everything before the first step, and for the first phase of each kind:
    packing, restoring, compiling."""
    silence_seconds: float = 10.0
    """A process whose heartbeat, one a second, times out after this long counts as dead; the others
    exit with 76."""
    # Deviations by the median absolute deviation (resilience/guard.py), which a spike cannot move.
    spike_deviations: float = 20.0
    """A loss, or three gradient norms in a row, this many deviations above the median of the last
    128 steps is a spike: the run goes back to a checkpoint. 0: never."""
    # More windows than that are no accident of the data.
    max_skips: int = 5
    """Windows of data that a run leaves out by itself before it gives up."""
    # Off: a check costs a forward and backward pass of a row for each shard.
    check_every: int = 0
    """Steps between checks that all replicas compute the same bits; 0: none. On GPUs it needs
    train.deterministic."""

    @property
    def jax_heartbeat_seconds(self) -> int:
        """Timeout after which jax itself aborts a run that has lost a process.

        The last resort. Before it, the other processes must notice the silence (after 2.5 s in
        which no step ends), write their exit reports (3 s) and keep them readable (2 s).
        """
        # jax was seen to abort after 0.8 of its timeout.
        return max(30, math.ceil((self.silence_seconds + 7.5) / 0.8))

    def __post_init__(self) -> None:
        for name in ("hang_seconds", "start_seconds", "silence_seconds"):
            _positive("resilience", self, name)
            value = getattr(self, name)
            # Timers of the system and of jax take no longer ones.
            require(value <= 1e8, f"resilience.{name}={value} must be 1e8 (three years) at most")
        _not_negative("resilience", self, "spike_deviations", "max_skips", "check_every")


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes. All null: from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or from Slurm, else one process."""

    coordinator_address: str | None = None
    """host:port of process 0, which listens on that address alone; unix:/FILE on one host."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """This process's number, from 0."""

    def __post_init__(self) -> None:
        if (address := self.coordinator_address) is not None:
            require(
                is_address(address),
                f"distributed.coordinator_address={address!r} must be host:port, or unix:/FILE",
            )
        if self.num_processes is not None:
            _positive("distributed", self, "num_processes")
        if self.process_id is not None:
            _not_negative("distributed", self, "process_id")
            require(
                self.num_processes is None or self.process_id < self.num_processes,
                f"distributed.process_id={self.process_id} must be less than "
                f"distributed.num_processes={self.num_processes}: they count from 0",
            )


@dataclass(frozen=True)
class Config:
    """A run: its folder, and a section for each part."""

    # Named by the file and not by the time, so that the same command continues the same run.
    run_dir: str | None = None
    """Folder of the run: configuration, metrics, checkpoints. null: runs/ and the configuration
    file's name."""
    init_from: str | None = None
    """A Hugging Face Baichuan or LLaMA folder, or a run's checkpoint: the run starts from its
    weights, with its tokenizer and a fresh optimiser and schedule."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        _not_empty("", self, "run_dir", "init_from")
        require(
            not self.profile.steps or self.profile.steps[1] <= self.train.num_steps,
            f"profile.steps={self.profile.steps} exceed train.num_steps={self.train.num_steps}: "
            "there would be nothing to trace",
        )
        require(
            self.optimizer.warmup_steps <= self.train.num_steps,
            f"optimizer.warmup_steps={self.optimizer.warmup_steps} exceeds "
            f"train.num_steps={self.train.num_steps}; the peak learning rate would never be "
            "reached",
        )
        # Only then is one trained; a model may be used without text.
        if self.tokenizer.path is None and self.init_from is None and self.data.train:
            require(
                self.tokenizer.vocab_size >= 261,
                f"tokenizer.vocab_size={self.tokenizer.vocab_size} must be at least 261: 3 control "
                "pieces and 256 bytes come first, then a character and a pair",
            )
            require(
                self.tokenizer.vocab_size <= self.model.vocab_size,
                f"model.vocab_size={self.model.vocab_size} is smaller than "
                f"tokenizer.vocab_size={self.tokenizer.vocab_size}: the embedding needs a row for "
                "each of the tokenizer's pieces; raise the one or lower the other",
            )
        # A mesh with -1 is checked when the number of devices is known: make_steps.
        if -1 not in self.mesh.shape:
            self.check_mesh(self.mesh)

    @property
    def run_path(self) -> Path:
        """The run's folder."""
        return Path(self.run_dir or "runs/default")

    def check_mesh(self, mesh: MeshConfig) -> None:
        """Raise ConfigError, with both numbers, for a mesh that does not divide model or batch."""
        # What each axis splits, as in sharding.RULES. XLA would pad an uneven split, and waste the
        # padding's work on every device.
        for what, size, axis, count in (
            ("model.num_heads", self.model.num_heads, "tensor", mesh.tensor),
            ("model.intermediate_size", self.model.intermediate_size, "tensor", mesh.tensor),
            ("model.vocab_size", self.model.vocab_size, "tensor", mesh.tensor),
            ("model.hidden_size", self.model.hidden_size, "fsdp", mesh.fsdp),
            ("train.context_length", self.train.context_length, "context", mesh.context),
        ):
            require(size % count == 0, f"mesh.{axis}={count} does not divide {what}={size}")
        shard = self.model.hidden_size // mesh.fsdp
        most = math.gcd(shard, mesh.state)
        require(
            most == mesh.state,
            f"mesh.state={mesh.state} does not divide model.hidden_size / mesh.fsdp = {shard}; on "
            f"as many devices, mesh.state {most} and mesh.data {mesh.data * mesh.state // most} do",
        )
        self.accumulation_steps(mesh)
        require(
            self.resilience.check_every == 0 or mesh.data > 1 or mesh.state == 1,
            f"resilience.check_every={self.resilience.check_every} compares copies of the state, "
            f"and with mesh.data=1 and mesh.state={mesh.state} there is one; set mesh.data to 2 or "
            "more (a smaller mesh.state), or resilience.check_every 0",
        )

    def on_part(self, full: MeshConfig) -> "Config":
        """This configuration on fewer devices than `full` has, with unchanged rows in a pass.

        For a launch without a node that was lost. The global batch stays as it is and no device
        needs more memory: gradients of more micro-batches are accumulated.
        """
        shards = full.batch_shards
        if self.train.micro_batch_size is not None or shards <= self.mesh.batch_shards:
            return self
        micro = max(1, self.train.global_batch_size // shards)
        return replace(self, train=replace(self.train, micro_batch_size=micro))

    def accumulation_steps(self, mesh: MeshConfig) -> int:
        """Micro-batches of a step on a resolved mesh.

        Raises ConfigError where devices and micro-batches do not divide the batch.
        """
        rows, batch = mesh.batch_shards, self.train.global_batch_size
        require(
            batch % rows == 0,
            f"mesh.data x mesh.state x mesh.fsdp = {mesh.data} x {mesh.state} x {mesh.fsdp} = "
            f"{rows} does not divide train.global_batch_size={batch}",
        )
        if self.train.micro_batch_size is None:
            return 1
        # Rows of one micro-batch over all devices.
        micro = self.train.micro_batch_size * rows
        require(
            batch % micro == 0,
            f"train.micro_batch_size={self.train.micro_batch_size} on {rows} batch shards makes "
            f"{micro} rows, which does not divide train.global_batch_size={batch}",
        )
        return batch // micro
