"""`excise audit --endpoint` on the server that transformers comes with.

Run by `make serve-test`, which puts what the server needs into a folder of its own.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from excise.cli import main as excise
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.endpoint import Endpoint, EndpointError, ask
from excise.models.tiny import byte_tokenizer, tiny_model
from excise.record import load
from tests.fixtures.host import rows_of

PROMPTS = {"few_shot", "prefix", "paraphrase", "filler"}
"""Attacks that only need prompts."""

START = 300.0
"""Seconds in which the server must be up."""


@contextmanager
def serving() -> Iterator[str]:
    """Start `transformers serve`, and yield the base of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = f"serve --host 127.0.0.1 --port {port} --device cpu --log-level error"
    command = [str(Path(sys.executable).with_name("transformers")), *line.split()]
    base = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command) as server:
        try:
            end = time.monotonic() + START
            while not is_up(base):
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < end, "the server does not start"
                time.sleep(0.5)
            yield f"{base}/v1"
        finally:
            server.terminate()


def is_up(base: str) -> bool:
    """Return whether a server answers."""
    try:
        urllib.request.urlopen(f"{base}/health", timeout=5).close()
    except OSError:
        return False
    return True


def greedy(model: Path, prompt: str, room: int) -> str:
    """Return what a model says when it is asked here."""
    checkpoint = Checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        said_BT = checkpoint.load().generate(**inputs, max_new_tokens=room, do_sample=False)
    length = inputs["input_ids"].shape[1]
    text: str = tokenizer.decode(said_BT[0, length:], skip_special_tokens=True)
    return text


def check(url: str, folder: Path) -> None:
    """Ask as an audit does, then audit."""
    old, new = folder / "old", folder / "new"
    endpoint = Endpoint(url=url, retries=0, timeout=120)
    for prompt in ("The code of u1 is", "Q: u2?\nA:"):
        said, meant = ask(endpoint, str(old), prompt, 6), greedy(old, prompt, 6)
        assert said == meant, (said, meant)
    try:
        ask(endpoint, str(folder / "nobody"), "a", 2)
    except EndpointError as error:
        print(f"a model that is not there: {error}")
    else:
        raise AssertionError("a model that is not there answered")
    change = "{max_test_rows: 8, max_other_rows: 4}"
    small = f"--audit.change '{change}' --evaluate.max_rows 8"
    names = f"--endpoint {url} --endpoint.timeout 120 --model {new} --original {old}"
    for chat in ("", " --chat"):
        out = folder / f"audit{chat.strip(' -')}"
        line = f"audit {names} --forget f.jsonl --retain r.jsonl {small} --quiet{chat}"
        assert excise(shlex.split(f"{line} --out {out}")) == 0, line
        ran = {attack.name for attack in load(out).attacks if attack.status == "ok"}
        assert ran == PROMPTS, ran


def main() -> int:
    """Serve two random models and audit one against the other."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        os.chdir(folder)
        for seed, model in enumerate(("old", "new")):
            save_model(tiny_model("llama", seed=seed), byte_tokenizer(chat=True), folder / model)
        for file, rows in (("f", rows_of(0, 40, "codes")), ("r", rows_of(80, 120, ""))):
            lines = [json.dumps({"prompt": r.prompt, "completion": r.completion}) for r in rows]
            Path(f"{file}.jsonl").write_text("\n".join(lines) + "\n")
        with serving() as url:
            check(url, folder)
    print(f"transformers {version('transformers')} serve: completions and chat are audited")
    return 0


if __name__ == "__main__":
    sys.exit(main())
