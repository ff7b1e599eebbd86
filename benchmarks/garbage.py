"""Twelve kinds of text that no model should learn from, in Chinese ("zh") and English ("en").

corpus_truth.py plants them. Each kind is a function of a clean text, its language and a seeded
random.Random, and takes words from the clean text: so a filter cannot find garbage by its
vocabulary. No two calls give the same text.
"""

import base64
import random
import re
from collections.abc import Callable

# Control characters but tab and line end, replacement characters, and some for private use.
CONTROL_CODES = (*range(1, 9), *range(14, 32), 0x7F, *range(0x80, 0xA0))
CONTROL = [chr(c) for c in (*CONTROL_CODES, 0xFFFD, 0xFFFD, 0xE000, 0xE123, 0xF8FF)]
SYMBOLS = "=-*#~|+<>^_/\\•■□★☆◆◇※→←●○▲▼░▒▓│─┼{}[]()$%&@!?"
MENU = {
    "zh": (
        "首页,关于我们,联系我们,登录,注册,网站地图,新闻中心,产品展示,下载,帮助,搜索,购物车,"
        "我的收藏,会员中心,友情链接,上一页,下一页,返回顶部,更多>>,热门推荐,最新评论,分享到,"
        "微信,微博,打印本页,关闭窗口,加入收藏,设为首页"
    ),
    "en": (
        "Home,About us,Contact,Log in,Sign up,Site map,News,Products,Download,Help,Search,Cart,"
        "My account,Favorites,Links,Previous,Next,Back to top,More »,Popular,Latest comments,"
        "Share,Tweet,Print this page,Close,Privacy,Terms of use,FAQ"
    ),
}
NOTICES = {
    "zh": [
        "本网站使用Cookie，继续浏览即表示您同意我们使用Cookie。",
        "京ICP备{n}号-1 京公网安备{n}号",
        "版权所有 © {y} 未经许可不得转载",
        "点击查看{w}全文>>",
        "扫描二维码关注{w}公众号，获取更多资讯",
        "您所在的位置：首页 > {w} > 正文",
        "阅读({n}) 评论(0) 点赞({y})",
        "上一篇：{w} 下一篇：{w}",
        "责任编辑：{w} 来源：互联网",
        "{w}…[详细]",
    ],
    "en": [
        "This site uses cookies. By continuing to browse you agree to our use of cookies.",
        "Copyright © {y} {w} Inc. All rights reserved.",
        "Click here to read more about {w}...",
        "Subscribe to our newsletter and never miss an update!",
        "You are here: Home > {w} > {w}",
        "Posted by {w} on 03/{d}/{y} | {d} comments | Permalink",
        "Share this: Facebook Twitter Pinterest LinkedIn Email",
        "« Previous: {w} | Next: {w} »",
        "You must be logged in to post a comment.",
        "{w}... [Read more]",
    ],
}
TAGS = ["div", "span", "td", "li", "a", "ul", "p", "h3"]
STYLES = ["margin", "padding", "width", "height", "font-size", "line-height", "opacity"]


def words_of(text: str, lang: str) -> list[str]:
    """Han characters (zh), or runs of Latin letters (en)."""
    return re.findall(r"[\u3400-\u9fff]" if lang == "zh" else r"[A-Za-z']+", text)


def _draw(text: str, lang: str, rng: random.Random, low: int, high: int) -> str:
    """A few consecutive words of the text."""
    words = words_of(text, lang)
    size = rng.randint(low, high)
    start = rng.randrange(max(1, len(words) - size))
    return ("" if lang == "zh" else " ").join(words[start : start + size])


def mojibake(text: str, lang: str, rng: random.Random) -> str:
    """UTF-8 that was read in another encoding.

    English needs characters beyond ASCII to show it: no-break spaces and curly quotes.
    """
    text = text[:1200]
    if lang == "zh":
        if rng.random() < 0.5:
            return text.encode().decode("gbk", errors="replace")
        return text.encode().decode("cp1252", errors="replace")
    text = re.sub(" ", lambda _: "\u00a0" if rng.random() < 0.3 else " ", text)
    text = text.replace("'", "\u2019").replace("--", "\u2014").replace('"', "\u201c")
    return text.encode().decode("latin-1" if rng.random() < 0.5 else "cp1252", errors="replace")


def control(text: str, lang: str, rng: random.Random) -> str:
    """A damaged file: 3 to 15 % control, private-use and replacement characters."""
    share = rng.uniform(0.03, 0.15)
    return "".join(rng.choice(CONTROL) if rng.random() < share else c for c in text[:2000])


def symbols(text: str, lang: str, rng: random.Random) -> str:
    """Rules, arrows and boxes with a word here and there."""
    lines = []
    for _ in range(rng.randint(12, 50)):
        line = "".join(rng.choice(rng.sample(SYMBOLS, 3)) for _ in range(rng.randint(10, 60)))
        with_words = rng.random() < 0.5
        lines.append(f"{line} {_draw(text, lang, rng, 1, 3)} {line[:8]}" if with_words else line)
    return "\n".join(lines)


