"Tokens trained on in a second: seqgpt, Transformers' Trainer, Lightning, x-transformers and plain loops, by turns."
import importlib.util
from contextlib import ExitStack

import torch
from common import (
    DTYPES,
    FLAGS,
    Setup,
    device,
    make_parser,
    make_setup,
    megabytes,
    precisions,
    print_left_out,
    print_table,
    rate,
    save,
    seconds_of,
    speed,
    take_turns,
)
from contenders import Contender, contenders
from tqdm import tqdm

WARM_UP = 2 # steps


def training_flops(
    length: int, # Tokens in a sequence
    n_layer: int, # Blocks
    n_embd: int, # Dimensions
    vocab_size: int,
) -> tuple[int, int]: # For the weights; for attention, without what the causal mask hides
    "Operations to train on one token, forward and backward."
    return 6*(12*n_layer*n_embd**2 + vocab_size*n_embd), 6*n_layer*length*n_embd


def matrix_products(
    rows: int, # Tokens in a batch
    n_embd: int, # Dimensions of a token
    precision: str = "fp32", # or "bf16"
    repeats: int = 20, # Products in a call
) -> tuple: # A function that multiplies, and its number of operations
    "The products that a feed-forward layer is made of."
    shapes = ((rows, n_embd), (n_embd, 4*n_embd), (rows, 4*n_embd))
    a, b, out = (torch.randn(shape, device=device()).to(DTYPES[precision]) for shape in shapes)
    def call():
        for _ in range(repeats): torch.mm(a, b, out=out)
    return call, repeats*2*rows*n_embd*4*n_embd


def start(
    stack: ExitStack, # Ends them
    setup: Setup, # With a corpus
    names: list[str] | None = None, # Default: all
) -> tuple[dict, dict, dict]: # Name to contender, to the seconds of the first step, to the reason why it is left out
    "Starts contenders, and has them do their warm-up."
    running = {}
    first = {}
    left_out = {}
    for name, (_, module, _) in tqdm(contenders().items(), desc="Starting", leave=False):
        if names and name not in names: continue
        if module and not importlib.util.find_spec(module):
            left_out[name] = f"not installed: pip install {module.replace('_', '-')}"
            continue
        try:
            contender = stack.enter_context(Contender(name, setup))
            first[name] = [seconds_of(contender) for _ in range(WARM_UP)][0]
            running[name] = contender
        except RuntimeError as e: left_out[name] = str(e)
    return running, first, left_out


def bench_training(
    setup: Setup, # With a corpus
    rounds: int, # How often each contender has its turn
    steps: int, # Steps in a turn
    names: list[str] | None = None, # Of contenders; default: all
) -> dict: # `rows`, one for each contender; `left_out`, name to reason; `peak`, precision to operations in a second
    "Measures the contenders, and the products of matrices alone."
    rows = []
    work = sum(training_flops(setup.length, setup.n_layer, setup.n_embd, setup.config().vocab_size))
    with ExitStack() as stack:
        running, first, left_out = start(stack, setup, names)
        products = {p: matrix_products(setup.tokens, setup.n_embd, p) for p in precisions()}
        multiply = {p: call for p, (call, _) in products.items()}
        for call in multiply.values(): call()
        seconds = take_turns({**running, **multiply}, rounds, steps, f"Training, {setup.length} tokens")
        peak = {p: rate(seconds[p], flops)["median"] for p, (_, flops) in products.items()}
        for name, contender in running.items():
            per_second = rate(seconds[name], setup.tokens)
            rows.append({"name": name, "precision": contenders()[name][0], "tokens_per_second": per_second,
                         "share_of_peak": per_second["median"]*work/max(peak.values()), "first_step": first[name],
                         "memory": contender.memory(), "parameters": contender.parameters, "seconds": seconds[name]})
    return {"rows": rows, "left_out": left_out, "peak": peak}


def show_training(found: dict):
    "Prints it as a table."
    medians = {row["name"]: row["tokens_per_second"]["median"] for row in found["rows"]}
    base = medians.get("Trainer, defaults")
    columns = ["training", "", "tokens/s", "quartiles", "× Trainer", "of the peak", "first step", "memory"]
    rows = []
    for row in found["rows"]:
        times = f"{medians[row['name']]/base:.2f}" if base else ""
        rows.append([row["name"], row["precision"], *speed(row["tokens_per_second"]), times,
                     f"{row['share_of_peak']:.1%}", f"{row['first_step']:.1f} s", megabytes(row["memory"])])
    print_table(columns, rows)
    print_left_out(found)
    peaks = ", ".join(f"{p} {flops/1e9:,.0f} GFLOP/s" for p, flops in found["peak"].items())
    print(f"The peak, in matrix products: {peaks}. Shares are of the highest.")


def main(argv: list[str] | None = None):
    args = make_parser(__file__, __doc__, *FLAGS).parse_args(argv)
    with make_setup(args) as setup: found = bench_training(setup, args.rounds, args.steps)
    show_training(found)
    save(args, found)


if __name__ == "__main__": main()
