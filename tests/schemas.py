"""The schemas of docs/schemas, for tests of what --json prints."""

import json

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tests.helpers import REPOSITORY

SCHEMAS = {
    path.name: json.loads(path.read_text())
    for path in sorted((REPOSITORY / "docs" / "schemas").glob("*.json"))
}
REGISTRY = Registry().with_resources(
    (schema["$id"], Resource.from_contents(schema)) for schema in SCHEMAS.values()
)


def fits(answer, name=None):
    """Checks an answer against the schema that it names, which is `name` if that is given."""
    assert name in (None, answer["schema"])
    schema = SCHEMAS[f"{answer['schema'].replace('/', '.')}.json"]
    Draft202012Validator(schema, registry=REGISTRY).validate(answer)
    return answer
