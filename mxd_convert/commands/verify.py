"""`verify`: check that a checkpoint is complete, behaves like any other checkpoint, and matches its base model."""

from pathlib import Path

from mxd_convert.base_model.remote_code import NotTrusted, is_trusted, trusting
from mxd_convert.checkpoint.read import (
    check_folder,
    is_converted,
    load_checkpoint,
    read_config,
)
from mxd_convert.checkpoint.verify import (
    MODES,
    Check,
    Verification,
    against_base,
    foreign_code,
    has_row,
    in_fresh_processes,
    token_ids,
)
from mxd_convert.errors import InputError


def verify(checkpoint: str | Path, base: str | None = None, trust_remote_code: bool = False) -> Verification:
    """Verify a converted checkpoint.

    The checks are:

    - the files are complete and fit the config;
    - loading, generation, saving, sharding, tied weights, bfloat16 and gradient checkpointing work in fresh processes, with and
      without this package;
    - the tensors outside the MxD layers, and the logits after reverting, are the base model's.

    Without this package, and for families that it has no table entry for, the model needs the code files in the checkpoint. If
    they are byte-identical to this package's, this package's files are run instead.

    Args:
        checkpoint: the checkpoint's folder.
        base: the base model, if it is not the recorded one. Checks that need an unavailable base are reported as not checked.
        trust_remote_code: run the checkpoint's own code, including its tokenizer's. It never runs otherwise.

    Raises:
        InputError: if the folder is not a converted checkpoint, or `base` is not its base model.
    """
    with trusting(trust_remote_code):
        return _verify(Path(checkpoint), base, is_trusted())


def _verify(folder: Path, base: str | None, trust_remote_code: bool) -> Verification:
    whole = "files are whole and fit the config"
    check_folder(folder)
    try:
        config = read_config(folder)
        converted = load_checkpoint(folder)
    except NotTrusted:
        raise
    except InputError as error:
        if not is_converted(folder):
            raise
        return Verification(folder, [Check(whole, False, str(error))])
    ids = token_ids(config)
    compared = against_base(folder, converted, base, ids)  # first, so that a wrong --base is reported at once
    foreign = [] if trust_remote_code else foreign_code(folder)
    needing = [blocked for blocked in MODES if blocked or not has_row(config)]  # these run the checkpoint's code
    runnable = [blocked for blocked in MODES if not (foreign and blocked in needing)]
    checks = in_fresh_processes(folder, ids, runnable, needing, trust_remote_code)
    for blocked in needing if foreign else []:
        why = f"{foreign[0]} is not this package's own, and was not run. Read it, then use --trust-remote-code."
        checks.append(Check(f"runs in a fresh process ({MODES[blocked]})", None, why))
    return Verification(folder, [Check(whole, True), *checks, *compared])
