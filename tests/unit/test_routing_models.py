"""Routing on whole models: a mixed batch equals what each label would give alone.

The references never touch the code under test: plain backward passes per label, masked
afterwards, with hooks that write `m a + (1 - m) sg(a)` or `m a` out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from tests.fixtures.gpt_neo import gpt_neo
from torch import Tensor, nn
from torch.nn import functional as F

from excise.core.errors import UserError
from excise.data.domain import Row, Span
from excise.data.spans import labels_of
from excise.data.stream import collate, encode_row
from excise.losses import nll
from excise.models.anatomy import anatomy
from excise.models.tiny import BYTE_VOCAB, byte_tokenizer, tiny_model
from excise.routing import GroupMap, Groups, Part, Policy, Routes, Rule, resolve, route
from excise.routing.policy import compile

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "mixtral", "phi3", "gpt_neo")
VOCAB, TOKENS = 40, 7
IDS = torch.randint(4, VOCAB, (4, TOKENS), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, -1, 1])


def make(family: str, **more: Any) -> Any:
    made = gpt_neo if family == "gpt_neo" else partial(tiny_model, family)
    model = made(**({"vocab": VOCAB, "width": 32} | more)).double()
    if family == "mixtral":  # grouped products know no float64
        model.config._experts_implementation = "eager"
    return model


def groups_for(family: str) -> Groups:
    at: Any = "experts" if family == "mixtral" else "mlp"
    module = (Part(at=at, units=(1, 3)), Part(at="heads", units=(1, 2)))
    return Groups(parts={"module_1": module, "joint": (Part(at="embed"), Part(at="norms"))})


def policy_for(family: str, kind: str) -> Policy:
    """Return rules whose core, forget and unlabeled rows all differ."""
    edges = {"core": -0.75, "module_1": 0.5} if kind in "AC" else {}
    joint = ("joint",)
    forget = Rule(write=("self", *joint) if kind in "BC" else "all", edges=edges)
    off = ("core", *joint)
    core = Rule(read=off if kind == "D" else "all", write=off if kind in "BCD" else "all")
    return Policy(
        groups=groups_for(family),
        rules={"core": (core,), "forget": (forget,), "unlabeled": (Rule(),)},
        capabilities=("x",),
        at="row",
    )


def loss_of(model: Any, rows: list[int]) -> Tensor:
    """Return the summed loss of some rows."""
    ids = IDS[rows]
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def columns(width: int, spans: dict[str, tuple[int, int]], weights: dict[str, float]) -> Tensor:
    """Return one weight per column: that of its group, core where no other is."""
    out = torch.full((width,), weights.get("core", 1.0), dtype=torch.float64)
    for group, (start, stop) in spans.items():
        out[start:stop] = weights.get(group, 1.0)
    return out


@contextmanager
def hooked(model: Any, family: str, weights: dict[str, float], how: str) -> Iterator[None]:
    """Mask activations of groups by hooks: `m a` (D) or `m a + (1 - m) sg(a)` (A)."""

    def mask(x: Tensor, m: Tensor) -> Tensor:
        return x * m if how == "D" else x * m + x.detach() * (1 - m)

    def on_input(spans: dict[str, tuple[int, int]]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            m = columns(args[0].shape[-1], spans, weights)
            return (mask(args[0], m), *args[1:])

        return hook

    body = anatomy(model)
    size = 32 // model.config.num_attention_heads
    named = dict(model.named_modules())
    with ExitStack() as stack:
        for block in range(body.num_blocks):
            out = named[body.attention_out[block]]
            heads = {"module_1": (size, 2 * size)}
            stack.callback(out.register_forward_pre_hook(on_input(heads)).remove)
            if family != "mixtral":
                down = named[body.mlp_down[block]]
                hook = on_input({"module_1": (1, 3)})
                stack.callback(down.register_forward_pre_hook(hook).remove)
            else:
                experts = named[body.mlp[block]].experts
                m = columns(4, {"module_1": (1, 3)}, weights)
                forward = experts.forward
                experts.forward = _by_expert(experts, m, mask)
                stack.callback(setattr, experts, "forward", forward)
        yield


def _by_expert(experts: Any, m: Tensor, mask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return experts that mask each one's contribution."""

    def forward(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for e in range(4):
            gate, up = F.linear(x, experts.gate_up_proj[e]).chunk(2, -1)
            out = F.linear(F.silu(gate) * up, experts.down_proj[e])
            share = (weight * (index == e)).sum(-1, keepdim=True)
            total = total + mask(out * share, m[e])
        return total

    return forward


def add_masked(total: dict[str, Tensor], model: Any, map: GroupMap, writes: set[str]) -> None:
    """Add the gradients that a label may write."""
    for name, param in model.named_parameters():
        for one in map.owners[name]:
            if one.group in writes and param.grad is not None:
                span = (one.dim or 0, one.start, one.stop - one.start)
                whole = one.dim is None
                mine = total[name] if whole else total[name].narrow(*span)
                mine += param.grad if whole else param.grad.narrow(*span)


def reference(model: Any, family: str, kind: str) -> dict[str, Tensor]:
    """Return gradients from one plain backward pass per label."""
    policy = policy_for(family, kind)
    map = resolve(model, policy.groups)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    everything = set(map.names)
    for label in (0, 1, -1):
        rule = policy.rules_of(label)[0]
        named = {"self": "module_1"}
        writes = everything if rule.write == "all" else {named.get(n, n) for n in rule.write}
        off = {} if rule.read == "all" else dict.fromkeys(everything - set(rule.read), 0.0)
        how, weights = ("D", off) if off else ("A", dict(rule.edges))
        model.zero_grad()
        rows = [i for i, other in enumerate(LABELS.tolist()) if other == label]
        with hooked(model, family, weights, how):
            loss_of(model, rows).backward()
        add_masked(total, model, map, writes)
    model.zero_grad()
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["A", "B", "C", "D"])
def test_a_mixed_batch_equals_each_label_alone(family: str, kind: str) -> None:
    model = make(family)
    wanted = reference(model, family, kind)
    plain = loss_of(model, [0, 1, 2, 3]).detach()
    with route(model, policy_for(family, kind), labels=(-1, 0, 1)) as routing:
        routing.labels(LABELS[:, None].expand(4, TOKENS))
        loss = loss_of(model, [0, 1, 2, 3])
        loss.backward()
        routing.check()
    assert torch.equal(loss.detach(), plain) == (kind != "D")
    # Gemma's norms, Mixtral's router and GPT-Neo's scores are float32 whatever the model's dtype.
    rtol = 1e-5 if family in ("gemma2", "mixtral", "gpt_neo") else 1e-9
    for name, param in model.named_parameters():
        got = torch.zeros_like(param) if param.grad is None else param.grad
        scale = float(wanted[name].abs().max()) + 1e-9
        torch.testing.assert_close(got, wanted[name], rtol=rtol, atol=rtol * scale, msg=name)


