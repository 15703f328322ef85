"""README.md of an exported folder: what it is, what was measured, how to run it. Figures are from onnx_report.json and the checkpoint's report."""

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

Python, onnxruntime alone (`pip install onnxruntime tokenizers && pip install --no-deps mxd-convert`; torch is not needed):

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

onnxruntime-genai reads the folder as it is; where the model's texts begin with a special token, ask its tokenizer for that with
`tokenizer.update_options(add_special_tokens="true")`.
"""


_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
_WEB = re.compile(r"https?://[^\s<>\"'`]+")


def write_card(folder: Path, report: Mapping[str, Any], conversion: Report | None) -> None:
    """Write README.md into an exported folder. conversion: the checkpoint's own report, whose text may come from anyone."""
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
        f"MLPs of {base} are replaced by interpretable layers (checkpoint {markdown(report['checkpoint'])}, made by mxd-convert);"
        " they are part of the graph, which is why config.json names the base's own model type,"
        f" {markdown(report['model_type'])}. Opset {report['opset']}; one graph serves the prompt and what is written after it.",
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
    """The table of parity."""
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
        f"On {first['tokens']:,} tokens of {markdown(report['data']['path'])} in batches of 1 to 3, with and without a cache and padding;"
        f" cross-entropies on {report['data']['tokens']:,} ({first['ce_checkpoint']:.4f} in PyTorch)."
        " The largest difference is over tokens that have the same experts as in PyTorch, as have all tokens before them."
        " Rise: of the cross-entropy. Same experts: the share of tokens with the same ones in every layer; shared: of a token's experts,"
        " how many both have.",
    ]
    return "\n".join(rows)


def _licence(conversion: Report | None) -> dict[str, Any]:
    """The base's licence and language, as the checkpoint's report has them."""
    if conversion is None:
        return {}
    base = conversion.base
    found: dict[str, Any] = {"license": _line(base.license), "license_name": _line(base.license_name)}
    link, language = _line(base.license_link), base.language
    found["license_link"] = link if link and _WEB.fullmatch(link) else None
    found["language"] = [line for one in language if (line := _line(one))] if isinstance(language, list) else _line(language)
    return {key: value for key, value in found.items() if value}


def _line(value: Any) -> str | None:
    """A value as one line of text; None where it is no text."""
    return printable(" ".join(value.split())) or None if isinstance(value, str) else None


def _conversion(conversion: Report | None) -> str:
    """What the checkpoint's own report says of the conversion, in a sentence; empty where it has no such figures."""
    if conversion is None or conversion.fidelity is None or conversion.reliance is None:
        return ""
    fidelity, sentence = conversion.fidelity, _line(conversion.reliance.sentence)
    converted, base, tokens = fidelity.ce_converted, fidelity.ce_base, fidelity.tokens
    if sentence is None or converted is None or base is None or not math.isfinite(converted + base):
        return ""
    return (
        f"The conversion itself: cross-entropy {converted:.4f} where the base has {base:.4f}, on {tokens:,} held-out tokens;"
        f" {markdown(sentence)}."
    )


def _more(report: Mapping[str, Any]) -> str:
    lines = []
    if any(name.startswith("experts.") for name in report["outputs"]):
        lines.append(
            'values, indices = model.encode("some text")[LAYER]  # the active experts of each token, and their coefficients'
        )
    if "steering" in next(iter(report["graphs"].values()))["parity"]:
        lines.append('model.generate("some text", steering=[{"layer": LAYER, "expert": EXPERT, "add": 5.0}])')
    return "\n```python\n" + "\n".join(lines) + "\n```\n" if lines else ""
