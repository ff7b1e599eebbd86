"""The settings of the data pipeline: frozen dataclasses, read as those of a run are.

One dataclass for each filter, in the order in which documents pass them. They are here and not in
the filters' files, which need daft: --help does without. A finished part is found by a hash of
these fields, so a field that is renamed or added invalidates the finished parts of its filter.
"""

from dataclasses import dataclass, field
from typing import Literal

from baichuan_jax.config.schema import require
from baichuan_jax.documents.reader import MAX_LINE_BYTES

# The key of a setting that serves all categories and languages without one of their own.
OTHERS = "*"


def _between(name: str, value: float, low: float, high: float) -> None:
    require(low <= value <= high, f"{name}={value} must lie between {low} and {high}")


@dataclass(frozen=True)
class ReadConfig:
    """Input files and their fields."""

    text_field: str = "text"
    """Field of a JSON object or column of a Parquet file that holds the text; of all three names,
    outer.inner is a field inside another."""
    id_field: str = "id"
    """Field that names the document; without one: a hash of its file's path and its line number."""
    source_field: str = "source"
    """Field that names the document's category; without one: its file's name up to the first
    dot."""
    max_line_bytes: int = MAX_LINE_BYTES
    """A line, Parquet row or .txt file that is longer (default: 16 MiB) is not held in memory: it
    is removed as line_too_long. All other readers of text refuse what exceeds the default."""

    def __post_init__(self) -> None:
        least = 1024
        require(
            self.max_line_bytes >= least,
            f"read.max_line_bytes={self.max_line_bytes} must be at least {least}",
        )


@dataclass(frozen=True)
class RulesConfig:
    """Heuristic rules on lines and documents (data/rules.py lists them)."""

    enabled: bool = True
    """Whether documents and lines are judged; personal data are treated either way."""
    # One dictionary and no field a rule: a new rule needs no new setting.
    limits: dict[str, float | None] = field(default_factory=dict)
    """Other limits than the rules' own, by rule; null switches a rule off."""
    blocked_phrases: str | None = None
    """A file of phrases, one a line; a document that holds one of them is removed."""
    # Masked by default: most documents with an address are fine without it.
    personal_data: Literal["mask", "drop", "keep"] = "mask"
    """What becomes of e-mail addresses, phone and Chinese identity numbers: they are replaced by
    <email> and so on, or the document is removed, or they are kept."""


@dataclass(frozen=True)
class QualityConfig:
    """Scores of a quality model."""

    enabled: bool = True
    """Without scores every document's quality is 0."""
    # Low: the model that comes along gives text that is far from its own, such as manual pages,
    # middling scores.
    least: dict[str, float] = field(default_factory=lambda: {"en": 0.05})
    """Least quality of a document, by its category (source), else by its language ("zh", "en"),
    else "*"; documents below it are removed."""
    model: str | None = None
    """Folder of models written by data.quality train; null: those that come with the package."""


@dataclass(frozen=True)
class DecontaminateConfig:
    """Documents that hold text of evaluation sets."""

    files: list[str] = field(default_factory=list)
    """Globs of evaluation files (JSONL, CSV or text), e.g. of MMLU or C-Eval; none: the stage is
    left out."""


@dataclass(frozen=True)
class DedupConfig:
    """Near-duplicate documents: MinHash-LSH over 5-grams of characters (Chinese) or words."""

    enabled: bool = True
    # Few bands of many hashes: a random pair of documents almost never meets, and every pair that
    # meets is verified.
    bands: int = 20
    """LSH bands; two documents are compared where all hashes of one band are equal."""
    rows: int = 8
    """Hashes of a band. 20 x 8 finds Jaccard 0.85 with probability 0.998, 0.8 with 0.975, 0.5 with
    0.075."""
    # An estimate from 160 hashes has a standard error of 0.03 here: pairs of 0.83 and more are
    # found nearly always, pairs below 0.7 hardly ever.
    threshold: float = 0.77
    """Least Jaccard similarity, estimated from all hashes, of a duplicate to the document that is
    kept."""

    def __post_init__(self) -> None:
        size = self.bands * self.rows
        for name in ("bands", "rows"):
            value = getattr(self, name)
            require(value > 0, f"dedup.{name}={value} must be greater than 0")
        require(
            size <= 160,
            f"dedup.bands={self.bands} times dedup.rows={self.rows} is {size}; a document has 160 "
            "hashes, so choose smaller ones",
        )
        _between("dedup.threshold", self.threshold, 0, 1)


@dataclass(frozen=True)
class SentencesConfig:
    """Sentences that occur again, in the same or in other documents."""

    enabled: bool = True
    # Greetings, headings and set phrases are shorter; a Chinese character says as much as three
    # Latin letters.
    min_letters_zh: int = 12
    """Shorter Chinese sentences, in letters and digits, may recur."""
    min_letters_en: int = 40
    """Shorter sentences of other scripts, in letters and digits, may recur."""
    near: bool = True
    """Remove near-duplicates too, not only sentences that are equal but for case, width and
    punctuation."""
    # A sentence with one letter of ten replaced has 0.9 in common.
    threshold: float = 0.88
    """Least share of letters that a near-duplicate has in common, in order, with the sentence that
    is kept."""
    # What is left of a page of quotations is no text to learn from.
    min_left: float = 0.5
    """A document of which less than this share is left is removed altogether."""

    def __post_init__(self) -> None:
        _between("sentences.threshold", self.threshold, 0.5, 1)
        _between("sentences.min_left", self.min_left, 0, 1)
        for name in ("min_letters_zh", "min_letters_en"):
            value = getattr(self, name)
            require(value >= 8, f"sentences.{name}={value} must be at least 8")


@dataclass(frozen=True)
class SelectConfig:
    """Which of the clean documents a corpus takes."""

    # Off: GPT-3 sampled web pages only, not books.
    pareto_alpha: float | None = None
    """Keep a document where 1 - quality is below a draw from a Pareto distribution of this shape
    (GPT-3: 9); null: no sampling."""
    max_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes of text that a category may hold, best quality first, then highest frequency; "*" for
    each of all others."""
    seed: int = 0
    """Of the draws, each a function of seed and id."""

    def __post_init__(self) -> None:
        alpha = self.pareto_alpha
        if alpha is not None:
            require(alpha > 0, f"select.pareto_alpha={alpha} must be greater than 0")


@dataclass(frozen=True)
class CorpusConfig:
    """All settings of the pipeline."""

    input: list[str] = field(default_factory=list)
    """Globs of .jsonl, .json (a document a line), .txt (a document a file), also .gz, .zst; or
    .parquet; local or s3://, gs://, hdfs://."""
    output: str = ""
    """Folder for final/, removed/, report.json and the funnel; on a cluster, one that all hosts
    share."""
    on_error: Literal["report", "fail"] = "report"
    """What becomes of input that cannot be read: it is counted and reported by file and line, or
    it ends the run."""
    # Results do not depend on it; memory does: every process holds one part's documents.
    num_workers: int = 0
    """Processes; 0: one a core (on a Ray cluster: one for each of its CPUs)."""
    read: ReadConfig = field(default_factory=ReadConfig)
    rules: RulesConfig = field(default_factory=RulesConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    sentences: SentencesConfig = field(default_factory=SentencesConfig)
    select: SelectConfig = field(default_factory=SelectConfig)

    def __post_init__(self) -> None:
        require(
            bool(self.input), "input names no file; give globs of text: --input 'corpus/*.jsonl.gz'"
        )
        require(bool(self.output), "output names no folder: --output DIR")
        require(self.num_workers >= 0, f"num_workers={self.num_workers} must not be negative")
