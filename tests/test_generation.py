"Generation against Transformers' own `generate`: the same tokens, greedy and with the same generator."
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    StoppingCriteriaList,
)

from seqgpt import cpu
from seqgpt.checks import InputError
from seqgpt.decoding import Decoder
from seqgpt.evaluation import evaluate
from seqgpt.inference import generate, make_sampler, next_tokens, stream
from seqgpt.model import make_config, new_model
from seqgpt.prompts import (
    encode_prompt,
    encode_sequence,
    one_character_each,
    split_symbols,
)
from seqgpt.scores import score_sequences
from seqgpt.tokenizer import make_tokenizer

SYMBOLS = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"{note}{octave}" for octave in range(1, 9) for note in "CDEFG")]
VOCAB = {s: k for k, s in enumerate(SYMBOLS)}
TOKENIZER = make_tokenizer(VOCAB)
EQUAL = ["C4 D4"]
UNEQUAL = ["C4", "", "E4 F4 G4 C4 D4 E4", "C4 D4"]
WAYS = {
    "greedy": dict(temperature=0),
    "sampled": {},
    "cool": dict(temperature=0.7),
    "top_k": dict(top_k=3),
    "top_p": dict(top_p=0.8),
    "penalty": dict(repetition_penalty=1.3),
    "greedy, penalty": dict(temperature=0, repetition_penalty=1.5),
    "everything": dict(temperature=1.5, top_k=5, top_p=0.9, repetition_penalty=1.2),
}
LONGER = {"not before": dict(min_new_tokens=9), "all before": dict(temperature=0.7, top_k=3, min_new_tokens=130)}
FIELDS = {
    "plain": {},
    "no scale": dict(scale_attn_weights=False),
    "scale by layer": dict(scale_attn_by_inverse_layer_idx=True),
    "inner": dict(n_inner=24),
    "relu": dict(activation_function="relu"),
    "epsilon": dict(layer_norm_epsilon=0.1),
    "own head": dict(tie_word_embeddings=False),
    "no cache": dict(use_cache=False),
}


def random_model(max_length=140, scale=8, **fields):
    "A model of 40 notes with weights so large that each token depends on all before it."
    fields = {"n_layer": 2, "n_head": 2, "n_embd": 16} | fields
    model = new_model(make_config(TOKENIZER, max_length, **fields), seed=1).eval()
    torch.manual_seed(2)
    for p in model.parameters(): p.data += torch.randn_like(p)*(0.3 if p.ndim == 1 else 0.02*scale)
    return model


def with_room(model):
    "The same model for Transformers' `generate`, whose rows go on beyond the last position when they have ended."
    positions = {"n_positions": 2*model.config.n_positions}
    more = GPT2LMHeadModel(GPT2Config(**model.config.to_diff_dict() | positions)).eval()
    weights = model.state_dict()
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"].repeat(2, 1)
    more.load_state_dict(weights)
    return more


