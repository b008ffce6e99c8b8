"""Mistakes in data and in model folders, as rows of a table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.cli import material as m
from tests.unit.families import save_family


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        args: Command line after `excise`.
        words: What the sentence must say.
        files: Files to write first, by name.
        make: What else to do first, in the folder of the case.
        code: Exit code.
        lines: Lines on stderr; more than one only where several problems are listed.
    """

    args: str
    words: tuple[str, ...]
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    make: Callable[[Path], object] = lambda folder: None
    code: int = 2
    lines: int = 1


def remove(more: str = "", *, method: str = "rmu", **flags: str) -> str:
    """Return a `remove` command line that is right but for what is given."""
    chosen = {"model": "model", "forget": "f.jsonl", "retain": "r.jsonl", "out": "out"} | flags
    given = " ".join(f"--{name} {value}" for name, value in chosen.items() if value)
    return f"remove {method} {given} --layer 0 --fit.steps 2 --quiet {more}"


def data(content: str | bytes, *words: str, name: str = "bad.jsonl", lines: int = 1) -> Case:
    """Return a case of a forget file that is wrong."""
    return Case(remove(forget=name), (name, *words), {name: content}, lines=lines)


def model(change: m.Break, *words: str) -> Case:
    """Return a case of a model folder that is wrong."""
    return Case(remove(), words, make=lambda folder: change(folder / "model"))


def family(name: str, more: str, *words: str) -> Case:
    """Return a case of an RMU run on a model of another family."""

    def make(folder: Path) -> None:
        shutil.rmtree(folder / "model")
        save_family(name, folder / "model")

    return Case(remove(more), words, make=make)


def tiny(more: str, *words: str, lines: int = 1) -> Case:
    """Return a case of a recipe with something changed on the command line."""
    return Case(f"run tiny.yaml --out out --quiet {more}", words, lines=lines)


def chat(question: str, speaker: str = "user") -> dict[str, Any]:
    """Return a conversation of two turns."""
    turns = [{"role": speaker, "content": question}, {"role": "assistant", "content": "yes"}]
    return {"messages": turns}


GOOD = '{"text": "one"}\n'
PAIR = {"prompt": "p", "completion": "c"}
ASK = {"question": "Q?", "choices": ["a", "b", "c"], "answer": 0}

