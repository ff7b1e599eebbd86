"""FLOPs of a model by the published formula, and what MFU is a share of."""

import jax
import pytest

from baichuan_jax.config.schema import (
    Config,
    ConfigError,
    DistributedConfig,
    MeshConfig,
    MetricsConfig,
    ModelConfig,
    TrainConfig,
)
from baichuan_jax.generate import main as generate
from baichuan_jax.hardware.devices import peak_flops, require_devices, require_memory
from baichuan_jax.hardware.flops import flops_per_token
from baichuan_jax.hf.__main__ import main as hf
from baichuan_jax.resilience.processes import initialize_processes


def test_7b_flops_follow_the_published_formula():
    """6 N D with all weights but the embedding, and 12 L D T for attention (PaLM, appendix B)."""
    model = ModelConfig()
    full, causal = flops_per_token(model, 4096)
    products = model.num_parameters - model.vocab_size * model.hidden_size
    attention = 12 * 32 * 4096 * 4096
    assert full == pytest.approx(
        6 * products + attention, rel=1e-4
    )  # norms' weights are in N and in no product
    assert full - causal == attention / 2


class Device:
    def __init__(self, platform, kind):
        self.platform, self.device_kind = platform, kind


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("TPU v5p", 459),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
    ],
)
def test_the_peak_comes_from_the_table(kind, tflops):
    assert peak_flops(Config(), Device("gpu", kind))[0] == tflops * 1e12


def test_an_unknown_accelerator_shows_no_mfu_and_names_the_setting():
    peak, why = peak_flops(Config(), Device("gpu", "NVIDIA Z1"))
    assert peak is None
    assert "metrics.peak_tflops" in why
    peak, why = peak_flops(
        Config(metrics=MetricsConfig(peak_tflops=7.0)), Device("gpu", "NVIDIA Z1")
    )
    assert peak == 7e12


@pytest.mark.parametrize(
    ("config", "mesh", "said"),
    [
        (Config(), (1, 1, 1, 1), "state of 7,000,559,616 parameters"),
        (Config(), (1, 8, 1, 1), None),
        (Config(), (8, 1, 1, 1), "state of"),
        (Config(), (1, 1, 1, 1, 8), None),
        (Config(train=TrainConfig(global_batch_size=1 << 28)), (8, 8, 1, 1), "batch of 1,099,511"),
        (
            Config(train=TrainConfig(global_batch_size=1 << 28)),
            (1, 8, 1, 1, 8),
            "batch of 1,099,511",
        ),
        (Config(train=TrainConfig(context_length=(1 << 31) - 1)), (1, 64, 1, 1), "batch of"),
    ],
)
def test_what_no_device_can_hold_is_refused(config, mesh, said):
    device = Device("gpu", "NVIDIA A800-SXM4-80GB")
    device.memory_stats = lambda: {"bytes_limit": 60 << 30}
    if said is None:
        require_memory(config, MeshConfig(*mesh), device)
        return
    with pytest.raises(ConfigError, match=said):
        require_memory(config, MeshConfig(*mesh), device)


def test_devices_of_a_cpu_share_its_memory():
    model = ModelConfig(num_layers=1 << 20)
    with pytest.raises(ConfigError, match="GiB at least on each device"):
        require_memory(Config(model=model), MeshConfig(8, 1, 1, 1), jax.devices()[0])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        # jax's own: of a plugin without a driver, and of a platform that it does not have.
        (AssertionError(), "no device of it was found; unset JAX_PLATFORMS, or name"),
        (RuntimeError("Unable to initialize backend 'x':\n not known"), "backend 'x': not known;"),
    ],
    ids=["assertion", "error"],
)
def test_a_platform_without_devices_is_a_wrong_setting(error, reason, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "x")
    # `train`, `preflight` and `evaluate` join their processes; the others are one.
    for start in (
        lambda: initialize_processes(DistributedConfig()),
        lambda: generate(["--checkpoint", "nowhere", "--prompt", "a"]),
        lambda: hf(["export", "nowhere", "out"]),
    ):
        with pytest.raises(ConfigError, match=f"JAX_PLATFORMS=x: .*{reason}"):
            start()
    # Among several processes one host's devices may be at fault, or a lost peer.
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(type(error)) as caught:
        require_devices()
    assert any("unset JAX_PLATFORMS" in note for note in caught.value.__notes__)
