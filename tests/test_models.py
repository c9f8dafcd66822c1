"Every field of GPT2Config either works, from training to generation, or is refused with a message that says why."
import json

import pytest
import torch
from conftest import TINY, refused, seqgpt, write_lines
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

import seqgpt.training as training
from seqgpt.checks import InputError
from seqgpt.config import Config
from seqgpt.decoding import Decoder
from seqgpt.loading import load_model
from seqgpt.model import make_config, new_model
from seqgpt.tokenizer import load_tokenizer, make_tokenizer

# the same weights give other logits
COMPUTE = dict(activation_function="relu", layer_norm_epsilon=0.1, scale_attn_weights=False,
               scale_attn_by_inverse_layer_idx=True)
# other weights
SHAPE = dict(n_inner=24, tie_word_embeddings=False)
# other weights, of the same shape, come out of the training (in YAML 1 is a whole number)
LEARN = dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5, initializer_range=1)
# the same model
IDLE = dict(reorder_and_upcast_attn=True, use_cache=False, summary_type="mean", summary_use_proj=False,
            summary_activation="tanh", summary_proj_to_labels=False, summary_first_dropout=0.5)
FOLLOWS = ("vocab_size", "n_positions", "bos_token_id", "eos_token_id", "pad_token_id")
REFUSED = {
    **dict.fromkeys(FOLLOWS, "follows from the data and max_length, and cannot be set"),
    **dict.fromkeys(("n_layer", "n_head", "n_embd"), "is a setting of its own"),
    "add_cross_attention": "there is no encoder to attend to",
}
WORK = COMPUTE | SHAPE | LEARN | IDLE
BASE = {"initializer_range": 0.4} # large weights, so that each token depends on all before it
TOKENIZER = make_tokenizer({s: k for k, s in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", "a", "b"])})

def test_no_field_is_left_out(): assert set(GPT2Config.__annotations__) == {*WORK, *REFUSED}


@pytest.fixture(scope="module")
def learn(melodies, tmp_path_factory):
    "Trains for two steps; returns the folder of the model."
    folder = tmp_path_factory.mktemp("fields")
    write_lines(folder, [{"tokens": t} for t, _ in melodies[:60]])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(training, "save_curves", lambda *args: None) # half of the time
        def run(**fields):
            out = folder/"-".join(fields or ["plain"])
            config = Config(str(folder/"data.jsonl"), output_dir=str(out), cache_dir=str(folder/"cache"),
                                     max_length=16, n_layer=2, n_head=2, n_embd=16, batch_size=16, max_steps=2,
                                     learning_rate=1e-2, model=BASE | fields)
            training.train(config)
            return out/"best_model"
        yield run


@pytest.fixture(scope="module")
def plain(learn): return AutoModelForCausalLM.from_pretrained(learn()).eval()


def logits_of(model, ids):
    with torch.no_grad(): return model(ids).logits


def with_weights(model, config):
    "The weights of a model, in a model of another configuration."
    other = GPT2LMHeadModel(GPT2Config(**config)).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("name", WORK)
def test_field_works_from_training_to_generation(name, learn, plain):
    folder = learn(**{name: WORK[name]})
    written = json.loads((folder/"config.json").read_text())
    assert written[name] == WORK[name]
    model = load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval() # without seqgpt
    ids = torch.randint(4, len(load_tokenizer(folder)), (3, 12), generator=torch.Generator().manual_seed(0))
    expected = logits_of(theirs, ids)
    decoder = Decoder(model)
    # the first at once, the others one by one
    for n in range(3, 13): assert torch.allclose(decoder(ids[:, :n]), expected[:, n - 1], atol=1e-4), n
    if name in COMPUTE: # the comparison would see it
        fields = {k: v for k, v in written.items() if k in GPT2Config.__annotations__}
        without = with_weights(theirs, fields | {name: getattr(plain.config, name)})
        assert (logits_of(without, ids) - expected).abs().max() > 1e-2
    same = [p.shape for p in theirs.parameters()] == [p.shape for p in plain.parameters()]
    assert same == (name not in SHAPE)
    if same: assert torch.equal(logits_of(plain, ids), expected) == (name in IDLE)


@pytest.mark.parametrize("name", REFUSED)
def test_field_is_refused(name, melodies, tmp_path):
    write_lines(tmp_path, [{"tokens": t} for t, _ in melodies[:20]])
    value = "true" if "cross" in name else 3
    (tmp_path/"s.yaml").write_text(f"model: {{{name}: {value}}}\n")
    result = seqgpt("train", "--data_path", "data.jsonl", "--max_length", 16, *TINY, "--config", "s.yaml", cwd=tmp_path)
    refused(result, name, REFUSED[name])
    assert not (tmp_path/"outputs").exists()


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_activation(name, tmp_path):
    "Each that Transformers knows can be saved, opened and decoded with, or is refused at the start."
    def build(): return new_model(make_config(TOKENIZER, 16, 2, 2, 16, activation_function=name, **BASE), seed=0).eval()
    if name == "xielu":
        with pytest.raises(InputError, match="'xielu', which keeps numbers that are not trained"): build()
        return
    model = build()
    ids = torch.randint(6, (3, 12), generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    opened = load_model(tmp_path)
    decoder = Decoder(opened)
    for n in (5, 6, 7, 12): assert torch.allclose(decoder(ids[:, :n]), logits_of(model, ids)[:, n - 1], atol=1e-4)


@pytest.mark.parametrize("fields, says", [
    (dict(resid_pdrop=1), "resid_pdrop is 1. It is the share"),
    (dict(summary_first_dropout=7), "summary_first_dropout is 7"),
    (dict(layer_norm_epsilon=-1), "layer_norm_epsilon is -1.0. It must be 0 or more"),
    (dict(n_inner=8.5), "n_inner"),
    (dict(n_iner=8), "Did you mean 'n_inner'"),
    (dict(activation_function="gulu"), "There is no activation_function 'gulu'. Choose one of gelu, "),
])
def test_impossible_value(fields, says):
    with pytest.raises(InputError) as e: make_config(TOKENIZER, 16, 2, 2, 16, **fields)
    assert says in str(e.value)
