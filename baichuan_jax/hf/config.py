"""The configuration files of a Hugging Face folder: read into a ModelConfig, written from one.

A ModelConfig has no place for some of what they say: the length of training and the special tokens.
These are `facts`: kept with imported weights, so that an export writes them again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baichuan_jax.config.parsing import LARGEST, Positive, read_json, require_type, show
from baichuan_jax.config.schema import ConfigError, ModelConfig
from baichuan_jax.hf.files import own_file
from baichuan_jax.tokenizer import BOS, EOS, Tokenizer

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
    "partial_rotary_factor": float | None,
    "pad_token_id": int | None,
    "num_key_value_heads": int | None,
    "architectures": list[str] | None,
    "rope_scaling": dict[str, Any] | None,
    "rope_parameters": dict[str, Any] | None,
}

# Not BaichuanForCausalLM, under the same model_type: Baichuan-13B has ALiBi and no rotary
# embedding, Baichuan2 a normalised head.
ARCHITECTURES = ("BaiChuanForCausalLM", "LlamaForCausalLM", "LLaMAForCausalLM")

# What else is read of config.json: see read_facts.
FACTS = ("max_position_embeddings", "bos_token_id", "eos_token_id")

# The length of the original's training, which weights that were imported without it get.
ORIGINAL_LENGTH = 4096

# A constant of the original's code, whose config.json does not have it.
ORIGINAL_THETA = 10000.0


def read_config(folder: Path | str) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder.

    Raises ConfigError that names the file and the key, also for what this model cannot be.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder} has no config.json: it is no Hugging Face folder")
    found = require_type(read_json(own_file(file)), dict, str(file))
    if missing := [key for key in KEYS if key not in found]:
        raise ConfigError(f"{file} lacks {', '.join(missing)}")
    # A wrong type would otherwise fail far from here, in the shape of an array.
    for key, kind in _TYPES.items():
        if key in found:
            require_type(found[key], kind, f"{file}: {key}")
    _refuse_other_models(file, found)
    theta = _theta(file, found)
    padding = found.get("pad_token_id")
    try:
        return ModelConfig(
            **{ours: found[theirs] for theirs, ours in KEYS.items()},
            rope_theta=theta,
            initializer_range=found.get("initializer_range", 0.02),
            # LLaMA's -1: none.
            pad_token_id=None if padding is not None and padding < 0 else padding,
        )
    except ConfigError as error:
        raise ConfigError(f"{file} describes no model that can be built: {error}") from None


def _theta(file: Path, found: dict[str, Any]) -> float:
    """The base of the rotary embedding. Raises ConfigError where two places say two."""
    given = {"rope_theta": found["rope_theta"]} if "rope_theta" in found else {}
    # transformers 5 moved it into rope_parameters, for which it also takes rope_scaling.
    for key in ("rope_parameters", "rope_scaling"):
        if "rope_theta" in (rope := found.get(key) or {}):
            place = f"{key}.rope_theta"
            given[place] = require_type(rope["rope_theta"], float, f"{file}: {place}")
    if len(set(given.values())) > 1:
        said = " and ".join(f"{place}={theta}" for place, theta in given.items())
        raise ConfigError(f"{file} has {said}, which must be one number; correct the wrong one")
    return float(next(iter(given.values()), ORIGINAL_THETA))


def read_facts(folder: Path | str) -> dict[str, Any]:
    """What a Hugging Face folder says that a ModelConfig has no place for, under its own names.

    max_position_embeddings, bos_token_id and eos_token_id of config.json, and add_bos_token of
    tokenizer_config.json; what it does not say is missing. Raises ConfigError for a wrong type.
    """
    file = Path(folder) / "config.json"
    found = require_type(read_json(own_file(file)), dict, str(file))
    facts = check_facts(found, file)
    tokenizer = Path(folder) / "tokenizer_config.json"
    if tokenizer.is_file():
        settings = require_type(read_json(own_file(tokenizer)), dict, str(tokenizer))
        bos = require_type(
            settings.get("add_bos_token"), bool | None, f"{tokenizer}: add_bos_token"
        )
        if bos:
            facts["add_bos_token"] = True
    return facts


def check_facts(found: dict[str, Any], where: Path) -> dict[str, Any]:
    """Those of an object that are FACTS, or add_bos_token. Raises ConfigError for a wrong type."""
    facts = {key: found[key] for key in FACTS if found.get(key) is not None}
    for key, value in facts.items():
        # Models of conversations end a text with any of several tokens.
        several = value if key == "eos_token_id" and isinstance(value, list) else [value]
        least = 1 if key == "max_position_embeddings" else -1
        # bool is an int to Python.
        if not all(type(each) is int and least <= each <= LARGEST for each in several):
            raise ConfigError(f"{where} has {key}={show(value)}, which must be a whole number")
    return facts


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
        ("partial_rotary_factor", (1, None)),
    ):
        if found.get(key, only[0]) not in only:
            allowed = " or ".join(map(repr, only))
            raise ConfigError(f"{file} has {key}={show(found[key])} and this model has {allowed}")
    for name in found.get("architectures") or ():
        if name not in ARCHITECTURES:
            allowed = " or ".join(ARCHITECTURES)
            raise ConfigError(f"{file} has architecture {show(name)} and this model is {allowed}")
    # Its weights have other numbers than their names say, or other names.
    for key in ("quantization_config", "compression_config"):
        if found.get(key) is not None:
            raise ConfigError(
                f"{file} has {key}={show(found[key])}, and this program does not compute with "
                "quantised weights; give those before quantisation"
            )
    # Older files have rope_scaling, newer ones rope_parameters, which also holds the plain base.
    for key in ("rope_scaling", "rope_parameters"):
        rope = found.get(key) or {}
        plain = rope.keys() <= {"rope_theta", "rope_type", "partial_rotary_factor"}
        whole = rope.get("partial_rotary_factor") in (1, None)
        if not (plain and whole) or rope.get("rope_type", "default") != "default":
            raise ConfigError(
                f"{file} has {key}={show(rope)} and this model's rotary embedding is not scaled"
            )


def require_form(config: ModelConfig, form: str) -> None:
    """Raise ConfigError where the original's code would compute another model: its base is fixed.

    All else that a ModelConfig says of a model it reads from config.json.
    """
    if form == "baichuan" and config.rope_theta != ORIGINAL_THETA:
        raise ConfigError(
            f"model.rope_theta={config.rope_theta:g} is {ORIGINAL_THETA:g} in the original's code, "
            "which reads none from config.json; export with --form llama"
        )


def make_config(
    config: ModelConfig,
    dtype: str,
    form: str,
    tokenizer: Tokenizer | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of config.json for transformers' Llama ("llama") or the original ("baichuan").

    `facts`: as of read_facts; they give way to the tokenizer, which has its own special tokens.
    Raises ConfigError for a model that the original's code cannot be, in its form.
    """
    facts = facts or {}
    require_form(config, form)
    # The original's configuration class does not know these two, and transformers does not know
    # its classes: they are files of the folder (auto_map).
    heads = {"num_key_value_heads": config.num_heads, "head_dim": config.head_dim}
    files = {
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaiChuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaiChuanForCausalLM",
        }
    }
    return {
        "architectures": ["LlamaForCausalLM" if form == "llama" else "BaiChuanForCausalLM"],
        "model_type": form,
        "hidden_act": "silu",
        "initializer_range": config.initializer_range,
        "max_position_embeddings": facts.get("max_position_embeddings", ORIGINAL_LENGTH),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
        **make_generation_config(config, tokenizer, facts),
        "torch_dtype": dtype,
        "use_cache": True,
        **{theirs: getattr(config, ours) for theirs, ours in KEYS.items()},
        **(heads if form == "llama" else files),
    }


