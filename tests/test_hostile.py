"""Opening a stranger's model or corpus runs no code of theirs, writes nothing where they say, and takes no more than
there is."""
import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT, SHORT, TINY, rebuilt, refused, seqgpt, worked

INFER = ["infer", "--mode", "generate", "--num_samples", 3, "--seed", 0, "--model_path", "outputs/best_model"]
CLASSIFY = ["infer", "--mode", "classify", "--prompt", "C4 D4", "--model_path", "c/best_model"]
EVALUATE = ["evaluate", "--num_samples", 5, "--model_path", "outputs/best_model"]
FINE_TUNE = ["train", "--task", "classification", "--init_from", "outputs/best_model", "--output_dir", "new",
             "--max_steps", 1]
REDOS = {"type": "Replace", "pattern": {"Regex": "^((\\S+)+)+$|(C4|C4 ?)+$"}, "content": "<pad>"}

happened = []
watching = False
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen",
             "socket.connect", "socket.getaddrinfo", "urllib.Request", "ctypes.dlopen")
FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def wrote(path): happened.append(("write", os.path.realpath(os.fsdecode(path))))


def watch(event, args):
    "What Python itself reports: https://docs.python.org/3/library/audit_events.html."
    if not watching: return
    if event in FORBIDDEN and args != (None,): happened.append((event, str(args)))
    elif event == "open":
        if isinstance(args[0], (str, bytes)) and args[2] & FOR_WRITING: wrote(args[0])
    elif event == "os.mkdir" and os.path.isdir(args[0]): pass # it is there already
    elif event in ("os.mkdir", "os.symlink", "os.link"): wrote(args[0])
    elif event == "os.rename": wrote(args[1])


sys.addaudithook(watch) # cannot be taken away again, so `watching` turns it on


@contextmanager
def observed(*may_write):
    "Nothing forbidden happens; nothing is written but beneath `may_write`, where encoded data is kept, and run locks."
    global watching
    happened.clear()
    watching = True
    try: yield
    finally: watching = False
    places = [os.path.realpath(p) for p in (*may_write, os.environ["HF_DATASETS_CACHE"])]
    def allowed(path):
        if path == "/dev/null" or path.endswith("/outputs/.lock"): return True
        return any(path == p or path.startswith(p + os.sep) for p in places)
    assert not [(event, what) for event, what in happened if event != "write" or not allowed(what)]


class Evil:
    "Unpickling it runs a command."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f"touch {self.path}",)


def change(path, **fields): path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


PICKLES = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl", "tf_model.h5", "flax_model.msgpack",
           "rng_state.pth", "scheduler.pt", "adapter_model.bin")
MODULES = ("modeling_evil", "tokenization_evil", "configuration_evil", "evil", "sitecustomize", "json", "torch",
           "handler")
OTHERS = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "metrics.json", "merges.txt", "README.md")
AUTO = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM",
                                          "AutoModelForSequenceClassification", "AutoTokenizer")}
EVIL_CONFIG = {
    "auto_map": AUTO, "trust_remote_code": True, "_name_or_path": "../../../etc", "tokenizer_class": "EvilTokenizer",
    "attn_implementation": "kernels-community/flash-attn", "_attn_implementation": "kernels-community/flash-attn",
    "_attn_implementation_internal": "evil/kernel", "experts_implementation": "evil", "use_kernels": True,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}, "dtype": "float16",
    "torch_dtype": "float16", "custom_pipelines": {"evil": {"impl": "evil.Evil"}}, "base_model_tp_plan": {"*": "evil"},
    "transformers_weights": "../../evil.safetensors", "output_attentions": True, "output_hidden_states": True,
    "problem_type": "regression", "num_labels": 10**9, "pruned_heads": {"0": [0, 1]}, "gradient_checkpointing": True,
    "task_specific_params": {"evil": {}},
}
EVIL_TOKENIZER_CONFIG = {
    "auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "EvilTokenizer", "trust_remote_code": True,
    "tokenizer_file": "/etc/passwd", "vocab_file": "/etc/passwd", "extra_special_tokens": {"evil": "C4"},
    "added_tokens_decoder": {"4": {"content": "<pad>", "special": True}}, "fix_mistral_regex": True,
    "processor_class": "evil.Evil",
}
EVIL_TOKENIZER = {
    "normalizer": REDOS, "decoder": {"type": "Evil"}, "truncation": {"max_length": -1},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "((a*)*)*b"}, "behavior": "Removed", "invert": False},
    "added_tokens": [{"id": 10**9, "content": "C4"}],
}
EVIL_FILES = {
    "adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "../evil", "auto_mapping": AUTO},
    "model.safetensors.index.json": {"weight_map": {"transformer.wte.weight": "../../../../etc/passwd"}},
    "generation_config.json": {"max_new_tokens": 10**9, "num_beams": 10**6, "trust_remote_code": True,
                               "custom_generate": "evil"},
}


