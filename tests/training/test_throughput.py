"""Speed and MFU beside the original's."""

import pytest

from baichuan_jax.config.schema import Config
from baichuan_jax.hardware.flops import flops_per_token
from baichuan_jax.training.throughput import Throughput


def test_mfu_of_the_original():
    """182 TFLOP/s of an A800's 312 are 58.3 %: the original's throughput gives that MFU."""
    config = Config()
    full, causal = flops_per_token(config.model, 4096)
    throughput = Throughput(config, 1000, 312.0 * 1e12)
    seconds = throughput.tokens * full / (182e12 * 1000)
    speed = throughput.add(seconds)
    assert speed["mfu"] == pytest.approx(0.583, abs=5e-4)
    assert speed["mfu_causal"] == pytest.approx(0.583 * causal / full, abs=5e-4)


def test_where_the_peak_is_unknown_there_is_a_speed_and_no_mfu():
    speed = Throughput(Config(), 8, None).add(1.0)
    assert speed["mfu"] is None
    assert speed["tokens_per_second"] > 0
