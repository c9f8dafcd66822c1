"Exported models: the same logits and tokens as PyTorch, with the library, with the command, and without either."
import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import refused, seqgpt
from test_generation import EQUAL, TOKENIZER, UNEQUAL, WAYS, random_model

from seqgpt import export as E
from seqgpt import onnx_folder
from seqgpt.checks import InputError
from seqgpt.commands import task_evaluation
from seqgpt.config import read_config
from seqgpt.decoding import Decoder
from seqgpt.inference import generate
from seqgpt.loading import load_model
from seqgpt.onnx_folder import FORMS
from seqgpt.onnx_models import OnnxModel
from seqgpt.runs import lock_run
from seqgpt.saving import save_model
from seqgpt.tokenizer import load_tokenizer

MODELS = {
    "plain": dict(n_layer=1, n_head=2, n_embd=16),
    "odd": dict(n_layer=2, n_head=3, n_embd=15, # heads of 5
                n_inner=7, activation_function="relu", scale_attn_by_inverse_layer_idx=True,
                layer_norm_epsilon=0.1, tie_word_embeddings=False),
}
BEST = "outputs/best_model"


@pytest.fixture(scope="module", params=MODELS)
def exported(request, once):
    "A model with weights so large that each token depends on all before it, and its three files."
    model = random_model(max_length=270, **MODELS[request.param])
    def export(folder):
        model.config.save_pretrained(folder)
        for name, cache in FORMS["clm"].items(): E.to_onnx(model, folder/f"{name}.onnx", cache)
    export.__name__ = f"exported_{request.param}"
    folder = once(export)
    return model, {name: OnnxModel(folder/f"{name}.onnx") for name in FORMS["clm"]}


def padding(length, gaps, left):
    "The mask and the positions of sequences with so much padding each, on the left or on the right."
    at = torch.arange(length)
    mask = (at >= gaps[:, None] if left else at < length - gaps[:, None]).long()
    return mask, (mask.cumsum(1) - 1).clamp(min=0)


def logits_in_two_parts(file, ids, mask, positions, past):
    "The logits of a model with a cache, for the first `past` tokens and then for the others."
    n = len(ids)
    cache = {name: np.zeros((n, heads, 0, size), np.float32) for name, (heads, size) in file.cache_shapes.items()}
    found = []
    for first, last in ((0, past), (past, ids.shape[1])):
        inputs = {"input_ids": ids[:, first:last].numpy(), "attention_mask": mask[:, :last].numpy(),
                  "position_ids": positions[:, first:last].numpy()}
        logits, *values = file.session.run(None, {**inputs, **cache})
        cache = dict(zip(cache, values))
        found.append(logits)
    return torch.from_numpy(np.concatenate(found, 1))


