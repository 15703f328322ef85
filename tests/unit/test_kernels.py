"""The Triton kernels equal the reference in float64: in Triton's interpreter on any machine, and on a GPU if there is one.

Triton chooses its mode on import, so each mode has its process: this file, run as a script. It runs all cases of the mode and
prints {case: outcome}. An outcome is the error as a share of the allowed error, or the traceback of a failed case.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
CASES: dict[str, Callable[[str], float]] = {}  # of a device
COMPILED: dict[str, Callable[[str], float]] = {}

# tokens, active experts, experts, columns; experts 2 and the last are dead where enough are left
SHAPES = {
    "plain": (9, 3, 13, 5),
    "one active expert": (9, 1, 13, 5),
    "all experts active": (4, 7, 7, 5),
    "one column": (9, 3, 13, 1),
    "columns beyond a block": (3, 3, 7, 1100),
    "more active experts than a tile": (2, 70, 101, 5),
    "one token": (1, 3, 13, 64),
    "no tokens": (0, 3, 13, 5),
}
POPULAR = (600, 2, 13, 3)  # with expert 0 active for every token


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str, popular: bool = False) -> tuple[torch.Tensor, ...]:
    """Draw weights, about half of them zero, with indices, rows and left factors."""
    tokens, k, n_experts, width = shape
    generator = torch.Generator().manual_seed(tokens + width)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype).to(device)

    scores = torch.rand(tokens, n_experts, generator=generator)
    if n_experts - k >= 2:
        scores[:, [2, n_experts - 1]] = -1
    if popular:
        scores[:, 0] = 2
    indices = scores.topk(k, dim=-1).indices.to(device)
    return random(tokens, k).relu(), indices, random(n_experts, width), random(tokens, width)


def error(found: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> float:
    """Return the error as a share of the rounding error of a sum of terms whose absolute values add up to `magnitude`.

    The result may differ by a unit in its last place: the interpreter truncates bfloat16, a GPU rounds it.
    """
    assert found.shape == exact.shape
    summed = torch.finfo(torch.promote_types(found.dtype, torch.float32))
    allowed = torch.finfo(found.dtype).eps * exact.abs() + 8 * summed.eps * magnitude + summed.tiny
    return float(((found.cpu().double() - exact).abs() / allowed).nan_to_num(nan=1e9).max()) if found.numel() else 0.0


def exactly(operation: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a reference in float64, and the same with all terms positive."""
    wide = [argument.cpu().double() if argument.is_floating_point() else argument.cpu() for argument in arguments]
    positive = [argument.abs() if argument.is_floating_point() else argument for argument in wide]
    return operation(*wide), operation(*positive)


def by_expert(ops, n_experts: int) -> Callable[..., torch.Tensor]:
    return lambda weights, indices, source: ops.sum_by_expert(ops.route(weights, indices, n_experts), source)


def shape_case(name: str, dtype: torch.dtype, operation: str) -> Callable[[str], float]:
    def run(device: str) -> float:
        from mxd_convert.layers.sparse_ops import kernels, reference

        shape = POPULAR if name == "popular" else SHAPES[name]
        weights, indices, rows, left = draw(shape, dtype, device, name == "popular")
        if operation == "sum_by_expert":
            arguments = weights, indices, left
            mine, theirs = by_expert(kernels, len(rows)), by_expert(reference, len(rows))
        else:
            arguments = (weights if operation == "sum_rows" else left, indices, rows)
            mine, theirs = getattr(kernels, operation), getattr(reference, operation)
        found = mine(*arguments)
        assert found.dtype == dtype
        if device == "cuda":  # programs run in any order there
            assert torch.equal(found, mine(*arguments))
        return error(found, *exactly(theirs, *arguments))

    return run


for name, dtype, operation in itertools.product(SHAPES, DTYPES, ("sum_rows", "row_products", "sum_by_expert")):
    CASES[f"{operation}: {name}, {dtype}"] = shape_case(name, DTYPES[dtype], operation)
for dtype, value in DTYPES.items():
    CASES[f"sum_by_expert: popular, {dtype}"] = shape_case("popular", value, "sum_by_expert")


def case(function: Callable[[str], float]) -> Callable[[str], float]:
    CASES[function.__name__.replace("_", " ")] = function
    return function


@case
def routes_are_the_references(device: str) -> float:
    from mxd_convert.layers.sparse_ops import kernels, reference

    for shape in (*SHAPES.values(), POPULAR):
        weights, indices, rows, _ = draw(shape, torch.float32, device)
        for mine, theirs in zip(
            kernels.route(weights, indices, len(rows)), reference.route(weights, indices, len(rows)), strict=True
        ):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
    return 0.0


@case
def a_range_of_experts_is_that_part_of_all(device: str) -> float:
    from mxd_convert.layers.sparse_ops import kernels

    weights, indices, rows, source = draw(POPULAR, torch.float32, device, popular=True)
    indices = (indices + 5) % len(rows)  # the popular one in the middle
    routing = kernels.route(weights, indices, len(rows))
    whole = kernels.sum_by_expert(routing, source)
    for first, last in ((0, None), (0, 13), (0, 5), (5, 6), (4, 9), (6, None), (12, 13), (13, 13), (13, None), (3, 3)):
        assert torch.equal(kernels.sum_by_expert(routing, source, first, last), whole[first:last]), (first, last)
    return 0.0


