"""Hundreds of generated bad inputs through the real command: no traceback, no hang, no change.

Every case runs `excise` in a process of its own with a limit on computing, idling and memory, in a
folder of its own. Counted are tracebacks, hangs, changed inputs, code that ran, and sentences that
something else was printed before. Ends with 1 where a count is not 0.

    python benchmarks/bad_inputs.py [--count 480] [--seed 0] [--only PART-OF-A-NAME] [--list]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY = 3 << 30
"""Bytes that a case may take beside what it starts with."""

IDLE = 40.0
"""Seconds without computing after which a case hangs."""

RAN = "code-ran"
"""File that code hidden in an input would make in the folder of its case."""

Make = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        name: Kind, then what is wrong.
        args: Command line after `excise`.
        make: What to do first in the folder of the case.
        shell: Redirections of a process of its own, or what runs before it; else a fork runs it.
    """

    name: str
    args: str
    make: Make = lambda folder: None
    shell: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a case did.

    Attributes:
        code: Exit code; None where it did not end in time.
        said: Its standard error.
        faults: Which of the things happened that must not.
    """

    code: int | None
    said: str
    faults: tuple[str, ...]


RECIPE = """\
name: tiny
domain: {name: facts, subjects: 24, relations: 2, objects: 4}
model: {scratch: {width: 32, blocks: 2}}
pretrain: {fit: {steps: 2, lr: 0.003, batch_size: 16}, max_length: 16}
arms:
  rmu: {name: rmu, layer: 0, max_length: 16, fit: {steps: 2, lr: 0.001, batch_size: 8}}
