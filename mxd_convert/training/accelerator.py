"""The devices and processes of a run, set up by accelerate."""

import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs

from mxd_convert.errors import InputError, first_line, is_out_of_memory
from mxd_convert.escaping import printable
from mxd_convert.recipe.schema import Train

_LEFT_OVER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "PMI_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def _check_launch() -> None:
    """Raise InputError if the environment names several processes but no MASTER_ADDR: they would wait for each other forever."""
    found = [name for name in _LEFT_OVER if name in os.environ and not (name.endswith("_SIZE") and os.environ[name] == "1")]
    if found and "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"the environment has {', '.join(f'{name}={printable(os.environ[name])[:20]}' for name in found)} but no MASTER_ADDR, so it is"
            f" not from a launcher of this run. Unset {'it' if len(found) == 1 else 'them'}, or launch several processes with `torchrun` or"
            " `accelerate launch`."
        )


def multiplies_bfloat16(device: str) -> bool:
    """Return whether a device (cpu or cuda) multiplies bfloat16 matrices natively. Emulation is slower than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check is not None and check() for check in checks)


def new_accelerator(train: Train, logs: Path) -> Accelerator:
    """Set up the devices and processes of a run.

    logs: folder of the tracker. Raises InputError if devices, processes, precision or tracker can't be set up.
    """
    _check_launch()
    # accelerate keeps one state per process: without this, a second conversion would use the first one's precision
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()
    try:
        accelerator = Accelerator(
            cpu=train.device == "cpu" or not torch.cuda.is_available(),
            mixed_precision="bf16" if train.precision == "bf16" else "no",
            log_with=None if train.tracker == "none" else train.tracker,
            project_dir=str(logs),
            # other processes wait while the main one reads text and evaluates, which may take hours
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
        )
    except (ImportError, ValueError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            raise
        if train.precision == "bf16" and "precision" in str(error).lower():
            raise InputError(f"train.precision: {train.precision}: {first_line(error)}") from None
        if train.tracker == "none":
            asked = [name for name in sorted(os.environ) if name.startswith("ACCELERATE_")]
            hint = f". The environment changes accelerate's settings: unset {', '.join(asked)}" if asked else ""
            raise InputError(
                f"accelerate can't set up the processes and devices of this run: {first_line(error)}{hint}"
            ) from None
        raise InputError(
            f"train.tracker: {train.tracker} can't be used ({str(error).splitlines()[0]}). Install it, or set train.tracker: none."
        ) from None
    torch.manual_seed(train.seed)
    return accelerator
