"Continues a sequence with ONNX Runtime and NumPy alone: python generate.py [options] -- SYMBOL SYMBOL ..."
import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("symbols", nargs="*", help="the beginning; may be empty")
parser.add_argument("--file", default="fast.onnx", choices=["fast.onnx", "fast_fp16.onnx", "fast_int8.onnx"])
parser.add_argument("--temperature", type=float, default=1.0, help="0: always the most probable symbol")
parser.add_argument("--top_p", type=float, default=1.0, help="choose among the most probable that add up to p")
parser.add_argument("--seed", type=int, help="0 or more")
args, here = parser.parse_args(), Path(__file__).parent
vocab, config, special = (json.loads((here/f"{name}.json").read_text("utf-8")) for name in ("vocab", "config", "special_tokens_map"))
pad, bos, eos, unk = (vocab[special[f"{role}_token"]] for role in ("pad", "bos", "eos", "unk"))
if wrong := [s for s in args.symbols if vocab.get(s, pad) in (pad, bos, eos)]: parser.error(f"{wrong[0]!r} is not in vocab.json, or cannot be continued")
if len(args.symbols) + 1 >= config["n_positions"]: parser.error("there is no room to continue so many symbols")
if not (0 <= args.temperature < np.inf and 0 < args.top_p <= 1 and (args.seed or 0) >= 0): parser.error("temperature and seed must be 0 or more, top_p more than 0 and at most 1")
symbol_of, rng, most = {i: s for s, i in vocab.items()}, np.random.default_rng(args.seed), config["n_positions"]
session = onnxruntime.InferenceSession(here/args.file)
binding = session.io_binding()
for t in session.get_inputs():
    if t.name.startswith("past"): # the same memory goes in and comes out: keys and values stay in place
        kept = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, t.shape[1], most, t.shape[3]), np.float32))
        binding.bind_ortvalue_input(t.name, kept)
        binding.bind_ortvalue_output(t.name.replace("past_key_values", "present"), kept)
ids, done = [bos, *(vocab[s] for s in args.symbols)], 0
while len(ids) < most and ids[-1] != eos:
    for name, values in {"input_ids": ids[done:], "attention_mask": [1]*len(ids), "position_ids": range(done, len(ids))}.items(): binding.bind_cpu_input(name, np.array([values], np.int64))
    binding.bind_output("logits") # the last of the outputs
    session.run_with_iobinding(binding)
    done, score = len(ids), binding.get_outputs()[-1].numpy()[0, -1].astype(np.float64)
    score[[pad, bos, unk]] = -np.inf
    p = np.exp((score - score.max())/(args.temperature or 1))
    order = np.argsort(-p)
    order = order[:1] if args.temperature == 0 else order[p[order].cumsum() - p[order] < args.top_p*p.sum()]
    ids.append(int(rng.choice(order, p=p[order]/p[order].sum())))
print(*(symbol_of[i] for i in ids[1:] if i != eos))
