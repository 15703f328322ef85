"""Registration of converted models with transformers' auto classes.

It runs on import of the package, because transformers has no plug-in hook.
"""

import importlib.util
import sys
from pathlib import Path


def register() -> None:
    """Register config and model classes of every supported family. Imports torch and transformers, which takes seconds."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    from mxd_convert.base_model.families import ARCHITECTURES, stem_of
    from mxd_convert.modeling import modeling_mxd
    from mxd_convert.modeling.configuration_mxd import config_class

    for stem in map(stem_of, ARCHITECTURES):
        config = config_class(stem)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, getattr(modeling_mxd, f"Mxd{stem}Model"), exist_ok=True)
        model = getattr(modeling_mxd, f"Mxd{stem}ForCausalLM")
        AutoModelForCausalLM.register(config, model, exist_ok=True)
        if "text_config" in config.sub_configs:
            AutoModelForImageTextToText.register(config, model, exist_ok=True)


def is_our_program() -> bool:
    """Return whether this process is the `mxd-convert` command line."""
    return _OURS


def register_where_useful() -> None:
    """Register the classes if torch and transformers are installed and this process is not our command line.

    The command line loads checkpoints itself, and skips the import so that `--help` is fast.
    """
    if not _OURS and all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers")):
        register()


# evaluated at import, because callers of `cli.main` may change sys.argv later
_OURS = (bool(sys.argv) and Path(sys.argv[0]).stem == "mxd-convert") or sys.orig_argv[1:3] == ["-m", "mxd_convert.cli"]
