"""The command `sample`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import JsonOption, app, human, print_json


@app.command(
    epilog="Example: `mxd-convert sample HuggingFaceTB/SmolLM2-135M-Instruct --prompts questions.txt --tokens 1000000 -o text.jsonl`"
)
def sample(
    base_model: Annotated[str, typer.Argument(help="Hub id, local folder or .gguf file of the model that writes the text.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .jsonl file to write.")],
    tokens: Annotated[int, typer.Option("--tokens", help="Number of tokens that the model writes.")],
    prompts: Annotated[
        Optional[Path],
        typer.Option("--prompts", help="A .txt file with a prompt per line, or a .jsonl file. Without it, texts begin with BOS."),
    ] = None,
    text_field: Annotated[
        str, typer.Option("--text-field", help="Field of a .jsonl file: a text, or a list of messages.")
    ] = "text",
    temperature: Annotated[float, typer.Option("--temperature", help="Sampling temperature.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Most tokens of one continuation.")] = 512,
    chat: Annotated[
        Optional[bool],
        typer.Option(
            "--chat/--no-chat",
            help="Whether prompts are messages to reply to, or texts to continue. Default: chat if the tokenizer has a template.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Prompts continued at a time.")] = 32,
    seed: Annotated[int, typer.Option("--seed", help="Random seed of the sampling.")] = 0,
    device: Annotated[Optional[str], typer.Option("--device", help="Device to run on. Default: CUDA if available.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, and replace the output.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Sample training text from a base model itself. The same command resumes a sample that was cut off."""
    found = mxd_convert.sample(
        base_model, output, tokens, prompts, text_field, temperature, max_new_tokens, chat, batch, seed, device, fresh
    )
    if as_json:
        print_json({"output": str(found.output), "documents": found.documents, "tokens": found.tokens})
    else:
        human.print(f"{found.output}: {found.documents:,} documents, {found.tokens:,} tokens")
