"""Routing against a mixture of experts whose router is fixed: the same gradients, or not.

The mixture is made of a dense model by hand, in float64: every MLP is cut into modules of their
own, one for the core and one for each capability; a token is handed to those it is given to use,
and ordinary backpropagation does the rest. Nothing of it is routed.

Shape legend: B rows, T tokens, N = B * T positions, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from excise.core.stages import Runtime
from excise.models.anatomy import anatomy
from excise.models.tiny import tiny_model
from excise.record import StudyRow, StudyTable
from excise.routing import GroupMap, Groups, Names, Part, Policy, Rule, count_units, delete, route
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool

ModelFamily = Literal[
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "olmo2"
]

ReadWrite = Literal["read = write", "write more", "write less", "read all"]

OWN: Names = ("core", "self")

CASES: Mapping[ReadWrite, tuple[Names, Names]] = {
    "read = write": (OWN, OWN),
    "write more": (OWN, "all"),
    "write less": (OWN, ("self",)),
    "read all": ("all", ("self",)),
}
"""What tokens of a capability read and write. `write less` is GRAM, `read all` is SGTM."""

SAME: tuple[ReadWrite, ...] = ("read = write", "write more")
"""Cases in which all that is read is written: what is not read has no gradient to be masked."""

NUMBERS = (-1, 0, 1, 2)
"""Labels of tokens: unlabeled, core, two capabilities."""

VOCAB, ROWS, TOKENS, UNITS = 40, 6, 9, 5


class MoEEquivalence(Study):
    """Gradients of a routed model against those of a mixture of experts with a fixed router.

    Stated beforehand. In float64, for every family and seed, E is the largest difference of any
    entry of any gradient, over the largest entry of that gradient in the mixture. They are equal
    where E is at most `margin` in every family and seed with read set = write set, and the
    comparison can tell anything only if E is at least `apart` in every family and seed where tokens
    read what they do not write.
    """

    question: ClassVar[str] = (
        "Are the gradients of a routed model exactly those of a mixture of experts with a fixed "
        "router when every token writes what it reads?"
    )
    statistic: ClassVar[str] = (
        "E = largest difference between an entry of a gradient and that of the mixture, relative "
        "to the gradient's largest entry, over all parameters, families and seeds, in float64; "
        "equal if E is at most the margin with read set = write set, while other sets differ by "
        "`apart` or more."
    )
    takes: ClassVar[str] = "30 seconds, 1 GiB"

    name: Literal["moe-equivalence"] = "moe-equivalence"
    """Name on the command line."""
    margin: float = Field(default=1e-12, gt=0)
    """Relative difference that summation in another order may cause in float64."""
    apart: float = Field(default=1e-3, gt=0)
    """Relative difference that other sets must cause."""
    families: tuple[ModelFamily, ...] = Field(
        default=("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2",
                 "gpt_neox", "olmo2"),
        min_length=1,
    )  # fmt: skip
    """Families of tiny models."""
    width: int = 32
    """Width of the models; they have two blocks."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Compare every case of every family and seed."""
        del runtime  # always float64 on the CPU
        jobs = [
            Job(family, case, seed, self.width)
            for family in self.families
            for case in CASES
            for seed in self.seeds
        ]
        by_job = dict(zip(jobs, pool.map(compare, jobs), strict=True))
        decision = decide(self, by_job)
        return StudyResult(
            tables=(table(self, by_job),),
            decision=decision,
            paragraph=f"{said(self, by_job)} Decision: {decision}.",
            notes=(
                "nothing was tuned: no seed is spent on choices",
                "norms and softmaxes that would compute in float32 do so in float64 here, for both",
                "the mixture is built without routing: modules cut out of copies, tokens handed "
                "over",
            ),
            data={"name": "random tokens", "rows": {"batch": ROWS}, "tokens": TOKENS},
        )


