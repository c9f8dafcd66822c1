"""Training in 16 bits, with Muon, on sequences of unequal lengths: little padding, weights in 32 bits. (That it is
resumed exactly is tested in test_crashes.py.)"""
import io
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

import seqgpt.training as T
from seqgpt.checks import InputError
from seqgpt.config import Config, read_config, run_config, without_folders, write_config
from seqgpt.data import collate
from seqgpt.loading import load_folder, load_model
from seqgpt.markov import make_markov, write_markov
from seqgpt.metrics import out_of_patience, validation_metrics
from seqgpt.model import make_config, new_model
from seqgpt.progress import tqdm
from seqgpt.reports import training_split
from seqgpt.resolving import load_data, load_vocab, start_from
from seqgpt.runs import lock_run
from seqgpt.saving import model_unchanged, save_model
from seqgpt.streaming import stream_corpus
from seqgpt.tokenizer import load_tokenizer, make_tokenizer
from seqgpt.trainer import SequenceTrainer


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("markov")
    write_markov(folder/"data", make_markov(symbols=16, branching=2, min_length=8, max_length=64), 160)
    return Config(str(folder/"data"), output_dir=str(folder/"run"), cache_dir=str(folder/"cache"), max_length=64,
                    num_epochs=2, precision="bf16", eval_steps=32, optimizer="muon", learning_rate=3e-3, n_layer=1,
                    n_head=2, n_embd=16)


