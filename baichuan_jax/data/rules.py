"""Heuristic rules: cleans a text of boilerplate lines and personal data, measures and judges it.

Input: texts. Output: for each the text that stays, its language, and the name of the first rule
that it breaks. A rule compares one measure (a count, or a share) with a limit. All rules are
expressions that Daft evaluates over a batch of texts; what no expression counts fast enough is
counted by numpy over the code points of the whole batch (the second half of this file).

Where limits come from: Gopher is Rae et al. 2021, appendix A1 (https://arxiv.org/abs/2112.11446);
C4 is Raffel et al. 2020, section 2.2 (https://arxiv.org/abs/1910.10683); RefinedWeb is Penedo et
al. 2023 (https://arxiv.org/abs/2306.01116). Limits without such a source were set on Chinese and
English novels, verse, laws and manuals, so that each rule removes well under 0.3 % of them
(docs/data.md).
"""

import difflib
import functools
import itertools
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

import daft  # pyright: ignore[reportMissingImports]
import daft.functions as F  # pyright: ignore[reportMissingImports]
import numpy as np
import pyarrow as pa  # pyright: ignore[reportMissingImports]
from daft.recordbatch import RecordBatch  # pyright: ignore[reportMissingImports]

from baichuan_jax.config.parsing import read_text
from baichuan_jax.config.schema import ConfigError, require
from baichuan_jax.data.corpus.config import RulesConfig

# Share of Han characters among the letters from which on a text is Chinese. Below a half, since a
# Han character says what two or three Latin letters do.
HAN_SHARE = 0.3


class Rules:
    """The filter: cleans and judges each text while it is read."""

    name = "rules"

    def __init__(self, config: RulesConfig) -> None:
        """Raises ConfigError where a limit is set for a rule that there is not, and so on."""
        self.config = config
        self.limits = limits_of(config)
        phrases = config.blocked_phrases
        self.blocked = None if phrases is None else blocked_pattern(phrases)

    @property
    def key(self) -> list[Any]:
        """The settings, and the phrases themselves: their file may change."""
        return [self.config, self.blocked]

    def clean(self, texts: list[str]) -> pa.Table:
        """Clean and judge texts: columns text, lang ("zh" or "en"), reason (null: it stays)."""
        config = self.config
        raw = pa.table({"text": pa.array(texts, pa.large_string())})
        cleaned = _without_lines(_TEXT, _BOILERPLATE_LINES) if config.enabled else _TEXT
        table = _evaluate(raw, {"text": cleaned, "length_before": F.length(_TEXT)})
        personal = pa.array(np.zeros(len(texts), bool))
        if config.personal_data != "keep":
            masked = mask(table["text"])
            personal = pa.array(np.asarray(masked) != np.asarray(table["text"]))
            if config.personal_data == "mask":
                table = table.set_column(0, "text", masked)
        measured = measure(table["text"].to_pylist(), enough_for_language=not config.enabled)
        for name in measured.column_names:
            table = table.append_column(name, measured[name])
        table = table.append_column("personal_data", personal)
        table = _with_columns(table, DERIVED | (LATER if config.enabled else {}))
        chinese = _double(daft.col("han")) >= HAN_SHARE * _at_least_1(daft.col("letters"))
        lang = F.when(chinese, daft.lit("zh")).otherwise(daft.lit("en"))
        # One pass after the other: an expression cannot use a column that the same pass makes.
        table = _with_columns(table, {"lang": lang})
        columns = {"text": _TEXT, "lang": daft.col("lang"), "reason": self._reason()}
        return _evaluate(table, columns)

    def _reason(self) -> daft.Expression:
        """The name of the first rule that a document breaks, or null."""
        broken = [
            (rule.name, rule.breaks(self.limits[rule.name]))
            for rule in RULES
            if rule.name in self.limits
        ]
        if self.config.personal_data == "drop":
            broken.append(("personal_data", daft.col("personal_data")))
        if self.blocked is not None:
            broken.append(("blocked_phrase", F.regexp(_TEXT, self.blocked)))
        reason = daft.lit(None).cast(daft.DataType.string())
        for name, breaks in reversed(broken):
            reason = F.when(breaks, daft.lit(name)).otherwise(reason)
        return reason


