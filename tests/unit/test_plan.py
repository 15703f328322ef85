"""`plan` counts products as torch's counter does, and passes and shares; it refuses impossible runs."""

import pytest
import torch
from small_runs import small_recipe
from torch.utils.flop_counter import FlopCounterMode

import mxd_convert
from mxd_convert import convert
from mxd_convert.base_model.capture import harvest
from mxd_convert.base_model.load import load_base
from mxd_convert.base_model.swap import replaced_mlps
from mxd_convert.errors import InputError
from mxd_convert.layers import normalised_mse
from mxd_convert.plan import memory, timing
from mxd_convert.plan.flops import flops_per_token, joint_forwards
from mxd_convert.plan.memory import check_memory, shares
from mxd_convert.plan.resolve import check_processes
from mxd_convert.training.balance import Balance
from mxd_convert.training.derivatives import EVERY
from mxd_convert.training.joint import LayerInModel
from mxd_convert.training.stage import make_layer

TOKENS = 64


@pytest.fixture
def planned(models, text, tmp_path):
    def make(family="gpt2", **sections) -> mxd_convert.Plan:
        return mxd_convert.make_plan(mxd_convert.load_recipe(small_recipe(models[family], text, tmp_path / "out", **sections)))

    return make


def counted(work) -> float:
    """Return the products with weights that torch counts, per token."""
    with FlopCounterMode(display=False) as counter:
        work()
    operations = counter.get_flop_counts()["Global"]
    return sum(count for name, count in operations.items() if "mm" in str(name)) / TOKENS


