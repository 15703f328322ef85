"""`verify`: whether a checkpoint is whole, behaves as an ordinary one, and is what its report says."""

from pathlib import Path

from mxd_convert.base_model.remote_code import NotTrusted, is_trusted, trusting
from mxd_convert.checkpoint.read import (
    check_folder,
    is_converted,
    load_checkpoint,
    read_config,
)
from mxd_convert.checkpoint.verify import (
    PLACES,
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
    """Checks a converted checkpoint: whole files; loading, generation, saving, sharding, tied weights, bfloat16 and gradient checkpointing
    in fresh processes with and without this package; tensors outside the layers and logits after reverting against the base model.

    Without the package, and for families that have no row, code in the checkpoint is needed: this package's own is run in its place where
    the checkpoint's is the same to the byte. No code of the checkpoint's, its tokenizer's included, runs but with trust_remote_code.
    base: the base model, where not the recorded one. What needs a base that is not at hand is reported as not checked.
    Raises InputError where `checkpoint` is no converted checkpoint at all or `base` is not its base.
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
    needing = [blocked for blocked in PLACES if blocked or not has_row(config)]  # the checkpoint's own code
    places = [blocked for blocked in PLACES if not (foreign and blocked in needing)]
    checks = in_fresh_processes(folder, ids, places, needing, trust_remote_code)
    for blocked in needing if foreign else []:
        why = f"{foreign[0]} is not this package's own, and was not run; read it, and give --trust-remote-code"
        checks.append(Check(f"runs in a fresh process ({PLACES[blocked]})", None, why))
    return Verification(folder, [Check(whole, True), *checks, *compared])