audit: {budget: none}
evaluate: {max_rows: 4, max_length: 16, samples: 0}
oracles: 1
"""
RUN = "run tiny.yaml --out out --quiet --dry-run"


def remove(more: str = "", *, method: str = "grad_diff", **flags: str) -> str:
    """Return a removal of two steps that is right but for what is given."""
    chosen = {"model": "model", "forget": "f.jsonl", "retain": "r.jsonl", "out": "out"} | flags
    given = " ".join(f"--{name} {value}" for name, value in chosen.items() if value)
    quick = "--workers 1 --fit.steps 2 --fit.batch-size 4 --max-length 16"
    return f"remove {method} {given} {quick} --evaluate.max-rows 2 --quiet {more}"


def good(folder: Path) -> None:
    """Write a folder with everything a removal needs."""
    from excise.models.checkpoint import save_model
    from excise.models.tiny import byte_tokenizer, tiny_model

    save_model(tiny_model("llama", width=32), byte_tokenizer(chat=True), folder / "model")
    for name in "fr":
        rows = [{"text": f"{name}{i} " * 5 + str(i * 7919)} for i in range(16)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(RECIPE)


def write(name: str, data: str | bytes) -> Make:
    """Return what writes a file."""
    raw = data.encode() if isinstance(data, str) else data

    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)

    return make


def merge(name: str, **changes: Any) -> Make:
    """Return what changes fields of a JSON file."""

    def make(folder: Path) -> None:
        file = folder / name
        data = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(data | changes))

    return make


# ----------------------------------------------------------------------------------- numbers

BAD_NUMBERS = (
    ".nan", ".inf", "-.inf", "-1", "true", "1e400", "1e20", "99999999999999999999999", "-2.5", "''",
    "many", "[]", "{}", "[1, true]", "[.nan]", "[-3]", "0x", "1_0e", "2001-01-01", "null",
    "1000000000", "1000000000000000", "0",
)  # fmt: skip

NUMBERS = (
    "seed", "oracles", "model.scratch.width", "model.scratch.blocks",
    "model.scratch.overrides.num_attention_heads", "model.scratch.overrides.num_key_value_heads",
    "model.scratch.overrides.vocab_size", "model.scratch.overrides.rms_norm_eps",
    "model.scratch.overrides.max_position_embeddings", "model.scratch.overrides.intermediate_size",
    "pretrain.max_length", "pretrain.pack", "evaluate.max_rows", "evaluate.samples",
    "evaluate.lm_eval_limit", "domain.subjects", "domain.relations", "domain.objects",
    "domain.forget_share", "domain.cue_strength", "domain.seed", "arms.rmu.layer", "arms.rmu.alpha",
    "arms.rmu.steering", "arms.rmu.max_length", "arms.rmu.fit.steps", "arms.rmu.fit.lr",
    "arms.rmu.fit.batch_size", "arms.rmu.fit.micro_size", "arms.rmu.fit.warmup",
    "arms.rmu.fit.min_lr", "arms.rmu.fit.betas", "arms.rmu.fit.betas.0", "arms.rmu.fit.eps",
    "arms.rmu.fit.weight_decay", "arms.rmu.fit.clip", "arms.rmu.fit.save_every",
    "arms.rmu.fit.log_every", "arms.rmu.lora.rank", "arms.rmu.lora.alpha",
    "arms.rmu.stop.every", "arms.rmu.stop.rows", "arms.rmu.sam", "pretrain.fit.steps",
    "pretrain.fit.batch_size",
)  # fmt: skip

BUDGET = (
    "steps", "checkpoints", "rates", "lora_rates", "seeds", "max_test_rows", "max_other_rows",
    "max_length", "batch_size", "margin", "shots", "examples", "subspaces", "random_directions",
    "trials", "together", "benign_rates",
)  # fmt: skip

METHOD_NUMBERS = {
    "npo": ("beta", "alpha", "gamma"), "simnpo": ("beta", "delta", "gamma"),
    "undial": ("beta", "alpha"), "dpo": ("beta", "gamma"), "ssd": ("alpha", "lam", "batch_size"),
    "lfssd": ("alpha", "lam"), "undo": ("alpha", "beta", "share", "repeats", "pretrain_tokens"),
    "tar": ("inner_lr", "inner_steps", "switch", "growth", "every"), "elm": ("layers", "eta"),
    "circuit_breakers": ("layers", "alpha", "horizon"), "repnoise": ("alpha", "beta"),
    "task_vector": ("scale",), "direction": ("layer", "rows", "max_kl"),
    "checkpoint_transfer": ("ridge", "remove", "map_rows", "layers"), "maxent": ("alpha",),
}  # fmt: skip
"""Settings of methods; those that are not there are mistakes too."""


def numbers(rng: random.Random) -> Iterator[Case]:
    """Yield fields of every part of a recipe with numbers that cannot be."""
    while True:
        value = shlex.quote(rng.choice(BAD_NUMBERS))
        place = rng.choice(("recipe", "recipe", "recipe", "budget", "method"))
        if place == "recipe":
            args = f"{RUN} --{rng.choice(NUMBERS)}={value}"
        elif place == "budget":
            change = {rng.choice(BUDGET): "VALUE"}
            plain = json.dumps(change).replace('"VALUE"', rng.choice(BAD_NUMBERS) or "x")
            args = f"{RUN} --audit.budget smoke --audit.change={shlex.quote(plain)}"
        else:
            method = rng.choice(sorted(METHOD_NUMBERS))
            field = rng.choice(METHOD_NUMBERS[method])
            args = remove(f"--dry-run --{field}={value}", method=method)
        yield Case(f"numbers: {args.partition(' --quiet ')[2]}", args)


# -------------------------------------------------------------------------------------- YAML


def bomb(kind: str) -> str:
    """Return nine levels of nine aliases each, in lists or mappings."""
    lines = ["a0: &a0 " + ("[x, x]" if kind == "list" else "{x: x}")]
    for i in range(1, 10):
        each = [f"*a{i - 1}"] * 9
        inner = ", ".join(each if kind == "list" else (f"k{j}: {e}" for j, e in enumerate(each)))
        lines.append(f"a{i}: &a{i} " + ("[" + inner + "]" if kind == "list" else "{" + inner + "}"))
    return "\n".join(lines) + "\nname: *a9\n" + RECIPE.partition("\n")[2]


YAMLS: dict[str, str | bytes] = {
    "two methods of one name": RECIPE.replace("audit:", "  rmu: {name: maxent}\naudit:"),
    "key twice": RECIPE + "oracles: 2\n",
    "key twice in a flow": RECIPE.replace("{width: 32,", "{width: 32, width: 16,"),
    "one key, two spellings": RECIPE + "? oracles\n: 3\n",
    "date": RECIPE.replace("oracles: 1", "oracles: 2001-12-14"),
    "time": RECIPE.replace("name: tiny", "name: 2001-12-14t21:59:43.10-05:00"),
    "binary": RECIPE.replace("name: tiny", "name: !!binary R0lGODlhDAAMAIQAAP//9/X17unp5WZmZg=="),
    "set": RECIPE + "seed: !!set {1, 2}\n",
    "set for methods": RECIPE.replace("arms:\n", "arms: !!set {rmu}\nx:\n"),
    "omap": RECIPE + "seed: !!omap [a: 1, b: 2]\n",
    "pairs": RECIPE + "code: !!pairs [a: 1, a: 2]\n",
    "python call": RECIPE + "seed: !!python/object/apply:os.system ['touch code-ran']\n",
    "python name": RECIPE + "seed: !!python/name:os.system\n",
    "python module": "!!python/module:antigravity\n",
    "foreign tag": RECIPE + "seed: !mine 3\n",
    "recursive list": RECIPE + "takes: &a [*a]\n",
    "recursive mapping": RECIPE.replace("{budget: none}", "&a {change: *a}"),
    "recursive recipe": "&a\nname: x\narms: *a\n",
    "merge of itself": "&a\n<<: *a\nname: x\n",
    "merge": RECIPE.replace("rmu: {", "rmu: {<<: {layer: 1}, "),
    "merge of a scalar": RECIPE + "<<: 3\n",
    "alias of nothing": RECIPE + "seed: *nothing\n",
    "deep list": RECIPE + "takes: " + "[" * 20000 + "]" * 20000 + "\n",
    "deep mapping": RECIPE + "takes: " + "{a: " * 20000 + "1" + "}" * 20000 + "\n",
    "deep block": "".join(" " * i + "a:\n" for i in range(1500)),
    "deep open": "[" * 100000,
    "less deep": RECIPE + "takes: " + "[" * 300 + "]" * 300 + "\n",
    "bomb of lists": bomb("list"),
    "bomb of mappings": bomb("map"),
    "bomb in a method": bomb("map").replace("layer: 0", "layer: *a9"),
    "long scalar": "name: " + "x" * 3_000_000 + "\n" + RECIPE.partition("\n")[2],
    "wide list": RECIPE + "takes: [" + "1," * 300_000 + "]\n",
    "many keys": RECIPE + "".join(f"k{i}: 1\n" for i in range(5000)),
    "tabs": RECIPE.replace("  rmu", "\trmu"),
    "NUL": RECIPE.replace("tiny", "ti\0ny"),
    "control character": RECIPE.replace("tiny", "ti\x07ny"),
    "UTF-16": RECIPE.encode("utf-16"),
    "UTF-16 cut": RECIPE.encode("utf-16")[:-1],
    "lone surrogate": RECIPE.replace("tiny", '"\\ud800"'),
    "two documents": RECIPE + "---\n" + RECIPE,
    "list key": RECIPE + "? [a, b]\n: 1\n",
    "mapping key": RECIPE + "? {a: b}\n: 1\n",
    "number key": RECIPE.replace("  rmu:", "  3:"),
    "null key": RECIPE + "~: 1\n",
    "true key": RECIPE + "yes: 1\n",
    "key of a date": RECIPE.replace("  rmu:", "  2001-01-01:"),
    "minutes": RECIPE.replace("oracles: 1", "oracles: 1:30"),
    "octal": RECIPE.replace("oracles: 1", "oracles: 0o17"),
    "number of a million digits": RECIPE.replace("oracles: 1", "oracles: " + "9" * 1_000_000),
    "infinity": RECIPE.replace("lr: 0.001", "lr: .inf"),
    "impossible date": RECIPE.replace("oracles: 1", "oracles: 2001-99-99"),
    "version of YAML": "%YAML 9.9\n---\n" + RECIPE,
    "only comments": "# nothing\n",
    "empty": "",
    "a scalar": "tiny\n",
    "null": "null\n",
    "block scalar without end": RECIPE + "takes: |9\n x\n",
    "name with a slash": RECIPE.replace("name: tiny", "name: ../../x"),
    "method name with a slash": RECIPE.replace("  rmu:", "  ../x:"),
    "method name of blanks": RECIPE.replace("  rmu:", "  '  ':"),
}


def yamls(rng: random.Random) -> Iterator[Case]:
    """Yield recipes that are no recipes: those of the table, then spoiled ones."""
    for name, text in YAMLS.items():
        yield Case(f"yaml: {name}", "run x.yaml --out out --quiet --dry-run", write("x.yaml", text))
    for value in (
        "{c: 1, c: 2}",
        "{b: &b [*b]}",
        "[" * 9999,
        bomb("list"),
        "!!set {a}",
        "{a: [",
        "&a",
    ):
        yield Case(f"yaml: setting {value[:20]!r}", f"{RUN} --audit.change {shlex.quote(value)}")
    while True:
        spoiled = spoil(RECIPE.encode(), rng)
        made = write("x.yaml", spoiled)
        name = f"yaml: spoiled {hashlib.sha256(spoiled).hexdigest()[:8]}"
        yield Case(name, "check x.yaml --out out --quiet", made)


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with a few of them dropped, doubled, swapped or replaced."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out))
        match rng.randrange(4):
            case 0:
                del out[at : at + rng.randint(1, 12)]
            case 1:
                out[at:at] = out[at : at + rng.randint(1, 40)]
            case 2:
                out[at : at + 1] = rng.choice((b"{", b"[", b"&a ", b"*a", b"!", b": ", b"\xff"))
            case _:
                out[at] = rng.randrange(256)
    return bytes(out)


# ------------------------------------------------------------------------------- model folders


def header(change: Callable[[dict[str, Any], bytearray], object]) -> Make:
    """Return what changes header and body of the weights."""

    def make(folder: Path) -> None:
        file = folder / "model" / "model.safetensors"
        raw = file.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        values, body = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
        text = change(values, body)
        blob = text if isinstance(text, bytes) else json.dumps(values).encode()
        file.write_bytes(struct.pack("<Q", len(blob)) + blob + body)

    return make


NORM = "model.norm.weight"


def entry(values: dict[str, Any], **changes: Any) -> None:
    values[NORM].update(changes)


def doubled(values: dict[str, Any], body: bytearray) -> bytes:
    """Return a header that names one tensor twice."""
    text = json.dumps(values)
    return (text[:-1] + f", {json.dumps(NORM)}: {json.dumps(values[NORM])}}}").encode()


def as_integers(values: dict[str, Any], body: bytearray) -> None:
    values[NORM]["dtype"] = "I32"


def boolean(values: dict[str, Any], body: bytearray) -> None:
    start, end = values[NORM]["data_offsets"]
    values[NORM].update(dtype="BOOL", shape=[end - start])


HEADERS: dict[str, Callable[[dict[str, Any], bytearray], object]] = {
    "overlap": lambda h, b: entry(h, data_offsets=[0, 128]),
    "one tensor twice": doubled,
    "hole": lambda h, b: h.pop(NORM),
    "bytes behind": lambda h, b: b.extend(b"\0" * 64),
    "bytes missing": lambda h, b: b.__delitem__(slice(-64, None)),
    "integers": as_integers,
    "booleans": boolean,
    "offsets turned": lambda h, b: entry(h, data_offsets=h[NORM]["data_offsets"][::-1]),
    "offsets of floats": lambda h, b: entry(h, data_offsets=[0.5, 128.5]),
    "offsets in text": lambda h, b: entry(h, data_offsets=["0", "128"]),
    "offset negative": lambda h, b: entry(h, data_offsets=[-128, 0]),
    "offset beyond 64 bits": lambda h, b: entry(h, data_offsets=[0, 2**70]),
    "three offsets": lambda h, b: entry(h, data_offsets=[0, 1, 2]),
    "shape negative": lambda h, b: entry(h, shape=[-32, -1]),
    "shape of booleans": lambda h, b: entry(h, shape=[True, 32]),
    "shape huge": lambda h, b: entry(h, shape=[2**40, 2**40]),
    "shape of floats": lambda h, b: entry(h, shape=[32.0]),
    "shape in text": lambda h, b: entry(h, shape="32"),
    "no dtype": lambda h, b: h[NORM].pop("dtype"),
    "unknown dtype": lambda h, b: entry(h, dtype="F4"),
    "dtype of no text": lambda h, b: entry(h, dtype=["F32"]),
    "metadata of no text": lambda h, b: h.update(__metadata__={"format": 3}),
    "metadata a list": lambda h, b: h.update(__metadata__=[1]),
    "format of another library": lambda h, b: h.update(__metadata__={"format": "tf"}),
    "key empty": lambda h, b: h.update({"": h.pop(NORM)}),
    "key with NUL": lambda h, b: h.update({"a\0b": h.pop(NORM)}),
    "deep header": lambda h, b: b'{"a":' * 50000 + b"1" + b"}" * 50000,
    "header with NaN": lambda h, b: json.dumps(h).replace("[32]", "[NaN]").encode(),
    "header of a list": lambda h, b: b"[]",
    "header empty": lambda h, b: b"",
    "header of nothing": lambda h, b: b"{}",
    "header in UTF-16": lambda h, b: json.dumps(h).encode("utf-16"),
    "header of many digits": lambda h, b: b'{"a": ' + b"9" * 100_000 + b"}",
}

INDEX = "model/model.safetensors.index.json"
INDEXES: dict[str, str] = {
    "of nothing": "{}",
    "a list": "[]",
    "map a list": '{"weight_map": ["model.safetensors"]}',
    "map empty": '{"weight_map": {}}',
    "map of numbers": '{"weight_map": {"a": 3}}',
    "map of lists": '{"weight_map": {"a": ["w.safetensors"]}}',
    "map of nulls": '{"weight_map": {"a": null, "b": "w.safetensors"}}',
    "outside": '{"weight_map": {"a": "/etc/passwd"}}',
    "upwards": '{"weight_map": {"a": "../model/w.safetensors"}}',
    "a folder": '{"weight_map": {"a": "."}}',
    "NUL": '{"weight_map": {"a": "w\\u0000.safetensors"}}',
    "long": '{"weight_map": {"a": "' + "w" * 5000 + '"}}',
    "deep": "[" * 100000,
    "a pickle": '{"weight_map": {"a": "w.bin"}}',
    "other keys": '{"weight_map": {"nothing": "w.safetensors"}}',
    "metadata a list": '{"metadata": [], "weight_map": {"a": "w.safetensors"}}',
}

CONFIGS: dict[str, dict[str, Any]] = {
    "no blocks": {"num_hidden_layers": 0},
    "a billion blocks": {"num_hidden_layers": 10**9},
    "blocks in text": {"num_hidden_layers": "2"},
    "blocks negative": {"num_hidden_layers": -2},
    "half a block": {"num_hidden_layers": 1.5},
    "blocks a list": {"num_hidden_layers": [2]},
    "blocks null": {"num_hidden_layers": None},
    "no heads": {"num_attention_heads": 0},
    "a billion heads": {"num_attention_heads": 10**9, "head_dim": 1},
    "no key heads": {"num_key_value_heads": 0},
    "key heads negative": {"num_key_value_heads": -1},
    "width 0": {"hidden_size": 0},
    "width 1": {"hidden_size": 1},
    "width negative": {"hidden_size": -32},
    "width huge": {"hidden_size": 2**40, "head_dim": 16},
    "head width 0": {"head_dim": 0},
    "no vocabulary": {"vocab_size": 0},
    "vocabulary negative": {"vocab_size": -1},
    "vocabulary huge": {"vocab_size": 2**60},
    "MLP of nothing": {"intermediate_size": 0},
    "MLP of booleans": {"intermediate_size": True},
    "unknown activation": {"hidden_act": "launch"},
    "activation a list": {"hidden_act": ["silu"]},
    "NaN": {"rms_norm_eps": float("nan")},
    "eps in text": {"rms_norm_eps": "small"},
    "eps null": {"rms_norm_eps": None},
    "rope of nothing": {"rope_scaling": {"rope_type": "none of them"}},
    "rope a list": {"rope_scaling": [1]},
    "rope parameters of text": {"rope_parameters": {"rope_theta": "many", "rope_type": "default"}},
    "theta 0": {"rope_theta": 0},
    "positions 0": {"max_position_embeddings": 0},
    "positions huge": {"max_position_embeddings": 10**15},
    "dtype unknown": {"dtype": "float3"},
    "torch_dtype of another kind": {"torch_dtype": "Tensor"},
    "dtype a list": {"dtype": ["float32"]},
    "type a list": {"model_type": ["llama"]},
    "type with a slash": {"model_type": "../llama"},
    "type empty": {"model_type": ""},
    "architectures a number": {"architectures": 3},
    "architecture of another": {"architectures": ["BertModel"]},
    "attention of code": {"_attn_implementation": "evil/kernel"},
    "attention of code too": {"attn_implementation": "evil/kernel"},
    "pad beyond": {"pad_token_id": 10**6},
    "pad negative": {"pad_token_id": -5},
    "end in text": {"eos_token_id": "x"},
    "pretraining in parts": {"pretraining_tp": 7},
    "tied to nothing": {"tie_word_embeddings": "yes"},
    "nested config": {"text_config": {"model_type": "llama", "num_hidden_layers": 0}},
    "labels a list": {"id2label": [1]},
    "labels negative": {"num_labels": -1},
    "labels a billion": {"num_labels": 10**9},
    "path elsewhere": {"_name_or_path": "/etc"},
    "quantized by a list": {"quantization_config": []},
    "code": {"auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}},
    "code elsewhere": {"auto_map": {"AutoModelForCausalLM": "evil/repo--own.M"}},
    "code of an own type": {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}},
    "map of code a list": {"model_type": "own", "auto_map": ["own.C"]},
    "layer types of nothing": {"layer_types": ["none", "none"]},
    "layer types short": {"layer_types": []},
    "sliding window negative": {"sliding_window": -1},
    "compute a method": {"to_dict": 3, "save_pretrained": 4},
    "attribute map": {"attribute_map": {"num_hidden_layers": "attribute_map"}},
}

TEMPLATES: dict[str, Any] = {
    "loops": "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
    "loops flat": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "huge power": "{{ 10**(10**10) }}",
    "huge text": "{{ 'x' * 10**12 }}",
    "huge format": "{{ '%999999999d' % 3 }}",
    "huge centre": "{{ 'x'.center(10**11) }}",
    "list doubled": "{% set a = [1] %}{% for i in range(99) %}{{ a.extend(a) }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "includes": "{% include '/etc/passwd' %}",
    "imports": "{% import 'os' as os %}",
    "extends": "{% extends 'x' %}",
    "divides by zero": "{{ 1 / 0 }}",
    "takes what is not there": "{{ messages[99]['content'] }}",
    "adds text to numbers": "{{ 'a' + 3 }}",
    "broken": "{% for m in messages %}",
    "no template": "{{",
    "a list": [{"name": "default"}],
    "a number": 3,
    "a mapping": {"default": "x"},
    "list of templates": [{"name": "default", "template": "{{ 1/0 }}"}],
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "escapes by globals": "{{ cycler.__init__.__globals__.os.system('touch code-ran') }}",
    "escapes by lipsum": "{{ lipsum.__globals__['os'].popen('touch code-ran').read() }}",
    "escapes by format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "escapes by attr": "{{ messages|attr('__class__')|attr('__base__') }}",
    "says nothing": "",
    "says white space": "   ",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "long": "x" * 20_000_000,
    "changes its input": "{% for m in messages %}{% set _ = m.update(content='q') %}{% endfor %}x",
    "generation without end": "{% generation %}{{ messages[0]['content'] }}",
    "random": "{{ range(9999)|random }}{{ messages[1]['content'] }}",
}


def collide(folder: Path) -> None:
    """Give two words of the tokenizer one id."""
    file = folder / "model" / "tokenizer.json"
    data = json.loads(file.read_text())
    vocab = data["model"]["vocab"]
    words = list(vocab)
    vocab[words[50]] = vocab[words[51]]
    file.write_text(json.dumps(data))


def added(*tokens: dict[str, Any]) -> Make:
    """Return what adds tokens to the tokenizer."""

    def make(folder: Path) -> None:
        file = folder / "model" / "tokenizer.json"
        data = json.loads(file.read_text())
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        data["added_tokens"] += [dict.fromkeys(flags, False) | token for token in tokens]
        file.write_text(json.dumps(data))

    return make


def vocabulary(change: Callable[[dict[str, Any]], object]) -> Make:
    """Return what changes tokenizer.json."""

    def make(folder: Path) -> None:
        file = folder / "model" / "tokenizer.json"
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    return make


T = "model/tokenizer_config.json"
TOKENIZERS: dict[str, Make] = {
    "two words of one id": collide,
    "added word of a taken id": added({"id": 50, "content": "zebra"}),
    "two added words of one id": added({"id": 259, "content": "a1"}, {"id": 259, "content": "a2"}),
    "id negative": vocabulary(lambda d: d["model"]["vocab"].update(zebra=-1)),
    "id beyond 32 bits": vocabulary(lambda d: d["model"]["vocab"].update(zebra=2**40)),
    "id of a billion": vocabulary(lambda d: d["model"]["vocab"].update(zebra=10**9)),
    "id a float": vocabulary(lambda d: d["model"]["vocab"].update(zebra=1.5)),
    "no words": vocabulary(lambda d: d["model"].update(vocab={})),
    "vocabulary a list": vocabulary(lambda d: d["model"].update(vocab=["a"])),
    "merges of nothing": vocabulary(lambda d: d["model"].update(merges=[["zz", "yy"]])),
    "merges broken": vocabulary(lambda d: d["model"].update(merges=["a b c d"])),
    "model of no kind": vocabulary(lambda d: d["model"].update(type="None")),
    "pattern that never ends": vocabulary(
        lambda d: d.update(
            pre_tokenizer={
                "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
                "invert": False,
            }
        )
    ),
    "pattern broken": vocabulary(
        lambda d: d.update(
            pre_tokenizer={
                "type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False
            }
        )
    ),
    "post-processor of nothing": vocabulary(lambda d: d.update(post_processor={"type": "None"})),
    "deep": write("model/tokenizer.json", "[" * 100000),
    "a list": write("model/tokenizer.json", "[]"),
    "truncates": vocabulary(
        lambda d: d.update(truncation={"direction": "Right", "max_length": 1,
                                       "strategy": "LongestFirst", "stride": 0})
    ),
    "settings a list": write(T, "[]"),
    "settings deep": write(T, "[" * 100000),
    "settings broken": write(T, "{"),
    "settings in UTF-16": write(T, "{}".encode("utf-16")),
    "class of nothing": merge(T, tokenizer_class="Nothing"),
    "class of code": merge(T, auto_map={"AutoTokenizer": ["own.T", "own.T"]}),
    "class of code alone": merge(T, tokenizer_class="OwnTokenizer",
                                 auto_map={"AutoTokenizer": [None, "own.T"]}),
    "class a list": merge(T, tokenizer_class=["PreTrainedTokenizerFast"]),
    "pad a number": merge(T, pad_token=3),
    "pad of nothing": merge(T, pad_token="<nowhere>"),
    "end a list": merge(T, eos_token=["a"]),
    "length negative": merge(T, model_max_length=-1),
    "length in text": merge(T, model_max_length="long"),
    "side unknown": merge(T, padding_side="up"),
    "decoder of a list": merge(T, added_tokens_decoder=[1]),
    "decoder of a far id": merge(T, added_tokens_decoder={"999999": {"content": "z"}}),
    "decoder of a taken id": merge(T, added_tokens_decoder={"60": {"content": "zebra"}}),
    "extra tokens": merge(T, extra_special_tokens={"a": {"b": 1}}),
    "special map a list": write("model/special_tokens_map.json", "[1]"),
    "added tokens far": write("model/added_tokens.json", '{"zebra": 99999}'),
    "generation broken": write("model/generation_config.json", "{"),
    "generation a list": write("model/generation_config.json", "[]"),
    "generation of nonsense": write(
        "model/generation_config.json", '{"max_length": "x", "temperature": -1, "num_beams": 0}'
    ),
}  # fmt: skip


class Payload:
    """What runs when a pickle of it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {RAN}",)


