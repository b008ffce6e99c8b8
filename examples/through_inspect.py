"""Score an edited model with Inspect (inspect-ai), on prompts of one's own.

python examples/through_inspect.py OUT/model prompts.jsonl        # pip install inspect-ai

The file holds `prompt` and `completion`; a sample counts if the answer contains the completion.
On the command line: `inspect eval TASK.py --model hf/local -M model_path=OUT/model`. The model
needs a chat template, or is given one that only repeats the prompt, as here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

REPEAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def main(folder: str, prompts: str, logs: str = "logs") -> float:
    """Return the share of prompts that are answered."""
    rows = [json.loads(line) for line in Path(prompts).read_text("utf-8").splitlines()]
    samples = [Sample(input=row["prompt"], target=row["completion"].strip()) for row in rows]
    model = get_model(
        "hf/local",
        model_path=folder,
        device="cpu",
        chat_template=REPEAT,
        do_sample=False,
        config=GenerateConfig(max_tokens=8),
    )
    task = Task(dataset=samples, solver=generate(), scorer=includes())
    log = eval(task, model=model, log_dir=logs, display="none")[0]
    if log.results is None:
        raise SystemExit(f"Inspect could not score the model: {log.error and log.error.message}")
    return float(log.results.scores[0].metrics["accuracy"].value)


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2]))