def digits(text: str, lang: str, rng: random.Random) -> str:
    """A table of numbers, dates and prices."""
    rows = [_draw(text, lang, rng, 1, 3) for _ in range(6)]
    lines = []
    for _ in range(rng.randint(20, 60)):
        cells = [
            f"{rng.uniform(0, 10 ** rng.randint(1, 6)):.{rng.randint(0, 3)}f}"
            for _ in range(rng.randint(3, 8))
        ]
        named = rng.random() < 0.4
        month = "" if named else f"{rng.randint(1990, 2026)}-{rng.randint(1, 12):02d}"
        lines.append("\t".join([rng.choice(rows) if named else month, *cells]))
    return "\n".join(lines)


def repeated_lines(text: str, lang: str, rng: random.Random) -> str:
    """Two to six lines, 25 to 80 times."""
    stop = "。" if lang == "zh" else "."
    lines = [_draw(text, lang, rng, 12, 30) + stop for _ in range(rng.randint(2, 6))]
    return "\n".join(rng.choice(lines) for _ in range(rng.randint(25, 80)))


def repeated_phrases(text: str, lang: str, rng: random.Random) -> str:
    """One paragraph of which three quarters are the same phrase."""
    space, stop = ("", "，") if lang == "zh" else (" ", ", ")
    phrase = _draw(text, lang, rng, 6, 12)
    parts = [
        phrase if rng.random() < 0.75 else _draw(text, lang, rng, 2, 6)
        for _ in range(rng.randint(30, 90))
    ]
    return (space + stop).join(parts).replace(" ,", ",")


def repeated_characters(text: str, lang: str, rng: random.Random) -> str:
    """Words drawn out: 哈哈哈哈哈哈, soooooooo."""
    out = []
    for word in words_of(text, lang)[: rng.randint(60, 200)]:
        place = rng.randrange(len(word))
        if rng.random() < 0.5:
            word = word[:place] + word[place] * rng.randint(6, 40) + word[place:]
        out.append(word)
    return ("" if lang == "zh" else " ").join(out)


def navigation(text: str, lang: str, rng: random.Random) -> str:
    """Menus, cookie notices, record numbers and teasers of a web page without its text."""
    lines = []
    for _ in range(rng.randint(15, 40)):
        if rng.random() < 0.45:
            items = rng.sample(MENU[lang].split(","), rng.randint(1, 8))
            lines.append(rng.choice([" | ", " ", " > ", " · "]).join(items))
        else:
            notice = rng.choice(NOTICES[lang])
            word = lambda _: _draw(text, lang, rng, *((2, 8) if lang == "zh" else (1, 5)))
            notice = re.sub(r"\{w\}", word, notice)
            number, year = rng.randint(10**5, 10**8), rng.randint(1998, 2026)
            lines.append(notice.format(n=number, y=year, d=rng.randint(1, 28)))
    return "\n".join(lines)


def keywords(text: str, lang: str, rng: random.Random) -> str:
    """A list of search terms without a sentence."""
    if lang == "zh":
        terms = [_draw(text, lang, rng, 2, 4) for _ in range(rng.randint(80, 250))]
    else:
        long = sorted({word.lower() for word in words_of(text, lang) if len(word) > 4})
        terms = [
            " ".join(rng.choices(long, k=rng.randint(1, 2))) for _ in range(rng.randint(80, 250))
        ]
    return rng.choice([" ", ", " if lang == "en" else "、", " | "]).join(terms)


def markup(text: str, lang: str, rng: random.Random) -> str:
    """What a careless extraction leaves of HTML, CSS and JavaScript."""
    lines = []
    for _ in range(rng.randint(15, 50)):
        name, value, kind = f"c{rng.randint(1, 9999):x}", rng.randint(1, 900), rng.randrange(3)
        if kind == 0:
            tag, style = rng.choice(TAGS), f"{rng.choice(STYLES)}:{value}px"
            inner = _draw(text, lang, rng, 0, 3)
            lines.append(f'<{tag} class="{name}" style="{style}">{inner}</{tag}>')
        elif kind == 1:
            tag, one, two = rng.choice(TAGS), rng.choice(STYLES), rng.choice(STYLES)
            lines.append(f".{name} > {tag} {{ {one}: {value}px; {two}: {value % 7}em; }}")
        else:
            found = f'var {name} = document.getElementById("{name}_{value}");'
            lines.append(f'{found} if ({name}) {{ {name}.style.display = "none"; }}')
    return "\n".join(lines)


def encoded(text: str, lang: str, rng: random.Random) -> str:
    """Base64 or hexadecimal lines with a caption."""
    content = rng.randbytes(rng.randint(300, 1500))
    body = base64.b64encode(content).decode() if rng.random() < 0.5 else content.hex()
    width = rng.choice([60, 64, 76])
    caption = _draw(text, lang, rng, 1, 4)
    return "\n".join([caption, *(body[i : i + width] for i in range(0, len(body), width))])


def shuffled(text: str, lang: str, rng: random.Random) -> str:
    """The words and Han characters of a clean text in random order, punctuation where it was."""
    text = text[:2000]
    pattern = r"[\u3400-\u9fff]|[A-Za-z']+"
    words = re.findall(pattern, text)
    rng.shuffle(words)
    rest = iter(words)
    return re.sub(pattern, lambda _: next(rest), text)


ALL = (
    *(mojibake, control, symbols, digits, repeated_lines, repeated_phrases, repeated_characters),
    *(navigation, keywords, markup, encoded, shuffled),
)
KINDS: dict[str, Callable[[str, str, random.Random], str]] = {make.__name__: make for make in ALL}
