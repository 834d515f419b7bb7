"""Muon is torch.optim.Muon on matrices and torch.optim.AdamW elsewhere: on filters, after a load, on two ranks."""

import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import PYTHONPATH, in_processes, run_process
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz

from pipeline.optim import muon
from pipeline.optim.muon import COEFFICIENTS, Muon, newton_schulz_flops, orthogonalize, partition

SHAPES_2D = [(24, 8), (8, 24), (16, 16), (16, 100)]
SHAPES = [(8, 3, 3, 3), (16, 8, 3, 3), (16, 8, 3, 3), (32, 16, 1, 1), (10, 32)]
VECTORS = [(16,), (32,), ()]


def make_params(shapes: list[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def take_steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    """Steps with gradients that depend on nothing but the step's number."""
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for param in params:
            gradient = torch.randn(param.shape, generator=generator)
            param.grad = torch.empty_like(param).copy_(gradient)  # in the parameter's memory format
        optimizer.step()


def equal(first: list[nn.Parameter], second: list[nn.Parameter]) -> bool:
    assert len(first) == len(second) > 0
    return all(torch.equal(a, b) for a, b in zip(first, second))


def both_kinds(params: list[nn.Parameter], **settings) -> Muon:
    """The first parameter and all vectors in an AdamW group, the rest in a Muon group."""
    fallback = [p for i, p in enumerate(params) if i == 0 or p.ndim < 2]
    weights = [p for i, p in enumerate(params) if i > 0 and p.ndim >= 2]
    groups = [dict(params=weights, use_muon=True), dict(params=fallback, use_muon=False, weight_decay=0.0)]
    return Muon(groups, **settings)


def newton_schulz_float64(matrix: Tensor, ns_steps: int = 5) -> Tensor:
    """The definition, X <- a X + b (X X^T) X + c (X X^T)^2 X, in float64."""
    a, b, c = COEFFICIENTS
    x = matrix.double()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ns_steps):
        gram = x @ x.mT
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def ill_conditioned(rows: int, cols: int) -> Tensor:
    rank = min(rows, cols)
    left, right = torch.linalg.qr(torch.randn(rows, rank))[0], torch.linalg.qr(torch.randn(cols, rank))[0]
    return left * torch.logspace(0, -6, rank) @ right.T


GRADIENTS = {
    "normal": torch.randn,
    "ill_conditioned": ill_conditioned,
    "near_low_rank": lambda rows, cols: torch.randn(rows, 4) @ torch.randn(4, cols) + 1e-3 * torch.randn(rows, cols),
    "rank_one": lambda rows, cols: torch.randn(rows, 1) @ torch.randn(1, cols),
    "tiny": lambda rows, cols: 1e-12 * torch.randn(rows, cols),
}


@pytest.mark.parametrize("shape", [(32, 288), (288, 32), (64, 64), (64, 128)])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_orthogonalize_is_far_closer_to_float64_than_bf16_is(kind, shape):
    torch.manual_seed(0)
    gradient = GRADIENTS[kind](*shape)
    expected = newton_schulz_float64(gradient)
    error = (orthogonalize(gradient) - expected).norm() / expected.norm()
    bf16_error = (_zeropower_via_newtonschulz(gradient, COEFFICIENTS, 5, 1e-7) - expected).norm() / expected.norm()
    assert error < 1e-3 and error < bf16_error / 10


@pytest.mark.parametrize("ns_steps", [1, 2, 5, 6, 8])
def test_orthogonalize_makes_ns_steps_steps(ns_steps):
    torch.manual_seed(0)
    gradient = torch.randn(16, 144)
    torch.testing.assert_close(
        orthogonalize(gradient, ns_steps).double(), newton_schulz_float64(gradient, ns_steps), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("ns_steps", [10, 30])
def test_many_steps_on_a_low_rank_gradient_stay_bounded(ns_steps):
    torch.manual_seed(0)
    gradient = torch.randn(64, 1) @ torch.randn(1, 576)
    assert torch.linalg.matrix_norm(orthogonalize(gradient, ns_steps), 2) < 1.3


@pytest.mark.parametrize("shape", [(64, 3, 7, 7), (64, 64, 3, 3), (128, 64, 1, 1), (64, 256, 1, 1), (32, 3, 3, 3)])
def test_singular_values_of_filters_come_near_one(shape):
    torch.manual_seed(0)
    filters = torch.randn(shape).flatten(1)
    assert torch.linalg.svdvals(filters).max() > 5
    values = torch.linalg.svdvals(orthogonalize(filters))
    assert values.min() > 0.6 and values.max() < 1.3


def test_a_stack_gives_what_its_matrices_give():
    torch.manual_seed(0)
    for shape in [(4, 16, 100), (4, 100, 16), (4, 16, 16)]:
        stack = torch.randn(shape)
        torch.testing.assert_close(orthogonalize(stack), torch.stack([orthogonalize(matrix) for matrix in stack]))


def test_zeros_stay_zeros():
    for shape in [(16, 144), (144, 16), (16, 16), (3, 16, 144)]:
        assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


def test_the_gram_side_is_left_when_fp32_products_are_rounded(monkeypatch):
    """After torch.set_float32_matmul_precision("high") a CPU may multiply in bf16 or tf32: the plain form serves."""
    taken = []
    monkeypatch.setattr(muon, "_plain_steps", lambda matrix, ns_steps: taken.append("plain") or matrix)
    monkeypatch.setattr(muon, "_gram_steps", lambda matrix, ns_steps: taken.append("gram") or matrix)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ["highest", "high", "medium"]:
            torch.set_float32_matmul_precision(precision)
            orthogonalize(torch.ones(16, 144))
    finally:
        torch.set_float32_matmul_precision(before)
    assert taken == ["gram", "plain", "plain"]


@pytest.mark.parametrize("lr_scaling", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_on_matrices_are_those_of_torch_muon(monkeypatch, nesterov, lr_scaling):
    """Bitwise, given torch's own Newton-Schulz: momentum, Nesterov, weight decay and scaling are the same."""
    monkeypatch.setattr(muon, "orthogonalize", lambda m, n: _zeropower_via_newtonschulz(m, COEFFICIENTS, n, 1e-7))
    settings = dict(lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov)
    ours, theirs = make_params(SHAPES_2D), make_params(SHAPES_2D)
    take_steps(Muon([dict(params=ours, use_muon=True)], lr_scaling=lr_scaling, **settings), ours, range(4))
    take_steps(torch.optim.Muon(theirs, adjust_lr_fn=lr_scaling, **settings), theirs, range(4))
    assert equal(ours, theirs) and not equal(ours, make_params(SHAPES_2D))


def test_our_newton_schulz_gives_torch_muons_step_within_bf16():
    ours, theirs, start = make_params(SHAPES_2D), make_params(SHAPES_2D), make_params(SHAPES_2D)
    take_steps(Muon([dict(params=ours, use_muon=True)], lr=0.01, weight_decay=0.1), ours, range(3))
    take_steps(torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), theirs, range(3))
    for a, b, c in zip(ours, theirs, start):
        assert 0 < (a - b).norm() < 0.02 * (b - c).norm()


@pytest.mark.parametrize("nesterov", [True, False])
def test_adamw_groups_are_torch_adamw_bitwise(nesterov):
    ours, theirs = make_params(SHAPES + VECTORS), make_params(SHAPES + VECTORS)
    settings = dict(lr=3e-3, weight_decay=0.05, betas=(0.8, 0.99), eps=1e-6)
    take_steps(Muon([dict(params=ours, use_muon=False)], nesterov=nesterov, **settings), ours, range(4))
    take_steps(torch.optim.AdamW(theirs, **settings), theirs, range(4))
    assert equal(ours, theirs) and not equal(ours, make_params(SHAPES + VECTORS))


def test_filters_step_as_their_flattened_matrices():
    filters = make_params([(8, 4, 3, 3)])
    matrices = [nn.Parameter(p.detach().flatten(1).clone()) for p in filters]
    take_steps(Muon([dict(params=filters, use_muon=True)]), filters, range(3))
    take_steps(Muon([dict(params=matrices, use_muon=True)]), matrices, range(3))
    assert torch.equal(filters[0].flatten(1), matrices[0])


def test_channels_last_parameters_take_the_same_step():
    contiguous, channels_last = make_params(SHAPES + VECTORS), make_params(SHAPES + VECTORS)
    for param in channels_last:
        if param.ndim == 4:
            param.data = param.data.to(memory_format=torch.channels_last)
    assert not channels_last[1].is_contiguous()
    take_steps(both_kinds(contiguous), contiguous, range(3))
    take_steps(both_kinds(channels_last), channels_last, range(3))
    assert equal(contiguous, channels_last)


def test_lr_is_read_at_every_step_and_group():
    params = make_params([(8, 16), (8, 16), (8,)])
    before = [p.detach().clone() for p in params]
    groups = [
        dict(params=params[:1], use_muon=True, lr=0.0),
        dict(params=params[1:2], use_muon=True),
        dict(params=params[2:], use_muon=False),
    ]
    optimizer = Muon(groups, lr=0.1)
    take_steps(optimizer, params, range(1))
    assert [torch.equal(p, b) for p, b in zip(params, before)] == [True, False, False]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in params]
    take_steps(optimizer, params, range(1, 2))
    assert [torch.equal(p, b) for p, b in zip(params, before)] == [True, True, True]


def test_parameters_without_a_gradient_are_left_alone():
    params = make_params([(8, 3), (8, 16), (8, 16), (8,)])
    before = [p.detach().clone() for p in params]
    optimizer = both_kinds(params)
    optimizer.step()
    take_steps(optimizer, params[:2], range(2))
    assert [torch.equal(p, b) for p, b in zip(params, before)] == [False, False, True, True]
    assert set(optimizer.state) == set(params[:2])


def test_zero_gradients_only_decay_the_weights():
    params = make_params([(8, 3), (8, 16)])
    before = params[1].detach().clone()
    for param in params:
        param.grad = torch.zeros_like(param)
    both_kinds(params, lr=0.1, weight_decay=0.5).step()
    assert torch.equal(params[1], before * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_state_saved_by_name_continues_bitwise(tmp_path, memory_format):
    def fresh() -> tuple[list[nn.Parameter], Muon]:
        params = make_params(SHAPES + VECTORS)
        for param in params:
            param.data = param.data.to(memory_format=memory_format) if param.ndim == 4 else param.data
        return params, both_kinds(params)

    straight, optimizer = fresh()
    take_steps(optimizer, straight, range(6))

    params, optimizer = fresh()
    take_steps(optimizer, params, range(3))
    state = optimizer.state_dict()
    assert {name for entry in state["state"].values() for name in entry} == {
        "momentum_buffer", "exp_avg", "exp_avg_sq", "step",
    }  # fmt: skip
    named = {f"{i}.{name}": t.contiguous() for i, entry in state["state"].items() for name, t in entry.items()}
    save_file(named, tmp_path / "optimizer.safetensors")
    save_file({str(i): p.detach().contiguous() for i, p in enumerate(params)}, tmp_path / "model.safetensors")

    resumed, optimizer = fresh()
    for i, weight in load_file(tmp_path / "model.safetensors").items():
        resumed[int(i)].data.copy_(weight)
    loaded: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(tmp_path / "optimizer.safetensors").items():
        index, name = key.split(".")
        loaded.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": loaded, "param_groups": optimizer.state_dict()["param_groups"]})
    take_steps(optimizer, resumed, range(3, 6))
    assert equal(straight, resumed)


@pytest.mark.parametrize(
    ("group", "settings", "message"),
    [
        (dict(params=make_params([(4, 4), (7,)]), use_muon=True), {}, r"shape \(7,\).*use_muon=False"),
        (dict(params=make_params([(4, 4)])), {}, "lacks `use_muon`"),
        (dict(params=make_params([(4, 4)]), use_muon=True), dict(lr_scaling="orignal"), "Did you mean 'original'"),
        (dict(params=make_params([(4, 4)]), use_muon=True), dict(momentum=1.0), "momentum must be .* got 1.0"),
        (dict(params=make_params([(4, 4)]), use_muon=True), dict(lr=-1.0), "lr must be zero or more, got -1.0"),
        (dict(params=make_params([(4, 4)]), use_muon=True), dict(ns_steps=0), "ns_steps must be one or more, got 0"),
        (dict(params=make_params([(4, 4)]), use_muon=False, betas=(0.9, 1.0)), {}, "betas must be .* below 1"),
    ],
)
def test_bad_groups_and_settings_are_refused(group, settings, message):
    with pytest.raises(ValueError, match=message):
        Muon([group], **settings)


def test_parts_cover_all_matrices_and_are_balanced():
    costs = [min(newton_schulz_flops(rows, cols)) for rows, cols in SHAPES_2D * 5]
    for num_parts in [1, 2, 3, 7, 40]:
        parts = partition(costs, num_parts)
        assert len(parts) == num_parts
        assert sorted(index for part in parts for index in part) == list(range(len(costs)))
        sums = [sum(costs[i] for i in part) for part in parts]
        assert max(sums) - min(sums) <= max(costs)


def step_on_a_rank() -> None:
    """Runs in a child process: takes three steps shared with the other rank, then takes them alone."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    counts: list[int] = []
    plain_orthogonalize = muon.orthogonalize

    def counting(matrix: Tensor, ns_steps: int) -> Tensor:
        counts.append(1)
        return plain_orthogonalize(matrix, ns_steps)

    muon.orthogonalize = counting
    shared, alone = make_params(SHAPES + VECTORS), make_params(SHAPES + VECTORS)
    shared[2].data = shared[2].data.to(memory_format=torch.channels_last)
    take_steps(both_kinds(shared), shared, range(3))
    total = torch.tensor(len(counts))
    dist.all_reduce(total)
    assert total == 3 * 4 and len(counts) < 3 * 4, f"rank {dist.get_rank()} orthogonalised {len(counts)} of {total} matrices"
    take_steps(both_kinds(alone, distribute=False), alone, range(3))
    dist.destroy_process_group()
    assert equal(shared, alone)


def test_two_ranks_share_the_work_and_get_the_unshared_weights():
    done = run_process(__file__, PYTHONPATH=PYTHONPATH)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    sys.exit(any(in_processes(2, step_on_a_rank)))
