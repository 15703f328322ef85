"""What the user asked for: one frozen model per section, strict, written back in full.

`load.py` reads one from YAML. Nothing heavy is imported here.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from mxd_convert.recipe.kinds import KINDS, Kind

Positive = Annotated[int, Field(gt=0, le=10**13)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# what `train.preset` fills in, by section
PRESET_KEYS = {"layer": ("hidden",), "train": ("lr", "batch_tokens", "warmup_steps", "schedule", "init", "k_init", "joint")}


# keys of recipes before version 0.2, which checkpoints of that time still hold
RENAMED = {"train.start": "train.init", "train.k_start": "train.k_init", "train.finish": "train.joint"}


class Section(BaseModel):
    """Common rules: no unknown keys, no silent conversions, no change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Mlp(Section):
    """Where a family that this package does not know keeps its MLPs, and what they compute."""

    module: str
    """Path of a layer's MLP, {i} for the layer: "model.layers.{i}.mlp". Where the MLP is no module of its own: that of what holds its parts."""
    up: str
    """Its projection to the hidden units (of a GLU, the one without activation), by its name in that module."""
    down: str
    """Its projection back from the hidden units."""
    gate: str | None = None
    """The activated projection of a GLU; null: a plain MLP. The same name as `up`: both in one matrix, the gate's half first."""
    activation: str
    """Activation of the hidden units, by its name in transformers: gelu, gelu_new, relu, silu."""
    chain: list[str] = []
    """Where the MLP is no module of its own, or one that does more: the modules it consists of, as they run: [fc1, activation_fn, fc2]."""
    norm: str | None = None
    """Path of the model's last norm; needed only to see what experts do to the logits."""
    after: str | None = None
    """Norm between the MLP's output and the residual stream, by its name in the decoder layer; null: none."""

    @model_validator(mode="after")
    def _of_a_layer(self) -> "Mlp":
        if re.fullmatch(r"(\w+\.)*\{i\}(\.\w+)*", self.module) is None:
            raise ValueError(
                f'base.mlp.module: {self.module!r:.80} is not the path of a module of every layer: "model.layers.{{i}}.mlp"'
            )
        if len(self.chain) == 1:
            raise ValueError(f"base.mlp.chain: {self.chain[0]!r} alone is a module; name it in base.mlp.module")
        return self


class Base(Section):
    model: str
    """The pretrained model: a Hub id (openai-community/gpt2) or a local folder."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Precision in which the base model runs while activations are harvested; the checkpoint keeps the base's own."""
    trust_remote_code: bool = False
    """Run code that comes with the base model. Only for repositories you trust."""
    mlp: Mlp | None = None
    """Where the MLPs are, for a family that this package does not know; null: one that it knows."""


class Text(Section):
    path: str = "Skylion007/openwebtext"
    """A Hub dataset, or a local .txt, .jsonl (also .gz) or .parquet file, a folder of such files, or a glob."""
    config: str | None = None
    """Configuration of a Hub dataset that has several (wikitext-103-raw-v1); null: its default."""
    split: str | None = "train"
    """Split of a Hub dataset."""
    text: str = "text"
    """Field that holds the text of a document (.jsonl, .parquet, Hub datasets)."""
    missing: Literal["refuse", "skip"] = "refuse"
    """Rows whose field is null or missing: refuse the data, naming the first, or skip them. `run` reports how many were skipped."""

    @model_validator(mode="after")
    def _config_of_a_dataset(self) -> "Text":
        _check_config("data.train", self.path, self.config)
        return self


class EvalText(Section):
    path: str | None = None
    """Held-out text. Without a path, a tenth of the training documents, chosen by content, is held out."""
    config: str | None = None
    """Configuration of a Hub dataset that has several (wikitext-103-raw-v1); null: its default."""
    split: str | None = None
    """Split of a Hub dataset."""
    text: str = "text"
    """Field that holds the text of a document."""
    missing: Literal["refuse", "skip"] = "refuse"
    """Rows whose field is null or missing: refuse the data, naming the first, or skip them."""
    tokens: Positive = 262_144
    """Tokens to evaluate on."""

    @model_validator(mode="after")
    def _config_of_a_dataset(self) -> "EvalText":
        _check_config("data.eval", self.path, self.config)
        return self


