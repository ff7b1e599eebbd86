"""Weights in and out: Baichuan and LLaMA folders of Hugging Face, and checkpoints of this project.

`python -m baichuan_jax.hf import|export`

Arrays go one by one from a file to the devices, or from the devices to a file, so that the host
needs about two of the largest tensor beside them.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from baichuan_jax.checkpoint.weights import describe, load_params, require_finite
from baichuan_jax.config.schema import ConfigError, ModelConfig
from baichuan_jax.hf.config import (
    make_config,
    make_generation_config,
    make_special_tokens,
    make_tokenizer_config,
    read_config,
    require_form,
)
from baichuan_jax.hf.files import Tensors, open_tensors, weight_files, write_safetensors
from baichuan_jax.hf.names import entries
from baichuan_jax.hf.source import FILE, Source, is_hf, read_source
from baichuan_jax.model import Params, Transformer, abstract_model
from baichuan_jax.resilience.coordination import require_same
from baichuan_jax.resilience.ownership import owned_output
from baichuan_jax.runs.files import new_folder
from baichuan_jax.sharding import Layout
from baichuan_jax.tokenizer import Tokenizer


def import_params(
    folder: Path | str,
    layout: Layout | None = None,
    *,
    dtype: str = "float32",
    progress: bool = False,
) -> Params:
    """Parameters of a Hugging Face folder, matrices in `dtype` and norms float32.

    Each is put on the mesh as it is read. Names and shapes are compared before anything is read.
    Host memory: about two of the largest tensor, beside what is on a CPU's devices. Raises
    ConfigError that names the tensor or file, also where a weight is not finite.
    """
    config = read_config(folder)
    source = open_tensors(Path(folder))
    # Llama's form has q_proj, k_proj and v_proj; the original's has W_pack.
    packed = not any(name.endswith("q_proj.weight") for name in source.shapes)
    # Counted before the list is made, which a damaged number would make endless.
    if config.num_layers > len(source.shapes):
        raise ConfigError(
            f"{folder}: config.json has num_hidden_layers={config.num_layers} and the weight files "
            f"hold {len(source.shapes)} tensors"
        )
    wanted = list(entries(config, packed))
    _compare(Path(folder), source, {k: v for entry in wanted for k, v in entry.tensors.items()})
    # A process reads its own part only: copies of other weights would be mixed without a word.
    sizes = {file.name: file.stat().st_size for file in weight_files(Path(folder))[1]}
    require_same(f"the sizes of the weights in {folder}", sizes)

    _, shapes, axes = abstract_model(config)
    arrays: dict[tuple[str, ...], jax.Array] = {}
    for entry in tqdm(wanted, desc="importing", unit="array", disable=not progress):
        # Contiguous: a transposed view would be copied once for every device's part.
        joined = entry.join([source.read(name) for name in entry.tensors])
        array = np.ascontiguousarray(joined, jnp.float32 if joined.ndim == 1 else jnp.dtype(dtype))
        del joined  # a second copy where it was transposed or cast
        names = _at(axes, entry.path)
        if entry.layer is None:
            arrays[entry.path] = _put(array, _sharding(layout, names))
            continue
        # The layers of an array are stacked. The stack is made on the devices and each layer
        # written into it: a stack on the host would take the memory of all of them.
        if entry.path not in arrays:
            empty = functools.partial(jnp.zeros, _at(shapes, entry.path).shape, array.dtype)
            arrays[entry.path] = jax.jit(empty, out_shardings=_sharding(layout, names))()
        part = _put(array, _sharding(layout, names[1:]))
        arrays[entry.path] = _write_layer(arrays[entry.path], part, entry.layer)
        # Wait: an array that is still being copied would be held beside the next ones.
        arrays[entry.path].block_until_ready()
    params = nnx.traversals.unflatten_mapping(arrays)
    require_finite(folder, params)
    return params


# Donated, so that the stack is updated in place and exists once.
@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(stack: jax.Array, part: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, part, layer, 0)


def _put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Each process places the parts of its own devices.

    device_put would send the array to all processes to check that they have the same.
    """
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _sharding(layout: Layout | None, names: tuple[str, ...]) -> jax.sharding.Sharding:
    if layout is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return layout.stored(*names)


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, key: node[key], path, tree)