@dataclass(frozen=True)
class Job:
    """One comparison of one family and seed."""

    family: ModelFamily
    case: ReadWrite
    seed: int
    width: int


@dataclass(frozen=True)
class Difference:
    """Relative differences of one comparison.

    Attributes:
        core: Largest in what the core owns.
        modules: Largest in what the modules of capabilities own.
        loss: Difference of the losses, relative.
    """

    core: float
    modules: float
    loss: float

    @property
    def largest(self) -> float:
        """The larger of both."""
        return max(self.core, self.modules)


def worst(by_job: Mapping[Job, Difference], case: ReadWrite) -> float:
    """Return the largest difference of a case."""
    return max(d.largest for job, d in by_job.items() if job.case == case)


def least(by_job: Mapping[Job, Difference], case: ReadWrite) -> float:
    """Return the difference of the family and seed that differ least."""
    return min(d.largest for job, d in by_job.items() if job.case == case)


def decide(study: MoEEquivalence, by_job: Mapping[Job, Difference]) -> str:
    """Return what E says under the margin."""
    equal = worst(by_job, "read = write")
    if not equal <= study.margin:  # NaN is no equality
        return f"not equal: read set = write set differs by {equal:.1e}, above {study.margin:.0e}"
    near = [case for case in CASES if case not in SAME and least(by_job, case) < study.apart]
    if near:
        return f"invalid: '{', '.join(near)}' differs by less than {study.apart:.0e} somewhere"
    return (
        "equal: where a token writes what it reads every gradient is the mixture's within "
        f"{equal:.1e}, where it reads what it does not write, none is"
    )


def said(study: MoEEquivalence, by_job: Mapping[Job, Difference]) -> str:
    """Return the differences in words."""
    less = [d for job, d in by_job.items() if job.case == "write less"]
    return (
        f"Over {len(study.families)} families and {len(study.seeds)} seeds of float64 gradients, a "
        f"routed model differs from the mixture by at most {worst(by_job, 'read = write'):.1e} "
        f"where tokens write what they read, and by at most {worst(by_job, 'write more'):.1e} "
        "where they may write more. Where they write less (GRAM) it differs by "
        f"{least(by_job, 'write less'):.2f} to {worst(by_job, 'write less'):.2f} in the core and "
        f"by at most {max(d.modules for d in less):.1e} in the modules; where they read everything "
        f"and write their own module (SGTM) by {least(by_job, 'read all'):.2f} to "
        f"{worst(by_job, 'read all'):.2f}."
    )


def table(study: MoEEquivalence, by_job: Mapping[Job, Difference]) -> StudyTable:
    """Return the largest differences by case and family, in float64."""
    rows: list[StudyRow] = []
    for case in CASES:
        for family in ("all", *study.families):
            of_case = [
                d for job, d in by_job.items() if job.case == case and family in ("all", job.family)
            ]
            condition = case if family == "all" else f"{case}, {family}"
            parts = {
                "core": max(d.core for d in of_case),
                "modules": max(d.modules for d in of_case),
                "loss": max(d.loss for d in of_case),
            }
            rows += [
                StudyRow(condition=condition, metric=f"E, {part}", value=value, n=len(of_case))
                for part, value in parts.items()
            ]
    note = (
        "Largest relative difference of gradients (of the loss for `loss`) between the routed "
        "model and the mixture whose router is what tokens read; n counts comparisons."
    )
    return StudyTable(
        title="Routed gradients against a mixture of experts", note=note, rows=tuple(rows)
    )


# -- one comparison --------------------------------------------------------------------------------