def theirs(model, prompts, num_samples=1, max_new_tokens=None, temperature=1.0, seed=0, batch_size=32, top_k=0,
           top_p=1.0, repetition_penalty=1.0, min_new_tokens=0):
    "Ids that Transformers adds, each sequence up to the last position of the model, <eos> and what follows it cut off."
    encoded = [ids for p in prompts for ids in [encode_prompt(TOKENIZER, p)]*num_samples]
    sampling = dict(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
    how = GenerationConfig(max_new_tokens=model.config.n_positions, min_new_tokens=min_new_tokens,
                           **sampling if temperature else dict(do_sample=False),
                           repetition_penalty=repetition_penalty, pad_token_id=0, eos_token_id=2,
                           suppress_tokens=[0, 1, 3])
    wide = with_room(model)
    rows = []
    torch.manual_seed(seed)
    for k in range(0, len(encoded), batch_size):
        batch = encoded[k:k + batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([[0]*(longest - len(p)) + p for p in batch])
        mask = torch.tensor([[0]*(longest - len(p)) + [1]*len(p) for p in batch])
        room = torch.tensor([min(max_new_tokens or 10**9, model.config.n_positions - len(p)) for p in batch])
        def full(found, scores, room=room, longest=longest): return found.shape[1] - longest >= room
        stop = StoppingCriteriaList([full])
        added = wide.generate(ids, attention_mask=mask, generation_config=how, stopping_criteria=stop)[:, longest:]
        rows += [row[:n] for row, n in zip(added.tolist(), room)]
    return [row[:row.index(2)] if 2 in row else row for row in rows]


def ours(model, *args, **options):
    samples = generate(model, TOKENIZER, *args, **{"seed": 0, **options})
    return [TOKENIZER.convert_tokens_to_ids(s.tokens[s.given:]) for s in samples]


@pytest.mark.parametrize("way", WAYS | LONGER)
@pytest.mark.parametrize("prompts, num_samples", [(EQUAL, 1), (EQUAL, 3), (UNEQUAL, 1), (UNEQUAL, 10)])
def test_same_tokens_as_transformers(way, prompts, num_samples):
    model = random_model()
    options = (WAYS | LONGER)[way]
    expected = theirs(model, prompts, num_samples, **options)
    assert ours(model, prompts, num_samples, **options) == expected # 40 samples are two batches, of 32 and 8
    if num_samples == 10 and way == "sampled": # nothing trivial
        assert len({len(row) for row in expected}) > 10 and max(map(len, expected)) > 60
        assert len({*map(tuple, expected)}) > 30


@pytest.mark.parametrize("fields", FIELDS)
def test_every_field_of_the_configuration_counts(fields):
    model = random_model(**FIELDS[fields])
    for options in (dict(temperature=0), {}):
        assert ours(model, UNEQUAL, 2, **options) == theirs(model, UNEQUAL, 2, **options)


def test_logits_are_those_of_the_model_whatever_was_kept():
    model = random_model(max_length=300, scale=3)
    padding = torch.tensor([0, 3, 1])
    ids = torch.randint(4, len(VOCAB), (3, 260))
    ids[1, :3] = ids[2, :1] = 0
    place = torch.arange(260) - padding[:, None]
    with torch.no_grad():
        expected = model(ids, attention_mask=(place >= 0).long(), position_ids=place.clamp(min=0)).logits
    decoder = Decoder(model, padding)
    for n in (5, 6, 7, 150, 151, 40, 41, 260, 4, 259, 260): # on, by several at once, and back
        assert torch.allclose(decoder(ids[:, :n]), expected[:, n - 1], atol=1e-4), n
    assert decoder.kv_cache[0].shape[-1] < 400


def test_half_precision():
    model = random_model(scale=3)
    ids = torch.randint(4, len(VOCAB), (3, 120))
    exact = Decoder(model)
    expected = torch.stack([exact(ids[:, :n]) for n in range(20, 121)])
    decoder = Decoder(model.bfloat16())
    found = torch.stack([decoder(ids[:, :n]) for n in range(20, 121)])
    with torch.no_grad(): at_once = model(ids).logits[:, 19:].transpose(0, 1)
    assert found.dtype == torch.bfloat16
    # no worse than the model's own
    assert (found - expected).abs().mean() < 1.2*(at_once - expected).abs().mean()
    assert len(ours(model, UNEQUAL, 2)) == 8


def test_choosing_leaves_the_logits_alone():
    logits = torch.randn(3, len(VOCAB))
    ids = torch.randint(4, len(VOCAB), (3, 5))
    for options in WAYS.values():
        before = logits.clone()
        chosen = make_sampler(TOKENIZER, **options)(ids, logits)
        assert torch.equal(before, logits)
        assert chosen.shape == (3,) and not {0, 1, 3} & set(chosen.tolist())


def test_generation_stops_when_all_have_ended(monkeypatch):
    model = random_model()
    calls = []
    step = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, token: calls.append(1) or step(self, token))
    longest = max(len(row) for row in theirs(model, EQUAL, 3, seed=0))
    assert longest < 100 and ours(model, EQUAL, 3) and len(calls) == longest


def test_sequences_that_have_ended_get_padding():
    torch.manual_seed(0)
    start = torch.ones(5, 1, dtype=torch.long)
    tokens = [*stream(Decoder(random_model()), start, make_sampler(TOKENIZER), TOKENIZER)]
    rows = torch.stack(tokens, 1).tolist()
    ends = [row.index(2) for row in rows] # each has ended, and not all at once
    assert len(set(ends)) > 1 and max(ends) == len(rows[0]) - 1
    for row, end in zip(rows, ends): assert not any(row[end + 1:])


def test_choosing_gives_the_threads_back():
    before = torch.get_num_threads()
    choose = make_sampler(TOKENIZER)
    torch.set_num_threads(before + 1)
    try:
        choose(torch.tensor([[1]]), torch.zeros(1, len(TOKENIZER)))
        with pytest.raises(InputError): choose(torch.tensor([[1]]), torch.full((1, len(TOKENIZER)), torch.nan))
        assert torch.get_num_threads() == before + 1
    finally: torch.set_num_threads(before)


NOTES = list(VOCAB)[4:]


@pytest.mark.parametrize("options", [{}, dict(use_cache=False), dict(guidance=1.5)], ids=str)
def test_each_sequence_has_its_own_room(options):
    "A long prompt in the same call takes nothing from the short ones, whatever is computed again."
    model = random_model(max_length=48)
    prompts = [[note, "C1"] for note in NOTES[:5]] + [NOTES + NOTES[:5], ["C1"], NOTES[:30]]
    how = dict(temperature=0, min_new_tokens=40, **options)
    together = generate(model, TOKENIZER, prompts, **how)
    alone = [generate(model, TOKENIZER, [p], **how)[0] for p in prompts]
    assert together == alone and [s.given for s in together] == [*map(len, prompts)]
    assert all(s.finished or len(s.tokens) == 47 for s in together) and len(together[0].tokens) > 40
    assert {len(s.tokens) - s.given for s in together} >= {2, 17}


@pytest.mark.parametrize("guidance, passes", [(1.0, 1), (1.5, 2)])
def test_each_distinct_prompt_is_computed_once(guidance, passes, monkeypatch):
    "However many samples are drawn of it, in however many batches, and however often it is in the list."
    model = random_model(max_length=60)
    computed = []
    step = Decoder.decode
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **how: computed.append(ids.numel()) or forward(ids, **how))
    monkeypatch.setattr(Decoder, "decode", lambda self, token: computed.append(len(token)) or step(self, token))
    prompts = [NOTES, NOTES[:20], NOTES]
    samples = generate(model, TOKENIZER, prompts, num_samples=20, max_new_tokens=3, min_new_tokens=3, seed=0,
                       guidance=guidance)
    # both prompts, the shorter padded to 41 tokens; the first of three new tokens needs no more
    assert sum(computed) == passes*(2*41 + 60*2)
    assert [s.tokens[:s.given] for s in samples] == [p for p in prompts for _ in range(20)]
    assert len({*map(str, samples)}) > 40


