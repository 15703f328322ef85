"""The recipe: one frozen, strict pydantic model per section.

The string below each key is its documentation, also in docs/recipe.schema.json and in recipes that `init` writes.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from mxd_convert.recipe.kinds import KINDS, Kind, check_kind

Positive = Annotated[int, Field(gt=0, le=10**13)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Keys that `train.preset` fills in, by section.
PRESET_KEYS = {"layer": ("hidden",), "train": ("lr", "batch_tokens", "warmup_steps", "schedule", "init", "k_init", "joint")}

# Old and new names of keys. Recipes before version 0.2, also those in checkpoints, have the old names.
RENAMED = {"train.start": "train.init", "train.k_start": "train.k_init", "train.finish": "train.joint"}


class Section(BaseModel):
    """Base class of all sections. Unknown keys and implicit type conversions are errors, and instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Mlp(Section):
    """The MLPs of a model family that mxd-convert does not know: their modules and activation."""

    module: str
    """Path of the MLP module, {i} for the layer: "model.layers.{i}.mlp". Without an MLP module: of the projections' parent."""
    up: str
    """Name of the up-projection within that module. In a GLU: the projection that has no activation."""
    down: str
    """Name of the down-projection within that module."""
    gate: str | None = None
    """Name of a GLU's gate projection; null: not a GLU. If one matrix contains both, the gate first: the same name as `up`."""
    activation: str
    """Activation of the hidden units, by its transformers name: gelu, gelu_new, relu, silu."""
    chain: list[str] = []
    """Modules that form the MLP, in execution order: [fc1, activation_fn, fc2]. Only needed if no single module is the MLP."""
    norm: str | None = None
    """Path of the model's final norm. Only needed to compute the effect of experts on the logits."""
    after: str | None = None
    """Name, within the decoder layer, of the norm between the MLP's output and the residual stream; null: no norm."""

    @model_validator(mode="after")
    def _of_a_layer(self) -> "Mlp":
        if re.fullmatch(r"(\w+\.)*\{i\}(\.\w+)*", self.module) is None:
            raise ValueError(
                f'base.mlp.module: {self.module!r:.80} is not a path with {{i}} as the layer index. Write it as in "model.layers.{{i}}.mlp".'
            )
        if len(self.chain) == 1:
            raise ValueError(
                f"base.mlp.chain: {self.chain[0]!r} alone is not a chain. Name it in base.mlp.module and remove the chain."
            )
        return self


class Base(Section):
    """The pretrained model to convert."""

    model: str
    """Pretrained model: a Hub id (openai-community/gpt2) or a local folder."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub; null: the default branch."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Precision of the base model while activations are captured; auto: as it was saved. The checkpoint keeps the base's own."""
    trust_remote_code: bool = False
    """Run code that comes with the base model. Enable it only for repositories that you trust."""
    mlp: Mlp | None = None
    """MLPs of a model family that mxd-convert does not know; null: the family is known."""


class Text(Section):
    """A text to train on."""

    path: str = "Skylion007/openwebtext"
    """A Hub dataset, or a local .txt, .jsonl (both also .gz) or .parquet file, a folder of such files, or a glob."""
    config: str | None = None
    """Configuration of a Hub dataset that has several (wikitext-103-raw-v1); null: the dataset's default."""
    split: str | None = "train"
    """Split of a Hub dataset; null: train."""
    text: str = "text"
    """Field that contains the text of a document (.jsonl, .parquet, Hub datasets)."""
    missing: Literal["refuse", "skip"] = "refuse"
    """Rows whose text is missing or null. refuse: stop with an error. skip: leave them out and report their number."""

    @model_validator(mode="after")
    def _config_of_a_dataset(self) -> "Text":
        _check_config("data.train", self.path, self.config)
        return self


class EvalText(Section):
    """A text to evaluate on."""

    path: str | None = None
    """As data.train.path, for evaluation; null: a tenth of the training documents, chosen by content, is held out."""
    config: str | None = None
    """Configuration of a Hub dataset that has several (wikitext-103-raw-v1); null: the dataset's default."""
    split: str | None = None
    """Split of a Hub dataset; null: train."""
    text: str = "text"
    """Field that contains the text of a document (.jsonl, .parquet, Hub datasets)."""
    missing: Literal["refuse", "skip"] = "refuse"
    """Rows whose text is missing or null. refuse: stop with an error. skip: leave them out and report their number."""
    tokens: Positive = 262_144
    """Number of tokens to evaluate on."""

    @model_validator(mode="after")
    def _config_of_a_dataset(self) -> "EvalText":
        _check_config("data.eval", self.path, self.config)
        return self


