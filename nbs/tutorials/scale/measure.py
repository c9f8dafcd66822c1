"""Training measured on one GPU, for the page `on_paper`: python measure.py on_paper_gpu.json

Three models of about 10 M, 100 M and 1 B parameters, in batches of 1, 4, 16 and 64 sequences of 1,024 tokens,
as far as they fit: tokens a second and peak memory, in bf16 by autocast, with AdamW. A JSON line each, on standard
output and in the file; under two minutes on an H100. Needs torch (2.1 or later) and transformers, nothing else,
and no network. `--tiny` tries it on small models, also without a GPU.
"""
import argparse
import json
import logging
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

VOCAB, LENGTH = 32768, 1024
SHAPES = {"10 M": dict(n_layer=8, n_head=3, n_embd=192),
          "100 M": dict(n_layer=16, n_head=10, n_embd=640),
          "1 B": dict(n_layer=24, n_head=14, n_embd=1792)}
# what make_config of seqgpt sets; the default is a GELU in many small operations, and dropout in attention
LIKE_SEQGPT = dict(attn_pdrop=0.0, activation_function="gelu_pytorch_tanh")
TINY = {"tiny": dict(n_layer=2, n_head=2, n_embd=32), "small": dict(n_layer=4, n_head=2, n_embd=64)}
BATCHES = 1, 4, 16, 64
WARM_UP = 3
STEPS = 20
SECONDS = 4 # no measurement takes much longer


def synchronize(device):
    if device == "cuda": torch.cuda.synchronize()


def build(shape, vocab=VOCAB, length=LENGTH, **fields):
    "A GPT-2 with random weights, as seqgpt makes it."
    config = GPT2Config(vocab_size=vocab, n_positions=length, bos_token_id=1, eos_token_id=2, use_cache=False,
                        **{**LIKE_SEQGPT, **shape, **fields})
    return GPT2LMHeadModel(config)


def measure(model, batch, vocab, length, device):
    "Steps of training on random tokens: how many, the seconds of each, the peak of memory in bytes (None on a CPU)."
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    ids = torch.randint(vocab, (batch, length), device=device)
    def step():
        with torch.autocast(device, torch.bfloat16): loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for _ in range(WARM_UP): step()
    if device == "cuda": torch.cuda.reset_peak_memory_stats()
    synchronize(device)
    steps = 0
    start = time.perf_counter()
    while steps < STEPS and time.perf_counter() - start < SECONDS:
        step()
        synchronize(device)
        steps += 1
    seconds = (time.perf_counter() - start)/steps
    return steps, seconds, torch.cuda.max_memory_allocated() if device == "cuda" else None


def matrix_speed(device, n):
    "Operations in a second, in products of bf16 matrices of n x n; the fastest of ten."
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2*n**3/min(times)


def measure_shape(name, shape, vocab, length, device, write):
    "A line for each batch, until one does not fit."
    for batch in BATCHES:
        with torch.device(device): model = build(shape, vocab, length).train()
        parameters = sum(p.numel() for p in model.parameters())
        try: steps, seconds, memory = measure(model, batch, vocab, length, device)
        except torch.cuda.OutOfMemoryError:
            write(model=name, batch=batch, out_of_memory=True)
            break
        finally:
            del model
            if device == "cuda": torch.cuda.empty_cache()
        write(model=name, **shape, vocab=vocab, length=length, parameters=parameters, batch=batch, steps=steps,
              seconds=seconds, tokens_per_second=batch*length/seconds, memory=memory)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", help="file for the lines")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocab, length, shapes, matrix = (512, 64, TINY, 256) if options.tiny else (VOCAB, LENGTH, SHAPES, 8192)
    lines = []
    def write(**line):
        lines.append(json.dumps(line))
        print(lines[-1], flush=True)
    write(device=torch.cuda.get_device_name() if device == "cuda" else "CPU", torch=torch.__version__,
          date=time.strftime("%Y-%m-%d"), matrix_flops=matrix_speed(device, matrix), **LIKE_SEQGPT)
    for name, shape in shapes.items(): measure_shape(name, shape, vocab, length, device, write)
    if options.out:
        with open(options.out, "w") as f: f.write("\n".join(lines) + "\n")


if __name__ == "__main__": main()
