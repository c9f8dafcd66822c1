"The installed command, as a user types it."
import ast
import contextlib
import importlib
import inspect
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import NOTES, ROOT, TINY, VOCAB, installed, refused, seqgpt, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, GPT2Tokenizer

from seqgpt.corpora import write_digits
from seqgpt.tokenizer import InputError

RUN = ["train", "--data_path", "data.jsonl", "--max_length", 16, *TINY]


@pytest.fixture
def corpus(melodies, tmp_path):
    write_lines(tmp_path, [{"tokens": t, "label": l} for t, l in melodies])
    return tmp_path


@pytest.fixture
def finished(trained, tmp_path):
    "A copy of the finished run."
    return shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


# --- what a finished run leaves behind

def test_outputs_are_complete(trained):
    model = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
             "vocab.json", "merges.txt", "config.yaml", "metrics.json", "README.md"}
    assert model <= {p.name for p in (trained/"outputs/best_model").iterdir()}
    assert len({p.stat().st_mode for p in (trained/"outputs/best_model").iterdir() if p.is_file()}) == 1 # who may read one may read all
    assert model == {p.name for p in (trained/"outputs/final_model").iterdir()}
    for name in ("training_curves.png", "samples.jsonl", "split.json", "config.yaml", "best_model/evaluation/metrics.json", "best_model/evaluation/evaluation.png"):
        assert (trained/"outputs"/name).stat().st_size > 0, name
    assert any((trained/"outputs/runs").glob("events.out.tfevents.*"))
    assert not [*trained.rglob(".*.part"), *trained.rglob(".*.old")]
    split = json.loads((trained/"outputs/split.json").read_text())
    assert sorted(split["train"] + split["validation"]) == list(range(200)) and len(split["validation"]) == 40


def test_a_short_run_leaves_lines_in_a_file_and_no_bar(trained):
    assert (trained/"bars.txt").read_text() == ""
    assert (trained/"printed.txt").read_text().count("best so far") >= 1


def test_plain_transformers_opens_the_folder(trained):
    folder, text = trained/"outputs/best_model", "<bos> C4 E4 G4"
    model, auto = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = auto(text, return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[VOCAB[s] for s in text.split()]] and auto.decode(ids[0]) == text
    assert GPT2Tokenizer.from_pretrained(folder)(text)["input_ids"] == ids[0].tolist()
    with torch.no_grad(): assert torch.equal(model(ids).logits, GPT2LMHeadModel.from_pretrained(folder)(ids).logits)
    assert model.config.use_cache and model.generation_config.eos_token_id == VOCAB["<eos>"]
    assert auto.decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0]).startswith(text)


def test_printed_metrics_are_those_of_transformers(trained):
    metrics = json.loads((trained/"outputs/best_model/evaluation/metrics.json").read_text())
    assert f"{metrics['perplexity']:.4g}" in (trained/"printed.txt").read_text()
    model = AutoModelForCausalLM.from_pretrained(trained/"outputs/best_model").eval()
    lines = [json.loads(line)["tokens"] for line in open(trained/"data.jsonl")]
    nats = right = n = nats_of_eos = 0
    for k in json.loads((trained/"outputs/split.json").read_text())["validation"]:
        ids = torch.tensor([[1, *(VOCAB[s] for s in lines[k]), 2]])
        with torch.no_grad(): out = model(ids, labels=ids)
        nats, n = nats + out.loss.item()*(ids.shape[1] - 1), n + ids.shape[1] - 1
        right += (out.logits[0, :-1].argmax(-1) == ids[0, 1:]).sum().item()
        nats_of_eos -= out.logits[0, -2].log_softmax(-1)[VOCAB["<eos>"]].item()
    assert metrics["tokens"] == n and metrics["sequences"] == 40
    assert np.isclose(metrics["perplexity"], np.exp(nats/n), rtol=1e-5) and np.isclose(metrics["accuracy"], right/n)
    assert np.isclose(metrics["nats_per_sequence"], nats/40, rtol=1e-5) and np.isclose(metrics["bits_per_token"], nats/n/np.log(2), rtol=1e-5)
    assert metrics["tokens_without_eos"] == n - 40 and np.isclose(metrics["perplexity_without_eos"], np.exp((nats - nats_of_eos)/(n - 40)), rtol=1e-5)


# --- evaluate

def test_evaluate(trained, tmp_path):
    result = seqgpt("evaluate", "--model_path", "outputs/best_model", "--out_dir", tmp_path/"e", cwd=trained)
    assert result.returncode == 0 and "trigram" in result.stdout, result.stderr
    whole = json.loads((tmp_path/"e/metrics.json").read_text())
    assert {"perplexity", "accuracy", "nats_per_sequence", "bits_per_token", "sequences", "tokens", "perplexity_without_eos", "baselines"} <= whole.keys()
    write_lines(tmp_path/"other", [{"tokens": NOTES}, {"tokens": NOTES[::-1]}])
    result = seqgpt("evaluate", "--model_path", trained/"outputs/best_model", "--data_path", tmp_path/"other/data.jsonl", "--out_dir", tmp_path/"o", cwd=tmp_path, drawn=False)
    assert result.returncode == 0 and json.loads((tmp_path/"o/metrics.json").read_text())["tokens"] == 12, result.stderr