def poison(folder, evil):
    "Everything in a model folder by which other programs can be made to run code, or to open other files."
    for name in PICKLES: (folder/name).write_bytes(pickle.dumps(Evil(evil)))
    torch.save({"x": Evil(evil)}, folder/"pytorch_model-00001-of-00001.bin")
    for name in MODULES: (folder/f"{name}.py").write_text(f"open({str(evil)!r}, 'w')\n")
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(evil) + "') }}"
    change(folder/"config.json", **EVIL_CONFIG)
    change(folder/"tokenizer_config.json", chat_template=template, **EVIL_TOKENIZER_CONFIG)
    change(folder/"tokenizer.json", **EVIL_TOKENIZER)
    for name, content in EVIL_FILES.items(): (folder/name).write_text(json.dumps(content))
    (folder/"chat_template.jinja").write_text("{{ 7 * 7 }}")
    for name in OTHERS: (folder/name).write_text("[" * 10**5)
    return folder


def but_speed(text): return re.sub(r" +[\d,]+  best so far", "", text)


NAMED = dict(zip(["infer", "classify", "evaluate", "train"], [INFER, CLASSIFY, EVALUATE, FINE_TUNE], strict=True))


@pytest.mark.parametrize("command", NAMED.values(), ids=NAMED)
def test_nothing_but_names_shapes_and_numbers_is_taken_from_a_model(command, copied, runs, tmp_path, monkeypatch):
    clean = tmp_path/"clean"
    shutil.copytree(runs, clean)
    wanted = seqgpt(*command, cwd=clean, drawn=False)
    for out in ("outputs", "c"): poison(copied/out/"best_model", tmp_path/"evil")
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("unpickled"))
    with observed(copied/"outputs/best_model/evaluation", copied/"new"):
        result = worked(*command, cwd=copied, drawn=False)
    assert but_speed(result.stdout) == but_speed(wanted.stdout) and not (tmp_path/"evil").exists()
    if command is not FINE_TUNE: return
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"): # what is written anew is clean
        assert "evil" not in (copied/"new/best_model"/name).read_text()


@pytest.mark.parametrize("command", [INFER, EVALUATE, FINE_TUNE], ids=["infer", "evaluate", "train"])
def test_weights_in_other_forms_are_refused(command, copied, tmp_path):
    model = copied/"outputs/best_model"
    poison(model, tmp_path/"evil")
    (model/"model.safetensors").unlink()
    with observed(): refused(seqgpt(*command, cwd=copied), "no model.safetensors there")
    shutil.copy(model/"pytorch_model.bin", model/"model.safetensors")
    with observed(): refused(seqgpt(*command, cwd=copied), "model.safetensors: cannot be opened")
    assert not (tmp_path/"evil").exists() and not (copied/"new").exists()


WRITING = {"cache_dir": "stolen", "output_dir": "stolen", "overwrite": "true", "resume": "true"}


@pytest.mark.parametrize("command", [[*INFER, "--num_prompts", 2], EVALUATE, FINE_TUNE],
                         ids=["infer", "evaluate", "train"])
def test_the_settings_of_a_model_do_not_say_where_to_write(command, copied, tmp_path):
    path = copied/"outputs/best_model/config.yaml"
    text = path.read_text()
    for name, value in WRITING.items():
        if value == "stolen": value = tmp_path/value
        text = re.sub(f"^{name}: .*$", f"{name}: {value}", text, flags=re.M)
    path.write_text(text)
    with observed(copied/"outputs/best_model/evaluation", copied/"new"):
        result = seqgpt(*command, cwd=copied, drawn=False)
    if result.returncode: refused(result, "Choose one of --resume")
    assert str(tmp_path/"stolen") in text and not (tmp_path/"stolen").exists()


def test_the_command_says_where_to_write(copied):
    worked(*EVALUATE, "--cache_dir", "mine", cwd=copied, drawn=False)
    assert any((copied/"mine").iterdir())


@pytest.mark.parametrize("link", ["evaluation", "evaluation/metrics.json", "evaluation/evaluation.png"])
def test_links_in_a_model_do_not_lead_writing_away(link, copied, tmp_path):
    target = tmp_path/"mine"
    if link == "evaluation": target.mkdir()
    else: target.write_text("precious")
    (copied/"outputs/best_model"/link).parent.mkdir(exist_ok=True)
    (copied/"outputs/best_model"/link).symlink_to(target)
    with observed(): refused(seqgpt(*EVALUATE, cwd=copied), link, "--out_dir")
    assert not any(target.iterdir()) if target.is_dir() else target.read_text() == "precious"


LIMITED = """
import json, psutil, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (300, 300)) # for all of them
from conftest import seqgpt
limit = psutil.Process().memory_info().vms + 4*2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for args in json.load(open("cases.json")):
    before = resource.getrusage(resource.RUSAGE_SELF)
    result = seqgpt(*args, cwd=".")
    after = resource.getrusage(resource.RUSAGE_SELF)
    answer = [result.returncode, result.stderr, (after.ru_maxrss - before.ru_maxrss) / 2**10]
    with open("answers.jsonl", "a") as file: print(json.dumps(answer), file=file)
"""


