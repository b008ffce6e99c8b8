"""Score an edited model with `lm-eval`, on questions of one's own.

python examples/through_lm_eval.py OUT/model questions.jsonl      # pip install 'excise[lm-eval]'

The file holds `question`, `choices` and `answer` (an index), as `--test` reads them. For tasks
that lm-eval ships, name them: `lm_eval --model hf --model_args pretrained=OUT/model --tasks mmlu`,
or let `excise run` do it (`--evaluate.lm_eval '[mmlu]'`).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

TASK = """
task: questions
dataset_path: json
dataset_kwargs: {data_files: {test: "FILE"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


def main(folder: str, questions: str) -> float:
    """Return the accuracy."""
    with tempfile.TemporaryDirectory() as tasks:
        text = TASK.replace("FILE", str(Path(questions).resolve()))
        (Path(tasks) / "questions.yaml").write_text(text, encoding="utf-8")
        results: Any = simple_evaluate(
            model="hf",
            model_args={"pretrained": folder, "device": "cpu", "dtype": "float32"},
            tasks=["questions"],
            task_manager=TaskManager(include_path=tasks, include_defaults=False),
        )
    return float(results["results"]["questions"]["acc,none"])


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2]))
