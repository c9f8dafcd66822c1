"Markov corpora, floors and the samples' report, through the command, against computations that share no code with the library."
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from conftest import NOTES, TINY, refused, seqgpt, write_lines
from matplotlib.figure import Figure
from rapidfuzz.distance import Levenshtein
from sacrebleu.metrics import BLEU

SMALL = "--symbols 20 --classes 3 --branching 3 --min_length 6 --max_length 24".split()


@pytest.fixture(scope="module", params=[1, 2])
def markov(request, tmp_path_factory):
    "A small corpus of order 1 or 2, and what the command printed."
    folder = tmp_path_factory.mktemp("markov")
    result = seqgpt("corpus", "markov", "--out_dir", "m", "--num_sequences", 300, "--order", request.param, *SMALL, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def read(path): return [json.loads(line) for line in open(path)]


def by_the_rule(source, tokens, c):
    "The probabilities that class `c` gives to each symbol behind the first, read off source.json with nothing but its rule."
    number, follow, table = {s: k for k, s in enumerate(source["symbols"])}, source["successors"], source["probabilities"][c]
    found = []
    for t in range(1, len(tokens)):
        x, r = number[tokens[t - 1]], follow[number[tokens[t - 1]]].index(number[tokens[t]])
        if source["order"] == 1: found.append(table[x][r])
        elif t == 1: found.append(1 / len(follow[x]))
        else:
            w = number[tokens[t - 2]]
            found.append(table[len(follow[w])*w + follow[w].index(x)][r])
    return found


def recomputed(source, rows):
    "Mean nats a token for one who is told the class, and for one who infers it, and the share of classes inferred: whole probabilities, no steps."
    told = inferred = right = tokens = 0
    lengths = source["max_length"] - source["min_length"] + 1
    for row in rows:
        joint = [math.prod(by_the_rule(source, row["tokens"], c)) / len(source["symbols"]) / lengths for c in range(3)]
        told -= math.log(joint[row["label"]])
        inferred -= math.log(sum(joint) / 3)
        right += (joint[row["label"]] == max(joint)) / joint.count(max(joint))
        tokens += len(row["tokens"]) + 1
    return told/tokens, inferred/tokens, right/len(rows)


def test_limits_follow_from_source_json(markov):
    folder, printed = markov
    source, rows = json.loads((folder/"m/source.json").read_text()), read(folder/"m/sequences.jsonl")
    told, inferred, right = recomputed(source, rows)
    assert f"class told      perplexity {math.exp(told):.4g}," in printed
    assert f"class inferred  perplexity {math.exp(inferred):.4g}," in printed
    assert f"classification  accuracy {right:.2%}" in printed
    assert {row["label"] for row in rows} == {0, 1, 2}
    lengths = Counter(len(row["tokens"]) + 2 for row in rows)
    assert min(lengths) == 6 and max(lengths) == 24 and max(lengths.values()) < 50


def test_another_draw_of_the_same_source(markov):
    folder, _ = markov
    order = json.loads((folder/"m/source.json").read_text())["order"]
    for seed, name in ((0, "again"), (1, "other")):
        assert seqgpt("corpus", "markov", "--out_dir", f"{name}{order}", "--num_sequences", 300, "--order", order, "--draw_seed", seed, *SMALL, cwd=folder).returncode == 0
    source, again, other = ([(folder/d/name).read_bytes() for name in ("source.json", "sequences.jsonl")] for d in ("m", f"again{order}", f"other{order}"))
    assert source == again and source[0] == other[0] and source[1] != other[1]


def test_the_default_corpus_is_of_the_size_of_the_digits(tmp_path):
    assert seqgpt("corpus", "markov", "--out_dir", "m", "--num_sequences", 200, cwd=tmp_path).returncode == 0
    rows = read(tmp_path/"m/sequences.jsonl")
    assert len(json.loads((tmp_path/"m/vocab.json").read_text())) == 516 and {row["label"] for row in rows} == set(range(10))
    assert 900 < max(len(row["tokens"]) for row in rows) <= 1022


@pytest.mark.parametrize("flag, value, words", [
    ("order", 3, "order is 3"), ("branching", 0, "branching is 0"), ("branching", 600, "512"), ("concentration", 0, "concentration is 0"), ("concentration", "nan", "nan"),
    ("difference", 1.5, "between 0 and 1"), ("symbols", 1, "symbols is 1"), ("classes", 0, "classes is 0"), ("min_length", 2, "<bos>"), ("max_length", 3, "min_length (32)"),
    ("num_sequences", 0, "num_sequences is 0"), ("seed", -1, "seed is -1"), ("draw_seed", -1, "draw_seed is -1"), ("ordr", 1, "--order")])
def test_impossible_sources(flag, value, words, tmp_path):
    refused(seqgpt("corpus", "markov", "--out_dir", "m", f"--{flag}", value, cwd=tmp_path), words)
    assert not (tmp_path/"m").exists()


def test_corpora_are_not_overwritten(markov):
    folder, _ = markov
    refused(seqgpt("corpus", "markov", "--out_dir", "m", cwd=folder), "is there already")
    (folder/"s").mkdir(exist_ok=True)
    (folder/"s/source.json").write_text("mine")
    refused(seqgpt("corpus", "markov", "--out_dir", "s", cwd=folder), "source.json", "is there already")
    assert (folder/"s/source.json").read_text() == "mine"


@pytest.fixture(scope="module")
def measured(markov):
    "A model of the corpus, trained on its first 240 sequences and validated on the rest."
    folder, _ = markov
    lines = (folder/"m/sequences.jsonl").read_text().splitlines(True)
    (folder/"m/train.jsonl").write_text("".join(lines[:240]))
    (folder/"m/validation.jsonl").write_text("".join(lines[240:]))
    result = seqgpt("train", "--data_path", "m/train.jsonl", "--validation_path", "m/validation.jsonl", "--max_length", 24, "--num_epochs", 4, *TINY, cwd=folder, drawn=False)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_floors_beside_the_model(measured):
    folder, printed = measured
    source, rows = json.loads((folder/"m/source.json").read_text()), read(folder/"m/validation.jsonl")
    told, inferred, _ = recomputed(source, rows)
    metrics = json.loads((folder/"outputs/best_model/evaluation/metrics.json").read_text())
    assert metrics["sequences"] == 60 == len(json.loads((folder/"outputs/split.json").read_text())["validation"])
    assert np.isclose(metrics["floors"]["class told"]["perplexity"], math.exp(told)) and np.isclose(metrics["floors"]["class inferred"]["perplexity"], math.exp(inferred))
    assert np.isclose(metrics["perplexity_over_floor"], metrics["perplexity"] / math.exp(inferred)) and metrics["perplexity_over_floor"] > 1
    assert np.isclose(metrics["accuracy_below_best"], metrics["floors"]["class inferred"]["accuracy"] - metrics["accuracy"])
    for name in ("perplexity", "accuracy", "perplexity_over_floor", "accuracy_below_best"):
        low, high = metrics[f"{name}_interval"]
        assert low < metrics[name] < high
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nats_per_sequence"]*60/metrics["tokens"]))
    counts = [sum(len(row["tokens"]) + 1 > t for row in rows) for t in range(len(metrics["nats_by_position"]))]
    assert np.dot(metrics["nats_by_position"], counts) == pytest.approx(60*metrics["nats_per_sequence"], rel=1e-4)
    assert "above the floor" in printed and "best, class told" in printed


def test_samples_are_held_against_the_source(measured):
    folder, _ = measured
    samples = json.loads((folder/"outputs/best_model/evaluation/metrics.json").read_text())["samples"]
    assert samples["number"] == 60 and samples["rule"] == "an impossible pair"
    assert samples["held_out_invalid_sequences"] == 0 < samples["invalid_sequences"] <= 1 and 0 < samples["invalid_symbols"] < samples["invalid_sequences"]
    train, real = ([row["tokens"] for row in read(folder/f"m/{name}.jsonl")] for name in ("train", "validation"))
    framed = lambda tokens: ["<bos>", *tokens, "<eos>"]
    nearest = [min(Levenshtein.normalized_distance(framed(q), framed(t)) for t in train) for q in real]
    assert samples["held_out_nearest_training_distance"] == pytest.approx(np.median(nearest))
    assert samples["held_out_copies"] == np.mean([q in train for q in real])
    endings = [" ".join(q[len(q)//2:]) for q in real]
    others = BLEU(tokenize="none", force=True).corpus_score(endings[1:] + endings[:1], [endings]).score
    assert samples["other_endings_bleu"] == pytest.approx(others) and 0 <= samples["bleu"] <= 100


def test_evaluations_repeat(measured):
    folder, _ = measured
    ask = lambda out, *args: seqgpt("evaluate", "--model_path", "outputs/best_model", "--out_dir", out, *args, cwd=folder, drawn=False)
    order = json.loads((folder/"m/source.json").read_text())["order"]
    for out, seed in (("a", 0), ("b", 1)): assert ask(f"{out}{order}", "--seed", seed).returncode == 0
    first, a, b = (json.loads((folder/p/"metrics.json").read_text()) for p in ("outputs/best_model/evaluation", f"a{order}", f"b{order}"))
    assert a == first and a["samples"] != b["samples"] and a["perplexity"] == b["perplexity"]
    result = ask(f"none{order}", "--num_samples", 0)
    assert result.returncode == 0 and "samples" not in json.loads((folder/f"none{order}/metrics.json").read_text()) and "drawn" not in result.stdout
    refused(ask("minus", "--num_samples", -1), "num_samples is -1")


@pytest.mark.parametrize("damage, words", [
    (lambda d: "{", "source.json"), (lambda d: json.dumps({**d, "probabilities": [[[2.0]]]}), "do not fit"), (lambda d: json.dumps({k: v for k, v in d.items() if k != "symbols"}), "symbols"),
    (lambda d: json.dumps({**d, "order": 3 - d["order"]}), "do not fit"), (lambda d: json.dumps({**d, "successors": [[99]*3]*20}), "not numbers of symbols"),
    (lambda d: json.dumps({**d, "successors": [row[::-1] for row in d["successors"][::-1]]}), "is not from the source")])
def test_a_source_that_does_not_fit_costs_only_the_floor(measured, damage, words, tmp_path):
    folder, _ = measured
    source = (folder/"m/source.json").read_text()
    try:
        (folder/"m/source.json").write_text(damage(json.loads(source)))
        result = seqgpt("evaluate", "--model_path", "outputs/best_model", "--num_samples", 2, "--out_dir", tmp_path/"e", cwd=folder, drawn=False)
    finally: (folder/"m/source.json").write_text(source)
    assert result.returncode == 0 and words in result.stdout, result.stdout + result.stderr
    assert "floors" not in json.loads((tmp_path/"e/metrics.json").read_text())


def test_sequences_without_labels_have_a_floor_too(measured, tmp_path):
    folder, _ = measured
    rows = read(folder/"m/validation.jsonl")
    (tmp_path/"some.jsonl").write_text("".join(json.dumps({"tokens": row["tokens"]}) + "\n" for row in rows))
    (tmp_path/"source.json").write_text((folder/"m/source.json").read_text())
    assert seqgpt("evaluate", "--model_path", folder/"outputs/best_model", "--data_path", "some.jsonl", "--num_samples", 0, "--out_dir", "e", cwd=tmp_path, drawn=False).returncode == 0
    whole, unlabelled = (json.loads((p/"metrics.json").read_text()) for p in (folder/"outputs/best_model/evaluation", tmp_path/"e"))
    assert set(unlabelled["floors"]) == {"class inferred"} and unlabelled["floors"]["class inferred"] == whole["floors"]["class inferred"]


def test_sequences_cut_off_have_a_floor_too(markov):
    folder, _ = markov
    source, rows = json.loads((folder/"m/source.json").read_text()), read(folder/"m/sequences.jsonl")
    order = source["order"]
    assert seqgpt("train", "--data_path", "m/sequences.jsonl", "--max_length", 12, "--max_steps", 2, "--output_dir", f"cut{order}", *TINY, cwd=folder, drawn=False).returncode == 0
    metrics = json.loads((folder/f"cut{order}/best_model/evaluation/metrics.json").read_text())
    nats = tokens = 0
    for k in json.loads((folder/f"cut{order}/split.json").read_text())["validation"]:
        some, label = rows[k]["tokens"][:11], rows[k]["label"]
        whole = len(rows[k]["tokens"]) <= 10 # so that <eos> fits in, too
        lengths = 1 if whole else sum(n >= 11 for n in range(4, 23)) # of 19 that are equally likely, those that this can become
        nats -= math.log(math.prod(by_the_rule(source, some, label)) / 20 * lengths / 19)
        tokens += len(some) + whole
    assert tokens == metrics["tokens"] and metrics["floors"]["class told"]["perplexity"] == pytest.approx(math.exp(nats/tokens))


def test_a_single_sequence_has_a_floor_and_no_interval(measured, tmp_path):
    folder, _ = measured
    (tmp_path/"one.jsonl").write_text(json.dumps(read(folder/"m/validation.jsonl")[0]) + "\n")
    (tmp_path/"source.json").write_text((folder/"m/source.json").read_text())
    result = seqgpt("evaluate", "--model_path", folder/"outputs/best_model", "--data_path", "one.jsonl", "--num_samples", 0, "--out_dir", "e", cwd=tmp_path)
    assert result.returncode == 0 and "above the floor, accuracy" in result.stdout and "nan" not in result.stdout, result.stdout


def test_validation_path(melodies, tmp_path):
    write_lines(tmp_path/"a", [{"tokens": t} for t, _ in melodies[:150]])
    write_lines(tmp_path/"b", [{"tokens": t} for t, _ in melodies[140:]])
    run = lambda *args: seqgpt("train", "--data_path", "a/data.jsonl", "--max_length", 16, "--max_steps", 2, *TINY, *args, cwd=tmp_path, drawn=False)
    result = run("--validation_path", "b")
    assert result.returncode == 0, result.stderr
    shared = int(re.search(r"150 sequences to train, 60 to validate; (\d+) validation sequences also stand in the training set", result.stdout)[1])
    known = {tuple(t) for t, _ in melodies[:150]}
    assert shared == sum(tuple(t) in known for t, _ in melodies[140:]) >= 10
    assert json.loads((tmp_path/"outputs/best_model/evaluation/metrics.json").read_text())["sequences"] == 60
    assert "`b`" in (tmp_path/"outputs/best_model/README.md").read_text()
    refused(run("--validation_path", "nowhere", "--output_dir", "o"), "nowhere")
    with open(tmp_path/"b/data.jsonl", "a") as f: f.write(json.dumps({"tokens": NOTES}) + "\n")
    refused(seqgpt("evaluate", "--model_path", "outputs/best_model", cwd=tmp_path), "has changed since the training")
    refused(run("--validation_path", "b", "--resume", "--max_steps", 3), "the data")
    assert not (tmp_path/"o").exists()


def test_samples_where_nobody_knows_the_rule(trained):
    samples = json.loads((trained/"outputs/best_model/evaluation/metrics.json").read_text())["samples"]
    lines = read(trained/"data.jsonl")
    split = json.loads((trained/"outputs/split.json").read_text())
    pairs = lambda k: set(zip(["<bos>", *lines[k]["tokens"]], [*lines[k]["tokens"], "<eos>"]))
    seen = set().union(*map(pairs, split["train"]))
    assert samples["rule"] == "a pair unseen in training" and samples["number"] == 40
    assert samples["held_out_invalid_sequences"] == np.mean([not pairs(k) <= seen for k in split["validation"]])


def test_evaluate_without_the_training_data(melodies, tmp_path):
    write_lines(tmp_path/"gone", [{"tokens": t} for t, _ in melodies])
    assert seqgpt("train", "--data_path", "gone", "--max_length", 16, "--max_steps", 2, *TINY, cwd=tmp_path, bare=True).returncode == 0
    (tmp_path/"gone").rename(tmp_path/"moved")
    ask = lambda *args: seqgpt("evaluate", "--model_path", "outputs/best_model", "--data_path", "moved", "--num_samples", 5, *args, cwd=tmp_path, drawn=False)
    result = ask("--out_dir", "e")
    assert result.returncode == 0 and "BLEU" in result.stdout and "nearest" not in result.stdout, result.stderr
    samples = json.loads((tmp_path/"e/metrics.json").read_text())["samples"]
    assert "bleu" in samples and not {"invalid_sequences", "copies"} & samples.keys()
    refused(ask("--seed", -1), "seed is -1")


@pytest.mark.parametrize("labels", [["$x^$", "a" * 300], [f"class {k}" for k in range(60)], [None], ["one"]])
def test_any_labels_can_be_drawn(trained, labels, tmp_path):
    write_lines(tmp_path, [{"tokens": NOTES[: 1 + k % 5]} | ({} if labels[k % len(labels)] is None else {"label": labels[k % len(labels)]}) for k in range(60)])
    result = seqgpt("evaluate", "--model_path", trained/"outputs/best_model", "--data_path", "data.jsonl", "--num_samples", 2, "--out_dir", "e", cwd=tmp_path)
    assert result.returncode == 0 and (tmp_path/"e/evaluation.png").stat().st_size > 10_000, result.stderr


def test_one_sequence(trained, tmp_path):
    write_lines(tmp_path, [{"tokens": NOTES}])
    result = seqgpt("evaluate", "--model_path", trained/"outputs/best_model", "--data_path", "data.jsonl", "--out_dir", "e", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path/"e/metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert "perplexity_interval" not in metrics and "other_endings_bleu" not in metrics["samples"] and metrics["samples"]["number"] == 1


def test_classes_that_are_alike_cannot_be_told_apart(tmp_path):
    result = seqgpt("corpus", "markov", "--out_dir", "m", "--num_sequences", 50, "--order", 2, "--difference", 0, *SMALL, cwd=tmp_path)
    assert "classification  accuracy 33.33%" in result.stdout, result.stdout
    inferred, told = re.findall(r"class \w+ +(perplexity .*)", result.stdout)
    assert inferred == told


def test_a_foreign_source_that_could_be_is_found_out(tmp_path):
    alike = "--symbols 4 --branching 4 --classes 2 --min_length 6 --max_length 24 --concentration 0.1 --num_sequences 600".split()
    for seed in (0, 1): assert seqgpt("corpus", "markov", "--out_dir", f"m{seed}", "--seed", seed, *alike, cwd=tmp_path).returncode == 0
    (tmp_path/"m0/source.json").write_bytes((tmp_path/"m1/source.json").read_bytes())
    result = seqgpt("train", "--data_path", "m0", "--max_length", 24, "--num_epochs", 10, *TINY, cwd=tmp_path, drawn=False)
    assert result.returncode == 0 and "source.json cannot be the source" in result.stdout, result.stdout


def test_a_model_far_from_the_floor_stays_in_the_picture():
    from seqgpt.panels import plot_positions
    def perplexities(nats): return np.exp([6.0, *[min(nats, 700)]*30])
    for nats in (4.0, 900.0):
        ax = Figure().subplots()
        plot_positions({"this model": perplexities(nats), "best, class inferred": perplexities(0.7)}, ax)
        assert ax.get_ylim()[1] > np.exp(min(nats, 690))
