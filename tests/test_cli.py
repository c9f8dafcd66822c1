"The installed command, as a user types it."
import ast
import contextlib
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
from conftest import NOTES, ROOT, TINY, VOCAB, installed, read_json, read_lines, refused, seqgpt, write_lines
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    GPT2Tokenizer,
)

from seqgpt.checks import InputError
from seqgpt.config import Config, read_config, write_config
from seqgpt.corpora import write_digits
from seqgpt.encoding import read_corpus
from seqgpt.inference import generate, likeliest, next_logits, text_bars
from seqgpt.loading import load_model, task_of
from seqgpt.markov import load_source, make_markov, write_markov
from seqgpt.model import make_config, new_model
from seqgpt.prompts import encode_prompt
from seqgpt.reports import evaluation_data
from seqgpt.saving import save_model
from seqgpt.sources import corpus_files, find_vocab
from seqgpt.tokenizer import load_tokenizer
from seqgpt.writing import write_corpus, write_labelled

RUN = ["train", "--data_path", "data.jsonl", "--max_length", 16, *TINY]
BEST = "outputs/best_model"


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
    outputs = trained/"outputs"
    model = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
             "special_tokens_map.json", "vocab.json", "merges.txt", "config.yaml", "metrics.json", "README.md"}
    assert model <= {p.name for p in (outputs/"best_model").iterdir()}
    modes = {p.stat().st_mode for p in (outputs/"best_model").iterdir() if p.is_file()}
    assert len(modes) == 1 # if you may read one, you may read all
    assert model == {p.name for p in (outputs/"final_model").iterdir()}
    for name in ("training_curves.png", "samples.jsonl", "split.json", "config.yaml",
                 "best_model/evaluation/metrics.json", "best_model/evaluation/evaluation.png"):
        assert (outputs/name).stat().st_size > 0, name
    assert any((outputs/"runs").glob("events.out.tfevents.*"))
    assert not [*trained.rglob(".*.part"), *trained.rglob(".*.new")]
    split = read_json(outputs/"split.json")
    assert sorted(split["train"] + split["validation"]) == list(range(200)) and len(split["validation"]) == 40


def test_a_short_run_leaves_lines_in_a_file_and_no_bar(trained):
    assert (trained/"bars.txt").read_text() == ""
    assert (trained/"printed.txt").read_text().count("best so far") >= 1


def test_plain_transformers_opens_the_folder(trained):
    folder = trained/BEST
    text = "<bos> C4 E4 G4"
    model = AutoModelForCausalLM.from_pretrained(folder)
    auto = AutoTokenizer.from_pretrained(folder)
    ids = auto(text, return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[VOCAB[s] for s in text.split()]] and auto.decode(ids[0]) == text
    assert GPT2Tokenizer.from_pretrained(folder)(text)["input_ids"] == ids[0].tolist()
    same = GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad(): assert torch.equal(model(ids).logits, same(ids).logits)
    assert model.config.use_cache and model.generation_config.eos_token_id == VOCAB["<eos>"]
    assert auto.decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0]).startswith(text)


def test_printed_metrics_are_those_of_transformers(trained):
    metrics = read_json(trained/BEST/"evaluation/metrics.json")
    assert f"{metrics['perplexity']:.4g}" in (trained/"printed.txt").read_text()
    model = AutoModelForCausalLM.from_pretrained(trained/BEST).eval()
    lines = [line["tokens"] for line in read_lines(trained/"data.jsonl")]
    nats = right = n = nats_of_eos = 0
    for k in read_json(trained/"outputs/split.json")["validation"]:
        ids = torch.tensor([[1, *(VOCAB[s] for s in lines[k]), 2]])
        with torch.no_grad(): out = model(ids, labels=ids)
        predicted = ids.shape[1] - 1
        nats += out.loss.item()*predicted
        n += predicted
        right += (out.logits[0, :-1].argmax(-1) == ids[0, 1:]).sum().item()
        nats_of_eos -= out.logits[0, -2].log_softmax(-1)[VOCAB["<eos>"]].item()
    assert metrics["tokens"] == n and metrics["sequences"] == 40
    assert np.isclose(metrics["perplexity"], np.exp(nats/n), rtol=1e-5)
    assert np.isclose(metrics["accuracy"], right/n)
    assert np.isclose(metrics["nats_per_sequence"], nats/40, rtol=1e-5)
    assert np.isclose(metrics["bits_per_token"], nats/n/np.log(2), rtol=1e-5)
    assert metrics["tokens_without_eos"] == n - 40
    without_eos = np.exp((nats - nats_of_eos)/(n - 40))
    assert np.isclose(metrics["perplexity_without_eos"], without_eos, rtol=1e-5)


# --- evaluate

