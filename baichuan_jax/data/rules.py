"""Heuristic rules: what makes a line or a document unfit, each a small expression with its limit and where it comes from.

Gopher: Rae et al. 2021, appendix A1 (https://arxiv.org/abs/2112.11446). C4: Raffel et al. 2020,
section 2.2 (https://arxiv.org/abs/1910.10683). RefinedWeb: Penedo et al. 2023
(https://arxiv.org/abs/2306.01116). Limits that have no such source were set on Chinese and English
novels, verse, laws and manuals, so that each rule takes well under 0.3 % of them (docs/data.md).
"""

import difflib
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import daft  # pyright: ignore[reportMissingImports]
import daft.functions as F  # pyright: ignore[reportMissingImports]
import numpy as np
import pyarrow as pa  # pyright: ignore[reportMissingImports]
from daft.recordbatch import RecordBatch  # pyright: ignore[reportMissingImports]

from baichuan_jax.config.schema import ConfigError, require
from baichuan_jax.data.corpus.config import RulesConfig
from baichuan_jax.data.corpus.measures import measure

HAN_SHARE = 0.3  # of the letters, from which on a text is Chinese: a Han character says what two or three Latin letters do


@dataclass(frozen=True)
class Rule:
    """A document whose `value` is below its `min` or above its `max` limit is removed, for the rule's name."""

    name: str
    value: Any  # a daft.Expression
    kind: Literal["min", "max"]
    limit: float
    source: str
    lang: str | None = None  # None: every language

    def breaks(self, limit: float) -> Any:
        """Whether a document breaks the rule."""
        broken = self.value < limit if self.kind == "min" else self.value > limit
        return broken if self.lang is None else broken & (daft.col("lang") == self.lang)


def _share(part: str, whole: str = "length") -> daft.Expression:
    return daft.col(part).cast(daft.DataType.float64()) / F.clip(daft.col(whole), daft.lit(1), None)


def _int(value: daft.Expression) -> daft.Expression:
    return value.cast(daft.DataType.int64())


# The columns are those of measures.measure, and of DERIVED and LATER below.
RULES = [
    Rule(
        "boilerplate",
        _share("boilerplate", "length_before"),
        "max",
        0.5,
        "C4: menus, notices, scripts; the rest is too little",
    ),
    Rule(
        "too_short", daft.col("units"), "min", 40, "Gopher: 50 words; here words and Han characters"
    ),
    Rule("too_long", daft.col("units"), "max", 100_000, "Gopher: 100,000 words"),
    Rule(
        "broken_characters",
        _share("broken"),
        "max",
        0.01,
        "control, private-use, unassigned and replacement characters",
    ),
    Rule("mojibake", _share("mojibake"), "max", 0.01, "UTF-8 read as Latin-1 or Windows-1252"),
    Rule(
        "rare_han",
        _share("common_han", "han"),
        "min",
        0.05,
        "UTF-8 read as GBK: few of the commonest characters",
        "zh",
    ),
    Rule(
        "other_language",
        _share("other_letters", "letters"),
        "max",
        0.3,
        "neither Han nor Latin letters",
    ),
    Rule(
        "few_letters",
        _share("letters", "visible"),
        "min",
        0.4,
        "Gopher: 80 % of words have a letter; here of characters",
    ),
    Rule("digits", _share("digits", "visible"), "max", 0.4, "tables of numbers"),
    Rule(
        "symbols",
        _share("symbols", "visible"),
        "max",
        0.25,
        "Gopher: # and ... to words 0.1; here all symbols",
    ),
    Rule(
        "long_words",
        _share("long_word_letters"),
        "max",
        0.4,
        "RefinedWeb: long words; here letters in words of 30 and more",
    ),
    Rule("mean_word_length", _share("latin", "words"), "max", 12, "Gopher: 3 to 10", "en"),
    Rule("drawn_out", _share("drawn_out"), "max", 0.1, "runs of five and more of one letter"),
    Rule(
        "repeated_lines",
        _share("repeated_lines"),
        "max",
        0.4,
        "Gopher: characters in repeated lines 0.2",
    ),
    Rule(
        "repeated_grams",
        _share("repeated", "units"),
        "max",
        0.6,
        "Gopher: in repeated 10-grams 0.1; verse and law have more",
    ),
    Rule(
        "open_lines",
        _share("open_lines", "lines"),
        "max",
        0.3,
        "Gopher: lines that end with an ellipsis 0.3",
    ),
    Rule("markup", _share("markup"), "max", 0.4, "C4: lines of HTML, CSS and JavaScript"),
    Rule(
        "no_sentences",
        _share("sentence_ends", "units"),
        "min",
        0.0005,
        "C4: ends of sentences; here of full lines too",
    ),
    Rule(
        "odd_neighbours",
        _share("odd_pairs", "openers"),
        "max",
        0.047,
        "'the of', 'of was': words in random order",
        "en",
    ),
    Rule(
        "random_order",
        daft.col("coincidence"),
        "min",
        1.9,
        "Friedman 1922: pairs of characters recur no more than by chance",
        "zh",
    ),
]
NAMES = [rule.name for rule in RULES]

