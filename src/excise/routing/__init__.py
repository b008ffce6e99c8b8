"""Gradient routing: which part of a model each token reads, and which part it writes.

A model is cut into named groups of weights, every token has a label, and a policy says for each
label which groups take part in the forward pass, which receive the token's gradient, and how much
of it passes back through their activations. `route(model, policy)` puts that in force on any
model, in any training loop, until its `with` block ends.

The way of one batch: `Groups` name slices of a model (`groups`), which `resolve` turns into the map
of who owns what; `compile` turns a `Policy` and the batch's labels into `Routes`, one weight a
token and group (`policy`); every module that owns weights then runs (`layers`) with a backward pass
(`backward`) whose sums over tokens use those weights (`weights`). `attach` is the `with` block;
`surgery` grows the units that a group shall own, and takes them out again.

Source: Cloud et al. 2024, "Gradient Routing: Masking Gradients to Localize Computation in Neural
Networks", arXiv:2410.04332, section 3. Written anew; no code of it is used.
"""

from __future__ import annotations

from excise.routing.attach import Routing, route
from excise.routing.groups import JOINT, GroupMap, Groups, Part
from excise.routing.policy import Names, Policy, Routes, Rule, compile
from excise.routing.resolve import resolve
from excise.routing.surgery import What, count_units, delete, grow, reinit, zero

__all__ = [
    "JOINT",
    "GroupMap",
    "Groups",
    "Names",
    "Part",
    "Policy",
    "Routes",
    "Routing",
    "Rule",
    "What",
    "compile",
    "count_units",
    "delete",
    "grow",
    "reinit",
    "resolve",
    "route",
    "zero",
]
