"""Turns a pydantic fault into one line: file and line, key, what is wrong, the mend.

Knows pydantic's error records and the sections' fields. Knows nothing of what a field does.
"""

from __future__ import annotations

import difflib
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from vlm.settings import Place, Settings, flow, name_of

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
}


def explain(error: ValidationError, settings: Settings, root: type[BaseModel]) -> str:
    """The first fault as one line: file and line, key, what is wrong, the mend."""
    faults = error.errors()
    first = faults[0]
    place: Place = tuple(part for part in first["loc"] if not str(part).startswith("<"))
    name = name_of(place)
    if first["type"] == "extra_forbidden":
        text = f"{name} is not a known key; {_suggestion(place, root)}"
    elif first["type"] == "missing":
        place = _first_required(place, root)
        text = f"{name_of(place)} is missing; add {name_of(place)}=…: {_description(place, root)}"
    elif first["type"] == "value_error":
        text = (f"{name}: " if place else "") + first["msg"].removeprefix("Value error, ")
    else:
        wanted = f"it should be {EXPECTED[first['type']]}" if first["type"] in EXPECTED else first["msg"]
        text = f"{name} is {flow(first['input'])[:60]}; {wanted.replace('Input should', 'it should', 1)}"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{settings.where(place)}: {text}{more}"


def _first_required(place: Place, root: type[BaseModel]) -> Place:
    """A missing section stands for the first of its fields that has no default."""
    for section in _sections(place[:-1], root):
        field = section.model_fields[str(place[-1])].annotation
        if isinstance(field, type) and issubclass(field, BaseModel):
            return (*place, next(name for name, info in field.model_fields.items() if info.is_required()))
    return place


def _suggestion(place: Place, root: type[BaseModel]) -> str:
    known = [name for section in _sections(place[:-1], root) for name in section.model_fields]
    near = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"


def _description(place: Place, root: type[BaseModel]) -> str:
    for section in _sections(place[:-1], root):
        if place[-1] in section.model_fields:
            return str(section.model_fields[str(place[-1])].description)
    return ""


def _sections(place: Place, root: type[BaseModel]) -> list[type[BaseModel]]:
    """The section classes that may stand at `place`."""
    sections: list[type[BaseModel]] = [root]
    for part in place:
        if isinstance(part, str):
            fields = [section.model_fields[part] for section in sections if part in section.model_fields]
            sections = [found for field in fields for found in _sections_in(field.annotation)]
    return sections


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _sections_in(part)]
