"Labels in front of sequences: writing such a corpus, asking for a label, guidance."
import re
import shutil
from unittest.mock import patch

import numpy as np
import pytest
import torch
from browser import tab
from conftest import NAMES, NOTES, TINY, VOCAB, read_json, read_lines, refused, seqgpt, worked, write_lines
from playwright.sync_api import expect
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from seqgpt.corpora import digits_shape
from seqgpt.encoding import read_corpus
from seqgpt.inference import generate
from seqgpt.loading import load_model
from seqgpt.onnx_folder import FORMS
from seqgpt.prompts import encode_prompt
from seqgpt.service import Service
from seqgpt.serving import make_app, serve_in_thread
from seqgpt.tokenizer import load_tokenizer, make_tokenizer

WORDS = ["down", "up"]
# the rule is learned in few steps
SURE = "--learning_rate 5e-3 --model.resid_pdrop 0 --model.embd_pdrop 0 --model.attn_pdrop 0".split()


def put_labels(folder, *args):
    "The command that puts labels in front of the sequences in `plain`."
    return seqgpt("corpus", "labelled", "--data_path", "plain", "--out_dir", "labelled", *args, cwd=folder)


def train(folder, data, out, *args, **options):
    return worked("train", "--data_path", data, "--output_dir", out, *args, cwd=folder, **options)


def generate_by_command(folder, *args):
    return seqgpt("infer", "--model_path", "m/best_model", "--mode", "generate", *args, cwd=folder)


def sequences(folder): return [line["tokens"] for line in read_lines(folder/"labelled/sequences.jsonl")]


@pytest.fixture(scope="module")
def labelled(melodies, once):
    "A model of melodies with up or down in front."
    def labelled(folder):
        write_lines(folder/"plain", [{"text": " ".join(t), "label": WORDS[l]} for t, l in melodies*3])
        assert put_labels(folder, "--unlabelled_share", 0.2, "--seed", 3).returncode == 0
        train(folder, "labelled", "m", "--num_epochs", 14, "--max_length", 16, *TINY, *SURE, "--n_layer", 2,
              "--n_embd", 32, drawn=False)
    return once(labelled)


@pytest.fixture(scope="module")
def digits(once):
    "A model of small digits with their labels in front, and what the command printed."
    def labelled_digits(folder):
        digits = ["digits", "--out_dir", "d", "--image_size", 8, "--grey_levels", 2]
        for args in (digits, ["labelled", "--data_path", "d", "--out_dir", "labelled"]):
            worked("corpus", *args, cwd=folder)
        lines = (folder/"labelled/sequences.jsonl").read_text().splitlines(True)
        (folder/"labelled/sequences.jsonl").write_text("".join(lines[:400]))
        result = train(folder, "labelled", "m", "--max_steps", 60, "--max_length", 70, *TINY, drawn=False)
        (folder/"printed.txt").write_text(result.stdout)
    return once(labelled_digits)


@pytest.fixture(scope="module")
def exported(digits, once):
    "That model, also as ONNX: the fast form, which the page and `infer` take."
    def exported_digits(folder):
        shutil.copytree(digits, folder, dirs_exist_ok=True)
        with patch.dict("seqgpt.onnx_folder.FORMS", clm={"fast": FORMS["clm"]["fast"]}):
            worked("export", "--model_path", "m/best_model", cwd=folder)
    return once(exported_digits)


def test_the_corpus_is_the_same_but_for_the_labels(labelled):
    before = read_lines(labelled/"plain/data.jsonl")
    after = read_lines(labelled/"labelled/sequences.jsonl")
    with_label = 0
    for old, new in zip(before, after, strict=True):
        tokens = new["tokens"]
        if tokens[0].startswith("label:"):
            with_label += 1
            assert tokens.pop(0) == f"label:{old['label']}"
        assert tokens == old["text"].split() and "label" not in new
    assert 0.7 < with_label/len(after) < 0.9
    vocab = read_json(labelled/"labelled/vocab.json")
    assert vocab == {**VOCAB, "label:down": 9, "label:up": 10}


def test_special_tokens_in_the_data_and_long_sequences_survive(tmp_path):
    "Nothing is cut off, however long, and what is framed already is not framed twice."
    lines = [{"tokens": ["<bos>", *NOTES*1000, "<eos>"], "label": 0}, {"input_ids": [4, 5], "label": "b"}]
    write_lines(tmp_path/"plain", lines)
    assert put_labels(tmp_path, "--unlabelled_share", 0).returncode == 0
    assert sequences(tmp_path) == [["label:0", *NOTES*1000], ["label:b", *NOTES[:2]]]
    read_corpus(tmp_path/"labelled", make_tokenizer(tmp_path/"labelled/vocab.json"), 6000, cache_dir=tmp_path)


LINE = {"tokens": NOTES, "label": 1}


@pytest.mark.parametrize("line, args, words", [
    ({"tokens": NOTES}, [], "label missing"),
    ({"tokens": NOTES, "label": NAMES[0]}, [], "label 'down $' contains white space"),
    ({"tokens": ["H"], "label": 1}, [], "unknown token"),
    (LINE, ["--unlabelled_share", 1], "less than 1"),
    (LINE, ["--seed", -1], "seed is -1"),
    (LINE, ["--vocab_path", "none.json"], "none.json"),
])
def test_mistakes(line, args, words, tmp_path):
    write_lines(tmp_path/"plain", [line])
    refused(put_labels(tmp_path, *args), words)
    assert not (tmp_path/"labelled").exists()


