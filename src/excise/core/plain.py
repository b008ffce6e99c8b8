"""Plain data from YAML and JSON that nobody vouches for: the one way in.

Mappings, lists, text, numbers, true and false and nothing else: a date stays the text that was
written. What YAML allows and no configuration needs is refused: a key given twice, of which one
would be lost, an alias inside what it stands for, nesting and repetition without end, tags.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import yaml
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, ScalarNode

from excise.core.disk import check_regular
from excise.core.errors import UserError

DEPTH: Final = 100
"""Levels of nesting at most."""

NODES: Final = 50_000
"""Keys and values at most, each alias counted as what it stands for."""

_DIGITS: Final = 400
"""Digits of a number at most; the largest float has 309."""

_PLAIN: Final = frozenset({"null", "bool", "int", "float", "str", "seq", "map", "merge"})
_TAG: Final = "tag:yaml.org,2002:"


class NotPlain(UserError):
    """A text that is not read here, without its file: `line 3: why`, `is not valid JSON (why)`."""


def _refuse(node: Any, why: str) -> NotPlain:
    return NotPlain(f"line {node.start_mark.line + 1}: {why}")


class _Loader(yaml.SafeLoader):
    """The safe loader of PyYAML without what it can be abused by."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.nodes = 0
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Count what is read; an alias counts as often as it is used."""
        event = self.peek_event()
        if isinstance(event, AliasEvent) and event.anchor in self.anchors:
            if id(self.anchors[event.anchor]) not in self.sizes:
                raise _refuse(event, f"'*{event.anchor}' stands inside what it stands for")
        elif self.depth == DEPTH:
            raise _refuse(event, f"nests deeper than {DEPTH} levels")
        before = self.nodes
        self.depth += 1
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        self.nodes += self.sizes.get(id(node), 1)
        self.sizes.setdefault(id(node), self.nodes - before)
        if self.nodes > NODES:
            raise _refuse(event, f"holds more than {NODES:,} keys and values, aliases written out")
        if node.tag.removeprefix(_TAG) not in _PLAIN:
            raise _refuse(
                node, f"the tag '{node.tag.replace(_TAG, '!!')}' is not read; leave it out"
            )
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Refuse a key that is given twice, of which one value would be lost."""
        node: MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, ScalarNode) else id(key)
            if name in seen:
                raise _refuse(key, f"the key '{key.value}' is given twice; keep one")
            seen.add(name)
        return node

    def construct_scalar(self, node: Any) -> Any:
        """Refuse text that no file can hold."""
        value = super().construct_scalar(node)
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise _refuse(node, "half a character (a lone surrogate); write it whole") from None
        return value

    def construct_yaml_int(self, node: Any) -> Any:
        """Take `1:30` as text, which YAML 1.1 reads as 90, and refuse numbers without end."""
        text = str(self.construct_scalar(node))
        if len(text) > _DIGITS:
            raise _refuse(node, f"a number of {len(text):,} digits")
        return text if ":" in text else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> Any:
        """Take `1:30.5` as text, which YAML 1.1 reads as 90.5."""
        text = str(self.construct_scalar(node))
        return text if ":" in text else super().construct_yaml_float(node)


_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in entries if entry[0].removeprefix(_TAG) in _PLAIN]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_yaml_float)


def read_yaml(text: str) -> Any:
    """Return the plain data that a text holds.

    Args:
        text: YAML, or JSON.

    Raises:
        NotPlain: If it is not YAML, or more than plain data.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise NotPlain(f"{where}is not YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise NotPlain(
            f"line {line}: is not YAML: {error.reason} (character {error.character:#x})"
        ) from None
    except (ValueError, OverflowError) as error:
        raise NotPlain(str(error)) from None


def read_json(file: Path | bytes) -> Any:
    """Return the plain data of a JSON file, or of its bytes.

    Raises:
        FileNotFoundError: If there is no such file.
        NotPlain: If it cannot be read, or is not JSON in UTF-8; a key given twice is not.
    """
    try:
        if isinstance(file, Path):
            check_regular(file)
            file = file.read_bytes()
        return json.loads(file.decode("utf-8"), object_pairs_hook=_once)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise NotPlain(f"cannot be read ({(error.strerror or 'error').lower()})") from None
    except UnicodeDecodeError:
        raise NotPlain("is not valid JSON (no UTF-8)") from None
    except json.JSONDecodeError as error:
        raise NotPlain(f"is not valid JSON ({error})") from None
    except RecursionError:
        raise NotPlain("is not valid JSON (it nests too deeply)") from None
    except ValueError as error:
        raise NotPlain(f"is not valid JSON ({str(error).partition(';')[0]})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, whose keys are given once each."""
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key '{twice[:80]}' twice")
    return out
