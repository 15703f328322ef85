"""An exported model in onnxruntime-genai.

pip install -r examples/onnx/genai.txt
python examples/onnx/genai.py exports/quickstart "If the argument is" "The file"
"""

import json
import sys

import onnxruntime_genai as og


def main(folder: str, prompts: list[str]) -> None:
    model = og.Model(folder)
    tokenizer = og.Tokenizer(model)
    tokenizer.update_options(add_special_tokens="true")  # else a text that should begin with BOS does not
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        settings = og.GeneratorParams(model)
        settings.set_search_options(max_length=len(ids) + 40, do_sample=False)
        generator = og.Generator(model, settings)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        tokenizer.update_options(skip_special_tokens="true")
        print(json.dumps(tokenizer.decode(generator.get_sequence(0))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or ["Once upon a time"])
