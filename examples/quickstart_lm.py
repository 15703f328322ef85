"""Makes the quickstart's text and language model from nothing but a Python installation.

    python examples/quickstart_lm.py text     # examples/python-docs.jsonl.gz: documentation topics and docstrings
    python examples/quickstart_lm.py train    # examples/quickstart-lm/: a small GPT-2 with its own BPE tokenizer
    python examples/quickstart_lm.py eval     # held-out perplexity of the saved model, and a sample

The documents that `mxd-convert` holds out of this text (a fixed share, by content hash) are held out of the model's own training
and of its tokenizer's too, so the perplexity and every later figure are on text that nothing here has seen.
"""

import argparse
import ast
import gzip
import json
import math
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mxd_convert.data.documents import is_held_out

HERE = Path(__file__).parent
TEXT, MODEL = HERE / "python-docs.jsonl.gz", HERE / "quickstart-lm"
CONTEXT, VOCABULARY = 256, 2048
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
PROMPTS = ("The function returns", "If the argument is", "A class")


def docstrings(path: Path) -> list[str]:
    """The docstrings of one source file that are long enough to be prose."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # the library ships deliberately broken files
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [doc for doc in found if doc and len(doc) > 120]


def write_text() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    documents = [text.strip() for text in topics.values()]
    for path in sorted(library.rglob("*.py")):
        if not SKIPPED & set(path.relative_to(library).parts):
            documents += docstrings(path)
    documents = sorted(set(documents))
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    TEXT.write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))
    print(f"{TEXT.name}: {len(documents)} documents, {sum(map(len, documents)):,} characters")


def read_text() -> tuple[list[str], list[str]]:
    with gzip.open(TEXT, "rt", encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file]
    return [d for d in documents if not is_held_out(d)], [d for d in documents if is_held_out(d)]


def make_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        documents, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=CONTEXT
    )


def blocks(tokenizer: PreTrainedTokenizerFast, documents: list[str], seed: int) -> torch.Tensor:
    """(number of blocks, CONTEXT + 1): documents in a random order, a separator before each, cut into overlapping-by-one blocks."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    stream: list[int] = []
    for ids in tokenizer([documents[i] for i in order], add_special_tokens=False)["input_ids"]:
        stream += [tokenizer.bos_token_id, *ids]
    count = (len(stream) - 1) // CONTEXT
    return torch.stack([torch.tensor(stream[i * CONTEXT : (i + 1) * CONTEXT + 1]) for i in range(count)])


@torch.no_grad()
def cross_entropy(model: GPT2LMHeadModel, held_out: torch.Tensor) -> float:
    model.eval()
    losses = [
        torch.nn.functional.cross_entropy(model(b[:, :-1]).logits.float().flatten(0, 1), b[:, 1:].flatten(), reduction="sum")
        for b in held_out.split(16)
    ]
    return (torch.stack(losses).sum() / held_out[:, 1:].numel()).item()


def train(minutes: float) -> None:
    torch.manual_seed(0)
    train_documents, held_out_documents = read_text()
    tokenizer = make_tokenizer(train_documents)
    bos = tokenizer.bos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=160, n_layer=5, n_head=5, resid_pdrop=0.1, embd_pdrop=0.1,
        attn_pdrop=0.1, bos_token_id=bos, eos_token_id=bos,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    held_out = blocks(tokenizer, held_out_documents, seed=0)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95), fused=True)
    start, epoch, step = time.monotonic(), 0, 0
    print(f"{model.num_parameters():,} parameters, {held_out[:, 1:].numel():,} held-out tokens")
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        data = blocks(tokenizer, train_documents, seed=epoch)
        for batch in data[torch.randperm(len(data))].split(16):
            done = (time.monotonic() - start) / (60 * minutes)
            rate = 2e-3 * min(1.0, (step + 1) / 100) * max(0.02, 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.train()
            logits = model(batch[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        epoch += 1
        print(f"epoch {epoch:3d}  loss {loss.item():.3f}  held-out {cross_entropy(model, held_out):.4f}  {done:4.0%}", flush=True)
    model.to(torch.bfloat16).save_pretrained(MODEL)
    tokenizer.save_pretrained(MODEL)


def evaluate() -> None:
    model = GPT2LMHeadModel.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    held_out = blocks(tokenizer, read_text()[1], seed=0)
    loss = cross_entropy(model, held_out)
    print(f"held-out: {held_out[:, 1:].numel():,} tokens, {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}")
    torch.manual_seed(0)
    for prompt in PROMPTS:
        output = model.generate(
            **tokenizer(prompt, return_tensors="pt"), max_new_tokens=48, do_sample=True, top_k=20, temperature=0.8
        )
        print("---\n" + tokenizer.decode(output[0]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["text", "train", "eval"])
    parser.add_argument("--minutes", type=float, default=25.0, help="wall-clock budget of the training")
    arguments = parser.parse_args()
    if arguments.what == "text":
        write_text()
    elif arguments.what == "train":
        train(arguments.minutes)
    else:
        evaluate()