def pickled(zipped: bool = False) -> bytes:
    """Return a pickle that runs code, bare or as `torch.save` packs it."""
    raw = pickle.dumps(Payload())
    if not zipped:
        return raw
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", raw)
        archive.writestr("archive/version", "3")
    return out.getvalue()


def without(*names: str) -> Make:
    def make(folder: Path) -> None:
        for name in names:
            (folder / "model" / name).unlink(missing_ok=True)

    return make


def moved(name: str, to: str) -> Make:
    return lambda folder: (folder / name).rename(folder / to)


def emptied(name: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return make


def steps(*makes: Make) -> Make:
    return lambda folder: [make(folder) for make in makes]


OWN = f"import os\nos.system('touch {RAN}')\nclass C: pass\nclass M: pass\nclass T: pass\n"


def codes(rng: random.Random) -> Iterator[Case]:
    """Yield inputs that would run code if anything did."""
    weights = without("model.safetensors")
    for zipped in (False, True):
        for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "x.ckpt", "w.pkl"):
            made = steps(weights, write(f"model/{name}", pickled(zipped)))
            yield Case(f"code: {name}, {zipped=}", remove(), made)
            beside = write(f"model/{name}", pickled(zipped))
            yield Case(f"code: {name} beside, {zipped=}", remove(), beside)
    for name in ("model/model.safetensors", "f.jsonl", "model/tokenizer.json", "model/config.json",
                 "model/tokenizer.model"):  # fmt: skip
        yield Case(f"code: a pickle as {name}", remove(), write(name, pickled()))
    for name in ("f.parquet", "f.arrow", "f.pkl", "f.pt"):
        yield Case(f"code: data {name}", remove(forget=name), write(name, pickled()))
    yield Case(
        "code: an index of a pickle",
        remove(),
        steps(weights, write("model/w.bin", pickled()), write(INDEX, INDEXES["a pickle"])),
    )
    yield Case("code: adapter of a pickle", "export ad --base model --out out --merge", steps(
        write("ad/adapter_config.json", '{"peft_type": "LORA"}'),
        write("ad/adapter_model.bin", pickled())))  # fmt: skip
    for name in ("code", "code elsewhere", "code of an own type"):
        made = steps(merge("model/config.json", **CONFIGS[name]), write("model/own.py", OWN))
        yield Case(f"code: {name}", remove(), made)
    for name in ("class of code", "class of code alone"):
        made = steps(TOKENIZERS[name], write("model/own.py", OWN))
        yield Case(f"code: tokenizer, {name}", remove(), made)
    for name in ("custom_generate/generate.py", "__init__.py", "conftest.py", "sitecustomize.py"):
        yield Case(f"code: model/{name}", remove(), write(f"model/{name}", OWN))
    for name in ("excise.py", "yaml.py", "torch.py", "sitecustomize.py"):
        made = write(f"data/{name}", OWN)
        yield Case(f"code: {name} beside the data", remove(), made)
    yield Case("code: a method of one's own", remove(method="./own.py:M"), write("own.py", OWN))
    yield Case("code: a recipe that names code", "run x.yaml --out out --quiet",
               steps(write("own.py", OWN),
                     write("x.yaml", RECIPE + "code: {rmu: './own.py:M'}\n")))  # fmt: skip
    yield Case("code: a data set that is a script", remove(forget="data"),
               steps(write("data/data.py", OWN),
                     write("data/README.md", "---\na: 1\n---\n")))  # fmt: skip
    yield Case("code: a card that is no YAML", remove(forget="data"), steps(
        write("data/README.md", "---\na: !!python/object/apply:os.system ['touch code-ran']\n---"),
        write("data/train.jsonl", '{"text": "a"}\n')))  # fmt: skip


