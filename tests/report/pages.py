"""Reads a page the way a screen reader would, with the standard library's parser."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "wbr", "link", "br", "img", "input", "hr"}


@dataclass
class Node:
    """One element."""

    tag: str
    attrs: dict[str, str] = field(default_factory=dict)
    children: list[Node] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    parent: Node | None = None

    def all(self, *tags: str) -> list[Node]:
        """Return every element below with one of these names, in order."""
        found = [self] if self.tag in tags else []
        for child in self.children:
            found += child.all(*tags)
        return found

    def walk(self) -> list[Node]:
        """Return every element below and this one."""
        return [self, *(n for c in self.children for n in c.walk())]

    def text(self, without: tuple[str, ...] = ()) -> str:
        """Return the words below, separated by spaces."""
        parts = []
        children = iter(self.children)
        for piece in self.texts:
            if piece == "\0":
                child = next(children)
                parts.append("" if child.tag in without else child.text(without))
            else:
                parts.append(piece)
        return " ".join(" ".join(parts).split())


class Reader(HTMLParser):
    """Builds a tree and refuses one that does not nest."""

    def __init__(self) -> None:
        """Start with an empty document."""
        super().__init__(convert_charrefs=True)
        self.root = Node("#document")
        self.stack = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element."""
        node = Node(tag, {k: v or "" for k, v in attrs}, parent=self.stack[-1])
        assert len(node.attrs) == len(attrs), f"attribute given twice on {tag}"
        self.stack[-1].children.append(node)
        self.stack[-1].texts.append("\0")
        if tag not in VOID:
            self.stack.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take an element that closes itself."""
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close an element."""
        assert self.stack[-1].tag == tag, f"</{tag}> closes <{self.stack[-1].tag}>"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        """Keep text."""
        self.stack[-1].texts.append(data.replace("\0", ""))


def read(html: str) -> Node:
    """Return the tree of a page."""
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.stack == [reader.root], "elements were left open"
    return reader.root
