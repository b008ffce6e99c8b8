"""Configuration: frozen, strict, documented under each field, every problem reported at once.

This module imports no torch, so that `--help`, `ls` and `check` stay fast.
"""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError, core_schema

from excise.core.code_files import rebuild, where
from excise.core.errors import UserError, nearest

SIGNED: Final = "signed"
"""Marks a number that may be negative: `Annotated[float, SIGNED]`."""

SHOWN: Final = 20
"""Problems of one configuration that are told at most."""

LARGEST: Final = 2**63 - 1
"""The largest whole number that a field takes unless it says another."""


class Config(BaseModel):
    """A set of choices. Frozen; unknown fields are errors; help is the docstring under a field.

    Numbers are finite, whole ones fit into 64 bits, and true or false is none. A number is not
    negative unless its field says so: by bounds, by a negative default, or by `SIGNED`.

    Attributes:
        kind: On the base of an open family (`method`, `attack`, `domain`), its name: a field
            annotated with that base holds any member, chosen by the value of `name`.
    """

    kind: ClassVar[str] = ""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Bound every number of the class's own fields."""
        schema = handler(source)
        own: Any = schema
        while own["type"] != "model-fields":
            own = own["schema"]
        for name, field in own["fields"].items():
            info = cls.model_fields[name]
            default = info.default if isinstance(info.default, tuple | list) else [info.default]
            signed = SIGNED in _marks(info) or any(
                isinstance(value, int | float) and value < 0 for value in default
            )
            field["schema"] = _bounded(field["schema"], signed)
        return schema

    @classmethod
    def filled_in(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return plain data with what a choice in it sets elsewhere, where that was not given.

        Read before the defaults of nested configurations are filled in, which would hide what was
        not given.

        Args:
            data: Mapping of fields, as written.
        """
        return data

    def canonical(self) -> str:
        """Return the configuration as JSON with sorted keys: equal choices give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Travel to worker processes; a class from a user's file is loaded again there."""
        if type(self).__module__.startswith("excise_user_"):
            return rebuild, (where(type(self)), self.model_dump())
        return super().__reduce_ex__(protocol)

    def digest(self) -> str:
        """Return the SHA-256 of `canonical()` as hex."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


def configs_in(value: Any) -> Iterator[tuple[str, Config]]:
    """Yield the configurations in a field, by what stands behind the field in their path."""
    items: list[tuple[str, Any]] = [("", value)]
    if isinstance(value, Mapping):
        items = [(f".{key}", one) for key, one in value.items()]
    elif isinstance(value, tuple):
        items = [(f"[{i}]", one) for i, one in enumerate(value)]
    yield from ((key, one) for key, one in items if isinstance(one, Config))


def _marks(field: FieldInfo) -> set[Any]:
    """Return the marks of a field and of what its annotation is made of."""

    def inside(annotation: Any) -> Iterator[Any]:
        yield from (m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, str))
        for part in get_args(annotation):
            yield from inside(part)

    return {*(m for m in field.metadata if isinstance(m, str)), *inside(field.annotation)}


def _bounded(schema: Any, signed: bool) -> Any:
    """Return the schema of a field with bounds on every number in it that has none.

    Nested configurations have bounded theirs themselves.
    """
    if isinstance(schema, list):
        return [_bounded(part, signed) for part in schema]
    if not isinstance(schema, dict) or schema.get("type") in ("model", "literal", "is-instance"):
        return schema
    if schema.get("type") == "union":
        choices = [part[0] if isinstance(part, tuple) else part for part in schema["choices"]]
        labelled = [(_bounded(part, signed), f"{_OPTION}{i}") for i, part in enumerate(choices)]
        return {**schema, "choices": labelled}
    if schema.get("type") not in ("int", "float"):
        return {key: _bounded(part, signed) for key, part in schema.items()}
    bounds: dict[str, Any] = {}
    if not {"ge", "gt"} & schema.keys() and not signed:
        bounds["ge"] = 0
    if schema["type"] == "int" and not {"le", "lt"} & schema.keys():
        bounds["le"] = LARGEST
    return core_schema.no_info_before_validator_function(_no_truth, {**schema, **bounds})


def _no_truth(value: Any) -> Any:
    """Refuse true and false where a number belongs."""
    if isinstance(value, bool):
        raise PydanticCustomError("truth", "needs a number")
    return value


class ConfigError(UserError):
    """Everything that is wrong with a configuration, one problem a line.

    Attributes:
        problems: Each as `path: what is wrong; what to do`.
    """

    def __init__(self, problems: Sequence[str], source: str = "") -> None:
        self.problems = tuple(problems)
        head = f"{source}: " if source else ""
        if len(self.problems) == 1:
            super().__init__(head + self.problems[0])
        else:
            lines = "".join(f"\n  {p}" for p in self.problems[:SHOWN])
            more = len(self.problems) - SHOWN
            lines += f"\n  and {more:,} more" if more > 0 else ""
            super().__init__(f"{head}{len(self.problems)} problems{lines}")


Registry = Mapping[str, Mapping[str, type[Config]]]
"""Family -> name -> class."""

C = TypeVar("C", bound=Config)


def parse(cls: type[C], data: Any, registry: Registry, *, source: str = "") -> C:
    """Build a configuration from plain data (YAML, JSON, the command line).

    Args:
        cls: What to build; for an open family, its base.
        data: Mapping of fields.
        registry: Members of every open family.
        source: File or command named in the error.

    Returns:
        The configuration.

    Raises:
        ConfigError: With every problem found, its path and the nearest right name.
    """
    problems: list[str] = []
    built = _build(cls, data, registry, "", problems)
    if problems:
        raise ConfigError(problems, source)
    assert isinstance(built, cls)
    return built


def _build(cls: type[Config], data: Any, registry: Registry, at: str, problems: list[str]) -> Any:
    """Build `cls` from `data`, noting problems; returns None where there were some."""
    if isinstance(data, cls):
        return data
    if not isinstance(data, Mapping):
        problems.append(f"{at or 'configuration'}: needs a mapping of fields, not {_shown(data)}")
        return None
    member = _member(cls, data, registry, at, problems)
    if member is None:
        return None
    prepared: dict[str, Any] = {}
    before = len(problems)
    for key, value in member.filled_in(data).items():
        field = member.model_fields.get(str(key))
        here = f"{at}.{key}" if at else str(key)
        if field is not None:
            value = _completed(field.default, value)
            value = _value(field.annotation, value, registry, here, problems)
        prepared[str(key)] = value
    broken = {k for k in prepared if any(_under(p, at, k) for p in problems[before:])}
    # What is broken is said already; in its place comes what no field takes.
    prepared.update(dict.fromkeys(broken, _BROKEN))
    try:
        return member.model_validate(prepared)
    except ValidationError as error:
        details = _meant(error.errors())
        inside = {detail["loc"][:-1] for detail in details}
        for detail in details:
            # A list whose entries are wrong is not too short as well.
            echo = detail["type"] == "too_short" and detail["loc"] in inside
            if not echo and not (detail["loc"] and str(detail["loc"][0]) in broken):
                problems.append(_sentence(detail, member, at))
        return None


def _completed(default: Any, value: Any) -> Any:
    """Return a mapping with what its field's default sets and it does not mention.

    `fit: {lr: 1e-4}` changes the learning rate of the method's own schedule and nothing else. A
    mapping that names another member than the default stands for itself.
    """
    if not isinstance(default, Config) or not isinstance(value, Mapping):
        return value
    defaults = {name: getattr(default, name) for name in default.model_fields_set}
    if "name" in type(default).model_fields:
        defaults["name"] = getattr(default, "name", None)
        if value.get("name", defaults["name"]) != defaults["name"]:
            return value
    given = {key: _completed(defaults.get(key), inner) for key, inner in value.items()}
    return {**defaults, **given}


def _under(problem: str, at: str, key: str) -> bool:
    """Whether a problem's path starts at field `key` of the configuration at `at`."""
    path = problem.split(":", 1)[0]
    start = f"{at}.{key}" if at else key
    return path == start or path.startswith((start + ".", start + "["))


def _member(
    cls: type[Config], data: Mapping[str, Any], registry: Registry, at: str, problems: list[str]
) -> type[Config] | None:
    """Return the class that `data` names when `cls` is the base of an open family."""
    if "kind" not in cls.__dict__ or not cls.kind:
        return cls
    known = registry.get(cls.kind, {})
    name = data.get("name")
    where = f"{at}.name" if at else "name"
    if not isinstance(name, str):
        problems.append(f"{where}: names no {cls.kind}; {nearest('', known)}")
        return None
    if name not in known:
        problems.append(f"{where}: unknown {cls.kind} '{name}'; {nearest(name, known)}")
        return None
    return known[name]


def _value(annotation: Any, value: Any, registry: Registry, at: str, problems: list[str]) -> Any:
    """Prepare one field: open families and nested configurations become instances."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _value(get_args(annotation)[0], value, registry, at, problems)
    if origin in (Union, types.UnionType):
        options = [a for a in get_args(annotation) if a is not type(None)]
        if value is None:
            return value
        if len(options) != 1:
            return _choice(options, value, registry, at, problems)
        return _value(options[0], value, registry, at, problems)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        inner = get_args(annotation)[1]
        return {k: _value(inner, v, registry, f"{at}.{k}", problems) for k, v in value.items()}
    if origin in (tuple, list) and isinstance(value, list | tuple):
        inner = get_args(annotation)[0]
        return tuple(
            _value(inner, v, registry, f"{at}[{i}]", problems) for i, v in enumerate(value)
        )
    if isinstance(annotation, type) and issubclass(annotation, Config) and value is not None:
        built = _build(annotation, value, registry, at, problems)
        return value if built is None else built
    return value


def _choice(
    options: Sequence[Any], value: Any, registry: Registry, at: str, problems: list[str]
) -> Any:
    """Prepare a field that holds one of several configurations, chosen by the value of `name`."""
    members: dict[str, type[Config]] = {}
    for option in options:
        if (
            isinstance(option, type)
            and issubclass(option, Config)
            and "name" in option.model_fields
        ):
            members[option.model_fields["name"].default] = option
    if len(members) != len(options) or not isinstance(value, Mapping):
        return value
    name = value.get("name")
    if name not in members:
        wrong = f"unknown choice '{name}'" if isinstance(name, str) else "is required"
        problems.append(f"{at}.name: {wrong}; {nearest(str(name or ''), members)}")
        return value
    built = _build(members[name], value, registry, at, problems)
    return value if built is None else built


_OPTION = "\0"
"""What the label of a union's alternative begins with, in the path of an error."""


def _meant(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Return errors without those of alternatives that the value was not meant as.

    Of the alternatives of a union the one counts whose error lies deepest, or else says more than
    that the type is another; where all say that, their errors become one.
    """

    def place(detail: ErrorDetails) -> tuple[int | str, ...]:
        return tuple(p for p in detail["loc"] if not str(p).startswith(_OPTION))

    out: dict[tuple[int | str, ...], list[ErrorDetails]] = {}
    for detail in details:
        union = next((i for i, p in enumerate(detail["loc"]) if str(p).startswith(_OPTION)), None)
        out.setdefault(detail["loc"][:union], []).append(detail)
    meant: list[ErrorDetails] = []
    for alike in out.values():
        if all(place(detail) == detail["loc"] for detail in alike):
            meant += alike
            continue
        deepest = max(len(place(detail)) for detail in alike)
        deep = [detail for detail in alike if len(place(detail)) == deepest]
        first = next((d for d in deep if not d["type"].endswith(_OF_ANOTHER_TYPE)), deep[0])
        meant.append({**first, "loc": place(first)})
    return meant


_OF_ANOTHER_TYPE = ("_type", "_parsing", "_error", "truth", "_from_float")

_BROKEN = object()

_NEEDS = {
    "int_parsing": "needs a whole number",
    "int_type": "needs a whole number",
    "int_from_float": "needs a whole number",
    "int_parsing_size": "needs a whole number of 64 bits",
    "float_parsing": "needs a number",
    "float_type": "needs a number",
    "finite_number": "needs a finite number",
    "bool_parsing": "needs true or false",
    "bool_type": "needs true or false",
    "string_type": "needs text",
    "tuple_type": "needs a list",
    "list_type": "needs a list",
    "dict_type": "needs a mapping",
    "mapping_type": "needs a mapping",
    "model_type": "needs a mapping of fields",
    "greater_than_equal": "must be {ge:g} or more",
    "greater_than": "must be more than {gt:g}",
    "less_than_equal": "must be {le:g} or less",
    "less_than": "must be less than {lt:g}",
    "too_short": "needs {min_length} or more entries",
    "literal_error": "must be {expected}",
}
"""What a field needs, by pydantic's name of the error."""


def _sentence(detail: ErrorDetails, cls: type[Config], at: str) -> str:
    """Turn one of pydantic's errors into `path: what; what to do`."""
    path = at
    for part in detail["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    given = detail["input"]
    if detail["type"] == "extra_forbidden":
        name = str(detail["loc"][-1])
        return f"{path}: unknown field; {nearest(name, cls.model_fields)}"
    if detail["type"] == "missing":
        return f"{path}: is required"
    if detail["type"] == "value_error":  # of a validator here, which names the field itself
        message = detail["msg"].removeprefix("Value error, ")
        field = message.partition(":")[0]
        joint = "." if field.split(".")[0].split("[")[0] in cls.model_fields else ": "
        return f"{path}{joint}{message}" if path else message
    message = detail["msg"][:1].lower() + detail["msg"][1:]
    if detail["type"] in _NEEDS:
        message = _NEEDS[detail["type"]].format(**detail.get("ctx", {}))
    if isinstance(given, str | int | float | bool) or given is None:
        return f"{path}: {message}, not {_shown(given)}"
    return f"{path}: {message}"


def _shown(given: object) -> str:
    """Return a value as it was written, cut where it is long."""
    if isinstance(given, int) and abs(given) > LARGEST**2:
        return "a number of many digits"  # which Python refuses to write out
    text = repr(given)
    return text if len(text) <= 80 else f"{text[:77]}..."