def _check_config(part: str, path: str | None, config: str | None) -> None:
    if config is not None and (path is None or is_local(path)):
        text = "no dataset is named" if path is None else f"{path} is local, and only datasets of the Hub have configurations"
        raise ValueError(f"{part}.config: {config!r} is given, but {text}; set {part}.config: null, or {part}.path to a dataset")


class Data(Section):
    train: Text = Text()
    """Training text."""
    eval: EvalText = EvalText()
    """Evaluation text; it never overlaps the training text."""
    context: Annotated[int, Field(ge=2)] = 128
    """Tokens in a block, the unit in which the base model reads the text."""
    tokens: Positive = 480_000_000
    """Tokens to train on, in blocks drawn at random from as many tokens of the text, or from 4 million where that is more.
    Text that has fewer is repeated in a new order."""


def _known_kind(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"layer.kind: {kind!r} is not one of {', '.join(KINDS)}")
    return kind


class Layer(Section):
    kind: Annotated[str, AfterValidator(_known_kind), Field(json_schema_extra={"enum": list(KINDS)})] = "mxd"
    """What replaces the MLP: an MxD, or one of what it is compared with: a TopK transcoder, one with a linear path beside it, the MxD with constant
    gain, or with a gate that is drawn at random and not trained."""
    k: Positive = 32
    """Active experts (a transcoder's latents) a token; not used with `sparsity: l1`."""
    experts: Positive | Literal["auto"] = "auto"
    """Number of experts or latents; auto: as many as make no more parameters than a plain transcoder of `expansion` x the MLP's input width has."""
    expansion: Positive = 32
    """Width of the transcoder whose parameters `experts: auto` matches, in multiples of the MLP's input width."""
    hidden: Positive | None = None
    """Hidden width of the experts; null: a quarter of the base MLP's (of the narrowest, where they differ) with `train.preset: fast`, all of
    it with `paper`."""
    activation: str | None = None
    """Activation of the hidden units, by its name in transformers; null: the base MLP's."""
    sparsity: Literal["topk", "l1"] = "topk"
    """topk: the k largest positive gates. l1: every positive gate, with an L1 penalty in the loss."""
    l1: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0e-3
    """Weight of the L1 penalty; only with `sparsity: l1`."""
    skip: bool = False
    """Add a linear path from the MLP's input to its output beside the experts."""

    @property
    def facts(self) -> Kind:
        """The row of the kind in the table of kinds."""
        return KINDS[self.kind]

    @property
    def has_skip(self) -> bool:
        return self.skip or self.facts.has_skip

    @property
    def size_key(self) -> str:
        """The key that decides how many experts there are, by its full name."""
        return "layer.expansion" if self.experts == "auto" else "layer.experts"

    @property
    def size(self) -> int:
        """What that key is set to."""
        return self.expansion if self.experts == "auto" else self.experts

    @model_validator(mode="after")
    def _one_name_a_thing(self) -> "Layer":
        if self.kind == "transcoder" and self.skip:
            raise ValueError(
                "layer.skip: a transcoder with a linear path is layer.kind: skip_transcoder; set that, or layer.skip: false"
            )
        return self

    @model_validator(mode="after")
    def _k_fits(self) -> "Layer":
        has_k = self.facts.has_experts and self.sparsity == "topk"
        if isinstance(self.experts, int) and self.k > self.experts and has_k:
            raise ValueError(f"layer.k: {self.k} active experts of only {self.experts}; lower layer.k or raise layer.experts")
        return self


