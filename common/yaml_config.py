"""Reading a YAML file that a person wrote, and saying what is wrong with it: file, path, and what is allowed there.

Belongs here: what every such file shares. Does not: what a file may say (the models of ``delivery.connectors.rest_spec`` and
``pipeline.workflow``).
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ValidationError


class OnceLoader(yaml.SafeLoader):
    """YAML in which no key stands twice: the later one would silently win."""


def _once(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


OnceLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _once)


def read(file: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises OSError, and ValueError naming the file where it holds no such thing."""
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), Loader=OnceLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: is not YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: must hold keys and values, found {type(found).__name__}")
    return found


def explain(file: Path, error: ValidationError, model: type[BaseModel], hidden: Collection[str] = ()) -> str:
    """A line for each thing that ``model`` refuses. ``hidden``: fields that are not written in the file."""
    lines = []
    for problem in error.errors():
        location = problem["loc"]
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] in ("extra_forbidden", "missing"):
            allowed = sorted(set(_allowed_at(model, location[:-1])) - set(hidden))
            if problem["type"] == "extra_forbidden":
                near = difflib.get_close_matches(str(location[-1]), allowed, 1)
                text = "unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
            else:
                text = "is required"
            if allowed:
                text += f" (allowed here: {', '.join(allowed)})"
        elif problem["type"] != "value_error":
            text += f", found {str(problem['input'])[:80]!r}"
            if problem["type"] == "string_type":
                text += "; put it in quotes"
        lines.append(f"{file}: {'.'.join(str(p) for p in location) or 'as a whole'}: {text}")
    return "\n".join(lines)


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (Annotated, tuple, list, dict, Mapping, typing.Union, types.UnionType):
        return [m for part in typing.get_args(annotation) for m in models_of(part)]
    return []


def _allowed_at(root: type[BaseModel], path: Sequence[str | int]) -> set[str]:
    """The keys that may stand at a path of a validation error."""
    current: list[type[BaseModel]] = [root]
    inside_a_mapping = False
    for part in path:
        if isinstance(part, int):
            continue
        if inside_a_mapping:  # the part is a key that the file's author chose
            inside_a_mapping = False
            continue
        tagged = [
            m for m in current if part in typing.get_args(getattr(m.model_fields.get("kind"), "annotation", None))
        ]
        if tagged:
            current = tagged
            continue
        fields = [m.model_fields[part].annotation for m in current if part in m.model_fields]
        inside_a_mapping = any(typing.get_origin(f) in (dict, Mapping) for f in fields)
        current = [found for f in fields for found in models_of(f)]
    return {name for model in current for name in model.model_fields}
