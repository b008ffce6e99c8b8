"""A model that only prompts reach: an OpenAI-style endpoint, asked over HTTP and never twice.

`POST {url}/completions` or, with `chat`, `POST {url}/chat/completions`, at temperature 0, as vLLM,
llama.cpp and most hosts speak it. A host may put another model under the same name at any time;
what it said is kept with its date.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, field_validator

from excise.core.config import Config
from excise.core.errors import UserError

KEY = "EXCISE_ENDPOINT_KEY"
"""Environment variable of the key; it is sent in a header and written nowhere."""
OPENAI_KEY, OPENAI = "OPENAI_API_KEY", "api.openai.com"
"""The key of one host, read for that host alone: no other may see it."""

LARGEST = 1 << 20
"""Bytes of one response at most."""
CHAT_TOKENS = 64
"""Tokens of a chat answer at most: such models speak in sentences."""
PAUSE = 60.0
"""Seconds between two tries at most, whatever the host asks for."""
AT_ONCE = 4
"""Questions in flight."""
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
"""Answers after which another try may help."""


class EndpointError(UserError):
    """An endpoint that does not answer: nothing can be said of any of its models."""


class Endpoint(Config):
    """Where models are served, and how they are asked."""

    url: str
    """Base of the API, such as https://host/v1; http only on this machine."""
    chat: bool = False
    """Ask through /chat/completions, the prompt as one turn of the user."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds that one answer may take."""
    retries: int = Field(default=3, ge=0)
    """Further tries after a timeout, a busy host or one in trouble."""
    backoff: float = Field(default=1.0, ge=0)
    """Seconds before the first of them; each further one waits twice as long."""

    @field_validator("url")
    @classmethod
    def _check(cls, url: str) -> str:
        """Refuse what would show key or prompts to others, or put a secret into the record."""
        parts = _split(url)
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"'{url}' is no address; write https://HOST/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "the address holds a user, a key or a query, which would stand in the record; "
                f"give the bare address and the key in {KEY}"
            )
        if parts.scheme == "http" and not is_here(parts.hostname):
            raise ValueError(
                f"http shows key and prompts to everybody between here and {parts.hostname}; "
                "use https (http is for this machine alone)"
            )
        return url.rstrip("/")

    @property
    def host(self) -> str:
        """Host and port, as the record names them."""
        return urlsplit(self.url).netloc


def _split(url: str) -> SplitResult | None:
    """Return the parts of an address; None for what no request can be sent to."""
    if not url.isascii() or not url.isprintable() or " " in url:
        return None
    try:
        parts = urlsplit(url)
        return parts if parts.port is None or parts.port else None
    except ValueError:
        return None


def is_here(host: str) -> bool:
    """Return whether a host is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass
class KeptAnswers:
    """What one model of one endpoint said: a file that grows by a line an answer.

    A line is written whole before the next question; a killed audit loses what was in flight. The
    prompt is kept as a hash.

    Attributes:
        path: The file.
        known: Text and date by `question_key`.
    """

    path: Path
    known: dict[str, Mapping[str, str]] = field(default_factory=dict)
    _lock: Any = field(default_factory=Lock, repr=False)

    @classmethod
    def open(cls, folder: Path, endpoint: Endpoint, name: str) -> KeptAnswers:
        """Read what is known; a line that a kill cut short is left out.

        Args:
            folder: Where such files lie.
            endpoint: The endpoint; how long and how often it is asked does not count.
            name: The model's name there.
        """
        of = json.dumps([endpoint.url, name, endpoint.chat])
        kept = cls(folder / f"{hashlib.sha256(of.encode()).hexdigest()[:16]}.jsonl")
        lines = kept.path.read_text(encoding="utf-8").splitlines() if kept.path.is_file() else []
        for line in lines:
            try:
                answer = json.loads(line)
                kept.known[answer["key"]] = {k: str(answer[k]) for k in ("text", "asked")}
            except (ValueError, KeyError, TypeError):
                continue
        return kept

    def add(self, key: str, text: str) -> None:
        """Keep an answer."""
        answer = {"text": text, "asked": datetime.now(UTC).isoformat(timespec="seconds")}
        with self._lock:
            self.known[key] = answer
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                # A line of its own even behind one that a kill cut short.
                file.write(("\n" if file.tell() else "") + json.dumps({"key": key, **answer}))


def question_key(prompt: str, room: int) -> str:
    """Return what tells one question to a model from another."""
    return hashlib.sha256(json.dumps([prompt, room]).encode()).hexdigest()


@dataclass(frozen=True)
class HostedModel:
    """A model that answers and shows nothing else: it has no logits, activations or weights.

    Attributes:
        endpoint: Where it is served.
        name: Its name there.
        kept: What it said already.
        used: Keys of what it was asked in this audit.
        refused: Prompts that are answered with nothing, as by a filter in front of it.
        rehearsal: Whether nothing is asked: questions are noted in `used` and answered by nothing.
    """

    endpoint: Endpoint
    name: str
    kept: KeptAnswers
    used: set[str] = field(default_factory=set)
    refused: frozenset[str] = frozenset()
    rehearsal: bool = False

    def answer(self, prompts: Sequence[tuple[str, int]]) -> list[str]:
        """Return what the model says behind every prompt, in order.

        Args:
            prompts: Text, and tokens of the answer at most.

        Raises:
            EndpointError: If the endpoint does not answer.
        """
        prompts = [(p, CHAT_TOKENS if self.endpoint.chat else room) for p, room in prompts]
        asked = {question_key(*each): each for each in prompts if each[0] not in self.refused}
        self.used.update(asked)
        new = {key: each for key, each in asked.items() if key not in self.kept.known}
        if self.rehearsal:
            return [""] * len(prompts)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            jobs = [pool.submit(self._ask, key, *each) for key, each in new.items()]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        said = {key: self.kept.known[key]["text"].strip() for key in asked}
        return ["" if p in self.refused else said[question_key(p, room)] for p, room in prompts]

    def _ask(self, key: str, prompt: str, room: int) -> None:
        self.kept.add(key, ask(self.endpoint, self.name, prompt, room))

    @property
    def unasked(self) -> int:
        """Number of questions of this audit that were never answered."""
        return len(self.used - self.kept.known.keys())

    @property
    def dates(self) -> tuple[str, str]:
        """Days of the first and the last answer of this audit, ISO 8601, UTC; empty for none."""
        days = sorted(
            self.kept.known[key]["asked"][:10] for key in self.used & set(self.kept.known)
        )
        return (days[0], days[-1]) if days else ("", "")

    @property
    def empty(self) -> int:
        """Number of questions of this audit that were answered with nothing."""
        return sum(not self.kept.known[k]["text"].strip() for k in self.used & set(self.kept.known))


def ask(endpoint: Endpoint, model: str, prompt: str, room: int) -> str:
    """Return the greedy answer of a hosted model.

    Args:
        endpoint: Where it is served.
        model: Its name there.
        prompt: What it is asked.
        room: Tokens of the answer at most.

    Raises:
        EndpointError: If it does not answer in the tries it has, or answers with something else.
    """
    body: dict[str, Any] = {"model": model, "max_tokens": room, "temperature": 0}
    if endpoint.chat:
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    where = "/chat/completions" if endpoint.chat else "/completions"
    try:
        choice = json.loads(_post(endpoint, model, where, json.dumps(body).encode()))["choices"][0]
        said = choice["message"]["content"] if endpoint.chat else choice["text"]
        if not isinstance(said, str | None):  # a model that thought too long has said nothing
            raise TypeError
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        if isinstance(error, EndpointError):
            raise
        raise EndpointError(
            f"{endpoint.host}{where} answered with something else than a completion; check "
            "--endpoint, and --chat for a model that only chats"
        ) from None
    return said or ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nothing: the key is for one host, and a POST that is redirected becomes a GET."""

    def redirect_request(self, *_: Any) -> None:
        """Follow nothing."""