def test_impossible_numbers_of_new_tokens():
    for options, says in ((dict(min_new_tokens=-1), "min_new_tokens is -1"),
                          (dict(min_new_tokens=4, max_new_tokens=3), "at most max_new_tokens")):
        with pytest.raises(InputError, match=says): generate(random_model(), TOKENIZER, **options)
    with pytest.raises(InputError, match="Prompt 2 has 141 tokens, <bos> included; with 140 positions"):
        generate(random_model(), TOKENIZER, ["", ["C1"]*140])


# --- what is given

def test_scores_are_those_of_transformers():
    model = random_model(scale=3)
    sequences = ["C1 D1 E1", NOTES[:30], ["<bos>", "G8", "<eos>"], np.array([1, 4, 2]), [4], ""]
    framed = [[1, 4, 5, 6, 2], [1, *range(4, 34), 2], [1, VOCAB["G8"], 2], [1, 4, 2], [1, 4, 2], [1, 2]]
    for nats, ids in zip(score_sequences(model, TOKENIZER, sequences, batch_size=2), framed, strict=True):
        ids = torch.tensor([ids])
        with torch.no_grad(): expected = model(ids, labels=ids).loss.item()
        assert len(nats) == ids.shape[1] - 1 and nats.mean() == pytest.approx(expected, abs=1e-4)


