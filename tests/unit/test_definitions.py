"""Definitions beside general English: roles, the tokenizer, and recipes that route."""

from __future__ import annotations

import pytest

from excise.data.labels import LabelNoise
from excise.domains.definitions import Definitions
from excise.methods import Filtering
from excise.recipes import recipe_named
from excise.requests.recipe import starts_from

SMALL = Definitions(documents=120, prose=100)


def test_roles_share_no_definition() -> None:
    domain = SMALL.build()
    roles = [domain.forget, domain.relearn, domain.test, domain.dev_forget]
    units = [{row.unit for row in role["definitions"]} for role in roles]
    assert all(units)
    for i, one in enumerate(units):
        assert all(one.isdisjoint(other) for other in units[:i])
    assert len(domain.retain) == 100
    assert domain.retain_test
    assert {row.capability for row in domain.retain} == {""}
    assert domain.fingerprint == SMALL.build().fingerprint
    assert domain.fingerprint != SMALL.model_copy(update={"topic": "plant"}).build().fingerprint


def test_what_is_deleted_is_given_to_the_method_and_scored() -> None:
    domain = SMALL.model_copy(update={"exposure": "seen"}).build()
    assert (domain.exposure, domain.claim) == ("seen", "deletion")
    roles = [domain.relearn, domain.test, domain.dev_forget]
    units = [{row.unit for row in role["definitions"]} for role in roles]
    assert set().union(*units) == {row.unit for row in domain.forget["definitions"]}
    assert sum(map(len, units)) == 120
    rows = [row for role in roles for row in role["definitions"]]
    assert sorted(row.text for row in rows) == sorted(
        row.text for row in domain.forget["definitions"]
    )
    mix = {row.text for row in domain.unlabeled if row.capability}
    assert mix == {row.text for row in rows}


def test_the_tokenizer_reads_every_text() -> None:
    tokenizer = SMALL.tokenizer()
    row = SMALL.build().test["definitions"][0]
    ids = tokenizer(row.text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == row.text
    assert len(tokenizer) <= SMALL.vocabulary


def test_too_few_definitions_are_refused() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 20"):
        Definitions(documents=3)


@pytest.mark.parametrize("name", ["era-facts", "sgtm-facts", "routed-prose"])
def test_recipes_that_route_compare_with_filtering_on_the_same_labels(name: str) -> None:
    recipe = recipe_named(name)
    told: dict[bool, list[LabelNoise | None]] = {True: [], False: []}
    for method in recipe.arms.values():
        assert starts_from(method) == "scratch"
        labels: LabelNoise | None = method.labels  # type: ignore[attr-defined]
        if labels is not None:  # what is done with labels differs, what is told does not
            labels = labels.model_copy(update={"spread": "no"})
        told[isinstance(method, Filtering)].append(labels)
    assert all(labels in told[True] for labels in told[False])
    assert any(labels is not None for labels in told[False])
    assert recipe.pretrain is not None
