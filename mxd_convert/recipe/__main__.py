"""`python -m mxd_convert.recipe` prints the JSON schema of recipes, docs/recipe.schema.json."""

import json

from mxd_convert.recipe.schema import json_schema

print(json.dumps(json_schema(), indent=2))
