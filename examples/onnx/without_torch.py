"""An exported model on onnxruntime alone: continues prompts, tells which experts fired, steers one.

    mxd-convert export-onnx runs/quickstart exports/quickstart --expert-outputs --steering
    python examples/onnx/without_torch.py exports/quickstart "If the argument is" "The file"

Needs mxd-convert's sources, onnxruntime, tokenizers and numpy; neither torch nor transformers.
"""

import json
import sys

from mxd_convert.onnx import OnnxModel


def main(folder: str, prompts: list[str]) -> None:
    model = OnnxModel.from_pretrained(folder)
    for prompt in prompts:
        print(json.dumps(model.generate(prompt, max_new_tokens=40)))
    if any(name.startswith("experts.") for name in (entry.name for entry in model.session.get_outputs())):
        layer, (values, indices) = next(iter(model.encode(prompts[0]).items()))
        strongest = indices[-1][values[-1].argmax()]
        print(f"layer {layer}, last token: expert {strongest} is the strongest of {(values[-1] > 0).sum()}", file=sys.stderr)
        order = {"layer": layer, "expert": int(strongest), "add": 5.0, "positions": "generation"}
        print(f"with 5 more of it: {model.generate(prompts[0], max_new_tokens=40, steering=[order])!r}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or ["Once upon a time"])
