"""Print the JSON schema of recipes (`python -m mxd_convert.recipe > docs/recipe.schema.json`)."""

import json

from mxd_convert.recipe.schema import json_schema

print(json.dumps(json_schema(), indent=2))