@case
def inputs_need_not_be_contiguous(device: str) -> float:
    from mxd_convert.layers.sparse_ops import kernels, reference

    weights, indices, rows, left = draw(SHAPES["plain"], torch.float32, device)
    worst = 0.0
    for awkward in (lambda t: t.T.contiguous().T, lambda t: t[:1].expand(t.shape)):
        w, i, r, x = (awkward(tensor) for tensor in (weights, indices, rows, left))
        worst = max(
            worst,
            error(kernels.sum_rows(w, i, r), *exactly(reference.sum_rows, w, i, r)),
            error(kernels.row_products(x, i, r), *exactly(reference.row_products, x, i, r)),
            error(by_expert(kernels, len(r))(w, i, x), *exactly(by_expert(reference, len(r)), w, i, x)),
        )
        gate = awkward(torch.randn(3, 40, device=device))
        assert torch.equal(kernels.top_k(gate, 4)[0].sort(-1).values, gate.topk(4).values.sort(-1).values)
    return worst


@case
def pairs_of_weight_zero_are_not_read(device: str) -> float:
    from mxd_convert.layers.sparse_ops import kernels

    weights, indices, rows, left = draw(SHAPES["plain"], torch.float32, device)
    weights[:, 0] = 0
    indices[:, 0] = 2  # dead until now
    rows[2] = torch.nan
    assert kernels.sum_rows(weights, indices, rows).isfinite().all()
    weights[4], left[4] = 0, torch.inf
    assert by_expert(kernels, len(rows))(weights, indices, left).isfinite().all()
    return 0.0


# experts, k; in one stage, in two, and more than the kernels hold
TOP_K = ((1, 1), (31, 7), (31, 31), (4096, 32), (4097, 1), (5000, 3), (5001, 70), (21_490, 32), (10_001, 3000))


def top_k_case(n_experts: int, k: int, dtype: torch.dtype) -> Callable[[str], float]:
    def run(device: str) -> float:
        from mxd_convert.layers.sparse_ops import kernels

        def ordered(values: torch.Tensor) -> torch.Tensor:  # NaN apart from infinity
            return values.double().nan_to_num(nan=1e300, posinf=torch.inf, neginf=-torch.inf).sort(-1).values

        gate = torch.randn(7, n_experts, generator=torch.Generator().manual_seed(n_experts + k)).to(dtype)
        gate[1] = gate[1].round()  # many ties
        gate[2] = 1.0  # nothing else
        gate[3] = -gate[3].abs()
        gate[4, ::3], gate[4, 1::3] = -torch.inf, torch.inf
        gate[5, -1], gate[5, 0] = torch.nan, -torch.tensor(torch.nan)  # of either sign
        gate[6] = torch.arange(n_experts, dtype=dtype)  # all of the largest in the last groups
        gate = gate.to(device)
        values, indices = kernels.top_k(gate, k)
        assert values.dtype == dtype
        assert indices.dtype == torch.int64
        assert all(len(set(row)) == k for row in indices.tolist())
        assert torch.equal(gate.gather(1, indices).nan_to_num(nan=7.5), values.nan_to_num(nan=7.5))
        assert torch.equal(ordered(values), ordered(gate.topk(k, dim=-1).values))
        assert kernels.top_k(gate[:0], k)[0].shape == (0, k)
        return 0.0

    return run


for (n_experts, k), dtype in itertools.product(TOP_K, DTYPES):
    CASES[f"top_k: {k} of {n_experts}, {dtype}"] = top_k_case(n_experts, k, DTYPES[dtype])

# tokens, experts, k, bias
LAYERS = {
    "plain": (13, 17, 4, 0.0),
    "k = 1": (13, 17, 1, 0.0),
    "k = N": (5, 7, 7, 0.0),
    "fewer than k positive": (13, 17, 8, -3.0),
    "none positive": (5, 17, 4, -100.0),
    "no tokens": (0, 17, 4, 0.0),
}


