"What each trick gives: training steps of Transformers' GPT-2, with one trick more in each row."
import torch
from common import (
    FLAGS,
    Setup,
    device,
    make_parser,
    make_setup,
    precisions,
    print_left_out,
    print_table,
    rate,
    save,
    seconds_of,
    speed,
    take_turns,
)
from contenders import adamw
from torch import nn
from torch.func import functional_call
from tqdm import tqdm
from training import WARM_UP
from transformers import GPT2LMHeadModel

from seqgpt.cpu import tune_malloc, use_fast_cpu_kernels
from seqgpt.model import exact_loss

COMPILED = "torch.compile (left out)"


def tricks() -> dict[str, dict]: # Name to what it adds to the options of `make_step`
    "The tricks that work on this machine, in the order in which they are added."
    found = {"Trainer's defaults": {}}
    if "bf16" in precisions(): found["16 bits, by autocast"] = {"autocast": True}
    found |= {"no dropout in attention": {"attn_pdrop": 0.0}, "no attention mask": {"mask": False},
              "GELU in one go": {"activation_function": "gelu_pytorch_tanh"}}
    if "bf16" in precisions() and device().type == "cpu":
        found |= {"attention in groups of rows": {"groups": True}, "dropout of 16 bits": {"dropout16": True},
                  "weights rounded once": {"autocast": False, "rounded": True}}
    return found


def make_step(
    setup: Setup,
    ids: torch.Tensor, # Of a batch
    autocast: bool = False, # Compute in 16 bits
    rounded: bool = False, # The same, with the weights rounded once
    mask: bool = True, # Give the model an attention mask
    groups: bool = False, # Attention in groups of rows
    dropout16: bool = False, # Dropout with fewer random bits
    compiled: bool = False, # With torch.compile
    **fields, # Of the configuration
): # A function that does a training step
    "A training step with some of the tricks."
    torch.manual_seed(0)
    model = exact_loss(GPT2LMHeadModel(setup.config(**fields))).to(device()).train()
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    optimizer = adamw(model.parameters())
    if mask: batch["attention_mask"] = torch.ones_like(ids)
    if groups: model.set_attn_implementation("causal_attention")
    if dropout16: use_fast_cpu_kernels(model)

    def loss():
        if rounded:
            weights = {name: p.bfloat16() for name, p in model.named_parameters()}
            return functional_call(model, weights, kwargs=batch).loss
        with torch.autocast(device().type, torch.bfloat16, enabled=autocast): return model(**batch).loss

    compute = torch.compile(loss) if compiled else loss

    def step():
        compute().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def warm_up(
    setup: Setup, # With a corpus
    compiled: bool, # Also with torch.compile
) -> tuple[dict, dict, dict]: # Name to step, to the seconds of the first step, to the reason why it is left out
    "Makes the steps, and has each done a few times."
    ids = setup.ids()[:setup.batch_size].to(device())
    options = {}
    calls = {}
    first = {}
    left_out = {}
    added = tricks() | ({COMPILED: {"compiled": True}} if compiled else {})
    for name, trick in tqdm(added.items(), desc="Tricks, warm-up", leave=False):
        options |= trick
        try:
            step = make_step(setup, ids, **options)
            first[name] = [seconds_of(step) for _ in range(WARM_UP)][0]
            calls[name] = step
        except Exception as e: # there may be no C++ compiler, for example
            left_out[name] = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    return calls, first, left_out


def bench_tricks(
    setup: Setup, # With a corpus
    rounds: int, # How often each has its turn
    steps: int, # Steps in a turn
    compiled: bool = True, # Also with torch.compile, which takes its time to begin
) -> dict: # `rows`, one for each trick; `left_out`, name to reason
    "Measures training steps with more and more tricks."
    calls, first, left_out = warm_up(setup, compiled)
    last = {name: call for name, call in calls.items() if name == COMPILED}
    calls = {name: call for name, call in calls.items() if name != COMPILED}
    seconds = take_turns(calls, rounds, steps, "Tricks")
    tune_malloc() # cannot be undone, so it comes after all that do without
    best = [*calls][-1]
    seconds |= take_turns({"freed memory kept": calls[best], **last}, rounds, steps, "Tricks, with memory kept")
    first["freed memory kept"] = first[best]
    rows = []
    before = None
    for name, s in seconds.items():
        per_second = rate(s, setup.tokens)
        gain = per_second["median"]/(before or per_second["median"]) - 1
        rows.append({"name": name, "tokens_per_second": per_second, "gain": gain, "first_step": first[name],
                     "seconds": s})
        before = per_second["median"]
    return {"rows": rows, "left_out": left_out}


def show_tricks(found: dict):
    "Prints it as a table."
    rows = [[row["name"], *speed(row["tokens_per_second"]), f"{row['gain']:+.0%}", f"{row['first_step']:.1f} s"]
            for row in found["rows"]]
    print_table(["tricks, one more in each row", "tokens/s", "quartiles", "gain", "first step"], rows)
    print_left_out(found)


def main(argv: list[str] | None = None):
    args = make_parser(__file__, __doc__, *FLAGS).parse_args(argv)
    with make_setup(args) as setup: found = bench_tricks(setup, args.rounds, args.steps)
    show_tricks(found)
    save(args, found)


if __name__ == "__main__": main()