def test_evaluate_replaces_no_other_evaluation(trained, tmp_path):
    shutil.copytree(trained/"outputs/best_model", tmp_path/"m")
    own = (tmp_path/"m/evaluation/metrics.json").read_bytes()
    write_lines(tmp_path/"other", [{"tokens": NOTES}, {"tokens": NOTES[::-1]}])
    ask = lambda *args: seqgpt("evaluate", "--model_path", "m", "--data_path", "other/data.jsonl", "--num_samples", 2, *args, cwd=tmp_path, drawn=False)
    assert ask().returncode == 0
    metrics = tmp_path/"m/evaluation_data/metrics.json"
    other = metrics.read_bytes()
    assert json.loads(other)["sequences"] == 2 and (tmp_path/"m/evaluation/metrics.json").read_bytes() == own
    refused(ask("--batch_size", 1), "m/evaluation_data/metrics.json: is there already", "--out_dir")
    refused(ask("--out_dir", "m"), "m/metrics.json: is there already")
    assert metrics.read_bytes() == other and (tmp_path/"m/metrics.json").read_bytes() == (trained/"outputs/best_model/metrics.json").read_bytes()


def test_metrics_are_valid_json_even_where_no_loss_was_logged(corpus):
    assert seqgpt(*RUN, "--max_steps", 11, "--eval_steps", 10, cwd=corpus, bare=True).returncode == 0
    strict = lambda name: pytest.fail(f"{name} in metrics.json")
    for name in ("best_model", "final_model"): json.loads((corpus/"outputs"/name/"metrics.json").read_text(), parse_constant=strict)


def test_evaluate_says_what_it_cut_off_and_left_out(trained, tmp_path):
    write_lines(tmp_path, [{"tokens": NOTES*10}, {"tokens": ["H4"]}, {"tokens": NOTES}])
    ask = lambda *args: seqgpt("evaluate", "--model_path", trained/"outputs/best_model", "--data_path", "data.jsonl", *args, cwd=tmp_path, drawn=False)
    refused(ask("--out_dir", "e"), "1 of 3 lines", "--skip_bad_lines")
    result = ask("--out_dir", "e", "--skip_bad_lines")
    assert result.returncode == 0 and "36 tokens cut off" in result.stdout and "1 bad line left out" in result.stdout
    refused(ask("--out_dir", "f", "--skip_bad_lines", "--batch_size", 0), "batch_size is 0")


def test_folders_that_are_not_models(trained, tmp_path):
    ask = lambda: seqgpt("infer", "--model_path", "m", cwd=tmp_path)
    refused(seqgpt("infer", "--model_path", "outputs", cwd=trained), "no config.json", "outputs/best_model")
    shutil.copytree(trained/"outputs/final_model", tmp_path/"m")
    (tmp_path/"m/config.json").write_text('{"model_type": "bert"}')
    refused(ask(), "type 'bert'")
    (tmp_path/"m/config.json").write_text("{")
    refused(ask(), "config.json")
    shutil.copy(trained/"outputs/final_model/config.json", tmp_path/"m")
    for name in ("tokenizer_config.json", "special_tokens_map.json"): (tmp_path/"m"/name).unlink()
    refused(ask(), "tokenizer_config.json")
    (tmp_path/"m/tokenizer.json").unlink()
    refused(ask(), "no tokenizer.json")
    (tmp_path/"m/model.safetensors").write_bytes(b"x"*100)
    refused(ask(), "cannot be opened")


def test_evaluate_refuses_changed_data(finished):
    with open(finished/"data.jsonl", "a") as f: f.write('{"tokens": ["C4"]}\n')
    refused(seqgpt("evaluate", "--model_path", "outputs/best_model", cwd=finished), "has changed since the training", "--data_path")
    refused(seqgpt("infer", "--model_path", "outputs/best_model", "--mode", "generate", "--num_prompts", 2, cwd=finished), "has changed since the training", "--prompt_file")
    refused(seqgpt("evaluate", "--model_path", "nowhere", cwd=finished), "nowhere", "outputs/best_model")


# --- infer

def test_generate_continues_and_repeats_with_the_seed(trained, tmp_path):
    ask = lambda *args: seqgpt("infer", "--model_path", trained/"outputs/best_model", "--mode", "generate", *args, cwd=tmp_path)
    one, again, other = (ask("--prompt", "C4 D4", "--num_samples", 5, "--seed", s) for s in (1, 1, 2))
    assert one.returncode == 0, one.stderr
    assert one.stdout == again.stdout != other.stdout
    assert all(line.split()[:2] == ["C4", "D4"] and set(line.split()) <= set(NOTES) for line in one.stdout.splitlines()) and len(one.stdout.splitlines()) == 5
    greedy = [ask("--temperature", 0, "--prompt", "C4", "--seed", s).stdout for s in (1, 2)]
    assert greedy[0] == greedy[1]
    result = ask("--prompt_file", trained/"data.jsonl", "--num_prompts", 3, "--num_samples", 2, "--out_dir", tmp_path/"s")
    rows = [json.loads(line) for line in (tmp_path/"s/samples.jsonl").read_text().splitlines()]
    assert result.returncode == 0 and len(rows) == 6 and {"label", "tokens", "given", "finished"} == rows[0].keys()
    assert "Only the first" not in result.stderr # which was asked for
    refused(ask("--prompt", "C4", "--out_dir", tmp_path/"s"), "is there already")


