"""The weight files of Hugging Face folders: safetensors and torch's .bin, whole or in shards.

Tensors are read one at a time and written one at a time, so that the host's memory never holds a
whole file. safetensors' own library reads, and checks every file when it opens it. Writing is done
here: the library's writer needs all tensors of a file in memory at once (docs/decisions.md).

Files come from the internet, and what they say of themselves is not believed: names stay in the
folder, headers have a limit, and what tensors declare is compared with the bytes that are there.
"""

import errno
import json

# It lists what a pickle would call, and calls nothing.
import pickletools  # nosec B403
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from baichuan_jax.config.parsing import parse_json, read_json, require_type, show
from baichuan_jax.config.schema import ConfigError

# safetensors' codes of the types that weights are published in, by their names in NumPy and torch.
# Both formats have more, such as integers and 8-bit floats: quantised weights, which this model
# does not compute with.
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"

# Bytes of a safetensors header and of a .bin file's pickle. That of a model of 7B parameters has
# 50 kB; as values of Python it takes up to a hundred times as much.
MOST_HEADER = 4 << 20
# What the pickle of weights calls: beside these, torch's loader for files that are not trusted
# allows bytearray, which takes the memory that the file asks for.
_CALLED = ("collections OrderedDict", "torch")


class Tensors(Protocol):
    """Named tensors of a folder: shapes known at once, each read when asked for."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """A copy of a tensor."""
        ...


def open_tensors(folder: Path) -> Tensors:
    """The tensors of a folder in whatever form they are published.

    Raises ConfigError that names the file and what is wrong with it.
    """
    whole, files = weight_files(folder)
    return Safetensors(files) if whole == SAFETENSORS else TorchFiles(files)


def weight_files(folder: Path) -> tuple[str, list[Path]]:
    """The form of a folder's weights, by the name of its whole file, and the files that are read.

    transformers' order: a folder may hold several forms, and they may differ. Raises ConfigError
    where there is none.
    """
    # safetensors first: only torch's form needs torch.
    for whole in (SAFETENSORS, TORCH):
        if (folder / whole).is_file():
            return whole, [own_file(folder / whole)]
        index = folder / f"{whole}.index.json"
        if index.is_file():
            return whole, [own_file(file) for file in _shards(own_file(index))]
    raise ConfigError(
        f"{folder} has neither {SAFETENSORS} nor {TORCH}, whole or with an index of shards"
    )


def own_file(file: Path) -> Path:
    """A file of a folder of weights, where it belongs to the folder. Raises ConfigError.

    A received folder may hold a link to any file of the machine. Two are followed: one that stays
    in the folder, and one of a snapshot in Hugging Face's cache to a blob of the same model:
    models--OWNER--NAME/snapshots/REVISION/.../FILE to models--OWNER--NAME/blobs/HASH.
    """
    target, folder = file.resolve(), file.parent.resolve()
    # Of this model alone: a cache may hold others' private ones.
    blobs = [
        snapshot.parents[1] / "blobs"
        for snapshot in (folder, *folder.parents)
        if snapshot.parent.name == "snapshots" and snapshot.parents[1].name.startswith("models--")
    ]
    if not (target.is_relative_to(folder) or target.parent in blobs):
        raise ConfigError(
            f"{file} is a link out of its folder, to {target}; if that is meant, put a copy there, "
            "or name that folder instead"
        )
    return file


def _shards(index: Path) -> list[Path]:
    """The files that an index names. Raises ConfigError where it is damaged or one is missing."""
    try:
        found = require_type(read_json(index), dict, "it")
        names = require_type(found.get("weight_map"), dict[str, str], "its weight_map").values()
        # ValueError, which ConfigError is: a name with a slash, or none. So nothing outside the
        # folder can be named.
        files = [index.with_name(name) for name in sorted(set(names))]
    except ValueError as error:
        raise ConfigError(f"{index} is no index of shards: {error}") from None
    if not files:
        raise ConfigError(f"{index} is no index of shards: its weight_map names no file")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"{index} names files that are not there: {', '.join(missing)}")
    return files


class Safetensors:
    """Tensors of safetensors files in float32, float16 or bfloat16.

    Raises ConfigError for a file that is damaged or cut short, for another type, and for a tensor
    that two files hold.
    """

    def __init__(self, files: list[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        # The handles stay open: opening one reads and checks the header of the whole file.
        self._open = {file: _open_safetensors(file) for file in files}
        for file, tensors in self._open.items():
            for name in tensors.keys():  # noqa: SIM118, a handle has no iterator
                header = tensors.get_slice(name)
                dtype, shape = header.get_dtype(), tuple(header.get_shape())
                _require_weights(file, name, dtype)
                _refuse_second(name, self._files, file)
                self.shapes[name], self._files[name] = shape, file

    def read(self, name: str) -> np.ndarray:
        """A copy of a tensor."""
        return self._open[self._files[name]].get_tensor(name)


def _open_safetensors(file: Path) -> Any:
    """The library compares header and size of the whole file here, before any tensor is read."""
    with open(file, "rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if MOST_HEADER < length < file.stat().st_size:
            raise ConfigError(
                f"{file}: its header has {length:,} bytes, and no model's has more than "
                f"{MOST_HEADER:,}; download it again"
            )
        try:
            # pread copies a tensor out of the file. Pages of a memory map, the default, would count
            # as this process's memory for as long as the file is open: the whole file in the end.
            opened = safe_open(file, framework="numpy", backend="pread")
        except SafetensorError as error:
            raise ConfigError(
                f"{file} is damaged, cut short or no safetensors file: {error}; download it again"
            ) from None
        # The library takes the last of two tensors of one name, and says nothing.
        parse_json(content.read(length).decode(), f"the header of {file}")
    return opened


class TorchFiles:
    """Tensors of torch's .bin files in float32, float16 or bfloat16.

    Raises ConfigError as Safetensors does, for a tensor without a number for each element (sparse,
    meta, nested), and without torch.
    """

    def __init__(self, files: list[Path]) -> None:
        try:
            import torch  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError(
                f"{files[0]} is a torch file and torch is not installed: "
                "pip install torch, or convert it to safetensors"
            ) from None
        self._torch = torch
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            _check_archive(file)
            tensors = self._load(file)
            if not isinstance(tensors, dict):
                raise ConfigError(f"{file} holds {type(tensors).__name__} and must hold weights")
            for name, tensor in tensors.items():
                if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
                    raise ConfigError(
                        f"{file}: {show(name)} is {type(tensor).__name__} and must be a tensor"
                    )
                _require_weights(file, name, str(tensor.dtype).removeprefix("torch."))
                # map_location leaves a meta tensor, which has a shape and no numbers, as it is.
                if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
                    raise ConfigError(
                        f"{file}: {name} is a sparse, nested or meta tensor, and must be a dense "
                        "one, with a number for each element; save it as such"
                    )
                _refuse_second(name, self._files, file)
                self.shapes[name], self._files[name] = tuple(tensor.shape), file
            _require_bytes(file, sum(tensor.nbytes for tensor in tensors.values()))

    def _load(self, file: Path) -> dict[str, Any]:
        # weights_only: a pickle could run any code. mmap: only tensors that are read cost memory.
        try:
            return self._torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many types for a damaged file
            reason = str(error).split("\n")[0] or type(error).__name__
            raise ConfigError(f"{file} cannot be read: {reason}") from None

    def read(self, name: str) -> np.ndarray:
        """A copy of a tensor.

        Each time out of a new memory map: one kept for all tensors would grow to the file's size.
        """
        # A parameter with a gradient, or a negated view, does not convert to NumPy either.
        tensor = self._load(self._files[name])[name].detach().resolve_neg()
        if tensor.dtype == self._torch.bfloat16:  # which torch does not convert to NumPy
            bits = tensor.contiguous().view(self._torch.int16).numpy()
            return bits.view(ml_dtypes.bfloat16).copy()
        return tensor.numpy().copy()


def _check_archive(file: Path) -> None:
    """Raise ConfigError for a .bin file that could take more memory than its own size.

    It is a zip archive with a pickle in it. torch writes it without compression, and of older
    formats nothing is read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            packed = [entry.filename for entry in entries if entry.compress_type]
            if packed:
                raise ConfigError(
                    f"{file} has compressed entries ({show(packed[0])}), which torch does not "
                    "write; download it again"
                )
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    _check_pickle(file, archive, entry)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # zipfile and pickletools raise many types for a damaged file
        # EINVAL: a number in the archive leads before its beginning.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ConfigError(f"{file} cannot be read: {reason}; download it again") from None