def limits_of(config: RulesConfig) -> dict[str, float]:
    """The limit of every rule that is switched on. Raises ConfigError at an unknown rule's name."""
    for name in config.limits:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"rules.limits: there is no rule {name!r}; the nearest is {near!r}; all: "
                f"{', '.join(NAMES)}"
            )
    if not config.enabled:
        return {}
    limits = {rule.name: config.limits.get(rule.name, rule.limit) for rule in RULES}
    return {name: limit for name, limit in limits.items() if limit is not None}


@functools.cache
def blocked_pattern(path: str) -> str:
    """A regular expression for the phrases of a file, one a line."""
    try:
        lines = read_text(path).splitlines()
    except ConfigError as error:
        raise ConfigError(f"rules.blocked_phrases={path!r}: {error}") from None
    phrases = [re.escape(line.strip()) for line in lines if line.strip()]
    require(bool(phrases), f"rules.blocked_phrases={path!r} holds no phrase; give one a line")
    return f"(?i){'|'.join(phrases)}"


def _evaluate(table: pa.Table, columns: dict[str, daft.Expression]) -> pa.Table:
    batch = RecordBatch.from_arrow_table(table)
    expressions: Any = [value.alias(name) for name, value in columns.items()]
    return batch.eval_expression_list(expressions).to_arrow_table()


def _with_columns(table: pa.Table, columns: dict[str, daft.Expression]) -> pa.Table:
    return _evaluate(table, {name: daft.col(name) for name in table.column_names} | columns)


# The rules


@dataclass(frozen=True)
class Rule:
    """A document whose `value` is below its least or above its most is removed."""

    name: str
    value: Any  # a daft.Expression
    kind: Literal["least", "most"]
    limit: float
    lang: str | None = None  # None: every language

    def breaks(self, limit: float) -> Any:
        """Whether a document breaks the rule."""
        broken = self.value < limit if self.kind == "least" else self.value > limit
        return broken if self.lang is None else broken & (daft.col("lang") == self.lang)


def _double(value: daft.Expression) -> daft.Expression:
    return value.cast(daft.DataType.float64())


def _at_least_1(value: daft.Expression) -> daft.Expression:
    return F.clip(value, daft.lit(1), None)


def _share(part: str, whole: str = "length") -> daft.Expression:
    return _double(daft.col(part)) / _at_least_1(daft.col(whole))


def _int(value: daft.Expression) -> daft.Expression:
    return value.cast(daft.DataType.int64())


# In this order: a document is removed for the first rule that it breaks. The columns are those of
# `measure`, and of DERIVED and LATER below.
RULES = [
    # C4: menus, notices, scripts. Where they were the larger part, the rest is too little.
    Rule("boilerplate", _share("boilerplate", "length_before"), "most", 0.5),
    # Gopher: 50 words. Here words and Han characters.
    Rule("too_short", daft.col("units"), "least", 40),
    # Gopher: 100,000 words.
    Rule("too_long", daft.col("units"), "most", 100_000),
    # Control, private-use, unassigned and replacement characters.
    Rule("broken_characters", _share("broken"), "most", 0.01),
    # UTF-8 that was read as Latin-1 or Windows-1252.
    Rule("mojibake", _share("mojibake"), "most", 0.01),
    # UTF-8 that was read as GBK: few of the commonest characters.
    Rule("rare_han", _share("common_han", "han"), "least", 0.05, "zh"),
    # Neither Han nor Latin letters.
    Rule("other_language", _share("other_letters", "letters"), "most", 0.3),
    # Gopher: 80 % of the words have a letter. Here a share of the characters.
    Rule("few_letters", _share("letters", "visible"), "least", 0.4),
    # Tables of numbers.
    Rule("digits", _share("digits", "visible"), "most", 0.4),
    # Gopher: # and ... to words 0.1. Here all symbols.
    Rule("symbols", _share("symbols", "visible"), "most", 0.25),
    # RefinedWeb: long words. Here letters in words of LONG_WORD and more.
    Rule("long_words", _share("long_word_letters"), "most", 0.4),
    # Gopher: 3 to 10.
    Rule("mean_word_length", _share("latin", "words"), "most", 12, "en"),
    # Runs of RUN and more of one letter.
    Rule("drawn_out", _share("drawn_out"), "most", 0.1),
    # Gopher: characters in repeated lines 0.2. Verse has refrains.
    Rule("repeated_lines", _share("repeated_lines"), "most", 0.4),
    # Gopher: characters in repeated 10-grams 0.1. Verse and law have more.
    Rule("repeated_grams", _share("repeated", "units"), "most", 0.6),
    # Gopher: lines that end with an ellipsis 0.3.
    Rule("open_lines", _share("open_lines", "lines"), "most", 0.3),
    # C4: lines of HTML, CSS and JavaScript.
    Rule("markup", _share("markup"), "most", 0.4),
    # C4: ends of sentences. Here the ends of full lines too, for texts without punctuation.
    Rule("no_sentences", _share("sentence_ends", "units"), "least", 0.0005),
    # Pairs like "the of" and "of was": words in random order.
    Rule("odd_neighbours", _share("odd_pairs", "openers"), "most", 0.047, "en"),
    # Friedman 1922, index of coincidence: pairs of characters recur no more than by chance.
    Rule("random_order", daft.col("coincidence"), "least", 1.9, "zh"),
]
NAMES = [rule.name for rule in RULES]

