"""Everything that needs a GPU, in one call: the tests' CUDA part, the steps at two shapes, a conversion, plan against run.

    python benchmarks/gpu.py [--output results.md] [--quick]

Each part runs in a process of its own; one that fails is reported and the others continue. Exit status 1 if any failed.
"""

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
PARTS = {
    "kernels on the GPU": [sys.executable, "-m", "pytest", "-q", str(TESTS / "unit" / "test_kernels.py")],
    "the joint stage on the GPU": [sys.executable, "-m", "pytest", "-q", str(TESTS / "unit" / "test_joint.py")],
    "GPT-2 shape": [sys.executable, str(HERE / "train_step.py"), "--shape", "gpt2", "--steps", "5"],
    # one precision at a time: all six steps at once would fill 80 GB
    **{
        f"Llama-3.2-3B shape, {precision}": [
            sys.executable,
            str(HERE / "train_step.py"),
            "--shape",
            "llama-3.2-3b",
            "--precision",
            precision,
            "--rounds",
            "5",
            "--steps",
            "2",
        ]
        for precision in ("fp32", "bf16")
    },
    "plan against run": [sys.executable, str(HERE / "memory.py"), "--case", "quickstart"],
    "one pass against one run per layer": [
        sys.executable,
        str(HERE / "convert.py"),
        "--recipe",
        "quickstart",
        "--tokens",
        "100000",
    ],
}
WHOLE_RUNS = ("plan against run", "one pass against one run per layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write what is printed to this file")
    parser.add_argument("--quick", action="store_true", help="kernels and steps only")
    parser.add_argument("--seconds", type=int, default=400, help="that a part may take")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu.py: there is no CUDA device here; benchmarks/train_step.py runs on the CPU")
    device = torch.cuda.get_device_properties(0)
    text = [
        f"{device.name}, {device.total_memory / 2**30:.0f} GiB; python {platform.python_version()}, torch {torch.__version__}"
    ]
    print(text[0], flush=True)
    failed = 0
    for name, command in PARTS.items():
        if arguments.quick and name in WHOLE_RUNS:
            continue
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                timeout=arguments.seconds,
                env={**os.environ, "PYTHONPATH": os.pathsep.join((str(HERE.parent), os.environ.get("PYTHONPATH", "")))},
            )
            output, status = done.stdout + (done.stderr if done.returncode else ""), done.returncode
        except subprocess.TimeoutExpired:
            output, status = f"took longer than {arguments.seconds} s", 1
        failed += bool(status)
        text.append(f"\n### {name}{' (FAILED)' if status else ''}\n\n{output.strip()}")
        print(text[-1], flush=True)
    if arguments.output is not None:
        arguments.output.write_text("\n".join(text) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
