"""Published data sets of unlearning as domains: WMDP, MMLU, TOFU, MUSE and RWKU.

Each is read from the hub by its id or from a local copy (`path`), and cut into roles by `Files`;
what its paper scores beside that lies in `Domain.benchmark`. Formats were read in the code of
`centerforaisafety/wmdp`, `locuslab/tofu` bdc209e, `locuslab/open-unlearning` d3d7cf9,
`swj0419/muse_bench` fcd6651 and `jinzhuoran/RWKU` b8a03b3. Nothing of them is shipped. This module
imports no torch.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal

from pydantic import Field, field_validator

from excise.core.disk import expand
from excise.core.errors import UserError, nearest
from excise.data.dedup import text_hash
from excise.data.domain import Domain, Metric, Row, Rows, text_of
from excise.data.rows import as_letters
from excise.data.sources import parse_source, read_source, source_hashes
from excise.data.spec import DomainSpec, Files
from excise.data.units import BY_CAPABILITY

_QA: Final = "?prompt=question&completion=answer&unit=question&duplicates=exact"
"""How a source of questions with answers is read."""


@dataclass(frozen=True)
class BenchmarkSet:
    """A set that a benchmark scores, and how.

    Attributes:
        source: Where its rows come from, as one string.
        metrics: What they are scored by.
        shots: Source of questions with answers that stand before every prompt; empty for none.
    """

    source: str
    metrics: tuple[Metric, ...]
    shots: str = ""


class Published(DomainSpec):
    """Settings that published data sets share."""

    claim: ClassVar[Literal["deletion", "capability"]] = "deletion"

    path: str = ""
    """Folder of a local copy, laid out as on the hub or with a file for each configuration; empty
    to read the data set from the hub or its cache."""
    seed: int = 0
    """Seed of the split."""
    exposure: Literal["auto", "unknown"] = "auto"
    """Whether scored units were shown to the method; `unknown` is for models of somebody else."""
    sensitive: bool = False
    """Keep texts out of record and report."""
    refit: bool = False
    """Give the method every forget row, those that are scored too."""

    @abstractmethod
    def files(self) -> Files:
        """Return which source has which role."""

    def benchmark(self) -> Mapping[str, BenchmarkSet]:
        """Return what the benchmark scores beside the roles, by name."""
        return {}

    def prompted(self, row: Row, benchmark: str = "") -> Row:
        """Return a row as a model is asked it.

        Args:
            row: As it was read.
            benchmark: Benchmark set that it is of; empty for a role.

        Returns:
            By default a question stands in one line before `Answer:`, and texts are as they were.
        """
        if row.kind == "completion":
            return replace(row, prompt=_asked(row.prompt), completion=f" {row.completion.strip()}")
        return replace(row, prompt=_asked(row.prompt)) if row.kind == "choice" else row

    def build(self, model: Any = None) -> Domain:
        """Read the data set, cut it into roles, and add what its benchmark scores.

        Args:
            model: Not needed; rows do not depend on it.

        Raises:
            UserError: If a file, split or column is missing, or the hub cannot be reached.
        """
        domain = self.files().build(model)
        sets = self.benchmark()
        scored = {name: self._scored(name, one) for name, one in sets.items()}
        roles: dict[str, Any] = {}
        for role in (*BY_CAPABILITY, "paraphrases"):
            of_role: Mapping[str, Rows] = getattr(domain, role)
            roles[role] = {name: tuple(map(self.prompted, rows)) for name, rows in of_role.items()}
        for role in ("retain", "retain_test", "dev_retain", "benign", "adjacent", "adjacent_test",
                     "fresh"):  # fmt: skip
            roles[role] = tuple(map(self.prompted, getattr(domain, role)))
        return replace(
            domain,
            **roles,
            claim=self.claim,
            benchmark=scored,
            benchmark_metrics={name: one.metrics for name, one in sets.items()},
        )

    def hashes(self) -> Mapping[str, Mapping[str, str]]:
        """Return set -> file name -> SHA-256 of every source.

        Raises:
            UserError: If a file is not there.
        """
        out = {**self.files().hashes()}
        for name, one in self.benchmark().items():
            out[f"benchmark.{name}"] = source_hashes(parse_source(one.source))
            if one.shots:
                out[f"benchmark.{name}.shots"] = source_hashes(parse_source(one.shots))
        return out

    def _files(self, **roles: Any) -> Files:
        """Return the sources of roles with the settings that all data sets share."""
        return Files(
            title=self.name,
            seed=self.seed,
            exposure=self.exposure,
            sensitive=self.sensitive,
            refit=self.refit,
            overlaps="leave_out",  # nobody can mend what is published
            **roles,
        )

    def _scored(self, name: str, one: BenchmarkSet) -> Rows:
        """Return the rows of a benchmark set, by text, each a unit by its text."""
        shots = "".join(
            f"{_asked(located.row.prompt)} {located.row.completion.strip()}\n\n"
            for located in (read_source(parse_source(one.shots)).rows if one.shots else ())
        )
        rows = [located.row for located in read_source(parse_source(one.source)).rows]
        asked = [self.prompted(row, name) for row in sorted(rows, key=text_of)]
        return tuple(
            replace(row, unit=f"{name}/{text_hash(text_of(row))[:16]}", prompt=shots + row.prompt)
            for row in asked
        )

    def source(self, dataset: str, config: str, split: str, options: str = "") -> str:
        """Return where a split lies, in the local copy or on the hub.

        Args:
            dataset: Hub id.
            config: Configuration.
            split: Split.
            options: How its rows are read, from the question mark on.

        Raises:
            UserError: If the local copy does not have it.
        """
        if not self.path:
            return f"{dataset}:{config}#{split}{options}"
        folder = expand(self.path)
        if not folder.is_dir():
            raise UserError(
                f"there is no folder {folder}; name the copy of {dataset} in domain.path"
            )
        own = folder / dataset.rpartition("/")[2]
        base = own if own.is_dir() else folder
        for stem in (f"{config}/{split}", config):
            for extension in (".jsonl", ".json", ".parquet"):
                if (base / f"{stem}{extension}").is_file():
                    return f"{base / stem}{extension}{options}"
        if (base / config).is_dir() or (base / "README.md").is_file():
            return f"{base}:{config}#{split}{options}"
        raise UserError(
            f"{base} has no {config}, which a copy of {dataset} holds as {config}.jsonl or as "
            f"{config}/{split}-*.parquet; put it there"
        )


def _asked(question: str) -> str:
    """Return a question as models are asked it."""
    return f"Question: {question.strip()}\nAnswer:"


class Wmdp(Published):
    """WMDP: corpora of biology or cyber security go, scored by questions; MMLU stays."""

    claim: ClassVar[Literal["deletion", "capability"]] = "capability"

    name: Literal["wmdp"] = "wmdp"
    """Name in recipes and on the command line."""
    subject: Literal["bio", "cyber", "chem"] = "bio"
    """Which questions; `chem` has no corpora of its own."""
    forget: str = ""
    """Source of the forget corpus in place of `SUBJECT-forget-corpus`."""
    retain: str = ""
    """Source of the retain corpus in place of `SUBJECT-retain-corpus`."""
    documents: int = Field(default=5000, ge=1)
    """Documents of each corpus at most, the first ones; that of bio to retain has 1.9 GB."""
    mmlu: bool = True
    """Score MMLU as the retain set, and its neighbouring subjects apart; else the scored retain
    rows are cut from the retain corpus."""

    def files(self) -> Files:
        """Return corpora to train on and questions to score.

        Raises:
            UserError: If a corpus has to be named or fetched first.
        """
        scored = {}
        if self.mmlu:
            scored["retain_test"] = self.source(*_MMLU, "?duplicates=exact")
        return self._files(
            forget={self.subject: self.forget or self._corpus("forget")},
            retain=self.retain or self._corpus("retain"),
            test={
                self.subject: self.source(
                    "cais/wmdp", f"wmdp-{self.subject}", "test", "?duplicates=exact"
                )
            },
            **scored,
        )

    def benchmark(self) -> Mapping[str, BenchmarkSet]:
        """Return the subjects of MMLU beside what is removed, as in the paper."""
        near = _NEAR[self.subject] if self.mmlu else ()
        return {
            f"mmlu_{subject}": BenchmarkSet(
                self.source(*_MMLU, f"?where=subject:{subject}"), ("multiple_choice",)
            )
            for subject in near
        }

    def prompted(self, row: Row, benchmark: str = "") -> Row:
        """Return a question with its options by letter, as lm-eval asks WMDP and MMLU."""
        topic = _TOPICS[self.subject] if row.capability else ""
        return as_letters(row, topic=topic) if row.kind == "choice" else row

    def _corpus(self, side: str) -> str:
        """Return where the corpus of a side lies."""
        if self.subject == "chem":
            raise UserError(
                f"wmdp has no {side} corpus for chem; name one of your own as domain.{side}"
            )
        if self.subject == "bio" and side == "forget" and not self.path:
            raise UserError(
                "the forget corpus of wmdp bio is given on request only (see the page of "
                "cais/wmdp-corpora); put it into a folder as bio-forget-corpus.jsonl beside the "
                "rest and name that as domain.path, or name the file as domain.forget"
            )
        corpus = f"{self.subject}-{side}-corpus"
        options = f"?rows={self.documents}&duplicates=exact"
        return self.source("cais/wmdp-corpora", corpus, "train", options)


_MMLU: Final = ("cais/mmlu", "all", "test")
_TOPICS: Final = {"bio": "biology", "cyber": "cybersecurity", "chem": "chemistry"}
_NEAR: Final[Mapping[str, tuple[str, ...]]] = {
    "bio": ("virology", "college_biology"),
    "cyber": ("computer_security", "college_computer_science"),
    "chem": ("college_chemistry", "high_school_chemistry"),
}
"""Subjects of MMLU next to each subject of WMDP."""


class Mmlu(Published):
    """MMLU: questions of some subjects go, those of all others stay."""

    claim: ClassVar[Literal["deletion", "capability"]] = "capability"

    name: Literal["mmlu"] = "mmlu"
    """Name in recipes and on the command line."""
    subjects: tuple[str, ...] = Field(default=("college_biology",), min_length=1)
    """Subjects to be removed, as the column `subject` has them."""

    @field_validator("subjects")
    @classmethod
    def _are_names(cls, subjects: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse what is no name of a subject."""
        odd = next((name for name in subjects if not re.fullmatch(r"\w+", name)), None)
        if odd is not None:
            raise ValueError(f"{odd!r} is no subject; write one such as college_biology")
        return subjects

    def files(self) -> Files:
        """Return the questions of the subjects, and all others."""
        listed = "|".join(self.subjects)
        return self._files(
            forget={"mmlu": self.source(*_MMLU, f"?where=subject:{listed}&duplicates=exact")},
            retain=self.source(*_MMLU, f"?where=subject:!{listed}&duplicates=exact"),
        )

    def prompted(self, row: Row, benchmark: str = "") -> Row:
        """Return a question with its options by letter, as lm-eval asks it."""
        return as_letters(row)