_NOUN_FOLLOWS = "the|an|my|their|your|our|its"
_OBJECT_FOLLOWS = "of|from|with|at"
_NO_OBJECT = "of|and|to|is|was|for|with|be|he|but|were|they|she|or|on|had|have|are|will|can"
_NO_NOUN = f"the|a|an|by|at|from|as|in|that|it|you|his|her|if|when|which|this|not|{_NO_OBJECT}"
_OPENERS = rf"\b(?:{_NOUN_FOLLOWS}|{_OBJECT_FOLLOWS})\b"
_ODD_PAIRS = (
    rf"\b(?:{_NOUN_FOLLOWS})\s+(?:{_NO_NOUN})\b|\b(?:{_OBJECT_FOLLOWS})\s+(?:{_NO_OBJECT})\b"
)
_TEXT = daft.col("text")

_MENU = (
    "首页|主页|关于我们|联系我们|登录|登陆|注册|退出|网站地图|新闻中心|产品展示|下载|下载中心|帮助|帮助中心"
    "|搜索|购物车|我的收藏|会员中心|友情链接|上一页|下一页|上一篇|下一篇|返回顶部|返回首页|返回列表|更多|热门推荐"
    "|相关推荐|相关阅读|最新评论|发表评论|分享到|分享|微信|微博|朋友圈|打印本页|打印|关闭窗口|关闭|加入收藏"
    "|设为首页|收藏本站|home|about(?: us)?|contact(?: us)?|log ?in|log ?out|sign (?:up|in|out)"
    "|register|site ?map|news|products|services|downloads?|help|search|cart|checkout|my account"
    "|fav(?:o|ou)rites|links|prev(?:ious)?|next|back(?: to top)?|top|more|latest comments|share"
    "|tweet|like|follow us|print(?: this page)?|close|privacy(?: policy)?"
    "|terms(?: of (?:use|service))?|cookies?|faq|support|blog|menu|skip to (?:main )?content"
    "|subscribe|rss"
)
_BETWEEN = r"(?:>>|[\s|>»›‹«·•/,，、\-])"
_PROVINCE = "[京沪粤浙苏津渝川鲁豫冀晋辽吉黑皖闽赣鄂湘桂琼贵云陕甘青宁新藏蒙]"
_SEE = "click here (?:for|to (?:read|see|view|find|learn|download|visit|go|get|register))"
_LOG_IN = "you must be logged in|log in to (?:post|reply|comment)|please enable javascript"
# Lines that no text is made of. Their lengths are bounded, since a line of prose is longer; ^ and $
# are a line's (see _without_lines).
_BOILERPLATE_LINES = [
    # Menu entries, two and more on a line, or on lines one below the other.
    rf"[ \t]*(?:{_MENU})(?:{_BETWEEN}+(?:{_MENU}))+{_BETWEEN}*?",
    # Registration of a Chinese web site.
    rf".{{0,60}}(?:{_PROVINCE}ICP[备证]|公网安备|ICP备案|增值电信业务经营许可证).{{0,80}}",
    # Click here; scan this code; follow this account.
    r".{0,40}(?:点击(?:(?:这里|此处)?(?:查看|阅读|进入|下载|返回|了解)|这里)"
    r"|(?:扫描|长按|识别)(?:上方|下方)?二维码|关注.{0,12}公众号).{0,60}",
    # Copyright.
    r".{0,40}(?:版权所有|未经.{0,8}(?:许可|授权).{0,8}(?:不得|禁止).{0,6}转载|转载请注明"
    r"|all rights reserved).{0,60}",
    # Cookies.
    r".{0,60}(?:使用 ?cookies?|uses? (?:of )?cookies|cookie policy|accept (?:all )?cookies)"
    r".{0,120}",
    # Breadcrumbs.
    r".{0,20}(?:您(?:所在|现在|当前)的?位置|当前位置|you are here) ?[:：].{0,100}",
    # Counts of readers.
    r"[ \t]*(?:阅读|浏览|点击|评论|点赞|收藏|转发|分享)(?:数|量|次数)? ?[（(:：] ?\d+[)）]?.{0,60}",
    # Next and previous page.
    r"[ \t]*(?:(?:上|下)一(?:篇|页|章|条)|« ?previous|previous post|next post) ?[:：].{0,160}",
    # Editor and source.
    r"[ \t]*(?:责任编辑|本文来源|文章来源|稿源|编辑|来源) ?[:：].{0,60}",
    # A teaser that ends with [read more].
    r".{0,120}(?:…|\.\.\.|。) ?"
    r"[\[(【［](?:详细|全文|更多|查看全文|阅读全文|read more|more|continue reading)[\])】］]"
    r".{0,10}",
    rf".{{0,20}}{_SEE}.{{0,120}}",
    r"[ \t]*(?:read more (?:about|»|\.\.\.)|continue reading).{0,120}",
    r".{0,20}(?:subscribe to our (?:newsletter|mailing list)|sign up for our).{0,120}",
    rf".{{0,20}}(?:{_LOG_IN}|leave a (?:reply|comment)).{{0,80}}",
    r"[ \t]*(?:posted (?:by|on|in)|filed under|tagged (?:with|as)|share this|follow us on) ?:? "
    r".{0,120}",
    r".{0,40}(?:lorem ipsum|copyright ©|© ?(?:19|20)\d\d).{0,80}",
]

