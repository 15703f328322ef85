"""Fail where a function, method, class or import of the package is used nowhere but in tests, or code can't be reached."""

import sys

from vulture import Vulture

PATHS = ["mxd_convert", "benchmarks", "examples"]
DECORATORS = ["@app.*", "@field_validator*", "@model_validator*"]  # typer and pydantic call these
# called by Python, torch and rich, or part of the public face
NAMES = ["__getattr__", "__dir__", "extra_repr", "on_broken_pipe", "promoted", "suppressed"]

finder = Vulture(ignore_names=NAMES, ignore_decorators=DECORATORS)
finder.scavenge(PATHS)
found = [
    *finder.unused_funcs,
    *finder.unused_methods,
    *finder.unused_props,
    *finder.unused_classes,
    *finder.unused_imports,
    *finder.unreachable_code,
]
for item in found:
    print(f"{item.filename}:{item.first_lineno}: {item.message}")
sys.exit(bool(found))
