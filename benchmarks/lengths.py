"Time and memory of a training step over the length of the sequences, with as many tokens in each batch."
from dataclasses import replace

import numpy as np
from common import (
    FLAGS,
    Setup,
    make_parser,
    make_setup,
    megabytes,
    positive,
    print_left_out,
    print_table,
    save,
)
from training import bench_training

SHORTEST = 64 # tokens


def bench_lengths(
    setup: Setup, # Its batch says how many tokens there are in a batch of any length
    rounds: int, # How often each has its turn
    steps: int, # Steps in a turn
    longest: int, # Tokens in the longest sequences
) -> dict: # `rows`, one for each length and contender; `left_out`, name to reason
    "Measures seqgpt and Transformers' Trainer at each length from 64 on, doubled again and again."
    rows = []
    left_out = {}
    length = SHORTEST
    while length <= longest:
        sequences = max(1, setup.tokens//length)
        longer = replace(setup, folder=f"{setup.folder}/{length}", length=length, batch_size=sequences).write()
        found = bench_training(longer, rounds, steps, ["seqgpt", "Trainer, defaults"])
        for row in found["rows"]:
            kept = {key: row[key] for key in ("name", "tokens_per_second", "memory", "seconds")}
            rows.append({"length": length, "sequences": sequences, "step": float(np.median(row["seconds"])), **kept})
        left_out |= {f"{name}, {length} tokens": why for name, why in found["left_out"].items()}
        length *= 2
    return {"rows": rows, "left_out": left_out}


def show_lengths(found: dict):
    "Prints it as a table."
    rows = [[row["length"], row["sequences"], row["name"], f"{1e3*row['step']:,.0f} ms",
             f"{row['tokens_per_second']['median']:,.0f}", megabytes(row["memory"])] for row in found["rows"]]
    print_table(["length", "sequences", "", "a step", "tokens/s", "memory"], rows)
    print_left_out(found)


def main(argv: list[str] | None = None):
    parser = make_parser(__file__, __doc__, *FLAGS)
    parser.add_argument("--longest", type=positive, default=1024, help="tokens in the longest sequences")
    args = parser.parse_args(argv)
    with make_setup(args) as setup: found = bench_lengths(setup, args.rounds, args.steps, args.longest)
    show_lengths(found)
    save(args, found)


if __name__ == "__main__": main()
