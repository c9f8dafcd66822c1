"The saved folders in Transformers 4.57, in an environment of its own: pytest -m slow"
import json
import subprocess
import sys

import pytest
import torch
from conftest import VOCAB

CHECK = """
import json, random, sys
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, GPT2Tokenizer, GPT2TokenizerFast
folder = sys.argv[1]
vocab = json.load(open(folder + "/vocab.json"))
auto, slow, fast = (c.from_pretrained(folder) for c in (AutoTokenizer, GPT2Tokenizer, GPT2TokenizerFast))
rng = random.Random(0)
for _ in range(500):
    symbols = rng.choices(list(vocab), k=rng.randint(1, 12))
    text, ids = " ".join(symbols), [vocab[s] for s in symbols]
    assert auto(text)["input_ids"] == slow(text)["input_ids"] == fast(text)["input_ids"] == ids and auto.decode(ids) == text
    assert auto("x-y " + text + " zz")["input_ids"] == [auto.unk_token_id, *ids, auto.unk_token_id]
model = GPT2LMHeadModel.from_pretrained(folder)
ids = auto("<bos> C4 E4", return_tensors="pt")["input_ids"]
new = AutoModelForCausalLM.from_pretrained(folder).generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
from transformers import pipeline
pipe = pipeline("text-classification", sys.argv[2], top_k=None)
texts = ["C4 D4 E4", "<bos> E4 D4 C4 <eos>"]
assert set(auto(text)) == {"input_ids", "attention_mask"} # no token types, which GPT-2 would add to the tokens
print(json.dumps({"classes": [{p["label"]: p["score"] for p in pipe([t])[0]} for t in texts], "version": transformers.__version__, "logits": model(**auto("<bos> C4 E4", return_tensors="pt")).logits[0, -1].tolist(), "generated": new}))
"""


@pytest.mark.slow
def test_saved_folders_in_transformers_4(trained, classifier, tmp_path):
    python = tmp_path/"venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path/"venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={torch.__version__.split('+')[0]}", "transformers==4.57.*"], check=True)
    folder = trained/"outputs/best_model"
    there = json.loads(subprocess.run([python, "-c", CHECK, folder, classifier/"c/best_model"], check=True, capture_output=True, text=True).stdout)
    from transformers import AutoModelForCausalLM, pipeline
    model, ids = AutoModelForCausalLM.from_pretrained(folder), torch.tensor([[VOCAB[s] for s in ("<bos>", "C4", "E4")]])
    assert there["version"].startswith("4.57")
    assert torch.allclose(model(ids).logits[0, -1], torch.tensor(there["logits"]), atol=1e-5)
    assert model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist() == there["generated"]
    for text, scores in zip(("C4 D4 E4", "E4 D4 C4"), there["classes"]):
        here = {p["label"]: p["score"] for p in pipeline("text-classification", str(classifier/"c/best_model"), top_k=None)([text])[0]}
        assert here.keys() == scores.keys() and all(abs(here[k] - scores[k]) < 1e-5 for k in here)
