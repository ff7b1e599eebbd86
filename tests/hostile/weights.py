"""Weights, tokenizers, classifiers and packed rows that lie about names, types, offsets and sizes.

Each is valid but for one lie, and small: what blows up is what a reader makes of it.
"""

import contextlib
import functools
import hashlib
import io
import json
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import tensorstore
import zstandard
from exam import make_mmlu
from harness import Hostile
from launches import REPOSITORY, SHARED, write_config

from baichuan_jax.checkpoint.weights import save_params
from baichuan_jax.data import quality
from baichuan_jax.data.rows import pack
from baichuan_jax.hf.config import read_config
from baichuan_jax.hf.weights import import_params
from baichuan_jax.tokenizer import Tokenizer

TINY = REPOSITORY / "tests" / "golden" / "tiny"
EXAM = TINY.with_name("exam") / "tokenizer.model"
TEXT = "It is a truth universally acknowledged, that a single man is in want of a wife.\n"


@functools.cache
def _valid() -> Path:
    """A folder of what commands read beside the hostile file: text, a test, rows, a checkpoint."""
    folder = Path(tempfile.mkdtemp(dir=SHARED))
    write_config(folder)
    (folder / "text.txt").write_text(40 * TEXT)
    make_mmlu(folder / "mmlu", ["anatomy"], 2)
    text = [str(folder / "text.txt")]
    pack(text, folder / "rows", Tokenizer(EXAM), 64, num_workers=1, progress=False)
    save_params(folder / "checkpoint", read_config(TINY), import_params(TINY))
    shutil.copy(EXAM, folder / "checkpoint" / "tokenizer.model")
    return folder


# Commands


def _train(*options: str) -> list[str]:
    model = ("--model.intermediate_size", "172", "--run_dir", "run")
    return ["baichuan_jax.train", "--config", str(_valid() / "config.yaml"), *model, *options]


def _of_weights(converts: str, name: str = ".") -> dict[str, Callable[[Path], list[str]]]:
    """All that read weights, in the folder `name` of the hostile one. converts: import, export."""

    def evaluate(folder: Path, task: str, *options: str) -> list[str]:
        given = ("--checkpoint", str(folder / name), "--output", "out", "--mesh.data", "1")
        return ["baichuan_jax.evaluate", task, *given, *options]

    def generate(folder: Path) -> list[str]:
        given = ("--checkpoint", str(folder / name), "--prompt", "a", "--max_new_tokens", "2")
        return ["baichuan_jax.generate", *given]

    return {
        "generate": generate,
        converts: lambda folder: ["baichuan_jax.hf", converts, str(folder / name), "out"],
        "perplexity": lambda folder: evaluate(
            folder, "perplexity", "--text", str(_valid() / "text.txt"), "--context", "16"
        ),
        "mmlu": lambda folder: evaluate(
            folder,
            "mmlu",
            "--data",
            str(_valid() / "mmlu"),
            "--subjects",
            "anatomy",
            "--shots",
            "0",
        ),
        "train": lambda folder: _train("--init_from", str(folder / name)),
    }


_HF = _of_weights("import")
_CHECKPOINT = _of_weights("export")
_TOKENIZER = {
    "encode": lambda folder: [
        *("baichuan_jax.tokenizer", "encode", "a" * 3000),
        *("--model", str(folder / "tokenizer.model")),
    ],
    "stats": lambda folder: [
        *("baichuan_jax.tokenizer", "stats", "--input", str(_valid() / "text.txt")),
        *("--model", str(folder / "tokenizer.model")),
    ],
    "pack": lambda folder: [
        *("baichuan_jax.data.rows", "pack", "--input", str(_valid() / "text.txt")),
        *("--tokenizer", str(folder / "tokenizer.model")),
        *("--context_length", "16", "--output", "out"),
    ],
    "generate": lambda folder: [
        *("baichuan_jax.generate", "--checkpoint", str(TINY), "--prompt", "a" * 3000),
        *("--tokenizer", str(folder / "tokenizer.model")),
    ],
    "train": lambda folder: _train("--tokenizer.path", str(folder / "tokenizer.model")),
}
_CLASSIFIER = {
    "score": lambda folder: [
        *("baichuan_jax.data.quality", "score", "--model", str(folder)),
        *("--input", str(_valid() / "text.txt")),
    ],
    "pipeline": lambda folder: [
        *("baichuan_jax.data.pipeline", "--quality.model", str(folder)),
        *("--input", str(_valid() / "text.txt"), "--output", "out"),
    ],
}
_ROWS = {
    "verify": lambda folder: ["baichuan_jax.data.rows", "verify", str(folder)],
    "show": lambda folder: ["baichuan_jax.data.rows", "show", str(folder)],
    "train": lambda folder: _train(
        *("--tokenizer.path", str(EXAM), "--data.train", f"{{{folder}: 1.0}}"),
    ),
}