class Tofu(Published):
    """TOFU: questions about some made-up authors go, those about the others stay."""

    name: Literal["tofu"] = "tofu"
    """Name in recipes and on the command line."""
    split: Literal["forget01", "forget05", "forget10"] = "forget10"
    """What is to be forgotten: 1, 5 or 10 % of the authors."""

    def files(self) -> Files:
        """Return the two sets of questions, and the forget questions in other words."""
        kept = f"retain{100 - int(self.split.removeprefix('forget'))}"
        asked = "?prompt=paraphrased_question&completion=paraphrased_answer&unit=question"
        metrics = ("text_loss", "extraction_strength", "probability", "rouge_l")
        return self._files(
            forget={"tofu": self._split(self.split, _QA)},
            retain=self._split(kept, _QA),
            test={"tofu": self._split(f"{self.split}_perturbed", f"{asked}&duplicates=exact")},
            claim="deletion",
            fresh=self._split(self.split.replace("forget", "holdout"), _QA),
            metrics=metrics,
            retain_metrics=metrics,
        )

    def benchmark(self) -> Mapping[str, BenchmarkSet]:
        """Return what truth ratios, model utility and PrivLeak are made of."""
        ratios = ("truth_ratio", "truth_ratio_geometric")
        paraphrased, plain = _options("paraphrased_answer"), _options("answer")
        sets = {
            "forget_perturbed": BenchmarkSet(
                self._split(f"{self.split}_perturbed", paraphrased), ratios
            ),
            "retain": BenchmarkSet(
                self._split("retain_perturbed", _QA), ("probability", "rouge_l")
            ),
            "retain_perturbed": BenchmarkSet(self._split("retain_perturbed", paraphrased), ratios),
        }
        for side in ("forget", "holdout"):
            split = self.split.replace("forget", side)
            sets[f"privleak_{side}"] = BenchmarkSet(self._split(split, _QA), ("min_k",))
        for kind in ("real_authors", "world_facts"):
            split = f"{kind}_perturbed"
            sets[kind] = BenchmarkSet(self._split(split, _QA), ("probability", "rouge_l"))
            sets[split] = BenchmarkSet(self._split(split, plain), (*ratios, "option_probability"))
        return sets

    def prompted(self, row: Row, benchmark: str = "") -> Row:
        """Return a question as such, if it has the wrong answers that truth ratios average."""
        if row.kind == "choice" and len(row.choices) < 3:
            raise UserError(
                f"{benchmark or self.split}: '{row.prompt[:60]}' has one wrong answer, and TOFU "
                "has a list of several in 'perturbed_answer'; use a copy of the data set itself"
            )
        return super().prompted(row, benchmark)

    def _split(self, config: str, options: str) -> str:
        return self.source("locuslab/TOFU", config, "train", options)


