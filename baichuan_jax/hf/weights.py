"""Hugging Face checkpoints: import of Baichuan and LLaMA folders, export for transformers; streamed tensor by tensor.

`python -m baichuan_jax.hf import|export`

Names and layouts are those of modeling_baichuan.py (baichuan-inc/Baichuan-7B): torch keeps a matrix
as [out, in], and W_pack stacks Q, K and V. D hidden, F intermediate, N heads, H head size, V
vocabulary, L layers.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from baichuan_jax.checkpoint.weights import describe, load_params
from baichuan_jax.config.schema import ConfigError, ModelConfig
from baichuan_jax.hf.files import Tensors, open_tensors, write_safetensors
from baichuan_jax.model import Params, Transformer, abstract_model
from baichuan_jax.sharding import Layout
from baichuan_jax.tokenizer import BOS, EOS

CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "rms_norm_eps": "rms_norm_eps",
}


# Not BaichuanForCausalLM, under the same model_type: Baichuan-13B has ALiBi and no rotary
# embedding, Baichuan2 a normalised head.
ARCHITECTURES = ("BaiChuanForCausalLM", "LlamaForCausalLM", "LLaMAForCausalLM")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One array of ours for one layer (or none): the tensors it comes from, and the way there and back."""

    path: tuple[str, ...]
    layer: int | None
    tensors: dict[str, tuple[int, ...]]
    join: Callable[[list[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray], list[np.ndarray]]


def _entries(config: ModelConfig, packed: bool) -> Iterator[_Entry]:
    """Every array of a model, in the order of the original's files."""
    D, F, N, H, V = (
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.head_dim,
        config.vocab_size,
    )
    one = lambda tensors: tensors[0]
    turned = lambda tensors: tensors[0].T
    yield _Entry(("embedding",), None, {"model.embed_tokens.weight": (V, D)}, one, lambda x: [x])
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."

        def entry(
            name: str,
            tensors: dict[str, tuple[int, ...]],
            join: Callable,
            split: Callable,
            layer=layer,
            prefix=prefix,
        ):
            return _Entry(
                ("layers", name),
                layer,
                {prefix + key: shape for key, shape in tensors.items()},
                join,
                split,
            )

        def from_torch(tensors: list[np.ndarray]) -> np.ndarray:
            stacked = (
                tensors[0].reshape(3, N, H, D)
                if packed
                else np.stack([t.reshape(N, H, D) for t in tensors])
            )
            return stacked.transpose(3, 0, 1, 2)

        def to_torch(x: np.ndarray) -> list[np.ndarray]:
            stacked = x.transpose(1, 2, 3, 0).reshape(3, D, D)
            return [stacked.reshape(3 * D, D)] if packed else list(stacked)

        qkv = {"self_attn.W_pack.weight": (3 * D, D)}
        if not packed:
            qkv = {f"self_attn.{part}_proj.weight": (D, D) for part in "qkv"}
        yield entry("w_pack", qkv, from_torch, to_torch)
        yield entry(
            "w_out",
            {"self_attn.o_proj.weight": (D, D)},
            lambda t: t[0].T.reshape(N, H, D),
            lambda x: [x.reshape(D, D).T],
        )
        for name, key, shape in (
            ("w_gate", "gate", (F, D)),
            ("w_up", "up", (F, D)),
            ("w_down", "down", (D, F)),
        ):
            yield entry(name, {f"mlp.{key}_proj.weight": shape}, turned, lambda x: [x.T])
        yield entry("attention_norm", {"input_layernorm.weight": (D,)}, one, lambda x: [x])
        yield entry("mlp_norm", {"post_attention_layernorm.weight": (D,)}, one, lambda x: [x])
    yield _Entry(("final_norm",), None, {"model.norm.weight": (D,)}, one, lambda x: [x])
    yield _Entry(("lm_head",), None, {"lm_head.weight": (V, D)}, turned, lambda x: [x.T])


def read_config(folder: Path | str) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder's config.json. Raises ConfigError for what this model cannot be."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder} has no config.json: it is no Hugging Face folder")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in CONFIG_KEYS if key not in found]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} is not the JSON of a configuration: {error}") from None
    if missing:
        raise ConfigError(f"{file} lacks {', '.join(missing)}")
    for key in CONFIG_KEYS:
        kind = float if key == "rms_norm_eps" else int
        if not isinstance(found[key], kind):
            raise ConfigError(f"{file} has {key}={found[key]!r}, which must be {kind.__name__}")
    _refuse_other_models(file, found)
    theta = found.get("rope_theta", (found.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    padding = found.get("pad_token_id")
    return ModelConfig(
        **{ours: found[theirs] for theirs, ours in CONFIG_KEYS.items()},
        rope_theta=float(theta),
        initializer_range=found.get("initializer_range", 0.02),
        pad_token_id=None if padding is not None and padding < 0 else padding,  # LLaMA's -1: none
    )


def _refuse_other_models(file: Path, found: dict[str, Any]) -> None:
    heads, kv_heads = found["num_attention_heads"], found.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise ConfigError(
            f"{file} has num_key_value_heads={kv_heads} for {heads} heads: no grouped-query attention here"
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
            raise ConfigError(
                f"{file} has {key}={found[key]!r} and this model has {' or '.join(map(repr, only))}"
            )
    for name in found.get("architectures") or ():
        if name not in ARCHITECTURES:
            raise ConfigError(
                f"{file} has architecture {name} and this model is {' or '.join(ARCHITECTURES)}"
            )
    for key in ("rope_scaling", "rope_parameters"):
        rope = found.get(key) or {}
        if (
            not rope.keys() <= {"rope_theta", "rope_type"}
            or rope.get("rope_type", "default") != "default"
        ):
            raise ConfigError(
                f"{file} has {key}={rope!r} and this model's rotary embedding is not scaled"
            )


def import_params(
    folder: Path | str,
    layout: Layout | None = None,
    *,
    dtype: str = "float32",
    progress: bool = False,
) -> Params:
    """Parameters of a Hugging Face folder, matrices in `dtype` and norms float32, each put on the mesh as it is read.

    Names and shapes are compared before anything is read. Host memory: about two of the largest
    tensor, beside what lies on a CPU's devices. Raises ConfigError naming the tensor or file.
    """
    config = read_config(folder)
    source = open_tensors(Path(folder))
    packed = not any(name.endswith("q_proj.weight") for name in source.shapes)
    entries = list(_entries(config, packed))
    _compare(
        Path(folder),
        source,
        {name: shape for entry in entries for name, shape in entry.tensors.items()},
    )

    _, shapes, axes = abstract_model(config)
    stacks: dict[tuple[str, ...], jax.Array] = {}
    for entry in tqdm(entries, desc="importing", unit="array", disable=not progress):
        joined = entry.join([source.read(name) for name in entry.tensors])
        array = np.ascontiguousarray(joined, jnp.float32 if joined.ndim == 1 else jnp.dtype(dtype))
        del joined  # beside the array where it was turned or cast
        names = _at(axes, entry.path)
        if entry.layer is None:
            stacks[entry.path] = _put(array, _place(layout, names))
            continue
        if entry.path not in stacks:
            empty = functools.partial(jnp.zeros, _at(shapes, entry.path).shape, array.dtype)
            stacks[entry.path] = jax.jit(empty, out_shardings=_place(layout, names))()
        stacks[entry.path] = _write_layer(
            stacks[entry.path], _put(array, _place(layout, names[1:])), entry.layer
        )
        # Wait: an array that is still being copied would be held beside the next ones.
        stacks[entry.path].block_until_ready()
    return nnx.traversals.unflatten_mapping(stacks)


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(stack: jax.Array, part: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, part, layer, 0)


def _put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Each process places its own devices' parts; device_put would send the array around to see that all have the same."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _place(layout: Layout | None, names: tuple[str, ...]) -> jax.sharding.Sharding:
    return (
        jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if layout is None
        else layout.sharding(*names)
    )


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, key: node[key], path, tree)


def _compare(folder: Path, source: Tensors, wanted: dict[str, tuple[int, ...]]) -> None:
    """Refuse missing, extra and misshapen tensors; inv_freq buffers, which the original recomputes, are left out."""
    found = {
        name: shape
        for name, shape in source.shapes.items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [
        f"{name} {found[name]} is not of this model"
        for name in sorted(found.keys() - wanted.keys())
    ]
    problems += [
        f"{name} is {found[name]} and config.json makes it {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise ConfigError(f"{folder}: {'; '.join(problems[:4])} ({len(problems)} in all)")


def export(
    params: Params,
    config: ModelConfig,
    folder: Path | str,
    *,
    dtype: str = "bfloat16",
    form: Literal["llama", "baichuan"] = "llama",
    tokenizer: Path | str | None = None,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write a Hugging Face folder of safetensors: as transformers' Llama (W_pack split), or in the original's form.

    transformers reads the original's form with the original's Python files beside it. Written whole
    under another name, then renamed. Raises ConfigError where the folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; export writes a new folder")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    entries = list(_entries(config, packed=form == "baichuan"))
    shapes = {name: shape for entry in entries for name, shape in entry.tensors.items()}

    def arrays() -> Iterator[np.ndarray]:
        for entry in entries:
            array = _at(params, entry.path)
            yield from entry.split(
                np.asarray(jax.device_get(array if entry.layer is None else array[entry.layer]))
            )

    write_safetensors(temporary, shapes, arrays(), dtype, max_shard_bytes)
    (temporary / "config.json").write_text(
        json.dumps(_hf_config(config, dtype, form), indent=2), encoding="utf-8"
    )
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": config.pad_token_id}
    (temporary / "generation_config.json").write_text(json.dumps(ids, indent=2), encoding="utf-8")
    if tokenizer is not None:
        shutil.copy(tokenizer, temporary / "tokenizer.model")
    temporary.rename(folder)


def _hf_config(config: ModelConfig, dtype: str, form: str) -> dict[str, Any]:
    shared = {theirs: getattr(config, ours) for theirs, ours in CONFIG_KEYS.items()}
    return {
        "architectures": ["LlamaForCausalLM" if form == "llama" else "BaiChuanForCausalLM"],
        "model_type": form,
        "hidden_act": "silu",
        "initializer_range": config.initializer_range,
        "max_position_embeddings": 4096,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
        "use_cache": True,
        **shared,
        **(
            {"num_key_value_heads": config.num_heads, "head_dim": config.head_dim}
            if form == "llama"
            else {}
        ),
    }


def load_pretrained(
    path: Path | str, dtype: Literal["float32", "bfloat16"] = "float32", mesh: Mesh | None = None
) -> Transformer:
    """A model to call, model(tokens_BT, attention_mask=None) -> logits_BTV, from a Hugging Face folder or a run's checkpoint.

    It computes in `dtype`, on `mesh` or one device. bfloat16 keeps a Hugging Face folder's matrices
    in bfloat16 too; the logits are those of float32 ones, which are cast for every product. Raises
    ConfigError where the path is neither or does not fit.
    """
    layout = None if mesh is None else Layout(mesh)
    if (Path(path) / "config.json").exists():
        config, params = read_config(path), import_params(path, layout, dtype=dtype)
    else:
        config, params = load_params(path, layout)
    config = dataclasses.replace(config, dtype=dtype, remat="none")
    graphdef, _, _ = abstract_model(config)
    return nnx.merge(graphdef, params)


def tokenizer_file(checkpoint: Path | str) -> Path | None:
    """The tokenizer.model in a checkpoint's folder or in one of the two above it (a run's), or None."""
    path = Path(checkpoint).absolute()
    files = (folder / "tokenizer.model" for folder in (path, *path.parents[:2]))
    return next((file for file in files if file.is_file()), None)


def weights_sha256(path: Path | str) -> str:
    """A hash of the weights that load_pretrained reads: of a folder's config.json and weight files, or of a checkpoint's digests."""
    folder, digest = Path(path), hashlib.sha256()
    if not (folder / "config.json").exists():
        digests = {
            name: value
            for name, value in describe(path)["digest"].items()
            if name.startswith("params/")
        }
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for file in (folder / "config.json", *weights):
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def trained_with(path: Path | str) -> tuple[ModelConfig, str | None]:
    """A checkpoint's model, and the hash of its tokenizer where it is known: recorded by its run, or of the file beside it."""
    if (Path(path) / "config.json").exists():
        config, tokenizer = read_config(path), None
    else:
        found = describe(path)
        config, tokenizer = ModelConfig(**found["config"]["model"]), found.get("tokenizer")
    file = tokenizer_file(path)
    if tokenizer is None and file is not None:
        tokenizer = hashlib.sha256(file.read_bytes()).hexdigest()
    return config, tokenizer
