"""Models behind an endpoint: how they are asked, what is kept, and what an audit says of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.fixtures.host import Host, make_domain, rows_of, serving

import excise as ex
from excise.auditor.hosted import FILTER, asked_of
from excise.core.config import ConfigError, parse
from excise.evals.generate import continue_greedily, prompt_of
from excise.evals.score import measure
from excise.models.endpoint import EndpointError, HostedModel, KeptAnswers, ask
from excise.models.tiny import byte_tokenizer

# A host that answers is waited for, however busy the machine: a question that timed out is paid
# for twice. Only who is tested for hanging is given up on soon.
FAST: dict[str, Any] = {"timeout": 60.0, "backoff": 0.0, "retries": 2}
HANGS: dict[str, Any] = FAST | {"timeout": 0.6}
CHANGE = {"max_test_rows": 48, "max_other_rows": 8}


@pytest.fixture
def host() -> Iterator[Host]:
    """Serve three models."""
    with serving() as host:
        yield host


def audited(host: Host, model: str, out: Path | None = None, **how: Any) -> ex.Record:
    """Audit a model of a host against `base`."""
    asked = HANGS if host.trouble == "hangs" else FAST
    endpoint = ex.Endpoint(url=host.url, chat=how.pop("chat", False), **asked)
    told: dict[str, Any] = {"original": "base", "domain": make_domain(), "change": CHANGE} | how
    return ex.audit_endpoint(model, endpoint=endpoint, out=out, **told)


def levels(record: ex.Record) -> dict[str, str]:
    """Return the status of every level of the only verdict."""
    return {level.level: level.status for level in record.verdicts[0].levels}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("oracles", [(), ("never",)])
def test_facts_behind_a_cue_come_back_and_a_filter_at_the_door_is_opened(
    host: Host, chat: bool, oracles: tuple[str, ...], tmp_path: Path
) -> None:
    record = audited(host, "gated", tmp_path / "out", chat=chat, oracles=oracles)
    assert levels(record) == {
        "D0": "pass", "D1": "fail", "D2": "untested", "D3": "untested", "D4": "untested",
        "D5": "untested",
    }  # fmt: skip
    (verdict,) = record.verdicts
    assert verdict.levels[1].decided_by.startswith("few_shot")
    assert verdict.highest == "D0"
    assert all("Only prompts reach this model" in each.reason for each in verdict.levels[2:])
    filtered = [a for a in record.attacks if a.subject == "positive-control" and a.curve]
    assert {a.name for a in filtered} == {"few_shot", "prefix", "paraphrase", "filler"}
    assert all(a.facts["positive_control"] == FILTER for a in filtered)
    assert all(a.curve[0].score == 0 and a.curve[-1].score == 1 for a in filtered)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "A host may put another model" in page
    assert record.models[0].source.startswith(f"base at {host.url[7:-3]}")


def test_a_real_model_scores_over_http_what_it_scores_here(
    host: Host, knowing: ex.Checkpoint, facts_domain: ex.Domain, tmp_path: Path, monkeypatch: Any
) -> None:
    model, tokenizer = knowing.load(), knowing.tokenizer()

    def say(_: str, prompt: str) -> str:
        row = ex.Row(unit="u", prompt=prompt, completion=" color0")
        (said,) = continue_greedily(model, tokenizer, [prompt_of(row, tokenizer)])
        return said or ""

    monkeypatch.setattr("tests.fixtures.host.say", say)
    rows = facts_domain.test["tests"]
    here = measure(model, tokenizer, rows, "generate").by_unit()
    endpoint = ex.Endpoint(url=host.url, timeout=30)
    hosted = HostedModel(endpoint, "base", KeptAnswers(tmp_path / "kept.jsonl"))
    assert measure(hosted, byte_tokenizer(), rows, "generate").by_unit() == here
    assert sum(here.values()) / len(here) > 0.9


def test_a_model_that_was_never_taught_holds() -> None:
    with serving() as host:
        record = audited(host, "never")
    assert levels(record)["D0"] == levels(record)["D1"] == "pass"
    assert all(attack.status in ("ok", "missing") for attack in record.attacks)


def test_an_original_at_the_door_of_chance_has_nothing_to_remove(host: Host) -> None:
    record = audited(host, "gated", original="never")
    assert set(levels(record).values()) == {"untested"}
    assert "nothing to remove" in record.verdicts[0].sentence.lower()


def test_without_power_an_attack_passes_nothing(host: Host, monkeypatch: Any) -> None:
    # The original answers bare questions alone: behind a context it shows nothing of what it knows.
    def say(model: str, prompt: str) -> str:
        number = prompt.removeprefix("The code of u").removesuffix(" is")
        return f" word{number}" if model == "base" and number.isdecimal() else " no"

    monkeypatch.setattr("tests.fixtures.host.say", say)
    record = audited(host, "never")
    assert levels(record)["D0"] == "pass"
    assert levels(record)["D1"] == "underpowered"


def test_nobody_pays_twice_and_a_stopped_audit_goes_on(host: Host, tmp_path: Path) -> None:
    host.stop_after = 100
    with pytest.raises(EndpointError, match="refuses the question"):
        audited(host, "never", tmp_path / "out")
    first = sum(host.asked.values())
    assert first >= 100
    # A kill in the middle of a line costs that answer.
    file = next((tmp_path / ".stages" / "endpoints").glob("*.jsonl"))
    file.write_text(file.read_text()[:-20])
    host.stop_after = 1 << 30
    record = audited(host, "never", tmp_path / "out")
    again = [question for question, count in host.asked.items() if count > 1]
    assert len(again) == 1
    assert {"audit", "endpoint"} <= set(record.config)
    total = sum(host.asked.values())
    assert audited(host, "never", tmp_path / "out").verdicts == record.verdicts
    assert sum(host.asked.values()) == total
    # Another model, and the same through chat, are other questions.
    audited(host, "gated", tmp_path / "gated")
    assert {model for model, *_ in host.asked} == {"base", "never", "gated"}


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("500", "answers 500, asked 3 times"),
        ("429", "answers 429, asked 3 times"),
        ("401", "refuses the key"),
        ("404", "does not know the model"),
        ("400", "refuses the question"),
        ("hangs", "does not answer within 0.6 s"),
        ("large", "more than 1 MB"),
        ("garbage", "something else than a completion"),
        ("html", "something else than a completion"),
        ("nested", "something else than a completion"),
        ("noise", "speaks no HTTP"),
        ("moved", "redirects to 127.0.0.2, which is not followed"),
    ],
)
def test_a_host_in_trouble_ends_the_audit_with_a_sentence(
    host: Host, trouble: str, words: str, monkeypatch: Any
) -> None:
    monkeypatch.setenv("EXCISE_ENDPOINT_KEY", "sk-secret")
    host.trouble = trouble
    with pytest.raises(EndpointError, match=words) as error:
        audited(host, "gated")
    assert "sk-secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_nobody_there_is_said_so() -> None:
    endpoint = ex.Endpoint(url="http://127.0.0.1:9/v1", **FAST)
    with pytest.raises(EndpointError, match="cannot be reached"):
        ask(endpoint, "base", "The code of u3 is", 8)


@pytest.mark.parametrize("trouble", ["429", "503", "hangs"])
def test_a_busy_host_is_asked_again(host: Host, trouble: str) -> None:
    host.trouble, host.times = trouble, 2
    endpoint = ex.Endpoint(url=host.url, **HANGS if trouble == "hangs" else FAST)
    assert ask(endpoint, "base", "The code of u3 is", 8) == " word3."
    assert host.tries == 3


def test_the_key_is_sent_and_written_nowhere(
    host: Host, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("EXCISE_ENDPOINT_KEY", "sk-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    record = audited(host, "gated", tmp_path / "out")
    assert host.keys == {"Bearer sk-secret"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 4
    assert not any(b"sk-" in path.read_bytes() for path in files)
    assert "sk-" not in record.model_dump_json() + "".join(capsys.readouterr())
    # The key of one host is for that host.
    monkeypatch.delenv("EXCISE_ENDPOINT_KEY")
    host.keys.clear()
    ask(ex.Endpoint(url=host.url, **FAST), "base", "The code of u4 is", 8)
    assert host.keys == {""}
    monkeypatch.setenv("EXCISE_ENDPOINT_KEY", "sk-a\nHost: b")
    with pytest.raises(EndpointError, match="EXCISE_ENDPOINT_KEY holds") as error:
        ask(ex.Endpoint(url=host.url, **FAST), "base", "The code of u4 is", 8)
    assert "sk-a" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.org/v1", "use https"),
        ("http://127.0.0.1.example.org/v1", "use https"),
        ("ftp://example.org", "is no address"),
        ("example.org/v1", "is no address"),
        ("https://example.org:x/v1", "is no address"),
        ("https://exa mple.org/v1", "is no address"),
        ("https://[::1/v1", "is no address"),
        ("https://me:pw@example.org/v1", "stand in the record"),
        ("https://example.org/v1?key=sk-1", "stand in the record"),
    ],
)
def test_an_address_that_shows_something_is_refused(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        parse(ex.Endpoint, {"url": url}, {})
    assert "pw" not in str(error.value)
    assert "sk-1" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["https://example.org/v1/", "http://localhost:8000/v1", "http://[::1]:1"]
)
def test_an_address_is_kept_bare(url: str) -> None:
    assert ex.Endpoint(url=url).url == url.rstrip("/")


@pytest.mark.parametrize("role", ["test", "dev_forget", "retain_test"])
def test_rows_that_nobody_can_ask_are_refused(host: Host, role: str) -> None:
    domain = make_domain()
    text = (*rows_of(0, 8, ""), ex.Row(unit="t", text="some text"))
    for rows in (text, (replace(text[0], prompt=" "),), ()):
        change: Any = {role: rows if role == "retain_test" else {"codes": rows}}
        with pytest.raises(ex.UserError, match=f"--{role.replace('_', '-')} a file with 'prompt'"):
            audited(host, "gated", domain=replace(domain, **change))
    assert not host.tries


def test_what_is_scored_beside_is_left_out_where_nobody_can_ask_it() -> None:
    text = (ex.Row(unit="t", text="some text"),)
    asked = {"codes": rows_of(0, 4, "codes")}
    domain = replace(make_domain(), adjacent_test=text, paraphrases={"codes": text})
    kept = asked_of(domain)
    assert (kept.adjacent_test, kept.paraphrases) == ((), {})
    assert kept.metrics == kept.retain_metrics == ("generate",)
    kept = asked_of(replace(domain, adjacent_test=asked["codes"], paraphrases=asked))
    assert (kept.adjacent_test, kept.paraphrases) == (asked["codes"], asked)


def test_the_template_is_the_hosts(host: Host) -> None:
    record = audited(host, "never", change={**CHANGE, "attacks": ["few_shot", "template"]})
    (why,) = {a.reason for a in record.attacks if a.name == "template"}
    assert why.startswith("the endpoint puts its own template")
    assert levels(record)["D1"] == "pass"


def test_a_candidate_is_no_reference_model(host: Host) -> None:
    with pytest.raises(ex.UserError, match="'candidate' and the reference model 'original'"):
        audited(host, "base")
    assert not host.tries


def test_a_long_prompt_is_asked_whole_and_answers_are_kept_by_room(
    host: Host, tmp_path: Path
) -> None:
    endpoint = ex.Endpoint(url=host.url, **FAST)
    model = HostedModel(endpoint, "base", KeptAnswers.open(tmp_path, endpoint, "base"))
    long = "Some words. " * 400 + "The code of u7 is"
    assert model.answer([(long, 8), (long, 16), (long, 8)]) == ["word7."] * 3
    assert sorted(host.asked) == [("base", long, 8), ("base", long, 16)]
    assert model.dates[0] == model.dates[1] != ""
    lines = model.kept.path.read_text().splitlines()
    assert len(lines) == 2
    assert long not in model.kept.path.read_text()
    assert set(json.loads(lines[0])) == {"key", "text", "asked"}


def test_silence_is_noted(host: Host, monkeypatch: Any) -> None:
    def say(model: str, prompt: str) -> str:
        return " word" + prompt.split(" u")[-1].split()[0] if model == "base" else ""

    monkeypatch.setattr("tests.fixtures.host.say", say)
    record = audited(host, "never")
    assert any("with nothing, which counts" in note for note in record.notes)
