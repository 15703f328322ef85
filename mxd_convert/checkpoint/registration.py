"""Makes transformers' auto classes know converted checkpoints; transformers has no plug-in hook, so importing our package does it."""

import importlib.util
import sys
from pathlib import Path


def register() -> None:
    """Registers config and model classes of every family in the table. Takes the seconds that importing torch and transformers takes."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from mxd_convert.base_model.families import ARCHITECTURES, stem_of
    from mxd_convert.modeling import modeling_mxd
    from mxd_convert.modeling.configuration_mxd import config_class

    for stem in map(stem_of, ARCHITECTURES):
        config = config_class(stem)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, getattr(modeling_mxd, f"Mxd{stem}Model"), exist_ok=True)
        AutoModelForCausalLM.register(config, getattr(modeling_mxd, f"Mxd{stem}ForCausalLM"), exist_ok=True)


def is_our_program() -> bool:
    """Whether this process is our own command line."""
    return _OURS


def register_where_useful() -> None:
    """Registers unless this is our own command line, which loads checkpoints itself and should answer --help at once, or torch is not there."""
    if not _OURS and all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers")):
        register()


# read once, at import: a caller of `cli.main` may set sys.argv later
_OURS = (bool(sys.argv) and Path(sys.argv[0]).stem == "mxd-convert") or sys.orig_argv[1:3] == ["-m", "mxd_convert.cli"]