def _check_config(section: str, path: str | None, config: str | None) -> None:
    if config is not None and (path is None or is_local(path)):
        text = "no dataset is named" if path is None else f"{path} is local, and only Hub datasets have configurations"
        raise ValueError(
            f"{section}.config: {config!r} is given, but {text}. Set {section}.config: null, or set {section}.path to a Hub dataset."
        )


class Data(Section):
    """Text to train and to evaluate on."""

    train: Text = Text()
    """Training text."""
    eval: EvalText = EvalText()
    """Evaluation text. It never overlaps the training text."""
    context: Annotated[int, Field(ge=2)] = 128
    """Block length in tokens: the base model reads the text in blocks of this length."""
    tokens: Positive = 480_000_000
    """Number of tokens to train on. Blocks are drawn at random from that many tokens of the text, and from at least 4 million. A
    shorter text is repeated in a new order."""


class Layer(Section):
    """The layer that replaces each MLP."""

    kind: Annotated[str, AfterValidator(check_kind), Field(json_schema_extra={"enum": list(KINDS)})] = "mxd"
    """Kind of layer. mxd: Mixture of Decoders. Baselines: transcoder (TopK), skip_transcoder (a transcoder with a linear skip
    path), dense_twin (an MxD with constant gain) and random_gate (an MxD with a random, untrained gate)."""
    k: Positive = 32
    """Active experts (for a transcoder: latents) per token. Not used with `sparsity: l1`."""
    experts: Positive | Literal["auto"] = "auto"
    """Number of experts (for a transcoder: latents). auto: the most that fit the parameter count of a plain transcoder of width
    `expansion` x the MLP's input width."""
    expansion: Positive = 32
    """Width of the transcoder whose parameter count `experts: auto` matches, in multiples of the MLP's input width."""
    hidden: Positive | None = None
    """Number of hidden units; null: a quarter of the narrowest MLP's with `train.preset: fast`, all of the MLP's with `paper`."""
    activation: str | None = None
    """Activation of the hidden units, by its transformers name; null: the base MLP's activation."""
    sparsity: Literal["topk", "l1"] = "topk"
    """topk: the k largest gate values are active, if positive. l1: all positive gate values, with an L1 penalty in the loss."""
    l1: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0e-3
    """Weight of the L1 penalty. Only used with `sparsity: l1`."""
    skip: bool = False
    """Add a linear skip path from the layer's input to its output."""

    @property
    def traits(self) -> Kind:
        """Return the kind's row in the table of kinds."""
        return KINDS[self.kind]

    @property
    def has_skip(self) -> bool:
        """Return whether the layer has a linear skip path, by `skip` or by its kind."""
        return self.skip or self.traits.has_skip

    @property
    def size_key(self) -> str:
        """Return the full name of the key that sets the number of experts."""
        return "layer.expansion" if self.experts == "auto" else "layer.experts"

    @property
    def size(self) -> int:
        """Return the value of the key `size_key`."""
        return self.expansion if self.experts == "auto" else self.experts

    @model_validator(mode="after")
    def _one_name_a_thing(self) -> "Layer":
        if self.kind == "transcoder" and self.skip:
            raise ValueError(
                "layer.skip: true can't be used with layer.kind: transcoder. Set layer.kind: skip_transcoder, or layer.skip: false."
            )
        return self

    @model_validator(mode="after")
    def _k_fits(self) -> "Layer":
        has_k = self.traits.has_experts and self.sparsity == "topk"
        if isinstance(self.experts, int) and self.k > self.experts and has_k:
            raise ValueError(f"layer.k: {self.k} exceeds layer.experts ({self.experts}). Lower layer.k or raise layer.experts.")
        return self


