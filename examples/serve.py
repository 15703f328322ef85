"""`transformers serve` for a converted checkpoint: an OpenAI-compatible server on its own port.

    python examples/serve.py runs/quickstart --port 8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \
        -d '{"model": "runs/quickstart", "prompt": "If the argument is", "max_tokens": 20, "temperature": 0}'

transformers' server (5.23) looks a model's class up by its name in transformers itself, where custom classes are not, registered or not.
This puts the checkpoint's class there, and leaves all else to the server. Needs `pip install 'transformers[serving]'`.
"""

import sys

import transformers
from transformers.cli.transformers import main

import mxd_convert
from mxd_convert.checkpoint.read import read_config
from mxd_convert.modeling import modeling_mxd

if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
    sys.exit(__doc__)
try:
    [name] = read_config(sys.argv[1]).architectures
except mxd_convert.InputError as error:
    sys.exit(f"serve: {error}")
setattr(transformers, name, getattr(modeling_mxd, name))
sys.argv.insert(1, "serve")
main()