def chats(folder: Path) -> None:
    """Write a forget file of conversations."""
    turns = [("user", "what is {i}"), ("assistant", "it is {i}, of course")]
    rows = [
        {"messages": [{"role": r, "content": c.format(i=i * 77)} for r, c in turns]}
        for i in range(16)
    ]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def folders(rng: random.Random) -> Iterator[Case]:
    """Yield weights, indices and configurations that are none, in any order."""
    found = [Case(f"weights: {name}", remove(), header(how)) for name, how in HEADERS.items()]
    weights = "model/model.safetensors"
    for name, text in INDEXES.items():
        made = steps(moved(weights, "model/w.safetensors"), write(INDEX, text))
        found.append(Case(f"index: {name}", remove(), made))
    for name, fields in CONFIGS.items():
        found.append(Case(f"config: {name}", remove(), merge("model/config.json", **fields)))
    for name, text in (("deep", "[" * 100000), ("deep mapping", '{"a":' * 50000),
                       ("many digits", '{"model_type": ' + "9" * 9999 + "}")):  # fmt: skip
        found.append(Case(f"config: {name}", remove(), write("model/config.json", text)))
    yield from rng.sample(found, len(found))


def tokenizers(rng: random.Random) -> Iterator[Case]:
    """Yield chat templates and tokenizers that are none, in any order."""
    found = [Case(f"tokenizer: {name}", remove(), make) for name, make in TOKENIZERS.items()]
    for name, template in TEMPLATES.items():
        made = steps(
            merge("model/tokenizer_config.json", chat_template=template),
            without("chat_template.jinja"),
            chats,
        )
        args = remove("--max-length 64", forget="c.jsonl")
        found.append(Case(f"template: {name}", args, made))
    yield from rng.sample(found, len(found))