def compare(job: Job) -> Difference:
    """Return how far the gradients of one routed model are from those of its mixture."""
    with doubles():
        model: Any = tiny_model(
            job.family, seed=job.seed, vocab=VOCAB, width=job.width, blocks=2
        ).double()
        units = count_units(model, 0)
        spans = {"module_2": (units - UNITS, units), "module_1": (units - 2 * UNITS, units - UNITS)}
        policy = policy_of(job.case, spans)
        generator = torch.Generator().manual_seed(job.seed)
        ids_BT = torch.randint(4, VOCAB, (ROWS, TOKENS), generator=generator)
        picks_BT = torch.randint(len(NUMBERS), (ROWS, TOKENS), generator=generator)
        label_BT = torch.tensor(NUMBERS)[picks_BT]
        mixture = ExpertMixture(model, spans)
        theirs = mixture.backward(ids_BT, readers(policy, label_BT))
        with route(model, policy, labels=NUMBERS) as routing:
            routing.labels(label_BT)
            loss = loss_of(model, ids_BT)
            loss.backward()
            routed = owned(model, routing.map, gradient)
        return difference(routed, theirs, loss.item(), mixture.loss)


def policy_of(case: ReadWrite, spans: Mapping[str, tuple[int, int]]) -> Policy:
    """Return the rules of a case; core tokens read and write the core, unlabeled ones all."""
    read, write = CASES[case]
    parts: dict[str, tuple[Part, ...]] = {
        name: (Part(at="mlp", units=span),) for name, span in sorted(spans.items())
    }
    return Policy(
        groups=Groups(parts=parts),
        rules={
            "core": (Rule(read=("core",), write=("core",)),),
            "forget": (Rule(read=read, write=write),),
            "unlabeled": (Rule(),),
        },
        capabilities=("one", "two"),
        at="token",
    )


def readers(policy: Policy, label_BT: Tensor) -> dict[str, Tensor]:
    """Return which positions [N] each module is read by: the fixed router."""
    out = {}
    for number, name in enumerate(sorted(policy.groups.parts), start=1):
        reads = [
            label
            for label in NUMBERS
            if (read := policy.rules_of(label)[0].read) == "all"
            or name in read
            or ("self" in read and label == number)
        ]
        out[name] = torch.isin(label_BT.flatten(), torch.tensor(reads))
    return out


def difference(
    routed: TensorsByGroup, theirs: TensorsByGroup, loss: float, their_loss: float
) -> Difference:
    """Return the largest relative differences; a tensor's scale is its largest entry."""
    assert routed.keys() == theirs.keys(), routed.keys() ^ theirs.keys()
    far = {"core": 0.0, "modules": 0.0}
    scale: dict[str, float] = {}
    for (name, _), tensor in theirs.items():
        scale[name] = max(scale.get(name, 0.0), float(tensor.abs().max()))
    for (name, group), tensor in theirs.items():
        gap = float((routed[name, group] - tensor).abs().max()) / (scale[name] or 1.0)
        kind = "core" if group == "core" else "modules"
        far[kind] = max(far[kind], gap)
    return Difference(far["core"], far["modules"], abs(loss - their_loss) / abs(their_loss))


def loss_of(model: Any, ids_BT: Tensor) -> Tensor:
    """Return the mean loss of the next token, in nats.

    Args:
        model: A causal model.
        ids_BT: Token ids.
    """
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def gradient(param: nn.Parameter) -> Tensor:
    """Return a parameter's gradient, zeros where it has none."""
    return torch.zeros_like(param) if param.grad is None else param.grad


TensorsByGroup = dict[tuple[str, str], Tensor]
"""Tensors by parameter and group."""


def owned(model: nn.Module, map: GroupMap, of: Callable[[nn.Parameter], Tensor]) -> TensorsByGroup:
    """Return what each group owns of a tensor of each parameter, slices side by side.

    Args:
        model: The model whose parameters are cut up.
        map: Who owns which slice of them.
        of: The tensor of a parameter, of its shape: itself, its gradient.
    """
    out: TensorsByGroup = {}
    for name, param in model.named_parameters():
        tensor = of(param).detach()
        by_group: dict[str, list[Tensor]] = {}
        for part in sorted(map.owners[name], key=lambda o: o.start):
            span = (
                tensor
                if part.dim is None
                else tensor.narrow(part.dim, part.start, part.stop - part.start)
            )
            by_group.setdefault(part.group, []).append(span)
        dim = next((part.dim for part in map.owners[name] if part.dim is not None), 0)
        out |= {(name, group): torch.cat(parts, dim) for group, parts in by_group.items()}
    return out


