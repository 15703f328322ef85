"""The recipe: one frozen, strict pydantic model per section.

The string below each key is its documentation, also in docs/recipe.schema.json and in recipes that `init` writes.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from mxd_convert.recipe.fingerprint import sha256_of
from mxd_convert.recipe.kinds import KINDS, Kind, check_kind
from mxd_convert.recipe.section import Positive, Rate, Section, is_local
from mxd_convert.recipe.texts import Data

# Keys that `train.preset` fills in, by section.
PRESET_KEYS = {
    "layer": ("hidden", "shared_expert"),
    "train": ("lr", "batch_tokens", "warmup_steps", "schedule", "init", "k_init", "joint", "joint_lr", "jacobian", "balance"),
}

# Old and new names of keys. Recipes before version 0.2, also those in checkpoints, have the old names.
Mask = Literal["none", "bos", "special", "prompt"]
MASKED: dict[str, str] = {
    "none": "nothing",
    "bos": "BOS tokens and the first position of each block",
    "special": "special tokens and the first position of each block",
    "prompt": "BOS tokens, the first position of each block, and the prompts of chats",
}  # what each mask leaves out


def figure_mask(mask: str) -> str:
    """Return which tokens are left out of the figures of layers, for a `train.mask`. BOS and first positions always are.

    An attention sink there is so large that FVU and shares of its layer would tell of nothing else.
    """
    return "bos" if mask == "none" else mask


RENAMED = {
    "train.mask_bos": "train.mask",
    "train.start": "train.init",
    "train.k_start": "train.k_init",
    "train.finish": "train.joint",
}


GGUF = ".gguf"


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
    chain: list[str] = []  # noqa: RUF012 (pydantic copies it for each instance)
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
    """Pretrained model: a Hub id (openai-community/gpt2), a local folder, or the path of a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub; null: the default branch."""
    gguf_file: str | None = None
    """Name of a GGUF file in the folder or Hub repository `model`; null: the model is in transformers' own format. Quantised
    weights are dequantised once, into the cache."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Precision of the base model while activations are captured; auto: as it was saved. The checkpoint keeps the base's own."""
    trust_remote_code: bool = False
    """Run code that comes with the base model. Enable it only for repositories that you trust."""
    mlp: Mlp | None = None
    """MLPs of a model family that mxd-convert does not know; null: the family is known."""

    @model_validator(mode="before")
    @classmethod
    def _split_path(cls, content: Any) -> Any:
        """Split the path of a GGUF file into `model` and `gguf_file`, so that a path in `--set base.model` overrides both."""
        model = content.get("model") if isinstance(content, dict) else None
        if isinstance(model, str) and model.endswith(GGUF) and (is_local(model) or model.count("/") > 1):
            folder, _, name = model.rpartition("/")
            return {**content, "model": folder or "/", "gguf_file": name}
        return content

    @model_validator(mode="after")
    def _file_in_the_model(self) -> "Base":
        name = self.gguf_file
        if name is not None and (not name.endswith(GGUF) or is_local(name) or ".." in name.split("/")):
            raise ValueError(
                f"base.gguf_file: {name!r:.80} is not the name of a {GGUF} file in {self.model}. Write it as in model-Q4_1.gguf."
            )
        return self

    @property
    def is_local(self) -> bool:
        """Return whether the model is local rather than on the Hub."""
        return is_local(self.model)

    @property
    def path(self) -> str:
        """Return the model's folder, file or Hub id, from which `Base(model=path)` gives the same model."""
        return self.model if self.gguf_file is None else f"{self.model}/{self.gguf_file}"

    @property
    def name(self) -> str:
        """Return the name that is published: a Hub id, or the last component of a local path."""
        return Path(self.path).name if self.is_local else self.model