def test_same_logits_in_many_shapes(exported):
    model, files = exported
    rng = np.random.default_rng(0)
    for k in range(10):
        n = int(rng.integers(1, 5))
        length = int(rng.integers(1, 40))
        past = int(rng.integers(1, 30)) if k else 0 # once, the first of two parts is empty
        ids = torch.from_numpy(rng.integers(2, len(TOKENIZER), (n, past + length)))
        gaps = torch.from_numpy(rng.integers(0, past + length, n))
        for left in (True, False):
            mask, positions = padding(past + length, gaps, left)
            with torch.inference_mode():
                expected = model(ids, attention_mask=mask, position_ids=positions).logits[mask > 0]
            for file in files.values():
                assert torch.allclose(file(ids, mask, positions).logits[mask > 0], expected, atol=1e-4)
            found = logits_in_two_parts(files["model"], ids, mask, positions, past)
            assert torch.allclose(found[mask > 0], expected, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_same_tokens_with_the_same_seed(exported, way):
    model, files = exported
    def ask(model, prompts, n=1, new=40):
        return generate(model, TOKENIZER, prompts, n, max_new_tokens=new, seed=3, **WAYS[way])
    for prompts, n in ((EQUAL, 1), (UNEQUAL, 10)): # 40 samples are two batches, of 32 and 8
        expected = ask(model, prompts, n)
        for name in ("model", "fast"): assert ask(files[name], prompts, n) == expected, name
    assert ask(files["no_cache"], EQUAL, new=20) == ask(model, EQUAL, new=20)


def test_sequences_that_have_ended_do_not_stop_the_others(exported):
    "Nor does a long prompt, after which there is room for four tokens; what is computed for it later doesn't count."
    model, files = exported
    prompts = [*UNEQUAL, ["C1"]*265]
    expected = generate(model, TOKENIZER, prompts, seed=3, min_new_tokens=8)
    assert len(expected[4].tokens) - 265 == 4 < 20 < max(len(s.tokens) for s in expected[:4])
    for name in ("model", "fast"):
        assert generate(files[name], TOKENIZER, prompts, seed=3, min_new_tokens=8) == expected, name


def test_same_greedy_tokens_over_256_steps(exported):
    model, files = exported
    ids = {name: torch.tensor([[1, 4 + k] for k in range(4)]) for name in ("model", "fast", "PyTorch")}
    decoders = {name: files[name].decoder(files[name]) if name in files else Decoder(model) for name in ids}
    # without noise, the largest logit of this model soon stays the same; on and on, also after <eos>
    noise = 5*torch.randn(256, len(TOKENIZER), generator=torch.Generator().manual_seed(0))
    for step in noise:
        for name, decoder in decoders.items():
            new = (decoder(ids[name]) + step).argmax(1)
            ids[name] = torch.cat([ids[name], new[:, None]], 1)
    assert torch.equal(ids["model"], ids["PyTorch"]) and torch.equal(ids["fast"], ids["PyTorch"])
    assert len(ids["fast"].unique()) > 30 # nothing trivial


def test_what_is_taken_back_is_forgotten(exported):
    model, files = exported
    ids = torch.randint(4, len(TOKENIZER), (1, 150), generator=torch.Generator().manual_seed(0))
    for file in files.values():
        decoder = file.decoder(file)
        for n in (5, 6, 8, 120, 121, 20, 150):
            if n == 20: ids[:, 10:] = ids[:, 10:].flip(1) # another ending
            with torch.inference_mode(): expected = model(ids[:, :n]).logits[:, -1]
            if n == 20: decoder(ids[:, :10])
            assert torch.allclose(decoder(ids[:, :n]), expected, atol=1e-4)


def test_files_are_what_they_say(exported):
    _, files = exported
    for name, file in files.items():
        proto = onnx.load(file.file)
        onnx.checker.check_model(proto, full_check=True)
        assert {(o.domain, o.version) for o in proto.opset_import if not o.domain} == {("", E.OPSET)}
        assert ({n.domain for n in proto.graph.node} == {""}) == (name != "fast") # standard operators alone
        axes = {i.name: i.shape for i in file.session.get_inputs()}
        lengths = [shape[2] for name, shape in axes.items() if "past" in name]
        assert axes["input_ids"] == ["batch", "new"]
        assert all(isinstance(size, str) for size in axes["attention_mask"] + lengths)


def test_keys_and_values_stay_where_they_are(exported):
    file = exported[1]["fast"]
    decoder = file.decoder(file)
    ids = torch.full((3, 150), 5)
    decoder(ids[:, :10])
    places = [k.data_ptr() for k in decoder.kv_cache]
    decoder(ids[:, :100])
    assert places == [k.data_ptr() for k in decoder.kv_cache] # until they are full
    decoder(ids)
    assert places != [k.data_ptr() for k in decoder.kv_cache]


@pytest.fixture(scope="module")
def written(trained, classifier, once):
    "Copies of a language model (lm) and a classifier (c) with their exports."
    def written(folder):
        for cwd, run, path in (("lm", trained, BEST), ("c", classifier, "c/best_model")):
            shutil.copytree(run, folder/cwd, ignore=shutil.ignore_patterns("checkpoints", "runs"))
            result = seqgpt("export", "--model_path", path, cwd=folder/cwd)
            assert result.returncode == 0, result.stderr
            (folder/f"{cwd}.txt").write_text(result.stdout)
    return once(written)


def most_different(file):
    "How much the logits of this file may differ from PyTorch's."
    if "int8" in file: return 0.1
    if "fp16" in file: return 1e-2
    return 1e-4


@pytest.mark.parametrize("path, quality, files", [
    (f"lm/{BEST}", "perplexity", ["model", "no_cache", "fast", "fast_fp16", "fast_int8"]),
    ("c/c/best_model", "accuracy", ["model", "model_fp16", "model_int8"]),
])
def test_export_says_what_it_measured(written, path, quality, files):
    folder = written/path
    said = (written/f"{path.partition('/')[0]}.txt").read_text()
    rows = json.loads((folder/"onnx/export.json").read_text())["files"]
    assert [r["file"] for r in rows] == ["model.safetensors", *(f"{name}.onnx" for name in files)]
    truth = json.loads((folder/"evaluation/metrics.json").read_text())[quality]
    for row in rows[1:]:
        assert row["bytes"] == (folder/"onnx"/row["file"]).stat().st_size and row["file"] in said
        assert row["difference"] < most_different(row["file"])
        assert abs(row[quality] - truth) < (0.05 if "_" in row["file"][-10:] else 1e-4)
    card = (folder/"onnx/README.md").read_text()
    assert f"Opset {E.OPSET}" in card and "`<bos>` (1)" in card and quality in said


OPTIONS = [
    [],
    ["--temperature", 0],
    ["--top_k", 3, "--repetition_penalty", 1.2],
    ["--num_prompts", 4, "--num_samples", 3, "--top_p", 0.9],
]


@pytest.mark.parametrize("options", OPTIONS)
def test_infer_gives_the_same_on_both_runtimes(written, options):
    def ask(path, *flags):
        command = ["infer", "--mode", "generate", "--seed", 5, *options, "--model_path", path, *flags]
        return seqgpt(*command, cwd=written/"lm")
    expected = ask(BEST, "--runtime", "pytorch")
    assert expected.returncode == 0 and len(expected.stdout.split()) > 2
    assert ask(BEST, "--runtime", "onnx").stdout == expected.stdout
    if "--num_prompts" in options: # the exported folder knows no training data
        refused(ask(f"{BEST}/onnx"), "--prompt_file")
        return
    for path in (f"{BEST}/onnx", f"{BEST}/onnx/model.onnx"): assert ask(path).stdout == expected.stdout


def test_interactive_and_classify_on_onnx(written):
    cases = [("lm", ["--model_path", BEST, "--seed", 1], "C4\n\n/back\n/sample\n"),
             ("c", ["--model_path", "c/best_model", "--mode", "classify", "--num_prompts", 5], "")]
    for cwd, flags, typed in cases:
        ours = seqgpt("infer", *flags, "--runtime", "onnx", cwd=written/cwd, input=typed)
        theirs = seqgpt("infer", *flags, "--runtime", "pytorch", cwd=written/cwd, input=typed)
        assert ours.returncode == 0 and ours.stdout == theirs.stdout, ours.stderr


def test_what_cannot_be_exported_or_opened(written, tmp_path):
    lm = written/"lm"
    def export(*flags, cwd): return seqgpt("export", "--model_path", *flags, cwd=cwd)
    refused(export("nowhere", cwd=tmp_path), "nowhere: no config.json there")
    refused(export(BEST, "--out_dir", "outputs", cwd=lm), "outputs: is there already")
    refused(export(BEST, "--data_path", "nowhere.jsonl", "--out_dir", tmp_path/"x", cwd=lm), "nowhere.jsonl")
    assert not (tmp_path/"x").exists()
    plain = tmp_path/"plain"
    shutil.copytree(lm/BEST, plain, ignore=shutil.ignore_patterns("onnx"))
    def ask(path, *flags): return seqgpt("infer", "--mode", "generate", "--model_path", path, *flags, cwd=tmp_path)
    refused(ask(plain, "--runtime", "onnx"), f"seqgpt export --model_path {plain}")
    refused(ask(written/"c/c/best_model", "--runtime", "onnx"), "holds a classifier")
    check_damaged_folder(ask, written, tmp_path/"onnx")
    refused(ask(tmp_path/"nowhere", "--runtime", "onnx"), "nowhere: no config.json there")
    (tmp_path/"link").symlink_to(tmp_path)
    refused(export(plain, "--out_dir", tmp_path/"link", cwd=tmp_path), "is a link")
    (plain/"onnx").mkdir()
    (plain/"onnx/notes.txt").write_text("mine")
    refused(export(plain, cwd=tmp_path), "is there already, and holds 'notes.txt'")
    assert (plain/"onnx/notes.txt").read_text() == "mine"


def check_damaged_folder(ask, written, folder):
    "What was exported, with damaged files, those of another model, or another configuration."
    shutil.copytree(written/"lm"/BEST/"onnx", folder)
    refused(ask(folder/"nothing.onnx"), "no nothing.onnx there")
    right = (folder/"fast.onnx").read_bytes()
    for damaged in (b"", right[:1000], b"x"*1000, right[:-5000]):
        (folder/"fast.onnx").write_bytes(damaged)
        refused(ask(folder), "fast.onnx", "seqgpt export")
    shutil.copy(written/"c/c/best_model/onnx/model.onnx", folder/"fast.onnx")
    refused(ask(folder), "was not made from the model in")
    (folder/"fast.onnx").write_bytes(right)
    config = json.loads((folder/"config.json").read_text())
    for wrong in ({"n_layer": 2}, {"n_positions": 100}):
        (folder/"config.json").write_text(json.dumps({**config, **wrong}))
        refused(ask(folder), "was not made from the model in")


@pytest.fixture
def quick_export(written, monkeypatch):
    "The files of the language model are copied instead of exported anew, which takes seconds."
    there = {cache: written/"lm"/BEST/f"onnx/{name}.onnx" for name, cache in FORMS["clm"].items()}
    monkeypatch.setattr("seqgpt.onnx_folder.to_onnx", lambda model, path, cache: shutil.copy(there[cache], path))


def test_a_wrong_file_is_not_written(written, quick_export, monkeypatch):
    model = written/"lm"/BEST
    folder = model/"onnx"
    before = {p: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr("seqgpt.onnx_folder.max_abs_diff", lambda *args: 0.1)
    result = seqgpt("export", "--model_path", model, cwd=written/"lm")
    assert result.returncode == 1 and "gives other numbers than PyTorch" in result.stderr
    assert before == {p: p.read_bytes() for p in folder.iterdir()} and not [*model.glob(".*")]


def test_while_a_training_goes_on(written, quick_export, tmp_path):
    "What the next best model would delete is refused; what is written elsewhere is not."
    lm = shutil.copytree(written/"lm", tmp_path/"lm")
    measured = json.loads((lm/BEST/"evaluation/metrics.json").read_text())["perplexity"]
    evaluate = ["evaluate", "--model_path", BEST, "--num_samples", 0]
    infer = ["infer", "--model_path", BEST, "--mode", "generate", "--max_new_tokens", 1]
    with lock_run(lm/"outputs"):
        for command in (evaluate, [*evaluate, "--data_path", "data.jsonl"],
                        ["export", "--model_path", BEST], [*infer, "--out_dir", f"{BEST}/samples"]):
            refused(seqgpt(*command, cwd=lm), "a training is going on", "--out_dir")
        assert seqgpt(*evaluate, "--out_dir", tmp_path/"evaluation", cwd=lm, drawn=False).returncode == 0
        assert seqgpt(*infer, cwd=lm).returncode == 0
    assert json.loads((tmp_path/"evaluation/metrics.json").read_text())["perplexity"] == measured


def test_a_result_is_not_given_to_another_model(written, quick_export, monkeypatch, tmp_path):
    "A training replaces the best model while it is evaluated or exported."
    lm = shutil.copytree(written/"lm", tmp_path/"lm")
    best = lm/BEST
    model = load_model(best)
    tokenizer = load_tokenizer(best)
    config = read_config(best/"config.yaml")
    def replace_best(): save_model(best, model, tokenizer, config, {})
    measure, plot = task_evaluation("clm")
    def measure_and_replace(*args, **kwargs):
        measured = measure(*args, **kwargs)
        replace_best()
        return measured
    monkeypatch.setattr("seqgpt.commands.task_evaluation", lambda task: (measure_and_replace, plot))
    result = seqgpt("evaluate", "--model_path", BEST, "--num_samples", 0, cwd=lm)
    refused(result, "has replaced the model meanwhile", "best_model/evaluation was not written")
    to_onnx = onnx_folder.to_onnx # as it is now
    def replace_and_export(*args):
        replace_best()
        return to_onnx(*args)
    monkeypatch.setattr("seqgpt.onnx_folder.to_onnx", replace_and_export)
    refused(seqgpt("export", "--model_path", BEST, cwd=lm), "has replaced the model meanwhile")
    assert not (best/"evaluation").exists() and not (best/"onnx").exists() and not [*lm.rglob(".*.part")]


def test_without_the_data_of_the_training(written, quick_export, tmp_path):
    shutil.copytree(written/"lm"/BEST, tmp_path/"alone", ignore=shutil.ignore_patterns("onnx"))
    result = seqgpt("export", "--model_path", "alone", cwd=tmp_path)
    assert result.returncode == 0 and "without a measure of quality" in result.stdout + result.stderr
    assert (tmp_path/"alone/onnx/fast.onnx").exists()
    assert "accuracy" not in result.stdout and "perplexity" not in result.stdout
    assert seqgpt("export", "--model_path", "alone", cwd=tmp_path).returncode == 0 # an earlier export is written anew


def test_numbers_too_large_for_16_bits(written, tmp_path):
    proto = onnx.load(written/"lm/outputs/best_model/onnx/fast.onnx")
    weight = next(w for w in proto.graph.initializer if "mlp.c_fc.weight" in w.name)
    numbers = onnx.numpy_helper.to_array(weight).copy()
    numbers[5, 3] = 1e5
    weight.CopyFrom(onnx.numpy_helper.from_array(numbers, weight.name))
    onnx.save(proto, tmp_path/"fast.onnx")
    with pytest.raises(InputError, match="65504"): E.to_fp16(tmp_path/"fast.onnx", tmp_path/"half.onnx")


MISTAKES = [ # in flags of the script, and what it says
    (["H7"], "'H7' is not in vocab.json"), (["<eos>"], ""), (["C4"]*15, ""), (["--file", "model.onnx"], ""),
    (["--top_p", "0"], ""), (["--temperature", "nan"], ""), (["--seed", "-1"], ""),
]


def test_the_script_gives_the_same_tokens(written):
    flags = ["--model_path", BEST, "--prompt", "C4 D4", "--temperature", 0]
    expected = seqgpt("infer", "--mode", "generate", *flags, cwd=written/"lm").stdout
    def script(*args):
        command = [sys.executable, "-I", written/"lm"/BEST/"onnx/generate.py", *args]
        return subprocess.run(command, capture_output=True, text=True)
    assert script("C4", "D4", "--temperature", "0").stdout.split() == expected.split()
    sampled = [script("--seed", str(k)).stdout for k in (0, 1, 2, 3, 1)]
    assert sampled[1] == sampled[4] and len({*sampled}) > 1
    for wrong, says in MISTAKES:
        result = script(*wrong)
        assert result.returncode == 2 and says in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_folder_needs_onnxruntime_and_numpy_alone(written, tmp_path):
    shutil.copytree(written/"lm"/BEST/"onnx", tmp_path/"onnx")
    python = tmp_path/"venv/bin/python"
    packages = [f"onnxruntime=={onnxruntime.__version__}", f"numpy=={np.__version__}"]
    subprocess.run([sys.executable, "-m", "venv", tmp_path/"venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 1
    def run(python):
        command = [python, tmp_path/"onnx/generate.py", "C4", "--temperature", "0"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert run(python) == run(sys.executable) and run(python).startswith("C4 ")