def forward_of(plan, last: int) -> float:
    base = load_base(plan.recipe.base)
    base.config._attn_implementation = "sdpa"  # its scores are a separate operation, which is not counted here
    sites = [site for site in plan.sites if site.index <= last]
    ids_BT = torch.randint(0, plan.vocabulary, (2, TOKENS // 2))
    return counted(lambda: harvest(base, sites, ids_BT))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize(
    "layer",
    [
        {},
        {"skip": True, "hidden": 20},
        {"sparsity": "l1"},
        *({"kind": kind} for kind in ("transcoder", "skip_transcoder", "dense_twin", "random_gate")),
        {"kind": "transcoder", "sparsity": "l1"},
    ],
)
def test_planned_products_equal_the_count_of_torch(planned, family, layer):
    plan = planned(family, layers=[0, 1], layer=layer, train={"jacobian": 0.0, "balance": 0.0})
    [first, second] = plan.layers
    shape = first.shape
    module = make_layer(shape, 0, first.index, "paper")

    def step() -> None:
        x_BI = torch.randn(TOKENS, shape.d_in)
        coefficients = module.encode(x_BI)
        normalised_mse(module.combine(x_BI, coefficients), torch.randn(TOKENS, shape.d_out), torch.ones(TOKENS).bool()).backward()

    # torch's counter omits sums over the rows of active experts
    rows = {"random_gate": 4 * shape.d_out}.get(shape.kind, 2 * shape.d_in + 6 * shape.d_out)
    sparse = 0 if shape.sparsity == "l1" else shape.k * rows
    expected = 2 * (counted(step) + sparse) + forward_of(plan, 1)
    assert flops_per_token(plan, [[0, 1]]) == expected
    apart = flops_per_token(plan, [[0], [1]]) - flops_per_token(plan, [[0, 1]])
    assert apart == forward_of(plan, 0)
    assert second.parameters == first.parameters
    taking_steps = planned(family, layers=[0, 1], layer=layer, train={"jacobian": 0.02, "balance": 0.0})
    base = load_base(plan.recipe.base)
    mlp = base.get_submodule(plan.sites[0].path)
    in_mlp = counted(lambda: mlp(torch.randn(1, TOKENS, shape.d_in)))
    assert flops_per_token(taking_steps, [[0, 1]]) - expected == (2 * (counted(step) + sparse) + 2 * in_mlp) / EVERY


@pytest.mark.parametrize("joint", [0.0, 0.5])
def test_planned_products_of_the_balance_term_equal_the_count_of_torch(planned, joint):
    plan, without = (planned("llama", train={"balance": weight, "joint": joint}) for weight in (0.5, 0.0))
    width = plan.shapes[0].d_out
    balance = Balance(width, 0.5, lambda sums: sums, torch.device("cpu"))

    def step() -> None:
        gain, linear = (torch.randn(TOKENS, width, requires_grad=True) for _ in range(2))
        output, target = torch.randn(2, TOKENS, width)
        loss, counted = torch.tensor(1.0), torch.ones(TOKENS, dtype=torch.bool)
        measured = balance.measure((gain, linear), torch.ones(TOKENS, 1), output, target, loss, counted)
        balance.add(measured)
        balance.settle()
        balance.of(measured).backward()

    passes = [[layer.index for layer in plan.layers]]
    expected = len(plan.layers) * counted(step)
    assert flops_per_token(plan, passes) - flops_per_token(without, passes) == expected > 0


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize("kind", ["mxd", "skip_transcoder", "dense_twin", "random_gate"])
def test_planned_products_of_a_joint_stage_equal_the_count_of_torch(planned, family, kind):
    settings = {"layers": [1, 2], "layer": {"kind": kind}}
    plan, without = (planned(family, **settings, train={"joint": share, "balance": 0.0}) for share in (0.5, 0.0))
    assert (plan.steps, plan.joint_steps) == (16, 8)
    base = load_base(plan.recipe.base).requires_grad_(False)
    base.config._attn_implementation = "sdpa"
    shapes = plan.shapes
    layers = {index: LayerInModel(make_layer(shape, 0, index, "data"), "fp32") for index, shape in shapes.items()}
    ids_BT = torch.randint(0, plan.vocabulary, (2, TOKENS // 2))

    def work() -> None:
        with torch.no_grad():
            meant = base(input_ids=ids_BT).logits.softmax(-1)
        with replaced_mlps(base, plan.sites, layers):
            (meant * base(input_ids=ids_BT).logits.log_softmax(-1)).sum().backward()

    # torch's counter omits these too; in the upper layer also the rows of the gate in the gradient of its input
    lower, upper = shapes.values()
    more = 2 * (upper.d_in + upper.d_out) if kind == "random_gate" else 2 * upper.d_in
    rows = 4 * lower.d_out if kind == "random_gate" else 2 * lower.d_in + 6 * lower.d_out
    joint = counted(work) + lower.active * rows + upper.active * (rows + more)
    passes = [[1, 2]]
    assert flops_per_token(plan, passes) == (joint + flops_per_token(without, passes)) // 2


def test_sequential_order_reads_the_text_again_for_every_layer(planned):
    settings = {"layers": "all", "train": {"order": "sequential"}}
    local = planned(**settings)
    passes = [[0], [1], [2]]
    parallel = flops_per_token(planned(layers="all"), passes)
    layer = local.layers[0].shape
    mlp = 2 * layer.d_in * layer.d_hidden + 2 * layer.d_hidden * layer.d_out
    mxd = mlp + 2 * layer.d_in * layer.n_experts + 2 * layer.k * layer.d_out
    replaced = 4 * layer.d_in * local.sites[0].d_hidden
    below = 3 * (mxd - replaced)  # of layer 0 for the second, of 0 and 1 for the third
    assert flops_per_token(local, passes) == parallel + below
    teacher = flops_per_token(planned(layers="all", train={"order": "sequential", "target": "teacher"}), passes)
    assert teacher - flops_per_token(local, passes) == 2 * sum(sum(local.depth_weights[: last + 1]) for last in (1, 2))


def test_distributed_layers_are_neighbours(planned):
    plan = planned(layers="all", train={"distribute": "layers"})
    assert shares(plan, 1) == [[0, 1, 2]]
    assert shares(plan, 2) in ([[0], [1, 2]], [[0, 1], [2]])
    assert shares(plan, 3) == [[0], [1], [2]]
    assert sorted(index for share in shares(plan, 5) for index in share) == [0, 1, 2]


def test_more_processes_than_blocks_in_a_batch_are_refused(planned):
    plan = planned()
    check_processes(plan, 8)
    with pytest.raises(InputError, match=r"train.batch_tokens: 256 tokens are 8 blocks of 32, fewer than the 9 processes"):
        check_processes(plan, 9)
    check_processes(planned(train={"distribute": "layers"}), 9)
    # processes share the batches of the joint stage
    with pytest.raises(InputError, match=r"fewer than the 9 processes.* or set train\.joint: 0"):
        check_processes(planned(train={"distribute": "layers", "joint": 0.25}), 9)


def test_a_step_uses_whole_blocks(planned):
    plan = planned(train={"batch_tokens": None}, data={"context": 48})
    assert plan.recipe.train.batch_tokens == 240  # the preset `fast` has 256
    assert plan.tokens == plan.steps * 240


def test_l1_sparsity_ignores_k(planned):
    plan = planned(layer={"sparsity": "l1", "k": 32, "experts": 16})
    assert [(layer.shape.k, layer.shape.active) for layer in plan.layers] == [(16, 16)] * len(plan.layers)


def test_the_memory_error_of_a_resumed_run_says_how_to_resume(planned):
    plan = planned(train={"memory_gib": 0.1})
    with pytest.raises(InputError, match=r"raise train.memory_gib\.$"):
        check_memory(plan)
    with pytest.raises(InputError, match=r"resumes only with more memory or fewer processes\. Otherwise add --fresh\.$"):
        check_memory(plan, 2, begun=True)


def test_a_context_longer_than_a_forward_is_counted(planned):
    """A forward takes whole blocks, and the initialisation reads at least one forward."""
    small = {"layer": {"hidden": 12, "shared_expert": False}, "train": {"init": "tokens", "jacobian": 0.0}}
    short, long = (planned(data={"context": context}, **small) for context in (32, 128))
    whole = [memory._training(plan, plan.layers, 1, None) for plan in (short, long)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "FORWARD_TOKENS", 64)
        fewer = [memory._training(plan, plan.layers, 1, None) for plan in (short, long)]
    assert fewer[0] < fewer[1] < whole[1]


@pytest.mark.parametrize(("layer", "words"), [({}, r"layer.experts \(24\)"), ({"experts": "auto"}, r"layer.expansion \(32\)")])
def test_refusals_name_the_key_that_sets_the_number_of_experts(models, text, tmp_path, layer, words):
    settings = {"layer": layer, "train": {"memory_gib": 0.1}}
    with pytest.raises(InputError, match=rf"train.memory_gib: 0.1 GiB.* Lower {words}"):
        convert(small_recipe(models["gpt2"], text, tmp_path / "out", **settings), quiet=True)


def test_an_evaluation_is_timed_in_float32_whatever_the_base(planned, monkeypatch):
    timed = []

    def forward_seconds(plan, device, dtype, rows):
        timed.append(dtype)
        return {"bfloat16": 1e-4, "float32": 1e-3}[dtype], 0.0

    monkeypatch.setattr(timing, "_forward_seconds", forward_seconds)
    monkeypatch.setattr(timing, "_layer_seconds", lambda *arguments: (1e-3, 1e-6))
    half, full = (timing.measure_machine(planned(base={"dtype": dtype})) for dtype in ("bfloat16", "float32"))
    assert timed == ["bfloat16", "float32", "float32", "float32"]  # training and evaluation of each
    assert half.evaluation_seconds == full.evaluation_seconds
    assert half.training_seconds < full.training_seconds


def test_the_joint_stage_is_timed_by_its_products(planned, monkeypatch):
    """With all MLPs converted, the converted model's forward and backward are those of attention, head and layers."""
    monkeypatch.setattr(timing, "_forward_seconds", lambda *arguments: (1.0, 0.0))
    monkeypatch.setattr(timing, "_layer_seconds", lambda *arguments: (0.0, 0.0))
    train = {"joint": 0.5, "init": "paper", "jacobian": 0.0}
    plan, alone = planned(layers="all", train=train), planned(layers="all", train={**train, "joint": 0.0})
    joint, without = (timing.measure_machine(one).training_seconds for one in (plan, alone))
    depth = len(plan.depth_weights)
    a_step = plan.tokens // plan.steps
    expected = (plan.steps - plan.joint_steps) * depth * a_step + plan.joint_steps * joint_forwards(plan) * depth * a_step
    assert joint == pytest.approx(expected)
    assert without == pytest.approx(plan.steps * depth * a_step)
    assert 1.0 < joint_forwards(plan) < 4.0