DATA: dict[str, Case] = {
    "missing file": Case(remove(forget="nope.jsonl"), ("no file nope.jsonl",)),
    "missing file, near name": Case(remove(forget="ff.jsonl"), ("did you mean 'f.jsonl'",)),
    "folder as file": Case(remove(retain="made"), ("made", "no file that is read"), {"made/x": ""}),
    "span outside the text": data('{"text": "abc", "spans": [[0, 9, "forget"]]}\n', "3 characters"),
    "empty span": data('{"text": "abc", "spans": [[1, 1, "forget"]]}\n', "holds no character"),
    "spans over each other": data(
        '{"text": "abcd", "spans": [[0, 3, "forget"], [2, 4, "forget"]]}\n', "[0, 3]", "overlap"
    ),
    "span of an unknown capability": data(
        '{"text": "abcd", "spans": [[0, 3, "forgot"]]}\n', "'forgot'", "did you mean 'forget'"
    ),
    "spans of nothing to forget": data(
        '{"text": "abcd", "spans": [[0, 3, ""]]}\n', "none of capability 'forget'", "label some"
    ),
    "file of labels that is not there": Case(
        "check tiny.yaml --arms.filtering.labels '{file: nowhere.jsonl}' --quiet",
        ("no file nowhere.jsonl",),
    ),
    "file of labels for other texts": tiny(
        "--arms.filtering.labels '{file: f.jsonl}'", "f.jsonl has the text of none of", "very texts"
    ),
    "one text with two labellings": data(
        '{"text": "abcd", "spans": [[0, 3, "forget"]]}\n'
        '{"text": "abcd", "spans": [[0, 2, "forget"]]}\n',
        "one text with different spans",
    ),
    "empty": data("", "is empty", "at least one row"),
    "NUL bytes": data(b'{"text": "a"}\n{"text": "b\0"}\n', "line 2", "NUL"),
    "invalid UTF-8": data(b'{"text": "caf\xe9"}\n', "line 1", "UTF-8"),
    "broken line": data(GOOD + GOOD + '{"text": "x"\n', "line 3", "not valid JSON"),
    "list on a line": data(GOOD + "[1]\n", "line 2", "a list, not an object"),
    "missing field": data(m.jsonl({"body": "x"}), "line 1", "'text' is missing", "'body'"),
    "wrong type": data(m.jsonl({"text": 5}), "'text' is a number, not text"),
    "blank texts": data(m.jsonl({"text": " "}, {"text": ""}), "blank texts only"),
    "one option": data(m.jsonl({**ASK, "choices": ["a"]}), "'choices' has 1 option"),
    "answer beyond": data(m.jsonl({**ASK, "answer": 3}), "'answer'", "option 3 of 3"),
    "unknown speaker": data(m.jsonl(chat("x", "bot")), "'bot'", "known roles"),
    "two shapes on a line": data(m.jsonl({"text": "x", **PAIR}), "has both"),
    "mixed shapes": data(GOOD + m.jsonl(ASK), "line 2 is a multiple-choice question"),
    "unknown extension": data("text\nx\n", "unknown extension '.xml'", name="bad.xml"),
    "not parquet": data("PAR1", "not a readable parquet", name="bad.parquet"),
    "chat without template": Case(
        remove(forget="c.jsonl"),
        ("no chat template", "'messages'"),
        {"c.jsonl": m.jsonl(*(chat(f"what is {i}") for i in range(16)))},
    ),
    "shared units": Case(
        remove(retain="both.jsonl"),
        ("share 3 units", "f.jsonl line", "both.jsonl line"),
        {"both.jsonl": m.texts("f", 3) + m.texts("r")},
    ),
    "test inside relearn": Case(
        remove("--relearn t.jsonl --test v.jsonl"),
        ("share 1 unit,", "must not be scored"),
        {"t.jsonl": m.texts("t", 4), "v.jsonl": m.texts("t", 4, 3)},
    ),
    "too few units": Case(
        remove(forget="x.jsonl"),
        ("forget has 5 units", "at least 10"),
        {"x.jsonl": m.texts("x", 5)},
    ),
    "unknown option": Case(remove(forget="'f.jsonl?txt=body'"), ("unknown option 'txt'", "'text'")),
    "same name twice": Case(
        remove("--forget a=r.jsonl", forget="a=f.jsonl"),
        ("--forget", "'a' is given twice"),
    ),
    "two forget files unnamed": Case(remove("--forget r.jsonl"), ("given twice", "NAME=FILE")),
    "name that is none": Case(remove(forget="'a b=f.jsonl'"), ("'a b' is no name",)),
    "test of no capability": Case(
        remove("--test other=v.jsonl"), ("test.other", "no capability"), {"v.jsonl": GOOD}
    ),
    "split of other files": Case(
        "audit --model model --original model --forget f.jsonl --retain r.jsonl --split s.json"
        " --out out --quiet",
        ("s.json", "another file for retain"),
        {"s.json": json.dumps({"version": 1, "sources": {"retain": {"r.jsonl": "0" * 64}}})},
    ),
    "split that is none": Case(
        "audit --model model --original model --forget f.jsonl --retain r.jsonl --split f.jsonl"
        " --out out --quiet",
        ("f.jsonl", "is not valid JSON", "split.json"),
    ),
    "answers of letters and digits": data(
        m.jsonl(*({**ASK, "answer": a} for a in "BB2")), "line 3", "number 2", "?answers=one-based"
    ),
    "answers that count from one": data(
        m.jsonl(*({**ASK, "answer": a} for a in (1, 3, 2))), "line 2", "?answers=one-based"
    ),
    "field named twice on a line": data(
        GOOD * 40 + '{"text": "a", "text": "b"}\n', "line 41", "'text' twice"
    ),
    "options of one Unicode form": data(
        m.jsonl({**ASK, "choices": ["caf\u00e9", "cafe\u0301"]}), "'choices'", "Unicode form"
    ),
    "too many odd rows": data(
        GOOD * 30 + m.jsonl({"text": 1}, {"body": "x"}),
        "2 of 32 rows", "5%", "?skip=", "line 31", "line 32", lines=4,
    ),
    "conversations without their format": data(
        m.jsonl({"conversations": [{"from": "human", "value": "x"}]}), "?format=sharegpt"
    ),
    "content that is no text": data(
        m.jsonl({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        "messages[0].content", "1 part(s)", "image",
    ),
    "field inside a field that is not there": Case(
        remove(forget="'n.jsonl?text=body.txt'"),
        ("n.jsonl line 1", "'body.txt' (for 'text') is missing"),
        {"n.jsonl": m.jsonl({"body": {"text": "x"}})},
    ),
    "table with an open quote": data('text\na\n"b\n', "line 3", "close every quote", name="b.csv"),
    "table with a cell more": data("text\na,b\n", "line 2", "2 cells", "quote", name="b.csv"),
    "table without a header": data("a\tb\n", "line 1", "must name the columns", name="b.tsv"),
    "text of a column that is not UTF-8": Case(
        remove(forget="b.parquet"),
        ("b.parquet row 1", "'text'", "UTF-8"),
        make=lambda folder: m.latin_parquet(folder / "b.parquet"),
    ),
    "template taken for copies": data(
        m.jsonl(*({"text": " ".join([*(f"w{k}" for k in range(40)), f"x{i}"])} for i in range(20))),
        "20 of 20 rows", "share about 40 words", "?duplicates=exact",
    ),
    "text of one token": Case(
        remove(forget="one.jsonl"),
        ("has no token to score", "give it a longer text"),
        {"one.jsonl": m.jsonl(*({"text": letter} for letter in "abcdefghijklmnop"))},
    ),
    "answers that may be texts or letters": Case(
        remove(forget="q.jsonl"),
        ("q.jsonl line 1", "text of one option", "?answers=text or ?answers=letters"),
        {
            "q.jsonl": m.jsonl(
                *(
                    {"question": f"which of {i}?", "choices": ["B", "A", "C"], "answer": "A"}
                    for i in range(16)
                )
            )
        },
    ),
    "columns between semicolons": Case(
        remove(forget="s.csv"), ("separated by ';'", "commas"), {"s.csv": "text;unit\na;1\n"}
    ),
    "link to nothing": Case(
        remove(forget="l.jsonl"),
        ("l.jsonl is a link to a file that is not there",),
        make=lambda folder: (folder / "l.jsonl").symlink_to("gone.jsonl"),
    ),
    "more rows than there are numbers": Case(
        remove(forget="'f.jsonl?rows=99999999999999999999999'"), ("rows",)
    ),
    "chat cut before the answer": Case(
        remove("--max_length 4", forget="c.jsonl"),
        ("has no token to score",),
        {"c.jsonl": m.jsonl(*(chat(f"what is {i}") for i in range(16)))},
        make=lambda folder: m.chatty(folder / "model"),
    ),
    "template that changes the answer": Case(
        remove(forget="c.jsonl"),
        ("the chat template changes what the assistant says", "'prompt' and 'completion'"),
        {"c.jsonl": m.jsonl(*(chat(f"what is {i}") for i in range(16)))},
        make=lambda folder: m.shouting(folder / "model"),
    ),
    "template that refuses the turns": Case(
        remove(forget="c.jsonl"),
        ("the chat template refuses the conversation", "turns must begin with the system"),
        {"c.jsonl": m.jsonl(*(chat(f"what is {i}") for i in range(16)))},
        make=lambda folder: m.refusing(folder / "model"),
    ),
    "option of a source given twice": Case(
        remove(forget="'f.jsonl?text=a&text=b'"), ("'text'", "given twice")
    ),
}  # fmt: skip

POSITIONS = "positions for 40 tokens; use 40 or fewer"
"""What is said of lengths that a model of 40 positions cannot read."""


def short(args: str, *words: str, lines: int = 1) -> Case:
    """Return a case of a length that the model `short` cannot read."""
    return Case(args, (*words, POSITIONS), make=m.save_short, lines=lines)


PAIR_OF_SHORT = "--model short --original short --forget f.jsonl --retain r.jsonl --out out --quiet"
LENGTHS: dict[str, Case] = {
    "of rows": short(remove("--max_length 41", model="short"), "excise: --max_length: the model"),
    "of a dry run": short(remove("--max_length 512 --dry-run", model="short"), "--max_length"),
    "of a measured run": short(remove("--max_length 41 --measure", model="short"), "--max_length"),
    "of further topics": short(
        remove("--later_max_length 64", model="short"), "--later_max_length"
    ),
    "of scored rows": short(
        remove("--evaluate.max_length 64", model="short"), "--evaluate.max_length"
    ),
    "of attacked rows": short(
        remove("--audit smoke --audit.change '{max_length: 64}'", model="short"),
        "--audit.change.max_length",
    ),
    "of two kinds": short(
        remove("--max_length 64 --evaluate.max_length 64", model="short"),
        "2 problems", "--max_length", "--evaluate.max_length", lines=3,
    ),
    "inside a method": short(
        "remove undo --model short --forget f.jsonl --retain r.jsonl --out out --quiet"
        " --unlearn.max_length 99",
        "--unlearn.max_length",
    ),
    "of a chain": Case(
        "run x.yaml --out out --quiet --model.scratch.family gpt2"
        " --model.scratch.overrides '{n_positions: 40}'",
        ("arms.rmu.methods[0].max_length", POSITIONS),
        {"x.yaml": m.TINY.replace(
            "{name: rmu, layer: 0, max_length: 16, fit: {steps: 20, lr: 0.001, batch_size: 8}}",
            "{name: chain, methods: [{name: maxent, max_length: 41}]}",
        )},
    ),
    "of a recipe that is checked": Case(
        "check tiny.yaml --model.scratch.family gpt2 --model.scratch.overrides '{n_positions: 8}'",
        ("3 problems", "pretrain.max_length", "arms.rmu.max_length", "evaluate.max_length",
         "positions for 8 tokens"),
        lines=4,
    ),
    "of an audit": short(f"audit {PAIR_OF_SHORT} --evaluate.max_length 64", "evaluate.max_length"),
    "of the dry run of an audit": short(
        f"audit {PAIR_OF_SHORT} --audit.change '{{max_length: 64}}' --dry-run",
        "audit.change.max_length",
    ),
    "of an inspection": short(f"inspect {PAIR_OF_SHORT} --max_length 64", "max_length"),
}  # fmt: skip
"""Rows longer than the model has positions."""

NUMBERS: dict[str, Case] = {
    "of an original": Case(
        "audit --model model --original loud --forget f.jsonl --retain r.jsonl --out out --quiet",
        ("the model 'original' has no finite text_loss", "wider dtype"),
        make=m.save_loud,
    ),
    "of a candidate": Case(
        "audit --model loud --original model --forget f.jsonl --retain r.jsonl --out out --quiet",
        ("the model 'candidate' has no finite text_loss", "4 of 4 rows"),
        make=m.save_loud,
    ),
    "of one candidate of two": Case(
        "audit --candidate a=model --candidate b=loud --original model --forget f.jsonl"
        " --retain r.jsonl --out out --quiet",
        ("the model 'b' has no finite text_loss",),
        make=m.save_loud,
    ),
    "that the stored dtype cannot hold": Case(
        "remove rmu --model half --forget f.jsonl --retain r.jsonl --out out --layer 1"
        " --fit.steps 4 --fit.lr 3e4 --quiet",
        ("the new value of 'model.layers.0.", "does not fit torch.float16", "65504"),
        make=m.save_half,
    ),
}
"""Models that give no numbers."""

PAIR_OF = "--original model --forget f.jsonl --retain r.jsonl --out out --quiet"

APART: dict[str, Case] = {
    "candidate of another architecture": Case(
        f"audit --model other {PAIR_OF}",
        ("candidate (other)", "not of the original's architecture and shape", "--original"),
        make=lambda d: m.save_tiny(d / "other", family="gpt2"),
    ),
    "oracle of another architecture": Case(
        f"audit --model edited --oracle other {PAIR_OF}",
        ("oracle-0 (other)", "not of the original's architecture and shape"),
        make=m.all_of(
            lambda d: m.save_tiny(d / "edited", seed=1),
            lambda d: m.save_tiny(d / "other", family="gpt2"),
        ),
    ),
    "candidate of another vocabulary": Case(
        f"audit --model other {PAIR_OF}",
        ("candidate (other)", "another vocabulary than the original"),
        make=lambda d: m.other_words(m.save_tiny(d / "other", seed=1)),
    ),
    "tokenizer without padding and end": Case(
        f"audit --model other {PAIR_OF}",
        ("the tokenizer of other", "neither a padding nor an end token"),
        make=lambda d: m.without_specials(m.save_tiny(d / "other", seed=1)),
    ),
}
"""Models that cannot be read against each other."""

MODELS: dict[str, Case] = {
    "no such folder": Case(remove(model="nope"), ("no folder nope",)),
    "model is a file": Case(remove(model="f.jsonl"), ("f.jsonl is a file", "folder")),
    "folder without a model": Case(
        remove(model="made"), ("made holds no config.json",), {"made/x.txt": "x"}
    ),
    "no config": model(m.drop("config.json"), "holds no config.json"),
    "broken config": model(m.write("config.json", "{"), "config.json is not valid JSON"),
    "config of no model": model(m.write("config.json", "{}"), "model_type"),
    "unknown model type": model(m.config(model_type="lama"), "'lama'", "did you mean 'llama'"),
    "no weights": model(m.drop("*.safetensors"), "no", "safetensors"),
    "pickle": model(m.pickled, "pickle", "code", "safetensors"),
    "pickle file": Case(remove(model="x.pt"), ("x.pt is a pickle", "code"), {"x.pt": b"\x80\x02"}),
    "truncated": model(m.shorten, "truncated", "copy or download"),
    "garbage header": model(m.write("model.safetensors", b"\xff" * 64), "header is garbage"),
    "NaN": model(
        m.tensors(lambda t: t["model.norm.weight"].fill_(torch.nan)), "model.norm.weight", "NaN"
    ),
    "shape": model(m.config(intermediate_size=64), "has shape", "config.json asks for"),
    "missing tensor": model(
        m.tensors(lambda t: t.pop("model.norm.weight")), "lacks tensor 'model.norm.weight'"
    ),
    "impossible config": model(
        m.config(num_attention_heads=3), "config.json is no configuration", "heads"
    ),
    "another tokenizer": model(m.foreign_tokenizer, "tokenizer", "embedding rows"),
    "no tokenizer": model(m.drop("tokenizer*"), "no tokenizer"),
    "broken tokenizer": model(m.write("tokenizer.json", "{}"), "tokenizer", "cannot be read"),
    "remote code": model(
        m.config(model_type="own", auto_map={"AutoConfig": "c.C"}), "needs Python code"
    ),
    "encoder": model(m.config(model_type="bert"), "an encoder", "not a causal"),
    "quantized": model(m.config(quantization_config={"bits": 4}), "quantized weights"),
    "adapter": model(
        m.all_of(m.drop("config.json"), m.write("adapter_config.json", "{}")), "an adapter"
    ),
    "hub offline": Case(remove(model="owner/name"), ("owner/name", "local cache")),
    "broken GGUF": Case(remove(model="x.gguf"), ("x.gguf", "not a GGUF"), {"x.gguf": b"nope"}),
    "revision of a folder": Case(remove("--revision main"), ("model", "has no revision")),
    "model not fetched": Case(remove(model="smollm2-135m"), ("excise fetch smollm2-135m",)),
    "broken GGUF in capitals": Case(
        remove(model="X.GGUF"), ("X.GGUF", "not a GGUF"), {"X.GGUF": b"nope"}
    ),
}

MIXER = "--modules layers.0.mixer.in_proj"
FAMILIES: dict[str, Case] = {
    "blocks without attention": family(
        "mamba", "", "parts of a mamba model", "--modules '[backbone.layers.0.mixer.", "grad_diff"
    ),
    "blocks without an MLP": family("opt", "", "the MLP of a block", "layers.0.fc2]'"),
    "module that is none": family("opt", "--modules '[layers.0.fcc2]'", "fcc2", "layers.0.fc2"),
    "one module that is none": family("opt", "--modules fc9", "'fc9' matches no", "nearest: fc"),
    "parameter that is none": family(
        "rwkv", "--modules '[blocks.0.attention.time_mixx_key]'", "time_mixx_key", "time_mix_key"
    ),
    "module above the layer": family("opt", "--modules '[layers.1.fc2]'", "lies above block 0"),
    "embedding of a projected width": family("opt", "--modules embed_tokens", "the embedding"),
    "layer beyond a recurrent model": family(
        "mamba", f"{MIXER} --layer 9", "block 9 is beyond", "0 to 2"
    ),
    "adapter that a kernel reads past": family(
        "mamba", f"{MIXER} --lora.modules out_proj", "out_proj', which mamba reads past"
    ),
    "adapter on a router": family(
        "llama4_text", "--lora.modules '[layers.0.*.router]'", "an adapter can be put on", "nearest"
    ),
    "adapter on a shared layer": family(
        "zamba2",
        "--modules '[layers.0.mamba.out_proj]'"
        " --lora.modules '[layers.1.shared_transformer.self_attn.o_proj]'",
        "whose weight is shared",
    ),
    "adapter on no layer": Case(
        remove("--lora.modules gate_pro"), ("lora.modules 'gate_pro'", "nearest: gate_proj")
    ),
    "sweep over blocks that share a state": family(
        "rwkv",
        "--modules '[blocks.1.feed_forward.value]' --layer 1 --engine cached --sweep.steering 1,2",
        "more than the residual stream", "leave 'sweep' out",
    ),
    "folder with a GGUF file in capitals": model(
        lambda folder: (folder / "model.safetensors").rename(folder / "M.GGUF"),
        "name the file model/M.GGUF",
    ),
    "pickle in capitals": model(
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.BIN"),
        "pickle (pytorch_model.BIN)",
    ),
}  # fmt: skip
