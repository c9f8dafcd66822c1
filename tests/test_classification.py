"Classifiers: the command, the folder in plain Transformers, labels of all kinds, and starting from a trained model."
import datetime
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import (
    NAMES,
    NOTES,
    TINY,
    VOCAB,
    read_json,
    read_lines,
    refused,
    seqgpt,
    write_lines,
    write_named,
)
from safetensors.torch import load_file
from scipy.special import softmax
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from seqgpt.checks import InputError
from seqgpt.classification import ClassEvaluation, class_logits, predict
from seqgpt.model import make_config, new_model
from seqgpt.tokenizer import make_tokenizer, save_tokenizer

TRAIN = ["train", "--task", "classification", "--data_path", "data.jsonl", "--max_length", 16, *TINY]


@pytest.fixture
def named(melodies, tmp_path):
    write_named(tmp_path, melodies)
    return tmp_path


@pytest.fixture(scope="session")
def held_out(classifier):
    "Texts and labels of the validation set."
    rows = read_lines(classifier/"data.jsonl")
    rows = [rows[k] for k in read_json(classifier/"c/split.json")["validation"]]
    return [" ".join(r["tokens"]) for r in rows], np.array([NAMES.index(r["label"]) for r in rows])


@pytest.fixture(scope="session")
def plain(classifier):
    "The model and the tokenizer in plain Transformers."
    folder = classifier/"c/best_model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def fine_tune(*args, cwd):
    "Trains a classifier from the language model in lm."
    command = ["train", "--task", "classification", "--init_from", "lm/best_model", *args]
    return seqgpt(*command, cwd=cwd, bare=True)


def classify(*args, model="c/best_model", cwd):
    return seqgpt("infer", "--model_path", model, "--mode", "classify", *args, cwd=cwd)


# --- what a finished run leaves behind

def test_outputs_are_complete(classifier):
    run = classifier/"c"
    model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
             "vocab.json", "merges.txt", "config.yaml", "metrics.json", "README.md"}
    assert model <= {p.name for p in (run/"best_model").iterdir()}
    assert model == {p.name for p in (run/"final_model").iterdir()}
    measured = ("best_model/evaluation/metrics.json", "best_model/evaluation/evaluation.png")
    for name in ("training_curves.png", *measured): assert (run/name).stat().st_size > 0
    config = read_json(run/"best_model/config.json")
    assert config["id2label"] == {"0": "down $", "1": "up"} and config["label2id"] == {"down $": 0, "up": 1}
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert {"loss", "accuracy", "macro_f1"} <= read_json(run/"best_model/metrics.json").keys()
    card = (run/"best_model/README.md").read_text()
    assert "text-classification" in card and "2 classes" in card and "lm/best_model" in card
    printed = (classifier/"printed.txt").read_text()
    assert "macro F1" in printed and "best so far" in printed and "k nearest neighbours" in printed


def test_metrics_are_those_of_scikit_learn_on_the_logits_of_transformers(classifier, held_out, plain):
    metrics = read_json(classifier/"c/best_model/evaluation/metrics.json")
    texts, truth = held_out
    model, _ = plain
    ids = [[1, *(VOCAB[s] for s in t.split()), 2] for t in texts]
    with torch.no_grad(): logits = np.concatenate([model(torch.tensor([i])).logits.numpy() for i in ids])
    guess = logits.argmax(1)
    p = softmax(logits.astype(float), axis=1)
    assert metrics["sequences"] == len(truth) == 40 and metrics["accuracy"] > 0.8
    assert metrics["accuracy"] == accuracy_score(truth, guess)
    assert np.isclose(metrics["macro_f1"], f1_score(truth, guess, average="macro"))
    assert np.isclose(metrics["loss"], log_loss(truth, p), rtol=1e-4)
    assert metrics["confusion"] == confusion_matrix(truth, guess).tolist()
    for k, name in enumerate(NAMES):
        assert np.isclose(metrics["per_class"][name]["f1"], f1_score(truth == k, guess == k))
    low, high = metrics["accuracy_interval"]
    assert low <= metrics["accuracy"] <= high
    baselines = {"most frequent class", "logistic regression", "SVM", "k nearest neighbours"}
    assert baselines == metrics["baselines"].keys()
    saved = read_json(classifier/"c/best_model/metrics.json")
    assert saved["accuracy"] == metrics["accuracy"]
    assert np.isclose(saved["loss"], metrics["loss"], rtol=0.05) # trained in 16 bits, perhaps


