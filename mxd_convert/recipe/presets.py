"""Presets: the values that `train.preset` gives to the keys that a recipe leaves at null."""

from typing import Any, TypeGuard

from mxd_convert.recipe.schema import Recipe

JOINT = 0.4  # share of the steps of `fast` in the joint stage
# Tokens per step of `fast` for token budgets below each key. Larger budgets use 4,096.
BATCHES = {1_000_000: 256, 4_000_000: 512, 10_000_000: 1024, 40_000_000: 2048}
K_INIT = 4  # active experts at the first step of `fast`, in multiples of layer.k
# Peak learning rate of the joint stage, as a share of `lr`. At a fifth, the KL divergence of MxDs rises before it falls, and runs can
# diverge. Transcoders and the additive control end lower with a fifth.
JOINT_RATE, MXD_JOINT_RATE = 0.2, 0.05
HIDDEN_BESIDE = 4  # ratio of the MLP's hidden units to those beside the experts with `fast` (layer.kind: dense_assisted)
BALANCE = 0.75  # weight of the balance term with `fast`, for layers with a product and a shared expert
# Weight of the matching of derivatives with `fast`, for MxDs and their twins. It costs other kinds more than it brings.
JACOBIAN = 0.02


def is_warm(init: str | None) -> TypeGuard[str]:
    """Return whether a value of `train.init` is the folder of a converted model."""
    return init not in (None, "tokens", "paper")


def steps_of(tokens: int, batch_tokens: int, context: int) -> int:
    """Return the number of training steps for a token budget. A step takes whole blocks of `context` tokens."""
    return max(1, tokens // (batch_tokens // context * context))


def batch_of(tokens: int) -> int:
    """Return the tokens per step of `fast` for a token budget."""
    return next((batch for below, batch in BATCHES.items() if tokens < below), 4096)


def joint_steps(steps: int, share: float | None) -> int:
    """Return the number of steps in the joint stage. At least one step remains in which each layer is trained alone."""
    return min(steps - 1, round((share or 0.0) * steps))


def resolve_precision(recipe: Recipe, native: bool) -> Recipe:
    """Return the recipe with `train.precision: auto` replaced. bf16 then applies to a float32 base too.

    native: whether the device multiplies bfloat16 matrices natively.
    """
    if recipe.train.precision != "auto":
        return recipe
    update: dict[str, Any] = {"train": recipe.train.model_copy(update={"precision": "bf16" if native else "fp32"})}
    if native and recipe.base.dtype == "float32":
        update["base"] = recipe.base.model_copy(update={"dtype": "bfloat16"})
    return recipe.model_copy(update=update)


def resolve_layer(recipe: Recipe, d_hidden: int) -> Recipe:
    """Return the recipe with all keys of `layer` that are null set by the preset.

    `fast` gives a shared expert to layers with a product, and a quarter of the MLP's hidden units to `dense_assisted`. `paper` gives no
    shared expert. Else `hidden` stays at null: all of the MLP's hidden units.

    d_hidden: hidden units of the narrowest MLP to convert.
    """
    layer, is_fast = recipe.layer, recipe.train.preset == "fast"
    hidden, shared = layer.hidden, layer.shared_expert
    if is_fast and hidden is None and layer.traits.adds:
        hidden = max(1, d_hidden // HIDDEN_BESIDE)
    if shared is None:
        shared = is_fast and layer.traits.is_product
    return recipe.model_copy(update={"layer": layer.model_copy(update={"hidden": hidden, "shared_expert": shared})})


def resolve_train(recipe: Recipe, d_in: int, n_experts: int, half: bool = False) -> Recipe:
    """Return the recipe with all keys of `train` that are null set by the preset.

    `paper` gives the published settings. `fast` gives:

    - experts initialised from training tokens, and four times layer.k active experts at the first step (but layer.k in a warm
      start);
    - a batch size that grows with the token budget;
    - a peak learning rate that falls with the square root of the width;
    - warm-up over a twentieth of the steps before the joint stage, and a decay to zero over their last fifth;
    - a joint stage over the last two fifths of the run;
    - for mxd, random_gate and dense_twin: a twentieth of the learning rate in the joint stage (else a fifth), and matching of
      derivatives;
    - a balance term for layers with a shared expert.

    Args:
        recipe: the recipe to complete.
        d_in: smallest input width of the layers to convert.
        n_experts: smallest number of experts of the layers to convert.
        half: whether the base model runs in float16. Gradients can't pass through it, so `fast` has no joint stage then.
    """
    train, context = recipe.train, recipe.data.context
    is_fast = train.preset == "fast"
    traits = recipe.layer.traits
    is_mxd = is_fast and traits.has_linear and not traits.adds  # or its twin, which has the same settings
    if not is_fast:
        lr, batch, warmup, schedule, init, k_init = 1.0e-4, 4096, 5000, "constant", "paper", recipe.layer.k
        joint = 0.0
    else:
        batch = batch_of(recipe.data.tokens) // context * context  # whole blocks
        lr = float(f"{1.0e-2 * (64 / d_in) ** 0.5:.2g}")
        schedule, init = "trapezoid", "tokens"
        # The joint stage has no loss that limits the number of active experts.
        many = recipe.layer.sparsity == "l1" and recipe.layer.traits.has_experts
        joint = 0.0 if half or many else JOINT
        k_init = recipe.layer.k if is_warm(train.init) else max(recipe.layer.k, min(K_INIT * recipe.layer.k, n_experts))
        warmup = -1
    batch = max(context, train.batch_tokens or batch)
    steps = steps_of(recipe.data.tokens, batch, context)
    share = joint if train.joint is None else train.joint
    alone = steps - joint_steps(steps, share)
    warmup = max(1, alone // 20) if warmup < 0 else warmup
    lr = lr if train.lr is None else train.lr
    defaults = {
        "lr": lr,
        "warmup_steps": warmup,
        "schedule": schedule,
        "init": init,
        "k_init": k_init,
        "joint": joint,
        "joint_lr": float(f"{(MXD_JOINT_RATE if is_mxd else JOINT_RATE) * lr:.3g}"),
        "jacobian": JACOBIAN if is_mxd else 0.0,
        "balance": BALANCE if is_fast and recipe.layer.shared_expert else 0.0,
    }
    open_keys = {key: value for key, value in defaults.items() if getattr(train, key) is None}
    return recipe.model_copy(update={"train": train.model_copy(update={**open_keys, "batch_tokens": batch})})
