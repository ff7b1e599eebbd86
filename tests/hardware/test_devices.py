"""FLOPs of a model by the published formula, and what MFU is a share of."""

import pytest

from baichuan_jax.config.schema import Config, MetricsConfig, ModelConfig
from baichuan_jax.hardware.devices import peak_flops
from baichuan_jax.hardware.flops import flops_per_token


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