def test_bad_lines_are_left_out_where_that_is_asked_for(tmp_path):
    lines = [("C4 D4", "up"), ("C4 H4", "up"), ("D4 C4", "down")]
    write_lines(tmp_path/"plain", [{"text": text, "label": label} for text, label in lines])
    refused(put_labels(tmp_path, "--unlabelled_share", 0), "1 of 3 lines", "line 2", "--skip_bad_lines")
    result = put_labels(tmp_path, "--unlabelled_share", 0, "--skip_bad_lines")
    assert result.returncode == 0 and "left out (unknown token: 1, at line 2" in result.stdout, result.stderr
    assert sequences(tmp_path) == [["label:up", "C4", "D4"], ["label:down", "D4", "C4"]]


def test_never_twice_and_never_over_another(labelled):
    def again(data): return seqgpt("corpus", "labelled", "--data_path", data, "--out_dir", "again", cwd=labelled)
    refused(again("labelled"), "symbols of labels already", "'label:down'")
    refused(put_labels(labelled), "is there already")
    refused(again("nowhere"), "nowhere")


@pytest.mark.parametrize("word", WORDS)
def test_samples_have_the_label_of_the_prompt(word, labelled):
    result = generate_by_command(labelled, "--prompt", f"label:{word}", "--num_samples", 30, "--seed", 0,
                                 "--top_p", 0.9, "--guidance", 1.5)
    assert result.returncode == 0, result.stderr
    right = []
    for line in result.stdout.splitlines():
        label, *notes = line.split()
        steps = np.diff([NOTES.index(n) for n in notes]) % 5
        right.append(label == f"label:{word}" and bool((steps == (1 if word == "up" else 4)).all()))
    assert np.mean(right) > 0.9, result.stdout


def test_training_samples_ten_of_each(labelled):
    rows = read_lines(labelled/"m/samples.jsonl")
    assert [r["tokens"][0] for r in rows] == ["label:down"]*10 + ["label:up"]*10
    assert all(r["given"] == 1 for r in rows)


@pytest.mark.parametrize("scale", [0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_is_that_of_transformers(scale, use_cache, labelled):
    folder = labelled/"m/best_model"
    model = load_model(folder)
    tokenizer = load_tokenizer(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = [["label:up"], ["label:down", "C4", "D4"], ["label:up", "G4"]]
    ours = generate(model, tokenizer, prompts, max_new_tokens=8, temperature=0, guidance=scale, use_cache=use_cache)
    never = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id]
    settings = GenerationConfig(max_new_tokens=8, pad_token_id=tokenizer.pad_token_id,
                                eos_token_id=tokenizer.eos_token_id, suppress_tokens=never, do_sample=False,
                                guidance_scale=float(scale))
    for prompt, sample in zip(prompts, ours):
        ids, without = (torch.tensor([encode_prompt(tokenizer, p)]) for p in (prompt, prompt[1:]))
        output = theirs.generate(ids, attention_mask=torch.ones_like(ids), negative_prompt_ids=without,
                                 generation_config=settings)
        expected = tokenizer.convert_ids_to_tokens(output[0, 1:].tolist())
        assert sample.tokens == [t for t in expected if t not in ("<eos>", "<pad>")]


def test_guidance_on_onnx_runtime_draws_the_same(exported):
    def draw(runtime):
        return generate_by_command(exported, "--prompt", "label:7", "--num_samples", 10, "--seed", 1, "--guidance", 2,
                                   "--runtime", runtime).stdout
    assert draw("onnx") == draw("pytorch") != ""


@pytest.mark.parametrize("args, words", [
    (["--guidance", -1, "--prompt", "label:up"], "guidance is -1"),
    (["--guidance", 2], "prefix without symbols"),
])
def test_guidance_mistakes(args, words, labelled): refused(generate_by_command(labelled, *args), words)


def test_an_unlabelled_model_goes_on_with_labels(labelled):
    "Its vocabulary grows by them."
    train(labelled, "plain", "before", "--max_steps", 5, "--max_length", 16, *TINY, bare=True)
    result = train(labelled, "labelled", "after", "--init_from", "before/best_model", "--max_steps", 5, bare=True)
    assert "knows 5 of the 7 symbols" in result.stdout
    assert AutoTokenizer.from_pretrained(labelled/"after/best_model")("label:up C4")["input_ids"] == [10, 4]


def test_labelled_digits_are_still_pictures(digits):
    assert digits_shape(read_json(digits/"labelled/vocab.json")) == (8, 2)
    printed = (digits/"printed.txt").read_text()
    assert "as the digit of their label" in printed
    assert re.search(r"^m/samples.jsonl: \d+ samples.\nm/samples.png: of ", printed, re.M) # both files are named
    assert (digits/"m/samples.png").stat().st_size > 1000


@pytest.fixture(params=["served", "exported"])
def address(request, exported):
    "That of the page of the model."
    folder = exported/"m/best_model"
    if request.param == "exported": yield next((folder/"onnx").glob("*.html")).as_uri()
    else:
        service = Service((load_model(folder), load_tokenizer(folder)))
        with serve_in_thread(make_app(service)) as url: yield url


def test_the_page_asks_for_a_label(address, chromium):
    "What is drawn begins with the label, and nothing else is given."
    with tab(chromium) as page:
        page.goto(address)
        expect(page.locator("#label option")).to_have_text(["any", *"0123456789"])
        page.select_option("#label", label="7")
        expect(page.locator("#rows")).to_have_value("0")
        page.fill("#seed", "5")
        page.locator("#go").click()
        expect(page.locator("body")).not_to_have_attribute("aria-busy", "true")
        assert page.locator("#tokens mark").text_content() == "label:7"
        assert page.wrong == []
