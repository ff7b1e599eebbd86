"""What belongs to weights and is no array: their model, their tokenizer, the length of training.

A folder of weights is one of four: a run's (or its checkpoints/, or one checkpoint), weights alone
(checkpoint/weights.py `save_params`), or one of Hugging Face. Training from it, generation,
evaluation and export read here what it says of itself, so that none of them runs weights with
another tokenizer.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baichuan_jax.checkpoint.weights import (
    choose_checkpoint,
    describe,
    has_checkpoint,
    weights_in,
)
from baichuan_jax.config.parsing import Positive, require_keys, require_type
from baichuan_jax.config.schema import ConfigError, ModelConfig
from baichuan_jax.hf.config import check_facts, read_config, read_facts
from baichuan_jax.hf.files import own_file
from baichuan_jax.runs.folder import Run
from baichuan_jax.tokenizer import Tokenizer

FILE = "tokenizer.model"
# The files of a folder of weights: others may lie there too, such as results.
_PATTERNS = (
    *("*config.json", "*.index.json", "*.safetensors", "*.bin", "*.py"),
    *("tokenizer*", "special_tokens_map.json"),
    # Of checkpoint/weights.py `save_params`.
    *("params", "run", "_*"),
)


@dataclass(frozen=True)
class Source:
    """A folder of weights, and what it says of them.

    `path`: a Hugging Face folder, or one checkpoint: of a run's folder, the newest when it was
    looked at. All that is done with the weights is done with this one. `tokenizer_hash`: SHA-256
    of the tokenizer of their training; None: not recorded. `facts`: see hf/config.py `read_facts`;
    a run's have max_position_embeddings, its context_length.
    """

    path: Path
    model: ModelConfig
    tokenizer_hash: str | None
    facts: dict[str, Any]

    @property
    def context_length(self) -> int | None:
        """Tokens of a row in training; None: unknown."""
        return self.facts.get("max_position_embeddings")

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer.model in the folder; None: there is none.

        A recorded hash allows for one in the two folders above, where a run has its own: another
        file that lies there is noticed. Raises ConfigError for a link out of its folder.
        """
        path = self.path.absolute()
        above = () if self.tokenizer_hash is None else path.parents[:2]
        files = (folder / FILE for folder in (path, *above))
        return next((own_file(file) for file in files if file.is_file()), None)

    @property
    def files(self) -> list[Path]:
        """What no result may replace: the files of the folder, and those of a run above it."""
        found = [file for pattern in _PATTERNS for file in self.path.glob(pattern)]
        for folder in self.path.absolute().parents[:2]:
            if (folder / "events.jsonl").exists():
                found += Run(folder).own
        return found


def is_hf(path: Path | str) -> bool:
    """Whether a folder is one of Hugging Face: only these have a config.json."""
    return (Path(path) / "config.json").exists()


def read_source(path: Path | str) -> Source:
    """What a folder of weights says of itself. Raises ConfigError where it is none.

    Every process must call this with the same path, once.
    """
    path = Path(path)
    if is_hf(path):
        if has_checkpoint(path):
            raise ConfigError(
                f"{path} holds weights of Hugging Face (config.json) and a run's checkpoints; name "
                f"{path / 'checkpoints'} for the run's newest, or move that folder away"
            )
        return Source(path, read_config(path), None, read_facts(path))
    path = choose_checkpoint(path)
    found = describe(path)
    config = found["config"]
    if "train" in config:
        where = f"{path}: its configuration's train"
        train = require_keys(config["train"], {"context_length": Positive}, where)
        facts = {"max_position_embeddings": train["context_length"]}
    else:
        recorded = require_type(found.get("facts", {}), dict, f"{path}: its facts")
        facts = check_facts(recorded, path)
        if recorded.get("add_bos_token") is True:
            facts["add_bos_token"] = True
    return Source(path, ModelConfig(**config["model"]), found.get("tokenizer"), facts)


def refuse_weights_folder(run_path: Path) -> None:
    """Raise ConfigError where a run's folder holds weights that are not the run's.

    generate, evaluate and hf export would read these, and nobody would see that they are not the
    trained ones.
    """
    for folder in (run_path, run_path / "checkpoints"):
        # In checkpoints/ the numbered folders are the run's.
        weights = weights_in(folder) if folder == run_path else folder
        if is_hf(folder):
            found = folder / "config.json"
        elif weights is not None and (weights / "params").is_dir():
            found = weights / "params"
        else:
            continue
        raise ConfigError(
            f"run_dir={str(run_path)!r} holds weights already ({found.relative_to(run_path)}), and "
            "what reads the run would take them for the trained ones; give the run a folder of its "
            "own with --run_dir, or move the weights to another"
        )


def find_tokenizer(
    source: Source, given: Path | str | None = None, option: str = "--tokenizer"
) -> Tokenizer:
    """The tokenizer `given`, or the tokenizer.model of weights, in their folder or their run's.

    Raises ConfigError where there is none, or it is not the one the checkpoint was trained with.
    `option`: what gives another one, for the messages.
    """
    checkpoint = source.path
    own = source.tokenizer_file
    known = source.tokenizer_hash
    path = own if given is None else given
    if path is None:
        which = "" if known is None else f" (its SHA-256 begins with {known[:12]})"
        raise ConfigError(
            f"there is no {FILE} in {checkpoint}; give the one that these weights were trained "
            f"with{which}: {option} FILE"
        )
    at_weights = f"put the one that {checkpoint} was trained with there, or give it: {option} FILE"
    tokenizer = Tokenizer(path, at_weights if given is None else "give another file")
    if known is None and own is not None:
        known = hashlib.sha256(own.read_bytes()).hexdigest()
    # Another tokenizer would give fluent nonsense, and nobody would see why.
    if known not in (None, tokenizer.hash):
        raise ConfigError(
            f"{path} has the hash {tokenizer.hash[:12]} and {checkpoint} was trained with "
            f"tokenizer {known[:12]}; give that one: {option} FILE"
        )
    if tokenizer.vocab_size > source.model.vocab_size:
        raise ConfigError(
            f"{path} has {tokenizer.vocab_size} pieces and the model {source.model.vocab_size}: "
            f"it is not the tokenizer of {checkpoint}"
        )
    _compare_ids(source, tokenizer)
    if source.facts.get("add_bos_token"):
        tokenizer.notes.append(
            f"warning: tokenizer_config.json of {checkpoint} has add_bos_token=true: these weights "
            "saw BOS before every text, and this program puts none there"
        )
    return tokenizer


def _compare_ids(source: Source, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose texts end or begin with other tokens than config.json's."""
    ours = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    # A run's ids are its tokenizer's, and are not recorded apart from it.
    for key, own in ours.items():
        theirs = source.facts.get(key)
        allowed = theirs if isinstance(theirs, list) else [theirs]
        # Many tokenizers have no BOS, and nothing here needs one. LLaMA's -1: none.
        if theirs not in (None, -1) and own >= 0 and own not in allowed:
            raise ConfigError(
                f"config.json of {source.path} has {key}={theirs} and {tokenizer.path} has {own}: "
                "it is not the tokenizer of these weights, or one of the two is wrong; correct it"
            )
