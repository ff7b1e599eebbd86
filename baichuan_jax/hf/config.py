"""config.json of a Hugging Face folder: read into a ModelConfig, and written from one."""

from pathlib import Path
from typing import Any

from baichuan_jax.config.parsing import Positive, read_json, require_type, show
from baichuan_jax.config.schema import ConfigError, ModelConfig
from baichuan_jax.tokenizer import BOS, EOS

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "rms_norm_eps": "rms_norm_eps",
}
"""What every config.json must have, and the setting of ModelConfig that it is."""

# What keys must be where they are there. Others are compared with the values that this model has.
_TYPES = {
    **dict.fromkeys(KEYS, Positive),
    "rms_norm_eps": float,
    "rope_theta": float,
    "initializer_range": float,
    "pad_token_id": int | None,
    "num_key_value_heads": int | None,
    "architectures": list[str] | None,
    "rope_scaling": dict[str, Any] | None,
    "rope_parameters": dict[str, Any] | None,
}

# Not BaichuanForCausalLM, under the same model_type: Baichuan-13B has ALiBi and no rotary
# embedding, Baichuan2 a normalised head.
ARCHITECTURES = ("BaiChuanForCausalLM", "LlamaForCausalLM", "LLaMAForCausalLM")


def read_config(folder: Path | str) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder.

    Raises ConfigError that names the file and the key, also for what this model cannot be.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder} has no config.json: it is no Hugging Face folder")
    found = require_type(read_json(file), dict, str(file))
    if missing := [key for key in KEYS if key not in found]:
        raise ConfigError(f"{file} lacks {', '.join(missing)}")
    # A wrong type would otherwise fail far from here, in the shape of an array.
    for key, kind in _TYPES.items():
        if key in found:
            require_type(found[key], kind, f"{file}: {key}")
    rope = found.get("rope_parameters") or {}
    theta = require_type(rope.get("rope_theta", 10000.0), float, f"{file}: rope_parameters' theta")
    _refuse_other_models(file, found)
    # transformers 5 moved rope_theta into rope_parameters. The original's file has neither: it is a
    # constant of the code there.
    theta = found.get("rope_theta", theta)
    padding = found.get("pad_token_id")
    try:
        return ModelConfig(
            **{ours: found[theirs] for theirs, ours in KEYS.items()},
            rope_theta=float(theta),
            initializer_range=found.get("initializer_range", 0.02),
            # LLaMA's -1: none.
            pad_token_id=None if padding is not None and padding < 0 else padding,
        )
    except ConfigError as error:
        raise ConfigError(f"{file} describes no model that can be built: {error}") from None


def _refuse_other_models(file: Path, found: dict[str, Any]) -> None:
    # Each of these keys would change what the model computes. An absent key means the first value.
    heads, kv_heads = found["num_attention_heads"], found.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise ConfigError(
            f"{file} has num_key_value_heads={kv_heads} for {heads} heads: "
            "this model has no grouped-query attention"
        )
    for key, only in (
        ("model_type", ("baichuan", "llama")),
        ("hidden_act", ("silu",)),
        ("tie_word_embeddings", (False,)),
        ("attention_bias", (False,)),
        ("mlp_bias", (False,)),
        ("head_dim", (None, found["hidden_size"] // heads)),
    ):
        if found.get(key, only[0]) not in only:
            allowed = " or ".join(map(repr, only))
            raise ConfigError(f"{file} has {key}={show(found[key])} and this model has {allowed}")
    for name in found.get("architectures") or ():
        if name not in ARCHITECTURES:
            allowed = " or ".join(ARCHITECTURES)
            raise ConfigError(f"{file} has architecture {show(name)} and this model is {allowed}")
    # Older files have rope_scaling, newer ones rope_parameters, which also holds the plain base.
    for key in ("rope_scaling", "rope_parameters"):
        rope = found.get(key) or {}
        plain = rope.keys() <= {"rope_theta", "rope_type"}
        if not plain or rope.get("rope_type", "default") != "default":
            raise ConfigError(
                f"{file} has {key}={show(rope)} and this model's rotary embedding is not scaled"
            )


def make_config(config: ModelConfig, dtype: str, form: str) -> dict[str, Any]:
    """The content of config.json for transformers' Llama ("llama") or the original ("baichuan")."""
    # The original's configuration class does not know these two.
    heads = {"num_key_value_heads": config.num_heads, "head_dim": config.head_dim}
    return {
        "architectures": ["LlamaForCausalLM" if form == "llama" else "BaiChuanForCausalLM"],
        "model_type": form,
        "hidden_act": "silu",
        "initializer_range": config.initializer_range,
        # The original's value, whatever length was trained: a ModelConfig does not know it.
        "max_position_embeddings": 4096,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
        "use_cache": True,
        **{theirs: getattr(config, ours) for theirs, ours in KEYS.items()},
        **(heads if form == "llama" else {}),
    }


def make_generation_config(config: ModelConfig) -> dict[str, Any]:
    """The content of generation_config.json."""
    return {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": config.pad_token_id}
