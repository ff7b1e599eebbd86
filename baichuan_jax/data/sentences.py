"""Sentences: where they are, which occur again, and documents without them."""


def cut(text: str, spans: list[tuple[int, int]]) -> str:
    """A text without its characters [start, stop) of each span."""
    for start, stop in sorted(spans, reverse=True):
        text = text[:start] + text[stop:]
    return text
