"""Mistakes in names, settings and output folders, as rows of a table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any

from tests.cli import material as m
from tests.cli.mistakes import Case, remove, tiny
from tests.fixtures import published as p

OWN = """
from typing import ClassVar, Literal
from excise.core.config import Config
from excise.methods.base import Method, Paper
class Plain: pass
class Setting(Config):
    name: Literal["setting"] = "setting"
class Half(Method):
    name: Literal["half"] = "half"
"""


def run_json(**fields: Any) -> Mapping[str, str]:
    """Return an output folder with a record."""
    return {"made/run.json": json.dumps(fields)}


AUDITED = {
    "made/run.json": json.dumps(
        {
            "schema": 2,
            "data": {"fingerprint": "a"},
            "method_runs": [{"name": "rmu", "method": {"name": "rmu"}, "model": {"name": "rmu"}}],
            "scores": [
                {
                    "model": name, "set": "retain_test", "metric": "text_loss", "value": 1.0,
                    "low": 1.0, "high": 1.0, "n": 8, "direction": "lower",
                }
                for name in ("original", "rmu")
            ],
        }
    )
}  # fmt: skip
"""An output folder with a record of one removal."""


PLAIN = "--model model --forget f.jsonl --retain r.jsonl --out out --quiet"
"""Flags of a method that has no layer."""

NAMES: dict[str, Case] = {
    "unknown verb": Case("remvoe rmu", ("unknown command 'remvoe'", "did you mean 'remove'")),
    "unknown flag": Case("--verbos", ("unknown command '--verbos'",)),
    "unknown method": Case(remove(method="rmuu"), ("unknown method 'rmuu'", "did you mean 'rmu'")),
    "no method": Case("remove", ("METHOD, --model and --out are missing", "--help")),
    "one process to cut a model over": tiny(
        "--fsdp true", "--fsdp cuts a model over several processes", "torchrun"
    ),
    "unknown recipe": Case("run dmo", ("unknown recipe 'dmo'", "did you mean 'demo'")),
    "unknown attack": tiny("--audit.attacks '[{name: relern}]'", "'relern'", "'relearn'"),
    "unknown format of a grid": tiny(
        "--audit.attacks '[{name: quantize, formats: [int5]}]'", "formats", "'int4'", "'nf4'"
    ),
    "share of a prune that is no share": tiny(
        "--audit.attacks '[{name: prune, shares: [30]}]'", "shares[0]", "less than 1, not 30"
    ),
    "prune by nothing": tiny(
        "--audit.attacks '[{name: prune, criteria: []}]'", "criteria", "needs 1 or more"
    ),
    "noise of no strength": tiny(
        "--audit.attacks '[{name: noise, strengths: [0]}]'", "strengths[0]", "more than 0"
    ),
    "part that no model has": tiny(
        "--audit.attacks '[{name: reinit, parts: [atention]}]'", "parts[0]", "'attention'"
    ),
    "rank of no adapter": tiny(
        "--audit.attacks '[{name: drop_adapter, ranks: [0]}]'",
        "ranks[0]",
        "must be 1 or more",
    ),
    "unknown domain": tiny("--domain '{name: fcts}'", "domain.name", "'fcts'", "'facts'"),
    "unknown family": tiny("--model.scratch.family lama", "model.scratch.family", "'llama'"),
    "unknown field": Case(
        remove("--alhpa 3"), ("--alhpa", "unknown setting", "did you mean 'alpha'")
    ),
    "unknown nested field": Case(remove("--fit.stepz 3"), ("fit.stepz", "did you mean 'steps'")),
    "wrong type": Case(
        remove("--fit.batch_size many"), ("--fit.batch_size", "whole number", "'many'")
    ),
    "no fraction of a step": Case(remove("--fit.batch_size 1.5"), ("fit.batch_size", "1.5")),
    "negative rate": Case(remove("--fit.lr -1"), ("fit.lr", "-1")),
    "several problems": Case(
        remove("--fit.lr -1 --alhpa 3 --layer x"), ("problems", "fit.lr", "alhpa", "layer"), lines=4
    ),
    "setting before the recipe": Case("run --sed 3 tiny.yaml", ("sed", "did you mean 'seed'")),
    "two settings, one value": Case(remove("--alpha --layer 0"), ("--alpha needs a value",)),
    "override without value": Case(remove("--alpha"), ("--alpha needs a value",)),
    "override that is no YAML": Case(remove("--alpha '[1'"), ("--alpha", "cannot read")),
    "override through a number": tiny("--seed.x 1", "seed", "whole number"),
    "stray word": Case(remove("stray"), ("unexpected argument 'stray'", "--help")),
    "two methods": Case(remove(method="rmu maxent"), ("unexpected argument 'maxent'",)),
    "nothing but dashes": Case(remove("--"), ("unexpected argument '--'",)),
    "flag without value": Case(remove("--seed"), ("--seed", "expected one argument", "--help")),
    "switch with a value": Case(remove("--force=3"), ("--force", "'3'", "--help")),
    "list without an end": Case(
        "run demo --out out --pretrain.pack.9 1", ("--pretrain.pack.9", "leads nowhere")
    ),
    "no such method run": tiny(
        "--arms.rmuu.fit.lr 1", "--arms.rmuu.fit.lr", "no arms.rmuu", "did you mean 'rmu'"
    ),
    "method run by a like name": Case(
        "run x.yaml --out out --arms.my_run.fit.lr 1",
        ("no arms.my_run", "did you mean 'my-run'", "a new one needs --arms.my_run.name"),
        {"x.yaml": m.TINY.replace("  rmu:", "  my-run:")},
    ),
    "method run of no method": tiny(
        "--arms.new '{fit: {lr: 1}}'", "no arms.new", "known: filtering, rmu"
    ),
    "method run of an unknown method": tiny(
        "--arms.new.name rmuu", "arms.new.name", "unknown method 'rmuu'"
    ),
    "method run with an impossible name": tiny("--arms.x!.name maxent", "arms.x!", "letters"),
    "recipe in full": Case("run demo --full --out out", ("--full is for studies", "demo")),
    "recipe checked in full": Case("check tiny.yaml --full", ("--full is for studies",)),
    "study that has no full": Case(
        "run moe-equivalence --full --out out", ("'moe-equivalence' has no --full",)
    ),
    "study that is a recipe": Case("study demo --out out", ("no study is called 'demo'",)),
    "setting of a study": Case(
        "check rmu-is-shallow --mragin 1", ("mragin: unknown field", "'margin'")
    ),
    "setting inside a study": Case(
        "study rmu-is-shallow --out out --rmu.fit.stepz 1", ("rmu.fit.stepz", "'steps'")
    ),
    "missing flag": Case(
        "remove rmu --model model --retain r.jsonl --out out", ("--forget is missing", "--domain")
    ),
    "empty model": Case(remove("--model ''", model=""), ("--model is missing",)),
    "missing out": Case(remove(out=""), ("--out is missing",)),
    "bad choice": Case(remove("--audit hard"), ("--audit", "smoke")),
    "nothing of that kind is kept": Case(remove("--keep model"), ("--keep", "'best'", "'delta'")),
    "keeping by the method": Case(
        "run x.yaml --out out",
        ("arms.rmu", "keep: what is kept", "'keep' of the recipe"),
        {"x.yaml": m.TINY.replace("  rmu: {", "  rmu: {keep: delta, ")},
    ),
    "transfer from nowhere": Case(f"remove checkpoint_transfer {PLAIN}", ("--teacher", "required")),
    "adapter of a direction": Case(
        f"remove direction {PLAIN} --lora.rank 2", ("lora", "nothing is trained; leave it out")
    ),
    "refusals of plain text": Case(
        f"remove refusal {PLAIN}", ("no forget row", "give rows with 'prompt' and 'completion'")
    ),
    "scale of no task vector": Case(
        f"remove task_vector {PLAIN} --scale 0", ("--scale", "more than 0")
    ),
    "workers": Case(remove("--workers x"), ("--workers", "x")),
    "negative workers": Case(remove("--workers -1"), ("--workers", "-1")),
    "recipe missing": Case("run nope.yaml", ("no recipe file nope.yaml",)),
    "recipe no YAML": Case("run x.yaml", ("x.yaml line 1", "not YAML"), {"x.yaml": "a: [1"}),
    "recipe no mapping": Case("run x.yaml", ("x.yaml", "no mapping"), {"x.yaml": "- a\n"}),
    "recipe a folder": Case("run model", ("model", "folder")),
    "recipe not UTF-8": Case("run x.yaml", ("x.yaml", "UTF-8"), {"x.yaml": b"a: \xe9\n"}),
    "recipe without arms": Case(
        "run x.yaml", ("arms", "required"), {"x.yaml": m.TINY.replace("arms:", "arm:")}, lines=3
    ),
    "arms empty": tiny("--arms '{}'", "arms", "at least one"),
    "no model": tiny("--model '{}'", "model", "'path' or 'scratch'"),
    "no pretrain": tiny("--pretrain null", "pretrain", "required"),
    "scratch method": Case(
        "remove filtering --model model --forget f.jsonl --retain r.jsonl --out out",
        ("filtering", "from scratch"),
    ),
    "budget field": tiny("--audit.change '{stepz: 1}'", "audit.change", "stepz", "'steps'"),
    "budget value": tiny("--audit.change '{steps: many}'", "audit.change", "steps", "'many'"),
    "budget without a step": tiny("--audit.change '{steps: 0}'", "audit.change", "steps", "1 or"),
    "budget without a rate": tiny("--audit.change '{rates: []}'", "audit.change", "rates"),
    "rate that is no number": tiny("--audit.change '{rates: [.nan]}'", "audit.change", "rates"),
    "checkpoints that fall": tiny(
        "--audit.change '{checkpoints: [1, 0]}'", "audit.change", "begin with 0 and rise"
    ),
    "margin of nothing": tiny("--audit.change '{margin: -1}'", "audit.change", "margin"),
    "shots of nothing": tiny("--audit.change '{shots: [0]}'", "audit.change", "shots", "1 or more"),
    "rows of an audit": tiny("--audit.change '{max_test_rows: 0}'", "audit.change", "1 or more"),
    "evaluation of one token": tiny("--evaluate.max_length 1", "evaluate.max_length", "2 or more"),
    "rows below zero": tiny("--evaluate.max_rows -1", "evaluate.max_rows", "0 or more"),
    "truth for a number": Case(remove("--fit.batch_size true"), ("fit.batch_size", "not True")),
    "decay of a moment beyond 1": Case(
        remove("--fit.betas '[0.9, 1.5]'"), ("fit.betas[1]", "less than 1, not 1.5")
    ),
    "seed below zero": tiny("--seed -1", "seed: must be 0 or more, not -1"),
    "seed beyond 64 bits": tiny("--seed 99999999999999999999", "seed: must be"),
    "oracles by the billion": tiny("--oracles 1000000000", "oracles: must be 1000 or less"),
    "steps without end": tiny("--arms.rmu.fit.steps 1e20", "arms.rmu.fit.steps"),
    "model of width 1": tiny("--model.scratch.width 1", "no llama of width 1, 2 blocks"),
    "model of no blocks": tiny("--model.scratch.blocks 0", "num_hidden_layers", "not 0"),
    "model of no heads": tiny(
        "--model.scratch.overrides.num_attention_heads 0", "no llama of width 32"
    ),
    "two methods of one name": Case(
        "run x.yaml --out out",
        (
            "x.yaml line",
            "the key 'rmu' is given twice",
        ),
        {"x.yaml": m.TINY.strip().replace("  rmu:", "  rmu: {name: maxent}\n  rmu:")},
    ),
    "recipe called by a path": Case(
        "run x.yaml",
        ("name: the output folder is called after it",),
        {"x.yaml": m.TINY.replace("name: tiny", "name: ../tiny")},
    ),
    "infinite rate": Case(remove("--fit.lr .inf"), ("fit.lr", "finite")),
    "steering that is no number": Case(
        remove("--steering .nan"), ("--steering", "a finite number, not nan")
    ),
    "length of one token": Case(remove("--max_length 1"), ("--max_length", "2 or more")),
    "sweep beyond the model": Case(
        remove("--sweep.layer 0,9 --dry-run --engine cached"), ("block 9", "sweep.layer")
    ),
    "out in the model's folder": Case(remove(out="model/sub"), ("--out model/sub", "elsewhere")),
    "name too long": Case(remove(out="x" * 300), ("file name too long", "name another")),
    "budget name": tiny("--audit.budget hard", "audit.budget", "'hard'", "'smoke'"),
    "device": Case(remove("--device cuda:99"), ("'cuda:99'", "not available")),
    "device that is none": Case(remove("--device tpux"), ("'tpux'",)),
    "layer beyond": Case(remove("--layer 9"), ("block 9", "blocks 0 to 1")),
    "modules": Case(remove("--modules '[nothing]'"), ("'nothing'",)),
    "4 bits without bitsandbytes": tiny(
        "--model.scratch.width 64 --arms.rmu.lora.load_in_4bit true",
        "lora.load_in_4bit needs",
        "pip install 'excise[bitsandbytes]'",
    ),
    "4 bits of rows that are no whole blocks": Case(
        remove("--lora.load_in_4bit true"), ("a multiple of 64 inputs", "q_proj' is none")
    ),
    "4 bits of a method that reads whole gradients": Case(
        f"remove repselect {PLAIN} --elicit.load_in_4bit true",
        ("--elicit", "load_in_4bit", "leave it out"),
    ),
    "LoRA modules": Case(remove("--lora.modules '[nothing]'"), ("'nothing'",)),
    "too big": tiny("--model.scratch.width 65536 --model.scratch.blocks 64", "memory", "--force"),
    "clipping of a gradient that is never whole": Case(
        remove("--fit.in_backward true --fit.clip 1"), ("in_backward", "set clip to 0")
    ),
    "facts too few": tiny("--domain.subjects 8", "forget_share", "subjects"),
    "code not allowed": Case(
        remove(method="./own.py:Half"), ("own.py", "--allow-code"), {"own.py": OWN}
    ),
    "code missing": Case(remove("--allow-code", method="./no.py:Half"), ("no.py", "not a file")),
    "code broken": Case(
        remove("--allow-code", method="./own.py:Half"),
        ("own.py", "cannot be imported"),
        {"own.py": "def"},
    ),
    "code without the class": Case(
        remove("--allow-code", method="./own.py:Hal"), ("no 'Hal'", "'Half'"), {"own.py": OWN}
    ),
    "code of no method": Case(
        remove("--allow-code", method="./own.py:Plain"),
        ("Plain", "docs/extending.md"),
        {"own.py": OWN},
    ),
    "code of another kind": Case(
        remove("--allow-code", method="./own.py:Setting"),
        ("Setting", "docs/extending.md"),
        {"own.py": OWN},
    ),
    "code half written": Case(
        remove("--allow-code", method="./own.py:Half"), ("Half", "lacks apply"), {"own.py": OWN}
    ),
}

OUTPUT: dict[str, Case] = {
    "out is a file": Case(remove(out="f.jsonl"), ("--out f.jsonl is a file",)),
    "out under a file": Case(remove(out="f.jsonl/out"), ("--out f.jsonl/out", "cannot be made")),
    "out nowhere": Case(
        remove("--force", out="/proc/no/out"), ("--out /proc/no/out", "cannot be made")
    ),
    "shard beyond the last": tiny("--shard 3/2", "--shard 3/2", "I from 1 to N"),
    "shard of none": tiny("--shard 0/0", "--shard 0/0", "I from 1 to N"),
    "shard counted from 0": tiny("--shard 0/4", "--shard 0/4", "--array=1-4"),
    "shard that is no pair": tiny("--shard 2", "--shard 2:", "such as 2/4"),
    "shard of what is there": Case(
        "run tiny.yaml --out made --shard 1/2", ("made already holds files",), {"made/x": ""}
    ),
    "shard on a cluster": tiny("--shard 1/2 --pool ray", "--shard", "--pool", "leave one out"),
    "shard of an endpoint": Case(
        "audit --endpoint http://localhost:1 --model a --original b --shard 1/2",
        ("--shard", "--endpoint"),
    ),
    "workers on a cluster": tiny("--workers 2 --pool ray", "--workers", "--pool", "leave one out"),
    "pool of another kind": tiny("--pool slurm", "--pool slurm", "ray:HOST:PORT"),
    "pool without a port": tiny("--pool ray:host", "--pool ray:host", "ray:HOST:PORT"),
    "pool of a client": tiny("--pool ray:ray://host:10001", "ray:HOST:PORT"),
    "merge of nothing": Case("merge made", ("no shards of made",)),
    "merge to nowhere": Case("merge a b", ("--out",)),
    "merge of no shards": Case(
        "merge made model --out out", ("no shard is done: made, model",), {"made/x": ""}
    ),
    "foreign files in out": Case(remove(), ("--out out", "not empty"), {"out/keep.txt": "mine"}),
    "another run in out": Case(
        remove(), ("--out out holds another run",), {"out/recipe.yaml": "name: other\n"}
    ),
    "out is the model": Case(remove(out="model"), ("--out model", "not empty")),
    "report of nothing": Case("report nope", ("nope", "no run.json")),
    "report without record": Case("report made", ("made", "no run.json"), {"made/x": ""}),
    "report of two": Case("report a b", ("unexpected argument 'b'",)),
    "newer record": Case("report made", ("newer excise", "schema 9"), run_json(schema=9)),
    "broken record": Case("report made", ("run.json", "not a record"), {"made/run.json": "{"}),
    "no record": Case("report made", ("run.json", "no schema"), run_json(a=1)),
    "damaged record": Case(
        "report made", ("damaged at scores.0.model",), run_json(schema=1, scores=[{"value": 1}])
    ),
    "audit of nothing": Case("audit nope --out out", ("nope", "no run.json")),
    "audit of a bare record": Case(
        "audit made --out out", ("made", "recipe.yaml"), run_json(schema=1)
    ),
    "audit without original": Case(
        "audit --model model --forget f.jsonl --retain r.jsonl --out out", ("--original",)
    ),
    "audit of other sizes": Case(
        "audit --model big --original model --forget f.jsonl --retain r.jsonl --out out --quiet",
        ("big", "model"),
        make=lambda d: m.save_tiny(d / "big", width=64),
    ),
    "audit budget": Case("audit made --budget hard", ("--budget", "smoke")),
    "fetch unknown": Case("fetch smolm2", ("'smolm2'", "did you mean 'smollm2-135m'")),
    "fetch two": Case("fetch a b", ("unexpected argument 'b'",)),
    "list unknown": Case("ls method", ("unknown list 'method'", "did you mean 'methods'")),
    "list in the singular": Case("ls score", ("unknown list 'score'", "did you mean 'scores'")),
    "show nothing": Case("show", ("NAME is missing", "excise show --help")),
    "show of two": Case("show rmu maxent", ("unexpected argument 'maxent'",)),
    "show code not allowed": Case(
        "show ./own.py:Half", ("own.py", "--allow-code"), {"own.py": OWN}
    ),
    "report with a setting": Case("report made --seed 1", ("unexpected argument '--seed'",)),
    "export without a base": Case("export made --out out", ("--base is missing",)),
    "show unknown": Case("show rmuu", ("unknown name 'rmuu'", "did you mean 'rmu'")),
    "check unknown": Case("check dmo", ("unknown recipe 'dmo'", "did you mean 'demo'")),
    "check bad field": Case("check tiny.yaml --sed 1", ("sed", "did you mean 'seed'")),
    "dry run of no file": Case(remove("--dry-run", forget="nope.jsonl"), ("no file nope.jsonl",)),
    "dry run of a broken file": Case(
        remove("--dry-run", forget="bad.jsonl"), ("bad.jsonl line 1", "JSON"), {"bad.jsonl": "{"}
    ),
    "dry run of an audit of a broken file": Case(
        "audit --model model --original model --forget bad.jsonl --retain r.jsonl --out out"
        " --dry-run --quiet",
        ("bad.jsonl line 1", "JSON"),
        {"bad.jsonl": "{"},
    ),
    "dry run of an audit of no model": Case(
        "audit --model nope --original model --forget f.jsonl --retain r.jsonl --out out --dry-run",
        ("there is no folder nope",),
    ),
    "dry run of a hub id": Case(
        remove("--dry-run", model="owner/name"), ("owner/name", "cannot be fetched")
    ),
    "dry run of a block beyond": Case(remove("--dry-run --layer 9"), ("block 9 is beyond",)),
    "flag of audit with a typo": Case(
        "audit made --out out --dry-rum", ("unknown flag '--dry-rum'", "did you mean '--dry-run'")
    ),
    "measured without weights": Case(
        remove("--measure"),
        ("model holds no weights",),
        make=lambda d: m.drop("*.safetensors")(d / "model"),
    ),
    "teacher that a study lacks": Case(
        "run splice-factorial --out out --against '[\"npoo\"]'", ("'npoo'", "did you mean 'npo'")
    ),
    "measured study": Case(
        "run rmu-is-shallow --out out --measure", ("--measure is for recipes", "a study")
    ),
    "unknown tracker": Case(remove("--track mlflow"), ("--track", "'mlflow'", "'tensorboard'")),
    "tracker not installed": Case(
        remove("--track trackio"), ("'trackio' is not installed", "pip install")
    ),
    "domain of a removal": Case(
        remove("--domain.name facts"), ("--domain.name", "name the domain with --domain")
    ),
    "unknown attack of a removal": Case(
        remove("--audit.attacks '[{name: relern}]'"), ("--audit.attacks", "'relern'", "'relearn'")
    ),
    "setting of the method before": tiny(
        "--arms.rmu.name maxent --arms.rmu.layer 1", "arms.rmu.layer: unknown field"
    ),
    "recipe like no other": Case("run xyzzy", ("unknown recipe 'xyzzy'", "excise ls recipes")),
    "gate without a requirement": Case(
        "gate made", ("--require is missing", "made", "D3, recovery<=0.2@1M-tokens"), AUDITED
    ),
    "gate of no level": Case("gate made --require D7", ("'D7' is no condition", "D0"), AUDITED),
    "gate of no tokens": Case(
        "gate made --require 'recovery<=0.2'", ("up to how many tokens", "@1M-tokens"), AUDITED
    ),
    "gate the wrong way round": Case(
        "gate made --require 'retain<=0.01'", ("bounded by >=", "retain>="), AUDITED
    ),
    "gate of no model": Case(
        "gate made --require D0 --model rmuu", ("no model 'rmuu'", "did you mean 'rmu'"), AUDITED
    ),
    "gate of a metric that nobody scored": Case(
        "gate made --require 'retain[los]>=0'", ("no retain score", "'text_loss'"), AUDITED
    ),
    "gate against other data": Case(
        "gate made --baseline old",
        ("baseline cannot be compared", "the data (b and a)"),
        {**AUDITED, "old/run.json": AUDITED["made/run.json"].replace('"a"', '"b"')},
    ),
    "gate of a record without a model": Case(
        "gate made --require D0", ("no edited model",), run_json(schema=2)
    ),
    "gate in no format": Case(
        "gate made --require D0 --format xml", ("--format", "junit"), AUDITED
    ),
    "requirement without attacks": Case(
        remove("--require D3"), ("require: 'D3' needs attacks", "smoke")
    ),
    "requirement of a removal that cannot be read": Case(
        remove("--require 'recovry<=1@1k-tokens' --audit smoke"), ("'recovery'",)
    ),
    "requirement of a study": Case(
        "run rmu-is-shallow --require D3 --out out", ("--require is for recipes",)
    ),
    "compare nothing": Case("compare", ("FOLDERS is missing", "compare --help")),
    "compare no record": Case("compare made", ("made", "no run.json"), {"made/x": ""}),
    "compare one name twice": Case(
        "compare a=made a=made --out cmp", ("'a'", "write NAME=DIR"), AUDITED
    ),
    "compare into a run": Case("compare made --out made", ("--out made", "folder"), AUDITED),
    "picture of another kind": Case(
        "compare made --figure f.png --out cmp", ("--figure f.png", "ends in .svg"), AUDITED
    ),
    "compare without a curve": Case(
        "compare made --figure f.svg --out cmp", ("--figure", "nothing to draw"), AUDITED
    ),
    "candidate without a name": Case(
        "audit --original model --candidate model --forget f.jsonl --retain r.jsonl --out out",
        ("--candidate model", "NAME=DIR"),
    ),
    "candidate named twice": Case(
        "audit --original model --candidate a=model --candidate a=model --forget f.jsonl"
        " --retain r.jsonl --out out",
        ("--candidate", "'a' is given twice"),
    ),
    "verify nothing": Case("verify made", ("made", "no run.json"), {"made/x": ""}),
    "public page that is no page": Case(
        "report made --public --out page.txt", ("--out page.txt", "HTML"), AUDITED
    ),
    "report to another place": Case(
        "report made --out x.html", ("--out goes with --public",), AUDITED
    ),
    "export of an adapter as a delta": Case(
        "export made --base model --out out",
        ("made holds an adapter", "--merge"),
        {"made/adapter_config.json": "{}"},
    ),
    "export of a scaled delta": Case(
        "export made --base model --out out --scale -1", ("--scale", "--merge"), {"made/x": ""}
    ),
    "export of no adapter": Case(
        "export made --base model --merge --out out",
        ("made holds no adapter_config.json", "LoRA"),
        {"made/x": ""},
    ),
    "export of a broken adapter": Case(
        "export made --base model --merge --out out",
        ("adapter in made cannot be read", "copy it again"),
        {"made/adapter_config.json": "{}", "made/adapter_model.safetensors": "x"},
    ),
    "export at no scale": Case(
        "export made --base model --merge --scale nan --out out", ("--scale nan", "-1")
    ),
    "export at a scale in words": Case(
        "export made --base model --merge --scale half --out out", ("--scale", "number", "'half'")
    ),
    "claim of another kind": Case(remove("--claim erasure"), ("--claim", "deletion", "capability")),
    "deletion refitted": Case(
        remove("--claim deletion --refit"), ("refit", "every forget row already")
    ),
    "deletion of too few": Case(
        remove("--claim deletion", forget="few.jsonl"),
        ("forget has 4 units", "at least 5 are needed"),
        {"few.jsonl": m.texts("few", 4)},
    ),
    "deletion scored on others": Case(
        remove("--claim deletion --test q.jsonl"),
        ("q.jsonl line 1", "no unit of forget.forget", "'unit'"),
        {"q.jsonl": m.texts("other", 4)},
    ),
    "questions and texts to score": Case(
        remove("--test a=q.jsonl", forget="a=f.jsonl --forget b=g.jsonl"),
        ("test", "several shapes", "choice, text"),
        {
            "g.jsonl": m.texts("g"),
            "q.jsonl": m.jsonl({"question": "Why?", "choices": ["a", "b"], "answer": 0}),
        },
    ),
    "scored neighbours of nothing": Case(
        remove("--adjacent-test f.jsonl"), ("adjacent_test", "needs 'adjacent' too")
    ),
    "no retain test": Case(remove("--retain-test nope.jsonl"), ("nope.jsonl",)),
    "test of an unknown capability": Case(
        remove("--test bio=f.jsonl"), ("test.bio", "no capability of forget")
    ),
    "multi-hop questions of an unknown capability": Case(
        remove("--multi-hop bio=f.jsonl"), ("multi_hop.bio", "no capability of forget")
    ),
    "data beside an output folder": Case(
        "audit made --test f.jsonl --out out", ("--test", "made", "in place of the folder")
    ),
    "card of nothing": Case("card made", ("made", "no run.json"), {"made/x": ""}),
    "card of an audit": Case(
        "card made", ("made", "no removal", "run or remove"), run_json(schema=2, kind="audit")
    ),
    "card of a model that is gone": Case(
        "card made",
        ("made", "no longer in", "make it again"),
        run_json(
            schema=2,
            kind="remove",
            method_runs=[
                {
                    "name": "rmu",
                    "method": {},
                    "model": {"name": "rmu", "path": "model", "fingerprint": "ab"},
                }
            ],
        ),
    ),
    "audit of a domain in memory": Case(
        "audit made --out out",
        ("made", "Domain in memory", "--model made/model"),
        run_json(schema=2, kind="remove", config={"domain": None}),
    ),
}


def of_domain(name: str, more: str = "") -> str:
    """Return a `remove` command line on a published data set, of which `copy` is a copy."""
    flags = f"--domain {name} --domain.path copy {more}"
    return remove(flags, forget="", retain="")


def copied(name: str, spoil: m.Break) -> m.Break:
    """Write a copy of a published data set and take something away."""
    return lambda folder: spoil(getattr(p, f"write_{name}")(folder / "copy"))


PAIR = "audit --model model --original model --out out --quiet"

PUBLISHED: dict[str, Case] = {
    "unknown domain": Case(
        remove("--domain wmpd", forget="", retain=""), ("domain.name", "'wmpd'", "'wmdp'")
    ),
    "domain beside a forget file": Case(
        remove("--domain tofu"), ("--forget is given beside --domain tofu", "leave one")
    ),
    "domain beside a retain test set": Case(
        remove("--domain tofu --retain-test r.jsonl", forget="", retain=""),
        ("--retain-test is given beside --domain tofu",),
    ),
    "domain beside a claim": Case(
        remove("--domain muse --claim deletion", forget="", retain=""),
        ("--claim is given beside --domain muse",),
    ),
    "neither domain nor files": Case(
        remove(forget="", retain=""), ("--forget and --retain are missing", "--domain")
    ),
    "audit of a domain beside a file": Case(
        f"{PAIR} --domain tofu --forget f.jsonl", ("--forget is given beside --domain tofu",)
    ),
    "audit of a domain with a split": Case(
        f"{PAIR} --domain tofu --split made/split.json", ("--split is given beside --domain tofu",)
    ),
    "domain beside an output folder": Case(
        "audit made --domain tofu --out out", ("--domain is given beside made",)
    ),
    "no such copy": Case(of_domain("tofu"), ("there is no folder copy", "domain.path")),
    "unknown setting of a domain": Case(
        of_domain("tofu", "--domain.splt forget05"), ("--domain.splt", "did you mean 'split'")
    ),
    "unknown share of authors": Case(
        of_domain("tofu", "--domain.split forget50"), ("domain.split", "'forget10'")
    ),
    "unknown subject": Case(
        of_domain("wmdp", "--domain.subject nuclear"), ("domain.subject", "'cyber'")
    ),
    "chemistry has no corpora": Case(
        of_domain("wmdp", "--domain.subject chem"),
        ("no forget corpus for chem", "domain.forget"),
        make=copied("wmdp", lambda folder: None),
    ),
    "bio corpus that nobody fetched": Case(
        remove("--domain wmdp", forget="", retain=""),
        ("given on request only", "bio-forget-corpus.jsonl"),
    ),
    "a configuration is missing": Case(
        of_domain("tofu", "--domain.split forget01"),
        ("copy has no world_facts_perturbed", "locuslab/TOFU"),
        make=copied("tofu", m.drop("world_facts_perturbed.json")),
    ),
    "a split is missing": Case(
        of_domain("muse"),
        ("copy has no split 'holdout'", "forget"),
        make=copied("muse", m.drop("raw/holdout*")),
    ),
    "a column is missing": Case(
        of_domain("muse"),
        ("verbmem.jsonl line 1", "'gt'", "missing"),
        make=copied("muse", m.all_of(
            lambda d: shutil.rmtree(d / "verbmem"),
            m.write("verbmem.jsonl", m.jsonl({"prompt": "a"})),
        )),
    ),
    "a person nobody knows": Case(
        of_domain("rwku", "--domain.target 9_Plato"),
        ("no row whose 'subject' is 'Plato'", "known: Confucius, Stephen King"),
        make=copied("rwku", lambda folder: None),
        lines=6,
    ),
    "a person without a number": Case(
        of_domain("rwku", "--domain.target Plato"), ("domain.target", "Plato")
    ),
    "no subjects": Case(of_domain("mmlu", "--domain.subjects '[]'"), ("domain.subjects",)),
    "a hub that cannot be reached": Case(
        remove("--domain tofu", forget="", retain=""),
        ("'locuslab/TOFU' cannot be fetched", "cannot be reached"),
    ),
    "dry run of a hub that cannot be reached": Case(
        remove("--domain tofu --dry-run", forget="", retain=""),
        ("'locuslab/TOFU' cannot be fetched", "cannot be reached"),
    ),
    "check of a hub that cannot be reached": Case(
        "check tiny.yaml --domain '{name: muse}' --quiet",
        ("'muse-bench/MUSE-News' cannot be fetched", "cannot be reached"),
    ),
    "dry run of a copy without a split": Case(
        of_domain("muse", "--dry-run"),
        ("copy has no split 'holdout'",),
        make=copied("muse", m.drop("raw/holdout*")),
    ),
    "dry run of an audit of no copy": Case(
        f"{PAIR} --domain wmdp --domain.path copy --dry-run", ("there is no folder copy",)
    ),
}  # fmt: skip
