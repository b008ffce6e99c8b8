"""Expand, route, ablate: what ERA from scratch and ERA from a trained model share."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from excise.core.config import Config
from excise.core.context import Context
from excise.data.domain import CORE
from excise.data.stream import encode
from excise.models.anatomy import anatomy
from excise.routing.ablation import Cutting, Seen, Setup, own_units
from excise.routing.coherence import Coherence, repairing
from excise.routing.groups import Groups
from excise.routing.modules import Module, place
from excise.routing.rules import Policy, Rule
from excise.routing.tokens import TokenWeights, ordinary, token_counts

PUBLISHED = {
    "expand.depth": "neurons are added in layers 0 to 4 of 8",
    "expand.width": "64 neurons beside 2048",
    "expand.alpha": "-0.75 on the original neurons for tokens of forget stories",
    "expand.l1": "1e-4 on the MLP activations of the target layers",
    "expand.tokens": "slope 1, offset -4, smoothing 1 and 20 (appendix C)",
    "expand.coherence": "one batch of 64 retain stories, lr 5e-5, at most 40 steps, best on 1000",
}
"""Where the defaults come from: arXiv:2410.04332, appendix C and the released code."""


class Expand(Config):
    """The three steps of Expand-Route-Ablate."""

    width: float = Field(default=0.03125, gt=0, le=8)
    """Neurons added to each routed block, as a share of its MLP's."""
    depth: float = Field(default=0.625, gt=0, le=1)
    """Share of the blocks, from the first, that are expanded and routed."""
    alpha: float = -0.75
    """Weight of the gradient of a forget token that passes back through the original neurons."""
    tokens: TokenWeights | None = TokenWeights()
    """How wholly a token of a labelled row is routed, by how typical it is; missing for wholly."""
    l1: float = Field(default=1e-4, ge=0)
    """Weight of the L1 norm of the routed blocks' MLP activations."""
    lr: float = Field(default=1.0, ge=0)
    """Learning rate of the added neurons, as a multiple of the schedule's."""
    coherence: Coherence | None = Coherence()
    """The light fine-tune after the ablation; missing for none."""


def expand_setup(
    model: nn.Module, seen: Seen, expand: Expand, ctx: Context, *, max_length: int, silent: bool
) -> Setup:
    """Add neurons, and say what tokens of each label pass back.

    Args:
        model: The model; neurons are added in place.
        seen: Rows and capabilities.
        expand: Settings.
        ctx: Seed.
        max_length: Tokens per row.
        silent: Whether the new neurons lead nowhere at first.

    Returns:
        Groups `core`, `original` (the routed blocks' own neurons) and one module per capability.
    """
    blocks = routed_blocks(model, expand.depth)
    original = own_units(model, blocks)
    module = Module(width=expand.width, blocks=blocks, grow=True)
    placed = place(model, module, len(seen.names), ctx.seed_for("grow"), silent=silent)
    groups = Groups(parts={"original": original, **placed.parts})
    forget = Rule(edges={"original": expand.alpha})
    rules: dict[str, tuple[Rule, ...]] = {
        "core": (Rule(),),
        "unlabeled": (Rule(),),
        "forget": (forget,),
    }
    policy = Policy(groups=groups, rules=rules, capabilities=seen.names)
    soften_V = routed_share(model, seen, expand.tokens, max_length)
    return Setup(policy, placed, soften_V, blocks)


def routed_blocks(model: nn.Module, depth: float) -> tuple[int, ...]:
    """Return the first blocks, at least one."""
    count = anatomy(model).num_blocks
    return tuple(range(max(1, round(depth * count))))


def routed_share(
    model: nn.Module, seen: Seen, config: TokenWeights | None, max_length: int
) -> Tensor | None:
    """Return how wholly each token of the vocabulary is routed in a labelled row, or None."""
    if config is None:
        return None
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    vocab = int(embedding.weight.shape[0])
    counts = []
    for forget in (True, False):
        rows = [row for row in seen.rows if (row.label > CORE) == forget]
        examples = encode(rows, seen.tokenizer, max_length=max_length)
        counts.append(token_counts((example.ids for example in examples), vocab))
    return 1 - ordinary(counts[0], counts[1], config)


def expand_cutting(expand: Expand, ctx: Context, *, max_length: int) -> Cutting:
    """Return how the added neurons are trained, deleted, and what is done afterwards.

    Args:
        expand: Settings.
        ctx: Seed, device.
        max_length: Tokens per row.
    """
    repair = repairing(expand.coherence, ctx, max_length=max_length)
    return Cutting("delete", rate=expand.lr, l1=expand.l1, repair=repair)
