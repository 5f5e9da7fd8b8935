"""Error messages for invalid settings: what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from pydantic_core import ErrorDetails

from polyclinic.configs.schema.base import kebab

# Renamed keys. Files with an old key are refused with a message that names the new one.
RENAMED = {
    "rounds.set-aside-after": "rounds.suspend-after",
    "rounds.set-aside-rounds": "rounds.suspend-rounds",
    "policy.least-examples": "policy.min-examples",
    "policy.least-patients": "policy.min-patients",
    "policy.most-steps": "policy.max-steps",
    "policy.least-noise": "policy.min-noise-multiplier",
    "policy.most-update-mb": "policy.max-update-mb",
    "policy.most-update-norm": "policy.max-update-norm",
    "policy.least-support": "policy.min-support",
}
# Names that other libraries have for our keys.
ALIASES = {
    "train.lr": "train.learning-rate",
    "train.epochs": "train.local-epochs",
    "train.steps": "train.local-steps",
    "train.amp": "train.precision",
    "rounds.num-rounds": "rounds.count",
    "rounds.min-clients": "rounds.min-sites",
    "rounds.timeout": "rounds.deadline-s",
    "privacy.epsilon": "privacy.target-epsilon",
    "privacy.max-grad-norm": "privacy.clip-norm",
    "strategy.mu": "strategy.proximal-mu",
    "strategy.lr": "strategy.server-learning-rate",
    "model.encoder": "model.backbone",
    "data.path": "data.root",
    "data.folder": "data.root",
    "run.out": "run.output-dir",
    "run.folder": "run.output-dir",
}
CUTOFF = 0.75  # minimum similarity (difflib ratio, 0 to 1) at which a key counts as mistyped

_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
_KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "dict_type": "a section of keys",
    "path_type": "a path",
}
_NAME = "letters, digits, '.', '_' and '-', with a letter or digit first"


def unknown_key(key: str, known: Collection[str]) -> str:
    """Explain that a key is unknown, with its new name or the key that was probably meant.

    Args:
        key: the unknown key, dotted and in kebab-case.
        known: all keys of the schema.
    """
    if key in RENAMED:
        return f"{key} has been renamed: use {RENAMED[key]}"
    if ALIASES.get(key) in known:
        return f"{key}: unknown key; did you mean {ALIASES[key]}?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=CUTOFF)
    section = key.rpartition(".")[0]
    if near and (near[0].rpartition(".")[0] == section or section not in _sections(known)):
        return f"{key}: unknown key; did you mean {near[0]}?"
    siblings = [k for k in known if section and k.startswith(f"{section}.")]
    if siblings:
        return f"{key}: unknown key; known keys of {section}: {', '.join(siblings)}"
    if section or not known:
        return f"{key}: unknown key; known sections: {', '.join(sorted(_sections(known)))}"
    return f"{key}: unknown key; known keys: {', '.join(known)}"


def _sections(known: Collection[str]) -> set[str]:
    return {key.partition(".")[0] for key in known if "." in key}


def explain(detail: ErrorDetails, known: Collection[str] = ()) -> str:
    """Explain one error that pydantic found, in one sentence.

    Args:
        detail: an item of ``ValidationError.errors()``. Messages of our own validators are used
            unchanged, because they name the key.
        known: all keys of the schema, to explain an unknown key.
    """
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    key = _key(detail["loc"])
    if kind == "extra_forbidden":
        return unknown_key(key, known)
    if kind == "missing":
        return f"{key} is missing"
    return f"{key} must {_demand(kind, context)}, got {detail['input']!r}"


def _key(loc: tuple[int | str, ...]) -> str:
    """Format pydantic's location of an error, such as ``sites[2].name`` (counted from 1)."""
    text = ""
    for part in loc:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{kebab(part)}"
    return text.removeprefix(".")


def _demand(kind: str, context: Mapping[str, Any]) -> str:
    if kind in _LIMITS:
        words, limit = _LIMITS[kind]
        return f"be {words} {context[limit]:g}"
    if kind in _KINDS:
        return f"be {_KINDS[kind]}"
    if kind == "literal_error":
        return f"be {context['expected']}"
    if kind == "string_pattern_mismatch":
        return f"consist of {_NAME}"
    if kind in ("string_too_short", "too_short"):
        return "not be empty"
    if kind in ("string_too_long", "too_long"):
        return f"be no longer than {context['max_length']}"
    return f"be valid ({kind.replace('_', ' ')})"
