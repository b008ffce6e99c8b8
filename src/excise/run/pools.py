"""Who does the jobs of a run: processes of this machine or of torchrun, a shard, a Ray cluster."""

from __future__ import annotations

import json
import re
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from excise.core.disk import check_free, write_text
from excise.core.errors import UserError
from excise.core.events import Emit
from excise.core.keys import own_source
from excise.run.devices import pool_on
from excise.run.environment import device_of
from excise.run.output import store_of
from excise.train.pool import Pool
from excise.train.ray_pool import RayPool
from excise.train.shared import Shared
from excise.train.torchrun_pool import TorchrunPool, check_device

NOTE = "shard.json"
"""What a shard leaves in its folder once it is done."""


@dataclass(frozen=True)
class Shard:
    """One of several processes that work on one run, each with an output folder of its own.

    Attributes:
        number: Which, from 1.
        of: How many there are.
        out: The output folder that `excise merge` makes of theirs.
    """

    number: int
    of: int
    out: Path

    @property
    def folder(self) -> Path:
        """Return the output folder of this one, beside `out`, where it finds the same stages."""
        return self.out.with_name(f"{self.out.name}.shard-{self.number}-of-{self.of}")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class ShardNote:
    """What `NOTE` says of a shard that is done.

    Attributes:
        number: Which, from 1.
        of: How many there are.
        host: Where it ran.
        source: Sum over the code of excise there.
        store: What tells its store of stages from others.
    """

    number: int
    of: int
    host: str
    source: str
    store: str


def shard_of(text: str, out: Path) -> Shard | None:
    """Read `--shard`; None where it is not given.

    Args:
        text: Such as `2/4`.
        out: The output folder.

    Raises:
        UserError: If it is no such pair, or `out` is there already.
    """
    if not text:
        return None
    pair = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, of = map(int, pair.groups()) if pair else (0, 0)
    if not 1 <= number <= of:
        raise UserError(
            f"--shard {text}: write I/N with I from 1 to N, such as 2/4 for the second of four "
            "(in SLURM --array=1-4)"
        )
    check_free(out)
    return Shard(number, of, out)


def cluster_of(text: str) -> str | None:
    """Read `--pool`: the address of a Ray cluster; None where none is asked for.

    Raises:
        UserError: If there is no such pool.
    """
    if not text:
        return None
    kind, _, address = text.partition(":")
    if kind != "ray" or "://" in address or (address and not re.fullmatch(r".+:\d+", address)):
        raise UserError(
            f"--pool {text}: write ray or ray:HOST:PORT, the address that ray start --head names; "
            "leave it out for processes of this machine"
        )
    return address or "auto"


@dataclass(frozen=True)
class Jobs:
    """Who does the jobs of a run, and where.

    Attributes:
        out: Output folder of this process.
        workers: Processes of this machine; 0 takes one for each accelerator, else for each core.
        shard: Which share of the jobs is done here first.
        cluster: Address of a Ray cluster that does them instead.
        torchrun: The processes that torchrun started, which do them instead.
    """

    out: Path
    workers: int = 0
    shard: Shard | None = None
    cluster: str | None = None
    torchrun: TorchrunPool | None = None

    def pool(self, device: str, emit: Emit) -> Pool:
        """Return the pool of a run; nothing starts before `with`.

        Args:
            device: Device of the jobs, or `auto`.
            emit: Sink of events.

        Raises:
            UserError: If the device is not here, or torchrun's processes cannot each have one.
        """
        if self.torchrun is not None:
            check_device(device_of(device), self.torchrun.world)
            self.torchrun.emit = emit
            return self.torchrun
        if self.cluster is not None:
            gpu = device_of(device).startswith("cuda")
            return RayPool(self.cluster, store_of(self.out), gpu=gpu, emit=emit)
        pool = pool_on(device, self.workers, emit)
        return pool if self.shard is None else Shared(pool, self.shard.number - 1, self.shard.of)


def note_done(shard: Shard) -> None:
    """Write into the folder of a shard that its run is whole."""
    note = ShardNote(
        shard.number, shard.of, socket.gethostname(), own_source(), _token(store_of(shard.out))
    )
    write_text(shard.folder / NOTE, json.dumps(asdict(note), indent=1) + "\n")


def _token(store: Path) -> str:
    """Return what tells this store from others, drawn by whoever asks first."""
    path = store / ".token"
    try:
        with path.open("x", encoding="utf-8") as f:
            f.write(secrets.token_hex(8))
    except FileExistsError:
        pass
    return path.read_text(encoding="utf-8")
