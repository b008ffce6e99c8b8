"""What verbs on an edited model and its original share: both models and their data, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from excise.cli.options import PairOptions
from excise.cli.remove import ROLES, domain_data
from excise.core.errors import UserError
from excise.fetch.model import open_model
from excise.models.checkpoint import Checkpoint
from excise.models.spec import ModelSpec
from excise.record import ModelRef, Record, load
from excise.record.measured import PROXY, role
from excise.requests.recipe import NO_MODEL
from excise.requests.registry import registry

DATA = ("domain", *ROLES, "split")
"""Flags that name the data where no output folder does."""


@dataclass(frozen=True)
class EditedPair:
    """Edited models beside their original, as flags or an output folder name them.

    Attributes:
        name: What the pair is called in names of folders.
        models: Folders or hub ids of the edited models, by name.
        original: The model before the edit.
        domain: Plain data of the domain.
        title: Title of the record, where there is one.
        oracles: Models retrained without the forget set.
        proxies: Models that stand in for those.
        evaluate: Plain data of how the models were scored.
        attacks: Plain data of attacks that were asked for beside those of the budget.
        code: Names defined by code of the user's own, as `./file.py:Class`.
        tokenizer: Folder or hub id of the original's tokenizer, where it does not lie beside it.
    """

    name: str
    models: Mapping[str, str]
    original: str
    domain: Mapping[str, Any]
    title: str = ""
    oracles: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    attacks: tuple[Any, ...] = ()
    code: Mapping[str, str] = field(default_factory=dict)
    tokenizer: str = ""

    @property
    def original_spec(self) -> dict[str, str]:
        """Plain data of the original."""
        return {"path": self.original, "tokenizer": self.tokenizer}


def pair_of(options: PairOptions, called: str, *, check: bool = True) -> EditedPair:
    """Return the pair that a command line names.

    Args:
        options: Its flags.
        called: What the edited model is called where flags name it.
        check: Whether the bytes of an output folder's models must be those of its record.

    Raises:
        UserError: If a needed flag is missing, or the folder holds no run.
    """
    if not options.folder:
        return _from_flags(options, called)
    for flag in ("model", *DATA):
        if getattr(options, flag):
            raise UserError(
                f"--{flag.replace('_', '-')} is given beside {options.folder}, whose record names "
                "model and data; leave it out, or give --model, --original, --forget and --retain "
                "in place of the folder"
            )
    return _from_folder(options, check)


def _from_flags(options: PairOptions, called: str) -> EditedPair:
    candidates = tuple(getattr(options, "candidate", ()))  # which name the models of an audit
    data = () if options.domain else ("forget", "retain")
    for flag in ("model", "original", *data):
        if not getattr(options, flag) and not (candidates and flag == "model"):
            raise UserError(
                f"--{flag} is missing; give --model, --original, --forget and --retain (or a "
                "--domain), or the output folder of a removal"
            )
    domain = domain_data(options)
    if options.split and options.domain:
        raise UserError(
            f"--split is given beside --domain {options.domain}, which is cut by its seed alone; "
            "leave it out"
        )
    if options.split:
        domain["split"] = options.split
    elif _exposure_unknown(options):
        domain["exposure"] = "unknown"
    name = Path(options.model or options.original).name
    models = {called: options.model} if options.model else {}
    return EditedPair(name, models, options.original, domain)


def _exposure_unknown(options: PairOptions) -> bool:
    """Return whether nobody knows what the method saw: a deletion says that it saw everything."""
    if not options.domain:
        return options.claim != "deletion"
    cls = registry()["domain"].get(options.domain)
    field = cls.model_fields.get("exposure") if cls else None
    return "unknown" in get_args(field and field.annotation) and (
        getattr(cls, "claim", "") != "deletion"
    )


def _from_folder(options: PairOptions, check: bool) -> EditedPair:
    folder = Path(options.folder)
    record = load(folder)
    recipe = record.config
    if recipe.get("endpoint"):
        raise UserError(
            f"{folder} is an audit over an endpoint, which left no model here; give --endpoint, "
            "--model, --original and the data in place of the folder"
        )
    if "domain" not in recipe:
        raise UserError(
            f"{folder}/run.json does not say what was run; name a whole output folder of a run, "
            "as recipe.yaml and run.json lie in it"
        )
    if recipe.get("canary"):
        raise UserError(
            f"{folder} is a canary audit, whose models were taught made-up facts; name the output "
            "folder of the removal instead"
        )
    if recipe["domain"] is None:
        raise UserError(
            f"{folder} was made in Python with a Domain in memory, whose rows nothing can read "
            f"again; give --model {folder}/model, --original, --forget and --retain in place of "
            "the folder, or call excise.audit with the Domain"
        )
    refuse_unkept(folder, record)
    references = {model.name: model.path for model in record.models}
    oracles = {name: path for name, path in references.items() if role(name) == "oracle"}
    models = _edited_models(folder, record)
    by_name = {arm.name: arm.model for arm in record.method_runs}
    for name, path in models.items() if check else ():
        check_bytes(folder, by_name[name], path)
    spec = recipe.get("original") or recipe.get("model") or {}
    tokenizer = "" if options.original else str(spec.get("tokenizer") or "")
    for model in record.models if check else ():
        if model.name != "original":
            check_bytes(folder, model, model.path)
        elif not options.original:
            check_bytes(folder, model, model.path, tokenizer)
    domain = dict(recipe["domain"])
    if domain.get("name") == "files" and (folder / "split.json").is_file():
        domain["split"] = str(folder / "split.json")
    return EditedPair(
        folder.resolve().name,
        models,
        options.original or references.get("original", ""),
        domain,
        record.title,
        tuple(p for name, p in oracles.items() if not name.startswith(PROXY)),
        tuple(p for name, p in oracles.items() if name.startswith(PROXY)),
        recipe.get("evaluate") or {},
        tuple((recipe.get("audit") or {}).get("attacks") or ()),
        recipe.get("code") or {},
        tokenizer,
    )


def _edited_models(folder: Path, record: Record) -> dict[str, str]:
    """Return the edited models of an output folder by name; those of an audit lie elsewhere."""
    if record.kind in ("audit", "inspect"):
        return {arm.name: arm.model.path for arm in record.method_runs}
    several = len(record.method_runs) > 1
    return {
        arm.name: str(folder / "models" / arm.name if several else folder / "model")
        for arm in record.method_runs
    }


def refuse_unkept(folder: Path, record: Record) -> None:
    """Refuse an output folder of a run that left no model in it.

    Args:
        folder: The output folder.
        record: Its record.

    Raises:
        UserError: Saying how to get the model back.
    """
    keep = record.config.get("keep")
    if record.kind in ("run", "remove") and keep in NO_MODEL:
        delta = folder / ("delta" if len(record.method_runs) == 1 else "deltas/NAME")
        again = "run it again with --keep best, which finds its work done"
        raise UserError(
            f"{folder} was made with --keep {keep} and holds no model; {again}"
            + (f", or rebuild it: excise export {delta} --base MODEL --out DIR" * (keep == "delta"))
        )


def check_bytes(folder: Path, model: ModelRef, path: str, tokenizer: str = "") -> None:
    """Refuse a model whose bytes are no longer those that the record speaks of.

    Args:
        folder: The output folder.
        model: What its record says of the model.
        path: Where the model lies.
        tokenizer: Folder or hub id of its tokenizer, where that does not lie beside it.

    Raises:
        UserError: If weights, configuration or tokenizer were changed or are gone.
    """
    if not model.fingerprint:
        return
    if not (Path(path) / "config.json").is_file():
        raise UserError(
            f"'{model.name}' of {folder} is no longer in {path}; make it again as "
            f"{folder}/run.json says"
            + (", or name it with --original" if model.name == "original" else "")
        )
    there = Checkpoint(Path(path))
    if tokenizer:
        there = open_model(ModelSpec(path=path, tokenizer=tokenizer))
    for what, recorded, now in (
        ("weights", model.fingerprint, there.fingerprint),
        ("tokenizer", model.tokenizer, there.tokenizer_fingerprint),
    ):
        if recorded and recorded != now:
            raise UserError(
                f"{path} does not hold the {what} of '{model.name}' that {folder}/run.json "
                "records; make the model again with the command that it names, or audit the "
                "folder by itself with --model"
            )
