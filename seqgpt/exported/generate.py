"Continues a sequence with ONNX Runtime and NumPy alone: python generate.py [options] -- SYMBOL SYMBOL ..."
import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime

FOLDER = Path(__file__).parent


def read_json(name):
    return json.loads((FOLDER/name).read_text("utf-8"))


def bind_cache(session, max_length):
    "Room for keys and values; the same memory goes in and comes out, so they stay in place."
    binding = session.io_binding()
    for past in session.get_inputs():
        if not past.name.startswith("past_key_values"): continue
        _, heads, _, head_size = past.shape
        zeros = np.zeros((1, heads, max_length, head_size), np.float32)
        kv_cache = onnxruntime.OrtValue.ortvalue_from_numpy(zeros)
        binding.bind_ortvalue_input(past.name, kv_cache)
        binding.bind_ortvalue_output(past.name.replace("past_key_values", "present"), kv_cache)
    return binding


def next_logits(session, binding, ids, seq_len):
    "The logits after `ids`, of which the cache holds the first `seq_len`: only the new ones go in."
    inputs = {
        "input_ids": ids[seq_len:],
        "attention_mask": [1]*len(ids),
        "position_ids": range(seq_len, len(ids)),
    }
    for name, values in inputs.items():
        binding.bind_cpu_input(name, np.array([values], np.int64))
    binding.bind_output("logits") # the last of the outputs
    session.run_with_iobinding(binding)
    return binding.get_outputs()[-1].numpy()[0, -1].astype(np.float64)


def sample(logits, temperature, top_p, rng):
    "An id, drawn from the most probable ones that add up to `top_p`."
    if temperature == 0: return int(logits.argmax())
    p = np.exp((logits - logits.max())/temperature)
    order = np.argsort(-p)
    before = p[order].cumsum() - p[order] # what the more probable ones add up to
    order = order[before < top_p*p.sum()]
    return int(rng.choice(order, p=p[order]/p[order].sum()))


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("symbols", nargs="*", help="the beginning; may be empty")
files = ["fast.onnx", "fast_fp16.onnx", "fast_int8.onnx"]
parser.add_argument("--file", default="fast.onnx", choices=files)
parser.add_argument("--temperature", type=float, default=1.0, help="0: always the most probable symbol")
parser.add_argument("--top_p", type=float, default=1.0, help="choose among the most probable that add up to p")
parser.add_argument("--seed", type=int, help="0 or more")
args = parser.parse_args()

vocab = read_json("vocab.json")
special_tokens = read_json("special_tokens_map.json")
max_length = read_json("config.json")["n_positions"]
pad, bos, eos, unk = (vocab[special_tokens[f"{role}_token"]] for role in ("pad", "bos", "eos", "unk"))

wrong = [s for s in args.symbols if vocab.get(s, pad) in (pad, bos, eos)]
if wrong: parser.error(f"{wrong[0]!r} is not in vocab.json, or cannot be continued")
if len(args.symbols) + 1 >= max_length: parser.error("there is no room to continue so many symbols")
in_range = 0 <= args.temperature < np.inf and 0 < args.top_p <= 1 and (args.seed or 0) >= 0
if not in_range: parser.error("temperature and seed must be 0 or more, top_p more than 0 and at most 1")

session = onnxruntime.InferenceSession(FOLDER/args.file)
binding = bind_cache(session, max_length)
rng = np.random.default_rng(args.seed)
ids = [bos, *(vocab[s] for s in args.symbols)]
seq_len = 0
while len(ids) < max_length and ids[-1] != eos:
    logits = next_logits(session, binding, ids, seq_len)
    seq_len = len(ids)
    logits[[pad, bos, unk]] = -np.inf # never sampled
    ids.append(sample(logits, args.temperature, args.top_p, rng))

symbol_of = {i: s for s, i in vocab.items()}
print(*(symbol_of[i] for i in ids[1:] if i != eos))
