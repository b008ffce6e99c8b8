"""Methods on texts whose parts have labels, in steps enough to see that they run."""

from __future__ import annotations

from pathlib import Path

import pytest

from excise.cli import main
from excise.core.context import Context
from excise.core.stages import Runtime
from excise.domains.definitions import Definitions
from excise.domains.facts import Facts
from excise.methods import SGTM, Filtering, GradDiff, Propagate, Relabel, TokenFilter
from excise.methods.base import Method
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.spec import Scratch
from excise.run.stages import MakeModel
from excise.train.fit import FitConfig

FIT = FitConfig(steps=3, lr=1e-3, batch_size=8)
TEXTS = Pretrain(fit=FIT, max_length=64)
SPECS = {
    "facts": Facts(subjects=40, relations=2, objects=8, facts_per_text=4),
    "definitions": Definitions(documents=60, prose=50, vocabulary=400, prose_around=12),
}
METHODS: dict[str, Method] = {
    "sgtm": SGTM(pretrain=TEXTS),
    "token_filter": TokenFilter(pretrain=TEXTS),
    "filtering": Filtering(pretrain=TEXTS),
    "oracle": Filtering(pretrain=TEXTS, drop="spans"),
    "propagate": Propagate(pretrain=TEXTS),
    "relabel": Relabel(pretrain=TEXTS, warm_share=0.3),
    "grad_diff": GradDiff(fit=FIT, max_length=64),
}


@pytest.mark.parametrize("domain", SPECS)
@pytest.mark.parametrize("method", METHODS)
def test_methods_run_on_texts_with_labelled_parts(domain: str, method: str, tmp_path: Path) -> None:
    spec = SPECS[domain]
    runtime = Runtime(tmp_path / "stages")
    start = runtime.run(MakeModel(Scratch(width=16, blocks=1), spec.tokenizer(), 0))
    ctx = Context(tmp_path / "work", stages=runtime.run)
    removal = METHODS[method].apply(start, spec.build(None), ctx)
    assert removal.checkpoint.fingerprint != start.fingerprint
    facts = removal.extras
    if method in ("filtering", "oracle", "propagate", "relabel"):
        assert facts["forget_rows_left"] == 0
        assert (facts["rows_dropped"] > 0) == (method != "oracle")
        assert (facts["core_words_lost"] > 0) == (method != "oracle")


def test_check_shows_a_text_and_refuses_to_cut_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["check", "era-facts", "--domain.facts_per_text", "4", "--domain.subjects", "40"]
    assert main(line) != 0
    assert "set 'pretrain.max_length' to 4 times" in capsys.readouterr().err
    assert main([*line, "--pretrain.max_length", "64"]) == 0
    shown = capsys.readouterr().out
    assert "texts that models from scratch read" in shown
    assert "tokens, 4 scored" in shown
    assert "alpha  1  '" in shown