_NOUN_FOLLOWS = "the|an|my|their|your|our|its"
_OBJECT_FOLLOWS = "of|from|with|at"
_NO_OBJECT = "of|and|to|is|was|for|with|be|he|but|were|they|she|or|on|had|have|are|will|can"
_NO_NOUN = f"the|a|an|by|at|from|as|in|that|it|you|his|her|if|when|which|this|not|{_NO_OBJECT}"
_TEXT = daft.col("text")

_MENU = (
    "首页|主页|关于我们|联系我们|登录|登陆|注册|退出|网站地图|新闻中心|产品展示|下载|下载中心|帮助|帮助中心|搜索|购物车|我的收藏|会员中心|友情链接"
    "|上一页|下一页|上一篇|下一篇|返回顶部|返回首页|返回列表|更多|热门推荐|相关推荐|相关阅读|最新评论|发表评论|分享到|分享|微信|微博|朋友圈"
    "|打印本页|打印|关闭窗口|关闭|加入收藏|设为首页|收藏本站|home|about(?: us)?|contact(?: us)?|log ?in|log ?out|sign (?:up|in|out)"
    "|register|site ?map|news|products|services|downloads?|help|search|cart|checkout|my account|fav(?:o|ou)rites|links|prev(?:ious)?"
    "|next|back(?: to top)?|top|more|latest comments|share|tweet|like|follow us|print(?: this page)?|close|privacy(?: policy)?"
    "|terms(?: of (?:use|service))?|cookies?|faq|support|blog|menu|skip to (?:main )?content|subscribe|rss"
)
_BETWEEN = r"(?:>>|[\s|>»›‹«·•/,，、\-])"
# Lines that no text is made of. (?m): ^ and $ are a line's; a line of prose is longer, so their
# lengths are bounded.
_BOILERPLATE_LINES = [
    rf"[ \t]*(?:{_MENU})(?:{_BETWEEN}+(?:{_MENU}))+{_BETWEEN}*?",  # two and more on a line, or on lines one below the other
    r".{0,60}(?:[京沪粤浙苏津渝川鲁豫冀晋辽吉黑皖闽赣鄂湘桂琼贵云陕甘青宁新藏蒙]ICP[备证]|公网安备|ICP备案|增值电信业务经营许可证).{0,80}",
    r".{0,40}(?:点击(?:(?:这里|此处)?(?:查看|阅读|进入|下载|返回|了解)|这里)|(?:扫描|长按|识别)(?:上方|下方)?二维码|关注.{0,12}公众号).{0,60}",
    r".{0,40}(?:版权所有|未经.{0,8}(?:许可|授权).{0,8}(?:不得|禁止).{0,6}转载|转载请注明|all rights reserved).{0,60}",
    r".{0,60}(?:使用 ?cookies?|uses? (?:of )?cookies|cookie policy|accept (?:all )?cookies).{0,120}",
    r".{0,20}(?:您(?:所在|现在|当前)的?位置|当前位置|you are here) ?[:：].{0,100}",
    r"[ \t]*(?:阅读|浏览|点击|评论|点赞|收藏|转发|分享)(?:数|量|次数)? ?[（(:：] ?\d+[)）]?.{0,60}",
    r"[ \t]*(?:(?:上|下)一(?:篇|页|章|条)|« ?previous|previous post|next post) ?[:：].{0,160}",
    r"[ \t]*(?:责任编辑|本文来源|文章来源|稿源|编辑|来源) ?[:：].{0,60}",
    r".{0,120}(?:…|\.\.\.|。) ?[\[(【［](?:详细|全文|更多|查看全文|阅读全文|read more|more|continue reading)[\])】］].{0,10}",
    r".{0,20}click here (?:for|to (?:read|see|view|find|learn|download|visit|go|get|register)).{0,120}",
    r"[ \t]*(?:read more (?:about|»|\.\.\.)|continue reading).{0,120}",
    r".{0,20}(?:subscribe to our (?:newsletter|mailing list)|sign up for our).{0,120}",
    r".{0,20}(?:you must be logged in|log in to (?:post|reply|comment)|please enable javascript|leave a (?:reply|comment)).{0,80}",
    r"[ \t]*(?:posted (?:by|on|in)|filed under|tagged (?:with|as)|share this|follow us on) ?:? .{0,120}",
    r".{0,40}(?:lorem ipsum|copyright ©|© ?(?:19|20)\d\d).{0,80}",
]

