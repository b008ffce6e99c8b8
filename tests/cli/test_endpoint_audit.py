"""`excise audit --endpoint` from two files and three names to a record, and wrong use of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from excise.cli import main
from excise.record import load
from tests.fixtures.host import Host, rows_of, serving

DATA = "--forget f.jsonl --retain r.jsonl"


def excise(line: str) -> int:
    """Run a command line in this process."""
    return main(shlex.split(line))


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Serve models, in a folder with a forget and a retain set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXCISE_ENDPOINT_KEY", "sk-secret")
    for name, rows in (("f", rows_of(0, 80, "codes")), ("r", rows_of(80, 160, ""))):
        lines = (json.dumps({"prompt": r.prompt, "completion": r.completion}) for r in rows)
        Path(f"{name}.jsonl").write_text("\n".join(lines))
    with serving() as host:
        yield host


def test_an_endpoint_is_audited(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    models = f"--endpoint {host.url} --model gated --original base --oracle never {DATA} --quiet"
    assert excise(f"audit {models} --out out --dry-run") == 0
    counted = {
        line.split()[0]: int(line.split()[1].replace(",", ""))
        for line in capsys.readouterr().out.splitlines()
    }
    assert host.tries == 0
    assert not Path("out").exists()
    assert excise(f"audit {models} --out out --require D1") == 3
    told = " ".join(capsys.readouterr().out.split())
    assert "It comes back under few-shot prompts" in told
    assert "excise audit out" not in told
    names = {"candidate": "gated", "original": "base", "oracle-0": "never"}
    by_model = {
        name: sum(count for (model, *_), count in host.asked.items() if model == there)
        for name, there in names.items()
    }
    assert by_model == counted
    record = load(Path("out"))
    assert record.config["endpoint"]["url"] == host.url
    assert [model.name for model in record.models] == ["original", "oracle-0"]
    assert host.keys == {"Bearer sk-secret"}
    written = [path for path in Path().rglob("*") if path.is_file()]
    assert Path("out/events.jsonl") in written
    assert not any(b"sk-secret" in path.read_bytes() for path in written)
    assert excise("verify out") == 0
    assert excise("report out --public --out public.html") == 0
    shown = Path("public.html").read_text()
    assert host.url[7:-3] in Path("out/report.html").read_text()
    assert host.url[7:-3] not in shown
    # What was answered is found; the folder holds no model.
    tries = host.tries
    assert excise(f"audit {models} --out out --dry-run") == 0
    assert all(line.split()[1] == "0" for line in capsys.readouterr().out.splitlines()[-3:])
    assert excise(f"audit {models} --out out") == 0
    assert host.tries == tries
    assert excise("audit out --out again") == 2
    assert "is an audit over an endpoint" in capsys.readouterr().err
    assert excise("check out/recipe.yaml") == 2
    assert "take no compute here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"--model gated --original base {DATA} --chat", "--chat says how an endpoint is asked"),
        ("gone --endpoint http://localhost:1", "--endpoint is given beside gone"),
        (f"--endpoint http://h/v1 --model m --original o {DATA}", "use https"),
        (f"--endpoint http://localhost:1 --model m {DATA}", "--original is missing"),
        (
            f"--endpoint http://localhost:1 --model m --original o {DATA} --canary",
            "--canary changes weights",
        ),
        (
            f"--endpoint http://localhost:1 --model m --original o {DATA} "
            "--evaluate.scores '[{name: refusal}]'",
            "answers alone",
        ),
        (f"--endpoint http://localhost:1 --model m --original m {DATA}", "are both 'm'"),
    ],
)
def test_wrong_use_is_one_sentence(
    line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert excise(f"audit {line} --out wrong --quiet") == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1
    assert not Path("wrong").exists()
