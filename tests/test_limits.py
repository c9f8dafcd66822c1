"""Markov corpora, lower bounds and the samples' report, through the command, against computations that share no code
with the library."""
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from conftest import NOTES, TINY, refused, seqgpt, worked, write_lines
from matplotlib.figure import Figure
from rapidfuzz.distance import Levenshtein
from sacrebleu.metrics import BLEU

SMALL = "--symbols 20 --classes 3 --branching 3 --min_length 6 --max_length 24".split()


@pytest.fixture(scope="module", params=[1, 2])
def markov(request, tmp_path_factory):
    "A small corpus of order 1 or 2, and what the command printed."
    folder = tmp_path_factory.mktemp("markov")
    result = worked("corpus", "markov", "--out_dir", "m", "--num_sequences", 300, "--order", request.param, *SMALL,
                    cwd=folder)
    return folder, result.stdout


def read(path): return [json.loads(line) for line in open(path)]


def corpus(folder, rows="sequences"):
    "The source of a Markov corpus, and rows of it."
    return json.loads((folder/"m/source.json").read_text()), read(folder/f"m/{rows}.jsonl")


def metrics_of(folder): return json.loads((folder/"metrics.json").read_text())


def by_the_rule(source, tokens, c):
    "The probabilities that class `c` gives to each symbol after the first, by nothing but the rule in source.json."
    number = {s: k for k, s in enumerate(source["symbols"])}
    follow = source["successors"]
    table = source["probabilities"][c]
    found = []
    for t in range(1, len(tokens)):
        x = number[tokens[t - 1]]
        r = follow[x].index(number[tokens[t]])
        if source["order"] == 1: found.append(table[x][r])
        elif t == 1: found.append(1 / len(follow[x]))
        else:
            w = number[tokens[t - 2]]
            found.append(table[len(follow[w])*w + follow[w].index(x)][r])
    return found


def recomputed(source, rows):
    """Mean nats a token for a model that is told the class, and for one that infers it, and the share of classes
    inferred: products of probabilities, no steps."""
    conditional = inferred = right = tokens = 0
    lengths = source["max_length"] - source["min_length"] + 1
    for row in rows:
        given = [math.prod(by_the_rule(source, row["tokens"], c)) for c in range(3)]
        joint = [p / len(source["symbols"]) / lengths for p in given]
        conditional -= math.log(joint[row["label"]])
        inferred -= math.log(sum(joint) / 3)
        right += (joint[row["label"]] == max(joint)) / joint.count(max(joint))
        tokens += len(row["tokens"]) + 1
    return conditional/tokens, inferred/tokens, right/len(rows)


def test_limits_follow_from_source_json(markov):
    folder, printed = markov
    source, rows = corpus(folder)
    conditional, inferred, right = recomputed(source, rows)
    assert f"class told      perplexity {math.exp(conditional):.4g}," in printed
    assert f"class inferred  perplexity {math.exp(inferred):.4g}," in printed
    assert f"classification  accuracy {right:.2%}" in printed
    assert {row["label"] for row in rows} == {0, 1, 2}
    lengths = Counter(len(row["tokens"]) + 2 for row in rows)
    assert min(lengths) == 6 and max(lengths) == 24 and max(lengths.values()) < 50


def test_another_draw_of_the_same_source(markov):
    folder, _ = markov
    order = json.loads((folder/"m/source.json").read_text())["order"]
    for seed, name in ((0, "again"), (1, "other")):
        worked("corpus", "markov", "--out_dir", f"{name}{order}", "--num_sequences", 300, "--order", order,
               "--draw_seed", seed, *SMALL, cwd=folder)
    def files(name): return [(folder/name/part).read_bytes() for part in ("source.json", "sequences.jsonl")]
    source = files("m")
    other = files(f"other{order}")
    assert source == files(f"again{order}") and source[0] == other[0] and source[1] != other[1]


def test_the_default_corpus_is_of_the_size_of_the_digits(tmp_path):
    worked("corpus", "markov", "--out_dir", "m", "--num_sequences", 200, cwd=tmp_path)
    rows = read(tmp_path/"m/sequences.jsonl")
    assert len(json.loads((tmp_path/"m/vocab.json").read_text())) == 516
    assert {row["label"] for row in rows} == set(range(10))
    assert 900 < max(len(row["tokens"]) for row in rows) <= 1022


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
    result = worked("train", "--data_path", "m/train.jsonl", "--validation_path", "m/validation.jsonl", *TINY,
                    "--max_length", 24, "--num_epochs", 4, cwd=folder, drawn=False)
    return folder, result.stdout