# Folders of Hugging Face


def _tiny(folder: Path, *names: str, **settings: Any) -> None:
    """The valid folder: config.json with these settings, the tokenizer, and the files named."""
    config = json.loads((TINY / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(EXAM, folder / "tokenizer.model")
    for name in names:
        shutil.copy(TINY / name, folder / name)


def _safetensors(change: Callable[[dict[str, Any]], str]) -> Callable[[Path], None]:
    """A whole file whose header is what `change` writes of the valid one."""

    def make(folder: Path) -> None:
        _tiny(folder)
        content = (TINY / "model.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = change(json.loads(content[8 : 8 + length])).encode()
        size = struct.pack("<Q", len(header))
        (folder / "model.safetensors").write_bytes(size + header + content[8 + length :])

    return make


def _set(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], str]:
    def change(header: dict[str, Any]) -> str:
        header[name][key] = value
        return json.dumps(header)

    return change


def _norm_twice(header: dict[str, Any]) -> str:
    """The bytes of a norm under another norm's name, and the name once more behind it."""
    name = json.dumps("model.norm.weight")
    return f"{{{name}: {json.dumps(header['model.norm.weight'])}, {json.dumps(header)[1:]}"


def _long_header(folder: Path) -> None:
    _tiny(folder)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}" + bytes(1000))


def _index(name: str, content: str) -> Callable[[Path], None]:
    """A file `name` with an index of shards whose one file is `content`."""

    def make(folder: Path) -> None:
        inside = folder / "inside"
        inside.mkdir()
        _tiny(inside)
        shutil.copy(TINY / name, folder / name)
        index = {"weight_map": {"model.norm.weight": content.format(folder=folder)}}
        (inside / f"{name}.index.json").write_text(json.dumps(index))

    return make


def _linked(folder: Path) -> None:
    _tiny(folder)
    (folder / "model.safetensors").symlink_to(TINY / "model.safetensors")


def _torch(write: Callable[[Path, dict[str, Any]], None]) -> Callable[[Path], None]:
    """What `write` makes of the valid torch file's tensors."""

    def make(folder: Path) -> None:
        import torch  # pyright: ignore[reportMissingImports]

        _tiny(folder)
        write(folder / "pytorch_model.bin", torch.load(TINY / "pytorch_model.bin"))

    return make


def _repeated(file: Path, tensors: dict[str, Any]) -> None:
    """Weights of 4 GiB that are one number."""
    import torch  # pyright: ignore[reportMissingImports]

    huge = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (1 << 24, 64))
    shapes = {name: huge.get(name, tensor.shape) for name, tensor in tensors.items()}
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, file)
    config = file.with_name("config.json")
    config.write_text(config.read_text().replace('"vocab_size": 512', f'"vocab_size": {1 << 24}'))


def _repacked(change: Callable[[bytes], bytes], compressed: bool = False) -> Callable[[Path], None]:
    """The torch file with another pickle, as torch packs it or compressed."""

    def make(folder: Path) -> None:
        _tiny(folder)
        with (
            zipfile.ZipFile(TINY / "pytorch_model.bin") as valid,
            zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive,
        ):
            for entry in valid.infolist():
                content = valid.read(entry)
                if entry.filename.endswith("data.pkl"):
                    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
                    archive.writestr(entry.filename, change(content), kind, 9)
                # Half a megabyte of pickle leaves no room for the numbers.
                elif not compressed or len(content) < 1000:
                    archive.writestr(entry.filename, content)

    return make


# bytearray(6 * 10**9), which torch allows where a pickle is not trusted.
_BYTES = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (6 * 10**9).to_bytes(5, "little") + b"\x85R."


# Tokenizers


def _field(number: int, content: bytes) -> bytes:
    """A field of a protobuf message."""
    size, length = b"", len(content)
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