def test_samples_keep_the_other_fields_and_what_is_cut_is_counted(trained, tmp_path):
    lines = [{"id": k, "tokens": t, "note": {"of": t[0]}} for k, t in enumerate([["C4"]*14, ["D4"], ["C4", "E4"], ["C4"]*15])]
    write_lines(tmp_path, lines + lines[1:2]*4)
    command = "--mode generate --prompt_file data.jsonl --prompt_share 1 --min_new_tokens 13 --num_samples 2 --seed 0 --out_dir s"
    ask = lambda *args: seqgpt("infer", "--model_path", trained/"outputs/best_model", *command.split(), *args, cwd=tmp_path)
    refused(ask(), "1 of 7 lines", "longer than the 16 positions of the model: 1, at line 4 (17 tokens)", "--skip_bad_lines")
    result = ask("--skip_bad_lines")
    rows = [json.loads(line) for line in open(tmp_path/"s/samples.jsonl")]
    assert [(r["id"], r["note"]) for r in rows] == [(k, lines[k]["note"]) for k in (0, 0, 1, 1, 2, 2, *[1]*6)]
    assert [r["tokens"][:r["given"]] for r in rows] == [lines[r["id"]]["tokens"] for r in rows]
    for r in rows:
        assert len(r["tokens"]) - r["given"] == (13 if r["finished"] else {0: 1, 1: 14, 2: 13}[r["id"]]), r # each has its own room
    cut = sum(not r["finished"] for r in rows)
    assert "1 bad line left out" in result.stderr and "Only the first 6 sequences of data.jsonl; take" in result.stderr
    assert f"{cut} of 12 sequences cut off: the model has 16 positions." in result.stderr and cut >= 4


def test_num_prompts_takes_validation_sequences(trained, tmp_path):
    result = seqgpt("infer", "--model_path", "outputs/best_model", "--mode", "generate", "--num_prompts", 5, "--prompt_share", 1, "--max_new_tokens", 1, cwd=trained)
    lines, split = [json.loads(line)["tokens"] for line in open(trained/"data.jsonl")], json.loads((trained/"outputs/split.json").read_text())
    assert result.returncode == 0, result.stderr
    for printed, k in zip(result.stdout.splitlines(), split["validation"]): assert printed.split()[:len(lines[k])] == lines[k]


def test_without_a_seed_samples_differ(trained):
    from seqgpt.inference import generate
    from seqgpt.model import load_model
    from seqgpt.tokenizer import load_tokenizer
    model, tokenizer = load_model(trained/"outputs/best_model"), load_tokenizer(trained/"outputs/best_model")
    assert generate(model, tokenizer, num_samples=10) != generate(model, tokenizer, num_samples=10)


def test_a_closed_pipe_is_no_error(trained):
    "As behind `seqgpt infer ... | head`, when head has ended."
    from seqgpt.cli import main
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.chdir(trained), os.fdopen(writer, "w") as pipe, contextlib.redirect_stdout(pipe), contextlib.redirect_stderr(io.StringIO()) as err:
        code = main("infer --model_path outputs/best_model --mode generate --num_samples 3 --max_new_tokens 3".split())
        pipe.write("more") # nor is what the interpreter writes at its end
    assert code == 0 and err.getvalue() == ""


def test_infer_mistakes(trained):
    ask = lambda *args: seqgpt("infer", "--model_path", "outputs/best_model", *args, cwd=trained)
    refused(ask("--mode", "generate", "--prompt", "C4 D5"), "Symbol 2", "'D5'", "Did you mean")
    refused(ask("--mode", "generate", "--prompt", " ".join(["C4"]*20)), "no room")
    refused(ask("--mode", "generate", "--top_p", "2"), "top_p is 2")
    refused(ask("--mode", "classfy"), "mode")
    refused(ask("--mode", "generate", "--prompt_file", "none.jsonl"), "none.jsonl")
    refused(ask("--mode", "generate", "--prompt", "C4D4"), "'C4D4'")
    refused(ask("--mode", "generate", "--prompt", "C4 <eos>"), "'<eos>', is out of place")
    refused(ask("--mode", "generate", "--num_prompts", "-3"), "num_prompts is -3")
    refused(ask("--mode", "generate", "--num_prompts", "3", "--prompt", "C4"), "one of --prompt")
    refused(ask("--top", "0"), "top is 0")
    refused(ask("--prompt_file", "data.jsonl"), "--prompt_file is of no use", "--mode generate")
    refused(ask("--mode", "generate", "--min_new_tokens", "3", "--max_new_tokens", "2"), "min_new_tokens is 3", "at most max_new_tokens")
    refused(ask("--mode", "generate", "--out_dir", "data.jsonl"), "data.jsonl")
    refused(seqgpt("infer", cwd=trained), "model_path")