class Train(Section):
    preset: Literal["fast", "paper"] = "fast"
    """fast: our settings, by rule from the width and the token budget. paper: the published procedure. A key set below wins."""
    lr: Rate | None = None
    """Peak learning rate; null: the preset's."""
    batch_tokens: Annotated[int, Field(gt=0, le=2**26)] | None = None
    """Tokens in a training step; null: the preset's."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear warm-up; null: the preset's."""
    schedule: Literal["constant", "linear", "trapezoid", "cosine"] | None = None
    """Learning rate after the warm-up, until the joint stage; trapezoid: constant, then linear to zero over the last fifth; null: the preset's."""
    init: Literal["tokens", "paper"] | None = None
    """Initialisation. tokens: each expert is initialised from one training token, near-duplicate tokens skipped: its gate detects the
    token's input, its row gives that token's output. paper: gate and experts at random, D at 0, experts of unit norm throughout.
    null: the preset's."""
    k_init: Positive | None = None
    """Active experts per token at the first step. Their number falls evenly to layer.k by half of the steps before the joint stage;
    null: the preset's."""
    joint: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Joint stage: the share of the steps, at the end, in which all layers are trained together in the model, on the base's
    next-token distribution; null: the preset's."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the layers' products in bfloat16, weights and optimiser in fp32."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initialisation and of the order of the text."""
    mask_bos: bool = True
    """Leave BOS tokens and the first position of each block out of the layers' losses: attention sinks, whose norms dwarf all others. A
    KL of the joint stage counts all tokens."""
    order: Literal["parallel", "sequential"] = "parallel"
    """parallel: each layer on the base model's own activations. sequential: on inputs from the layers already converted."""
    target: Literal["local", "teacher"] = "local"
    """What a layer of a sequential run learns: the MLP's output on that input (local) or on the base's own (teacher)."""
    distribute: Literal["data", "layers"] = "data"
    """What several processes share out: every batch (data), or the layers, each process training its own on all of the text (layers)."""
    memory_gib: Rate | None = None
    """Memory that a process may take for the training (on a GPU: of the device). Layers that do not fit together are trained in groups,
    one pass over the text each, to the same result; the joint stage takes all of them at once. null: nine tenths of what is free when the run
    starts, which is the most in any case."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Precision of AdamW's moments; with bf16, weight and moments take 8 bytes a parameter in place of 12."""
    checkpoint_every: Positive = 1000
    """Steps between saved states, from which a killed run goes on."""
    log_every: Positive = 10
    """Steps between lines of training_log.jsonl."""
    twin: bool = False
    """Also train the dense twin, the same layers with constant gain on the same text: what the experts must beat. It is measured, not kept."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where else the log goes, through accelerate."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto: a CUDA device if there is one. (Apple's MPS lacks the float64 that our figures are summed in.)"""


class Output(Section):
    dir: str | None = None
    """Folder of the finished checkpoint; null: runs/<name of the base>-mxd in the working directory."""
    onnx: bool = False
    """Also export to ONNX in float32, in <dir>/onnx, as `mxd-convert export-onnx` does."""
    dashboard: bool = False
    """Also write the dashboard, in <dir>/dashboard, on the held-out text."""
    push_to: str | None = None
    """Repository on the Hub to publish to when the run has finished, as `mxd-convert push` does: owner/name, or a name of your own."""


class Recipe(Section):
    """One conversion. Every key has a default but base.model."""

    base: Base
    """The pretrained model to convert."""
    data: Data = Data()
    """Text to train and to evaluate on."""
    layers: str | int | list[int] = "all"
    """Layers to convert: all, [3, 4], or a range such as "0-5"."""
    layer: Layer = Layer()
    """The layer that replaces each MLP."""
    train: Train = Train()
    """How the layers are trained."""
    output: Output = Output()
    """Where the result goes."""
    _references: dict[str, str] = PrivateAttr(default_factory=dict)
    _resolved: bool = PrivateAttr(default=False)

    @property
    def is_resolved(self) -> bool:
        """Whether its paths are absolute and ${VAR} is expanded: whether `load_recipe` has made it."""
        return self._resolved

    def mark_resolved(self, references: dict[str, str]) -> None:
        self._references, self._resolved = references, True

    @property
    def references(self) -> dict[str, str]:
        """Strings as they were before ${VAR} was expanded in them, by key ("data.train.path"): what is published in place of the value."""
        return self._references

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        layer_indices(self.layers, None)
        train = self.train
        if train.joint and self.layer.sparsity == "l1" and self.layer.facts.has_experts:
            raise ValueError(
                "train.joint: nothing holds the number of active experts down there with layer.sparsity: l1; set train.joint: 0"
            )
        if train.k_init is not None and train.k_init < self.layer.k:
            raise ValueError(
                f"train.k_init: {train.k_init} active experts at the start, fewer than layer.k ({self.layer.k}); raise it to at least that"
            )
        if train.target == "teacher" and train.order == "parallel":
            raise ValueError(
                'train.target: "teacher" needs train.order: sequential; in parallel order every layer sees the base model\'s own inputs,'
                " for which both targets are the same"
            )
        if train.twin and not self.layer.facts.is_product:
            raise ValueError(
                f"train.twin: a {self.layer.kind} has no gain to hold constant; set train.twin: false or layer.kind: mxd"
            )
        if train.order == "sequential" and train.distribute == "layers":
            raise ValueError(
                'train.distribute: "layers" can\'t be had with train.order: sequential, where each layer waits for those below it;'
                ' set one of them to its default ("data", "parallel")'
            )
        if self.output.dashboard and not self.layer.facts.has_experts:
            raise ValueError(f"output.dashboard: a {self.layer.kind} has no experts to show; set it to false")
        if self.data.eval.tokens < self.data.context:
            raise ValueError(
                f"data.eval.tokens: {self.data.eval.tokens} is less than one block of data.context = {self.data.context} tokens"
            )
        if self.train.batch_tokens is not None and self.train.batch_tokens < self.data.context:
            batch = self.train.batch_tokens
            raise ValueError(f"train.batch_tokens: {batch} is less than one block of data.context = {self.data.context} tokens")
        return self

    def published(self) -> dict[str, Any]:
        """The recipe in full as it goes into a checkpoint: paths of this machine cut down to their last part, ${VAR} not expanded."""
        content = self.model_dump()
        for section, key in ((content["base"], "model"), (content["data"]["train"], "path"), (content["data"]["eval"], "path")):
            if section[key] is not None and is_local(section[key]):
                section[key] = Path(section[key]).name
        content["output"]["dir"] = Path(self.output.dir).name if self.output.dir else None
        content["output"]["push_to"] = None  # whoever runs it again is somebody else
        for key, text in self.references.items():
            *sections, last = key.split(".")
            place: Any = content
            for section in sections:
                place = place[int(section) if isinstance(place, list) else section]
            if sections[:1] != ["output"]:
                place[int(last) if isinstance(place, list) else last] = text
        return content

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.published(), sort_keys=False)

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the result, local paths in full: what a resumed run must have in common."""
        return _sha256(_deciding(self.model_dump()))

    def published_sha256(self) -> str:
        """SHA-256 of what decides the result in the published recipe: the report's `recipe_sha256`."""
        return _sha256(_deciding(self.published()))