def test_tokens_of_one_row_write_apart_wherever_they_stand() -> None:
    """Per-token labels, against a model whose weights exist once for every label."""
    model = make("gpt2")
    module = model.transformer.h[1].mlp
    label_BT = torch.randint(0, 2, (4, TOKENS), generator=torch.Generator().manual_seed(4))
    policy = policy_for("gpt2", "B").model_copy(update={"at": "token"})
    with route(model, policy) as routing:
        routing.labels(label_BT)
        loss_of(model, [0, 1, 2, 3]).backward()
    got = module.c_proj.weight.grad.clone()
    model.zero_grad()
    copies = [module.c_proj.weight.detach().clone().requires_grad_() for _ in range(2)]

    def forward(x: Tensor) -> Tensor:
        each = [x @ w + module.c_proj.bias for w in copies]
        return torch.where((label_BT == 0)[..., None], each[0], each[1])

    module.c_proj.forward = forward
    loss_of(model, [0, 1, 2, 3]).backward()
    core, forget = (w.grad for w in copies)
    assert core is not None
    assert forget is not None
    wanted = core.clone()
    wanted[1:3] = forget[1:3]
    torch.testing.assert_close(got, wanted)


SPANNED = Row(
    "u",
    text="0123456789abcdef",
    spans=(Span(2, 5, "x", 1), Span(9, 10, "y", 2), Span(12, 14, "x", 1)),
)
"""A text of a core, of two capabilities, on both sides of each other."""


