"""Every place a mask can go, in float64, against the closed form and against two passes.

Shape legend: N tokens, I inputs, H hidden, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from excise.routing.backward import (
    routed_batch_norm,
    routed_call,
    routed_conv2d,
    routed_layer_norm,
    routed_linear,
    scale_columns,
    scale_grad,
    spread,
)
from excise.routing.weights import WeightedRange, outer, rows_sum, weigh

N, I, H, O = 12, 5, 8, 3  # noqa: E741
CUT = 3
"""Hidden units before it are one group's, the others another's."""


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return rand(*shape, seed=seed).requires_grad_()


def pieces(*weights_N: Tensor, at: tuple[int, ...] = (0, CUT, H)) -> list[WeightedRange]:
    return [(a, b, weigh(w)) for a, b, w in zip(at[:-1], at[1:], weights_N, strict=True)]


WEIGHTS = {
    "binary": (torch.tensor([1.0, 0, 1] * 4), torch.tensor([0.0, 1, 1] * 4)),
    "rare": (torch.tensor([1.0] * 11 + [0]), torch.tensor([1.0] + [0] * 11)),
    "fractions": (torch.linspace(0, 1, N), torch.linspace(1.5, -0.75, N)),
    "negative": (torch.full((N,), -0.75), torch.ones(N)),
    "nothing": (torch.zeros(N), torch.zeros(N)),
    "ones": (torch.ones(N), torch.ones(N)),
}


def wide(a_N: Tensor, b_N: Tensor) -> Tensor:
    """Return weights per token and hidden unit."""
    return torch.cat([a_N[:, None].expand(N, CUT), b_N[:, None].expand(N, H - CUT)], 1).double()


class Net:
    """x -> W_in, b_in -> tanh -> W_out, c -> a quadratic loss, as in the table."""

    def __init__(self) -> None:
        self.x, self.w_in, self.b_in = leaf(N, I), leaf(H, I), leaf(H)
        self.w_out, self.c = leaf(O, H), leaf(O)
        self.delta_NO = rand(N, O, seed=5)

    def grads(self, y: Tensor) -> list[Tensor | None]:
        """Return gradients of x, W_in, b_in, W_out, c for the upstream signal delta."""
        for t in self.leaves:
            t.grad = None
        y.backward(self.delta_NO)
        return [t.grad for t in self.leaves]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.w_in, self.b_in, self.w_out, self.c]

    def table(self, out_NH: Tensor, in_NH: Tensor, edge_NH: Tensor) -> list[Tensor]:
        """Return the closed forms: B's masks mu_out and mu_in, A's m, all as [N, H]."""
        with torch.no_grad():
            a = torch.tanh(self.x @ self.w_in.t() + self.b_in)
            g = (self.delta_NO @ self.w_out) * edge_NH * (1 - a**2)
            return [
                g @ self.w_in,
                (in_NH * g).t() @ self.x,
                (in_NH * g).sum(0),
                self.delta_NO.t() @ (out_NH * a),
                self.delta_NO.sum(0),
            ]


def same(got: list[Tensor | None], wanted: list[Tensor]) -> None:
    for g, w in zip(got, wanted, strict=True):
        if g is None:
            assert not w.any()
        else:
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("place", ["A", "B", "C", "D"])
def test_gradients_are_those_of_the_table(name: str, place: str) -> None:
    net, (u, v) = Net(), WEIGHTS[name]
    ones = torch.ones(N, H, dtype=torch.float64)
    m = pieces(u, v)
    write = m if place in "BC" else None
    edge = m if place in "AC" else None
    read = m if place == "D" else None
    hidden = torch.tanh(routed_linear(net.x, net.w_in, net.b_in, write_out=write))
    y = routed_linear(scale_columns(hidden, read, edge), net.w_out, net.c, write_in=write,
                      write_bias=[(0, O, None)])  # fmt: skip
    w = wide(u, v)
    a = torch.tanh(net.x @ net.w_in.t() + net.b_in)
    plain = F.linear(a * w if place == "D" else a, net.w_out, net.c)
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    got = net.grads(y)
    if place == "D":  # the function itself changes: ordinary autograd is the truth
        same(got, net.grads(plain))  # type: ignore[arg-type]
    else:
        same(got, net.table(w if write else ones, w if write else ones, w if edge else ones))
    if name == "nothing" and place in "BC":
        assert got[1] is None
        assert got[2] is None
        assert got[3] is None


@pytest.mark.parametrize("name", ["binary", "fractions", "negative"])
def test_stop_gradients_and_one_pass_per_weight_give_the_same(name: str) -> None:
    """The definitions, not the closed forms: sg() in autograd, token by token."""
    net, (u, v) = Net(), WEIGHTS[name]
    w = wide(u, v)
    m = pieces(u, v)
    total = [torch.zeros_like(t) for t in net.leaves]
    for n in range(N):  # B then A, one pass for each token
        mu = w[n]
        w_in = mu[:, None] * net.w_in + (1 - mu[:, None]) * net.w_in.detach()
        b_in = mu * net.b_in + (1 - mu) * net.b_in.detach()
        w_out = mu * net.w_out + (1 - mu) * net.w_out.detach()
        a = torch.tanh(F.linear(net.x[n], w_in, b_in))
        a = mu * a + (1 - mu) * a.detach()
        loss = (F.linear(a, w_out, net.c) * net.delta_NO[n]).sum()
        for sum_, g in zip(total, torch.autograd.grad(loss, net.leaves), strict=True):
            sum_ += g
    hidden = torch.tanh(routed_linear(net.x, net.w_in, net.b_in, write_out=m))
    y = routed_linear(scale_columns(hidden, None, m), net.w_out, net.c, write_in=m,
                      write_bias=[(0, O, None)])  # fmt: skip
    same(net.grads(y), total)


def test_finite_differences_agree_where_the_gradient_is_one() -> None:
    """Reading masks are ordinary functions; so is any routing of the input's gradient."""
    u, v = WEIGHTS["fractions"]
    x, w, b = leaf(N, I), leaf(H, I), leaf(H)

    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        m = pieces(u, v, at=(0, 2, I))
        return routed_linear(scale_columns(x, m, None), w, b)

    assert torch.autograd.gradcheck(f, (x, w, b))
    assert torch.autograd.gradcheck(
        lambda x: routed_linear(x, w.detach(), b.detach(), write_out=pieces(u, v)), (x,)
    )


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_conv1d_is_a_linear_layer_transposed(name: str, side: str) -> None:
    x, w, b = leaf(3, 4, I), leaf(H, I), leaf(H)
    xt, wt, bt = (t.detach().clone().requires_grad_() for t in (x, w.t(), b))
    m = pieces(*WEIGHTS[name], at=(0, 2, H if side == "out" else I))
    one = [(0, H, None)]
    kwargs: dict[str, Any] = {f"write_{side}": m, "write_bias": m if side == "out" else one}
    y = routed_linear(x, w, b, **kwargs)
    yt = routed_linear(xt, wt, bt, transposed=True, **kwargs)
    torch.testing.assert_close(y, yt)
    delta = rand(3, 4, H)
    y.backward(delta)
    yt.backward(delta)
    for t, s in ((x, xt), (w, wt), (b, bt)):
        if t.grad is None:
            assert s.grad is None
        else:
            assert s.grad is not None
            torch.testing.assert_close(t.grad, s.grad if t is not w else s.grad.t())