_MARKUP_LINES = [
    r".*</?(?:div|span|td|tr|li|a|ul|p|h[1-6]|script|style|table|img|br)\b[^<>\n]*>.*",
    r".*\{[^{}\n]*:[^{}\n]*;[^{}\n]*\}.*",
    r".*(?:\bdocument\.\w+|\bvar \w+ ?=|\bfunction ?\(\w*\) ?\{).*",
]


def _without_lines(text: daft.Expression, lines: list[str]) -> daft.Expression:
    """A text without lines of these kinds."""
    # One kind after the other: a single expression for all takes three times as long.
    for line in lines:
        text = F.regexp_replace(text, rf"(?mi)^(?:{line})[ \t\r]*$\n?", "")
    return text


# Made of the counts by class.
DERIVED = {
    "letters": daft.col("han") + daft.col("latin") + daft.col("other_letters"),
    "visible": daft.col("length") - daft.col("space"),
    "boilerplate": _int(daft.col("length_before")) - _int(daft.col("length")),
}
# Counted by regular expressions once the text is clean.
LATER = {
    # + 6: in a short text a few odd pairs prove nothing.
    "openers": F.regexp_count(_TEXT, _OPENERS) + 6,
    "odd_pairs": F.regexp_count(_TEXT, _ODD_PAIRS),
    "markup": F.length(_TEXT) - F.length(_without_lines(_TEXT, _MARKUP_LINES)),
}


# Personal data

# An edge of ASCII words: between a Han character and a digit too, where \b sees none.
_EDGE = r"(?-u:\b)"
_EMAIL = r"[A-Za-z0-9._%+\-]{1,64}@(?:[A-Za-z0-9\-]+\.)+[A-Za-z]{2,}"
_PHONE = (
    rf"{_EDGE}1[3-9]\d(?:[ \-]?\d{{4}}){{2}}{_EDGE}"  # Chinese mobile
    rf"|{_EDGE}0\d{{2,3}}-\d{{7,8}}{_EDGE}"  # Chinese landline
    rf"|\+\d{{1,3}}[ \-](?:\(?\d{{1,4}}\)?[ \-]?){{2,4}}\d{{2,4}}{_EDGE}"  # international
    rf"|\(\d{{3}}\) ?\d{{3}}-\d{{4}}{_EDGE}|{_EDGE}\d{{3}}-\d{{3}}-\d{{4}}{_EDGE}"  # North American
)
_IDENTITY = re.compile(
    r"(?<![0-9A-Za-z])[1-9]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}"
    r"[\dXx](?![0-9A-Za-z])"
)
_DIGITS = r"[0-9]{17}[0-9Xx]"
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def is_identity_number(number: str) -> bool:
    """Whether the last of 18 characters is a Chinese identity number's check digit (GB 11643)."""
    total = sum(w * int(c) for w, c in zip(_WEIGHTS, number[:17], strict=True))
    return "10X98765432"[total % 11] == number[17].upper()