def _check_pickle(file: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Raise ConfigError for a pickle that is too large, or calls what no weights need."""
    if entry.file_size > MOST_HEADER:
        raise ConfigError(
            f"{file}: {show(entry.filename)} has {entry.file_size:,} bytes, and no model's has "
            f"more than {MOST_HEADER:,}; download it again"
        )
    # Read as a list of operations: nothing of it is carried out.
    for operation, value, _ in pickletools.genops(archive.read(entry)):
        # torch writes protocol 2, which has GLOBAL alone.
        if operation.name in ("GLOBAL", "STACK_GLOBAL") and not str(value).startswith(_CALLED):
            raise ConfigError(
                f"{file} calls {show(value)}, which no weights need; do not trust this file"
            )


def _require_bytes(file: Path, declared: int) -> None:
    """Raise ConfigError where tensors repeat a few numbers of their file in a large shape."""
    # Twice: weights may be shared by two names.
    if declared > 2 * (size := file.stat().st_size):
        raise ConfigError(
            f"{file} has {size:,} bytes and its tensors {declared:,}: they repeat what is there; "
            "save each with numbers of its own (tensor.contiguous())"
        )


def _require_weights(file: Path, name: str, dtype: str) -> None:
    """Raise ConfigError for a tensor of a type that weights are not published in."""
    if dtype not in (*CODES, *CODES.values()):
        expected = ", ".join(f"{known} ({code})" for known, code in CODES.items())
        raise ConfigError(
            f"{file}: {name} is {dtype}; expected one of {expected}: quantised weights are not "
            "computed with; give those before quantisation"
        )


def _refuse_second(name: str, files: dict[str, Path], file: Path) -> None:
    if name in files:
        raise ConfigError(f"{name} is in {files[name].name} and again in {file}")


def write_safetensors(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    arrays: Iterator[np.ndarray],
    dtype: str,
    max_shard_bytes: int,
) -> None:
    """Write arrays, in the order of `shapes`, one at a time into one file or shards with an index.

    The format (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON
    header, then the tensors' bytes. Raises ConfigError where a number is not finite in `dtype`.
    """
    # Names and index as transformers writes them.
    shards = _split(shapes, dtype, max_shard_bytes)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, sizes in zip(files, shards, strict=True):
        # transformers looks for this entry; some versions refuse a file without it.
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, size in sizes.items():
            place = {"shape": list(shapes[name]), "data_offsets": [offset, offset + size]}
            header[name] = {"dtype": CODES[dtype], **place}
            offset += size
        encoded = json.dumps(header).encode()
        # Tensors begin at a multiple of 8 bytes, so that a memory map of them is aligned.
        encoded += b" " * (-len(encoded) % 8)
        with open(folder / file, "wb") as stream:
            stream.write(struct.pack("<Q", len(encoded)) + encoded)
            for name in sizes:
                array = _cast(next(arrays), dtype, name)
                # Not tofile, whose error has no number: a full disk would not be known as one.
                stream.write(array.reshape(-1).view(np.uint8).data)
    if len(shards) > 1:
        weights = {name: file for file, sizes in zip(files, shards, strict=True) for name in sizes}
        total = sum(sum(sizes.values()) for sizes in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weights}
        content = json.dumps(index, indent=2)
        (folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")


def _cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """A contiguous copy in `dtype`. Raises ConfigError where a number of it is not finite there."""
    # Refused below, and by its name.
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(np.dtype(dtype), order="C")
    if not np.isfinite(cast).all():
        most = float(ml_dtypes.finfo(dtype).max)
        raise ConfigError(
            f"{name} has numbers up to {np.abs(array).max():.4g}, and those beyond {most:.4g} are "
            f"infinite in {dtype}; choose another --dtype (bfloat16, float32)"
        )
    return cast


def _split(
    shapes: dict[str, tuple[int, ...]], dtype: str, max_shard_bytes: int
) -> list[dict[str, int]]:
    """The bytes of each tensor, by shard; a tensor larger than a shard gets one of its own."""
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if shards[-1] and sum(shards[-1].values()) + size > max_shard_bytes:
            shards.append({})
        shards[-1][name] = size
    return shards