class Train(Section):
    """How the layers are trained."""

    preset: Literal["fast", "paper"] = "fast"
    """Source of the settings that are null. fast: rules based on width and token budget. paper: the published settings."""
    lr: Rate | None = None
    """Peak learning rate; null: set by the preset."""
    batch_tokens: Annotated[int, Field(gt=0, le=2**26)] | None = None
    """Tokens per training step; null: set by the preset."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear warm-up; null: set by the preset."""
    schedule: Literal["constant", "linear", "trapezoid", "cosine"] | None = None
    """Learning rate after the warm-up. trapezoid: constant, then linear to zero over the last fifth before the joint stage. null:
    set by the preset."""
    init: Literal["tokens", "paper"] | None = None
    """Initialisation. tokens: each expert is initialised from one training token; its gate detects the token's input, and its row
    gives the token's output. Near-duplicate tokens are skipped. paper: random gate and experts, D at zero, and experts kept at
    unit norm. null: set by the preset."""
    k_init: Positive | None = None
    """Active experts per token at the first step. The number falls linearly to layer.k over the first half of the steps before
    the joint stage. null: set by the preset."""
    joint: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Joint stage: the share of the steps, at the end of the run, in which all layers are trained together in the model, to match
    the base's next-token distribution. 0: no joint stage; null: set by the preset."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the layers' matrix products. With bf16, weights and optimiser state stay in float32."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the initialisation and of the order of the text."""
    mask_bos: bool = True
    """Exclude BOS tokens and the first position of each block from the layers' losses. They are attention sinks, whose norms
    dwarf all others. The KL divergence of the joint stage includes them."""
    order: Literal["parallel", "sequential"] = "parallel"
    """Inputs of the layers. parallel: from the base model. sequential: from the model with all earlier layers replaced."""
    target: Literal["local", "teacher"] = "local"
    """Targets in sequential order. local: the MLP's output for the layer's own input. teacher: the output in the base model."""
    distribute: Literal["data", "layers"] = "data"
    """Division of work among processes. data: each batch is split. layers: each process trains its own layers on all text."""
    memory_gib: Rate | None = None
    """Memory limit per process during training, in GiB (on a GPU: device memory). If the layers exceed it, they are trained in
    groups, one pass over the text each, with the same result. The joint stage needs all layers at once. null: nine tenths of the
    memory that is free at the start of the run, which is also the maximum."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Precision of AdamW's moments. With bf16, weight and moments take 8 bytes per parameter instead of 12."""
    checkpoint_every: Positive = 1000
    """Steps between saved states. An interrupted run resumes from the last one."""
    log_every: Positive = 10
    """Steps between lines of training_log.jsonl."""
    twin: bool = False
    """Also train the dense twin, the same layers with constant gain, as a baseline. It is evaluated, but not saved."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Experiment tracker that receives the log too, through accelerate."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto: CUDA if available. Apple's MPS is not supported, because results are summed in float64."""


class Output(Section):
    """Where the result goes."""

    dir: str | None = None
    """Folder of the finished checkpoint; null: runs/<base name>-mxd in the working directory."""
    onnx: bool = False
    """Also export to ONNX in float32, to <dir>/onnx, as `mxd-convert export-onnx` does."""
    dashboard: bool = False
    """Also write the dashboard of all experts on the held-out text, to <dir>/dashboard."""
    push_to: str | None = None
    """Hub repository to publish to, as `mxd-convert push` does: owner/name, or a name in your own account; null: none."""


class Recipe(Section):
    """All settings of one conversion. Every key except base.model has a default."""

    base: Base
    """The pretrained model to convert."""
    data: Data = Data()
    """Text to train and to evaluate on."""
    layers: str | int | list[int] = "all"
    """Layers to convert: all, one index, a list such as [3, 4], or a range such as "0-5"."""
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
        """Return whether paths are absolute and ${VAR} is expanded, as `load_recipe` leaves them."""
        return self._resolved

    def mark_resolved(self, references: dict[str, str]) -> None:
        """Mark the recipe as resolved and keep `references`, the strings that contained ${VAR}, by key."""
        self._references, self._resolved = references, True

    @property
    def references(self) -> dict[str, str]:
        """Return the strings with ${VAR}, unexpanded, by key ("data.train.path"). They are published instead of their values."""
        return self._references

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        layer_indices(self.layers, None)
        train = self.train
        if train.joint and self.layer.sparsity == "l1" and self.layer.traits.has_experts:
            raise ValueError(
                f"train.joint: {train.joint} can't be used with layer.sparsity: l1, because no loss of the joint stage limits the number of"
                " active experts. Set train.joint: 0."
            )
        if train.k_init is not None and train.k_init < self.layer.k:
            raise ValueError(
                f"train.k_init: {train.k_init} is less than layer.k ({self.layer.k}). Set train.k_init to {self.layer.k} or more."
            )
        if train.target == "teacher" and train.order == "parallel":
            raise ValueError(
                "train.target: teacher requires train.order: sequential. In parallel order both targets are the same. Set train.target: local."
            )
        if train.twin and not self.layer.traits.is_product:
            raise ValueError(
                f"train.twin: true can't be used with layer.kind: {self.layer.kind}, which has no dense twin."
                " Set train.twin: false or layer.kind: mxd."
            )
        if train.order == "sequential" and train.distribute == "layers":
            raise ValueError(
                "train.distribute: layers can't be used with train.order: sequential, in which each layer needs the layers below it."
                " Set train.distribute: data or train.order: parallel."
            )
        if self.output.dashboard and not self.layer.traits.has_experts:
            raise ValueError(f"output.dashboard: a {self.layer.kind} has no experts to show. Set output.dashboard: false.")
        if self.data.eval.tokens < self.data.context:
            raise ValueError(
                f"data.eval.tokens: {self.data.eval.tokens} is less than one block of {self.data.context} tokens. Raise it, or lower data.context."
            )
        if self.train.batch_tokens is not None and self.train.batch_tokens < self.data.context:
            batch = self.train.batch_tokens
            raise ValueError(
                f"train.batch_tokens: {batch} is less than one block of {self.data.context} tokens. Raise it, or lower data.context."
            )
        return self

    def published(self) -> dict[str, Any]:
        """Return all settings as published in the checkpoint: local paths reduced to the last component, ${VAR} not expanded."""
        content = self.model_dump()
        for section, key in ((content["base"], "model"), (content["data"]["train"], "path"), (content["data"]["eval"], "path")):
            if section[key] is not None and is_local(section[key]):
                section[key] = Path(section[key]).name
        content["output"]["dir"] = Path(self.output.dir).name if self.output.dir else None
        content["output"]["push_to"] = None  # another user publishes to another repository
        for key, text in self.references.items():
            *sections, last = key.split(".")
            parent: Any = content
            for section in sections:
                parent = parent[int(section) if isinstance(parent, list) else section]
            if sections[:1] != ["output"]:
                parent[int(last) if isinstance(parent, list) else last] = text
        return content

    def to_yaml(self) -> str:
        """Return the published settings as YAML."""
        return yaml.safe_dump(self.published(), sort_keys=False)

    def fingerprint(self) -> str:
        """Return the SHA-256 of all settings that determine the result, with full local paths. It must match to resume a run."""
        return _sha256(_deciding(self.model_dump()))

    def published_sha256(self) -> str:
        """Return the SHA-256 of the published settings that determine the result: the report's `recipe_sha256`."""
        return _sha256(_deciding(self.published()))