def test_values_and_full_gradients_are_bit_equal_to_the_plain_layer() -> None:
    x, w, b = (t.float().detach().requires_grad_() for t in (rand(2, 6, I), rand(H, I), rand(H)))
    half = pieces(torch.ones(N), torch.linspace(0, 1, N))
    assert torch.equal(routed_linear(x, w, b, write_out=half), F.linear(x, w, b))
    y = routed_linear(x, w, b, write_out=pieces(torch.ones(N), torch.ones(N)))
    y.square().sum().backward()
    got = [t.grad for t in (x, w, b)]
    for t in (x, w, b):
        t.grad = None
    F.linear(x, w, b).square().sum().backward()
    for g, t in zip(got, (x, w, b), strict=True):
        assert g is not None
        assert t.grad is not None
        torch.testing.assert_close(g, t.grad, rtol=1e-6, atol=1e-6)


def test_many_groups_and_few_give_the_same_sums() -> None:
    wide = 4 * H
    a, b = rand(N, wide), rand(N, I)
    seeds = [torch.Generator().manual_seed(i) for i in range(wide)]
    weights = [torch.rand(N, generator=seed).double() for seed in seeds]
    weights[3] = torch.ones(N).double()
    at = tuple(range(wide + 1))
    many = pieces(*weights, at=at)
    out = torch.empty(wide, I, dtype=torch.float64)
    outer(a, b, many, out)
    wanted = torch.stack([(weights[i] * a[:, i]) @ b for i in range(wide)])
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(rows_sum(a, many), torch.stack(weights, 1).mul(a).sum(0))
    torch.testing.assert_close(scale_columns(a, many, None), torch.stack(weights, 1).mul(a))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("side", ["out", "in"])