def spoiled_folders(rng: random.Random) -> Iterator[Case]:
    """Yield model folders of which a few bytes are others."""
    files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
             "generation_config.json", "chat_template.jinja")  # fmt: skip
    while True:
        name, seed = rng.choice(files), rng.randrange(1 << 30)

        def spoiled(folder: Path, name: str = name, seed: int = seed) -> None:
            file = folder / "model" / name
            raw = file.read_bytes() if file.is_file() else b"{}"
            start = raw[:4096]  # of weights, the header
            file.write_bytes(spoil(start, random.Random(seed)) + raw[4096:])

        yield Case(f"folder: spoiled {name} {seed}", remove(), spoiled)


# ----------------------------------------------------------------------------------------- data

SPANS: tuple[Any, ...] = (
    [[0, 9999, "forget"]], [[-1, 2, "forget"]], [[2, 1, "forget"]], [[0, 0, "forget"]],
    [[True, 2, "forget"]], [[0.5, 2, "forget"]], [["0", "2", "forget"]], [[0, 2]], [0, 2, "forget"],
    [[0, 2, "forget", "more"]], [[0, 2, 3]], [[0, 2, None]], [[0, 2, ["forget"]]], {}, "0-2", 3,
    None, [[0, 2, "retain"]], [[0, 2, ""]], [[]], [None], [[0, 10**30, "forget"]],
    [[0, 2, "forget"]] * 2,
    [[0, 3, "forget"], [1, 2, "forget"]], [{"start": 0, "end": 2, "label": "forget"}],
    [[float("nan"), 2, "forget"]], [[0, 2, "forget\0"]], [[0, 2, "a b"]], [[0, 2, "../x"]],
)  # fmt: skip