def _post(endpoint: Endpoint, model: str, where: str, body: bytes) -> bytes:
    """Return the response to one question, asked again where that may help."""
    host = urlsplit(endpoint.url).hostname or ""
    key = os.environ.get(KEY) or (os.environ.get(OPENAI_KEY) if host == OPENAI else "") or ""
    if not key.isascii() or any(c.isspace() for c in key):
        raise EndpointError(f"the key in {KEY} holds a space, a line break or a letter that no "
                            "header can; set it again")  # fmt: skip
    headers = {"Content-Type": "application/json", "User-Agent": "excise"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(endpoint.url + where, body, headers, method="POST")
    # A proxy of the environment is for other machines.
    proxy = [urllib.request.ProxyHandler({})] if is_here(host) else []
    opener = urllib.request.build_opener(_NoRedirect, *proxy)
    trouble = ""
    for attempt in range(endpoint.retries + 1):
        pause = endpoint.backoff * 2**attempt
        try:
            with opener.open(request, timeout=endpoint.timeout) as response:
                return _read(response, endpoint)
        except urllib.error.HTTPError as error:
            with error:
                if error.code not in RETRIED:
                    raise EndpointError(_refusal(endpoint, model, where, error)) from None
                trouble = f"answers {error.code}"
                wait = error.headers.get("Retry-After", "")
                pause = max(pause, float(wait)) if wait.isdecimal() else pause
        except http.client.HTTPException:
            trouble = "speaks no HTTP"
        except OSError as error:  # a timeout too, bare or as the reason of another error
            reason = getattr(error, "reason", error)
            late = isinstance(reason, TimeoutError)
            trouble = f"cannot be reached ({str(reason)[:80]})"
            trouble = f"does not answer within {endpoint.timeout:g} s" if late else trouble
        if attempt < endpoint.retries:
            time.sleep(min(pause, PAUSE))
    tries = endpoint.retries + 1
    raise EndpointError(
        f"{endpoint.host} {trouble}, asked {tries} times; run the same command again later: what "
        "was answered is kept"
    )


def _read(response: Any, endpoint: Endpoint) -> bytes:
    """Return a response, unless it is too large or dribbles in for too long.

    Raises:
        TimeoutError: If it takes longer than one answer may.
    """
    end, parts, size = time.monotonic() + endpoint.timeout, [], 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            raise EndpointError(
                f"{endpoint.host} answered with more than {LARGEST >> 20} MB, which is no answer "
                "of a few tokens; check --endpoint"
            )
        if time.monotonic() > end:
            raise TimeoutError
    return b"".join(parts)


def _refusal(endpoint: Endpoint, model: str, where: str, error: urllib.error.HTTPError) -> str:
    """Say why a host refused, in our words: its own may repeat the key."""
    if error.code in (401, 403):
        return f"{endpoint.host} refuses the key ({error.code}); set {KEY}"
    if 300 <= error.code < 400:
        moved = _split(error.headers.get("Location", ""))
        to = (moved.hostname if moved else None) or "elsewhere"
        return f"{endpoint.host} redirects to {to}, which is not followed; give the final address"
    if error.code in (404, 405):
        other = "leave out --chat" if endpoint.chat else "a model that only chats takes --chat"
        return (
            f"{endpoint.host}{where} does not know the model '{model}' or the path ({error.code}); "
            f"check --endpoint and the name, and {other}"
        )
    return f"{endpoint.host}{where} refuses the question ({error.code}); check the model '{model}'"