def test_pipeline_takes_plain_text_and_any_batch(classifier, held_out, plain):
    texts = held_out[0]
    pipe = pipeline("text-classification", str(classifier/"c/best_model"))
    alone = [pipe(t)[0] for t in texts]
    together = pipe(texts, batch_size=8)
    framed = [pipe(f"<bos> {t} <eos>")[0] for t in texts]
    for one, other, third in zip(alone, together, framed):
        assert one["label"] == other["label"] == third["label"] and one["label"] in NAMES
        assert abs(one["score"] - other["score"]) < 1e-5 and one["score"] == third["score"]
    assert pipe(" ".join(["C4"]*40), truncation=True)[0]["label"] in NAMES
    ids = plain[1](["C4", "C4 D4 E4"], padding=True)["input_ids"]
    assert ids == [[1, 4, 2, 0, 0], [1, 4, 5, 6, 2]]


def test_any_padding_gives_the_same_logits(plain, held_out):
    model, tokenizer = plain
    texts = held_out[0]
    alone = torch.cat([model(**tokenizer(t, return_tensors="pt")).logits for t in texts]).detach()
    for side in ("left", "right"):
        padded = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        assert torch.allclose(class_logits(model, padded), alone, atol=1e-5), side
    ids = tokenizer(texts)["input_ids"]
    for size in (1, 7, 100): assert np.allclose(predict(model, tokenizer, ids, size), alone, atol=1e-5)


# --- infer and evaluate

def test_infer_prints_what_the_pipeline_says(classifier, held_out, tmp_path):
    pipe = pipeline("text-classification", str(classifier/"c/best_model"), top_k=None)
    def ask(*args): return classify(*args, cwd=classifier)
    expected = "\t".join(f"{a['label']} {a['score']:.2%}" for a in pipe(["C4 D4 E4"])[0])
    assert ask("--prompt", "C4 D4 E4").stdout == ask("--prompt", "<bos> C4 D4 E4 <eos>").stdout == expected + "\n"
    result = ask("--num_prompts", 3, "--top", 1, "--out_dir", tmp_path/"p")
    names = [line.split("\t")[0].rsplit(" ", 1)[0] for line in result.stdout.splitlines()]
    assert names == [answer[0]["label"] for answer in pipe(held_out[0][:3])], result.stderr
    rows = read_lines(tmp_path/"p/predictions.jsonl")
    assert [" ".join(r["tokens"]) for r in rows] == held_out[0][:3]
    for r in rows:
        assert np.isclose(sum(r["probabilities"].values()), 1)
        assert r["prediction"] == next(iter(r["probabilities"]))
    assert [r["label"] for r in rows] == [NAMES[k] for k in held_out[1][:3]] # the truth
    of_all = ask("--prompt_file", "data.jsonl")
    assert len(of_all.stdout.splitlines()) == 200
    of_halves = ask("--prompt_file", "data.jsonl", "--prompt_share", 0.5, "--num_prompts", 200)
    assert of_halves.stdout != of_all.stdout
    refused(ask("--num_prompts", 3, "--out_dir", tmp_path/"p"), "predictions.jsonl: is there already")
    refused(ask(), "Nothing to classify", "--prompt")
    refused(ask("--prompt", "C4 H4"), "'H4'")
    refused(ask("--prompt", " ".join(["C4"]*15)), "17 tokens", "16 positions")
    refused(ask("--prompt", "C4", "--top", 0), "top is 0")