def test_interactive_shows_bars_and_takes_symbols(trained):
    result = seqgpt("infer", "--model_path", "outputs/best_model", "--top", 3, cwd=trained, input="C4 D4\nH9\n\n/sample\n/back\n/clear\n/quit\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("█") and "2 symbols: C4 D4" in result.stdout and "'H9', is not in the vocabulary" in result.stdout
    assert seqgpt("infer", "--model_path", "outputs/best_model", cwd=trained, input="").returncode == 0
    full = seqgpt("infer", "--model_path", "outputs/best_model", "--prompt", " ".join(["C4"]*14), cwd=trained, input="/sample\n/sample\n/sample\n")
    assert full.returncode == 0 and "The sequence has ended" in full.stdout, full.stderr # 16 positions, one of them for <bos>


def test_interactive_shows_what_the_model_says_whatever_was_typed_before(trained):
    from seqgpt.inference import next_tokens, text_bars
    from seqgpt.model import load_model
    from seqgpt.tokenizer import load_tokenizer
    model, tokenizer = load_model(trained/"outputs/best_model"), load_tokenizer(trained/"outputs/best_model")
    typed = ["E4 F4 G4", "H9", "C4", "/back", "/back", "G4 F4 E4", "/clear", "D4", "C4 <eos>", "F4", "/what", "G4"]
    shown = ["C4", "C4 E4 F4 G4", "C4 E4 F4 G4", "C4 E4 F4 G4 C4", "C4 E4 F4 G4", "C4 E4 F4", "C4 E4 F4 G4 F4 E4", "", "D4", "D4", "D4 F4", "D4 F4", "D4 F4 G4"]
    result = seqgpt("infer", "--model_path", "outputs/best_model", "--prompt", "C4", "--top", 9, cwd=trained, input="\n".join([*typed, "/quit", ""]))
    found = re.findall(r"^\d+ symbols?.*\n((?:.*%.*\n)+)", result.stdout, re.M)
    assert result.returncode == 0 and len(found) == len(shown), result.stdout
    for bars, symbols in zip(found, shown): assert bars.strip() == text_bars(next_tokens(model, tokenizer, symbols, 9)).strip(), symbols


def test_interactive_rolls_the_dice_of_the_seed(trained):
    ask = lambda seed: seqgpt("infer", "--model_path", "outputs/best_model", "--seed", seed, cwd=trained, input="/sample\n"*12).stdout
    assert ask(1) == ask(1) != ask(2)


# --- runs in each other's way, interrupted runs

def files(folder): return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_never_overwrites_unless_told(finished):
    before = files(finished/"outputs")
    refused(seqgpt(*RUN, "--max_steps", 2, cwd=finished), "outputs", "--resume", "--overwrite", "--output_dir")
    refused(seqgpt(*RUN, "--overwrite", "--n_head", 3, cwd=finished), "n_embd (16) is not divisible by n_head (3)")
    assert files(finished/"outputs") == before
    assert seqgpt(*RUN, "--max_steps", 3, "--overwrite", cwd=finished, bare=True).returncode == 0
    assert json.loads((finished/"outputs/final_model/metrics.json").read_text())["step"] == 3


def test_resume_refuses_what_does_not_fit(finished):
    refused(seqgpt(*RUN, "--max_steps", 40, "--resume", "--n_layer", 2, cwd=finished), "n_layer (was 1, is 2)")
    refused(seqgpt(*RUN, "--resume", "--overwrite", cwd=finished), "one of")
    with open(finished/"data.jsonl", "a") as f: f.write('{"tokens": ["C4"]}\n')
    refused(seqgpt(*RUN, "--max_steps", 40, "--resume", cwd=finished), "the data")


def test_finished_runs_are_left_alone(finished):
    before = files(finished/"outputs")
    refused(seqgpt(*RUN, "--num_epochs", 2, "--resume", cwd=finished), "finished, after 20 steps", "--num_epochs")
    assert files(finished/"outputs") == before
    assert seqgpt(*RUN, "--max_steps", 21, "--resume", cwd=finished, bare=True).returncode == 0
    shutil.rmtree(finished/"outputs/checkpoints")
    refused(seqgpt(*RUN, "--max_steps", 22, "--resume", cwd=finished), "no checkpoint to go on from", "--overwrite")


def test_no_other_run_begins_before_the_evaluation_has_ended(corpus, monkeypatch):
    cli = importlib.import_module("seqgpt.cli")
    show, seen = cli.show_run, []
    def other(config, run):
        refused(seqgpt(*RUN, "--max_steps", 2, "--overwrite", cwd=corpus), "another run is writing there")
        seen.append(show(config, run))
    monkeypatch.setattr(cli, "show_run", other)
    assert seqgpt(*RUN, "--max_steps", 2, cwd=corpus, drawn=False).returncode == 0 and seen == [None] and (corpus/"outputs/samples.jsonl").exists()


def test_places_that_cannot_be(corpus):
    refused(seqgpt(*RUN, "--output_dir", "", cwd=corpus), "output_dir is empty")
    (corpus/"file").touch()
    refused(seqgpt(*RUN, "--output_dir", "file", cwd=corpus), "file")
    refused(seqgpt("train", "--data_path", ".", "--output_dir", ".", cwd=corpus), "is the folder of the data")
    refused(seqgpt("corpus", "digits", "--out_dir", "file", cwd=corpus), "file")
    refused(seqgpt("train", "--learning_rate", "-1", "--output_dir", "digits", cwd=corpus), "learning_rate")
    assert not (corpus/"digits").exists()


def test_resume_with_nothing_to_resume_starts(corpus):
    result = seqgpt(*RUN, "--max_steps", 2, "--resume", cwd=corpus, bare=True)
    assert result.returncode == 0 and "starting from the beginning" in result.stdout


def test_diverging_run_stops_with_advice_and_keeps_the_best(corpus):
    result = seqgpt(*RUN, "--num_epochs", 50, "--learning_rate", 1e12, "--precision", "fp32", "--max_grad_norm", 1e30, "--eval_steps", 1, "--warmup_steps", 1, cwd=corpus, bare=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr and "--learning_rate" in result.stderr, result.stderr
    assert GPT2LMHeadModel.from_pretrained(corpus/"outputs/best_model")


# --- flags and files of settings

def test_yaml_and_flags(corpus):
    (corpus/"mine.yaml").write_text("data_path: data.jsonl\nlearning_rate: 3e-4\nmax_steps: 2\nn_layer: 1\nn_head: 2\nn_embd: 16\nmax_length: 16\nmodel:\n  resid_pdrop: 0.25\n")
    result = seqgpt("train", "--config", "mine.yaml", "--n_embd", 32, "--model.embd_pdrop", "5e-1", cwd=corpus, bare=True)
    assert result.returncode == 0, result.stderr
    saved, model = yaml.safe_load((corpus/"outputs/best_model/config.yaml").read_text()), json.loads((corpus/"outputs/best_model/config.json").read_text())
    assert saved["learning_rate"] == 3e-4 and (model["n_embd"], model["resid_pdrop"], model["embd_pdrop"]) == (32, 0.25, 0.5)


@pytest.mark.parametrize("args, words", [
    (["--learning_rat", "1"], ["'learning_rat'", "Did you mean --learning_rate"]), (["--batch_size", "many"], ["batch_size", "int"]),
    (["--precision", "int8"], ["auto, fp32, bf16, fp16"]), (["--num_epochs", "0"], ["num_epochs"]), (["--learning_rate", "nan"], ["learning_rate"]),
    (["--learning_rate", "-1"], ["learning_rate"]), (["--learning_rate", "-1e-3"], ["learning_rate is -0.001"]), (["--weight_decay", "-.5"], ["weight_decay is -0.5"]), (["--n_head", "5"], ["not divisible"]), (["--model.resid_drop", "1"], ["Did you mean 'resid_pdrop'"]),
    (["--model.resid_pdrop", "high"], ["resid_pdrop"]), (["--long", "cut"], ["truncate, split or error"]), (["--max_length", "1"], ["max_length"]),
    (["--data_path", "none.jsonl"], ["none.jsonl", "no such file or folder"]), (["--vocab_path", "none.json"], ["none.json", "--vocab_path"]), (["--config", "none.yaml"], ["none.yaml"]),
    (["--validation_fraction", "1"], ["validation_fraction"]), (["--lr_scheduler_type", "cosin"], ["cosin"]), (["stray"], ["stray"]),
    (["--model.activation_function", "gulu"], ["gulu"]), (["--lr_scheduler_type", "cosine_with_min_lr"], ["min_lr"]), (["--model.resid_pdrop", "2"], ["dropout"]),
    (["--model.n_layer", "3"], ["--n_layer"]), (["--seed", "99999999999999"], ["seed"]), (["--max_steps", "0"], ["max_steps"]), (["--config", "quik"], ["presets are: classify, quick"]),
    (["--data_path", "nowhere"], ["nowhere", "no such file or folder"]), (["--cache_dir", "data.jsonl"], ["data.jsonl"]), (["--seed", "x"], ["seed", "int"]),
])
def test_mistakes_in_flags_are_refused_and_nothing_is_written(args, words, corpus):
    refused(seqgpt(*RUN, *args, cwd=corpus), *words)
    assert not (corpus/"outputs").exists()


def test_misspelt_key_in_a_file(corpus):
    (corpus/"mine.yaml").write_text("learning_rat: 1\n")
    refused(seqgpt("train", "--config", "mine.yaml", cwd=corpus), "'learning_rat'", "--learning_rate")


USED_ELSEWHERE = {
    "block_size": "--max_length", "lr": "--learning_rate", "epochs": "--num_epochs", "bf16": "--precision bf16", "fp16": "--precision fp16",
    "dropout": "--model.resid_pdrop, --model.embd_pdrop and --model.attn_pdrop", "per_device_train_batch_size": "--batch_size",
    "resume_from_checkpoint": "--resume", "max_iters": "--max_steps", "grad_clip": "--max_grad_norm", "d_model": "--n_embd",
    "num_train_epochs": "--num_epochs", "warmup_ratio": "--warmup_steps", "accumulate_grad_batches": "--gradient_accumulation_steps"}


@pytest.mark.parametrize("name, ours", USED_ELSEWHERE.items())
def test_names_of_other_tools_get_a_hint(name, ours, corpus):
    said = f"there is no setting '{name}'. Did you mean {ours}?"
    refused(seqgpt("train", f"--{name}", 1, cwd=corpus), said)
    (corpus/"mine.yaml").write_text(f"{name}: 1\n")
    refused(seqgpt("train", "--config", "mine.yaml", cwd=corpus), said)


def test_hints_name_settings_that_are_there(corpus):
    from seqgpt.cli import USUAL, VERBS, nearest
    flags = {}
    for verb in VERBS:
        help = seqgpt(*verb.split(), "--help", cwd=corpus).stdout
        flags[verb] = [*dict.fromkeys(re.findall(r"^  --(\w+)", help, re.M))]
    known = {name for names in flags.values() for name in names}
    for ours, theirs in USUAL.items():
        assert re.split("[ .]", ours)[0] in known, ours
        for name in theirs.split(): assert any(nearest(name, [n for n in names if n != name]) for names in flags.values()), name
    assert nearest("max_length", flags["infer"]) == "max_new_tokens" and nearest("out_dir", flags["train"]) == "output_dir"


BOTH = {"train": ("n_embd", 32, 16), "infer": ("top", 3, 4), "evaluate": ("batch_size", 3, 4), "serve": ("port", 3, 4), "bench": ("rounds", 3, 4),
        "export": ("data_path", "a", "b"), "corpus digits": ("image_size", 8, 9), "corpus markov": ("order", 1, 2), "corpus labelled": ("seed", 3, 4)}


@pytest.mark.parametrize("verb, case", BOTH.items())
def test_a_flag_wins_wherever_it_is(verb, case, tmp_path):
    name, flag, in_file = case
    (tmp_path/"mine.yaml").write_text(f"{name}: {in_file}\n")
    for words in (f"--{name} {flag} --config mine.yaml", f"--config mine.yaml --{name} {flag}", f"--{name}={flag} --config=mine.yaml"):
        result = seqgpt(*verb.split(), *words.split(), *["--model_path", "m"]*(verb in ("infer", "evaluate", "export")),
                        *["--out_dir", "o"]*verb.startswith("corpus"), *["--data_path", "d"]*(verb == "corpus labelled"), "--print_config", cwd=tmp_path)
        assert result.returncode == 0 and yaml.safe_load(result.stdout)[name] == flag, result.stdout + result.stderr


def test_of_two_files_the_later_one_wins_and_fields_of_the_model_add_up(corpus, monkeypatch):
    (corpus/"a.yaml").write_text("n_embd: 16\nn_head: 4\nmodel: {n_inner: 24, resid_pdrop: 1e-1}\n")
    (corpus/"b.yaml").write_text("n_head: 2\nmodel: {layer_norm_epsilon: 1e-6, resid_pdrop: 2e-1}\n")
    given = []
    monkeypatch.setattr("seqgpt.cli.train_command", lambda config, named: given.append(config))
    result = seqgpt("train", "--model.embd_pdrop", 0, "--n_layer", 1, "--config", "a.yaml", "--data_path", "data.jsonl", "--config=b.yaml", cwd=corpus)
    assert result.returncode == 0, result.stderr
    config, = given
    assert (config.n_layer, config.n_embd, config.n_head) == (1, 16, 2)
    assert config.model == {"n_inner": 24, "resid_pdrop": 0.2, "layer_norm_epsilon": 1e-6, "embd_pdrop": 0}


def test_settings_from_numpy_pytorch_and_pathlib(tmp_path):
    from seqgpt.config import Config, read_config
    from seqgpt.corpora import make_markov, write_markov
    from seqgpt.training import write_config
    odd = Config(data_path=tmp_path/"d", output_dir=tmp_path/"o", max_length=np.int64(16), n_layer=torch.tensor(1), resume=np.bool_(True), learning_rate=np.float32(0.25),
                 weight_decay=np.float64(0.5), num_epochs=np.int32(2), precision=np.str_("fp32"), model={"n_inner": np.int64(24), "resid_pdrop": np.float32(0.5)})
    own = Config(data_path=f"{tmp_path}/d", output_dir=f"{tmp_path}/o", max_length=16, n_layer=1, resume=True, learning_rate=0.25,
                 weight_decay=0.5, num_epochs=2, precision="fp32", model={"n_inner": 24, "resid_pdrop": 0.5})
    types = lambda config: {name: type(value) for name, value in [*vars(config).items(), *config.model.items()]}
    assert odd == own and types(odd) == types(own)
    write_config(odd, tmp_path/"odd.yaml")
    assert yaml.safe_load((tmp_path/"odd.yaml").read_text())["model"] == own.model and read_config(tmp_path/"odd.yaml").n_layer == 1
    numbers = dict(symbols=4, branching=2, classes=1, min_length=4, max_length=6)
    write_markov(tmp_path/"a", make_markov(**numbers), 2)
    write_markov(tmp_path/"b", make_markov(**{name: np.int64(n) for name, n in numbers.items()}), np.int64(2))
    assert (tmp_path/"a/source.json").read_text() == (tmp_path/"b/source.json").read_text()
    for wrong in (dict(n_layer=np.float64(1.5)), dict(n_layer=np.bool_(True)), dict(resume=np.int64(1)), dict(n_layer=np.array([1, 2])), dict(task=tmp_path)):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} is"): Config(**wrong)


# --- paths

TYPED_WRONG = """train --data_path nowhere
train --validation_path=nowhere --resume
train --data_path vocab.json --vocab_path nowhere
train --init_from nowhere
train --config nowhere
train --lr 1
train --n_layer one
evaluate --model_path nowhere
evaluate --model_path m --data_path nowhere
evaluate --model m
infer --model_path nowhere
infer --model_path m --mode generate --prompt_file nowhere
infer --mode sing
export --model_path nowhere
export --model_path m --data_path nowhere
serve --model_path nowhere
serve --classifier_path nowhere
corpus labelled --out_dir o --data_path nowhere
corpus digits --out_dir o --config nowhere
corpus digits --image_siz 8
corpus markov --out_dir o --config nowhere
bench --config nowhere"""


def test_mistyped_paths_and_flags_are_seen_before_pytorch_is_imported(tmp_path):
    write_lines(tmp_path, [])
    (tmp_path/"m").mkdir()
    (tmp_path/"m/config.json").touch()
    code = f"""import sys
from seqgpt.cli import main
for line in {TYPED_WRONG.splitlines()!r}:
    code = main(line.split())
    slow = {{"torch", "transformers", "datasets", "numpy"}} & sys.modules.keys()
    if code != 2 or slow: sys.exit(f"{{line}}: {{code}}, {{slow}}")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = result.stderr.splitlines()
    assert len(said) == len(TYPED_WRONG.splitlines()) == sum("nowhere" in line or "Did you mean" in line or "expected" in line for line in said), result.stderr


def test_a_path_means_one_place(melodies, tmp_path, monkeypatch):
    "The home folder, whoever expands `~`: the shell, which leaves it in `--flag=~/x`, the library or one that it uses."
    from seqgpt.config import Config
    home, here = tmp_path/"home", tmp_path/"here"
    write_lines(home/"data", [{"tokens": t, "label": l} for t, l in melodies[:40]])
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (here/"mine.yaml").write_text("output_dir: ~/run\ndata_path: ~/data\ncache_dir: ~/cache\n")
    (home/"home.yaml").write_text("max_steps: 2\nmax_length: 16\n")
    ask = lambda *words: seqgpt(*words, cwd=here, drawn=False)
    for words in (["train", "--config", "mine.yaml", "--config=~/home.yaml", "--vocab_path=~/data/vocab.json", *TINY],
                  ["train", "--init_from=~/run/best_model", "--output_dir=~/next", "--validation_path=~/data", "--cache_dir=~/cache", "--max_steps", 1, "--batch_size", 8],
                  ["evaluate", "--model_path=~/run/best_model", "--data_path=~/data", "--out_dir=~/e", "--num_samples", 2, "--cache_dir=~/cache"],
                  ["infer", "--model_path=~/run/best_model", "--mode", "generate", "--prompt_file=~/data", "--out_dir=~/i", "--cache_dir=~/cache"],
                  ["corpus", "labelled", "--data_path=~/data", "--vocab_path=~/data/vocab.json", "--out_dir=~/l"], ["corpus", "digits", "--out_dir=~/d", "--image_size", 8]):
        result = ask(*words)
        assert result.returncode == 0, result.stderr
    assert {"data", "home.yaml", "run", "next", "cache", "e", "i", "l", "d"} <= {p.name for p in home.iterdir()}
    assert {"checkpoints", "best_model", "config.yaml"} <= {p.name for p in (home/"run").iterdir()}
    assert Config("~/data", cache_dir="~/cache").cache_dir == str(home/"cache")
    refused(ask("evaluate", "--model_path=~/nothing"), f"{home}/nothing: no config.json there")
    assert [p.name for p in here.iterdir()] == ["mine.yaml"]


def test_functions_expand_paths_too(trained, tmp_path, monkeypatch):
    import seqgpt.corpora as corpora
    import seqgpt.data as data
    import seqgpt.evaluation as evaluation
    import seqgpt.model as model
    import seqgpt.tokenizer as tokenizer
    import seqgpt.training as training
    monkeypatch.setenv("HOME", str(shutil.copytree(trained, home := tmp_path/"home")))
    (tmp_path/"here").mkdir()
    monkeypatch.chdir(tmp_path/"here")
    t, m = tokenizer.load_tokenizer("~/outputs/best_model"), model.load_model("~/outputs/best_model")
    assert len(tokenizer.make_tokenizer("~/vocab.json")) == len(tokenizer.read_vocab("~/vocab.json")) == len(t)
    assert model.task_of("~/outputs/best_model") == "clm" and corpora.load_source("~/data.jsonl") is None
    assert len(data.read_corpus("~/data.jsonl", t, cache_dir="~/c").dataset) == len([*data.read_lines("~/data.jsonl")]) == 200
    assert data.find_vocab("~/data.jsonl").exists() and data.corpus_files("~/data.jsonl")[0].exists()
    config = training.read_config("~/outputs/config.yaml")
    assert len(evaluation.evaluation_data("~/outputs/best_model", t, 16, "~/data.jsonl", cache_dir="~/c")[0]) == 200
    training.write_config(config, "~/w/config.yaml")
    training.save_model("~/w/model", m, t, config, {"perplexity": 2.0})
    tokenizer.save_tokenizer(t, "~/w/tokenizer")
    data.write_corpus("~/w/corpus", [["a"]], [0])
    data.write_labelled("~/w/labelled", "~/w/corpus")
    corpora.write_digits("~/w/digits", 4)
    assert len(corpora.load_images("~/w/digits")) == 1797
    corpora.write_markov("~/w/markov", corpora.make_markov(symbols=4, branching=2, classes=1, min_length=4, max_length=6), 2)
    assert corpora.load_source("~/w/markov") is not None
    assert {p.name for p in (home/"w").iterdir()} == {"config.yaml", "model", "tokenizer", "corpus", "labelled", "digits", "markov"}
    with pytest.raises(InputError, match="is there already"): data.write_corpus("~/w/corpus", [["a"]])
    assert not [*(tmp_path/"here").iterdir()]


def test_help_and_verbs(tmp_path):
    assert "corpus" in installed("--help", cwd=tmp_path).stdout and seqgpt(cwd=tmp_path).returncode == 0
    help = seqgpt("train", "--help", cwd=tmp_path)
    assert help.returncode == 0 and "Longest sequence in tokens" in help.stdout
    refused(installed("trian", cwd=tmp_path), "Did you mean 'train'")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", seqgpt("--version", cwd=tmp_path).stdout)


# --- the digits, and the scripts under their original names

def test_digits_corpus(tmp_path):
    assert seqgpt("corpus", "digits", "--out_dir", "d", cwd=tmp_path).returncode == 0
    assert len(json.loads((tmp_path/"d/vocab.json").read_text())) == 516
    line = json.loads((tmp_path/"d/sequences.jsonl").open().readline())
    assert len(line["tokens"]) == 256 and line["label"] == 0
    refused(seqgpt("corpus", "digits", "--out_dir", "d", cwd=tmp_path), "is there already")
    refused(seqgpt("corpus", "digit", "--out_dir", "e", cwd=tmp_path), "digits")


def test_without_data_the_digits_are_learned(tmp_path):
    result = seqgpt("train", "--max_steps", 1, "--max_length", 258, *TINY, cwd=tmp_path, bare=True)
    assert result.returncode == 0 and "1,797 sequences" in result.stdout, result.stderr
    assert len(json.loads((tmp_path/"outputs/data/vocab.json").read_text())) == 516


def test_scripts_under_their_original_names(tmp_path, monkeypatch, capsys):
    def run(name, flags):
        monkeypatch.setattr(sys, "argv", [name, *flags.split()])
        with pytest.raises(SystemExit) as end: runpy.run_path(str(ROOT/name), run_name="__main__")
        assert end.value.code == 0
    monkeypatch.chdir(tmp_path)
    write_digits(tmp_path/"d", 8)
    lines = (tmp_path/"d/sequences.jsonl").read_text().splitlines(True)
    (tmp_path/"d/sequences.jsonl").write_text("".join(lines[:100]))
    size = "--max_length 66 --n_layer 1 --n_head 2 --n_embd 16"
    run("train_gpt.py", f"--data_path d --max_steps 2 --batch_size 4 --num_epochs 1 --learning_rate 1e-3 --eval_steps 1 {size}")
    assert (tmp_path/"outputs/samples.png").exists()
    capsys.readouterr()
    run("inference.py", "--model_path outputs/best_model --mode generate --max_new_tokens 5")
    assert capsys.readouterr().out.startswith("r")


# --- messages

def definitions():
    "For each function and class of the package: those that it names, and the texts in it that name a flag."
    found, definition = {}, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for path in (ROOT/"seqgpt").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        ours = lambda n: isinstance(n, ast.ImportFrom) and n.module and (n.level or n.module.startswith("seqgpt."))
        taken = lambda nodes: {a.asname or a.name: (n.module.removeprefix("seqgpt."), a.name)
                               for n in nodes if ours(n) for a in n.names}
        known = {n.name: (path.stem, n.name) for n in tree.body if isinstance(n, definition)} | taken(tree.body)
        for body in tree.body:
            if not isinstance(body, definition): continue
            nodes = [*ast.walk(body)]
            names = known | taken(nodes)
            joined = {id(part) for n in nodes if isinstance(n, ast.JoinedStr) for part in n.values}
            fixed = lambda n: "".join(part.value for part in n.values if isinstance(part, ast.Constant))
            texts = [fixed(n) for n in nodes if isinstance(n, ast.JoinedStr)]
            constants = [n for n in nodes if isinstance(n, ast.Constant) and id(n) not in joined]
            texts += [n.value for n in constants if isinstance(n.value, str)]
            named = {names[n.id] for n in nodes if isinstance(n, ast.Name) and n.id in names}
            found[path.stem, body.name] = named, [t for t in texts if re.search(r"--[a-z]", t)]
    return found


def reached(found, start, passed):
    "All that `start` calls, and so on, without what is in `passed`."
    seen, left = set(), [*start]
    while left:
        one = left.pop()
        if one in seen or one in passed or one not in found: continue
        seen.add(one)
        left += found[one][0]
    return seen


def test_every_flag_that_a_message_names_is_one_of_the_verb_that_says_it():
    "Or the message names the verb that has it, as in `seqgpt train --learning_rate`."
    from seqgpt.cli import LESS, VERBS
    from seqgpt.training import Config
    cli, found = importlib.import_module("seqgpt.cli"), definitions()
    starts = {verb: {"train": "train_command"}.get(verb, verb.replace(" ", "_")) for verb in VERBS if verb != "bench"}
    more = {"train": [Config], "corpus markov": [importlib.import_module("seqgpt.corpora").make_markov]}
    takes = lambda verb: (inspect.signature(t).parameters for t in [getattr(cli, starts[verb]), *more.get(verb, [])])
    flags = {verb: {"config"}.union(*takes(verb)) for verb in starts}
    others = {"logdir", "nnodes", "nproc_per_node", "fsdp_version"} # of TensorBoard, torchrun and Accelerate
    quoted = {("training", "load_data"), ("training", "check_config")} # `training_split` says what `seqgpt train` would say
    with_path = {"train", "corpus labelled"} # where a vocabulary is read from a file that the user names
    wrong, walked = [], set()
    for verb, name in starts.items():
        passed = set() if verb == "train" else quoted
        if verb not in with_path: passed = passed | {("tokenizer", "read_vocab")}
        for place in reached(found, [("cli", name), ("cli", "explain")], passed):
            for text in found[place][1] + [LESS.get(verb, "")]*(place == ("cli", "explain")):
                named = re.findall(r"seqgpt ((?:corpus )?[a-z]+)", text)
                fine = flags[verb].union(others, *(flags.get(verb, ()) for verb in named))
                walked |= {(place, text)}
                wrong += [(verb, place, flag, text) for flag in re.findall(r"--([a-z]\w*)", text) if flag not in fine]
    assert not wrong and len(walked) > 60, wrong
