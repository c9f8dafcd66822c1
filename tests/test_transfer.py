"A model that starts from another one: other symbols, other lengths, part of the weights."
import json
import sys

import numpy as np
import pytest
import torch
from conftest import NOTES, TINY, VOCAB, refused, seqgpt, write_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

STILL = ["--learning_rate", 1e-30, "--weight_decay", 0, "--max_steps", 1] # nothing is learned
GREEK = {s: i for i, s in enumerate(["[BOS]", "alpha", "beta", "gamma", "[EOS]", "[PAD]", "[UNK]"])}


@pytest.fixture(autouse=True, scope="module")
def bare():
    "Training only: what follows it takes longer, and is asked for by `seqgpt evaluate`."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seqgpt.commands.show_run", lambda *_: None)
        patch.setattr("seqgpt.plots.save_curves", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def trained(melodies, tmp_path_factory):
    """A language model of melodies in lm, and three corpora: more, with a note more and other ids; greek, with other
    symbols; long, with longer melodies."""
    folder = tmp_path_factory.mktemp("transfer")
    write_lines(folder, [{"tokens": t, "label": l} for t, l in melodies])
    result = seqgpt("train", "--data_path", "data.jsonl", "--output_dir", "lm", "--num_epochs", 6, "--max_length", 16,
                    *TINY, "--n_layer", 2, cwd=folder)
    assert result.returncode == 0, result.stderr
    rng = np.random.default_rng(1)
    vocab = {s: i for i, s in enumerate([*reversed(NOTES), "A4", "<unk>", "<eos>", "<bos>", "<pad>"])}
    def choice(symbols, n): return rng.choice(symbols, n).tolist()
    more = [{"tokens": choice([*NOTES, "A4"], 8), "label": int(rng.integers(2))} for _ in range(60)]
    write_lines(folder/"more", more, vocab)
    write_lines(folder/"greek", [{"tokens": choice(["alpha", "beta", "gamma"], 8)} for _ in range(60)], GREEK)
    write_lines(folder/"long", [{"tokens": choice(NOTES, 28)} for _ in range(60)])
    return folder


def tune(folder, out, *args):
    return seqgpt("train", "--init_from", "lm/best_model", "--output_dir", out, "--batch_size", 16, *args, cwd=folder)


def weights(folder, name="final_model"): return load_file(folder/name/"model.safetensors")


def test_a_symbol_more_in_another_order(trained, tmp_path):
    result = tune(trained, tmp_path/"m", "--data_path", "more", "--new_symbols", "mean", *STILL)
    assert result.returncode == 0 and "lm/best_model knows 5 of the 6 symbols" in result.stdout, result.stderr
    before = weights(trained/"lm", "best_model")
    after = weights(tmp_path/"m")
    old = before["transformer.wte.weight"]
    new = after["transformer.wte.weight"]
    vocab = json.loads((tmp_path/"m/final_model/vocab.json").read_text())
    for symbol, i in VOCAB.items(): assert torch.equal(new[vocab[symbol]], old[i]), symbol
    assert torch.allclose(new[vocab["A4"]], old[4:].mean(0), atol=1e-6)
    assert all(torch.equal(before[name], after[name]) for name in before if name != "transformer.wte.weight")
    model = AutoModelForCausalLM.from_pretrained(tmp_path/"m/final_model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path/"m/final_model")
    assert model.config.vocab_size == len(tokenizer) == 10 and tokenizer("A4 C4")["input_ids"] == [5, 4]


@pytest.mark.parametrize("how", ["mean", "normal", "random"])
def test_other_symbols_altogether(how, trained, tmp_path):
    result = tune(trained, tmp_path/"g", "--data_path", "greek", "--new_symbols", how, *STILL)
    assert result.returncode == 0 and "knows none of the 3 symbols" in result.stdout, result.stderr
    before = weights(trained/"lm", "best_model")["transformer.wte.weight"]
    after = weights(tmp_path/"g")["transformer.wte.weight"]
    for ours, theirs in {"[PAD]": "<pad>", "[BOS]": "<bos>", "[EOS]": "<eos>", "[UNK]": "<unk>"}.items():
        assert torch.equal(after[GREEK[ours]], before[VOCAB[theirs]])
    new = after[[GREEK[s] for s in ("alpha", "beta", "gamma")]]
    assert torch.equal(new[0], new[1]) == (how == "mean")
    if how == "normal":
        metrics = seqgpt("evaluate", "--model_path", tmp_path/"g/best_model", cwd=trained)
        assert metrics.returncode == 0, metrics.stderr


def test_equal_rows_come_apart(trained, tmp_path):
    result = tune(trained, tmp_path/"g", "--data_path", "greek", "--new_symbols", "mean", "--num_epochs", 2,
                  "--learning_rate", 1e-2)
    assert result.returncode == 0
    new = weights(tmp_path/"g")["transformer.wte.weight"][1:4]
    assert min((new[a] - new[b]).abs().max() for a, b in [(0, 1), (0, 2), (1, 2)]) > 1e-3


def test_the_vocabulary_alone_and_unusual_names(trained, melodies, tmp_path):
    "Special tokens that were named once need not be named again."
    odd = {"nil": 0, "on": 1, "off": 2, "what": 3, **{n: 4 + k for k, n in enumerate(NOTES)}}
    write_lines(tmp_path, [{"tokens": t} for t, _ in melodies[:60]], odd)
    names = ["--pad_token", "nil", "--bos_token", "on", "--eos_token", "off", "--unk_token", "what"]
    result = seqgpt("train", "--data_path", "data.jsonl", "--output_dir", "lm", "--max_steps", 1, "--max_length", 16,
                    *names, *TINY, cwd=tmp_path)
    assert result.returncode == 0
    write_lines(tmp_path/"other", [{"tokens": t} for t, _ in melodies[:60]], {**odd, "A4": 9})
    def with_vocab(path, out, *args):
        return seqgpt("train", "--init_from", "lm/best_model", "--data_path", "data.jsonl", "--vocab_path", path,
                      "--output_dir", out, *args, cwd=tmp_path)
    assert with_vocab("other/vocab.json", "m", "--max_steps", 1).returncode == 0
    special = json.loads((tmp_path/"m/best_model/special_tokens_map.json").read_text())
    assert special["eos_token"] == "off" # noqa: S105, no password
    refused(with_vocab("nowhere.json", "n"), "nowhere.json")


@pytest.mark.parametrize("most", [8, 32, 1024])
def test_fewer_and_more_positions(most, trained, tmp_path):
    "1024 is the default, but named here."
    result = tune(trained, tmp_path/"l", "--data_path", "long", "--max_length", most, *STILL)
    assert result.returncode == 0, result.stderr
    before = weights(trained/"lm", "best_model")["transformer.wpe.weight"]
    after = weights(tmp_path/"l")["transformer.wpe.weight"]
    both = min(most, 16)
    assert len(after) == most and torch.equal(after[:both], before[:both])
    resumed = seqgpt("train", "--config", tmp_path/"l/config.yaml", "--resume", "--max_steps", 2, cwd=trained)
    assert resumed.returncode == 0 and "Going on from" in resumed.stdout, resumed.stderr


def test_as_many_positions_as_before_where_nothing_is_said(trained, tmp_path):
    assert tune(trained, tmp_path/"unnamed", "--data_path", "long", *STILL).returncode == 0
    assert len(weights(tmp_path/"unnamed")["transformer.wpe.weight"]) == 16


def test_frozen_blocks_stay_and_others_learn(trained, tmp_path):
    result = tune(trained, tmp_path/"f", "--data_path", "more", "--frozen_layers", 1, "--num_epochs", 1,
                  "--learning_rate", 1e-2)
    assert result.returncode == 0 and " parameters learn." in result.stdout, result.stderr
    before = weights(trained/"lm", "best_model")
    after = weights(tmp_path/"f")
    for name in before:
        assert torch.equal(before[name], after[name]) == (".h.0." in name) or "wte" in name, name


@pytest.mark.parametrize("task, optimizer", [("clm", "adamw"), ("clm", "muon"), ("classification", "adamw")])
def test_low_rank_additions_are_merged(task, optimizer, trained, tmp_path):
    args = ["--data_path", "more", "--task", task, "--optimizer", optimizer, "--frozen_layers", 1, "--lora_rank", 2,
            "--learning_rate", 1e-2, "--precision", "fp32", "--eval_steps", 6]
    through = tune(trained, tmp_path/"through", *args, "--max_steps", 6)
    assert through.returncode == 0, through.stderr
    before = weights(trained/"lm", "best_model")
    after = weights(tmp_path/"through")
    assert after.keys() - before.keys() == ({"score.weight"} if task == "classification" else set())
    for name in before:
        if ".h." not in name: continue
        stays = ".h.0." in name or "ln_" in name or "bias" in name
        assert torch.equal(before[name], after[name]) == stays, name
    change = after["transformer.h.1.mlp.c_fc.weight"] - before["transformer.h.1.mlp.c_fc.weight"]
    assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2
    resumed = tune(trained, tmp_path/"through", *args, "--lora_rank", 3, "--max_steps", 9, "--resume")
    refused(resumed, "lora_rank (was 2, is 3)")
    assert seqgpt("evaluate", "--model_path", tmp_path/"through/best_model", cwd=trained).returncode == 0


@pytest.mark.parametrize("args, words", [
    (["--frozen_layers", 3], ["frozen_layers is 3", "between 0 and 2"]),
    (["--lora_rank", -1], ["lora_rank is -1"]),
    (["--lora_rank", 2, "--frozen_layers", 2], ["no block to add to"]),
    (["--new_symbols", "zero"], ["mean, normal, random"]),
    (["--max_length", 1], ["max_length is 1"]),
    (["--model.n_inner", 50], ["n_inner is 50", "has 64"]),
    (["--model.tie_word_embeddings", "false"], ["tie_word_embeddings is False", "has True"]),
])
def test_mistakes_are_refused_and_nothing_is_written(args, words, trained, tmp_path):
    refused(tune(trained, tmp_path/"x", "--data_path", "more", *args), *words)
    assert not (tmp_path/"x").exists()


def test_parts_need_a_model_to_start_from(trained, tmp_path):
    for flag, value in {"--frozen_layers": 1, "--lora_rank": 1, "--new_symbols": "mean"}.items():
        result = seqgpt("train", "--data_path", "more", "--output_dir", tmp_path/"x", flag, value, cwd=trained)
        refused(result, "--init_from")


def test_low_rank_without_peft(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    result = tune(trained, tmp_path/"x", "--data_path", "more", "--lora_rank", 2)
    assert result.returncode == 1 and "seqgpt[lora]" in result.stderr, result.stderr
    assert not (tmp_path/"x").exists()
