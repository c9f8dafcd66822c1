"Training in 16 bits, with Muon, on sequences of unequal lengths: little padding, weights in 32 bits. (That it is resumed exactly is tested in test_crashes.py.)"
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

import seqgpt.training as T
from seqgpt.corpora import make_markov, write_markov
from seqgpt.model import load_model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("markov")
    write_markov(folder/"data", make_markov(symbols=16, branching=2, min_length=8, max_length=64), 160)
    return T.Config(str(folder/"data"), output_dir=str(folder/"run"), cache_dir=str(folder/"cache"), max_length=64, num_epochs=2, precision="bf16", eval_steps=32,
                    optimizer="muon", learning_rate=3e-3, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture(scope="module")
def run(config):
    "A run, with the batches that it computed on: those of 32 steps, 16 in an epoch, are to learn from."
    batches, collate = [], T.collate
    def count(rows, **kwargs):
        batches.append(collate(rows, **kwargs))
        return batches[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T, "collate", count)
        return T.train(config), batches


def test_batches_are_hardly_padded_and_come_in_another_order_in_each_epoch(config, run):
    steps, pad = run[1][:32], T.load_vocab(config).pad_token_id
    assert sum((b["input_ids"] == pad).sum() for b in steps) / sum(b["input_ids"].numel() for b in steps) < 0.05
    first, second = ([tuple(row.tolist()) for b in part for row in b["input_ids"]] for part in (steps[:16], steps[16:]))
    bare = lambda rows: [tuple(i for i in row if i != pad) for row in rows]
    assert sorted(bare(first)) == sorted(bare(second)) and bare(first) != bare(second)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_of_a_batch_does_not_depend_on_padding(config, precision, tmp_path):
    tokenizer = T.load_vocab(config)
    rows = [{"input_ids": ids} for ids in T.load_data(config, tokenizer)[0].dataset[:2]["input_ids"]]
    model = T.new_model(T.make_config(tokenizer, 64, 1, 2, 16), seed=0).eval()
    trainer = T.QuickTrainer(model, T.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]), half=precision == "bf16")
    batch = T.collate(rows, tokenizer.pad_token_id)
    wider = {name: torch.nn.functional.pad(t, (0, 9), value={"input_ids": tokenizer.pad_token_id, "labels": -100, "attention_mask": 0}[name]) for name, t in batch.items()}
    assert "attention_mask" in batch
    assert torch.isclose(trainer.compute_loss(model, dict(batch)), trainer.compute_loss(model, dict(wider)), rtol=1e-3 if precision == "bf16" else 1e-6)


def test_parameters_stay_in_32_bits(run):
    state = load_model(run[0].output_dir/"final_model").state_dict()
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert any((t.bfloat16().float() != t).any() for t in state.values()) # they were changed in 32 bits, too


def test_a_callback_may_stop_a_run_before_its_first_validation(config):
    class StopEarly(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = True
    early = T.train(replace(config, output_dir=config.output_dir + "_early"), [StopEarly()])
    assert early.metrics["step"] == 1 and load_model(early.output_dir/"best_model") and load_model(early.output_dir/"final_model")