class Layer(Section):
    """The layer that replaces each MLP."""

    kind: Annotated[str, AfterValidator(check_kind), Field(json_schema_extra={"enum": list(KINDS)})] = "mxd"
    """Kind of layer. mxd: Mixture of Decoders. Baselines: transcoder (TopK), skip_transcoder (a transcoder with a linear skip
    path), dense_assisted (a transcoder beside a narrow MLP), dense_twin (an MxD with constant gain) and random_gate (an MxD with
    a random, untrained gate)."""
    k: Positive = 32
    """Active experts (for a transcoder: latents) per token. Not used with `sparsity: l1`."""
    experts: Positive | Literal["auto"] = "auto"
    """Number of experts (for a transcoder: latents). auto: the most that fit the parameter count of a plain transcoder of width
    `expansion` x the MLP's input width."""
    expansion: Positive = 32
    """Width of the transcoder whose parameter count `experts: auto` matches, in multiples of the MLP's input width."""
    hidden: Positive | None = None
    """Number of hidden units; null: all of the MLP's, but a quarter of the narrowest MLP's for `kind: dense_assisted` with
    `train.preset: fast`."""
    activation: str | None = None
    """Activation of the hidden units, by its transformers name; null: the base MLP's activation."""
    sparsity: Literal["topk", "l1"] = "topk"
    """topk: the k largest gate values are active, if positive. l1: all positive gate values, with an L1 penalty in the loss."""
    l1: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0e-3
    """Weight of the L1 penalty. Only used with `sparsity: l1`."""
    skip: bool = False
    """Add a linear skip path from the layer's input to its output. `train.init: tokens` fits it to the MLP by least squares."""
    shared_expert: bool | None = None
    """Add an expert that is active at every token, with coefficient 1. For kinds with a product: mxd and random_gate. null: set by
    the preset, to true for these kinds with `fast`, else to false."""

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
    def _shared_expert_of_a_product(self) -> "Layer":
        if self.shared_expert and not self.traits.is_product:
            raise ValueError(
                f"layer.shared_expert: true can't be used with layer.kind: {self.kind}, which has no product of gain and linear factor."
                " Set layer.shared_expert: false or layer.kind: mxd."
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
    init: str | None = None
    """Initialisation: tokens, paper, or the folder of a converted model. tokens: each expert is initialised from one training
    token; its gate detects the token's input, and its row gives the token's output. Near-duplicate tokens are skipped. paper:
    random gate and experts, D at zero, and experts kept at unit norm. A folder: a warm start from its layers, of the same kind
    and sizes; k, the text and the base's weights may differ. null: set by the preset."""
    k_init: Positive | None = None
    """Active experts per token at the first step. The number falls linearly to layer.k over the first half of the steps before
    the joint stage. null: set by the preset."""
    joint: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Joint stage: the share of the steps, at the end of the run, in which all layers are trained together in the model, to match
    the base's next-token distribution. 0: no joint stage; null: set by the preset."""
    joint_lr: Rate | None = None
    """Peak learning rate of the joint stage; null: set by the preset, to a twentieth of `lr` with `fast` for mxd,
    random_gate and dense_twin, else to a fifth."""
    jacobian: Annotated[float, Field(ge=0, le=1000)] | None = None
    """Weight of the matching of derivatives before the joint stage: the change of a layer's output along a small step towards another
    token's input has to match that of the MLP. 0: no matching; null: set by the preset, to 0.02 with `fast` for mxd, random_gate
    and dense_twin, else to 0."""
    balance: Annotated[float, Field(ge=0, le=1000)] | None = None
    """Weight of the balance term, which keeps the shares of an MxD, and the directions in which its gain varies, above floors.
    A larger weight favours these over the loss. 0: no such term; null: set by the preset, to 0.75 with `fast` and a shared expert, else
    to 0."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Precision of the layers' matrix products. With bf16, weights and optimiser state stay in float32. auto: bf16, also for the
    base while activations are captured (base.dtype), on devices that multiply bfloat16 matrices natively; fp32 elsewhere."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the initialisation and of the order of the text."""
    mask: Mask = "bos"
    """Tokens that don't train the layers and don't count in the joint stage's loss. bos: BOS tokens and the first position of each
    block, which are attention sinks, whose norms dwarf all others. special: those and all other special tokens. prompt: those of
    `bos` and, in chats, all tokens but the assistant's replies. none: no token."""
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
        if train.twin and train.init not in (None, "tokens", "paper"):
            raise ValueError(
                f"train.twin: true can't be used with train.init: {train.init}, whose layers are no dense twins. Set train.twin: false."
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
        texts = [content["data"][split] for split in ("train", "eval")]
        sources = [source for text in texts for source in text["sources"] or ()]
        for section, key in ((content["base"], "model"), *((text, "path") for text in (*texts, *sources))):
            if section[key] is not None and is_local(section[key]):
                section[key] = Path(section[key]).name
        content["output"]["dir"] = Path(self.output.dir).name if self.output.dir else None
        if content["train"]["init"] is not None:
            content["train"]["init"] = Path(content["train"]["init"]).name
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
        return sha256_of(self.model_dump())

    def published_sha256(self) -> str:
        """Return the SHA-256 of the published settings that determine the result: the report's `recipe_sha256`."""
        return sha256_of(self.published())


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


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, which editors read from docs/recipe.schema.json."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "mxd-convert recipe"}