def test_lower_bounds_next_to_the_model(measured):
    folder, printed = measured
    source, rows = corpus(folder, "validation")
    conditional, inferred, _ = recomputed(source, rows)
    metrics = metrics_of(folder/"outputs/best_model/evaluation")
    assert metrics["sequences"] == 60 == len(json.loads((folder/"outputs/split.json").read_text())["validation"])
    bounds = metrics["floors"]
    assert np.isclose(bounds["class told"]["perplexity"], math.exp(conditional))
    assert np.isclose(bounds["class inferred"]["perplexity"], math.exp(inferred))
    assert np.isclose(metrics["perplexity_over_floor"], metrics["perplexity"] / math.exp(inferred))
    assert metrics["perplexity_over_floor"] > 1
    assert np.isclose(metrics["accuracy_below_best"], bounds["class inferred"]["accuracy"] - metrics["accuracy"])
    for name in ("perplexity", "accuracy", "perplexity_over_floor", "accuracy_below_best"):
        low, high = metrics[f"{name}_interval"]
        assert low < metrics[name] < high
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nats_per_sequence"]*60/metrics["tokens"]))
    counts = [sum(len(row["tokens"]) + 1 > t for row in rows) for t in range(len(metrics["nats_by_position"]))]
    assert np.dot(metrics["nats_by_position"], counts) == pytest.approx(60*metrics["nats_per_sequence"], rel=1e-4)
    assert "above the lower bound" in printed and "best, class told" in printed