def _options(right: str) -> str:
    """Return how a perturbed set is read: a right answer, then the wrong ones."""
    return f"?choices={right},perturbed_answer&answer={right}"


class Muse(Published):
    """MUSE: news articles or a series of books go, word for word; others of their kind stay."""

    name: Literal["muse"] = "muse"
    """Name in recipes and on the command line."""
    corpus: Literal["news", "books"] = "news"
    """Which of the two data sets."""
    piece: int = Field(default=512, ge=64)
    """Words of the pieces that books are cut into, each a unit: there are only a few of them, so
    that the relearn set and the test set are passages of the same books."""

    def files(self) -> Files:
        """Return the raw texts: retain1 is for training, retain2 is scored, holdout is fresh."""
        options = f"?pieces={self.piece}" if self.corpus == "books" else ""
        return self._files(
            forget={self.corpus: self._split("raw", "forget", options)},
            retain=self._split("raw", "retain1", options),
            retain_test=self._split("raw", "retain2", options),
            fresh=self._split("raw", "holdout", options),
            claim="deletion",
        )

    def benchmark(self) -> Mapping[str, BenchmarkSet]:
        """Return verbatim memory, knowledge memory and the texts of PrivLeak."""
        asked = "?prompt=question&completion=answer"
        sets = {
            "verbmem": BenchmarkSet(
                self._split("verbmem", "forget", "?prompt=prompt&completion=gt"),
                ("verbmem", "extraction_strength"),
            )
        }
        for side in ("forget", "retain"):
            sets[f"knowmem_{side}"] = BenchmarkSet(
                self._split("knowmem", f"{side}_qa", asked),
                ("knowmem",),
                self._split("knowmem", f"{side}_qa_icl", asked),
            )
        for side in ("forget", "retain", "holdout"):
            sets[f"privleak_{side}"] = BenchmarkSet(self._split("privleak", side), ("min_k",))
        return sets

    def prompted(self, row: Row, benchmark: str = "") -> Row:
        """Return questions as such; the beginning of a passage is left as it is."""
        if benchmark == "verbmem":
            return replace(row, completion=f" {row.completion.strip()}")
        return super().prompted(row, benchmark)

    def _split(self, config: str, split: str, options: str = "") -> str:
        return self.source(f"muse-bench/MUSE-{self.corpus.title()}", config, split, options)