NO_SEQUENCES = [
    (["C1 c1"], "Symbol 2 of sequence 1, 'c1', is not in the vocabulary"),
    (["C1", ["C1", "<eos>", "D1"]], "Symbol 2 of sequence 2, '<eos>', is out of place"),
    (["C1"]*9 + [["C1"]*139], "Sequence 10 has 141 tokens, <bos> and <eos> included, but the model has 140"),
    (["C1", [1, 4, 3]], "Token 3 of sequence 2 is <unk>"),
    ([[1, 10**6]], "1000000, is not the id of a symbol"),
    ([[True, 4]], "True, is not the id"),
    (["C1", None], "A sequence is None"),
    ([["C1", None]], "Sequence 1 holds None"),
    ("C1 D1", "Give a list of sequences"),
]
NO_PROMPTS = [
    ("C1 D1", "Give a list of prompts"),
    ([[4, 5]], "The prompt holds 4"),
    (["C1", ["C1", None]], "Prompt 2 holds None"),
    ([None], "A prompt is None"),
    (["C1", "c1"], "Symbol 1 of prompt 2, 'c1', is not in the vocabulary"),
]


def test_symbols_are_checked():
    model = random_model(scale=3)
    for given, says in NO_SEQUENCES:
        with pytest.raises(InputError, match=says): score_sequences(model, TOKENIZER, given)
    with pytest.raises(InputError, match="A sequence has 141 tokens, but the model has 140"):
        evaluate(model, TOKENIZER, Dataset.from_list([{"input_ids": [4]*141, "label": None}]))
    for given, says in NO_PROMPTS:
        with pytest.raises(InputError, match=says): generate(model, TOKENIZER, given)


def test_next_tokens_of_several_prefixes():
    model = random_model(scale=3)
    several = next_tokens(model, TOKENIZER, [["C1", "D1"], [], "E1 F1"], top=3)
    assert several == [next_tokens(model, TOKENIZER, p, top=3) for p in ("C1 D1", "", ["E1", "F1"])]
    assert all(len(pairs) == 3 for pairs in several)
    with pytest.raises(InputError, match="'E1 F1' is not one symbol. Give several prefixes as lists"):
        next_tokens(model, TOKENIZER, ["C1", "E1 F1"])
    with pytest.raises(InputError, match="'c1', is not in the vocabulary"):
        next_tokens(model, TOKENIZER, [["C1"], ["c1"]])


def test_spaces_may_be_left_out_where_each_symbol_is_one_character(monkeypatch):
    symbols = ["<pad>", "<bos>", "<eos>", "<unk>", *"ACDEFGHIKLMNPQRSTVWY"]
    proteins = make_tokenizer({s: k for k, s in enumerate(symbols)})
    for text in ("MKTAYI", "M K T A Y I", "MKT AYI", " <bos>  MKTAYI"):
        assert encode_prompt(proteins, text) == encode_prompt(proteins, [*"MKTAYI"]), text
    assert encode_sequence(proteins, "MKT <eos>") == encode_sequence(proteins, [*"MKT"])
    for given, says in (("MKTa", "Symbol 4 of the prompt, 'a'"), (["MKT"], "Symbol 1 of the prompt, 'MKT'")):
        with pytest.raises(InputError, match=says): encode_prompt(proteins, given)
    with pytest.raises(InputError, match="Symbol 1 of the prompt, 'C1D1'"):
        encode_prompt(TOKENIZER, "C1D1") # two characters each: not guessed
    asked = []
    get_vocab = type(proteins).get_vocab
    monkeypatch.setattr(type(proteins), "get_vocab", lambda self: asked.append(1) or get_vocab(self))
    for _ in range(3): assert split_symbols(proteins, "MKTAYI") == [*"MKTAYI"]
    assert not asked # the vocabulary is looked at once
    proteins.add_tokens("GAP")
    assert not one_character_each(proteins, len(proteins)) and split_symbols(proteins, "GAP MK") == ["GAP", "MK"]


@pytest.mark.parametrize("rows", [2, 8, 33])
def test_onednn_multiplies_as_addmm_does(rows, monkeypatch):
    """Red with a new PyTorch: `torch.ops.mkldnn._linear_pointwise` takes or gives something else, and generation is
    wrong on AMD's processors; let `cpu.small_batch_linear` use `addmm` alone, which is slower there."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"): pytest.fail("PyTorch has no `_linear_pointwise` any more.")
    monkeypatch.setattr(cpu, "has_slow_mkl", lambda: True)
    x = torch.randn(rows, 24)
    weight = torch.randn(24, 72)
    bias = torch.randn(72)
    assert torch.allclose(cpu.small_batch_linear(x, weight, bias), torch.addmm(bias, x, weight), atol=1e-5)