def at_positions(model: Any, mask_N: Tensor) -> ExitStack:
    """Let every weight get the gradient of some positions alone."""
    stack = ExitStack()

    def only(module: nn.Module) -> Callable[..., Any]:
        forward = module.forward
        names = [name for name, _ in module.named_parameters(recurse=False)]

        def masked(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            held = {name: getattr(module, name) for name in names}
            for name in names:
                setattr(module, name, nn.Parameter(held[name].detach(), requires_grad=False))
            other = forward(*args, **kwargs)
            for name in names:
                setattr(module, name, held[name])
            if not isinstance(out, Tensor):  # Mixtral's router
                return tuple(map(chosen, out, other))
            return chosen(out, other)

        return masked

    def chosen(out: Tensor, other: Tensor) -> Tensor:
        by_position = out.reshape(len(mask_N), -1)
        kept = torch.where(mask_N[:, None], by_position, other.reshape(len(mask_N), -1))
        return kept.reshape(out.shape)

    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            stack.callback(setattr, module, "forward", module.forward)
            module.forward = only(module)
    return stack


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_document_equals_the_sum_of_one_masked_pass_per_label(family: str) -> None:
    """From the row's spans through tokenizer, batch and policy to the gradients."""
    model = make(family, vocab=BYTE_VOCAB)
    at: Any = "experts" if family == "mixtral" else "mlp"
    groups = Groups(
        parts={
            "module_1": (Part(at=at, units=(1, 2)), Part(at="heads", units=(1, 2))),
            "module_2": (Part(at=at, units=(2, 3)),),
        }
    )
    rules: dict[str, tuple[Rule, ...]] = {
        "core": (Rule(write=("core",)),),
        "x": (Rule(write=("self",)),),
        "y": (Rule(write=("self", "core")),),
    }
    policy = Policy(groups=groups, rules=rules, capabilities=("x", "y"))
    writes = {0: {"core"}, 1: {"module_1"}, 2: {"module_2", "core"}}
    tokenizer = byte_tokenizer()
    batch = collate([encode_row(SPANNED, tokenizer, max_length=64)], pad_id=0)

    def loss_of_text() -> Tensor:
        return nll(model(input_ids=batch.ids_BT).logits, batch)[0]

    map = resolve(model, groups)
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    # A position has the label of the character it predicts, the last its own.
    letters = "0011100002001100"
    ruled_N = torch.tensor([int(c) for c in letters[1:] + letters[-1]])
    for label, groups_written in writes.items():
        model.zero_grad()
        with at_positions(model, ruled_N == label):
            loss_of_text().backward()
        add_masked(wanted, model, map, groups_written)
    model.zero_grad()
    with route(model, policy, labels=labels_of([SPANNED])) as routing:
        routing.set(compile(policy, routing.map, batch))
        loss_of_text().backward()
        routing.check()
    rtol = 1e-5 if family in ("gemma2", "mixtral", "gpt_neo") else 1e-9
    total = 0.0
    for name, param in model.named_parameters():
        got = torch.zeros_like(param) if param.grad is None else param.grad
        scale = float(wanted[name].abs().max()) + 1e-9
        torch.testing.assert_close(got, wanted[name], rtol=rtol, atol=rtol * scale, msg=name)
        total += float(wanted[name].abs().sum())
    assert total > 0


def test_lora_is_parameter_edge_routing() -> None:
    """Freezing all but an adapter, and letting every token write the adapter alone, are one."""
    from peft import LoraConfig, get_peft_model

    def adapted() -> Any:
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_alpha=8)
        torch.manual_seed(0)
        model = get_peft_model(make("llama"), config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
        return model

    frozen, routed = adapted(), adapted()
    for param in routed.parameters():
        param.requires_grad_(True)
    groups = Groups(parts={"adapter": (Part(at="parameters", names=("lora_A", "lora_B")),)})
    policy = Policy(groups=groups, rules={"core": (Rule(write=("adapter",)),)})
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (frozen, routed)]
    for _ in range(3):
        loss_of(frozen, [0, 1]).backward()
        optimizers[0].step()
        with route(routed, policy) as routing:
            routing.labels(torch.zeros(2, TOKENS))
            loss_of(routed, [0, 1]).backward()
            routing.step(optimizers[1])
        for (name, p), q in zip(frozen.named_parameters(), routed.parameters(), strict=True):
            assert (q.grad is None) == ("lora_" not in name), name
            assert torch.equal(p, q), name
        for optimizer in optimizers:
            optimizer.zero_grad()