def make_generation_config(
    config: ModelConfig, tokenizer: Tokenizer | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of generation_config.json: where a text begins and ends."""
    bos, eos = facts.get("bos_token_id", BOS), facts.get("eos_token_id", EOS)
    if tokenizer is not None:
        bos = None if tokenizer.bos_id < 0 else tokenizer.bos_id
        # A list of several stays, where the tokenizer's own is among them.
        eos = eos if isinstance(eos, list) and tokenizer.eos_id in eos else tokenizer.eos_id
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": config.pad_token_id}


def make_special_tokens(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, str | None]:
    """The content of special_tokens_map.json: the pieces that are no text, by their use."""
    pad = config.pad_token_id
    # A padding token that is written in texts would be cut out of them.
    if pad is None or pad >= tokenizer.vocab_size or tokenizer.is_text(pad):
        pad = -1
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "unk_token": tokenizer.unk_id,
        "pad_token": pad,
    }
    # null and not absent: transformers would add its own default as one more piece.
    return {name: None if i < 0 else tokenizer.piece(i) for name, i in ids.items()}


def make_tokenizer_config(
    config: ModelConfig, form: str, tokenizer: Tokenizer, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of tokenizer_config.json: encode as the model was trained."""
    files = {"auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaiChuanTokenizer", None]}}
    return {
        "tokenizer_class": "LlamaTokenizer" if form == "llama" else "BaiChuanTokenizer",
        **({} if form == "llama" else files),
        # transformers 4 would begin every text with BOS, which no row of training has.
        "add_bos_token": facts.get("add_bos_token", False),
        "add_eos_token": False,
        # As SentencePiece itself encodes; `false` drops spaces after special tokens.
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts.get("max_position_embeddings", ORIGINAL_LENGTH),
        "sp_model_kwargs": {},
        **make_special_tokens(config, tokenizer),
    }
