"""Checks of a checkpoint in a fresh process. `verify` runs this file as a script, with our package importable or blocked.

    python -I fresh_process.py REQUEST.json

The script imports nothing of the package. The request names the checkpoint, the paths of the answer and the logits, the token ids
to run, whether the package is blocked, and whether code in the folder is trusted. Code must be trusted if the package is blocked,
and for a family without a row in the table of architectures. The answer is a list of checks. The logits are written as
safetensors, with the gates and choices of every top-k.
"""

import hashlib
import json
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path


class _Blocked:
    """An import finder that blocks our package."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mxd_convert":
            raise ImportError("mxd_convert is blocked: the checkpoint must load without it")


# --- runs that may differ by rounding --------------------------------------------------------------------------------------------

TOLERANCE = 1e-5  # largest difference of logits, relative to the largest logit
TIE = 1e-3  # distance to the K + 1-th gate, relative to the token's largest, within which rounding may change the choice


@contextmanager
def recording(model):
    """Yield a function that returns what every top-k has seen and chosen since, by name, each with leading axes (B, T).

    Per top-k: the K + 1 largest gates ("values"), their experts ("indices"), and the K chosen experts ("chosen"), with -1 for
    gates that are not positive.
    """
    import torch

    seen, handles = {}, []

    def watch(name):
        def hook(module, arguments, output):
            if getattr(module, "sparsity", None) == "topk":
                gate = arguments[0].detach().float()
                most = gate.reshape(-1, gate.shape[-2], gate.shape[-1]).topk(min(module.k + 1, gate.shape[-1]), dim=-1)
                values, chosen = (tensor.detach().reshape(-1, tensor.shape[-2], module.k) for tensor in output)
                found = {"values": most.values, "indices": most.indices, "chosen": chosen.where(values > 0, -1)}
                for key, tensor in found.items():
                    seen.setdefault(f"{name}.{key}", []).append(tensor)

        return hook

    for number, module in enumerate(module for module in model.modules() if type(module).__name__ == "ExpertActs"):
        handles.append(module.register_forward_hook(watch(f"{number:06d}")))
    try:
        yield lambda: {name: torch.cat(tensors, dim=1) for name, tensors in seen.items()}
    finally:
        for handle in handles:
            handle.remove()


def recorded(model, run):
    """Return what `run` returns for a model, as "logits", and what `recording` yields for every top-k."""
    import torch

    with torch.no_grad(), recording(model) as gates:
        return {"logits": run(model).float(), **gates()}


def differ(one, other, first=0, tolerance=TOLERANCE):
    """Return None if two runs over the same tokens agree, else how they differ. Logits (B, T, V) start at token `first`.

    Within rounding of the K-th gate, an expert may be chosen in one run and not in the other. From the first such token on, a row
    is not compared. Every other difference counts.
    """
    ends = flipped(one, other)
    scale = max(1.0, one["logits"].abs().max().item())
    worst = 0.0
    for row, (ours, theirs) in enumerate(zip(one["logits"], other["logits"], strict=True)):
        until = max(0, ends.get(row, len(ours) + first) - first)
        if until:
            difference = (ours[:until] - theirs[:until]).abs().max().item()
            worst = max(worst, difference if difference == difference else float("inf"))  # noqa: PLR0124 (NaN)
    return None if worst <= tolerance * scale else f"differ by {worst:.1e}"


def flipped(one, other):
    """Return {row: the first token at which rounding changed the chosen experts}, for the rows with such a token."""
    ends = {}
    for layer in sorted(name.removesuffix(".chosen") for name in one if name.endswith(".chosen") and name in other):
        rows, tokens = (min(run[f"{layer}.chosen"].shape[at] for run in (one, other)) for at in (0, 1))
        for row in range(rows):
            for token in range(min(tokens, ends.get(row, tokens))):
                sides = [[run[f"{layer}.{key}"][row, token].tolist() for key in _KEYS] for run in (one, other)]
                if _is_a_tie(*sides):
                    ends[row] = token
                    break
    return ends


_KEYS = ("chosen", "indices", "values")


def _is_a_tie(one, other):
    """Return whether two choices of the top-k differ, and only in gates within rounding of the K + 1-th, or of 0."""
    different = set(one[0]) ^ set(other[0])
    if different <= {-1}:
        return False
    reach = TIE * max(abs(value) for side in (one, other) for value in side[2])
    for chosen, indices, values in (one, other):
        border = max(0.0, values[len(chosen)] if len(values) > len(chosen) else 0.0)
        if any(index in different and abs(value - border) > reach for index, value in zip(indices, values, strict=True)):
            return False
    return True


# ---------------------------------------------------------------------------------------------------------------------------------


def main(request):  # noqa: PLR0915 (one nested function per check)
    """Run all checks of a request, and write the answer and the logits."""
    blocked, trusted = request["blocked"], request["trusted"]
    sys.path[:] = request["path"]
    if blocked:
        sys.meta_path.insert(0, _Blocked())
    else:
        import mxd_convert  # noqa: F401 (registers the classes)
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
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
        # in float32, because rounding in half precision could hide or cause a difference
        state["fp32"] = load(dtype=torch.float32)
        state["run"] = recorded(state["fp32"], lambda model: model(input_ids=ids).logits)
        save_file({name: tensor.contiguous() for name, tensor in state["run"].items()}, request["logits"])
        return None if torch.isfinite(state["run"]["logits"]).all() else "the logits are not finite"

    def tokenizes():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=request["tokenizer_trusted"])
        text = "Once upon a time"
        back = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
        return None if tokenizer(text)["input_ids"] and "time" in back else f"its tokenizer turns {text!r} into {back!r}"

    def generates():
        """Compare cached generation, token by token, with one forward over the whole text."""
        model, prompt = state["fp32"], ids[:1, :8]
        options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1, "pad_token_id": 0, "eos_token_id": None}
        options |= {"use_cache": True, "output_logits": True, "return_dict_in_generate": True}
        written = []

        def run(model):
            written.append(model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options))
            return torch.stack(written[0].logits, dim=1)

        cached = recorded(model, run)
        whole = recorded(model, lambda model: model(input_ids=written[0].sequences[:, :-1], use_cache=False).logits)
        whole["logits"] = whole["logits"][:, prompt.shape[1] - 1 :]
        problem = differ(cached, whole, prompt.shape[1] - 1, 1e-3)
        return None if problem is None else f"with and without the cache, logits {problem}"

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
        with tempfile.TemporaryDirectory() as target:
            state["model"].save_pretrained(target, max_shard_size=max(total // 3, 1))
            if not (Path(target) / "model.safetensors.index.json").is_file():
                return "the save was not sharded"
            return None if digest(load(target)) == state["digest"] else "tensors differ after a sharded save"

    def headless():
        model = AutoModel.from_pretrained(folder, trust_remote_code=trusted, dtype=torch.float32).eval()
        ours = recorded(model, lambda model: model(input_ids=ids).last_hidden_state)
        theirs = recorded(state["fp32"], lambda model: model(input_ids=ids, output_hidden_states=True).hidden_states[-1])
        problem = differ(ours, theirs)
        return None if problem is None else f"AutoModel's last hidden state and that of AutoModelForCausalLM: {problem}"

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
            torch.manual_seed(0)  # for dropout
            model.train()
            if use:
                model.gradient_checkpointing_enable()
            with torch.enable_grad(), recording(model) as gates:
                output = model(input_ids=ids, labels=ids, use_cache=False)
                runs.append({**gates(), "logits": output.logits.detach()})
                output.loss.backward()
            return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

        runs = []
        plain, checkpointed = gradients(False), gradients(True)
        if differ(*runs) is None and flipped(*runs):
            return None  # rounding changed the chosen experts, so the gradients can't be compared
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
