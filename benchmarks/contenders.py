"""The ways to train the same small GPT. Each is a function that trains, and calls `pause(model)` before the first step
and after each; `Contender` runs one in a process of its own."""
import json
import os
import subprocess
import sys
import tempfile
from functools import partial

import torch
import torch.nn.functional as F
from common import Setup, device, peak_memory, precisions
from torch import nn
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from seqgpt.config import Config
from seqgpt.model import PlainGPT
from seqgpt.training import train

ENDLESS = 100_000 # steps: nobody waits for the end
adamw = partial(torch.optim.AdamW, lr=5e-5, weight_decay=0.01, fused=True)


class Pauses(TrainerCallback):
    "Calls `pause(model)` before the first step and after each."
    def __init__(self, pause): self.pause = pause
    def on_train_begin(self, args, state, control, model=None, **kwargs): self.pause(model)
    def on_step_end(self, args, state, control, model=None, **kwargs): self.pause(model)


def train_seqgpt(setup: Setup, pause):
    "seqgpt with its defaults."
    config = Config(f"{setup.folder}/data", output_dir=tempfile.mkdtemp(dir=setup.folder),
                    cache_dir=f"{setup.folder}/cache", max_length=setup.length, batch_size=setup.batch_size,
                    max_steps=ENDLESS, eval_steps=ENDLESS, **setup.shape)
    train(config, [Pauses(pause)])


def trainer_rows(
    ids: torch.Tensor, # (sequences, length)
) -> list[dict]:
    "Sequences in the form that `Trainer` takes."
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def train_transformers(setup: Setup, pause, bf16: bool = False):
    "Transformers' Trainer with its defaults."
    torch.manual_seed(0)
    model = GPT2LMHeadModel(setup.config())
    args = TrainingArguments(tempfile.mkdtemp(dir=setup.folder), per_device_train_batch_size=setup.batch_size,
                             max_steps=ENDLESS, bf16=bf16, use_cpu=device().type == "cpu")
    Trainer(model, args, train_dataset=trainer_rows(setup.ids()), callbacks=[Pauses(pause)]).train()


def next_token_loss(
    logits: torch.Tensor, # (batch, length, vocabulary)
    ids: torch.Tensor, # (batch, length)
) -> torch.Tensor:
    "Cross-entropy of each token but the first."
    labels = F.pad(ids[:, 1:], (0, 1), value=-100) # nothing is predicted after the last token
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def plain_gpt(setup: Setup) -> nn.Module: return PlainGPT(setup.config())


def x_transformer(setup: Setup) -> nn.Module:
    "The same shape from x-transformers."
    from x_transformers import Decoder, TransformerWrapper
    layers = Decoder(dim=setup.n_embd, depth=setup.n_layer, heads=setup.n_head,
                     attn_dim_head=setup.n_embd//setup.n_head, attn_flash=True, ff_dropout=0.1)
    return TransformerWrapper(num_tokens=setup.config().vocab_size, max_seq_len=setup.length, attn_layers=layers,
                              emb_dropout=0.1, tie_embedding=True)


def train_plain(setup: Setup, pause, precision: str = "fp32", build=plain_gpt):
    "A loop in PyTorch alone."
    torch.manual_seed(0)
    ids = setup.ids().to(device())
    model = build(setup).to(device()).train()
    optimizer = adamw(model.parameters())
    pause(model)
    while True:
        batch = ids[torch.randint(len(ids), (setup.batch_size,))]
        with torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16"):
            loss = next_token_loss(model(batch), batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pause(model)


def train_lightning(setup: Setup, pause, precision: str = "fp32"):
    "Lightning's Trainer around the plain model."
    import lightning

    class Plain(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = plain_gpt(setup)

        def training_step(self, batch, k): return next_token_loss(self.model(batch), batch)
        # Lightning refuses to clip the gradients of a fused optimiser
        def configure_optimizers(self): return adamw(self.parameters(), fused=False)
        def on_train_start(self): pause(self.model)
        def on_train_batch_end(self, *args): pause(self.model)

    lightning.seed_everything(0)
    batches = torch.utils.data.DataLoader(setup.ids(), setup.batch_size, shuffle=True)
    trainer = lightning.Trainer(precision={"fp32": "32-true", "bf16": "bf16-mixed"}[precision], max_steps=ENDLESS,
                                gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
                                enable_progress_bar=False, default_root_dir=setup.folder)
    trainer.fit(Plain(), batches)


def contenders() -> dict[str, tuple]: # Name to precision, the module that it needs, and its function
    "All that can be trained on this machine."
    best = precisions()[-1]
    found = {
        "seqgpt": (best, None, train_seqgpt),
        "Trainer, defaults": ("fp32", None, train_transformers),
        "Trainer, bf16": ("bf16", None, partial(train_transformers, bf16=True)),
        "plain loop": ("fp32", None, train_plain),
        "plain loop, bf16": ("bf16", None, partial(train_plain, precision="bf16")),
        "x-transformers": (best, "x_transformers", partial(train_plain, precision=best, build=x_transformer)),
        "Lightning": (best, "lightning", partial(train_lightning, precision=best)),
    }
    return {name: contender for name, contender in found.items() if contender[0] in precisions()}


class Contender:
    "A training in a process of its own; each call is a step. Used as a context, which ends the process."
    def __init__(self,
        name: str, # One of `contenders`
        setup: Setup, # With a corpus
    ):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([sys.executable, __file__, name, json.dumps(vars(setup))], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        try: self.parameters = self.answer() # it is ready
        except RuntimeError:
            self.__exit__()
            raise

    def answer(self) -> int:
        "The line that the process writes after a step; raises `RuntimeError` with its last words if it has ended."
        line = self.process.stdout.readline()
        if line: return int(line)
        self.errors.seek(0)
        words = self.errors.read().strip().splitlines() or ["no message"]
        raise RuntimeError(f"{self.name} failed: {words[-1][:200]}")

    def __call__(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.answer()

    def memory(self) -> float | None: return peak_memory(self.process.pid)
    def __enter__(self): return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def serve(name: str, setup: Setup):
    "What runs in the process of a contender: a step for each line that comes in."
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1) # what libraries print goes nowhere

    def pause(model):
        if torch.accelerator.is_available(): torch.accelerator.synchronize()
        print(sum(p.numel() for p in model.parameters()), file=answers, flush=True)
        if not sys.stdin.readline(): os._exit(0) # the benchmark has ended

    contenders()[name][2](setup, pause)


if __name__ == "__main__": serve(sys.argv[1], Setup(**json.loads(sys.argv[2])))