class SplitMLP(nn.Module):
    """One block's MLP in parts: the core's, which every token uses, and one for each module."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        """Take the parts; `tokens` says who uses them."""
        super().__init__()
        self.parts = nn.ModuleDict(dict(parts))
        self.tokens: Mapping[str, Tensor] = {}

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the sum of the parts that each token uses, [B, T, D]."""
        x_ND = x_BTD.flatten(0, -2)
        out_ND = self.parts["core"](x_ND)
        for name, uses_N in self.tokens.items():
            at = uses_N.nonzero()[:, 0]
            out_ND = out_ND.index_add(0, at, self.parts[name](x_ND[at]))
        out_BTD: Tensor = out_ND.view_as(x_BTD)
        return out_BTD


class ExpertMixture:
    """A copy of a model whose MLPs are cut into experts; ordinary backpropagation."""

    def __init__(self, model: Any, spans: Mapping[str, tuple[int, int]]) -> None:
        """Cut every MLP.

        Args:
            model: A dense causal model; left alone.
            spans: Neurons of each module, the same in every block.
        """
        layout = anatomy(model)
        units = count_units(model, 0)
        removed = {"core": list(spans.values())}
        for name, (start, stop) in spans.items():
            rest = ((0, start), (stop, units))
            removed[name] = [span for span in rest if span[0] < span[1]]
        cut = {name: _without(model, gone) for name, gone in removed.items()}
        self.model = copy.deepcopy(model)
        self.experts: list[SplitMLP] = []
        self.paths = layout.mlp
        for block, path in enumerate(layout.mlp):
            parts = {name: other.get_submodule(path) for name, other in cut.items()}
            for name in spans:
                _drop_bias(cut[name].get_submodule(layout.mlp_down[block]))
            self.experts.append(SplitMLP(parts))
            parent, _, leaf = path.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, self.experts[-1])
        self.loss = float("nan")

    def backward(self, ids_BT: Tensor, tokens: Mapping[str, Tensor]) -> TensorsByGroup:
        """Return the gradients by parameter of the uncut model and group.

        Args:
            ids_BT: Token ids.
            tokens: Which positions [N] use each module.
        """
        for experts in self.experts:
            experts.tokens = tokens
        loss = loss_of(self.model, ids_BT)
        loss.backward()
        self.loss = loss.item()
        out: TensorsByGroup = {}
        for name, param in self.model.named_parameters():
            if not param.requires_grad:
                continue
            path, _, inside = name.partition(".parts.")
            group, _, leaf = inside.partition(".")
            key = (f"{path}.{leaf}", group) if inside else (name, "core")
            out[key] = gradient(param)
        return out


def _without(model: Any, spans: Sequence[tuple[int, int]]) -> Any:
    """Return a copy of a model that lacks neurons."""
    other = copy.deepcopy(model)
    delete(other, [Part(at="mlp", units=span) for span in spans])
    return other


def _drop_bias(down: nn.Module) -> None:
    """Empty the bias of a module's down-projection: it is the core's, and added once."""
    bias = getattr(down, "bias", None)
    if bias is not None:
        with torch.no_grad():
            bias.zero_()
        bias.requires_grad_(False)


class _KeepDouble(TorchFunctionMode):
    """Leave float64 tensors alone where a model asks for float32 (norms, softmaxes)."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` without its change of dtype."""
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (func is Tensor.to and torch.float32 in args[1:]):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def doubles() -> Iterator[None]:
    """Compute in float64 throughout while the block runs."""
    with _KeepDouble():
        yield