def huge(head, body):
    "A table of positions of petabytes."
    return {**head, "transformer.wpe.weight": {**head["transformer.wpe.weight"], "shape": [2**46, 16]}}, body


def many(head, body):
    "50,000 blocks with empty weights."
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return {**head, **{f"transformer.h.{k}.ln_1.weight": empty for k in range(1, 50_000)}}, body


def test_petabytes_are_refused_before_memory_or_time_is_taken(copied, forks):
    generate = ["infer", "--mode", "generate", "--model_path"]
    def model(name, change_head=None, **fields):
        shutil.copytree(copied/"outputs/best_model", copied/name)
        change(copied/name/"config.json", **fields)
        if change_head: rebuilt(copied/name/"model.safetensors", change_head)
        return [*generate, name]
    (copied/"bomb.jsonl").write_bytes(gzip.compress(b"[" * 2**26, 9) * 64) # 4 GiB in 4 MB, a single line
    (copied/"ids.jsonl").write_text('{"input_ids": [4, 1000000000000000]}\n' * 3)
    (copied/"ids.json").write_text(json.dumps({"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, "C4": 10**15}))
    train = ["train", "--data_path", "data.jsonl", "--output_dir", "new", *map(str, TINY)]
    cases = {
        "warm": [*map(str, INFER)][:-1] + ["nowhere"],
        "layers": model("layers", n_layer=10**9),
        "wide": model("wide", n_embd=10**9),
        "positions": model("positions", n_positions=10**15),
        "symbols": model("symbols", vocab_size=10**15),
        "inner": model("inner", n_inner=10**15),
        "fits the head": model("both", huge, n_positions=2**46),
        "head": model("head", huge),
        "many blocks": model("many", many, n_layer=50_000),
        "flag n_layer": [*train, "--n_layer", "1000000000"],
        "flag n_embd": [*train, "--n_embd", "1000000000"],
        "flag max_length": [*train, "--max_length", "1000000000000"],
        "bomb": [*train, "--data_path", "bomb.jsonl"],
        "prompts": [*generate, "outputs/best_model", "--prompt_file", "bomb.jsonl"],
        "ids": [*train, "--data_path", "ids.jsonl"],
        "vocab": [*train, "--vocab_path", "ids.json"],
    }
    (copied/"cases.json").write_text(json.dumps([*cases.values()]))
    done = forks(cwd=copied, code=LIMITED)
    assert done["passed"], done["printed"]
    for name, line in zip(cases, (copied/"answers.jsonl").read_text().splitlines(), strict=True):
        code, said, mebibytes = json.loads(line)
        refused(subprocess.CompletedProcess(name, code, "", said))
        if name != "warm": assert mebibytes < 400, (name, mebibytes)
    assert not (copied/"new").exists()


def plain(result): return all(c.isprintable() or c in "\n\t" for c in result.stdout + result.stderr)


def refused_plainly(result):
    refused(result)
    assert plain(result), result.stderr


def test_terminals_obey_nobody(copied):
    escape = "\x1b]0;mine\x07\x1b[2J\x9b31m"
    bad = [{"tokens": [escape]}, {"tokens": ["C4"], "label": escape}]
    (copied/"many").mkdir()
    (copied/"many"/f"{escape}.jsonl").write_text('{"x\n')
    (copied/"many/b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in SHORT + bad))
    result = worked(*EVALUATE, "--data_path", "many", "--skip_bad_lines", cwd=copied, drawn=False)
    assert plain(result), result.stderr
    assert "\\x1b" in result.stdout and "2 bad lines left out" in result.stdout, result.stderr
    flags = [[flag, escape] for flag in ("--prompt", "--prompt_file", "--model_path", "--config", "--mode")]
    for args in (*flags, [escape], [f"--{escape}"]): refused_plainly(seqgpt(*INFER, *args, cwd=copied))
    in_json = escape.encode("unicode_escape").decode().replace("\\x", "\\u00")
    evil = {"gpt2": in_json, "WordLevel": escape, "data.jsonl": '"\\e[2J"', "<pad>": "\\u001b[2J"}
    for part in ("config.json", "tokenizer.json", "config.yaml", "tokenizer_config.json"):
        path = copied/"outputs/best_model"/part
        text = path.read_text()
        new = text
        for word, other in evil.items(): new = new.replace(word, other)
        path.write_text(new)
        refused_plainly(seqgpt(*EVALUATE, cwd=copied))
        path.write_text(text)
    refused_plainly(seqgpt(escape, cwd=copied))


DANGEROUS = ("pickle", "torch.load(", "trust_remote_code", "yaml.unsafe_load", "yaml.full_load", "eval(", "exec(",
             "np.load(", "shell=True", "os.system", "extractall")


def test_no_module_opens_pickles_or_trusts_remote_code():
    for path in (ROOT/"seqgpt").glob("*.py"):
        for forbidden in DANGEROUS:
            assert not re.search(rf"(?<![\w.]){re.escape(forbidden)}", path.read_text()), (path, forbidden)
