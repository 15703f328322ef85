"""Imported first by the files that pytest collects here: make the tests of other libraries importable, as packages `<library>_tests`."""

import os
import sys
from importlib.metadata import version
from pathlib import Path

CACHE = Path(os.environ["MXD_HF_TESTS"])
TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS / "hf"), str(TESTS), str(TESTS / "support")]
sys.path.append(str(CACHE / "site-packages"))

import sources  # noqa: E402
import stand_ins  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
for library, missing in {"transformers": stand_ins.TRANSFORMERS, "peft": stand_ins.PEFT}.items():
    folder = CACHE / f"{library}-{version(library)}" / "tests"
    if folder.is_dir():
        sources.importable(f"{library}_tests", folder, missing)
