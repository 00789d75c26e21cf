"""Schemas made ready for a grammar."""

import json

from llmopt.serve.schemas import moved, schema_source


def source(schema):
    found = json.loads(schema_source(schema))
    assert found.pop("x-guidance")
    return found


def test_objects_with_properties_are_closed_at_every_depth():
    inner = {"type": "object", "properties": {"properties": {"type": "string"}}}
    schema = {"properties": {"a": inner, "b": {"items": inner}}, "$defs": {"D": inner}, "anyOf": [inner]}
    closed = {**inner, "additionalProperties": False}
    expected = {"properties": {"a": closed, "b": {"items": closed}}, "$defs": {"D": closed}, "anyOf": [closed]}
    assert source(schema) == {**expected, "additionalProperties": False}
    assert "additionalProperties" not in schema


def test_what_says_that_it_is_open_stays_open():
    for schema in (
        {"type": "object"},
        {"properties": {}, "additionalProperties": True},
        {"properties": {}, "patternProperties": {"^x": {}}},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"const": {"properties": {}}, "enum": [{"properties": {}}]},
        {"type": "object", "x-guidance": {"whitespace_flexible": False}},
    ):
        assert {**json.loads(schema_source(schema)), "x-guidance": 0} == {**schema, "x-guidance": 0}
    assert json.loads(schema_source({"x-guidance": {"a": 1}}))["x-guidance"] == {"a": 1}


def test_references_move():
    schema = {
        "$ref": "#",
        "properties": {"$ref": {"$ref": "#/$defs/A"}},
        "items": {"$ref": "other"},
        "const": {"$ref": "#"},
    }
    assert moved(schema, "#/x") == {
        "$ref": "#/x",
        "properties": {"$ref": {"$ref": "#/x/$defs/A"}},
        "items": {"$ref": "other"},
        "const": {"$ref": "#"},
    }
