"""What a checkpoint does in a fresh process. Run as a script by `verify`, with our package importable or blocked; imports nothing of ours.

    python -I _probe.py REQUEST.json

The request names the checkpoint, where to put the answer, token ids to run, whether the package is blocked, and whether the checkpoint's code is
trusted, which it has to be without the package, and for a family that has no row. The answer is a
list of checks, and the logits beside it as safetensors.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path


class _Blocked:
    """A finder that lets nobody import our package."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mxd_convert":
            raise ImportError("mxd_convert is blocked: the checkpoint must load without it")


def main(request):  # noqa: PLR0915 (one script, one function a check)
    blocked, trusted = request["blocked"], request["trusted"]
    if blocked:
        sys.meta_path.insert(0, _Blocked())
    else:
        sys.path.insert(0, request["package"])
        import mxd_convert  # noqa: F401 (registers the classes)
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, ids = request["checkpoint"], torch.tensor(request["input_ids"])
    checks = []

    def check(name, run):
        try:
            problem = run()
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        checks.append({"check": name, "ok": problem is None, "detail": problem or ""})

    def load(path=folder, **options):
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trusted, **options).eval()

    def digest(model):
        tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
        total = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            if name not in tied:
                total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                total.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    state = {}

    def loads():
        state["model"] = load()
        state["digest"] = digest(state["model"])
        # in float32, so that rounding of a half-precision forward can't hide or feign a difference
        state["fp32"] = load(dtype=torch.float32)
        with torch.no_grad():
            logits = state["fp32"](input_ids=ids).logits
        save_file({"logits": logits.contiguous()}, request["logits"])
        return None if torch.isfinite(logits).all() else "the logits are not finite"

    def tokenizes():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
        text = "Once upon a time"
        back = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
        return None if tokenizer(text)["input_ids"] and "time" in back else f"its tokenizer makes {back!r} of {text!r}"

    def generates():
        model = state["fp32"]
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        prompt = {"input_ids": ids[:1, :8], "attention_mask": torch.ones_like(ids[:1, :8])}
        cached, plain = (model.generate(**prompt, use_cache=use, **options) for use in (True, False))
        return None if cached.equal(plain) else "greedy text differs with and without the cache"

    def saves():
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            state["model"].save_pretrained(first)
            again = load(first)
            again.save_pretrained(second)
            if digest(again) != state["digest"]:
                return "tensors differ after saving and loading"
            for name in sorted(path.name for path in Path(first).iterdir()):
                if (Path(first) / name).read_bytes() != (Path(second) / name).read_bytes():
                    return f"{name} differs when saved again"
        return None

    def shards():
        total = sum(tensor.numel() * tensor.element_size() for tensor in state["model"].state_dict().values())
        with tempfile.TemporaryDirectory() as place:
            state["model"].save_pretrained(place, max_shard_size=max(total // 3, 1))
            if not (Path(place) / "model.safetensors.index.json").is_file():
                return "the save was not sharded"
            return None if digest(load(place)) == state["digest"] else "tensors differ after a sharded save"

    def headless():
        model = AutoModel.from_pretrained(folder, trust_remote_code=trusted, dtype=torch.float32).eval()
        with torch.no_grad():
            ours = model(input_ids=ids).last_hidden_state
            theirs = state["fp32"](input_ids=ids, output_hidden_states=True).hidden_states[-1]
        return None if ours.equal(theirs) else "AutoModel's last hidden state is not that of AutoModelForCausalLM"

    def ties():
        model = state["model"]
        if not model.config.get_text_config().tie_word_embeddings:
            return None
        inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        return None if inputs.data_ptr() == outputs.data_ptr() else "input and output embeddings are not tied"

    def bfloat16():
        model = load(dtype=torch.bfloat16)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        return (
            None
            if logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()
            else f"logits of dtype {logits.dtype}, or not finite"
        )

    def checkpointing():
        def gradients(use):
            model = load(dtype=torch.float32).requires_grad_(True)
            torch.manual_seed(0)  # of dropout
            model.train()
            if use:
                model.gradient_checkpointing_enable()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

        plain, checkpointed = gradients(False), gradients(True)
        if plain.keys() != checkpointed.keys():
            return "some parameters have a gradient only with or only without gradient checkpointing"
        worst = max((plain[name] - checkpointed[name]).abs().max().item() for name in plain)
        return None if worst <= 1e-5 else f"gradients differ by {worst:.1e} with gradient checkpointing"

    check("loads", loads)
    if checks[0]["ok"]:
        check("its tokenizer loads and reads text", tokenizes)
        check("generates the same text with and without cache", generates)
        check("saves, loads and saves again bit-identically", saves)
        check("saves in shards", shards)
        check("loads as AutoModel, without its head", headless)
        check("keeps tied weights tied", ties)
        check("runs in bfloat16", bfloat16)
        check("trains with gradient checkpointing", checkpointing)
    Path(request["answer"]).write_text(json.dumps(checks))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
