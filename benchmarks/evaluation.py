"Tokens evaluated in a second: seqgpt and Transformers' Trainer, with the same model on the same sequences."
import tempfile

from common import (
    FLAGS,
    Setup,
    device,
    make_parser,
    make_setup,
    print_table,
    rate,
    save,
    speed,
    take_turns,
)
from contenders import trainer_rows
from transformers import PrinterCallback, Trainer, TrainingArguments

from seqgpt.evaluation import evaluate


def bench_evaluation(
    setup: Setup, # With a corpus
    rounds: int, # How often each has its turn
) -> dict: # `rows`
    "Measures both, after they have found the loss once."
    tokenizer = setup.tokenizer()
    n = 8*setup.batch_size
    model = setup.model().to(device()).eval()
    dataset = setup.corpus().dataset.select(range(n))
    args = TrainingArguments(tempfile.mkdtemp(dir=setup.folder), disable_tqdm=True, use_cpu=device().type == "cpu")
    trainer = Trainer(model, args, eval_dataset=trainer_rows(setup.ids()[:n]))
    trainer.remove_callback(PrinterCallback)

    def by_seqgpt():
        nats, _, tokens = evaluate(model.eval(), tokenizer, dataset, num_samples=0).scores.total
        return float(nats/tokens)

    calls = {"seqgpt": by_seqgpt, "Trainer, defaults": lambda: trainer.evaluate()["eval_loss"]}
    losses = {name: call() for name, call in calls.items()} # the warm-up
    seconds = take_turns(calls, rounds, title="Evaluation")
    return {"rows": [{"name": name, "tokens_per_second": rate(seconds[name], n*setup.length), "loss": losses[name],
                      "seconds": seconds[name]} for name in calls]}


def show_evaluation(found: dict):
    "Prints it as a table."
    rows = [[row["name"], *speed(row["tokens_per_second"]), f"{row['loss']:.4f}"] for row in found["rows"]]
    print_table(["evaluation", "tokens/s", "quartiles", "loss"], rows)


def main(argv: list[str] | None = None):
    args = make_parser(__file__, __doc__, *(name for name in FLAGS if name != "steps")).parse_args(argv)
    with make_setup(args) as setup: found = bench_evaluation(setup, args.rounds)
    show_evaluation(found)
    save(args, found)


if __name__ == "__main__": main()
