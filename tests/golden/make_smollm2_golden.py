"""Write smollm2.npz: what transformers makes of SmolLM2-135M-Instruct's dequantised weights.

Run with a Python that has torch and transformers, after
`jaxherd convert smollm2-135m-instruct FOLDER`:

    python tests/golden/make_smollm2_golden.py FOLDER
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

PROMPT = "The capital of France is"
NEW = 64


def main(folder: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    # Greedy to the end: nothing stops and no stop token is forbidden.
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        logits = model(prompt).logits[0].numpy()
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=NEW,
        )
    last = np.argsort(-logits[-1])[:16]
    ids = np.unique(np.concatenate([last, np.arange(0, logits.shape[1], 3001)]))
    np.savez(
        pathlib.Path(__file__).with_name("smollm2.npz"),
        prompt=prompt[0].numpy().astype(np.int32),
        ids=ids.astype(np.int32),
        logits=logits[:, ids].astype(np.float32),
        tokens=tokens[0, prompt.shape[1] :].numpy().astype(np.int32),
    )


if __name__ == "__main__":
    main(sys.argv[1])