def test_evaluate(trained, tmp_path):
    result = seqgpt("evaluate", "--model_path", BEST, "--out_dir", tmp_path/"e", cwd=trained)
    assert result.returncode == 0 and "trigram" in result.stdout, result.stderr
    assert "baselines" in read_json(tmp_path/"e/metrics.json")
    write_lines(tmp_path/"other", [{"tokens": NOTES}, {"tokens": NOTES[::-1]}])
    flags = ["--data_path", tmp_path/"other/data.jsonl", "--out_dir", tmp_path/"o"]
    result = seqgpt("evaluate", "--model_path", trained/BEST, *flags, cwd=tmp_path, drawn=False)
    assert result.returncode == 0 and read_json(tmp_path/"o/metrics.json")["tokens"] == 12, result.stderr


def test_evaluate_replaces_no_other_evaluation(trained, tmp_path):
    shutil.copytree(trained/BEST, tmp_path/"m")
    own = (tmp_path/"m/evaluation/metrics.json").read_bytes()
    write_lines(tmp_path/"other", [{"tokens": NOTES}, {"tokens": NOTES[::-1]}])
    def ask(*args):
        flags = ["--model_path", "m", "--data_path", "other/data.jsonl", "--num_samples", 2, *args]
        return seqgpt("evaluate", *flags, cwd=tmp_path, drawn=False)
    assert ask().returncode == 0
    metrics = tmp_path/"m/evaluation_data/metrics.json"
    other = metrics.read_bytes()
    assert json.loads(other)["sequences"] == 2 and (tmp_path/"m/evaluation/metrics.json").read_bytes() == own
    refused(ask("--batch_size", 1), "m/evaluation_data/metrics.json: is there already", "--out_dir")
    refused(ask("--out_dir", "m"), "m/metrics.json: is there already")
    assert metrics.read_bytes() == other
    assert (tmp_path/"m/metrics.json").read_bytes() == (trained/BEST/"metrics.json").read_bytes()


def test_metrics_are_valid_json_even_where_no_loss_was_logged(corpus):
    assert seqgpt(*RUN, "--max_steps", 11, "--eval_steps", 10, cwd=corpus, bare=True).returncode == 0
    def strict(name): pytest.fail(f"{name} in metrics.json")
    for name in ("best_model", "final_model"):
        json.loads((corpus/"outputs"/name/"metrics.json").read_text(), parse_constant=strict)


def test_evaluate_says_what_it_cut_off_and_left_out(trained, tmp_path):
    write_lines(tmp_path, [{"tokens": NOTES*10}, {"tokens": ["H4"]}, {"tokens": NOTES}])
    def ask(*args):
        command = ["evaluate", "--model_path", trained/BEST, "--data_path", "data.jsonl", *args]
        return seqgpt(*command, cwd=tmp_path, drawn=False)
    refused(ask("--out_dir", "e"), "1 of 3 lines", "--skip_bad_lines")
    result = ask("--out_dir", "e", "--skip_bad_lines")
    assert result.returncode == 0 and "36 tokens cut off" in result.stdout and "1 bad line left out" in result.stdout
    refused(ask("--out_dir", "f", "--skip_bad_lines", "--batch_size", 0), "batch_size is 0")


def test_folders_that_are_not_models(trained, tmp_path):
    def ask(): return seqgpt("infer", "--model_path", "m", cwd=tmp_path)
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
    result = seqgpt("evaluate", "--model_path", BEST, cwd=finished)
    refused(result, "has changed since the training", "--data_path")
    result = seqgpt("infer", "--model_path", BEST, "--mode", "generate", "--num_prompts", 2, cwd=finished)
    refused(result, "has changed since the training", "--prompt_file")
    refused(seqgpt("evaluate", "--model_path", "nowhere", cwd=finished), "nowhere", "outputs/best_model")


# --- infer

def test_generate_continues_and_repeats_with_the_seed(trained, tmp_path):
    def ask(*args): return seqgpt("infer", "--model_path", trained/BEST, "--mode", "generate", *args, cwd=tmp_path)
    one, again, other = (ask("--prompt", "C4 D4", "--num_samples", 5, "--seed", s) for s in (1, 1, 2))
    assert one.returncode == 0, one.stderr
    assert one.stdout == again.stdout != other.stdout
    samples = [line.split() for line in one.stdout.splitlines()]
    assert len(samples) == 5
    assert all(sample[:2] == ["C4", "D4"] and set(sample) <= set(NOTES) for sample in samples)
    greedy = [ask("--temperature", 0, "--prompt", "C4", "--seed", s).stdout for s in (1, 2)]
    assert greedy[0] == greedy[1]
    flags = ["--num_prompts", 3, "--num_samples", 2, "--out_dir", tmp_path/"s"]
    result = ask("--prompt_file", trained/"data.jsonl", *flags)
    rows = read_lines(tmp_path/"s/samples.jsonl")
    assert result.returncode == 0 and len(rows) == 6
    assert {"label", "tokens", "given", "finished"} == rows[0].keys()
    assert "Only the first" not in result.stderr # which was asked for
    refused(ask("--prompt", "C4", "--out_dir", tmp_path/"s"), "is there already")


