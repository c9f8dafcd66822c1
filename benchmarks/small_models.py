"Training a small model, which spends most of its time on being called: 16 bits and more machinery cost time there."
from common import FLAGS, make_parser, make_setup, print_left_out, print_table, save
from training import bench_training

NAMES = ["seqgpt", "plain loop", "plain loop, bf16", "Trainer, defaults"]


def show_small_models(found: dict):
    "Prints it as a table."
    medians = {row["name"]: row["tokens_per_second"]["median"] for row in found["rows"]}
    base = medians.get("plain loop", float("nan"))
    rows = [[row["name"], row["precision"], f"{medians[row['name']]:,.0f}", f"{medians[row['name']]/base:.2f}"]
            for row in found["rows"]]
    print_table(["small model", "", "tokens/s", "× plain loop"], rows)
    print_left_out(found)


def main(argv: list[str] | None = None):
    sizes = {"batch_size": 16, "length": 66, "n_layer": 2, "n_head": 2, "n_embd": 64}
    args = make_parser(__file__, __doc__, *FLAGS, **sizes).parse_args(argv)
    with make_setup(args) as setup: found = bench_training(setup, args.rounds, args.steps, NAMES)
    show_small_models(found)
    save(args, found)


if __name__ == "__main__": main()
