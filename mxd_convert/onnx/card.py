"""README.md of an exported folder: description, measured parity, and how to run it.

Figures are from onnx_report.json and from the checkpoint's report.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from mxd_convert.escaping import markdown, printable
from mxd_convert.files import write_text
from mxd_convert.onnx.runtime import JS_TYPES
from mxd_convert.report.schema import Report

_CLIENTS = """## Running it

Python, without torch (`pip install onnxruntime tokenizers && pip install --no-deps mxd-convert`):

```python
from mxd_convert.onnx import OnnxModel

model = OnnxModel.from_pretrained("{folder}")
print(model.generate("{prompt}", max_new_tokens=40))
```
{more}
Node or a browser, transformers.js (`npm install @huggingface/transformers`):

```js
const generator = await pipeline("text-generation", "{folder}", {{ dtype: "{js}" }});
```

optimum-onnx:

```python
from optimum.onnxruntime import ORTModelForCausalLM

model = ORTModelForCausalLM.from_pretrained("{folder}", subfolder="onnx", file_name="{file}")
```

onnxruntime-genai reads the folder directly. If the model's texts begin with a special token, call
`tokenizer.update_options(add_special_tokens="true")` on its tokenizer.
"""


_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
_WEB = re.compile(r"https?://[^\s<>\"'`]+")


def write_card(folder: Path, report: Mapping[str, Any], conversion: Report | None) -> None:
    """Write README.md into an exported folder. conversion: the checkpoint's report, whose text is untrusted."""
    model = _line(report["base"]["model"])
    base = markdown(model or "a local model")
    on_hub = not report["base"]["local"] and _REPOSITORY.fullmatch(model or "")
    data = ModelCardData(
        base_model=model if on_hub else None,
        **_licence(conversion),
        pipeline_tag="text-generation",
        tags=["onnx", "mxd", "mxd-convert", "interpretability"],
    )
    first = next(iter(report["graphs"]))
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {base} with sparse MLPs, for ONNX runtimes",
        f"MLPs of {base} are replaced by interpretable layers (checkpoint {markdown(report['checkpoint'])}, converted with mxd-convert)."
        f" The layers are part of the graph, so config.json has the base's model type, {markdown(report['model_type'])}."
        f" Opset {report['opset']}. One graph serves both prefill and decoding.",
        _measured(report),
        _conversion(conversion),
        _CLIENTS.format(
            folder=".",
            prompt="Once upon a time",
            more=_more(report),
            js=JS_TYPES[first],
            file=Path(report["graphs"][first]["file"]).name,
        ),
    ]
    write_text(folder / "README.md", "\n\n".join(part for part in parts if part))


def _measured(report: Mapping[str, Any]) -> str:
    """Return the section with the parity table."""
    rows = [
        "## Against the checkpoint in PyTorch (float32)",
        "",
        "| graph | MB | largest difference of logits | KL | same top token | same experts | shared experts | same greedy text | rise |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for dtype, graph in report["graphs"].items():
        p = graph["parity"]
        rows.append(
            f"| {dtype} | {graph['bytes'] / 1e6:,.1f} | {p['largest_difference']:.1e} | {p['kl']:.1e} | {p['argmax_agreement']:.2%}"
            f" | {p['expert_agreement']:.2%} | {p['expert_overlap']:.2%} | {p['greedy']['equal']} of {p['greedy']['prompts']}"
            f" | {round(p['delta_ce'], 4) + 0.0:+.4f} |"
        )
    first = next(iter(report["graphs"].values()))["parity"]
    rows += [
        "",
        f"Measured on {first['tokens']:,} tokens of {markdown(report['data']['path'])} in batches of 1 to 3, with and without cache and"
        f" padding; cross-entropies on {report['data']['tokens']:,} tokens ({first['ce_checkpoint']:.4f} nats per token in PyTorch)."
        " Largest difference: over tokens whose experts, and those of all earlier tokens, are the same as in PyTorch."
        " Rise: rise in cross-entropy over PyTorch. Same experts: share of tokens with identical experts in every layer."
        " Shared experts: share of a token's experts, active in the graph or in PyTorch, that are active in both.",
    ]
    return "\n".join(rows)


def _licence(conversion: Report | None) -> dict[str, Any]:
    """Return the base's licence and language from the checkpoint's report."""
    if conversion is None:
        return {}
    base = conversion.base
    found: dict[str, Any] = {"license": _line(base.license), "license_name": _line(base.license_name)}
    link, language = _line(base.license_link), base.language
    found["license_link"] = link if link and _WEB.fullmatch(link) else None
    found["language"] = [line for one in language if (line := _line(one))] if isinstance(language, list) else _line(language)
    return {key: value for key, value in found.items() if value}


def _line(value: Any) -> str | None:
    """Return a string as one line of printable text, None for an empty string or another type."""
    return printable(" ".join(value.split())) or None if isinstance(value, str) else None


def _conversion(conversion: Report | None) -> str:
    """Return a sentence on the conversion from the checkpoint's report, empty if the figures are missing."""
    if conversion is None or conversion.fidelity is None or conversion.reliance is None:
        return ""
    fidelity, sentence = conversion.fidelity, _line(conversion.reliance.sentence)
    converted, base, tokens = fidelity.ce_converted, fidelity.ce_base, fidelity.tokens
    if sentence is None or converted is None or base is None or not math.isfinite(converted + base):
        return ""
    return (
        f"The conversion: cross-entropy {converted:.4f} nats per token, {base:.4f} of the base model, on {tokens:,} held-out"
        f" tokens. Verdict: {markdown(sentence)}."
    )


def _more(report: Mapping[str, Any]) -> str:
    """Return further Python examples, for the experts and steering that the graph supports."""
    lines = []
    if any(name.startswith("experts.") for name in report["outputs"]):
        lines.append(
            'values, indices = model.encode("some text")[LAYER]  # the active experts of each token, and their coefficients'
        )
    if "steering" in next(iter(report["graphs"].values()))["parity"]:
        lines.append('model.generate("some text", steering=[{"layer": LAYER, "expert": EXPERT, "add": 5.0}])')
    return "\n```python\n" + "\n".join(lines) + "\n```\n" if lines else ""