# Keys of `train` that don't change the result, except by rounding. They may change when a run resumes.
_MEANS = ("distribute", "memory_gib", "checkpoint_every", "tracker")


def _deciding(content: dict[str, Any]) -> dict[str, Any]:
    # Newer keys are left out at their old meaning (null, 0), so that the fingerprints of older checkpoints stay valid.
    train = {key: value for key, value in content["train"].items() if key not in _MEANS}
    train = {key: value for key, value in train.items() if value or key not in ("init", "k_init", "joint")}
    base = {key: value for key, value in content["base"].items() if key != "mlp" or value is not None}
    data = {**content["data"], **{name: _as_before(content["data"][name]) for name in ("train", "eval")}}
    return {**{key: value for key, value in content.items() if key != "output"}, "train": train, "base": base, "data": data}


def _as_before(text: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a text without `config` and `missing` where they have their defaults."""
    return {key: value for key, value in text.items() if (key, value) not in (("config", None), ("missing", "refuse"))}


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


MAX_LAYERS = 100_000  # largest layer index in a range


def layer_indices(layers: str | int | list[int], count: int | None) -> list[int]:
    """Return the layers that a recipe selects, in ascending order.

    count: number of layers of the model; None checks only the syntax. Raises ValueError.
    """
    if layers == "all":
        return list(range(count or 0))
    if isinstance(layers, list):
        indices = list(layers)
    else:
        indices = []
        for part in str(layers).split(","):
            match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
            if match is None:
                raise ValueError(f'layers: {layers!r} does not select layers. Write all, [3, 4] or a range such as "0-5".')
            first, last = int(match[1]), int(match[2] or match[1])
            if last > MAX_LAYERS:
                raise ValueError(f"layers: {last} is out of range. No model has that many layers.")
            if last < first:
                raise ValueError(f"layers: the range {part.strip()} runs backwards. Write {last}-{first}.")
            indices += range(first, last + 1)
    if not indices:
        raise ValueError("layers: the list is empty. Name at least one layer, or all.")
    if len(set(indices)) != len(indices):
        raise ValueError(f"layers: {layers!r} names a layer twice. Name each layer once.")
    for index in indices:
        if index < 0 or (count is not None and index >= count):
            raise ValueError(
                f"layers: {index} is out of range"
                + (f". The base model has layers 0 to {count - 1}." if count is not None else "")
            )
    return sorted(indices)


def is_local(path: str) -> bool:
    """Return whether `path` is local rather than a Hub id. In a resolved recipe, local paths are absolute."""
    return os.path.isabs(path)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, which editors read from docs/recipe.schema.json."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "mxd-convert recipe"}
