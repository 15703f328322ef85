"""README.md of an exported folder: what it is, what was measured, how to run it. Figures are from onnx_report.json and the checkpoint's report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from mxd_convert.checkpoint import REPORT
from mxd_convert.onnx.runtime import JS_TYPES

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


def write_card(checkpoint: Path, folder: Path, report: Mapping[str, Any]) -> None:
    """Writes README.md into an exported folder."""
    base = report["base"]["model"] or "a local model"
    data = ModelCardData(
        base_model=report["base"]["model"] if not report["base"]["local"] else None,
        **_licence(checkpoint),
        pipeline_tag="text-generation",
        tags=["onnx", "mxd", "mxd-convert", "interpretability"],
    )
    first = next(iter(report["graphs"]))
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {base} with sparse MLPs, for ONNX runtimes",
        f"MLPs of {base} are replaced by interpretable layers (checkpoint {report['checkpoint']}, made by mxd-convert); they are part of the"
        f" graph, which is why config.json names the base's own model type, {report['model_type']}. Opset {report['opset']}; one graph serves"
        " the prompt and what is written after it.",
        _measured(report),
        _conversion(checkpoint),
        _CLIENTS.format(
            folder=".",
            prompt="Once upon a time",
            more=_more(report),
            js=JS_TYPES[first],
            file=Path(report["graphs"][first]["file"]).name,
        ),
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part), encoding="utf-8")


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
        f"On {first['tokens']:,} tokens of {report['data']['path']} in batches of 1 to 3, with and without a cache and padding; cross-entropies on"
        f" {report['data']['tokens']:,} ({first['ce_checkpoint']:.4f} in PyTorch). The largest difference is over tokens that have the same experts"
        " as in PyTorch, as have all tokens before them. Rise: of the cross-entropy."
        " Same experts: the share of tokens with the same ones in every layer; shared: of a"
        " token's experts, how many both have.",
    ]
    return "\n".join(rows)


def _report_of(checkpoint: Path) -> dict[str, Any]:
    try:
        content = json.loads((checkpoint / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _licence(checkpoint: Path) -> dict[str, Any]:
    """The base's licence, as the checkpoint's report has it."""
    base = _report_of(checkpoint).get("base") or {}
    return {key: base[key] for key in ("license", "license_name", "license_link", "language") if base.get(key)}


def _conversion(checkpoint: Path) -> str:
    """What the checkpoint's own report says of the conversion, in a sentence."""
    report = _report_of(checkpoint)
    try:
        fidelity, reliance = report["fidelity"], report["reliance"]
        return (
            f"The conversion itself: cross-entropy {fidelity['ce_converted']:.4f} where the base has {fidelity['ce_base']:.4f}, on"
            f" {fidelity['tokens']:,} held-out tokens; {reliance['sentence']}."
        )
    except (KeyError, TypeError):
        return ""


def _more(report: Mapping[str, Any]) -> str:
    lines = []
    if any(name.startswith("experts.") for name in report["outputs"]):
        lines.append(
            'values, indices = model.encode("some text")[LAYER]  # the active experts of each token, and their coefficients'
        )
    if "steering" in next(iter(report["graphs"].values()))["parity"]:
        lines.append('model.generate("some text", steering=[{"layer": LAYER, "expert": EXPERT, "add": 5.0}])')
    return "\n```python\n" + "\n".join(lines) + "\n```\n" if lines else ""