def _long_replacement(folder: Path) -> None:
    """A model whose rules make 900 kB of every letter a."""
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        rules.write("61\t78\n62\t79\n")
        rules.flush()
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter([TEXT] * 20),
            model_writer=model,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_tsv=rules.name,
            minloglevel=2,
        )
    # Its rules: the size of a trie, the trie, and the texts that it points to.
    (place,) = [
        n for n in range(len(model.getvalue())) if model.getvalue().startswith(b"x\0y\0", n)
    ]
    start = model.getvalue().rindex(struct.pack("<I", 1024), 0, place)
    rules_of_it = model.getvalue()[start:place] + b"x" * 900_000 + b"\0"
    (folder / "tokenizer.model").write_bytes(EXAM.read_bytes() + _field(3, _field(2, rules_of_it)))


def _long_piece(folder: Path) -> None:
    """A model whose first piece says that it is longer than the file."""
    content = b"\x0a\xff\xff\xff\xff\x07" + EXAM.read_bytes()
    (folder / "tokenizer.model").write_bytes(content)


# Checkpoints


@contextlib.contextmanager
def _checkpoint(folder: Path, **model: Any) -> Iterator[Any]:
    """A valid checkpoint in the folder, and its arrays as TensorStore keeps them."""
    shutil.copytree(_valid() / "checkpoint", folder, dirs_exist_ok=True)
    run = json.loads((folder / "run" / "metadata").read_text())
    run["config"]["model"] |= model
    (folder / "run" / "metadata").write_text(json.dumps(run))
    base = f"file://{folder}/params/"
    yield tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()


def _of_model(**model: Any) -> Callable[[Path], None]:
    """A checkpoint that says of its model what its arrays are not."""

    def make(folder: Path) -> None:
        with _checkpoint(folder, **model):
            pass

    return make


def _large_chunk(folder: Path) -> None:
    """An array of 512 rows in chunks of a million."""
    with _checkpoint(folder) as arrays:
        _describe(arrays, "embedding", chunks=[1 << 20, 1 << 14])


def _zeros(folder: Path) -> None:
    """Two arrays of 2 GiB in 64 kB each."""
    rows = 1 << 23
    with _checkpoint(folder, vocab_size=rows) as arrays:
        compressor = zstandard.ZstdCompressor().compressobj()
        packed = [compressor.compress(bytes(1 << 24)) for _ in range(rows * 256 >> 24)]
        content = b"".join([*packed, compressor.flush()])
        for name, shape in (("embedding", [rows, 64]), ("lm_head", [64, rows])):
            _describe(arrays, name, chunks=shape, shape=shape)
            arrays.write(f"{name}/0.0", content).result()


def _describe(arrays: Any, name: str, **values: Any) -> None:
    described = json.loads(arrays.read(f"{name}/.zarray").result().value) | values
    arrays.write(f"{name}/.zarray", json.dumps(described).encode()).result()


def _linked_arrays(folder: Path) -> None:
    with _checkpoint(folder):
        shutil.rmtree(folder / "params")
        (folder / "params").symlink_to(_valid() / "checkpoint" / "params")


def _nested_metadata(folder: Path) -> None:
    with _checkpoint(folder):
        (folder / "run" / "metadata").write_text("[" * 100_000)


# Classifiers and rows


def _classifier(offset: int, layout: str, value: int) -> Callable[[Path], None]:
    """The package's English classifier with one number of its header changed."""

    def make(folder: Path) -> None:
        content = bytearray((quality.MODEL / "en.ftz").read_bytes())
        struct.pack_into(f"<{layout}", content, offset, value)
        card = json.loads((quality.MODEL / "card.json").read_text())
        card["languages"] = {"en": card["languages"]["en"]}
        card["languages"]["en"]["sha256"] = hashlib.sha256(content).hexdigest()
        (folder / "card.json").write_text(json.dumps(card))
        (folder / "en.ftz").write_bytes(content)

    return make


