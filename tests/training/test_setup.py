"""What the hosts of a run must agree on before the first step."""

import dataclasses
import types

import jax
import pytest

from baichuan_jax.config.schema import ConfigError, MeshConfig, ResilienceConfig
from baichuan_jax.resilience import coordination
from baichuan_jax.runs.console import Display
from baichuan_jax.sharding import make_mesh
from baichuan_jax.training import setup, summary


def test_a_host_with_other_settings_is_refused_with_the_first_that_differs(
    tiny_config, monkeypatch
):
    """Else it would compile another program, and all would wait in a collective."""
    values: dict[str, str] = {}
    client = types.SimpleNamespace(
        key_value_set=values.__setitem__, blocking_key_value_get=lambda key, _: values[key]
    )
    monkeypatch.setattr(coordination, "_client", lambda: client)
    monkeypatch.setattr(coordination, "_process_id", lambda: 0)
    setup._refuse_other_settings(tiny_config)
    monkeypatch.setattr(coordination, "_process_id", lambda: 1)
    # Folders may lie elsewhere.
    data = dataclasses.replace(tiny_config.data, num_workers=7, cache_dir="elsewhere")
    setup._refuse_other_settings(dataclasses.replace(tiny_config, data=data))
    other = dataclasses.replace(
        tiny_config, optimizer=dataclasses.replace(tiny_config.optimizer, learning_rate=1e-9)
    )
    with pytest.raises(
        ConfigError, match=r"optimizer\.learning_rate is .* for process 0 and 1e-09 for process"
    ):
        setup._refuse_other_settings(other)


def test_where_there_is_one_replica_the_start_says_that_none_are_compared(tiny_config, capsys):
    for data in (1, 2):
        mesh = MeshConfig(data, 1, 1, 1)
        config = dataclasses.replace(
            tiny_config, mesh=mesh, resilience=ResilienceConfig(check_every=5)
        )
        summary._show_start(Display(), config, make_mesh(mesh, jax.devices()[:data]), 1000)
        said = " ".join(capsys.readouterr().out.split())
        assert ("check_every=5: nothing is compared" in said) == (data == 1)