# how the work is done, not what comes out (but for rounding): a run may go on with others
_MEANS = ("distribute", "memory_gib", "checkpoint_every", "tracker")


def _deciding(content: dict[str, Any]) -> dict[str, Any]:
    train = {key: value for key, value in content["train"].items() if key not in _MEANS}
    train = {
        key: value for key, value in train.items() if value or key not in ("init", "k_init", "joint")
    }  # as before there were
    base = {key: value for key, value in content["base"].items() if key != "mlp" or value is not None}  # as before there was one
    data = {**content["data"], **{part: _as_before(content["data"][part]) for part in ("train", "eval")}}
    return {**{key: value for key, value in content.items() if key != "output"}, "train": train, "base": base, "data": data}


def _as_before(text: dict[str, Any]) -> dict[str, Any]:
    """A text's keys without those that are newer than the fingerprints of old checkpoints, where they say what was the case then."""
    return {key: value for key, value in text.items() if (key, value) not in (("config", None), ("missing", "refuse"))}


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


MOST_LAYERS = 100_000


def layer_indices(layers: str | int | list[int], count: int | None) -> list[int]:
    """The layers that a recipe names, ascending. count: layers of the model, or None to check only how they are written."""
    if layers == "all":
        return list(range(count or 0))
    if isinstance(layers, list):
        indices = list(layers)
    else:
        indices = []
        for part in str(layers).split(","):
            match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
            if match is None:
                raise ValueError(f'layers: {layers!r} is not understood; write all, [3, 4] or a range such as "0-5"')
            first, last = int(match[1]), int(match[2] or match[1])
            if last > MOST_LAYERS:
                raise ValueError(f"layers: {last} is out of range; no model has that many layers")
            if last < first:
                raise ValueError(f"layers: the range {part.strip()} runs backwards; write {last}-{first}")
            indices += range(first, last + 1)
    if not indices:
        raise ValueError("layers: the list is empty; name at least one layer, or all")
    if len(set(indices)) != len(indices):
        raise ValueError(f"layers: {layers!r} names a layer twice")
    for index in indices:
        if index < 0 or (count is not None and index >= count):
            raise ValueError(
                f"layers: {index} is out of range"
                + (f"; the base model has layers 0 to {count - 1}" if count is not None else "")
            )
    return sorted(indices)


def is_local(path: str) -> bool:
    """Whether `path` names something on this machine rather than on the Hub (resolved recipes hold absolute local paths)."""
    return os.path.isabs(path)


def json_schema() -> dict[str, Any]:
    """The recipe's JSON schema, as kept in docs/recipe.schema.json for editors."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "mxd-convert recipe"}
