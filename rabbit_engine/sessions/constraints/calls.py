"""The grammar of forced calls, from the source of a constraint of the kind "tools"."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rabbit_engine.sessions.constraints.schemas import moved_schema

MOST_CALLS = 8
"""In one answer. Where tokens are drawn, a model might otherwise never stop calling."""


def lark_of_calls(source: Mapping[str, Any], json_options: Mapping[str, Any], root: str = "start") -> list[str]:
    """The rule `root` with those that it needs. `source`: `form` (a `ToolForm` as a mapping), `functions` with names and
    parameters, and whether they may be `parallel`."""
    form, special = source["form"], dict(source["form"]["special"])
    more = f"({_written(form['between'], special)} call){{0,{MOST_CALLS - 1}}}" if source["parallel"] else ""
    rules = [f"{root}: {_written(form['opening'], special)} call {more} {_written(form['closing'], special)}"]
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(source["functions"]))))
    for index, function in enumerate(source["functions"]):
        if not form["opening"]:
            rules.append(f"call_{index}: %json {json.dumps({'x-guidance': json_options, **_as_schema(form, function)})}")
            continue
        begin = form["head"] + json.dumps(function["name"], ensure_ascii=False) + form["middle"]
        rules.append(f"call_{index}: {json.dumps(begin)} arguments_{index} {json.dumps(form['tail'])}")
        rules.append(f"arguments_{index}: %json {json.dumps({'x-guidance': json_options, **function['parameters']})}")
    return rules


def _as_schema(form: Mapping[str, Any], function: Mapping[str, Any]) -> dict[str, Any]:
    """A call that is nothing but JSON, as a schema, so that another schema may begin alike."""
    key = re.sub(r'[\s,:"]', "", form["middle"])
    properties = {"name": {"const": function["name"]}, key: moved_schema(function["parameters"], f"#/properties/{key}")}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _written(text: str, special: Mapping[str, int]) -> str:
    """A text as Lark's literals, with its special tokens by their ids."""
    parts = re.split("(" + "|".join(map(re.escape, special)) + ")", text) if special else [text]
    return " ".join(f"<[{special[part]}]>" if part in special else json.dumps(part) for part in parts if part)