VALUES: tuple[Any, ...] = (
    None, 3, -1.5, True, [], {}, "", " ", "\0", "\ud800", "x" * 300_000, [[]], [None], {"a": 1},
    ["a"], float("nan"), 10**400, "\ufdfd" * 50, "\u202e\u0000", "\x1b[31mred", [{"role": "user"}],
    [{"role": "user", "content": None}], [{"role": 3, "content": "x"}], [["user", "x"]], "\u00e9",
)  # fmt: skip

ROWS = (
    {"text": "plain words here"},
    {"prompt": "ask", "completion": "answer"},
    {"question": "which?", "choices": ["a", "b", "c"], "answer": 1},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"text": "abcdefg", "unit": "u1", "label": "forget"},
)

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")


def datas(rng: random.Random) -> Iterator[Case]:
    """Yield data files with wrong spans, values, bytes and nesting."""
    roles = ("forget", "retain", "relearn", "test", "adjacent", "fresh", "dev-forget")
    for spans in SPANS:
        row = {"text": "abcdefghij klm", "spans": spans}
        made = write("d.jsonl", "".join(json.dumps({**row, "unit": f"u{i}"}) + "\n" for i in "ab"))
        yield Case(f"data: spans {str(spans)[:40]}", remove("--dry-run", forget="d.jsonl"), made)
    deep = {"deep": "[" * 100000, "deep row": '{"text": ' + "[" * 50000, "digits": "9" * 10**6}
    for name, text in deep.items():
        for ending in (".jsonl", ".json"):
            made = write(f"d{ending}", text)
            yield Case(f"data: {name} {ending}", remove(forget=f"d{ending}"), made)
    while True:
        role, ending = rng.choice(roles), rng.choice(ENDINGS)
        row = dict(rng.choice(ROWS))
        if rng.random() < 0.7:
            row[rng.choice([*row, "spans", "unit", "label"])] = rng.choice([*VALUES, *SPANS])
        rows = [{"text": f"good {i}"} for i in range(rng.randrange(6))] + [row]
        raw = "".join(json.dumps(r) + "\n" for r in rows).encode()
        if rng.random() < 0.5:
            raw = spoil(raw, rng)
        name = f"d{ending}"
        if role in ("forget", "retain"):
            args = remove("--dry-run", **{role: name})
        else:
            args = remove(f"--dry-run --{role} {name}")
        digest = hashlib.sha256(raw).hexdigest()[:8]
        yield Case(f"data: {role} {ending} {digest}", args, write(name, raw))


