"""Reads a YAML file into plain values and remembers the line each one came from; writes sections with their descriptions.

Knows YAML, `base:` files and command-line overrides. Knows nothing of what the keys mean.

A place is a path of keys and list indices: `stages.0.steps` is ("stages", 0, "steps").
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from vlm.errors import UsageError

Place = tuple[str | int, ...]
COMMAND_LINE = "command line"


class Section(BaseModel):
    """Keys that belong together; an unknown one or a wrong type is refused. A field's description documents it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    def is_changed(self, name: str) -> bool:
        """Whether a value is not the default; whether it was written tells nothing, for OUT/config.yaml writes them all."""
        return getattr(self, name) != type(self).model_fields[name].default


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with `1e-3` read as a number: YAML 1.1 wants a dot and a sign, and nobody writes them."""


_Loader.yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass
class Settings:
    """Plain values, and for each place the file and line, or the command line, that set it."""

    values: dict[str, Any] = field(default_factory=dict)
    marks: dict[Place, str] = field(default_factory=dict)

    def where(self, place: Place) -> str:
        """The mark of `place`, or of the nearest enclosing place that has one."""
        for length in range(len(place), 0, -1):
            if place[:length] in self.marks:
                return self.marks[place[:length]]
        return self.marks.get((), "config")


def read_settings(path: Path, overrides: list[str], shorthands: dict[str, str]) -> Settings:
    """Read `path` on top of the files its `base:` keys name, then apply `key.sub=value` overrides.

    shorthands: first keys of overrides that stand for longer ones, e.g. {"vision": "model.vision"}.
    """
    settings = _read_with_base(path, ())
    for override in overrides:
        _apply(settings, override, shorthands)
    return settings


def name_of(place: Place) -> str:
    """A place as a person writes it: stages.0.steps."""
    return ".".join(map(str, place))


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _not_yaml(source: str, error: yaml.YAMLError) -> UsageError:
    mark = getattr(error, "problem_mark", None)
    line = f" line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return UsageError(f"{source}{line}: not valid YAML: {problem}")


def _read_with_base(path: Path, above: tuple[Path, ...]) -> Settings:
    settings = _read_file(path)
    if "base" not in settings.values:
        return settings
    base = settings.values.pop("base")
    where = settings.marks.pop(("base",))
    if not isinstance(base, str):
        raise UsageError(f"{where}: base is {base!r}; it must be the name of a YAML file beside this one")
    below = path.parent / base
    if not below.is_file():
        raise UsageError(f"{where}: base {base} does not exist in {path.parent}")
    if below.resolve() in (*above, path.resolve()):
        raise UsageError(f"{where}: base {base} builds on this file, and this file on it; remove one of the two")
    merged = _read_with_base(below, (*above, path.resolve()))
    _merge(merged, settings, merged.values, settings.values, ())
    merged.marks[()] = settings.marks[()]
    return merged


def _read_file(path: Path) -> Settings:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"config {path} cannot be read: {reason}") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Settings({}, {(): str(path)})
        marks: dict[Place, str] = {}
        _mark(node, (), str(path), marks)
        values = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise _not_yaml(str(path), error) from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds a {type(values).__name__}; a config is a mapping of keys to values")
    return Settings(values, {**marks, (): str(path)})


def _mark(node: yaml.Node, place: Place, source: str, marks: dict[Place, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, key.value)
            here = f"{source} line {key.start_mark.line + 1}"
            if inner in marks:
                raise UsageError(f"{here}: {name_of(inner)} is set twice, first at {marks[inner]}; keep one")
            marks[inner] = here
            _mark(value, inner, source, marks)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            marks[(*place, index)] = f"{source} line {item.start_mark.line + 1}"
            _mark(item, (*place, index), source, marks)


def _merge(below: Settings, above: Settings, into: dict[str, Any], values: dict[str, Any], place: Place) -> None:
    """Mappings are merged key by key; anything else, lists included, is replaced whole."""
    for key, value in values.items():
        inner = (*place, key)
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            below.marks[inner] = above.marks.get(inner, above.where(inner))
            _merge(below, above, into[key], value, inner)
        else:
            _forget(below, inner)
            below.marks.update({at: mark for at, mark in above.marks.items() if at[: len(inner)] == inner})
            into[key] = value


def _forget(settings: Settings, place: Place) -> None:
    for at in [at for at in settings.marks if at[: len(place)] == place]:
        del settings.marks[at]


def _apply(settings: Settings, override: str, shorthands: dict[str, str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"{override!r} is no setting; write key=value, e.g. stages.0.steps=10")
    first, dot, rest = key.partition(".")
    parts = (shorthands.get(first, first) + dot + rest).split(".")
    value = _plain_value(text)
    target: Any = settings.values
    place: Place = ()
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        step: str | int = part
        if isinstance(target, list):
            step = _index(target, part, place)
        elif not isinstance(target, dict):
            at = name_of(place)
            raise UsageError(f"{override}: {at} is {target!r}, not a mapping; set it whole: {at}=…")
        place = (*place, step)
        if last:
            target[step] = value
        else:
            if isinstance(target, dict) and target.get(part) is None:
                target[part] = {}
            target = target[step]
    _forget(settings, place)
    settings.marks[place] = COMMAND_LINE


def _index(items: list[Any], part: str, place: Place) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UsageError(
            f"{name_of(place)} is a list of {len(items)}; {part!r} is no index into it, use 0 to {len(items) - 1}"
        )
    return int(part)


def _plain_value(text: str) -> Any:
    """YAML where the text is YAML; else the text itself: `{00000..00012}.tar` is a name, not a mapping."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


# Documentation


def annotated_yaml(section: BaseModel) -> str:
    """A section as YAML that reads back equal, each field with its description, the first time it occurs."""
    return "\n".join(_lines(section, "", set())) + "\n"


def _lines(section: BaseModel, indent: str, told: set[tuple[type, str]]) -> list[str]:
    lines = []
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        help_line = "" if (type(section), name) in told else f"# {info.description}"
        told.add((type(section), name))
        if isinstance(value, BaseModel):
            lines += [_beside(f"{indent}{name}:", help_line), *_lines(value, indent + "  ", told)]
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            lines.append(_beside(f"{indent}{name}:", help_line))
            for item in value:
                first, *rest = _lines(item, indent + "    ", told)
                lines += [f"{indent}  - {first.strip()}", *rest]
        else:
            lines.append(_beside(f"{indent}{name}: {flow(value)}", help_line))
    return lines


def _beside(line: str, help_line: str) -> str:
    return f"{line:<40} {help_line}".rstrip()
