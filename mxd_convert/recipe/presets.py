"""Presets: what `train.preset` puts in place of the keys that a recipe leaves open."""

from mxd_convert.recipe.schema import Recipe

JOINT = 0.4  # of the steps
# tokens a step of `fast`, for budgets below so many, and 4,096 above
BATCHES = {1_000_000: 256, 4_000_000: 512, 10_000_000: 1024, 40_000_000: 2048}
K_INIT = 4  # x layer.k active experts at the first step of `fast`
HIDDEN = 4  # hidden units of the base's MLP to one of `fast`


def steps_of(tokens: int, batch_tokens: int, context: int) -> int:
    """Training steps for a token budget; a step takes whole blocks."""
    return max(1, tokens // (batch_tokens // context * context))


def batch_of(tokens: int) -> int:
    """Tokens a step of `fast` for a budget."""
    return next((batch for below, batch in BATCHES.items() if tokens < below), 4096)


def joint_steps(steps: int, share: float | None) -> int:
    """Of a run's steps, those in which all layers are trained together; at least one is left for the layers alone."""
    return min(steps - 1, round((share or 0.0) * steps))


def resolve_hidden(recipe: Recipe, d_hidden: int) -> Recipe:
    """The recipe with the experts' hidden width, which `fast` makes a quarter of the MLP's. d_hidden: of the narrowest MLP to convert.

    Whoever has all of the MLP's hidden units learns that MLP once more, given enough text, and its experts stop mattering.
    """
    layer = recipe.layer
    if recipe.train.preset == "paper" or layer.hidden is not None or not layer.facts.has_linear:
        return recipe
    return recipe.model_copy(update={"layer": layer.model_copy(update={"hidden": max(1, d_hidden // HIDDEN)})})


def resolve_train(recipe: Recipe, d_in: int, n_experts: int, half: bool = False) -> Recipe:
    """The recipe with the open keys of `train` filled in. d_in: the narrowest input width of the layers to convert; n_experts: the fewest.
    half: the base runs in float16, through which no gradients can go.

    paper: the published settings. fast: layers that start on the text, four times as many active experts at first, a batch that grows
    with the budget, a learning rate that falls with the square root of the width, warm-up over a twentieth of the steps, a decay to zero
    over the last fifth; and a joint stage of all layers in the last two fifths of the run.
    """
    train, context = recipe.train, recipe.data.context
    if train.preset == "paper":
        lr, batch, warmup, schedule, init, k_init = 1.0e-4, 4096, 5000, "constant", "paper", recipe.layer.k
        joint = 0.0
    else:
        batch = batch_of(recipe.data.tokens) // context * context  # whole blocks
        lr = float(f"{1.0e-2 * (64 / d_in) ** 0.5:.2g}")
        schedule, init = "trapezoid", "tokens"
        many = recipe.layer.sparsity == "l1" and recipe.layer.facts.has_experts  # no loss of the joint stage limits their number
        joint = 0.0 if half or many else JOINT
        k_init = max(recipe.layer.k, min(K_INIT * recipe.layer.k, n_experts))
        warmup = -1
    batch = max(context, train.batch_tokens or batch)
    steps = steps_of(recipe.data.tokens, batch, context)
    share = joint if train.joint is None else train.joint
    alone = steps - joint_steps(steps, share)
    warmup = max(1, alone // 20) if warmup < 0 else warmup
    resolved = train.model_copy(
        update={
            "lr": lr if train.lr is None else train.lr,
            "batch_tokens": batch,
            "warmup_steps": warmup if train.warmup_steps is None else train.warmup_steps,
            "schedule": schedule if train.schedule is None else train.schedule,
            "init": init if train.init is None else train.init,
            "k_init": k_init if train.k_init is None else train.k_init,
            "joint": joint if train.joint is None else train.joint,
        }
    )
    return recipe.model_copy(update={"train": resolved})