def mask(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts with <email>, <phone> and <identity> in place of what these look like.

    Chinese identity numbers are recognised by their date and check digit, so that other numbers of
    18 digits stay.
    """
    # Daft's expressions cannot compute a check digit. Python does, for the few texts that have such
    # a number at all.
    found = _evaluate(pa.table({"text": texts}), {"text": _TEXT, "some": F.regexp(_TEXT, _DIGITS)})
    hide = lambda match: "<identity>" if is_identity_number(match[0]) else match[0]
    pairs = zip(found["text"].to_pylist(), found["some"].to_pylist(), strict=True)
    replaced = [_IDENTITY.sub(hide, text) if some else text for text, some in pairs]
    table = pa.table({"text": pa.array(replaced, pa.large_string())})
    without_email = F.regexp_replace(_TEXT, _EMAIL, "<email>")
    return _evaluate(table, {"text": F.regexp_replace(without_email, _PHONE, "<phone>")})["text"]


# Measures: a batch of texts in a few passes of numpy over its code points. A unit is a Han
# character, or a run of other letters and digits.

HAN, LATIN, LETTER, DIGIT, SPACE, PUNCTUATION, SYMBOL, BROKEN = range(8)
CLASSES = {
    "han": HAN,
    "latin": LATIN,
    "other_letters": LETTER,
    "digits": DIGIT,
    "space": SPACE,
    "punctuation": PUNCTUATION,
    "symbols": SYMBOL,
    "broken": BROKEN,
}
# The 150 Han characters that are commonest in modern, vernacular and classical text together,
# simplified and traditional. They make up 35 % and more of any prose or verse; UTF-8 that was read
# as GBK is made of rare ones.
COMMON_HAN = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年"
    "过发后作里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心"
    "她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间"
    "由问很最重水风月山云春花秋夜何不時來國為說這個們對會後無與長於過發從里裡樣學當還開見頭門馬"
    "東"
)
# Harmless in any text.
FORMAT_CHARACTERS = "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad"
# Equal characters make a run from this number on: 哈哈哈哈哈, soooooo.
RUN = 5
# Letters and digits. German has longer words, English has not.
LONG_WORD = 30
# Characters from which on their order can be judged.
ENOUGH_HAN = 300
# Characters. A list of shorter lines is no text.
FULL_LINE = 20
# Units of a repeated passage: Gopher's longest n-gram.
GRAM = 10
_MIX = np.uint64(0x9E3779B97F4A7C15)


@functools.cache
def _classes() -> np.ndarray:
    """The class of every code point: uint8 [0x110000]."""
    classes = np.full(0x110000, BROKEN, np.uint8)
    by_category = {"L": LETTER, "M": LETTER, "N": DIGIT, "Z": SPACE, "P": PUNCTUATION, "S": SYMBOL}
    # What lies between is Han or unassigned.
    for point in itertools.chain(range(0x20000), range(0xE0000, 0xE1000)):
        classes[point] = by_category.get(unicodedata.category(chr(point))[0], BROKEN)
    for low, high in ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)):
        classes[low : high + 1] = HAN
    for low, high in ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF)):
        block = classes[low : high + 1]
        block[block == LETTER] = LATIN
    classes[[ord(c) for c in "\t\n\r" + FORMAT_CHARACTERS]] = SPACE
    classes[0xFFFD] = BROKEN
    return classes


@functools.cache
def _marks() -> dict[str, np.ndarray]:
    """Sets of code points: bool [0x110000] each."""
    # The bytes of UTF-8, read as Latin-1 or Windows-1252: one that begins a character, and those
    # that continue it.
    lead = [chr(point) for point in range(0xC2, 0xF5)]
    follow = [chr(point) for point in range(0x80, 0xC0)]
    follow += bytes(range(0x80, 0xC0)).decode("cp1252", errors="ignore")
    sets = {"common": COMMON_HAN, "lead": lead, "follow": follow, "end": "。！？!?…", "stop": "."}
    result = {}
    for name, characters in sets.items():
        result[name] = np.zeros(0x110000, bool)
        result[name][[ord(c) for c in characters]] = True
    return result


def measure(texts: list[str], enough_for_language: bool = False) -> pa.Table:
    """A row for each text: `length` in code points, counts by class, and what follows below.

    `enough_for_language`: counts by class alone, in a tenth of the time.
    """
    # A NUL after every text keeps runs, words and n-grams of different texts apart.
    joined = "\0".join(texts) + "\0"
    points = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    starts = np.concatenate([[0], np.cumsum(lengths + 1)])
    classes = _classes()[points]
    classes[starts[1:] - 1] = SPACE

    def total(of: np.ndarray) -> np.ndarray:
        """Sums over each document of a bool or number a code point."""
        return np.add.reduceat(of, starts[:-1], dtype=np.int64)

    counts = {name: total(classes == number) for name, number in CLASSES.items()}
    counts["space"] -= 1  # the NUL
    if enough_for_language:
        return pa.table({"length": lengths, **counts})
    owner = np.repeat(np.arange(len(texts), dtype=np.int32), lengths + 1)
    marks = _marks()
    follow = np.append(points[1:], 0)
    ended = marks["end"][points] | (marks["stop"][points] & (_classes()[follow] == SPACE))
    lines = _lines(texts)
    table = {
        "length": lengths,
        **counts,
        "common_han": total(marks["common"][points]),
        "mojibake": total(marks["lead"][points] & marks["follow"][follow]),
        "sentence_ends": total(ended) + lines.pop("full_lines"),
        "drawn_out": _runs(points, classes, owner, len(texts)),
        **_units(points, classes, owner, len(texts)),
        **lines,
    }
    return pa.table(table)


def _runs(points: np.ndarray, classes: np.ndarray, owner: np.ndarray, documents: int) -> np.ndarray:
    """Letters of each document in runs of one letter, RUN long or longer."""
    border = np.flatnonzero(np.append(True, points[1:] != points[:-1]))
    size = np.diff(np.append(border, len(points)))
    drawn = (size >= RUN) & (classes[border] <= LETTER)
    return np.bincount(owner[border[drawn]], size[drawn], documents).astype(np.int64)


def _units(
    points: np.ndarray, classes: np.ndarray, owner: np.ndarray, documents: int
) -> dict[str, np.ndarray]:
    """units, words, long_word_letters, repeated, coincidence of each document.

    `repeated`: units in GRAM-grams that occurred before in the document.
    """
    word = (classes == LATIN) | (classes == LETTER) | (classes == DIGIT)
    begins = word & ~np.append(False, word[:-1])
    unit = begins | (classes == HAN)
    first = np.flatnonzero(unit)
    if not len(first):
        names = ("units", "words", "long_word_letters", "repeated")
        zeros = dict.fromkeys(names, np.zeros(documents, np.int64))
        return {**zeros, "coincidence": np.full(documents, np.inf)}
    # A unit's hash: a hash of each of its code points and their places in it, summed. Wrap-around
    # is meant. Upper and lower case of ASCII are the same.
    place = np.arange(len(points), dtype=np.int64)
    inside = np.where(unit, place, 0)
    np.maximum.accumulate(inside, out=inside)
    offset = (place - inside).astype(np.uint64)
    lower = points | np.where((points >= 65) & (points <= 90), np.uint32(32), np.uint32(0))
    value = np.where(
        word | (classes == HAN),
        _scramble(lower.astype(np.uint64) + (offset << np.uint64(32))),
        np.uint64(0),
    )
    key = np.add.reduceat(value, first)
    size = np.add.reduceat(word.astype(np.int64), first)
    own = owner[first]
    is_word = classes[first] != HAN
    count = lambda which, weights=None: np.bincount(
        own[which], None if weights is None else weights[which], documents
    )
    units = np.bincount(own, minlength=documents)
    return {
        "units": units,
        "words": count(is_word),
        "long_word_letters": count(size >= LONG_WORD, size).astype(np.int64),
        "repeated": _repeated(key, own, documents),
        "coincidence": _coincidence(key[~is_word], own[~is_word], first[~is_word], documents),
    }


def _scramble(key: np.ndarray) -> np.ndarray:
    """A uint64 hash of uint64 (the end of splitmix64)."""
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


def _repeated(key: np.ndarray, own: np.ndarray, documents: int) -> np.ndarray:
    """Units of each document that lie in a GRAM-gram which occurred before in the document."""
    if len(key) < GRAM:
        return np.zeros(documents, np.int64)
    gram = np.zeros(len(key) - GRAM + 1, np.uint64)
    for offset in range(GRAM):
        gram = gram * _MIX + key[offset : len(key) - GRAM + 1 + offset]
    owner = own[: len(gram)]
    whole = owner == own[GRAM - 1 :]
    # Sorted by hash, then place: where two neighbours have the same hash, the second is a repeat.
    # One sort of numbers that hold both is several times faster than a sort with an index.
    bits = np.uint64(len(gram).bit_length())
    place = np.arange(len(gram), dtype=np.uint64)
    keyed = np.sort((_scramble(gram * _MIX + owner.astype(np.uint64)) << bits) | place)
    equal = (keyed[1:] >> bits) == (keyed[:-1] >> bits)
    again = np.zeros(len(gram), bool)
    again[(keyed[1:][equal] & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)] = True
    again &= whole
    steps = np.zeros(len(key) + 1, np.int64)
    steps[:-GRAM] += again
    steps[GRAM:] -= again
    covered = np.cumsum(steps[:-1]) > 0
    return np.bincount(own[covered], minlength=documents)


def _coincidence(key: np.ndarray, own: np.ndarray, place: np.ndarray, documents: int) -> np.ndarray:
    """How much more often pairs of Han characters recur than they would in random order.

    Friedman's index of coincidence of pairs over the square of that of characters: about 1 for
    shuffled text, many times that for language; infinite where there are too few characters to say.
    """
    singles, count = _equal_pairs(key, own, documents)
    pair = key[:-1] * _MIX + key[1:]
    inside = place[:-1] + 1 == place[1:]
    doubles, pairs = _equal_pairs(pair[inside], own[:-1][inside], documents)
    chance = (singles / np.maximum(count, 1)) ** 2 * pairs
    # + 5: a few coincidences prove nothing.
    ratio = (doubles + 5) / (chance + 5)
    return np.where(np.bincount(own, minlength=documents) >= ENOUGH_HAN, ratio, np.inf)


def _equal_pairs(key: np.ndarray, own: np.ndarray, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each document: pairs of places with equal keys, and all pairs of places."""
    # The document in the upper bits and as much of the hash as fits in the lower ones.
    owner_bits = documents.bit_length()
    bits = np.uint64(64 - owner_bits)
    keyed = np.sort((own.astype(np.uint64) << bits) | (_scramble(key) >> np.uint64(owner_bits)))
    border = np.flatnonzero(np.append(len(keyed) > 0, keyed[1:] != keyed[:-1]))
    size = np.diff(np.append(border, len(keyed))).astype(np.float64)
    equal = np.bincount((keyed[border] >> bits).astype(np.int64), size * (size - 1) / 2, documents)
    number = np.bincount(own, minlength=documents).astype(np.float64)
    return equal, number * (number - 1) / 2


def _lines(texts: list[str]) -> dict[str, np.ndarray]:
    """Counts of lines that are not blank, of each document.

    `lines`; `full_lines`, the first line aside, which may be a title; `open_lines`, which end with
    an ellipsis; and `repeated_lines`, in characters.
    """
    counts = np.zeros((len(texts), 4), np.int64)
    for index, text in enumerate(texts):
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        seen: set[str] = set()
        repeated = 0
        for line in lines:
            if line in seen:
                repeated += len(line)
            seen.add(line)
        full = sum(len(line) >= FULL_LINE for line in lines[1:])
        ellipses = sum(line.endswith(("...", "…")) for line in lines)
        counts[index] = len(lines), full, ellipses, repeated
    names = ("lines", "full_lines", "open_lines", "repeated_lines")
    return dict(zip(names, counts.T.copy(), strict=True))