def test_an_adapter_that_is_not_read_is_off() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["down_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    with model.disable_adapter():
        base = loss_of(model, [0, 1]).detach()
    groups = Groups(parts={"adapter": (Part(at="parameters", names=("lora_A", "lora_B")),)})
    core = Rule(read=("core",), write=("core",))
    policy = Policy(groups=groups, rules={"core": (core,), "unlabeled": (Rule(),)})
    with route(model, policy) as routing:
        routing.labels(torch.zeros(2, TOKENS))
        assert torch.equal(loss_of(model, [0, 1]).detach(), base)
        routing.labels(torch.full((2, TOKENS), -1))
        assert not torch.equal(loss_of(model, [0, 1]).detach(), base)


def test_gradient_checkpointing_changes_nothing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = make("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with route(model, policy_for("llama", "C")) as routing:
            routing.labels(LABELS[:, None].expand(4, TOKENS))
            loss_of(model, [0, 1, 2, 3]).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_nothing_is_left_behind(family: str) -> None:
    model = make(family)
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    wanted = loss_of(model, [0]).detach()
    with pytest.raises(RuntimeError, match="in the middle"), route(model, policy_for(family, "C")):
        raise RuntimeError("in the middle")
    for name, module in model.named_modules():
        assert set(module.__dict__) == before[name], name
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    with route(model, policy_for(family, "D")) as routing:
        routing.labels(torch.zeros(1, TOKENS))
        assert not torch.equal(loss_of(model, [0]).detach(), wanted)
        routing.set(None)
        assert torch.equal(loss_of(model, [0]).detach(), wanted)
    assert torch.equal(loss_of(model, [0]).detach(), wanted)


def test_a_forward_that_was_patched_before_comes_back() -> None:
    model = make("llama")
    down = model.model.layers[0].mlp.down_proj
    mine = lambda x: F.linear(x, down.weight) * 2  # noqa: E731
    down.forward = mine
    with route(model, policy_for("llama", "B")) as routing:
        routing.labels(LABELS[:, None].expand(4, TOKENS))
        loss_of(model, [0, 1, 2, 3]).backward()
    assert down.forward is mine


def test_every_weight_of_zero_leaves_no_gradient_at_all() -> None:
    model = make("qwen3")
    policy = Policy(groups=groups_for("qwen3"), rules={"core": (Rule(write=("joint",)),)})
    with route(model, policy) as routing:
        routes = routing.labels(torch.zeros(4, TOKENS))
        loss_of(model, [0, 1, 2, 3]).backward()
    assert routes.written == {"joint"}
    for name, param in model.named_parameters():
        owners = {one.group for one in routing.map.owners[name]}
        assert (param.grad is None) == ("joint" not in owners), name


def test_a_weight_read_behind_its_modules_back_is_refused() -> None:
    class Sneaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.inner.weight)

    model = Sneaky()
    with route(model, Groups(parts={"a": (Part(at="parameters", names=("inner",)),)})) as routing:
        routing.set(Routes(write_NG=torch.tensor([[1.0, 0.0]]), written=frozenset({"core"})))
        model(torch.ones(1, 3)).sum().backward()
        with pytest.raises(UserError, match=r"inner was never called .* reads it directly"):
            routing.check()


def test_labels_that_do_not_fit_are_refused() -> None:
    model = make("llama")
    with route(model, policy_for("llama", "B")) as routing:
        routing.labels(LABELS[:3, None].expand(3, TOKENS))
        with pytest.raises(UserError, match="sees 28 positions but labels were given for 21"):
            loss_of(model, [0, 1, 2, 3])


def test_bfloat16_models_route_too() -> None:
    model = make("llama").bfloat16()
    with route(model, policy_for("llama", "C")) as routing:
        routing.labels(LABELS[:, None].expand(4, TOKENS))
        loss_of(model, [0, 1, 2, 3]).backward()
    grads = [p.grad for p in model.parameters()]
    assert all(
        g is not None and g.dtype == torch.bfloat16 and bool(g.isfinite().all()) for g in grads
    )


def test_rows_of_an_embedding_are_scattered_apart() -> None:
    """Words of the module are written by its tokens alone, the others by the core's."""
    model = make("llama")
    embed = model.model.embed_tokens
    words = Part(at="parameters", names=("embed_tokens",), units=(10, 20))
    policy = Policy(
        groups=Groups(parts={"module_1": (words,)}),
        rules={"core": (Rule(write=("core",)),), "forget": (Rule(write=("self",)),)},
        capabilities=("x",),
        at="token",
    )
    label_BT = torch.randint(0, 2, (4, TOKENS), generator=torch.Generator().manual_seed(2))
    with route(model, policy) as routing:
        routing.labels(label_BT)
        loss_of(model, [0, 1, 2, 3]).backward()
    got = embed.weight.grad.clone()
    model.zero_grad()
    outputs = []

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        out.retain_grad()
        outputs.append(out)

    handle = embed.register_forward_hook(keep)
    loss_of(model, [0, 1, 2, 3]).backward()
    handle.remove()
    delta = outputs[0].grad
    assert delta is not None
    wanted = torch.zeros_like(embed.weight)
    for ids, labels, deltas in zip(IDS, label_BT, delta, strict=True):
        for i, label, d in zip(ids.tolist(), labels.tolist(), deltas, strict=True):
            if (10 <= i < 20) == (label == 1):
                wanted[i] += d
    torch.testing.assert_close(got, wanted)


def test_grouped_products_of_experts_route_as_the_loop_does() -> None:
    grads = []
    for how in ("eager", "grouped_mm"):
        model = make("mixtral").float()
        model.config._experts_implementation = how
        with route(model, policy_for("mixtral", "C")) as routing:
            routing.labels(LABELS[:, None].expand(4, TOKENS))
            loss_of(model, [0, 1, 2, 3]).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_routes_for_other_groups_are_refused() -> None:
    with (
        route(make("llama"), groups_for("llama")) as routing,
        pytest.raises(UserError, match="write_NG has 2 columns but the model has 3 groups"),
    ):
        routing.set(Routes(write_NG=torch.zeros(28, 2)))


def test_routing_twice_is_refused() -> None:
    model = make("llama")
    groups = groups_for("llama")
    with (
        route(model, groups),
        pytest.raises(UserError, match="routed already"),
        route(model, groups),
    ):
        pass
    with route(model, groups):
        pass