def _rows(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Packed rows with another manifest."""

    def make(folder: Path) -> None:
        shutil.copytree(_valid() / "rows", folder, dirs_exist_ok=True)
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return make


def _shard_outside(manifest: dict[str, Any]) -> None:
    shard = manifest["shards"][0]
    shard["file"] = f"{_valid() / 'rows' / shard['file']}"


def _many_rows(manifest: dict[str, Any]) -> None:
    manifest["rows"] = manifest["shards"][0]["rows"] = 1 << 60


# Models without weights


def _settings(**model: int | bool) -> Callable[[Path], None]:
    """The settings of a run, with these of its model."""

    def make(folder: Path) -> None:
        content = (_valid() / "config.yaml").read_text()
        lines = "".join(f"\n  {name}: {json.dumps(value)}" for name, value in model.items())
        content = content.replace("\n  num_layers: 2", lines)
        (folder / "config.yaml").write_text(content)

    return make


_FRESH: Mapping[str, Callable[[Path], list[str]]] = {
    "train": lambda folder: [
        *("baichuan_jax.train", "--config", str(folder / "config.yaml"), "--run_dir", "run")
    ]
}

_NORM, _WHOLE, _BIN = "model.norm.weight", r"model\.safetensors", r"pytorch_model\.bin"
_INDEX = r"inside/model\.safetensors\.index\.json"

HOSTILE = [
    Hostile("tensor_named_twice", _safetensors(_norm_twice), _HF, _WHOLE),
    Hostile(
        "tensor_beyond_the_file",
        _safetensors(_set(_NORM, "data_offsets", [0, 1 << 62])),
        _HF,
        _WHOLE,
    ),
    Hostile("tensor_of_huge_shape", _safetensors(_set(_NORM, "shape", [1 << 63, 2])), _HF, _WHOLE),
    Hostile("tensor_of_another_type", _safetensors(_set(_NORM, "dtype", "F64")), _HF, _WHOLE),
    Hostile("header_beyond_the_file", _long_header, _HF, _WHOLE),
    Hostile("header_nested", _safetensors(lambda _: "[" * 100_000), _HF, _WHOLE),
    Hostile(
        "index_names_the_folder_above",
        _index("model.safetensors", "../model.safetensors"),
        _of_weights("import", "inside"),
        _INDEX,
    ),
    Hostile(
        "index_names_a_path",
        _index("model.safetensors", "{folder}/model.safetensors"),
        _of_weights("import", "inside"),
        _INDEX,
    ),
    Hostile("weights_behind_a_link", _linked, _HF, rf"{_WHOLE} is a link"),
    Hostile("torch_numbers_repeated", _torch(_repeated), _HF, rf"{_BIN}|init_from"),
    Hostile(
        "torch_pickle_compressed",
        _repacked(lambda pickle: pickle[:2] + b"N0" * (1 << 28) + pickle[2:], compressed=True),
        _HF,
        _BIN,
    ),
    Hostile("torch_pickle_takes_memory", _repacked(lambda _: _BYTES), _HF, _BIN),
    Hostile(
        "config_of_many_layers",
        lambda folder: _tiny(folder, "model.safetensors", num_hidden_layers=10_000_000),
        _HF,
        "num_(hidden_)?layers=10000000",
    ),
    Hostile(
        "config_of_wide_layers",
        lambda folder: _tiny(folder, "model.safetensors", hidden_size=1_000_000_000),
        _HF,
        "hidden_size=1000000000|config\\.json makes",
    ),
    Hostile("tokenizer_rules_expand", _long_replacement, _TOKENIZER, r"tokenizer\.model"),
    Hostile("tokenizer_cut_short", _long_piece, _TOKENIZER, r"tokenizer\.model"),
    Hostile("checkpoint_of_many_layers", _of_model(num_layers=10_000_000), _CHECKPOINT, "files"),
    Hostile("checkpoint_of_large_chunks", _large_chunk, _CHECKPOINT, "files/params"),
    Hostile("checkpoint_of_zeros", _zeros, _CHECKPOINT, "files"),
    Hostile("checkpoint_behind_a_link", _linked_arrays, _CHECKPOINT, "files/params is a link"),
    Hostile("checkpoint_metadata_nested", _nested_metadata, _CHECKPOINT, "run/metadata"),
    Hostile(
        "classifier_of_many_words", _classifier(64, "i", (1 << 31) - 1), _CLASSIFIER, r"en\.ftz"
    ),
    Hostile("classifier_of_many_pairs", _classifier(84, "q", 1 << 60), _CLASSIFIER, r"en\.ftz"),
    Hostile(
        "classifier_of_parts_of_words", _classifier(48, "i", 1_000_000), _CLASSIFIER, r"en\.ftz"
    ),
    Hostile("rows_outside", _rows(_shard_outside), _ROWS, r"manifest\.json"),
    Hostile("rows_that_are_not_there", _rows(_many_rows), _ROWS, r"manifest\.json"),
    Hostile("settings_of_many_layers", _settings(num_layers=10_000_000), _FRESH, r"model\."),
    Hostile(
        "settings_of_many_unrolled_layers",
        _settings(num_layers=20_000, scan_layers=False),
        _FRESH,
        r"model\.scan_layers",
    ),
]