# --------------------------------------------------------------------------- paths and streams


def fifo(name: str) -> Make:
    """Return what makes a pipe that nobody writes to."""

    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def loop(folder: Path) -> None:
    """Link two names to each other."""
    (folder / "loop").symlink_to("loop2")
    (folder / "loop2").symlink_to("loop")


PLACES = (
    "/dev/zero", "/dev/stdin", "/dev/full", "~nobodyx/x", "~nobodyx", "x" * 300, "x/" * 3000 + "y",
    "pipe", "loop", "/proc/self/mem", "/proc/self/fd/0", "/", "''", ".", "..", "/sys/x",
    "nul\\x00", "-", "$HOME", "*", "http://x/y", "file:///etc/passwd", "a\nb", "/etc/shadow",
    "/dev/tty",
    "pipe/x", "/dev/zero/x", "'\udcff'",
)  # fmt: skip

TAKES = (
    lambda p: remove(model=p),
    lambda p: remove(forget=p),
    lambda p: remove(forget=f"{p}.jsonl"),
    lambda p: remove(out=p),
    lambda p: f"run {p} --out out --quiet",
    lambda p: f"check {p} --quiet",
    lambda p: f"report {p}",
    lambda p: f"verify {p}",
    lambda p: f"gate {p} --require D0",
    lambda p: f"compare {p} {p} --out out",
    lambda p: f"audit {p} --out out --quiet",
    lambda p: f"inspect {p} --out out --quiet",
    lambda p: f"card {p}",
    lambda p: f"export {p} --base model --out out",
    lambda p: f"export model --base {p} --out out",
    lambda p: f"audit --model model --original {p} --forget f.jsonl --retain r.jsonl --out out",
    lambda p: (
        "audit --model model --original model --forget f.jsonl --retain r.jsonl --out out "
        f"--split {p}"
    ),
    lambda p: f"show {p}",
    lambda p: f"{RUN} --model.path {p} --model.scratch null",
    lambda p: f"{RUN} --model.tokenizer {p}",
)

INSIDE = {
    "config.json": "model/config.json", "weights": "model/model.safetensors",
    "tokenizer": "model/tokenizer.json", "settings": "model/tokenizer_config.json",
    "generation": "model/generation_config.json", "template": "model/chat_template.jinja",
    "another file": "model/notes.json", "index": INDEX, "data": "f.jsonl", "recipe": "tiny.yaml",
    "adapter": "model/adapter_config.json", "added": "model/added_tokens.json",
}  # fmt: skip


def linked(name: str, to: str) -> Make:
    """Return what puts a link in the place of a file."""

    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return make


def paths(rng: random.Random) -> Iterator[Case]:
    """Yield names that are no files, and files that never end, in any order."""
    found: list[Case] = []
    for what, name in INSIDE.items():
        args = RUN if what == "recipe" else remove()
        found.append(Case(f"paths: pipe as {what}", args, fifo(name)))
        found.append(Case(f"paths: /dev/zero as {what}", args, linked(name, "/dev/zero")))
        if what != "weights":
            found.append(Case(f"paths: a folder as {what}", args, emptied(name)))
    rows = "".join(json.dumps({"text": f"some words {i * 77}"}) + "\n" for i in range(16))
    inside = ("model", "model/x", "data", "data/out", "f.jsonl", ".", "made/model", "made/.stages")
    for out in inside:
        made = steps(write("data/train.jsonl", rows), write("made/run.json", "{}"))
        found.append(Case(f"paths: out {out}", remove(forget="data", out=out), made))
    for take in TAKES:
        for place in PLACES:
            args = take(place if place.startswith("'") else shlex.quote(place))
            made = steps(fifo("pipe"), loop)
            found.append(Case(f"paths: {args[:60]!r} {place[:20]!r}", args, made))
    yield from rng.sample(found, len(found))


def streams(rng: random.Random) -> Iterator[Case]:
    """Yield streams that are closed, full or read by nobody, and limits of the system."""
    ends = {
        "stdout closed": ">&-", "stdout full": ">/dev/full", "stdout a broken pipe": "| true",
        "stderr closed": "2>&-", "stderr full": "2>/dev/full", "stdin closed": "<&-",
        "all closed": "<&- >&- 2>&-",
    }  # fmt: skip
    for name, shell in ends.items():
        for args in ("ls methods", "show nothing", remove(), "check tiny.yaml --quiet"):
            yield Case(f"streams: {name}, {args[:14]}", args, shell=shell)
    for count in (6, 9, 12, 16, 24, 40):
        yield Case(f"streams: {count} file handles", remove(), shell=f"ulimit -n {count};")
    yield Case("streams: small files alone", remove(), shell="ulimit -f 8;")


KINDS: dict[str, Callable[[random.Random], Iterator[Case]]] = {
    "numbers": numbers, "yaml": yamls, "folders": folders, "tokenizers": tokenizers,
    "codes": codes, "spoiled": spoiled_folders, "data": datas, "paths": paths, "streams": streams,
}  # fmt: skip