def test_convolutions(name: str, side: str) -> None:
    x, w, b = leaf(N, 4, 5, 5), leaf(H, 4, 3, 3), leaf(H)
    u, v = WEIGHTS[name]
    cut = (0, CUT, H) if side == "out" else (0, 1, 4)
    m = pieces(u, v, at=cut)
    one = [(0, H, None)]
    kwargs: dict[str, Any] = {f"write_{side}": m, "write_bias": m if side == "out" else one}
    y = routed_conv2d(x, w, b, stride=(2, 2), padding=(1, 1), **kwargs)
    assert torch.equal(y, F.conv2d(x, w, b, 2, 1))
    delta = rand(*y.shape)
    y.backward(delta)
    got = [t.grad for t in (x, w, b)]
    wanted = [torch.zeros_like(t) for t in (x, w, b)]
    for n in range(N):  # one pass for each image, masked afterwards
        plain = F.conv2d(x[n : n + 1], w, b, 2, 1)
        gx, gw, gb = torch.autograd.grad(plain, (x, w, b), delta[n : n + 1])
        for (start, stop), k in zip(((cut[0], cut[1]), (cut[1], cut[2])), (u[n], v[n])):
            (gw if side == "out" else gw.transpose(0, 1))[start:stop] *= k
            if side == "out":
                gb[start:stop] *= k
        for sum_, g in zip(wanted, (gx, gw, gb), strict=True):
            sum_ += g
    same(got, wanted)


def per_token(module: nn.Module, x: Tensor, u: Tensor, delta: Tensor) -> list[Tensor]:
    """Return gradients of input and weights, one pass for each token, weights masked."""
    params = list(module.parameters())
    total = [torch.zeros_like(t) for t in (x, *params)]
    for n in range(len(u)):
        mask = torch.zeros(len(u), *(1,) * (x.dim() - 1), dtype=x.dtype)
        mask[n] = 1
        grads = torch.autograd.grad(module(x), (x, *params), delta * mask)
        for i, g in enumerate(grads):
            total[i] += g if i == 0 else g * u[n]
    return total