def layer_case(name: str, with_sinks: bool) -> Callable[[str], float]:
    """Compare values and gradients of a layer of `autograd.py` on the kernels."""

    def run(device: str) -> float:
        from mxd_convert.layers.sparse_ops import RowGradient, autograd, kernels

        tokens, n_experts, k, bias = LAYERS[name]
        generator = torch.Generator().manual_seed(0)
        sizes = (tokens, 7), (n_experts, 7), (n_experts,), (n_experts, 5)
        inputs = [torch.randn(*size, dtype=torch.float64, generator=generator).to(device).requires_grad_() for size in sizes]
        with torch.no_grad():
            inputs[2] += bias
            inputs[2][::4] -= 1000  # dead
        x, weight, offsets, rows = inputs
        gate = F.relu(F.linear(x, weight, offsets))
        expected = torch.zeros_like(gate).scatter(-1, (largest := gate.topk(k, dim=-1)).indices, largest.values) @ rows
        wanted = torch.autograd.grad(expected.square().sum(), inputs)
        sinks = [RowGradient(), RowGradient()] if with_sinks else [None, None]
        assert autograd.primitives(x.device) is kernels
        values, indices = autograd.sparse_gate(x, weight, offsets, k, sinks[0])
        found = autograd.weighted_rows(values, indices, rows, sinks[1])
        found.square().sum().backward()
        got = [tensor.grad for tensor in inputs]
        for number, sink in zip((1, 3), sinks, strict=True):
            if sink is not None:
                assert got[number] is None
                half = n_experts // 2
                got[number] = torch.cat([sink.rows(0, half), sink.rows(half, n_experts)])
        differences = [mine - theirs for mine, theirs in zip((found.detach(), *got), (expected.detach(), *wanted), strict=True)]
        return float(torch.cat([difference.flatten() for difference in differences]).abs().max()) / 1e-11

    return run


for name, with_sinks in itertools.product(LAYERS, (False, True)):
    CASES[f"layer: {name}{', rows kept' if with_sinks else ''}"] = layer_case(name, with_sinks)


def compile_case(dtype: torch.dtype, capability: int) -> Callable[[str], float]:
    """Compile the launched kernels. The compiler refuses code that the interpreter accepts, and needs no GPU."""
    names = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "int16": "i16", "int32": "i32", "int64": "i64"}
    compiled = set()

    def launch(kernel, _, *arguments, num_warps=4, **options) -> None:
        from triton import compile as build
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr or given[p.name] is None}
        signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
        for name, argument in given.items():
            if isinstance(argument, torch.Tensor):
                signature[name] = "*" + names[str(argument.dtype).removeprefix("torch.")]
                argument.zero_()  # the next launch must not reuse it
        values_by_index = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        made = build(
            ASTSource(kernel, signature, values_by_index),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps},
        )
        assert made.asm["cubin"]
        compiled.add(kernel.__name__)

    def run(_: str) -> float:
        from mxd_convert.layers.sparse_ops import kernels

        kernels._launch = launch
        for shape in ((9, 3, 13, 700), POPULAR):
            weights, indices, rows, left = draw(shape, dtype, "cpu")
            kernels.sum_rows(weights, indices.clone(), rows)
            kernels.row_products(left, indices.clone(), rows)
            by_expert(kernels, len(rows))(weights, indices, left)
        for n_experts in (100, 5000):
            kernels.top_k(torch.randn(2, n_experts).to(dtype), 4)
        assert compiled == {"_sum_rows", "_row_products", "_sum_pieces", "_sum_segments", "_group_maxima", "_select"}
        return 0.0

    return run


for dtype, capability in (("fp32", 80), *((dtype, 90) for dtype in DTYPES)):
    COMPILED[f"compiles: {dtype}, sm_{capability}"] = compile_case(DTYPES[dtype], capability)

MODES = {"interpreter": CASES, "compiler": COMPILED, "cuda": CASES}


def run_all(mode: str) -> dict[str, float | str]:
    """Run all cases of a mode in its process."""
    from mxd_convert.layers.sparse_ops import autograd, kernels

    if mode == "interpreter":
        autograd.primitives = lambda _: kernels
    if mode != "compiler":
        launch = kernels._launch

        def checked(kernel, grid, *arguments, **options) -> None:
            assert min(grid) > 0, "an empty grid"
            assert options.get("WIDTH", 0) <= kernels.MAX_VALUES, "more than a program holds"
            launch(kernel, grid, *arguments, **options)

        kernels._launch = checked
    outcomes: dict[str, float | str] = {}
    for name, case in MODES[mode].items():
        try:
            outcomes[name] = case("cuda" if mode == "cuda" else "cpu")
        except Exception:
            outcomes[name] = traceback.format_exc()
    return outcomes


def obstacle(mode: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if mode == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA GPU"
    return None


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> dict[str, float | str]:
    mode = request.param
    if why := obstacle(mode):
        pytest.skip(why)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # workers share this folder, so that only one runs the mode
    path = folder / f"kernels-{mode}.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            settings |= {"TRITON_INTERPRET": "1"} if mode == "interpreter" else {}
            settings |= {"TRITON_CACHE_DIR": str(folder / "triton")}
            done = subprocess.run([sys.executable, __file__, mode], env=settings, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            path.write_text(done.stdout)
    return json.loads(path.read_text())


@pytest.mark.parametrize(("outcomes", "name"), [(mode, name) for mode in MODES for name in MODES[mode]], indirect=["outcomes"])
def test_kernels_equal_the_reference(outcomes, name):
    assert not isinstance(outcomes[name], str), outcomes[name]
    assert outcomes[name] <= 1


def test_a_missing_triton_disables_the_kernels_without_an_error(monkeypatch):
    from mxd_convert.layers.sparse_ops import kernels

    assert kernels.AVAILABLE is (importlib.util.find_spec("triton") is not None)
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("kernels_without_triton", kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.AVAILABLE is False


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run_all(sys.argv[1])))
