"""The examples that hand a model to lm-eval and to Inspect, run with the released packages.

`make peers-test` installs both beside the environment. The model knows the answers, so both must
give full marks to what it was taught and not to answers that are wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fixtures.facts import FORGET, rows_of

ROOT = Path(__file__).parents[1]


def score(name: str, *arguments: Path) -> float:
    """Run one script of examples/ as its docstring says; return the number it prints last."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=arguments[-1].parent,
        env=environment,
    )  # fmt: skip
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Ask both about answers that are right, and about answers that are wrong."""
    model = ROOT / "tests" / "fixtures" / "knowing"
    rows = rows_of(FORGET, "tests", (0,))[:24]
    answers = sorted({row.completion for row in rows})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for right in (True, False):
            questions, prompts = [], []
            for row in rows:
                other = answers[(answers.index(row.completion) + 1) % len(answers)]
                answer = 0 if right else 1
                choices = [row.completion.strip(), other.strip()]
                questions.append({"question": row.prompt, "choices": choices, "answer": answer})
                prompts.append({"prompt": row.prompt, "completion": choices[answer]})
            for file, lines in (("questions", questions), ("prompts", prompts)):
                text = "\n".join(json.dumps(line) for line in lines)
                (folder / f"{file}.jsonl").write_text(text, encoding="utf-8")
            got = {
                "through_lm_eval": score("through_lm_eval", model, folder / "questions.jsonl"),
                "through_inspect": score("through_inspect", model, folder / "prompts.jsonl"),
            }
            print("right answers" if right else "wrong answers", got)
            assert all(value > 0.9 if right else value < 0.1 for value in got.values()), got


if __name__ == "__main__":
    main()