_MARKUP_LINES = [
    r".*</?(?:div|span|td|tr|li|a|ul|p|h[1-6]|script|style|table|img|br)\b[^<>\n]*>.*",
    r".*\{[^{}\n]*:[^{}\n]*;[^{}\n]*\}.*",
    r".*(?:\bdocument\.\w+|\bvar \w+ ?=|\bfunction ?\(\w*\) ?\{).*",
]


def _without_lines(text: daft.Expression, lines: list[str]) -> daft.Expression:
    """A text without lines of these kinds. One kind after the other: a single expression for all takes three times as long."""
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
    "openers": F.regexp_count(_TEXT, rf"\b(?:{_NOUN_FOLLOWS}|{_OBJECT_FOLLOWS})\b")
    + 6,  # + 6: a few prove nothing
    "odd_pairs": F.regexp_count(
        _TEXT,
        rf"\b(?:{_NOUN_FOLLOWS})\s+(?:{_NO_NOUN})\b|\b(?:{_OBJECT_FOLLOWS})\s+(?:{_NO_OBJECT})\b",
    ),
    "markup": F.length(_TEXT) - F.length(_without_lines(_TEXT, _MARKUP_LINES)),
}

# Personal data. (?-u:\b) is an edge of ASCII words: between a Han character and a digit too.
_EDGE = r"(?-u:\b)"
_EMAIL = r"[A-Za-z0-9._%+\-]{1,64}@(?:[A-Za-z0-9\-]+\.)+[A-Za-z]{2,}"
_PHONE = (
    rf"{_EDGE}1[3-9]\d(?:[ \-]?\d{{4}}){{2}}{_EDGE}"  # Chinese mobile
    rf"|{_EDGE}0\d{{2,3}}-\d{{7,8}}{_EDGE}"  # Chinese landline
    rf"|\+\d{{1,3}}[ \-](?:\(?\d{{1,4}}\)?[ \-]?){{2,4}}\d{{2,4}}{_EDGE}"  # international
    rf"|\(\d{{3}}\) ?\d{{3}}-\d{{4}}{_EDGE}|{_EDGE}\d{{3}}-\d{{3}}-\d{{4}}{_EDGE}"  # North American
)
_IDENTITY = re.compile(
    r"(?<![0-9A-Za-z])[1-9]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?![0-9A-Za-z])"
)
_DIGITS = r"[0-9]{17}[0-9Xx]"
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def is_identity_number(number: str) -> bool:
    """Whether the last of 18 characters is the check digit of a Chinese identity number (GB 11643-1999)."""
    return (
        "10X98765432"[sum(w * int(c) for w, c in zip(_WEIGHTS, number[:17], strict=True)) % 11]
        == number[17].upper()
    )


