# Copyright 2026 The mxd-convert authors. Apache-2.0.
"""Models whose MLPs are replaced by Mixtures of Decoders (MxD, arXiv 2505.21364), or by another kind of layer in `layers_mxd.py`.

One file serves all architectures: `MxdLlamaForCausalLM` is created on demand from transformers' `LlamaForCausalLM`.
Shape suffixes: B sequences, T tokens, I input width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING, PreTrainedModel

from .configuration_mxd import config_class
from .layers_mxd import FactoredLayer, build_layer, position
from .steering_mxd import orders_of, read_steering, steering

# State per thread, because several threads may run one model at once: the number of prompt tokens of a running `generate`, by id
# of the model; and (B, T) of the tokens that a decoder layer flattens.
_prompts: ContextVar[Mapping[int, int]] = ContextVar("mxd_prompts", default=MappingProxyType({}))
_lead: ContextVar[torch.Size | None] = ContextVar("mxd_lead", default=None)


class MxdModelMixin:
    """A mixin for a transformers model class, which replaces the MLPs by the layers of `config.mxd` when the model is built."""

    base_class: Any  # class of transformers or of the base's own code
    _mxd_prefix = ""  # prefix to remove from module paths, which are relative to the causal LM

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.mxd is None:
            raise ValueError(
                f"{type(self).__name__} needs a config with an `mxd` entry. Give the config of a converted checkpoint."
            )
        for index, entry in config.mxd["layers"].items():
            layer = build_layer(entry)
            layer.index = int(index)
            self._mxd_put(config.mxd["mlp"], index, layer)
            for path in config.mxd.get("then", []):
                self._mxd_put(path, index, nn.Identity())
            if config.mxd.get("flat"):
                self._mxd_put(config.mxd["then"][-1], index, nn.Flatten(0, -2))
                self._unflatten(index, layer)
        self.register_forward_pre_hook(self._note_place, with_kwargs=True)
        self.set_steering(config.mxd.get("steering", []))
        self.post_init()

    @staticmethod
    def _note_place(model: Any, _: Any, arguments: dict[str, Any]) -> None:
        """Record the position before a forward pass, for steering of only the prompt or only the generated tokens."""
        if any(layer.steering or layer.was_steered for layer in model.mxd_layers().values()):
            model._note_position(arguments.get("past_key_values"))

    @torch.compiler.disable
    def _note_position(self, cache: Any) -> None:
        if any(order.get("positions", "all") != "all" for layer in self._mxd_copies() for order in orders_of(layer)):
            position.set((0 if cache is None else int(cache.get_seq_length()), _prompts.get().get(id(self))))

    @contextmanager
    def steered(self, orders: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """Steer the model within the context, only in this thread (or asyncio task), after the checkpoint's own steering.

        Contexts nest. A thread started within a context inherits its steering only with `contextvars.copy_context().run`.

        Args:
            orders: as in `set_steering`. With an empty list this thread is not steered, even while another thread steers.

        Raises:
            ValueError: if an order is invalid.
        """
        with steering(self._mxd_copies(), read_steering(orders, self.config.mxd["layers"])):
            yield

    def set_steering(self, orders: Sequence[Mapping[str, Any]]) -> None:
        """Set the steering of the model, which `save_pretrained` and `from_pretrained` keep. An empty list removes it.

        Args:
            orders: mappings, applied in order. Each has "layer", "expert", one of "add", "set", "scale" (numbers) and "ablate"
                (true), and optionally "positions": "all" (default), "prompt" or "generation" (the tokens that `generate` writes).

        Raises:
            ValueError: if an order is invalid.
        """
        orders = read_steering(orders, self.config.mxd["layers"])
        for layer in self._mxd_copies():
            layer.steering = [order for order in orders if order["layer"] == layer.index]
        self.config.mxd = {key: value for key, value in self.config.mxd.items() if key != "steering"}
        if orders:
            self.config.mxd["steering"] = orders

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model as transformers does, with the current `k` of every layer in the config."""
        entries, layers = self.config.mxd["layers"], self.mxd_layers()
        now = {index: {**entry, "k": layers[int(index)].k} if "k" in entry else entry for index, entry in entries.items()}
        if now != entries:
            self.config.mxd = {**self.config.mxd, "layers": now}
        return super().save_pretrained(*args, **kwargs)

    def _mxd_path(self, index: int | str) -> str:
        return self.config.mxd["mlp"].format(i=index).removeprefix(self._mxd_prefix)

    def _mxd_put(self, path: str, index: str, module: nn.Module) -> None:
        parent, _, name = path.format(i=index).removeprefix(self._mxd_prefix).rpartition(".")
        setattr(self.get_submodule(parent), name, module)

    def _unflatten(self, index: str, layer: FactoredLayer) -> None:
        """Restore the shape (B, T, I) of a layer's input that its decoder layer has flattened.

        The hooks are on modules within the decoder layer, because gradient checkpointing repeats those, but not hooks of the
        decoder layer itself. Outside of such a decoder layer, the input keeps its shape.
        """
        template, compiled = self.config.mxd["mlp"], _Lead()
        before = f"{template[: template.index('{i}') + 3]}.{self.config.mxd['flat']}"

        def note(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            compiled.put((arguments[0] if arguments else keywords["hidden_states"]).shape[:-1])

        def unflatten(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            [x_BI], lead = arguments, compiled.take()
            return arguments if lead is None else (x_BI.reshape(*lead, x_BI.shape[-1]),)

        self.get_submodule(before.format(i=index).removeprefix(self._mxd_prefix)).register_forward_pre_hook(
            note, with_kwargs=True
        )
        layer.register_forward_pre_hook(unflatten)

    def mxd_layers(self) -> dict[int, FactoredLayer]:
        """Return the layers that replace MLPs, by layer index, ascending. For a layer wrapped by PEFT, return the active copy."""
        found = {int(index): self.get_submodule(self._mxd_path(int(index))) for index in self.config.mxd["layers"]}
        return {index: module if isinstance(module, FactoredLayer) else _in_use(module) for index, module in found.items()}

    def _mxd_copies(self) -> list[FactoredLayer]:
        """Return all MxD layers in the model, including originals and copies of layers in PEFT's `modules_to_save`."""
        return [module for module in self.modules() if isinstance(module, FactoredLayer)]

    def initialize_weights(self) -> None:
        """Initialise the weights as transformers does, but MxD layers first.

        The headless model within a causal LM is another class, which does not know how to initialise the experts.
        """
        for layer in self._mxd_copies():
            layer.apply(self._initialize_weights)
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FactoredLayer):
            module.init_rows()

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return the base's value, because transformers initialises fewer modules of classes that it considers custom code."""
        return bool(cls.base_class.is_custom_code())

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a model as transformers does, but raise ValueError for missing or unexpected tensors.

        A layer that transformers initialises at random would go unnoticed.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if output_loading_info or (args[0] if args else kwargs.get("pretrained_model_name_or_path")) is None:
            return (model, info) if output_loading_info else model  # the caller checks `info`, or there is no checkpoint
        shapes = () if kwargs.get("ignore_mismatched_sizes") else ("mismatched_keys",)
        for problem in ("missing_keys", "unexpected_keys", *shapes):
            keys = _names(info.get(problem, ()))
            if problem == "unexpected_keys":  # a headless model ignores the heads of its checkpoint
                keys = [key for key in keys if key.startswith(cls._mxd_prefix)]
            if keys:
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                raise ValueError(
                    f"the checkpoint's weights don't fit its config.json: {problem.replace('_', ' ')}: {keys[0]}{more}."
                    " Download it or convert again."
                )
        return (model, info) if output_loading_info else model


class MxdGenerationMixin(MxdModelMixin):
    """The mixin for causal LMs, whose `generate` records the length of the prompt for steering."""

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate tokens as transformers does."""
        given = next((ids for ids in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if ids is not None), None)
        token = _prompts.set({**_prompts.get(), id(self): 1 if given is None else given.shape[1]})
        try:
            return super().generate(inputs, *args, **kwargs)
        finally:
            _prompts.reset(token)


class _Lead:
    """(B, T), passed from one hook to the next in a decoder layer.

    When compiled it is a constant of the graph, otherwise it is kept per thread.
    """

    traced: torch.Size | None = None

    def put(self, lead: torch.Size) -> None:
        """Store (B, T)."""
        if torch.compiler.is_compiling():
            self.traced = lead
        else:
            _lead.set(lead)

    def take(self) -> torch.Size | None:
        """Return and clear (B, T), None if nothing is stored."""
        if torch.compiler.is_compiling():
            lead, self.traced = self.traced, None
        else:
            lead = _lead.get()
            _lead.set(None)
        return lead


def _in_use(wrapper: nn.Module) -> FactoredLayer:
    copies = [module for module in wrapper.modules() if isinstance(module, FactoredLayer)]
    return copies[0 if getattr(wrapper, "disable_adapters", False) else -1]


def _names(keys: Any) -> list[str]:
    return sorted(key if isinstance(key, str) else str(key[0]) for key in keys)


def make_model(config: Any, base: Any, auto_class: str, module: str = __name__) -> type[PreTrainedModel]:
    """Create the MxD counterpart of a model class.

    Args:
        config: MxD counterpart of its config class.
        base: model class to extend.
        auto_class: auto class that loads it, "AutoModel" or "AutoModelForCausalLM".
        module: value of `__module__`. The checkpoint ships this file.
    """
    headless = auto_class == "AutoModel"
    members = {
        "__module__": module,
        "__doc__": f"{base.__name__} whose MLPs are replaced by MxD layers.",
        "config_class": config,
        "base_class": base,
        "_auto_class": auto_class,  # makes save_pretrained copy this file into the checkpoint
        "_mxd_prefix": f"{base.base_model_prefix}." if headless else "",
    }
    name = config.__name__.removesuffix("Config") + ("Model" if headless else "ForCausalLM")
    return type(name, (MxdModelMixin if headless else MxdGenerationMixin, base), members)


def __getattr__(name: str) -> Any:
    for suffix, mapping in (("ForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING), ("Model", MODEL_MAPPING)):
        if name.startswith("Mxd") and name.endswith(suffix):
            config = config_class(name[len("Mxd") : -len(suffix)])
            base = config.__mro__[1]
            # some models of transformers are causal LMs only as models with images
            found = mapping if suffix == "Model" or base in mapping else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            globals()[name] = make_model(config, found[base], f"Auto{suffix.replace('For', 'ModelFor')}")
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