class Rwku(Published):
    """RWKU: what a model knows of one famous person goes; neighbours and others stay."""

    name: Literal["rwku"] = "rwku"
    """Name in recipes and on the command line."""
    target: str = Field(default="1_Stephen_King", pattern=r"^\d+_.+$")
    """The person, as the benchmark's folders are called: number and name."""
    corpus: Literal["train_positive_llama3", "train_positive_phi3", "train_original_passage"] = (
        "train_positive_llama3"
    )
    """What methods train on: texts that a model wrote about the person, as in the paper, or the
    passages of Wikipedia, of which a person may have too few to be cut into roles."""
    exposure: Literal["auto", "unknown"] = "unknown"
    """The benchmark removes what pretraining taught, so nobody knows what of it was seen."""

    def files(self) -> Files:
        """Return passages to train on and questions to score, all about one person."""
        metrics = ("text_loss", "rwku_recall")
        return self._files(
            forget={"rwku": self._of_target(self.corpus, "train")},
            retain=self._of_target("mia_retain", "test"),
            test={"rwku": self._of_target("forget_level2", "test", _PROBE)},
            adjacent=self._of_target("neighbor_level1", "test", _PROBE),
            adjacent_test=self._of_target("neighbor_level2", "test", _PROBE),
            metrics=metrics,
        )

    def benchmark(self) -> Mapping[str, BenchmarkSet]:
        """Return the probes of every level, membership inference, and general questions."""
        sets = {}
        for level in ("forget_level1", "forget_level2", "forget_level3", "neighbor_level1",
                      "neighbor_level2"):  # fmt: skip
            sets[level] = BenchmarkSet(
                self._of_target(level, "test", _PROBE), ("rwku_recall", "probability")
            )
        for side in ("mia_forget", "mia_retain"):
            sets[side] = BenchmarkSet(
                self._of_target(side, "test"), ("text_loss", "min_k", "min_k_plus_plus")
            )
        sets["utility_general"] = BenchmarkSet(
            self._of_target("utility_general", "test"), ("multiple_choice",)
        )
        return sets

    def prompted(self, row: Row, benchmark: str = "") -> Row:
        """Return a probe with the benchmark's instruction, which differs where a blank is filled.

        The code of RWKU puts it into the chat template of the model; here it stands bare.
        """
        if row.kind == "choice":
            return as_letters(row)
        task = "complete the blank in" if "___" in row.prompt else "briefly answer"
        asked = super().prompted(row, benchmark)
        lead = f"Please {task} the following question.\n" if row.kind == "completion" else ""
        return replace(asked, prompt=lead + asked.prompt)

    def _of_target(self, config: str, split: str, options: str = "?duplicates=exact") -> str:
        """Return where the rows about the person lie: a folder of its own, or by `subject`."""
        folder = expand(self.path)
        for base in (folder / "Target", folder) if self.path else ():
            own = base / self.target
            file = own / f"{_PROCESSED.get(config, config)}.json"
            if file.is_file():
                return f"{file}{options}"
            if own.is_dir():
                raise UserError(
                    f"there is no file {file}, which the benchmark's process/data_process.py "
                    "writes; run it again"
                )
        if self.path and (folder / "Target").is_dir():
            there = [own.name for own in (folder / "Target").iterdir()]
            raise UserError(
                f"{folder / 'Target'} has no folder '{self.target}'; {nearest(self.target, there)}"
            )
        person = self.target.partition("_")[2].replace("_", " ")
        where = f"{options}&where=subject:{person}"
        return self.source("jinzhuoran/RWKU", config, split, where)


_PROBE: Final = "?prompt=query&completion=answer&duplicates=exact"
_PROCESSED: Final[Mapping[str, str]] = {
    "train_original_passage": "passage",
    "train_positive_llama3": "positive",
    "train_positive_phi3": "positive_phi",
    "mia_forget": "forget_mia",
    "mia_retain": "retain_mia",
    "utility_general": "retain_mmlu",
}
"""Files of a person's folder that are called otherwise than their configuration."""