@pytest.fixture(scope="module")
def run(config):
    "A run, with the batches that it computed on: those of 32 steps, 16 in an epoch, are to learn from."
    batches = []
    def count(rows, **kwargs):
        batches.append(collate(rows, **kwargs))
        return batches[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seqgpt.preparing.collate", count)
        return T.train(config), batches


def test_batches_are_hardly_padded_and_come_in_another_order_in_each_epoch(config, run):
    steps = run[1][:32]
    pad = load_vocab(config).pad_token_id
    assert sum((b["input_ids"] == pad).sum() for b in steps) / sum(b["input_ids"].numel() for b in steps) < 0.05
    def bare(batches): return [tuple(i for i in row.tolist() if i != pad) for b in batches for row in b["input_ids"]]
    first = bare(steps[:16])
    second = bare(steps[16:])
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_of_a_batch_does_not_depend_on_padding(config, precision, tmp_path):
    tokenizer = load_vocab(config)
    rows = [{"input_ids": ids} for ids in load_data(config, tokenizer)[0].dataset[:2]["input_ids"]]
    model = new_model(make_config(tokenizer, 64, 1, 2, 16), seed=0).eval()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = SequenceTrainer(model, arguments, bf16_weights=precision == "bf16")
    batch = collate(rows, tokenizer.pad_token_id)
    padding = {"input_ids": tokenizer.pad_token_id, "labels": -100, "attention_mask": 0}
    wider = {name: torch.nn.functional.pad(t, (0, 9), value=padding[name]) for name, t in batch.items()}
    assert "attention_mask" in batch
    tolerance = 1e-3 if precision == "bf16" else 1e-6
    losses = [trainer.compute_loss(model, dict(b)) for b in (batch, wider)]
    assert torch.isclose(*losses, rtol=tolerance)


def test_parameters_stay_in_32_bits(run):
    state = load_model(run[0].output_dir/"final_model").state_dict()
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert any((t.bfloat16().float() != t).any() for t in state.values()) # they were changed in 32 bits, too


def test_a_callback_may_stop_a_run_before_its_first_validation(config):
    class StopEarly(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = True
    early = T.train(replace(config, output_dir=config.output_dir + "_early"), [StopEarly()])
    assert early.metrics["step"] == 1
    assert load_model(early.output_dir/"best_model") and load_model(early.output_dir/"final_model")
    assert len([*early.output_dir.rglob("events.*")]) == 1 # of TensorBoard


# --- progress

class Terminal(io.StringIO):
    def isatty(self): return True


@pytest.mark.parametrize("out", [io.StringIO, Terminal])
def test_progress_is_a_bar_on_a_terminal_and_plain_lines_elsewhere(config, out, monkeypatch):
    class Shown(tqdm):
        seconds = 0
        def __init__(self, *args, **kwargs): super().__init__(*args, disable=False, **kwargs) # in tests it is True
    monkeypatch.setattr("seqgpt.callbacks.tqdm", Shown)
    monkeypatch.setattr("sys.stderr", out())
    out_dir = f"{config.output_dir}_{out.__name__}"
    T.train(replace(config, output_dir=out_dir, max_steps=4, eval_steps=2, logging_steps=2))
    said = sys.stderr.getvalue()
    if out is Terminal:
        assert re.search(r"\r100%\|#+\| 4/4 \[\d\d:\d\d<\d\d:\d\d, .*it/s, loss=\d\.\d+\]", said), said
    else:
        assert "\r" not in said, said
        assert re.search(r"^Step 4/4 \(100 %\), .*it/s, \d\d:\d\d left, loss=\d\.\d+$", said, re.M), said
        assert "\nValidating 0/4 (0 %)" in said


def test_a_stream_is_told_its_share(config, monkeypatch):
    "Several processes do not read the same."
    tokenizer = load_vocab(config)
    stream = stream_corpus(config.data_path, tokenizer, fraction=0)[0].dataset
    for name, value in {"process_index": 1, "world_size": 3}.items():
        monkeypatch.setattr(TrainingArguments, name, property(lambda self, value=value: value))
    arguments = TrainingArguments(f"{config.output_dir}_share", use_cpu=True, report_to=[], max_steps=1)
    model = new_model(make_config(tokenizer, 64, 1, 2, 16), seed=0)
    SequenceTrainer(model, arguments, train_dataset=stream).get_train_dataloader()
    assert (stream.rank, stream.world_size, stream.batch_size) == (1, 3, 8)


def test_lines_come_every_half_minute(monkeypatch):
    now = 0.0
    log = io.StringIO()
    monkeypatch.setattr("seqgpt.progress.time.monotonic", lambda: now)
    for k in tqdm(range(1000), desc="Counting", file=log, mininterval=0, miniters=1, disable=False): now = k/10
    assert [line.split()[1] for line in log.getvalue().splitlines()] == ["301/1000", "601/1000", "901/1000"]


def test_one_process_shows_progress(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert tqdm(range(3), disable=False).disable


def test_there_is_one_kind_of_progress_bar():
    modules = Path(T.__file__).parent.glob("*.py")
    found = [p.name for p in modules if re.search(r"^\s*(from|import) tqdm", p.read_text(), re.M)]
    assert found == ["progress.py"]


# --- what is kept of a run, and when it ends

def test_every_validation_has_the_loss_of_the_steps_before_it(config):
    "Also where nothing is due to be logged since the one before: here of steps 6 and 7."
    def history(n):
        out = f"{config.output_dir}_logged_{n}"
        return T.train(replace(config, output_dir=out, max_steps=7, eval_steps=5, logging_steps=n)).history
    runs = [history(n) for n in (1, 5)]
    losses = [log["loss"] for log in runs[0] if log.get("step") in (6, 7) and "loss" in log]
    for run in runs:
        assert validation_metrics(run)["train_perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


@pytest.mark.parametrize("validations, stops", [
    ([(3, 1.0), (2, 1.0), (1, 1.0)], True), # nothing left to learn, though the loss goes on falling
    ([(3, 1.0), (2, 0.9), (1, 1.0)], False),
    ([(2, 1.0), (1, 1.0)], False),
    ([(1, 0.5), (2, 0.5), (2, 0.5), (2, 0.6)], True),
    ([(2, 0.5), (1, 0.5), (2, 0.5), (2, 0.6)], False),
    ([], False),
])
def test_a_classifier_stops_where_it_cannot_get_better(validations, stops):
    logs = [{"eval_loss": loss, "eval_accuracy": right, "eval_macro_f1": right} for loss, right in validations]
    history = [{"loss": 1.0, "step": 1}, *logs]
    preset = read_config(Path(T.__file__).with_name("classify.yaml"))
    assert preset.early_stopping_patience == 3 and out_of_patience(history, preset.early_stopping_patience) == stops
    assert not out_of_patience(history, 0)


def test_a_language_model_stops_by_its_loss_alone():
    history = [{"eval_loss": loss, "eval_accuracy": 1.0} for loss in (3, 2, 1)]
    assert not out_of_patience(history, 3)


def test_a_model_to_be_shared_does_not_say_where_its_data_was(config, run, tmp_path):
    best = run[0].output_dir/"best_model"
    folders = [run[0].output_dir/name for name in ("best_model", "final_model")]
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    assert os.path.isabs(config.data_path) and len(files) > 20
    assert not [p for p in files if str(Path(config.data_path).parent).encode() in p.read_bytes()]
    tokenizer = load_tokenizer(best)
    found = training_split(best, tokenizer, config.cache_dir)
    assert found.validation["input_ids"][:] == load_data(config, tokenizer)[1].validation["input_ids"][:]
    assert start_from(Config(init_from=str(best))).data_path == config.data_path
    moved = shutil.copytree(best, tmp_path/"moved")
    with pytest.raises(InputError, match="data: no such file or folder"): training_split(moved, tokenizer)


def test_settings_around_a_model_that_are_not_of_its_run(config, tmp_path):
    "What has another name is not taken for the data of the model, and what cannot be read is left alone."
    model = tmp_path/"model"
    write_config(without_folders(config), model/"config.yaml")
    for around in ("data_path: /elsewhere/other\n", "data_path: 3\n", "- no settings"):
        (tmp_path/"config.yaml").write_text(around)
        assert run_config(model).data_path == ".../data"


# --- two who use one folder

def small_model(folder, symbols):
    tokenizer = make_tokenizer({s: k for k, s in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *symbols])})
    model = new_model(make_config(tokenizer, 4, 1, 1, 2), seed=ord(symbols[0]))
    save_model(folder, model, tokenizer, Config("data"), {})
    return model


def test_a_model_that_is_replaced_while_it_is_loaded_comes_with_its_own_tokenizer(tmp_path, monkeypatch):
    small_model(tmp_path/"best_model", "ab")
    load = load_tokenizer
    others = []
    def replaced_first(folder):
        if not others: others.append(small_model(folder, "ba"))
        return load(folder)
    monkeypatch.setattr("seqgpt.loading.load_tokenizer", replaced_first)
    model, tokenizer = load_folder(tmp_path/"best_model")
    assert tokenizer.convert_ids_to_tokens([4, 5]) == ["b", "a"]
    assert torch.equal(model.transformer.wte.weight, others[0].transformer.wte.weight)


def test_a_model_is_loaded_when_the_old_one_has_lost_its_name_and_the_new_one_has_none_yet(tmp_path, monkeypatch):
    best = tmp_path/"best_model"
    small_model(best, "ab")
    loaded = []
    rename = Path.rename
    def load_first(path, target):
        if path.name == ".best_model.seqgpt.new": # the last step of the writing process
            monkeypatch.undo()
            assert not best.exists()
            loaded.append(load_folder(best))
        return rename(path, target)
    monkeypatch.setattr(Path, "rename", load_first)
    model = small_model(best, "ba")
    for found, tokenizer in [*loaded, load_folder(best)]:
        assert tokenizer.convert_ids_to_tokens([4, 5]) == ["b", "a"]
        assert torch.equal(found.transformer.wte.weight, model.transformer.wte.weight)
    assert len(loaded) == 1 and [p.name for p in tmp_path.iterdir()] == ["best_model"]


def test_a_model_that_is_taken_away_while_it_is_loaded(tmp_path, monkeypatch):
    small_model(tmp_path/"best_model", "ab")
    monkeypatch.setattr("seqgpt.loading.load_file", lambda path: (shutil.rmtree(tmp_path/"best_model"), open(path)))
    with pytest.raises(InputError, match="no config.json there"): load_folder(tmp_path/"best_model")


def test_results_in_a_model_that_a_training_may_replace(tmp_path):
    run = tmp_path/"run"
    best = run/"best_model"
    small_model(best, "ab")
    with model_unchanged(best/"evaluation"): pass
    write_config(Config("data"), run/"config.yaml")
    with lock_run(run):
        with pytest.raises(InputError, match="a training is going on"): model_unchanged(best/"evaluation").__enter__()
        with model_unchanged(run/"evaluation"): pass # not in the folder of the model
    with pytest.raises(FileNotFoundError), model_unchanged(best/"evaluation"): open(best/"nothing")
    with pytest.raises(InputError, match="has replaced the model meanwhile"), model_unchanged(best/"evaluation"):
        small_model(best, "ab")
        open(best/"evaluation")
    with pytest.raises(InputError, match="the folder of a model"): lock_run(best/"tuned")


def test_what_was_made_of_a_model_is_kept_when_a_better_one_takes_its_place(config, tmp_path, capsys):
    short = replace(config, output_dir=str(tmp_path), eval_steps=2, max_steps=2)
    T.train(short)
    (tmp_path/"best_model/onnx").mkdir()
    (tmp_path/"best_model/onnx/model.onnx").write_text("of the first two steps")
    T.train(replace(short, max_steps=4, resume=True))
    assert not (tmp_path/"best_model/onnx").exists()
    assert (tmp_path/"onnx_of_step_2/model.onnx").read_text() == "of the first two steps"
    assert "onnx belongs to an earlier model" in capsys.readouterr().out