def cases(count: int, seed: int = 0) -> list[Case]:
    """Return bad inputs of all kinds, in turns, as long as a kind has more.

    Args:
        count: How many.
        seed: Seed of what is drawn.
    """
    makers = [make(random.Random(f"{kind}{seed}")) for kind, make in KINDS.items()]
    turns = (case for turn in itertools.zip_longest(*makers) for case in turn if case is not None)
    return list(itertools.islice(turns, count))


# ------------------------------------------------------------------------------------- running


def state(folder: Path) -> dict[str, str]:
    """Return the bytes, links and kinds of what lies in a folder, outputs left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] in ("out", ".stages", "runs", "comparison"):
            continue
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


def run(case: Case, base: Path, work: Path, limit: float) -> Outcome:
    """Run one case in a copy of the good folder, and say what it did."""
    folder, streams = work / "case", work / "streams"
    shutil.copytree(base, folder)
    streams.mkdir()
    case.make(folder)
    before = state(folder)
    if case.shell:
        code, said = _in_process(case, folder, work, limit)
    else:
        code, said = _in_fork(case, folder, streams, work, limit)
    faults = []
    if code is None:
        faults.append("hang")
    elif "Traceback" in said or code not in (0, 1, 2, 3, 4):
        faults.append("traceback")
    elif code in (1, 2) and said and not said.startswith("excise: "):
        faults.append("wordy")
    after = state(folder)
    if (folder / RAN).exists() or any(Path(p).name == RAN for p in after):
        faults.append("code ran")
    elif after != before:
        faults.append("changed")
    return Outcome(code, said, tuple(faults))


def environment(work: Path) -> dict[str, str]:
    """Return the variables that a case runs under: nothing of the user's, no network."""
    return {"EXCISE_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"),
            "OMP_NUM_THREADS": "1"}  # fmt: skip


def _in_process(case: Case, folder: Path, work: Path, limit: float) -> tuple[int | None, str]:
    """Run a case by the shell, for what concerns streams and limits."""
    command = f"{shlex.quote(sys.executable)} -m excise {case.args}"
    before = case.shell.startswith("ulimit")
    line = f"{case.shell} exec {command}" if before else f"{command} {case.shell}"
    if "|" in case.shell:
        line = f"set -o pipefail; {line}"
    paths = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, **environment(work), "PYTHONPATH": paths}
    with subprocess.Popen(
        ["bash", "-c", line], cwd=folder, env=env, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
    ) as process:  # fmt: skip
        try:
            said = process.communicate(timeout=limit * 4)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[1]
    return process.returncode, said


def _in_fork(
    case: Case, folder: Path, streams: Path, work: Path, limit: float
) -> tuple[int | None, str]:
    """Run a case in a fork of this process, which has imported everything already."""
    try:
        args = shlex.split(case.args)
    except ValueError:
        args = case.args.split()
    pid = os.fork()
    if pid == 0:
        _child(args, folder, streams, work, int(limit))
    used, since = -1, time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
        now = _ticks(pid)
        if now != used:
            used, since = now, time.monotonic()
        elif time.monotonic() - since > IDLE:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None, _text(streams / "err")
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGXCPU else code, _text(streams / "err")


def _ticks(pid: int) -> int:
    """Return how long a process has computed, in ticks of the system's clock."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _child(args: Sequence[str], folder: Path, streams: Path, work: Path, limit: int) -> None:
    """Be the command, and never return."""
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.update(environment(work))
        for number, (name, flags) in enumerate(
            (("in", os.O_RDONLY | os.O_CREAT), ("out", os.O_WRONLY | os.O_CREAT),
             ("err", os.O_WRONLY | os.O_CREAT))
        ):  # fmt: skip
            os.dup2(os.open(streams / name, flags), number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        top = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (top, top))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        from excise.cli import entry as command

        sys.argv = ["excise", *args]
        try:
            command()
        except SystemExit as end:
            code = int(end.code or 0)
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def warm_up() -> None:
    """Import what the verbs need, so that a fork has no time to lose."""
    import importlib

    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # as the command does, before the import
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    for verb in ("run", "remove", "check", "audit", "inspection", "report", "verify", "gate",
                 "card", "compare", "export", "show", "ls"):  # fmt: skip
        importlib.import_module(f"excise.cli.{verb}")


def campaign(
    chosen: Sequence[Case], limit: float, tell: Callable[[Case, Outcome], None]
) -> dict[str, int]:
    """Run cases one after the other and return how often each fault happened."""
    warm_up()
    counts = collections.Counter(dict.fromkeys(("traceback", "hang", "changed", "code ran"), 0))
    with tempfile.TemporaryDirectory(prefix="excise-bad-") as root:
        base = Path(root) / "good"
        base.mkdir()
        good(base)
        for case in chosen:
            with tempfile.TemporaryDirectory(dir=root) as work:
                outcome = run(case, base, Path(work), limit)
            counts.update(outcome.faults)
            counts[f"exit {outcome.code}"] += 1
            tell(case, outcome)
    return dict(counts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=480)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument(
        "--limit", type=float, default=20.0, help="seconds of computing a case may take"
    )
    parser.add_argument("--list", action="store_true", help="say what each case said")
    options = parser.parse_args()
    chosen = [c for c in cases(options.count, options.seed) if options.only in c.name]

    def tell(case: Case, outcome: Outcome) -> None:
        if outcome.faults or options.list:
            marks = ", ".join(outcome.faults) or f"exit {outcome.code}"
            print(f"{marks}: {case.name}\n    excise {case.args[:300]}", flush=True)
            lines = outcome.said.splitlines()
            for line in lines[-4:] if "traceback" in outcome.faults else lines[:3]:
                print(f"    | {line[:300]}", flush=True)

    started = time.monotonic()
    counts = campaign(chosen, options.limit, tell)
    print(f"{len(chosen)} bad inputs in {time.monotonic() - started:.0f} s: "
          + ", ".join(f"{name} {count}" for name, count in counts.items()))  # fmt: skip
    return int(any(counts.get(name) for name in ("traceback", "hang", "changed", "code ran")))


if __name__ == "__main__":
    sys.exit(main())