def _compare(folder: Path, source: Tensors, wanted: dict[str, tuple[int, ...]]) -> None:
    """Refuse missing, extra and misshapen tensors.

    inv_freq buffers are ignored: the original computes them again.
    """
    found = {
        name: shape
        for name, shape in source.shapes.items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    for name in sorted(found.keys() - wanted.keys()):
        problems.append(f"{name} {found[name]} is not of this model")
    for name, shape in wanted.items():
        if found.get(name, shape) != shape:
            problems.append(f"{name} is {found[name]} and config.json makes it {shape}")
    # Four are enough to see what is wrong; a wrong width makes hundreds.
    if problems:
        raise ConfigError(f"{folder}: {'; '.join(problems[:4])} ({len(problems)} in all)")


def export(
    params: Params,
    config: ModelConfig,
    folder: Path | str,
    *,
    dtype: str = "bfloat16",
    form: Literal["llama", "baichuan"] = "llama",
    tokenizer: Tokenizer | None = None,
    facts: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write a Hugging Face folder of safetensors, as transformers' Llama or in the original's form.

    llama: W_pack is split. baichuan: transformers reads it with the original's Python files beside
    it. `facts`: as of hf/config.py `read_facts`. Everything is written under a temporary name and
    renamed at the end. Raises ConfigError where the folder exists and is not empty, where a number
    is not finite in `dtype`, and for a model that `form` has no place for.
    """
    # Before the weights are written, which may take minutes.
    require_form(config, form)
    folder = refuse_existing(Path(folder))
    # Two exports of one name would remove each other's files.
    with owned_output(folder, beside=True), new_folder(folder) as draft:
        _write(params, config, draft, dtype, form, tokenizer, facts or {}, max_shard_bytes)


def _write(
    params: Params,
    config: ModelConfig,
    folder: Path,
    dtype: str,
    form: Literal["llama", "baichuan"],
    tokenizer: Tokenizer | None,
    facts: Mapping[str, Any],
    max_shard_bytes: int,
) -> None:
    folder.mkdir()
    wanted = list(entries(config, packed=form == "baichuan"))
    shapes = {name: shape for entry in wanted for name, shape in entry.tensors.items()}

    def arrays() -> Iterator[np.ndarray]:
        # One layer at a time: a whole stack may not fit into host memory.
        for entry in wanted:
            array = _at(params, entry.path)
            if entry.layer is not None:
                array = array[entry.layer]
            yield from entry.split(np.asarray(jax.device_get(array)))

    write_safetensors(folder, shapes, arrays(), dtype, max_shard_bytes)
    contents = {
        "config.json": make_config(config, dtype, form, tokenizer, facts),
        "generation_config.json": make_generation_config(config, tokenizer, facts),
    }
    if tokenizer is not None:
        shutil.copy(tokenizer.path, folder / FILE)
        contents |= {
            "tokenizer_config.json": make_tokenizer_config(config, form, tokenizer, facts),
            "special_tokens_map.json": make_special_tokens(config, tokenizer),
        }
    for name, content in contents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")


def refuse_existing(folder: Path) -> Path:
    """Where a link leads to, else the folder itself: a new folder cannot replace a link.

    Raises ConfigError where a folder for weights exists and is not empty.
    """
    try:
        target = folder.resolve()
        used = target.exists() and (not target.is_dir() or any(target.iterdir()))
    # RuntimeError: of a link that leads to itself.
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{folder} cannot be an output: {error}; choose another") from None
    if used:
        raise ConfigError(f"{folder} exists and is not empty; delete it, or choose another output")
    return target


def load_pretrained(
    path: Path | str, dtype: Literal["float32", "bfloat16"] = "float32", mesh: Mesh | None = None
) -> Transformer:
    """A model from a Hugging Face folder, a run's folder (its newest checkpoint) or a checkpoint.

    Call it: model(tokens_BT, attention_mask=None) -> logits_BTV. It computes in `dtype`, on `mesh`
    or one device. bfloat16 keeps a Hugging Face folder's matrices in bfloat16 too; the logits are
    those of float32 ones, which are cast for every product. Raises ConfigError where the path is
    none of them or does not fit.
    """
    return load_model(read_source(path), dtype, mesh)


def load_model(
    source: Source, dtype: Literal["float32", "bfloat16"] = "float32", mesh: Mesh | None = None
) -> Transformer:
    """load_pretrained of a folder that has been looked at."""
    layout = None if mesh is None else Layout(mesh)
    if is_hf(source.path):
        config, params = source.model, import_params(source.path, layout, dtype=dtype)
    else:
        config, params = load_params(source.path, layout)
    # remat has no use without a backward pass.
    config = dataclasses.replace(config, dtype=dtype, remat="none")
    graphdef, _, _ = abstract_model(config)
    return nnx.merge(graphdef, params)


def files_read(source: Source) -> list[Path]:
    """The files that decide what load_model gives: of these, weights_sha256 is a hash."""
    path = source.path
    if is_hf(path):
        return [path / "config.json", *weight_files(path)[1]]
    # It has the settings of the model, and a digest of every array, with which they are compared.
    return [path / "run" / "metadata"]


def weights_sha256(source: Source) -> str:
    """A hash of the weights that load_model reads.

    It covers a Hugging Face folder's config.json and weight files, or a checkpoint's digests.
    """
    path = source.path
    if not is_hf(path):
        digests = describe(path)["digest"].items()
        params = {name: value for name, value in digests if name.startswith("params/")}
        return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()
    digest = hashlib.sha256()
    for file in files_read(source):
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
