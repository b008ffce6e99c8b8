"""Verdicts against a proxy oracle, and over several capabilities."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.synthetic import BUDGET, audit, domain

from excise.auditor.base import Results
from excise.auditor.results import renamed
from excise.auditor.verdict import judge_all
from excise.data.domain import Domain
from excise.record import ModelRef, Record, Verdict
from excise.record.measured import PROXY, role
from excise.report.limits import limits


def against_proxies(results: Results) -> Results:
    """Return the same results with every oracle called a proxy."""
    called = {
        (attack, name.replace("oracle", PROXY)): result
        for (attack, name), result in results.items()
    }
    return {key: renamed(result, key[1]) for key, result in called.items()}


def judge(results: Results, where: Domain) -> Verdict:
    """Return the verdict about the candidate."""
    return judge_all(["rmu"], results, where, BUDGET)[1][0]


def test_a_proxy_oracle_is_named_and_never_shows_a_model_as_if_never_learned() -> None:
    true = judge(audit(0.05, 0.05), domain())
    proxy = judge(against_proxies(audit(0.05, 0.05)), domain())
    assert [level.status for level in true.levels] == ["pass"] * 6
    assert [level.status for level in proxy.levels] == ["pass"] * 5 + ["untested"]
    assert proxy.highest == "D4"
    assert "can fail and not be passed" in proxy.levels[-1].reason
    assert "from the proxy oracle to the original" in proxy.levels[0].reason
    assert "proxy oracles after it" in proxy.sentence
    assert any("early checkpoint or a filtered sibling" in reason for reason in proxy.reasons)
    assert not any("proxy" in text for text in (true.sentence, *true.reasons))


def test_what_comes_back_fails_against_a_proxy_too() -> None:
    found = judge(against_proxies(audit(0.05, 0.9)), domain())
    assert found.levels[-1].status == "fail"


def test_the_page_says_that_the_oracle_is_a_proxy() -> None:
    assert role(f"{PROXY}-0") == "oracle"
    record = Record(models=(ModelRef(name="original"), ModelRef(name=f"{PROXY}-0")))
    assert any("proxy oracle" in sentence for sentence in limits(record))
    assert not any("three are needed" in sentence for sentence in limits(record))


def test_each_capability_is_shown_apart() -> None:
    rows = domain().test["facts"]
    where = domain(test={"once": rows[:100], "often": rows[100:]})
    results = audit(0.05, {"transfer": 0.5})
    # All that comes back is of the second half.
    key = ("transfer", "rmu")
    (variant,) = results[key].variants
    end = {f"u{i}": float(i >= 100) for i in range(200)}
    variant = replace(variant, unit_scores=(variant.unit_scores[0], end))
    results[key] = replace(results[key], variants=(variant,))
    (said,) = [reason for reason in judge(results, where).reasons if "By capability" in reason]
    once, often = said.partition(": ")[2].split("; often")
    assert once.startswith("once")
    assert "0.00 after transfer" in once
    assert "1.00 after transfer" in often
    assert "depth gap 1.0" in often
    assert not any("By capability" in reason for reason in judge(results, domain()).reasons)
