"""The files of Hugging Face folders: safetensors (read and written here, without torch) and torch's .bin, whole or in shards."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from baichuan_jax.config.schema import ConfigError

# https://github.com/huggingface/safetensors: 8 bytes of header length, a JSON header, then the
# tensors' bytes
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Tensors(Protocol):
    """Named tensors of a folder: shapes known at once, each read when asked for."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray: ...


def open_tensors(folder: Path) -> Tensors:
    """The tensors of a folder in whatever form they are published. Raises ConfigError naming the file."""
    for kind, whole, index in (
        (_Safetensors, "model.safetensors", "model.safetensors.index.json"),
        (_Torch, "pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / index).is_file():
            try:
                files = sorted(
                    set(
                        json.loads((folder / index).read_text(encoding="utf-8"))[
                            "weight_map"
                        ].values()
                    )
                )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{folder / index} is no index of shards: {error!r}") from None
            missing = [name for name in files if not (folder / name).is_file()]
            if missing:
                raise ConfigError(
                    f"{folder / index} names files that are not there: {', '.join(missing)}"
                )
            return kind([folder / name for name in files])
        if (folder / whole).is_file():
            return kind([folder / whole])
    raise ConfigError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin, whole or with an index of shards"
    )


class _Safetensors:
    def __init__(self, files: list[Path]) -> None:
        self._where: dict[str, tuple[Path, np.dtype, int]] = {}
        self.shapes = {}
        for file in files:
            size = file.stat().st_size
            with open(file, "rb") as stream:
                length = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))[0]
                if length > size - 8:
                    raise ConfigError(
                        f"{file} is cut short or no safetensors file: {size} bytes, header of {length}"
                    )
                content = stream.read(length)
            try:
                header: dict[str, Any] = json.loads(content)
                header.pop("__metadata__", None)
                tensors = {
                    name: (x["dtype"], tuple(x["shape"]), *x["data_offsets"])
                    for name, x in header.items()
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{file} is damaged or no safetensors file: its header is unreadable ({error!r})"
                ) from None
            for name, (dtype, shape, start, stop) in tensors.items():
                if dtype not in DTYPES:
                    raise ConfigError(
                        f"{file}: {name} is {dtype}; expected one of {', '.join(DTYPES)}"
                    )
                if 8 + length + stop > size:
                    raise ConfigError(
                        f"{file} is cut short: {name} ends at byte {8 + length + stop} of {size}"
                    )
                if stop - start != int(np.prod(shape)) * DTYPES[dtype].itemsize:
                    raise ConfigError(
                        f"{file} is damaged: {name} {shape} {dtype} has {stop - start} bytes"
                    )
                if name in self.shapes:
                    raise ConfigError(
                        f"{name} stands in {self._where[name][0].name} and again in {file}"
                    )
                self.shapes[name] = shape
                self._where[name] = (file, DTYPES[dtype], 8 + length + start)

    def read(self, name: str) -> np.ndarray:
        """Copied from the file: pages of a memory map would count as this process's memory for as long as it lives."""
        file, dtype, offset = self._where[name]
        count = int(np.prod(self.shapes[name]))
        with open(file, "rb") as stream:
            stream.seek(offset)
            return np.fromfile(stream, dtype, count).reshape(self.shapes[name])


class _Torch:
    def __init__(self, files: list[Path]) -> None:
        try:
            import torch  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError(
                f"{files[0]} is a torch file and torch is not installed: pip install torch, or convert it to safetensors"
            ) from None
        self._torch = torch
        self._where: dict[str, Path] = {}
        self.shapes = {}
        for file in files:
            for name, tensor in self._load(file).items():
                if name in self.shapes:
                    raise ConfigError(
                        f"{name} stands in {self._where[name].name} and again in {file}"
                    )
                self.shapes[name] = tuple(tensor.shape)
                self._where[name] = file

    def _load(self, file: Path) -> dict[str, Any]:
        try:
            return self._torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises what it will for a damaged file
            raise ConfigError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None

    def read(self, name: str) -> np.ndarray:
        """Copied out of a memory map of its own: one kept for all tensors would grow to the size of the file."""
        tensor = self._load(self._where[name])[name]
        if tensor.dtype == self._torch.bfloat16:
            return (
                tensor.contiguous().view(self._torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
            )
        return tensor.numpy().copy()


def write_safetensors(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    arrays: Iterator[np.ndarray],
    dtype: str,
    max_shard_bytes: int,
) -> None:
    """Write arrays, in the order of `shapes`, one at a time into one file or into shards with an index."""
    item = DTYPES[CODES[dtype]].itemsize
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        this = int(np.prod(shape)) * item
        if shards[-1] and size + this > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += this
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    total = 0
    for file, members in zip(names, shards, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in members:
            stop = offset + int(np.prod(shapes[name])) * item
            header[name] = {
                "dtype": CODES[dtype],
                "shape": list(shapes[name]),
                "data_offsets": [offset, stop],
            }
            offset = stop
        total += offset
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8 bytes
        with open(folder / file, "wb") as stream:
            stream.write(struct.pack("<Q", len(encoded)) + encoded)
            for _ in members:
                next(arrays).astype(DTYPES[CODES[dtype]], order="C").tofile(stream)
    if len(shards) > 1:
        weights = {
            name: file for file, members in zip(names, shards, strict=True) for name in members
        }
        index = {"metadata": {"total_size": total}, "weight_map": weights}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2), encoding="utf-8"
        )
