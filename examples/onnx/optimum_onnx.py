"""An exported model in optimum-onnx, which wants an older transformers, and so an environment of its own.

pip install -r examples/onnx/optimum.txt
python examples/onnx/optimum_onnx.py exports/quickstart "If the argument is" "The file"
"""

import json
import sys

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def main(folder: str, prompts: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ORTModelForCausalLM.from_pretrained(folder, subfolder="onnx", file_name="model.onnx")
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        print(json.dumps(tokenizer.decode(output[0], skip_special_tokens=True)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or ["Once upon a time"])
