"Tokens generated in a second: seqgpt, on PyTorch and on ONNX Runtime, and `generate` of Transformers."
import copy
import importlib.util
from functools import partial

import numpy as np
import torch
from common import (
    ASKING,
    DTYPES,
    SYMBOLS,
    Setup,
    device,
    make_parser,
    make_setup,
    precisions,
    print_left_out,
    print_table,
    rate,
    save,
    speed,
    take_turns,
)
from tqdm import tqdm
from transformers import GPT2LMHeadModel

from seqgpt.inference import generate

BATCH_SIZES = (1, 8, 32) # sequences at once


def endless_model(
    setup: Setup, # With a corpus
) -> GPT2LMHeadModel:
    "A model that, choosing the most probable symbol, never ends a sequence."
    model = setup.model().eval()
    with torch.no_grad():
        for p in model.parameters(): p *= 2
        model.transformer.wte.weight[setup.tokenizer().all_special_ids] = 0
    return model


def has_onnx() -> bool:
    "Whether models can be written and run."
    return all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnxscript"))


def on_onnx_runtime(
    model, # Of PyTorch
    folder: str, # To write to
) -> dict: # Name to `OnnxModel`, in 32 and in 8 bits
    "The same model on ONNX Runtime, with its cache in place."
    from seqgpt.export import quantize_int8, to_onnx
    from seqgpt.onnx_models import OnnxModel  # needs the extra [onnx]
    model.config.save_pretrained(folder)
    to_onnx(copy.deepcopy(model).cpu(), f"{folder}/fp32.onnx", "in place")
    quantize_int8(f"{folder}/fp32.onnx", f"{folder}/int8.onnx")
    return {f"seqgpt, ONNX, {p}": OnnxModel(f"{folder}/{p}.onnx") for p in ("fp32", "int8")}


def make_calls(
    models: dict, # Name to model
    tokenizer,
    n: int, # Sequences at once
    new: int, # Tokens to generate in each
) -> dict: # Name and `n` to a function that gives the new ids, a list for each sequence
    "What is measured."
    ids = torch.tensor([[tokenizer.bos_token_id, 4 + k] for k in range(n)], device=device())

    def by_transformers(model):
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, 2:].tolist()

    def by_seqgpt(model):
        prefixes = [[symbol] for symbol in SYMBOLS[:n]]
        written = generate(model, tokenizer, prefixes, max_new_tokens=new, temperature=0, batch_size=n)
        return [tokenizer.convert_tokens_to_ids(s.tokens[s.given:]) for s in written]

    return {(name, n): partial(by_transformers if name.startswith("Transformers") else by_seqgpt, model)
            for name, model in models.items()}


def bench_generation(
    setup: Setup, # With a corpus
    rounds: int, # How often each has its turn
    batch_sizes: tuple[int, ...] = BATCH_SIZES, # Sequences at once
) -> dict: # `rows`, one for each contender and number of sequences; `left_out`, name to reason
    "Measures them; raises `RuntimeError` if one of them ends a sequence early."
    new = setup.length - 2
    left_out = {}
    calls = {}
    rows = []
    model = endless_model(setup).to(device())
    models = {f"{who}, {p}": copy.deepcopy(model).to(DTYPES[p])
              for p in precisions() for who in ("Transformers", "seqgpt")}
    if has_onnx(): models |= on_onnx_runtime(model, f"{setup.folder}/onnx")
    else: left_out["ONNX Runtime"] = "not installed: pip install 'seqgpt[onnx]'"
    for n in batch_sizes: calls |= make_calls(models, setup.tokenizer(), n, new)
    written = {key: call() for key, call in tqdm(calls.items(), desc="Generation, warm-up", leave=False)}
    if {len(ids) for sequences in written.values() for ids in sequences} != {new}:
        raise RuntimeError("A sequence ended early, so the speeds cannot be compared.")
    seconds = take_turns(calls, rounds, title="Generation")
    first = next(iter(models))
    for (name, n), s in seconds.items():
        same = np.mean(np.array(written[name, n]) == written[first, n])
        rows.append({"name": name, "sequences": n, "tokens_per_second": rate(s, n*new),
                     "ratio": float(np.median(seconds[first, n])/np.median(s)), "same_tokens": float(same),
                     "seconds": s})
    return {"rows": rows, "left_out": left_out}


def show_generation(found: dict):
    "Prints it as a table."
    rows = [[row["name"], row["sequences"], *speed(row["tokens_per_second"]), f"{row['ratio']:.2f}",
             f"{row['same_tokens']:.1%}"] for row in found["rows"]]
    print_table(["generation", "sequences", "tokens/s", "quartiles", "times", "same tokens"], rows)
    print_left_out(found)


def main(argv: list[str] | None = None):
    args = make_parser(__file__, __doc__, *ASKING).parse_args(argv)
    with make_setup(args) as setup: found = bench_generation(setup, args.rounds)
    show_generation(found)
    save(args, found)


if __name__ == "__main__": main()
