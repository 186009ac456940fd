"""Text about configuration structs: `config` hands it a struct, it says what a key allows and prints commented samples.

Apart from `config`, so that starting a server does not pay for it.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec import inspect

WIDTH = 100


def allowed(struct: type[msgspec.Struct], key: str) -> str:
    """What `key` may hold, in words; its description stands behind it."""
    field = _fields(struct)[key]
    return f"{_type_text(field.type)}; {_metadata(field).get('description', '')}".rstrip("; ")


def document(title: str, sections: Mapping[str, type[msgspec.Struct]], given: Mapping[str, object]) -> str:
    """A TOML document of all sections; `given` maps "section.key" to a value that replaces the default."""
    parts = [_comment(title), *(_section_text(name, struct, given) for name, struct in sections.items())]
    return "\n\n".join(parts) + "\n"


def _section_text(name: str, struct: type[msgspec.Struct], given: Mapping[str, object]) -> str:
    keys = [_key_text(field, given.get(f"{name}.{key}")) for key, field in _fields(struct).items()]
    return "\n".join([_comment(struct.__doc__ or name), f"[{name}]", *keys])


def _key_text(field: inspect.Field, given: object) -> str:
    about = _metadata(field).get("description", "")
    return "\n".join([*([_comment(about)] if about else []), _assignment(field, given)])


def _assignment(field: inspect.Field, given: object) -> str:
    """`key = value`; commented out where absent means something and nothing else was asked for."""
    metadata = _metadata(field)
    value = next((v for v in (given, metadata.get("sample"), _default(field)) if v is not None), None)
    if value is not None:
        return f"{field.encode_name} = {toml_value(value)}"
    example = toml_value(next(iter(metadata.get("examples", [])), ""))
    return f"{field.encode_name} = {example}" if field.required else f"# {field.encode_name} = {example}"


def _default(field: inspect.Field) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return None if field.default is msgspec.NODEFAULT else field.default


def toml_value(value: object) -> str:
    """A string, number or truth, a list or a table of them as TOML; JSON writes all but tables in the same way."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {toml_value(item)}' for key, item in value.items())}}}"
    return json.dumps(value)


def _comment(text: str) -> str:
    flat = " ".join(text.split())
    return textwrap.fill(flat, WIDTH, initial_indent="# ", subsequent_indent="# ")


def _fields(struct: type[msgspec.Struct]) -> dict[str, inspect.Field]:
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)  # ours, not a user's
    return {field.encode_name: field for field in info.fields}


def _metadata(field: inspect.Field) -> dict[str, Any]:
    """description, examples and our own extras of a field."""
    if not isinstance(field.type, inspect.Metadata):
        return {}
    return {**(field.type.extra_json_schema or {}), **(field.type.extra or {})}


def _type_text(kind: inspect.Type) -> str:
    describe = _TYPE_TEXTS.get(type(kind))
    return describe(kind) if describe else type(kind).__name__


def _int_text(kind: Any) -> str:
    if kind.ge is not None and kind.le is not None:
        return f"a number from {kind.ge} to {kind.le}"
    return "a number"


def _str_text(kind: Any) -> str:
    return f"a string that matches {kind.pattern}" if kind.pattern else "a string"


def _union_text(kind: Any) -> str:
    return " or ".join(_parts(kind))


def _parts(kind: Any) -> Iterator[str]:
    return (_type_text(part) for part in kind.types if not isinstance(part, inspect.NoneType))


_TYPE_TEXTS: dict[type[inspect.Type], Callable[[Any], str]] = {
    inspect.Metadata: lambda kind: _type_text(kind.type),
    inspect.IntType: _int_text,
    inspect.StrType: _str_text,
    inspect.BoolType: lambda kind: "true or false",
    inspect.LiteralType: lambda kind: " or ".join(json.dumps(value) for value in kind.values),
    inspect.FloatType: _int_text,
    inspect.StructType: lambda kind: f"a table with {', '.join(field.encode_name for field in kind.fields)}",
    inspect.UnionType: _union_text,
    inspect.ListType: lambda kind: f"a list of: {_type_text(kind.item_type)}",
}
