"""Use an edited model with plain `transformers`: it is an ordinary folder.

python examples/edited_model.py OUT/model "The prompt"

Nothing of excise is imported; `trust_remote_code` is not needed.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, prompt: str, new_tokens: int = 20) -> str:
    """Return the greedy continuation of a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        ids_BT = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(ids_BT[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2]))
