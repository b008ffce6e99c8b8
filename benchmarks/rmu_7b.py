"""RMU on a model of 7B shape within 8 GiB of memory, from disk to disk.

Writes a random bf16 Mistral (32 blocks, width 4096) shard by shard into a temporary folder, runs
a few steps of RMU on it, and checks that what was written differs from the input in exactly the
trained tensors. The peak is what the kernel says of a process that does nothing else. Everything
written is removed at the end. Needs about 30 GB of disk (half of it where the file system shares
blocks) and some minutes.

    python benchmarks/rmu_7b.py [--tmp DIR] [--steps 2] [--engine span] [--blocks 32] [--no-save]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import save
from safetensors.torch import save_file
from torch import Tensor

from excise.core.context import Context
from excise.data.domain import Domain, Row, Rows
from excise.methods.posthoc.rmu import RMU
from excise.models import files
from excise.models.checkpoint import Checkpoint
from excise.models.folder import INDEX, meta_model
from excise.models.tiny import word_tokenizer
from excise.train.fit import FitConfig

LIMIT = 8 * 2**30
LAYER = 7
WORDS = [f"w{i}" for i in range(400)]


def make_model(folder: Path, blocks: int, width: int) -> int:
    """Write a random model shard by shard, one block in each; return the bytes of its tensors."""
    from transformers import MistralConfig

    config = MistralConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=width * 7 // 2,
        num_hidden_layers=blocks, num_attention_heads=max(2, width // 128),
        num_key_value_heads=max(1, width // 512), pad_token_id=0, sliding_window=None,
        architectures=["MistralForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    word_tokenizer(WORDS).save_pretrained(folder)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, p in meta_model(config).named_parameters():
        block = name.split(".")[2] if ".layers." in name else "ends"
        shards.setdefault(block, {})[name] = tuple(p.shape)
    noise = (torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    where: dict[str, str] = {}
    total = 0
    for i, names in enumerate(shards.values()):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: values(noise, n, shape) for n, shape in names.items()}
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index))
    return total


def values(noise: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return weights cut from a stretch of noise at a place of their own; ones for norms."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    count = torch.Size(shape).numel()
    shift = sum(ord(c) * 7919 * (i + 1) for i, c in enumerate(name)) % noise.numel()
    return noise.roll(shift).repeat(count // noise.numel() + 1)[:count].reshape(shape)


def rows(role: str) -> Rows:
    """Return rows of sixty words."""
    draw = torch.Generator().manual_seed(len(role))
    ids = torch.randint(0, len(WORDS), (8, 60), generator=draw).tolist()
    return tuple(
        Row(unit=f"{role}{i}", text=" ".join(WORDS[j] for j in line)) for i, line in enumerate(ids)
    )


def domain() -> Domain:
    """Return what is forgotten and retained."""
    some = {"a": rows("forget")}
    return Domain(
        name="7b", forget=some, retain=rows("retain"), relearn=some, test=some,
        retain_test=rows("q"), dev_forget=some, dev_retain=rows("d"), benign=rows("b"),
    )  # fmt: skip


def edit(start: Path, work: Path, steps: int, engine: str, answer: Any) -> None:
    """Run RMU in this process and say what it took."""
    torch.set_num_threads(1)
    source = Checkpoint(start)
    method = RMU(
        layer=LAYER, steering=6.5, alpha=1200.0, as_published=True, engine=engine,  # type: ignore[arg-type]
        fit=FitConfig(steps=steps, lr=5e-4, batch_size=2, optimizer="hf_adamw", master="model"),
    )  # fmt: skip
    ctx = Context(work=work, dtype=torch.bfloat16)
    began = time.perf_counter()
    removal = method.apply(source, domain(), ctx)
    answer.send(
        {
            "seconds": time.perf_counter() - began,
            "steps_seconds": removal.cost.seconds,
            "changed": removal.changed,
            "share_moved": removal.extras["share_moved"],
            "reference_share": removal.extras["reference_share"],
            "bytes_read": source.bytes_read,
            "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
    )


def different(a: Path, b: Path) -> list[str]:
    """Return the tensors in which two folders differ, one in memory at a time."""
    old, new = Checkpoint(a).entries, Checkpoint(b).entries
    assert old.keys() == new.keys()
    return sorted(
        key
        for key in old
        if not all(
            torch.equal(x, y)
            for x, y in zip(files.read_parts(old[key]), files.read_parts(new[key]), strict=True)
        )
    )


def main() -> int:
    """Make the model, edit it, compare, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tmp", type=Path, default=None, help="where to write")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--engine", default="span")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.tmp, prefix="rmu-7b-") as folder:
        need = 2.1 * 2 * (options.blocks * 13.5 * options.width**2 + 64000 * options.width)
        free = shutil.disk_usage(folder).free
        if free < need:
            print(f"needs {need / 1e9:.0f} GB under {folder} and {free / 1e9:.0f} GB is free")
            return 1
        began = time.perf_counter()
        start, work = Path(folder) / "start", Path(folder) / "work"
        work.mkdir()
        total = make_model(start, options.blocks, options.width)
        made = time.perf_counter() - began
        print(f"wrote {total / 1e9:.1f} GB of weights in {made:.0f} s", flush=True)
        # A process of its own: the peak is that of the method and nothing before it.
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        args = (start, work, options.steps, options.engine, there)
        process = context.Process(target=edit, args=args)
        process.start()
        there.close()
        found = here.recv()
        process.join()
        moved = different(start, work / "model")
    wanted = sorted(f"model.layers.{i}.mlp.down_proj.weight" for i in range(LAYER - 2, LAYER + 1))
    print(
        f"{total / 2e9:.2f}B parameters, {options.steps} steps, {options.engine}: peak "
        f"{found['peak'] / 2**30:.2f} GiB, read {found['bytes_read'] / 1e9:.2f} GB, "
        f"{found['seconds']:.0f} s of which steps {found['steps_seconds']:.0f} s; differs in "
        f"{', '.join(moved)}; moved {found['share_moved']:.1%}"
    )
    if not options.no_save:
        facts = {
            "variant": options.engine, "seconds": round(found["seconds"], 1),
            "peak_bytes": found["peak"], "bytes_read": found["bytes_read"],
            "weight_bytes": total, "reference_share": round(found["reference_share"], 5),
            "width": options.width, "rows": 2, "tokens": 60, "dtype": "bfloat16",
        }  # fmt: skip
        save("rmu_7b", facts)
    good = moved == wanted == sorted(found["changed"]) and found["peak"] < LIMIT
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
