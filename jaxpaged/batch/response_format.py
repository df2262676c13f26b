"""OpenAI's `response_format` of both kinds of bodies, as the constraint that it is."""

from __future__ import annotations

from typing import Any

from jaxpaged.api.values import shortened

TYPES = ("text", "json_object", "json_schema")


def with_response_format(params: dict[str, Any], given: Any) -> dict[str, Any]:
    """The parameters of a line with what its `response_format` asks for; None asks for nothing."""
    constraint = _constraint_of(given)
    if constraint is None:
        return params
    if params.get("constraint") is not None:
        raise ValueError("response_format and constraint both say what the output is to be: give one of them")
    return {**params, "constraint": constraint}


def _constraint_of(given: Any) -> dict[str, Any] | None:
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in TYPES:
        raise ValueError(
            f"response_format must be an object whose type is one of {', '.join(TYPES)}, got {shortened(given)}"
        )
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    described = given.get("json_schema")
    if not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
        raise ValueError(
            'response_format of type json_schema needs {"json_schema": {"name": ..., "schema": {...}}}, got '
            f"{shortened(described)}"
        )
    return {"json_schema": described["schema"]}
