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

from seqgpt import cli
from seqgpt import export as E
from seqgpt.checks import InputError
from seqgpt.config import read_config
from seqgpt.decoding import Decoder
from seqgpt.inference import generate
from seqgpt.loading import load_model
from seqgpt.runs import alone_in
from seqgpt.saving import save_model
from seqgpt.tokenizer import load_tokenizer

MODELS = {"plain": dict(n_layer=1, n_head=2, n_embd=16),
          "odd": dict(n_layer=2, n_head=3, n_embd=15, n_inner=7, activation_function="relu", scale_attn_by_inverse_layer_idx=True, layer_norm_epsilon=0.1, tie_word_embeddings=False)} # heads of 5


@pytest.fixture(scope="module", params=MODELS)
def exported(request, once):
    "A model with weights so large that each token depends on all before it, and its three files."
    model = random_model(max_length=270, **MODELS[request.param])
    def export(folder):
        model.config.save_pretrained(folder)
        for name, cache in E.FORMS["clm"].items(): E.to_onnx(model, folder/f"{name}.onnx", cache)
    export.__name__ = f"exported_{request.param}"
    folder = once(export)
    return model, {name: E.OnnxModel(folder/f"{name}.onnx") for name in E.FORMS["clm"]}


def test_same_logits_in_many_shapes(exported):
    model, files = exported
    rng = np.random.default_rng(0)
    for k in range(10):
        n, length, past = int(rng.integers(1, 5)), int(rng.integers(1, 40)), int(rng.integers(1, 30)) if k else 0
        ids, gaps = torch.from_numpy(rng.integers(2, len(TOKENIZER), (n, past + length))), torch.from_numpy(rng.integers(0, past + length, n))
        for left in (True, False): # of each sequence, a part is padding
            at = torch.arange(past + length)
            mask = (at >= gaps[:, None] if left else at < past + length - gaps[:, None]).long()
            places = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.inference_mode(): expected = model(ids, attention_mask=mask, position_ids=places).logits
            for file in files.values(): assert torch.allclose(file(ids, mask, places).logits[mask > 0], expected[mask > 0], atol=1e-4)
            past_keys = {k: np.zeros((n, heads, 0, size), np.float32) for k, (heads, size) in files["model"].kept.items()}
            found = [] # the same in two parts, the first of them once empty
            for first, last in ((0, past), (past, past + length)):
                logits, *kept = files["model"].session.run(None, {"input_ids": ids[:, first:last].numpy(), "attention_mask": mask[:, :last].numpy(), "position_ids": places[:, first:last].numpy(), **past_keys})
                past_keys = dict(zip(past_keys, kept))
                found.append(logits)
            assert torch.allclose(torch.from_numpy(np.concatenate(found, 1))[mask > 0], expected[mask > 0], atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_same_tokens_with_the_same_seed(exported, way):
    model, files = exported
    for prompts, n in ((EQUAL, 1), (UNEQUAL, 10)): # 40 samples are two batches, of 32 and 8
        expected = generate(model, TOKENIZER, prompts, n, max_new_tokens=40, seed=3, **WAYS[way])
        for name in ("model", "fast"): assert generate(files[name], TOKENIZER, prompts, n, max_new_tokens=40, seed=3, **WAYS[way]) == expected, name
    assert generate(files["no_cache"], TOKENIZER, EQUAL, max_new_tokens=20, seed=3, **WAYS[way]) == generate(model, TOKENIZER, EQUAL, max_new_tokens=20, seed=3, **WAYS[way])


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
    for taste in 5*torch.randn(256, len(TOKENIZER), generator=torch.Generator().manual_seed(0)): # alone, the largest logit of this model soon stays the same; on and on, also behind <eos>
        for name, d in decoders.items(): ids[name] = torch.cat([ids[name], (d(ids[name]) + taste).argmax(1)[:, None]], 1)
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
        assert axes["input_ids"] == ["batch", "new"] and all(isinstance(s, str) for s in (axes["attention_mask"] + [shape[2] for k, shape in axes.items() if "past" in k]))


def test_keys_and_values_stay_where_they_are(exported):
    file = exported[1]["fast"]
    decoder = file.decoder(file)
    ids = torch.full((3, 150), 5)
    decoder(ids[:, :10])
    places = [k.data_ptr() for k in decoder.kept]
    decoder(ids[:, :100])
    assert places == [k.data_ptr() for k in decoder.kept] # until they are full
    decoder(ids)
    assert places != [k.data_ptr() for k in decoder.kept]


@pytest.fixture(scope="module")
def written(trained, classifier, once):
    "Copies of a language model and a classifier with their exports."
    def written(folder):
        for cwd, run, path in (("lm", trained, "outputs/best_model"), ("judge", classifier, "c/best_model")):
            shutil.copytree(run, folder/cwd, ignore=shutil.ignore_patterns("checkpoints", "runs"))
            result = seqgpt("export", "--model_path", path, cwd=folder/cwd)
            assert result.returncode == 0, result.stderr
            (folder/f"{cwd}.txt").write_text(result.stdout)
    return once(written)


def test_export_says_what_it_measured(written):
    for cwd, path, quality, files in (("lm", "outputs/best_model", "perplexity", ["model", "no_cache", "fast", "fast_fp16", "fast_int8"]), ("judge", "c/best_model", "accuracy", ["model", "model_fp16", "model_int8"])):
        folder, said = written/cwd/path, (written/f"{cwd}.txt").read_text()
        rows = json.loads((folder/"onnx/export.json").read_text())["files"]
        assert [r["file"] for r in rows] == ["model.safetensors", *(f"{f}.onnx" for f in files)]
        truth = json.loads((folder/"evaluation/metrics.json").read_text())[quality]
        for row in rows[1:]:
            assert row["bytes"] == (folder/"onnx"/row["file"]).stat().st_size and row["file"] in said
            assert row["difference"] < (0.1 if "int8" in row["file"] else 1e-2 if "fp16" in row["file"] else 1e-4)
            assert abs(row[quality] - truth) < (0.05 if "_" in row["file"][-10:] else 1e-4)
        card = (folder/"onnx/README.md").read_text()
        assert f"Opset {E.OPSET}" in card and "`<bos>` (1)" in card and quality in said


@pytest.mark.parametrize("options", ([], ["--temperature", 0], ["--top_k", 3, "--repetition_penalty", 1.2], ["--num_prompts", 4, "--num_samples", 3, "--top_p", 0.9]))
def test_infer_gives_the_same_on_both_runtimes(written, options):
    ask = lambda *how: seqgpt("infer", "--mode", "generate", "--seed", 5, *options, *how, cwd=written/"lm")
    best = "outputs/best_model"
    expected = ask("--model_path", best, "--runtime", "pytorch")
    assert expected.returncode == 0 and len(expected.stdout.split()) > 2
    assert ask("--model_path", best, "--runtime", "onnx").stdout == expected.stdout
    if "--num_prompts" not in options: # the exported folder knows no training data
        for path in (f"{best}/onnx", f"{best}/onnx/model.onnx"): assert ask("--model_path", path).stdout == expected.stdout
    else: refused(ask("--model_path", f"{best}/onnx"), "--prompt_file")


def test_interactive_and_classify_on_onnx(written):
    for cwd, flags, typed in (("lm", ["--model_path", "outputs/best_model", "--seed", 1], "C4\n\n/back\n/sample\n"), ("judge", ["--model_path", "c/best_model", "--mode", "classify", "--num_prompts", 5], "")):
        ours, theirs = (seqgpt("infer", *flags, "--runtime", r, cwd=written/cwd, input=typed) for r in ("onnx", "pytorch"))
        assert ours.returncode == 0 and ours.stdout == theirs.stdout, ours.stderr


def test_what_cannot_be_exported_or_opened(written, tmp_path):
    lm = written/"lm"
    refused(seqgpt("export", "--model_path", "nowhere", cwd=tmp_path), "nowhere: no config.json there")
    refused(seqgpt("export", "--model_path", "outputs/best_model", "--out_dir", "outputs", cwd=lm), "outputs: is there already")
    refused(seqgpt("export", "--model_path", "outputs/best_model", "--data_path", "nowhere.jsonl", "--out_dir", tmp_path/"x", cwd=lm), "nowhere.jsonl")
    assert not (tmp_path/"x").exists()
    plain = tmp_path/"plain"
    shutil.copytree(lm/"outputs/best_model", plain, ignore=shutil.ignore_patterns("onnx"))
    ask = lambda path, *how: seqgpt("infer", "--mode", "generate", "--model_path", path, *how, cwd=tmp_path)
    refused(ask(plain, "--runtime", "onnx"), f"seqgpt export --model_path {plain}")
    refused(ask(written/"judge/c/best_model", "--runtime", "onnx"), "holds a classifier")
    folder = tmp_path/"onnx"
    shutil.copytree(lm/"outputs/best_model/onnx", folder)
    refused(ask(folder/"nothing.onnx"), "no nothing.onnx there")
    whole = (folder/"fast.onnx").read_bytes()
    for damaged in (b"", whole[:1000], b"x"*1000, whole[:-5000]):
        (folder/"fast.onnx").write_bytes(damaged)
        refused(ask(folder), "fast.onnx", "seqgpt export")
    shutil.copy(written/"judge/c/best_model/onnx/model.onnx", folder/"fast.onnx")
    refused(ask(folder), "was not made from the model in")
    (folder/"fast.onnx").write_bytes(whole)
    config = json.loads((folder/"config.json").read_text())
    for wrong in ({"n_layer": 2}, {"n_positions": 100}):
        (folder/"config.json").write_text(json.dumps({**config, **wrong}))
        refused(ask(folder), "was not made from the model in")
    refused(ask(tmp_path/"nowhere", "--runtime", "onnx"), "nowhere: no config.json there")
    (tmp_path/"link").symlink_to(tmp_path)
    refused(seqgpt("export", "--model_path", plain, "--out_dir", tmp_path/"link", cwd=tmp_path), "is a link")
    (plain/"onnx").mkdir()
    (plain/"onnx/notes.txt").write_text("mine")
    refused(seqgpt("export", "--model_path", plain, cwd=tmp_path), "is there already, and holds 'notes.txt'")
    assert (plain/"onnx/notes.txt").read_text() == "mine"


@pytest.fixture
def quick_export(written, monkeypatch):
    "The files of the language model are copied instead of exported anew, which takes seconds."
    there = {cache: written/f"lm/outputs/best_model/onnx/{name}.onnx" for name, cache in E.FORMS["clm"].items()}
    monkeypatch.setattr(E, "to_onnx", lambda model, path, cache: shutil.copy(there[cache], path))


def test_a_wrong_file_is_not_written(written, quick_export, monkeypatch):
    model, folder = written/"lm/outputs/best_model", written/"lm/outputs/best_model/onnx"
    before = {p: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(E, "difference", lambda *args: 0.1)
    result = seqgpt("export", "--model_path", model, cwd=written/"lm")
    assert result.returncode == 1 and "gives other numbers than PyTorch" in result.stderr
    assert before == {p: p.read_bytes() for p in folder.iterdir()} and not [*model.glob(".*")]


def test_while_a_training_goes_on(written, quick_export, monkeypatch, tmp_path):
    "What a best model to come would delete is refused; what is written elsewhere is not. Nor is a result given to a model that it is not of."
    lm = shutil.copytree(written/"lm", tmp_path/"lm")
    best = lm/"outputs/best_model"
    measured = json.loads((best/"evaluation/metrics.json").read_text())["perplexity"]
    evaluate, infer = ["evaluate", "--model_path", "outputs/best_model", "--num_samples", 0], ["infer", "--model_path", "outputs/best_model", "--mode", "generate", "--max_new_tokens", 1]
    with alone_in(lm/"outputs"):
        for command in (evaluate, [*evaluate, "--data_path", "data.jsonl"], ["export", "--model_path", "outputs/best_model"], [*infer, "--out_dir", "outputs/best_model/drawn"]):
            refused(seqgpt(*command, cwd=lm), "a training is going on", "--out_dir")
        assert seqgpt(*evaluate, "--out_dir", tmp_path/"evaluation", cwd=lm, drawn=False).returncode == seqgpt(*infer, cwd=lm).returncode == 0
    assert json.loads((tmp_path/"evaluation/metrics.json").read_text())["perplexity"] == measured
    model, tokenizer, config = load_model(best), load_tokenizer(best), read_config(best/"config.yaml")
    replace_best = lambda: save_model(best, model, tokenizer, config, {})
    measure, plot = cli.measures("clm")
    monkeypatch.setattr(cli, "measures", lambda task: (lambda *args, **kwargs: (measure(*args, **kwargs), replace_best())[0], plot))
    refused(seqgpt(*evaluate, cwd=lm), "has replaced the model meanwhile", "best_model/evaluation was not written")
    to_onnx = E.to_onnx
    monkeypatch.setattr(E, "to_onnx", lambda *args: (replace_best(), to_onnx(*args)))
    refused(seqgpt("export", "--model_path", "outputs/best_model", cwd=lm), "has replaced the model meanwhile")
    assert not (best/"evaluation").exists() and not (best/"onnx").exists() and not [*lm.rglob(".*.part")]


def test_without_the_data_of_the_training(written, quick_export, tmp_path):
    shutil.copytree(written/"lm/outputs/best_model", tmp_path/"alone", ignore=shutil.ignore_patterns("onnx"))
    result = seqgpt("export", "--model_path", "alone", cwd=tmp_path)
    assert result.returncode == 0 and "without a measure of quality" in result.stdout + result.stderr and (tmp_path/"alone/onnx/fast.onnx").exists()
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


def test_the_script_gives_the_same_tokens(written):
    folder = written/"lm/outputs/best_model/onnx"
    expected = seqgpt("infer", "--mode", "generate", "--model_path", "outputs/best_model", "--prompt", "C4 D4", "--temperature", 0, cwd=written/"lm").stdout
    script = lambda *args: subprocess.run([sys.executable, "-I", folder/"generate.py", *args], capture_output=True, text=True)
    assert script("C4", "D4", "--temperature", "0").stdout.split() == expected.split()
    drawn = [script("--seed", str(k)).stdout for k in (0, 1, 2, 3, 1)]
    assert drawn[1] == drawn[4] and len({*drawn}) > 1
    for wrong, says in ((["H7"], "'H7' is not in vocab.json"), (["<eos>"], ""), (["C4"]*15, ""), (["--file", "model.onnx"], ""), (["--top_p", "0"], ""), (["--temperature", "nan"], ""), (["--seed", "-1"], "")):
        result = script(*wrong)
        assert result.returncode == 2 and says in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_folder_needs_onnxruntime_and_numpy_alone(written, tmp_path):
    shutil.copytree(written/"lm/outputs/best_model/onnx", tmp_path/"onnx")
    python = tmp_path/"venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path/"venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", f"onnxruntime=={onnxruntime.__version__}", f"numpy=={np.__version__}"], check=True)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 1
    run = lambda p: subprocess.run([p, tmp_path/"onnx/generate.py", "C4", "--temperature", "0"], check=True, capture_output=True, text=True).stdout
    assert run(python) == run(sys.executable) and run(python).startswith("C4 ")
