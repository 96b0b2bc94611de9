"""Every setting of a recipe: its key, type, default and meaning, read from the classes in ``nd_dist.config``.

Also finds the key, command or recipe that a mistyped word stands for. Reads no file.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nd_dist.config import Config
from nd_dist.config.base import Section

Schema = Mapping[str, Any]  # Any: JSON schema
_SHORT_NAMES = {"integer": "int", "number": "float", "boolean": "bool", "string": "str", "object": "mapping"}
_CALLED_ELSEWHERE = {
    "batch_size": "training.samples_per_subject",
    "epochs": "training.steps",
    "gpus": "launch.ranks",
    "guidance_scale": "sampler.cfg_scale",
    "lr": "training.learning_rate",
    "max_steps": "training.steps",
    "num_inference_steps": "sampler.num_steps",
    "precision": "training.dtype",
    "subject": "training.target_subject",
    "world_size": "launch.ranks",
}
"""What other programs call a setting."""


@dataclass(frozen=True)
class Setting:
    """One setting.

    Args:
        key: Dotted, as on the command line.
        kind: Its type and range.
        default: As it is written in a recipe.
        meaning: What it does, with its unit.
    """

    key: str
    kind: str
    default: str
    meaning: str


def settings_of(model: type[Section] = Config) -> Iterator[Setting]:
    """Yield every setting of a configuration, in the order of its classes."""
    schema = model.model_json_schema()
    yield from _settings(schema, schema.get("$defs", {}), model().model_dump(mode="json"), "")


def _settings(section: Schema, sections: Schema, defaults: Mapping[str, Any], prefix: str) -> Iterator[Setting]:
    """Yield the settings of one section and of those inside it."""
    for name, field in section["properties"].items():
        if "$ref" in field:
            inner = sections[field["$ref"].rpartition("/")[2]]
            yield from _settings(inner, sections, defaults[name], f"{prefix}{name}.")
        else:
            default, meaning = defaults[name], " ".join(field.get("description", "").split())
            is_word = isinstance(default, str) and default != ""
            yield Setting(prefix + name, _kind(field), default if is_word else json.dumps(default), meaning)


def _kind(schema: Schema) -> str:
    """Return a JSON schema's type in a few words, such as ``int >= 1`` or ``list[1 | 2]``."""
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    if "prefixItems" in schema:
        return f"[{', '.join(map(_kind, schema['prefixItems']))}]"
    if "items" in schema:
        return f"list[{_kind(schema['items'])}]"
    kind = str(schema.get("type", "any"))
    name = str(schema.get("format") or _SHORT_NAMES.get(kind, kind))
    if "minimum" in schema and "maximum" in schema:
        return f"{name} {schema['minimum']:g} to {schema['maximum']:g}"
    signs = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    bounds = [f"{sign} {schema[bound]:g}" for bound, sign in signs if bound in schema]
    return " ".join([name, " and ".join(bounds)]).strip()


def all_keys(model: type[Section] = Config) -> list[str]:
    """Return every settable key in dotted form, sections included."""
    keys = [setting.key for setting in settings_of(model)]
    sections = [key.rpartition(".")[0] for key in keys if "." in key]
    return list(dict.fromkeys([*sections, *keys]))


def nearest_keys(key: str, model: type[Section] = Config) -> list[str]:
    """Return up to three valid keys that may be meant: other programs' word, same last word, similar spelling."""
    keys = all_keys(model)
    section, _, last = key.rpartition(".")
    elsewhere = _CALLED_ELSEWHERE.get(last, "")
    known_by = [elsewhere] if elsewhere in keys and elsewhere.startswith(section) else []
    same_word = [known for known in keys if known.rpartition(".")[2] == last]
    words = {known.rpartition(".")[2]: known for known in keys}
    similar_words = [words[word] for word in difflib.get_close_matches(last, words, n=2, cutoff=0.7)]
    similar = difflib.get_close_matches(key, keys, n=2, cutoff=0.7)
    return list(dict.fromkeys([*known_by, *same_word, *similar, *similar_words]))[:3]


def called_elsewhere(word: str) -> set[str]:
    """Return the keys of settings for which other programs use a name with this word in it."""
    return {key for name, key in _CALLED_ELSEWHERE.items() if word in name}


def did_you_mean(near: Iterable[str]) -> str:
    """Return the question whether one of some words was meant; empty if there are none."""
    words = " or ".join(near)
    return f"did you mean {words}?" if words else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the question whether a known word was meant that looks like ``word``; empty if none does."""
    return did_you_mean(difflib.get_close_matches(word, list(known), n=2, cutoff=0.6))