def test_samples_keep_the_other_fields_and_what_is_cut_is_counted(trained, tmp_path):
    tokens = [["C4"]*14, ["D4"], ["C4", "E4"], ["C4"]*15]
    lines = [{"id": k, "tokens": t, "note": {"of": t[0]}} for k, t in enumerate(tokens)]
    write_lines(tmp_path, lines + lines[1:2]*4)
    flags = """--mode generate --prompt_file data.jsonl --prompt_share 1 --min_new_tokens 13
               --num_samples 2 --seed 0 --out_dir s""".split()
    def ask(*args): return seqgpt("infer", "--model_path", trained/BEST, *flags, *args, cwd=tmp_path)
    long = "longer than the 16 positions of the model: 1, at line 4 (17 tokens)"
    refused(ask(), "1 of 7 lines", long, "--skip_bad_lines")
    result = ask("--skip_bad_lines")
    rows = read_lines(tmp_path/"s/samples.jsonl")
    assert [(r["id"], r["note"]) for r in rows] == [(k, lines[k]["note"]) for k in (0, 0, 1, 1, 2, 2, *[1]*6)]
    assert [r["tokens"][:r["given"]] for r in rows] == [lines[r["id"]]["tokens"] for r in rows]
    room = {0: 1, 1: 14, 2: 13} # each has its own
    for r in rows: assert len(r["tokens"]) - r["given"] == (13 if r["finished"] else room[r["id"]]), r
    cut = sum(not r["finished"] for r in rows)
    assert "1 bad line left out" in result.stderr
    assert "Only the first 6 sequences of data.jsonl; take" in result.stderr
    assert f"{cut} of 12 sequences cut off: the model has 16 positions." in result.stderr and cut >= 4


def test_num_prompts_takes_validation_sequences(trained, tmp_path):
    flags = ["--mode", "generate", "--num_prompts", 5, "--prompt_share", 1, "--max_new_tokens", 1]
    result = seqgpt("infer", "--model_path", BEST, *flags, cwd=trained)
    lines = [line["tokens"] for line in read_lines(trained/"data.jsonl")]
    held_out = read_json(trained/"outputs/split.json")["validation"]
    assert result.returncode == 0, result.stderr
    for printed, k in zip(result.stdout.splitlines(), held_out):
        assert printed.split()[:len(lines[k])] == lines[k]


def test_without_a_seed_samples_differ(trained):
    model = load_model(trained/BEST)
    tokenizer = load_tokenizer(trained/BEST)
    assert generate(model, tokenizer, num_samples=10) != generate(model, tokenizer, num_samples=10)


def test_a_closed_pipe_is_no_error(trained):
    "As with `seqgpt infer ... | head`, when head has ended."
    from seqgpt.cli import main
    reader, writer = os.pipe()
    os.close(reader)
    command = f"infer --model_path {BEST} --mode generate --num_samples 3 --max_new_tokens 3"
    with (contextlib.chdir(trained), os.fdopen(writer, "w") as pipe, contextlib.redirect_stdout(pipe),
          contextlib.redirect_stderr(io.StringIO()) as err):
        code = main(command.split())
        pipe.write("more") # nor is what the interpreter writes at its end
    assert code == 0 and err.getvalue() == ""


def test_infer_mistakes(trained):
    def ask(*args): return seqgpt("infer", "--model_path", BEST, *args, cwd=trained)
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
    result = ask("--mode", "generate", "--min_new_tokens", "3", "--max_new_tokens", "2")
    refused(result, "min_new_tokens is 3", "at most max_new_tokens")
    refused(ask("--mode", "generate", "--out_dir", "data.jsonl"), "data.jsonl")
    refused(seqgpt("infer", cwd=trained), "model_path")


def interactive(*args, typed, cwd): return seqgpt("infer", "--model_path", BEST, *args, cwd=cwd, input=typed)


def test_interactive_shows_bars_and_takes_symbols(trained):
    result = interactive("--top", 3, typed="C4 D4\nH9\n\n/sample\n/back\n/clear\n/quit\n", cwd=trained)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("█") and "2 symbols: C4 D4" in result.stdout
    assert "'H9', is not in the vocabulary" in result.stdout
    assert interactive(typed="", cwd=trained).returncode == 0
    # 16 positions, one of them for <bos>
    full = interactive("--prompt", " ".join(["C4"]*14), typed="/sample\n/sample\n/sample\n", cwd=trained)
    assert full.returncode == 0 and "The sequence has ended" in full.stdout, full.stderr


TYPED = [ # and the symbols that are there then
    ("E4 F4 G4", "C4 E4 F4 G4"), ("H9", "C4 E4 F4 G4"), ("C4", "C4 E4 F4 G4 C4"),
    ("/back", "C4 E4 F4 G4"), ("/back", "C4 E4 F4"), ("G4 F4 E4", "C4 E4 F4 G4 F4 E4"),
    ("/clear", ""), ("D4", "D4"), ("C4 <eos>", "D4"),
    ("F4", "D4 F4"), ("/what", "D4 F4"), ("G4", "D4 F4 G4"),
]