def test_samples_are_held_against_the_source(measured):
    folder, _ = measured
    samples = metrics_of(folder/"outputs/best_model/evaluation")["samples"]
    assert samples["number"] == 60 and samples["rule"] == "an impossible pair"
    assert samples["held_out_invalid_sequences"] == 0 < samples["invalid_sequences"] <= 1
    assert 0 < samples["invalid_symbols"] < samples["invalid_sequences"]
    train, real = ([row["tokens"] for row in read(folder/f"m/{name}.jsonl")] for name in ("train", "validation"))
    def framed(tokens): return ["<bos>", *tokens, "<eos>"]
    nearest = [min(Levenshtein.normalized_distance(framed(q), framed(t)) for t in train) for q in real]
    assert samples["held_out_nearest_training_distance"] == pytest.approx(np.median(nearest))
    assert samples["held_out_copies"] == np.mean([q in train for q in real])
    endings = [" ".join(q[len(q)//2:]) for q in real]
    others = BLEU(tokenize="none", force=True).corpus_score(endings[1:] + endings[:1], [endings]).score
    assert samples["other_endings_bleu"] == pytest.approx(others) and 0 <= samples["bleu"] <= 100


def test_evaluations_repeat(measured):
    folder, _ = measured
    def ask(out, *args):
        return seqgpt("evaluate", "--model_path", "outputs/best_model", "--out_dir", out, *args, cwd=folder,
                      drawn=False)
    order = json.loads((folder/"m/source.json").read_text())["order"]
    for out, seed in (("a", 0), ("b", 1)): assert ask(f"{out}{order}", "--seed", seed).returncode == 0
    a = metrics_of(folder/f"a{order}")
    b = metrics_of(folder/f"b{order}")
    assert a == metrics_of(folder/"outputs/best_model/evaluation")
    assert a["samples"] != b["samples"] and a["perplexity"] == b["perplexity"]
    result = ask(f"none{order}", "--num_samples", 0)
    assert result.returncode == 0 and "drawn" not in result.stdout
    assert "samples" not in metrics_of(folder/f"none{order}")
    refused(ask("minus", "--num_samples", -1), "num_samples is -1")


def without(d, name): return {k: v for k, v in d.items() if k != name}


@pytest.mark.parametrize("damage, words", [
    (lambda d: "{", "source.json"),
    (lambda d: json.dumps({**d, "probabilities": [[[2.0]]]}), "do not fit"),
    (lambda d: json.dumps(without(d, "symbols")), "symbols"),
    (lambda d: json.dumps({**d, "order": 3 - d["order"]}), "do not fit"),
    (lambda d: json.dumps({**d, "successors": [[99]*3]*20}), "not numbers of symbols"),
    (lambda d: json.dumps({**d, "successors": [row[::-1] for row in d["successors"][::-1]]}), "is not from the source"),
])
def test_a_source_that_does_not_fit_costs_only_the_lower_bound(measured, damage, words, tmp_path):
    folder, _ = measured
    source = (folder/"m/source.json").read_text()
    try:
        (folder/"m/source.json").write_text(damage(json.loads(source)))
        result = seqgpt("evaluate", "--model_path", "outputs/best_model", "--num_samples", 2, "--out_dir", tmp_path/"e",
                        cwd=folder, drawn=False)
    finally: (folder/"m/source.json").write_text(source)
    assert result.returncode == 0 and words in result.stdout, result.stdout + result.stderr
    assert "floors" not in metrics_of(tmp_path/"e")


def evaluate_file(model, name, *args, cwd, **options):
    "Evaluates a model of `seqgpt train` on a file in the folder `cwd`."
    return seqgpt("evaluate", "--model_path", model/"outputs/best_model", "--data_path", name, "--out_dir", "e", *args,
                  cwd=cwd, **options)


def test_sequences_without_labels_have_a_lower_bound_too(measured, tmp_path):
    folder, _ = measured
    rows = read(folder/"m/validation.jsonl")
    (tmp_path/"some.jsonl").write_text("".join(json.dumps({"tokens": row["tokens"]}) + "\n" for row in rows))
    (tmp_path/"source.json").write_text((folder/"m/source.json").read_text())
    assert evaluate_file(folder, "some.jsonl", "--num_samples", 0, cwd=tmp_path, drawn=False).returncode == 0
    labelled = metrics_of(folder/"outputs/best_model/evaluation")["floors"]
    assert metrics_of(tmp_path/"e")["floors"] == {"class inferred": labelled["class inferred"]}


def test_sequences_cut_off_have_a_lower_bound_too(markov):
    folder, _ = markov
    source, rows = corpus(folder)
    out = folder/f"cut{source['order']}"
    worked("train", "--data_path", "m/sequences.jsonl", "--max_length", 12, "--max_steps", 2, "--output_dir", out.name,
           *TINY, cwd=folder, drawn=False)
    metrics = metrics_of(out/"best_model/evaluation")
    nats = tokens = 0
    for k in json.loads((out/"split.json").read_text())["validation"]:
        some = rows[k]["tokens"][:11]
        complete = len(rows[k]["tokens"]) <= 10 # so that <eos> fits in, too
        # of 19 lengths that are equally likely, those that this can become
        lengths = 1 if complete else sum(n >= 11 for n in range(4, 23))
        nats -= math.log(math.prod(by_the_rule(source, some, rows[k]["label"])) / 20 * lengths / 19)
        tokens += len(some) + complete
    assert tokens == metrics["tokens"]
    assert metrics["floors"]["class told"]["perplexity"] == pytest.approx(math.exp(nats/tokens))


def test_a_single_sequence_has_a_lower_bound_and_no_interval(measured, tmp_path):
    folder, _ = measured
    (tmp_path/"one.jsonl").write_text(json.dumps(read(folder/"m/validation.jsonl")[0]) + "\n")
    (tmp_path/"source.json").write_text((folder/"m/source.json").read_text())
    result = evaluate_file(folder, "one.jsonl", "--num_samples", 0, cwd=tmp_path)
    assert result.returncode == 0 and "nan" not in result.stdout, result.stdout
    assert "above the lower bound, accuracy" in result.stdout, result.stdout


def test_validation_path(melodies, tmp_path):
    write_lines(tmp_path/"a", [{"tokens": t} for t, _ in melodies[:150]])
    write_lines(tmp_path/"b", [{"tokens": t} for t, _ in melodies[140:]])
    def run(*args):
        return seqgpt("train", "--data_path", "a/data.jsonl", "--max_length", 16, "--max_steps", 2, *TINY, *args,
                      cwd=tmp_path, drawn=False)
    result = run("--validation_path", "b")
    assert result.returncode == 0, result.stderr
    says = (r"150 sequences to train, 60 to validate; "
            r"(\d+) validation sequences also appear in the training set")
    shared = int(re.search(says, result.stdout)[1])
    known = {tuple(t) for t, _ in melodies[:150]}
    assert shared == sum(tuple(t) in known for t, _ in melodies[140:]) >= 10
    assert metrics_of(tmp_path/"outputs/best_model/evaluation")["sequences"] == 60
    assert "`b`" in (tmp_path/"outputs/best_model/README.md").read_text()
    refused(run("--validation_path", "nowhere", "--output_dir", "o"), "nowhere")
    with open(tmp_path/"b/data.jsonl", "a") as f: f.write(json.dumps({"tokens": NOTES}) + "\n")
    refused(seqgpt("evaluate", "--model_path", "outputs/best_model", cwd=tmp_path), "has changed since the training")
    refused(run("--validation_path", "b", "--resume", "--max_steps", 3), "the data")
    assert not (tmp_path/"o").exists()


def test_samples_where_nobody_knows_the_rule(trained):
    samples = metrics_of(trained/"outputs/best_model/evaluation")["samples"]
    lines = read(trained/"data.jsonl")
    split = json.loads((trained/"outputs/split.json").read_text())
    def pairs(k): return set(zip(["<bos>", *lines[k]["tokens"]], [*lines[k]["tokens"], "<eos>"]))
    seen = set().union(*map(pairs, split["train"]))
    assert samples["rule"] == "a pair unseen in training" and samples["number"] == 40
    assert samples["held_out_invalid_sequences"] == np.mean([not pairs(k) <= seen for k in split["validation"]])


def test_evaluate_without_the_training_data(melodies, tmp_path):
    write_lines(tmp_path/"gone", [{"tokens": t} for t, _ in melodies])
    worked("train", "--data_path", "gone", "--max_length", 16, "--max_steps", 2, *TINY, cwd=tmp_path, bare=True)
    (tmp_path/"gone").rename(tmp_path/"moved")
    def ask(*args): return evaluate_file(tmp_path, "moved", "--num_samples", 5, *args, cwd=tmp_path, drawn=False)
    result = ask()
    assert result.returncode == 0 and "BLEU" in result.stdout and "nearest" not in result.stdout, result.stderr
    samples = metrics_of(tmp_path/"e")["samples"]
    assert "bleu" in samples and not {"invalid_sequences", "copies"} & samples.keys()
    refused(ask("--out_dir", "other", "--seed", -1), "seed is -1")


@pytest.mark.parametrize("labels", [["$x^$", "a" * 300], [f"class {k}" for k in range(60)], [None], ["one"]])
def test_any_labels_can_be_drawn(trained, labels, tmp_path):
    def line(k):
        label = labels[k % len(labels)]
        return {"tokens": NOTES[:1 + k % 5]} | ({} if label is None else {"label": label})
    write_lines(tmp_path, [line(k) for k in range(60)])
    result = evaluate_file(trained, "data.jsonl", "--num_samples", 2, cwd=tmp_path)
    assert result.returncode == 0 and (tmp_path/"e/evaluation.png").stat().st_size > 10_000, result.stderr


def test_one_sequence(trained, tmp_path):
    write_lines(tmp_path, [{"tokens": NOTES}])
    result = evaluate_file(trained, "data.jsonl", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path/"e/metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert "perplexity_interval" not in metrics and "other_endings_bleu" not in metrics["samples"]
    assert metrics["samples"]["number"] == 1


def test_classes_that_are_alike_cannot_be_told_apart(tmp_path):
    result = seqgpt("corpus", "markov", "--out_dir", "m", "--num_sequences", 50, "--order", 2, "--difference", 0,
                    *SMALL, cwd=tmp_path)
    assert "classification  accuracy 33.33%" in result.stdout, result.stdout
    inferred, conditional = re.findall(r"class \w+ +(perplexity .*)", result.stdout)
    assert inferred == conditional


def test_a_foreign_source_that_could_be_is_found_out(tmp_path):
    alike = ("--symbols 4 --branching 4 --classes 2 --min_length 6 --max_length 24 --concentration 0.1 "
             "--num_sequences 600").split()
    for seed in (0, 1):
        worked("corpus", "markov", "--out_dir", f"m{seed}", "--seed", seed, *alike, cwd=tmp_path)
    (tmp_path/"m0/source.json").write_bytes((tmp_path/"m1/source.json").read_bytes())
    result = worked("train", "--data_path", "m0", "--max_length", 24, "--num_epochs", 10, *TINY, cwd=tmp_path,
                    drawn=False)
    assert "source.json cannot be the source" in result.stdout, result.stdout


def test_a_model_far_from_the_lower_bound_stays_in_the_picture():
    from seqgpt.panels import plot_positions
    def perplexities(nats): return np.exp([6.0, *[min(nats, 700)]*30])
    for nats in (4.0, 900.0):
        ax = Figure().subplots()
        plot_positions({"this model": perplexities(nats), "best, class inferred": perplexities(0.7)}, ax)
        assert ax.get_ylim()[1] > np.exp(min(nats, 690))