def limits_of(config: RulesConfig) -> dict[str, float]:
    """The limit of every rule that is switched on. Raises ConfigError where a rule of another name is given a limit."""
    for name in config.limits:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"rules.limits: there is no rule {name!r}; the nearest is {near!r}; all: {', '.join(NAMES)}"
            )
    limits = (
        {rule.name: config.limits.get(rule.name, rule.limit) for rule in RULES}
        if config.enabled
        else {}
    )
    return {name: limit for name, limit in limits.items() if limit is not None}


@functools.cache
def blocked_pattern(path: str) -> str:
    """A regular expression for the phrases of a file, one a line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"rules.blocked_phrases={path!r} cannot be read: {error}") from None
    phrases = [re.escape(line.strip()) for line in lines if line.strip()]
    require(bool(phrases), f"rules.blocked_phrases={path!r} holds no phrase; give one a line")
    return f"(?i){'|'.join(phrases)}"


def apply(texts: list[str], config: RulesConfig) -> pa.Table:
    """Clean and judge texts: `text` (boilerplate lines dropped, personal data masked), `lang` ("zh" or "en"), `reason` (null: fit)."""
    raw = pa.table({"text": pa.array(texts, pa.large_string())})
    cleaned = _without_lines(_TEXT, _BOILERPLATE_LINES) if config.enabled else _TEXT
    table = _evaluate(raw, {"text": cleaned, "length_before": F.length(_TEXT)})
    if config.personal_data == "keep":
        personal = pa.array(np.zeros(len(texts), bool))
    else:
        masked = mask(table["text"])
        personal = pa.array(np.asarray(masked) != np.asarray(table["text"]))
        if config.personal_data == "mask":
            table = table.set_column(0, "text", masked)
    measured = measure(table["text"].to_pylist(), enough_for_language=not config.enabled)
    for name in measured.column_names:
        table = table.append_column(name, measured[name])
    table = table.append_column("personal_data", personal)
    table = _evaluate(
        table,
        {name: daft.col(name) for name in table.column_names}
        | DERIVED
        | (LATER if config.enabled else {}),
    )
    chinese = daft.col("han").cast(daft.DataType.float64()) >= HAN_SHARE * F.clip(
        daft.col("letters"), daft.lit(1), None
    )
    lang = F.when(chinese, daft.lit("zh")).otherwise(daft.lit("en"))
    table = _evaluate(table, {name: daft.col(name) for name in table.column_names} | {"lang": lang})
    return _evaluate(table, {"text": _TEXT, "lang": daft.col("lang"), "reason": _reason(config)})


def _reason(config: RulesConfig) -> daft.Expression:
    """The name of the first rule that a document breaks, or null."""
    limits = limits_of(config)
    broken = [(rule.name, rule.breaks(limits[rule.name])) for rule in RULES if rule.name in limits]
    if config.personal_data == "drop":
        broken.append(("personal_data", daft.col("personal_data")))
    if config.blocked_phrases is not None:
        broken.append(("blocked_phrase", F.regexp(_TEXT, blocked_pattern(config.blocked_phrases))))
    reason = daft.lit(None).cast(daft.DataType.string())
    for name, breaks in reversed(broken):
        reason = F.when(breaks, daft.lit(name)).otherwise(reason)
    return reason


def mask(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts with e-mail addresses, phone numbers and Chinese identity numbers replaced by <email>, <phone> and <identity>."""
    found = _evaluate(pa.table({"text": texts}), {"text": _TEXT, "some": F.regexp(_TEXT, _DIGITS)})
    replaced = [
        _IDENTITY.sub(
            lambda match: "<identity>" if is_identity_number(match[0]) else match[0], text
        )
        if some
        else text
        for text, some in zip(found["text"].to_pylist(), found["some"].to_pylist(), strict=True)
    ]
    table = pa.table({"text": pa.array(replaced, pa.large_string())})
    return _evaluate(
        table,
        {"text": F.regexp_replace(F.regexp_replace(_TEXT, _EMAIL, "<email>"), _PHONE, "<phone>")},
    )["text"]


def _evaluate(table: pa.Table, columns: dict[str, daft.Expression]) -> pa.Table:
    batch = RecordBatch.from_arrow_table(table)
    expressions: Any = [value.alias(name) for name, value in columns.items()]
    return batch.eval_expression_list(expressions).to_arrow_table()