def test_interactive_shows_what_the_model_says_whatever_was_typed_before(trained):
    model = load_model(trained/BEST)
    tokenizer = load_tokenizer(trained/BEST)
    def expected(symbols):
        logits = next_logits(model, encode_prompt(tokenizer, symbols)).clone()
        logits[[VOCAB["<pad>"], VOCAB["<bos>"], VOCAB["<unk>"]]] = -torch.inf # which are never sampled
        return text_bars(likeliest(tokenizer, logits, len(VOCAB) - 3))
    typed = "\n".join([*(line for line, _ in TYPED), "/quit", ""])
    result = interactive("--prompt", "C4", "--top", 9, typed=typed, cwd=trained)
    found = re.findall(r"^\d+ symbols?.*\n((?:.*%.*\n)+)", result.stdout, re.M)
    assert result.returncode == 0 and len(found) == 1 + len(TYPED), result.stdout
    for bars, symbols in zip(found, ["C4", *(symbols for _, symbols in TYPED)]):
        assert bars.strip() == expected(symbols).strip(), symbols


def test_interactive_offers_and_appends_only_what_can_be_sampled(trained, monkeypatch, capsys):
    from seqgpt.console import interact
    tokenizer = load_tokenizer(trained/BEST)
    model = new_model(make_config(tokenizer, 16, n_layer=1, n_head=1, n_embd=8), seed=0).eval()
    with torch.no_grad(): # as in a young model: <bos> is the likeliest of all after anything
        model.lm_head.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.lm_head.weight[VOCAB["<bos>"]] = 1
    typed = iter(["", "", "", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    interact(model, tokenizer, "C4", top=20)
    said = capsys.readouterr().out
    assert not re.search("^ *(<bos>|<unk>|<pad>) ", said, re.M) and "4 symbols: C4" in said
    shown = re.findall(r"^ *\S+ +([\d.]+)% ", said, re.M)[:len(VOCAB) - 3]
    assert np.isclose(sum(map(float, shown)), 100, atol=0.1)


def test_interactive_samples_with_the_seed(trained):
    def ask(seed): return interactive("--seed", seed, typed="/sample\n"*12, cwd=trained).stdout
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
    from seqgpt.commands import show_run
    seen = []
    def other(run):
        refused(seqgpt(*RUN, "--max_steps", 2, "--overwrite", cwd=corpus), "another run is writing there")
        seen.append(show_run(run))
    monkeypatch.setattr("seqgpt.commands.show_run", other)
    assert seqgpt(*RUN, "--max_steps", 2, cwd=corpus, drawn=False).returncode == 0
    assert seen == [None] and (corpus/"outputs/samples.jsonl").exists()


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
    diverging = ["--num_epochs", 50, "--learning_rate", 1e12, "--precision", "fp32", "--max_grad_norm", 1e30]
    result = seqgpt(*RUN, *diverging, "--eval_steps", 1, "--warmup_steps", 1, cwd=corpus, bare=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "--learning_rate" in result.stderr
    assert GPT2LMHeadModel.from_pretrained(corpus/BEST)


# --- flags and files of settings

def test_yaml_and_flags(corpus):
    (corpus/"mine.yaml").write_text("""
data_path: data.jsonl
learning_rate: 3e-4
max_steps: 2
n_layer: 1
n_head: 2
n_embd: 16
max_length: 16
model:
  resid_pdrop: 0.25
""")
    flags = ["--config", "mine.yaml", "--n_embd", 32, "--model.embd_pdrop", "5e-1"]
    result = seqgpt("train", *flags, cwd=corpus, bare=True)
    assert result.returncode == 0, result.stderr
    saved = yaml.safe_load((corpus/BEST/"config.yaml").read_text())
    model = read_json(corpus/BEST/"config.json")
    assert saved["learning_rate"] == 3e-4
    assert (model["n_embd"], model["resid_pdrop"], model["embd_pdrop"]) == (32, 0.25, 0.5)


@pytest.mark.parametrize("args, words", [
    (["--learning_rat", "1"], ["'learning_rat'", "Did you mean --learning_rate"]),
    (["-lr", "1"], ["'lr'", "Did you mean --learning_rate"]),
    (["--batch_size", "many"], ["batch_size is 'many'. It must be a whole number"]),
    (["--batch_size", "8.5"], ["batch_size is 8.5. It must be a whole number"]),
    (["--batch_size"], ["--batch_size: expected one argument", "--help"]),
    (["--model.n_inner"], ["--model.n_inner: expected one argument"]),
    (["--model", "7"], ["model is 7. It must be names with values"]),
    (["--resume", "maybe"], ["resume is 'maybe'. It must be true or false"]),
    (["--precision", "int8"], ["auto, fp32, bf16, fp16"]),
    (["--learning_rate", "-1e-3"], ["learning_rate is -0.001"]),
    (["--weight_decay", "-.5"], ["weight_decay is -0.5"]),
    (["--long", "cut"], ["truncate, split, error"]),
    (["--data_path", "none.jsonl"], ["none.jsonl", "no such file or folder"]),
    (["--vocab_path", "none.json"], ["none.json", "--vocab_path"]),
    (["--config", "none.yaml"], ["none.yaml"]),
    (["stray"], ["stray"]),
    (["--lr_scheduler_type", "cosine_with_min_lr"], ["min_lr"]),
    (["--config", "quik"], ["presets are: classify, quick"]),
    (["--config"], ["--config: name a file of settings or, for seqgpt train, a preset"]),
    (["--config="], ["--config: name a file of settings or, for seqgpt train, a preset"]),
    (["--cache_dir", "data.jsonl"], ["data.jsonl"]),
])
def test_mistakes_in_flags_are_refused_and_nothing_is_written(args, words, corpus):
    refused(seqgpt(*RUN, *args, cwd=corpus), *words)
    assert not (corpus/"outputs").exists()


@pytest.mark.parametrize("line, words", [
    ("learning_rat: 1", ["no setting 'learning_rat'", "--learning_rate"]),
    ("batch_size: many", ["batch_size is 'many'"]),
    ("model: null", ["model is None"]),
])
def test_mistakes_in_files_are_shown_with_their_line(line, words, corpus):
    (corpus/"mine.yaml").write_text(f"# mine\nseed: 1\n{line}\n")
    refused(seqgpt("train", "--config", "mine.yaml", cwd=corpus), "mine.yaml, line 3: ", *words)


SPELLED = { # what is typed, or in quotes in a file, and the value that it spells
    "learning_rate": {"3e-4": 3e-4, "-.5": -0.5, "-1e-3": -1e-3, "4": 4},
    "batch_size": {"1_000": 1000, "0x10": 16, "-1": -1},
    "resume": {"true": True, "false": False, "yes": True},
    "pad_token": {text: text for text in ("5", "1e-3", "true", "-5", "- a", "[a]", "")} | {"null": None},
    "output_dir": {"2026-01-31": "2026-01-31", "7": "7"},
    "model": {"{n_inner: 5, resid_pdrop: 1e-1}": {"n_inner": 5, "resid_pdrop": 0.1}, '{"n_inner": 5}': {"n_inner": 5}},
    "model.n_inner": {"5": 5, "gelu": "gelu", "false": False},
}


@pytest.mark.parametrize("name, text", [(name, text) for name, texts in SPELLED.items() for text in texts])
def test_a_text_spells_a_value_of_the_type_of_its_setting(name, text):
    from seqgpt.arguments import read_flags, split_files
    whole, _, part = name.partition(".")
    for words, files in (([f"--{name}", text], []), ([f"--{name}={text}"], []), ([], [("mine.yaml", {name: text})])):
        given, _ = read_flags("train", [Config], files, split_files(words)[1])
        value = given[whole][part] if part else given[whole]
        assert (value, type(value)) == (SPELLED[name][text], type(SPELLED[name][text])) and Config(**given)


USED_ELSEWHERE = {
    "block_size": "--max_length", "d_model": "--n_embd",
    "dropout": "--model.resid_pdrop, --model.embd_pdrop and --model.attn_pdrop",
    "lr": "--learning_rate", "grad_clip": "--max_grad_norm", "warmup_ratio": "--warmup_steps",
    "epochs": "--num_epochs", "num_train_epochs": "--num_epochs", "max_iters": "--max_steps",
    "per_device_train_batch_size": "--batch_size", "accumulate_grad_batches": "--gradient_accumulation_steps",
    "bf16": "--precision bf16", "fp16": "--precision fp16", "resume_from_checkpoint": "--resume",
}


@pytest.mark.parametrize("name, ours", USED_ELSEWHERE.items())
def test_names_of_other_tools_get_a_hint(name, ours, corpus):
    said = f"there is no setting '{name}'. Did you mean {ours}?"
    refused(seqgpt("train", f"--{name}", 1, cwd=corpus), said)
    (corpus/"mine.yaml").write_text(f"{name}: 1\n")
    refused(seqgpt("train", "--config", "mine.yaml", cwd=corpus), said)


def test_hints_name_settings_that_are_there(corpus):
    from seqgpt.arguments import OTHER_NAMES, nearest
    from seqgpt.cli import VERBS
    flags = {}
    for verb in VERBS:
        help = seqgpt(*verb.split(), "--help", cwd=corpus).stdout
        flags[verb] = [*dict.fromkeys(re.findall(r"^  --(\w+)", help, re.M))]
    known = {name for names in flags.values() for name in names}
    for ours, theirs in OTHER_NAMES.items():
        assert re.split("[ .]", ours)[0] in known, ours
        for name in theirs.split():
            others = [[flag for flag in names if flag != name] for names in flags.values()]
            assert any(nearest(name, names) for names in others), name
    assert nearest("max_length", flags["infer"]) == "max_new_tokens"
    assert nearest("out_dir", flags["train"]) == "output_dir"


BOTH = { # a setting of each verb, its value as a flag and in a file
    "train": ("n_embd", 32, 16),
    "infer": ("top", 3, 4),
    "evaluate": ("batch_size", 3, 4),
    "serve": ("port", 3, 4),
    "export": ("data_path", "a", "b"),
    "corpus digits": ("image_size", 8, 9),
    "corpus markov": ("order", 1, 2),
    "corpus labelled": ("seed", 3, 4),
}


@pytest.mark.parametrize("verb, case", BOTH.items())
def test_a_flag_wins_wherever_it_is(verb, case, tmp_path):
    name, flag, in_file = case
    (tmp_path/"mine.yaml").write_text(f"{name}: {in_file}\n")
    required = []
    if verb in ("infer", "evaluate", "export"): required += ["--model_path", "m"]
    if verb.startswith("corpus"): required += ["--out_dir", "o"]
    if verb == "corpus labelled": required += ["--data_path", "d"]
    for words in (f"--{name} {flag} --config mine.yaml", f"--config mine.yaml --{name} {flag}",
                  f"--{name}={flag} --config=mine.yaml"):
        result = seqgpt(*verb.split(), *words.split(), *required, "--print_config", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert yaml.safe_load(result.stdout)[name] == flag, result.stdout


def test_of_two_files_the_later_one_wins_and_fields_of_the_model_add_up(corpus, monkeypatch):
    (corpus/"a.yaml").write_text("n_embd: 16\nn_head: 4\nmodel: {n_inner: 24, resid_pdrop: 1e-1}\n")
    (corpus/"b.yaml").write_text("n_head: 2\nmodel: {layer_norm_epsilon: 1e-6, resid_pdrop: 2e-1}\n")
    given = []
    monkeypatch.setattr("seqgpt.commands.train_command", lambda config, named: given.append(config))
    flags = ["--model.embd_pdrop", 0, "--n_layer", 1, "--config", "a.yaml",
             "--data_path", "data.jsonl", "--config=b.yaml"]
    result = seqgpt("train", *flags, cwd=corpus)
    assert result.returncode == 0, result.stderr
    config, = given
    assert (config.n_layer, config.n_embd, config.n_head) == (1, 16, 2)
    assert config.model == {"n_inner": 24, "resid_pdrop": 0.2, "layer_norm_epsilon": 1e-6, "embd_pdrop": 0}


def test_settings_from_numpy_pytorch_and_pathlib(tmp_path):
    odd = Config(
        data_path=tmp_path/"d", output_dir=tmp_path/"o", max_length=np.int64(16), n_layer=torch.tensor(1),
        resume=np.bool_(True), learning_rate=np.float32(0.25), weight_decay=np.float64(0.5),
        num_epochs=np.int32(2), precision=np.str_("fp32"),
        model={"n_inner": np.int64(24), "resid_pdrop": np.float32(0.5)})
    own = Config(
        data_path=f"{tmp_path}/d", output_dir=f"{tmp_path}/o", max_length=16, n_layer=1,
        resume=True, learning_rate=0.25, weight_decay=0.5,
        num_epochs=2, precision="fp32",
        model={"n_inner": 24, "resid_pdrop": 0.5})
    def types(config):
        values = {**vars(config), **{f"model.{name}": value for name, value in config.model.items()}}
        return {name: type(value) for name, value in values.items()}
    assert odd == own and types(odd) == types(own)
    write_config(odd, tmp_path/"odd.yaml")
    assert yaml.safe_load((tmp_path/"odd.yaml").read_text())["model"] == own.model
    assert read_config(tmp_path/"odd.yaml").n_layer == 1
    numbers = dict(symbols=4, branching=2, classes=1, min_length=4, max_length=6)
    write_markov(tmp_path/"a", make_markov(**numbers), 2)
    write_markov(tmp_path/"b", make_markov(**{name: np.int64(n) for name, n in numbers.items()}), np.int64(2))
    assert (tmp_path/"a/source.json").read_text() == (tmp_path/"b/source.json").read_text()
    wrong = [("n_layer", np.float64(1.5)), ("n_layer", np.bool_(True)), ("resume", np.int64(1)),
             ("n_layer", np.array([1, 2])), ("task", tmp_path)]
    for name, value in wrong:
        with pytest.raises(InputError, match=f"{name} is"): Config(**{name: value})


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
corpus digits --out_dir o --config
corpus digits --image_siz 8
corpus markov --out_dir o --config nowhere"""


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
    assert len(said) == len(TYPED_WRONG.splitlines()), result.stderr
    for line in said: assert re.search("nowhere|Did you mean|must be|Choose|--config: name", line), line


COMMANDS_AT_HOME = [
    ["train", "--config", "mine.yaml", "--config=~/home.yaml", "--vocab_path=~/data/vocab.json", *TINY],
    ["train", "--init_from=~/run/best_model", "--output_dir=~/next", "--validation_path=~/data",
     "--cache_dir=~/cache", "--max_steps", 1, "--batch_size", 8],
    ["evaluate", "--model_path=~/run/best_model", "--data_path=~/data", "--out_dir=~/e", "--num_samples", 2,
     "--cache_dir=~/cache"],
    ["infer", "--model_path=~/run/best_model", "--mode", "generate", "--prompt_file=~/data", "--out_dir=~/i",
     "--cache_dir=~/cache"],
    ["corpus", "labelled", "--data_path=~/data", "--vocab_path=~/data/vocab.json", "--out_dir=~/l"],
    ["corpus", "digits", "--out_dir=~/d", "--image_size", 8],
]


def test_a_path_means_one_place(melodies, tmp_path, monkeypatch):
    "`~` is the home folder, also in `--flag=~/x`, which the shell leaves alone, and in files of settings."
    home = tmp_path/"home"
    here = tmp_path/"here"
    write_lines(home/"data", [{"tokens": t, "label": l} for t, l in melodies[:40]])
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (here/"mine.yaml").write_text("output_dir: ~/run\ndata_path: ~/data\ncache_dir: ~/cache\n")
    (home/"home.yaml").write_text("max_steps: 2\nmax_length: 16\n")
    for command in COMMANDS_AT_HOME:
        result = seqgpt(*command, cwd=here, drawn=False)
        assert result.returncode == 0, result.stderr
    assert {"data", "home.yaml", "run", "next", "cache", "e", "i", "l", "d"} <= {p.name for p in home.iterdir()}
    assert {"checkpoints", "best_model", "config.yaml"} <= {p.name for p in (home/"run").iterdir()}
    assert Config("~/data", cache_dir="~/cache").cache_dir == str(home/"cache")
    result = seqgpt("evaluate", "--model_path=~/nothing", cwd=here, drawn=False)
    refused(result, f"{home}/nothing: no config.json there")
    assert [p.name for p in here.iterdir()] == ["mine.yaml"]


def test_functions_expand_paths_too(trained, tmp_path, monkeypatch):
    import seqgpt.corpora as corpora
    import seqgpt.sources as sources
    import seqgpt.tokenizer as tokenizer
    home = shutil.copytree(trained, tmp_path/"home")
    monkeypatch.setenv("HOME", str(home))
    (tmp_path/"here").mkdir()
    monkeypatch.chdir(tmp_path/"here")
    best = f"~/{BEST}"
    t = tokenizer.load_tokenizer(best)
    m = load_model(best)
    assert len(tokenizer.make_tokenizer("~/vocab.json")) == len(tokenizer.read_vocab("~/vocab.json")) == len(t)
    assert task_of(best) == "clm" and load_source("~/data.jsonl") is None
    corpus = read_corpus("~/data.jsonl", t, cache_dir="~/c")
    assert len(corpus.dataset) == len([*sources.read_lines("~/data.jsonl")]) == 200
    assert find_vocab("~/data.jsonl").exists() and corpus_files("~/data.jsonl")[0].exists()
    config = read_config("~/outputs/config.yaml")
    assert len(evaluation_data(best, t, 16, "~/data.jsonl", cache_dir="~/c")[0]) == 200
    write_config(config, "~/w/config.yaml")
    save_model("~/w/model", m, t, config, {"perplexity": 2.0})
    tokenizer.save_tokenizer(t, "~/w/tokenizer")
    write_corpus("~/w/corpus", [["a"]], [0])
    write_labelled("~/w/labelled", "~/w/corpus")
    corpora.write_digits("~/w/digits", 4)
    assert len(corpora.load_images("~/w/digits")) == 1797
    markov = make_markov(symbols=4, branching=2, classes=1, min_length=4, max_length=6)
    write_markov("~/w/markov", markov, 2)
    assert load_source("~/w/markov") is not None
    written = {"config.yaml", "model", "tokenizer", "corpus", "labelled", "digits", "markov"}
    assert {p.name for p in (home/"w").iterdir()} == written
    with pytest.raises(InputError, match="is there already"): write_corpus("~/w/corpus", [["a"]])
    assert not [*(tmp_path/"here").iterdir()]


def test_help_and_verbs(tmp_path):
    assert "corpus" in installed("--help", cwd=tmp_path).stdout and seqgpt(cwd=tmp_path).returncode == 0
    help = seqgpt("train", "--help", cwd=tmp_path)
    assert help.returncode == 0 and "Longest sequence in tokens" in help.stdout
    types = {*re.findall(r"^  --(?!print_config)\w+ (\S+)", help.stdout, re.M)}
    words = {kind for kind in types if "|" in kind}
    assert types - words == {"str", "int", "float", "[bool]", "dict", "file"} and "auto|fp32|bf16|fp16" in words, types
    refused(installed("trian", cwd=tmp_path), "Did you mean 'train'")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", seqgpt("--version", cwd=tmp_path).stdout)


@pytest.mark.parametrize("line", ["corpus", "corpus --out_dir c"])
def test_half_a_verb_is_refused_with_the_verbs_it_begins(line, tmp_path):
    result = seqgpt(*line.split(), cwd=tmp_path)
    refused(result, "corpus digits, corpus markov, corpus labelled")
    assert not result.stdout and not [*tmp_path.iterdir()]
    help = seqgpt("corpus", "--help", cwd=tmp_path)
    assert help.returncode == 0 and "corpus labelled" in help.stdout


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
    sizes = "--max_length 66 --n_layer 1 --n_head 2 --n_embd 16"
    steps = "--max_steps 2 --batch_size 4 --num_epochs 1 --learning_rate 1e-3 --eval_steps 1"
    run("train_gpt.py", f"--data_path d {steps} {sizes}")
    assert (tmp_path/"outputs/samples.png").exists()
    capsys.readouterr()
    run("inference.py", "--model_path outputs/best_model --mode generate --max_new_tokens 5")
    assert capsys.readouterr().out.startswith("r")


# --- messages

DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def imported(nodes):
    "Names that are imported from other modules of the package: {name here: (module, name there)}."
    found = {}
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or not node.module: continue
        if not node.level and not node.module.startswith("seqgpt."): continue
        module = node.module.removeprefix("seqgpt.")
        found |= {alias.asname or alias.name: (module, alias.name) for alias in node.names}
    return found


def texts_in(nodes):
    "The texts in these nodes; of those with values, the fixed parts."
    joined = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in joined for part in node.values}
    texts = ["".join(part.value for part in node.values if isinstance(part, ast.Constant)) for node in joined]
    constants = [node for node in nodes if isinstance(node, ast.Constant) and id(node) not in parts]
    return texts + [node.value for node in constants if isinstance(node.value, str)]


def definitions():
    "For each function and class of the package: those that it names, and its texts that name a flag."
    found = {}
    methods = []
    for path in (ROOT/"seqgpt").glob("*.py"):
        if path.stem == "_modidx": continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {name: node for node in tree.body for name in names_of(node)}
        known = {name: (path.stem, name) for name in defined} | imported(tree.body)
        for name, definition in defined.items():
            nodes = [*ast.walk(definition)]
            names = known | imported(nodes)
            named = {names[n.id] for n in nodes if isinstance(n, ast.Name) and n.id in names}
            texts = [text for text in texts_in(nodes) if re.search(r"--[a-z]", text)]
            found[path.stem, name] = named, texts
            if is_patched(definition):
                methods.append((names.get(definition.args.args[0].annotation.id), (path.stem, name)))
    for owner, method in methods:
        if owner in found: found[owner][0].add(method) # who has a class may call what is patched into it
    return found


def names_of(node):
    "What a statement of a module defines: a function, a class or constants."
    if isinstance(node, DEFINITION): return [node.name]
    if isinstance(node, ast.Assign): return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def is_patched(node):
    "Whether this is a method that `@patch` puts into a class."
    if not isinstance(node, ast.FunctionDef) or not node.args.args: return False
    by = [decorator.id for decorator in node.decorator_list if isinstance(decorator, ast.Name)]
    return by == ["patch"] and isinstance(node.args.args[0].annotation, ast.Name)


def reached(found, start, passed):
    "All that `start` calls, and so on, without what is in `passed`."
    seen = set()
    left = [*start]
    while left:
        one = left.pop()
        if one in seen or one in passed or one not in found: continue
        seen.add(one)
        left += found[one][0]
    return seen


def flags_of_verbs():
    "The flags that each verb takes."
    from seqgpt.cli import VERBS, load_object
    flags = {}
    for verb, entry in VERBS.items():
        takers = [load_object(source) for source in entry.flag_sources or [entry.function]]
        flags[verb] = {"config"}.union(*(inspect.signature(taker).parameters for taker in takers))
    return flags


def test_every_flag_that_a_message_names_is_one_of_the_verb_that_says_it():
    "Or the message names the verb that has it, as in `seqgpt train --learning_rate`."
    from seqgpt.cli import MEMORY_REMEDIES, VERBS
    found = definitions()
    starts = {verb: tuple(entry.function.removeprefix("seqgpt.").split(":")) for verb, entry in VERBS.items()}
    flags = flags_of_verbs()
    others = {"logdir", "nnodes", "nproc_per_node", "fsdp_version"} # of TensorBoard, torchrun and Accelerate
    # `training_split` says what `seqgpt train` would say
    quoted = {("resolving", "load_data"), ("config", "check_config")}
    with_path = {"train", "corpus labelled"} # they read a vocabulary from a file that the user names
    wrong = []
    walked = set()
    for verb, start in starts.items():
        passed = set() if verb == "train" else quoted
        passed = passed | {("cli", "MEMORY_REMEDIES")} # of this verb below
        if verb not in with_path: passed = passed | {("tokenizer", "read_vocab"), ("checks", "VOCAB_REMEDY")}
        for place in reached(found, [start, ("cli", "explain")], passed):
            texts = found[place][1]
            if place == ("cli", "explain"): texts = texts + [MEMORY_REMEDIES.get(verb, "")]
            for text in texts:
                named = re.findall(r"seqgpt ((?:corpus )?[a-z]+)", text)
                fine = flags[verb].union(others, *(flags.get(other, ()) for other in named))
                walked.add((place, text))
                flags_in_text = re.findall(r"--([a-z]\w*)", text)
                wrong += [(verb, place, flag, text) for flag in flags_in_text if flag not in fine]
    assert not wrong and len(walked) > 60, wrong