class RMS(nn.Module):
    """A norm as language models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(rand(I))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("name", ["binary", "fractions", "nothing", "negative"])
@pytest.mark.parametrize("kind", ["layer_norm", "rms", "batch_norm", "any"])
def test_norms_and_any_other_module(kind: str, name: str) -> None:
    u = WEIGHTS[name][0]
    one = [(0, I, weigh(u))]
    x = leaf(N, I)
    module: nn.Module
    call: Callable[[], Tensor]
    if kind == "layer_norm":
        module = norm = nn.LayerNorm(I).double()
        call = lambda: routed_layer_norm(x, norm, one, one)  # noqa: E731
    elif kind == "batch_norm":
        module = batch = nn.BatchNorm1d(I).double()
        call = lambda: routed_batch_norm(x, batch, one, one)  # noqa: E731
    else:
        module = rms = RMS()

        def call() -> Tensor:
            if kind == "any":
                out: Tensor = routed_call(rms, rms.forward, {"weight": (None, one)}, (x,), {})
                return out
            laid = spread(rms.weight, (N,), N, one)
            return laid * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))

    with torch.no_grad():
        for p in module.parameters():
            p.copy_(rand(*p.shape, seed=3))
    delta = rand(N, I, seed=7)
    y = call()
    torch.testing.assert_close(y, module(x), rtol=0, atol=0)
    y.backward(delta)
    got = [x.grad, *(p.grad for p in module.parameters())]
    same(got, per_token(module, x, u, delta))
    if name == "nothing":
        assert all(p.grad is None for p in module.parameters())


def test_batch_norm_moves_its_statistics_once_and_like_the_plain_one() -> None:
    for momentum in (0.1, None):
        a, b = (nn.BatchNorm2d(4, momentum=momentum) for _ in range(2))
        x = rand(N, 4, 3, 3).float()
        one = [(0, 4, weigh(torch.linspace(0, 1, N)))]
        for training in (True, True, False):
            a.train(training)
            b.train(training)
            torch.testing.assert_close(routed_batch_norm(x, a, one, one), b(x))
            x = x * 1.5 + 1
        for key, value in b.state_dict().items():
            torch.testing.assert_close(a.state_dict()[key], value)


def test_any_module_draws_the_same_numbers_in_both_calls() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(rand(I))

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x * self.weight, 0.5)

    module, x = Noisy(), leaf(N, I)
    u = WEIGHTS["fractions"][0]
    torch.manual_seed(3)
    y = routed_call(module, module.forward, {"weight": (None, [(0, I, weigh(u))])}, (x,), {})
    after = torch.rand(1)
    torch.manual_seed(3)
    plain = module(x)
    assert torch.equal(y, plain)
    assert torch.equal(after, torch.rand(1))
    y.sum().backward()
    kept = (plain != 0).double() * 2
    assert module.weight.grad is not None
    torch.testing.assert_close(module.weight.grad, (kept * x * u[:, None]).sum(0))


def test_edges_by_hand() -> None:
    x = leaf(N, H)
    u, v = WEIGHTS["fractions"]
    scale_columns(x, None, pieces(u, v)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, wide(u, v))
    x.grad = None
    scale_grad(x, u.double()[:, None]).sum().backward()
    torch.testing.assert_close(x.grad, u.double()[:, None].expand(N, H))


def test_a_weight_sliced_on_both_sides_is_refused() -> None:
    m = pieces(torch.ones(N), torch.zeros(N))
    with pytest.raises(ValueError, match="not both"):
        routed_linear(rand(N, H), rand(H, H), write_out=m, write_in=m)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_agree_with_the_plain_layer(dtype: torch.dtype) -> None:
    x, w, b = (rand(N, I).float(), rand(H, I).float(), rand(H).float())
    m = pieces(torch.tensor([1.0, 0] * 6), torch.linspace(0, 1, N))
    w.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = routed_linear(x, w, b, write_out=m)
        assert torch.equal(y, F.linear(x, w, b))
    y.float().sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
    wanted = wide(torch.tensor([1.0, 0] * 6), torch.linspace(0, 1, N)).t().float() @ x
    torch.testing.assert_close(w.grad, wanted, rtol=3e-2, atol=6e-2)
    half = x.to(dtype)
    y = routed_linear(half, w.detach().to(dtype).requires_grad_(), b.to(dtype), write_out=m)
    assert y.dtype == dtype
    y.sum().backward()
