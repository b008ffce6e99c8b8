"""`excise card OUT --audit DIR`: the cards beside the weights, anew from the records."""

from __future__ import annotations

from pathlib import Path

from excise.cli.options import CardOptions
from excise.cli.pair import check_bytes, refuse_unkept
from excise.core.errors import UserError
from excise.record import MethodRun, ModelRef, Record, load
from excise.run import output


def main(options: CardOptions) -> int:
    """Write the cards of an output folder and print where they lie.

    Raises:
        UserError: If the folder holds no removal, a model's bytes are not those that the record
            speaks of, or the audit attacked none of them.
    """
    out = options.folder
    record = load(out)
    if record.kind not in ("run", "remove") or not record.method_runs:
        raise UserError(
            f"{out} holds no removal (its record is of kind '{record.kind}'); name the output "
            "folder of run or remove, whose models get the cards"
        )
    refuse_unkept(out, record)
    audit = load(options.audit) if options.audit else None
    models = [(run, model) for run in record.method_runs for model in (run.model, run.refit)]
    cards = {}
    for run, model in models:
        if model is None:
            continue
        check_bytes(out, model, str(out / model.path))
        if audit is None:
            cards[out / model.path] = record, run.name, model is run.refit
        elif attacked := _attacked(audit, model):
            cards[out / model.path] = (
                with_audit(record, run, model, audit, attacked),
                run.name,
                False,
            )
    if audit is not None and not cards:
        raise UserError(
            f"{options.audit} attacked other bytes than those of the models in {out}; audit "
            f"them first: excise audit {out}"
        )
    upstream = next((Path(m.path) for m in record.models if m.name == "original"), Path())
    with output.hold(out):
        for folder, (said, name, refit) in cards.items():
            print(f"wrote {output.write_card(folder, said, name, upstream, refit=refit)}")
    return 0


def _attacked(audit: Record, model: ModelRef) -> str:
    """Return what an audit calls a model of these very bytes; empty where it attacked none."""
    verdicts = {verdict.model for verdict in audit.verdicts}
    return next(
        (
            run.name
            for run in audit.method_runs
            if run.name in verdicts
            and run.model.fingerprint == model.fingerprint
            and run.model.tokenizer == model.tokenizer
        ),
        "",
    )


def with_audit(
    record: Record, run: MethodRun, model: ModelRef, audit: Record, attacked: str
) -> Record:
    """Return the record of a removal with what an audit found out about one of its models.

    Args:
        record: The removal.
        run: Which of its method runs.
        model: The model that was attacked: that of the run, or its refit.
        audit: The audit.
        attacked: What the audit calls the model.
    """
    others = {each.name for each in audit.method_runs} - {attacked}
    name = {"model": run.name}
    notes = (*record.notes, *audit.notes)
    if audit.data.get("fingerprint") != record.data.get("fingerprint"):
        notes += ("The audit was made with other rows than the removal's split.",)
    return record.model_copy(
        update={
            "models": audit.models,
            "method_runs": (run.model_copy(update={"model": model, "refit": None}),),
            "scores": tuple(
                score.model_copy(update=name) if score.model == attacked else score
                for score in audit.scores
                if score.model not in others
            ),
            "attacks": tuple(
                attack.model_copy(update={"subject": run.name})
                if attack.subject == attacked
                else attack
                for attack in audit.attacks
                if attack.subject not in others
            ),
            "verdicts": tuple(
                verdict.model_copy(update=name)
                for verdict in audit.verdicts
                if verdict.model == attacked
            ),
            "command": "\n".join(line for line in (record.command, audit.command) if line),
            "notes": notes,
        }
    )