def test_a_language_model_is_no_classifier_and_the_other_way_round(classifier):
    result = classify("--prompt", "C4", model="lm/best_model", cwd=classifier)
    refused(result, "holds a language model", "--init_from lm/best_model")
    for mode in ("interactive", "generate"):
        result = seqgpt("infer", "--model_path", "c/best_model", "--mode", mode, cwd=classifier)
        refused(result, "holds a classifier", "--mode classify")


def test_evaluate_other_data(classifier, tmp_path):
    model = classifier/"c/best_model"
    def ask(*args):
        command = ["evaluate", "--model_path", model, "--data_path", "data.jsonl", "--out_dir", "e", *args]
        return seqgpt(*command, cwd=tmp_path, drawn=False)
    write_lines(tmp_path, [
        {"tokens": NOTES, "label": "up"}, {"tokens": NOTES[::-1], "label": "down"}, {"tokens": NOTES},
        {"tokens": ["H4"], "label": "up"}, {"tokens": NOTES[::-1], "label": "down $"}])
    refused(ask(), "3 of 5 lines", "unknown label: 1, at line 2 ('down')", "label missing: 1, at line 3", "Mend them.")
    result = ask("--skip_bad_lines")
    assert result.returncode == 0, result.stderr
    metrics = read_json(tmp_path/"e/metrics.json")
    answers = pipeline("text-classification", str(model))([" ".join(NOTES), " ".join(NOTES[::-1])])
    right = [answers[0]["label"] == "up", answers[1]["label"] == "down $"]
    assert metrics["sequences"] == 2 and metrics["accuracy"] == np.mean(right)
    refused(ask("--skip_bad_lines"), "is there already")
    write_lines(tmp_path, [{"tokens": NOTES, "label": "up"}])
    assert ask("--out_dir", "one").returncode == 0 # no interval, no test, no crash
    json.loads((tmp_path/"one/metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_evaluate_without_the_training_data(classifier, tmp_path):
    shutil.copytree(classifier/"c/best_model", tmp_path/"m")
    write_lines(tmp_path, [{"tokens": NOTES, "label": "up"}, {"tokens": NOTES[::-1], "label": "down $"}])
    (tmp_path/"data.jsonl").rename(tmp_path/"other.jsonl")
    refused(seqgpt("evaluate", "--model_path", "m", cwd=tmp_path), "data.jsonl", "--data_path")
    command = ["evaluate", "--model_path", "m", "--data_path", "other.jsonl"]
    result = seqgpt(*command, cwd=tmp_path, drawn=False)
    assert result.returncode == 0 and "SVM" not in result.stdout and "this model" in result.stdout, result.stderr


def test_evaluate_says_what_was_trained_on(classifier, tmp_path):
    lines = (classifier/"data.jsonl").read_text().splitlines()
    learned = {lines[k] for k in read_json(classifier/"c/split.json")["train"]}
    command = ["evaluate", "--model_path", "c/best_model", "--data_path", "data.jsonl", "--out_dir", tmp_path/"e"]
    result = seqgpt(*command, cwd=classifier, drawn=False)
    known = sum(line in learned for line in lines)
    assert f"{known} of them also appear in the training set" in result.stdout, result.stderr


def test_interval_of_macro_f1_counts_a_rare_class_that_is_never_named():
    truth = np.array([0]*98 + [1]*2)
    found = ClassEvaluation(["common", "rare"], np.tile([1.0, 0.0], (100, 1)), truth).metrics
    assert found["macro_f1"] == f1_score(truth, 0*truth, average="macro", zero_division=0)
    assert found["macro_f1_interval"][1] <= 0.5


# --- labels

def test_missing_labels_are_refused_with_their_lines(melodies, tmp_path):
    rows = [{"tokens": t, "label": l} for t, l in melodies]
    for k in (3, 7): del rows[k]["label"]
    write_lines(tmp_path, [*rows, {"tokens": ["C4"], "label": 0.5}])
    missing = "label missing: 2, at line 4, line 8"
    wrong = "label is not a whole number or a name: 1, at line 201 (0.5)"
    refused(seqgpt(*TRAIN, cwd=tmp_path), "3 of 201 lines", missing, wrong)
    write_lines(tmp_path/"none", [{"tokens": t} for t, _ in melodies])
    result = seqgpt("train", "--task", "classification", "--data_path", "none", cwd=tmp_path)
    refused(result, "label missing: 200, at line 1, line 2, line 3 and more", '"label": "name"')
    assert not (tmp_path/"outputs").exists()
    result = seqgpt(*TRAIN, "--max_steps", 2, "--skip_bad_lines", cwd=tmp_path, bare=True)
    assert result.returncode == 0 and "3 bad lines left out" in result.stdout
    flags = ["--data_path", "data.jsonl", "--output_dir", "lm", "--max_steps", 1, "--max_length", 16, *TINY]
    result = seqgpt("train", *flags, "--skip_bad_lines", cwd=tmp_path, bare=True) # no labels needed
    assert result.returncode == 0


def test_labels_that_cannot_be_told_apart_or_are_new(melodies, tmp_path):
    write_lines(tmp_path, [{"tokens": t, "label": "same"} for t, _ in melodies])
    refused(seqgpt(*TRAIN, cwd=tmp_path), "all labels are 'same'")
    write_named(tmp_path, melodies)
    write_lines(tmp_path/"v", [{"tokens": NOTES, "label": "sideways"}])
    refused(seqgpt(*TRAIN, "--validation_path", "v", cwd=tmp_path), "unknown label: 1, at line 1 ('sideways')")
    assert not (tmp_path/"outputs").exists()


def test_many_classes_of_every_size(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"class {k} of a long name $x_{k}$" for k in range(60)]
    classes = np.append(rng.integers(50, size=400), np.arange(60)) # ten of them appear once
    def notes(k): return [NOTES[k // 25], NOTES[k // 5 % 5], NOTES[k % 5]]
    write_lines(tmp_path, [{"tokens": notes(k), "label": names[k]} for k in classes])
    result = seqgpt(*TRAIN, "--max_steps", 20, "--class_weights", "balanced", cwd=tmp_path)
    assert result.returncode == 0 and "the 30 lowest of 60" in result.stdout, result.stderr
    assert "of 60 classes have no sequence to be measured on" in result.stdout and "Warning" not in result.stderr
    labels = read_json(tmp_path/"outputs/best_model/config.json")["id2label"]
    assert list(labels.values()) == sorted(names)


def test_labels_that_are_numbers_are_in_their_order(melodies, tmp_path):
    write_lines(tmp_path, [{"tokens": t, "label": [10, "9"][l]} for t, l in melodies])
    assert seqgpt(*TRAIN, "--max_steps", 2, cwd=tmp_path, bare=True).returncode == 0
    assert read_json(tmp_path/"outputs/best_model/config.json")["id2label"] == {"0": "9", "1": "10"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_predictions_keep_the_other_fields_of_a_line(kind, classifier, held_out, tmp_path):
    texts = held_out[0][:5]
    when = datetime.date(2026, 11, 30)
    fields = {"label": "up", "seen": {"at": [1, None]}, "day": str(when)}
    lines = [{"id": f"s{k}", "text": t, **fields} for k, t in enumerate(texts)]
    if kind == "jsonl": write_lines(tmp_path, lines)
    else: pq.write_table(pa.Table.from_pylist([line | {"day": when} for line in lines]), tmp_path/"data.parquet")
    model = classifier/"c/best_model"
    def ask(file, *args): return classify("--prompt_file", file, *args, model=model, cwd=tmp_path)
    assert ask(f"data.{kind}", "--out_dir", "p").returncode == 0
    rows = read_lines(tmp_path/"p/predictions.jsonl")
    guesses = [answer["label"] for answer in pipeline("text-classification", str(model))(texts)]
    wanted = [{"id": f"s{k}", **fields, "tokens": text.split(), "prediction": guess}
              for k, (text, guess) in enumerate(zip(texts, guesses))]
    assert [{k: v for k, v in r.items() if k != "probabilities"} for r in rows] == wanted
    refused(ask("p/predictions.jsonl", "--out_dir", "q"), "'prediction' of its own", "Rename it")
    assert not (tmp_path/"q").exists() and ask("p/predictions.jsonl").returncode == 0


def test_one_bad_line_does_not_stop_the_others(classifier, held_out, tmp_path):
    good = [{"id": k, "text": t} for k, t in enumerate(held_out[0][:3])]
    bad = [{"id": 7, "text": "C4 c4"}, {"id": 8, "tokens": ["C4"]*15}, {"id": 9, "tokens": ["C4", "<eos>", "D4"]}]
    write_lines(tmp_path, [good[0], *bad, b"{", *good[1:]])
    def ask(*args):
        flags = ["--prompt_file", "data.jsonl", "--out_dir", "p", *args]
        return classify(*flags, model=classifier/"c/best_model", cwd=tmp_path)
    refused(ask(), "4 of 7 lines", "unknown token: 1, at line 2 ('c4': the vocabulary has 'C4')",
            "longer than the 16 positions of the model: 1, at line 3",
            "special token inside a sequence: 1, at line 4", "malformed JSON: 1, at line 5", "Mend them.")
    assert not (tmp_path/"p").exists()
    result = ask("--skip_bad_lines")
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 3
    assert "4 bad lines left out (" in result.stderr
    assert [row["id"] for row in read_lines(tmp_path/"p/predictions.jsonl")] == [0, 1, 2]


def test_the_length_of_the_model_rules_whatever_is_read(tmp_path):
    "What tells the classes apart comes last, further on than any default of a reader."
    ends = [("D4", "d"), ("E4", "e")]*3
    write_lines(tmp_path, [{"tokens": ["C4"]*1040 + [note]*60, "label": label} for note, label in ends])
    config = make_config(make_tokenizer(VOCAB), 1200, 1, 2, 8, ["d", "e"], initializer_range=1)
    model = new_model(config, seed=0, task="classification").eval()
    save_tokenizer(make_tokenizer(VOCAB), tmp_path/"m")
    model.save_pretrained(tmp_path/"m")
    command = "infer --model_path m --mode classify --prompt_file data.jsonl --out_dir p"
    assert seqgpt(*command.split(), cwd=tmp_path).returncode == 0
    rows = read_lines(tmp_path/"p/predictions.jsonl")
    inputs = [torch.tensor([[1, *(VOCAB[s] for s in r["tokens"]), 2]]) for r in rows]
    with torch.no_grad(): p = [model(ids).logits.softmax(1)[0, 0] for ids in inputs]
    assert {len(r["tokens"]) for r in rows} == {1100} and abs(p[0] - p[1]) > 1e-4
    assert np.allclose([r["probabilities"]["d"] for r in rows], p, atol=1e-5)


def test_sequences_to_predict_are_checked(plain):
    model = plain[0]
    tokenizer = make_tokenizer(VOCAB)
    of_symbols = predict(model, tokenizer, ["C4 D4", ["E4"]])
    assert np.allclose(of_symbols, predict(model, tokenizer, [[1, 4, 5, 2], [1, 6, 2]]))
    with pytest.raises(InputError, match="Symbol 2 of sequence 17, 'c4', is not in the vocabulary"):
        predict(model, tokenizer, ["C4"]*16 + ["C4 c4"]) # in the second batch
    with pytest.raises(InputError, match="Give a list of sequences"): predict(model, tokenizer, "C4 D4")


def test_balanced_weights_turn_the_guess_to_the_rare_class(tmp_path):
    "Labels at random, nine to one: nothing can be learned but how frequent they are."
    rng = np.random.default_rng(0)
    write_lines(tmp_path, [{"tokens": rng.choice(NOTES, 4).tolist(), "label": int(k % 10 == 0)} for k in range(600)])
    rare = {}
    for weights in ("none", "balanced"):
        flags = ["--num_epochs", 3, "--class_weights", weights, "--output_dir", weights]
        assert seqgpt(*TRAIN, *flags, cwd=tmp_path, bare=True).returncode == 0
        flags = ["--num_prompts", 120, "--out_dir", f"p_{weights}"]
        result = classify(*flags, model=f"{weights}/best_model", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        rows = read_lines(tmp_path/f"p_{weights}/predictions.jsonl")
        rare[weights] = np.mean([row["probabilities"]["1"] for row in rows])
    assert abs(rare["none"] - 0.1) < 0.05 and abs(rare["balanced"] - 0.5) < 0.15, rare
    rows = read_lines(tmp_path/"p_none/predictions.jsonl")
    ids = [[VOCAB[s] for s in r["tokens"]] for r in rows]
    labels = (0, 1, 0.0, "0", []) # the answer can be compared, however the label is written
    asked = [{"input_ids": i, "label": label, "id": k} for k, (i, label) in enumerate(zip(ids, labels))]
    write_lines(tmp_path/"asked", asked)
    flags = ["--prompt_file", "asked/data.jsonl", "--out_dir", "p"]
    assert classify(*flags, model="none/best_model", cwd=tmp_path).returncode == 0
    again = read_lines(tmp_path/"p/predictions.jsonl")
    answers = [*zip(range(5), labels, (0, 0, 0, "0", 0))]
    assert [(r["id"], r["label"], r["prediction"]) for r in again] == answers


@pytest.mark.parametrize("args, words", [
    (["--task", "classify"], ["clm, classification"]),
    (["--class_weights", "balance"], ["none, balanced"]),
    (["--long", "split"], ["truncate or error"]),
    (["--init_from", "nowhere"], ["nowhere", "outputs/best_model"]),
    (["--model.num_labels", "3"], ["num_labels"]),
    (["--model.id2label", "3"], ["id2label", "cannot be set"]),
    (["--task", "clm", "--class_weights", "balanced"], ["--task classification"]),
])
def test_mistakes_are_refused_and_nothing_is_written(args, words, named):
    refused(seqgpt(*TRAIN, *args, cwd=named), *words)
    assert not (named/"outputs").exists()


# --- starting from a trained model

def test_starts_from_the_body_the_data_and_the_split_of_the_language_model(classifier, tmp_path):
    no_change = ["--max_steps", 1, "--learning_rate", 1e-30, "--weight_decay", 0]
    assert fine_tune("--output_dir", tmp_path/"c", *no_change, cwd=classifier).returncode == 0
    before = load_file(classifier/"lm/best_model/model.safetensors")
    after = load_file(tmp_path/"c/final_model/model.safetensors")
    body = [name for name in before if name.startswith("transformer.")]
    assert body and set(after) == {*body, "score.weight"}
    assert all(torch.equal(before[name], after[name]) for name in body)
    splits = [read_json(run/"split.json") for run in (tmp_path/"c", classifier/"lm")]
    assert splits[0]["validation"] == splits[1]["validation"]
    saved = yaml.safe_load((tmp_path/"c/config.yaml").read_text())
    assert (saved["n_layer"], saved["n_embd"]) == (1, 16)
    assert (saved["max_length"], saved["data_path"]) == (16, "data.jsonl")


def test_contradictions_to_the_model_it_starts_from(classifier, tmp_path):
    def tune(*args): return fine_tune("--output_dir", tmp_path/"c", "--max_steps", 1, *args, cwd=classifier)
    refused(tune("--n_layer", 3), "n_layer is 3", "has 1", "--n_layer")
    refused(tune("--n_layer", 6), "n_layer is 6", "has 1") # the default, but named
    refused(tune("--output_dir", "lm", "--overwrite"), "holds the model to start from")
    refused(tune("--output_dir", "lm"), "holds an earlier run")
    assert not (tmp_path/"c").exists() and (classifier/"lm/best_model/config.json").exists()
    result = tune("--model.resid_pdrop", 0.3)
    assert result.returncode == 0 and read_json(tmp_path/"c/best_model/config.json")["resid_pdrop"] == 0.3


def test_says_which_validation_sequences_were_seen(tmp_path):
    rng = np.random.default_rng(0)
    def draw(): return {"tokens": rng.choice(NOTES, 10).tolist(), "label": int(rng.integers(2))}
    write_lines(tmp_path, [draw() for _ in range(200)])
    flags = ["--data_path", "data.jsonl", "--output_dir", "lm", "--max_steps", 1, "--max_length", 16, *TINY]
    assert seqgpt("train", *flags, cwd=tmp_path, bare=True).returncode == 0
    def tune(out, *args): return fine_tune("--output_dir", out, "--max_steps", 1, *args, cwd=tmp_path).stdout
    assert "was trained on" not in tune("same")
    printed = tune("other", "--data_path", "data.jsonl", "--seed", 7)
    said = re.search(r"was trained on (\d+) of the sequences to validate on.* --seed .* 42", printed)
    splits = [read_json(tmp_path/name/"split.json") for name in ("lm", "other")]
    assert int(said[1]) == len(set(splits[0]["train"]) & set(splits[1]["validation"])) > 0
    (tmp_path/"data.jsonl").rename(tmp_path/"moved.jsonl")
    assert "cannot be told" in tune("third", "--data_path", "moved.jsonl")


def test_a_language_model_goes_on_from_a_language_model(classifier, tmp_path):
    flags = ["--init_from", "lm/best_model", "--output_dir", tmp_path/"more"]
    result = seqgpt("train", *flags, "--num_epochs", 2, "--learning_rate", 3e-3, cwd=classifier, bare=True)
    assert result.returncode == 0, result.stderr
    first = float(re.search(r"^ *1\.00 +\d+ +[\d.]+ +([\d.]+)", result.stdout, re.M)[1])
    before = read_json(classifier/"lm/best_model/metrics.json")["perplexity"]
    assert first < 1.05*before # a new model begins above it


def test_resumed_classifier_ends_with_the_same_weights(named):
    args = [*TRAIN, "--precision", "fp32", "--eval_steps", 5, "--class_weights", "balanced", "--max_steps", 20]
    assert seqgpt(*args, "--output_dir", "through", cwd=named, bare=True).returncode == 0
    shutil.copytree(named/"through", named/"cut")
    for name in ("cut/final_model", "cut/checkpoints/checkpoint-20"): shutil.rmtree(named/name)
    resume = [*args, "--output_dir", "cut", "--resume"]
    refused(seqgpt(*resume, "--class_weights", "none", cwd=named), "class_weights (was balanced, is none)")
    result = seqgpt(*resume, cwd=named, bare=True)
    assert result.returncode == 0, result.stderr
    assert "Going on from cut/checkpoints/checkpoint-" in result.stdout
    weights = [(named/run/"final_model/model.safetensors").read_bytes() for run in ("cut", "through")]
    assert weights[0] == weights[1]


# --- the best possible

def test_markov_classes_come_near_the_best_possible(tmp_path):
    sizes = """--symbols 6 --classes 2 --branching 3 --difference 1 --concentration 1
               --min_length 16 --max_length 20""".split()
    def corpus(out, *args): return seqgpt("corpus", "markov", "--out_dir", out, *args, *sizes, cwd=tmp_path)
    assert corpus("m", "--num_sequences", 2000).returncode == 0
    corpus("new", "--num_sequences", 600, "--draw_seed", 1)
    flags = ["--data_path", "m", "--validation_path", "new", "--max_length", 20, "--n_layer", 2, "--n_head", 2,
             "--n_embd", 32, "--batch_size", 32, "--num_epochs", 4, "--learning_rate", 5e-3, "--warmup_steps", 0.1]
    no_dropout = ["--model.resid_pdrop", 0, "--model.embd_pdrop", 0, "--model.attn_pdrop", 0]
    result = seqgpt("train", "--task", "classification", *flags, *no_dropout, cwd=tmp_path, drawn=False)
    assert result.returncode == 0, result.stderr
    metrics = read_json(tmp_path/"outputs/best_model/evaluation/metrics.json")
    again = corpus("again", "--num_sequences", 600, "--draw_seed", 1).stdout
    assert f"accuracy {metrics['best_accuracy']:.2%}, from the whole sequence" in again
    assert metrics["best_accuracy"] > 0.9 and metrics["accuracy_below_best"] < 0.05
    assert "points below the best" in result.stdout
