"""Twenty JSON schemas that a text can always finish: what constrained output is tried on."""

STRING = {"type": "string", "maxLength": 12}
COUNT = {"type": "integer", "minimum": 0, "maximum": 999}


def obj(**properties):
    """An object with all of these properties and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def array(items, low=0, high=3):
    """A bounded list."""
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


PERSON = obj(name=STRING, age={"type": "integer", "minimum": 0, "maximum": 120})
SCHEMAS = [
    obj(answer={"enum": ["yes", "no"]}),
    obj(n=COUNT),
    obj(x={"type": "number", "minimum": -10, "maximum": 10}, ok={"type": "boolean"}),
    PERSON,
    obj(people=array(PERSON)),
    array(COUNT, 1, 4),
    obj(tags=array(STRING, 1)),
    obj(kind={"const": "circle"}, r=COUNT),
    {"anyOf": [obj(a=COUNT), obj(b=STRING)]},
    obj(id={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}),
    obj(when={"type": "string", "format": "date"}),
    obj(mail={"type": "string", "format": "email", "maxLength": 30}),
    obj(uid={"type": "string", "format": "uuid"}),
    obj(maybe={"anyOf": [COUNT, {"type": "null"}]}),
    {"type": "object", "properties": {"a": COUNT, "b": STRING}, "required": ["a"], "additionalProperties": False},
    obj(point={"type": "array", "prefixItems": [COUNT, COUNT], "items": False, "minItems": 2}),
    {"$defs": {"P": PERSON}, **obj(left={"$ref": "#/$defs/P"}, right={"$ref": "#/$defs/P"})},
    obj(deep=obj(er=obj(still=obj(n=COUNT)))),
    {"enum": ["red", 5, None, {"a": [1]}]},
    {"type": "string", "minLength": 2, "maxLength": 10},
]
