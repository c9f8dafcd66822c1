"An exported model as one HTML file: what it draws is what PyTorch draws, and it asks nobody for anything."
import gzip
import json
import re
import shutil
from base64 import b64encode
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from browser import tab
from playwright.sync_api import expect
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from seqgpt.checks import InputError
from seqgpt.corpora import digit_vocab
from seqgpt.export import to_onnx
from seqgpt.inference import generate, make_sampler, next_logits
from seqgpt.model import label_fields
from seqgpt.onnx_folder import write_page
from seqgpt.prompts import encode_prompt
from seqgpt.tokenizer import make_tokenizer, save_tokenizer

BREAKS = "</script><img/src/onerror=document.title='broken'>" # as a symbol
# special tokens at odd places
MELODY = ["C4", "[START]", "D4", "<pad>", "音🎵", BREAKS, "{{data}}", "<!--", "</s>", "&lt;", '"\\u003c', "<unk>",
          *(f"N{k}" for k in range(120))]
SPECIAL = {"[START]": "<bos>", "<pad>": "<pad>", "</s>": "<eos>", "<unk>": "<unk>"}
PIXELS = [s for s in digit_vocab(8, 2) if s.startswith("r")]
DIGITS = [SPECIAL[s] if s in SPECIAL else PIXELS.pop(0) for s in MELODY]


def talker():
    """A model for either vocabulary. It has learnt nothing, but is sure of itself, and says something else at every
    step."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=len(MELODY), n_positions=80, n_layer=2, n_head=2, n_embd=24, initializer_range=0.6,
                        activation_function="gelu_pytorch_tanh", tie_word_embeddings=False, bos_token_id=1,
                        pad_token_id=3, eos_token_id=8)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad(): model.lm_head.weight[8] *= -1.5 # now some sequences end
    return model


def listener(classes):
    "A classifier for either vocabulary, as sure of itself; to be made after `talker`, which seeds it."
    config = GPT2Config(vocab_size=len(MELODY), n_positions=80, n_layer=1, n_head=2, n_embd=16, initializer_range=1.0,
                        pad_token_id=3, **label_fields(classes))
    return GPT2ForSequenceClassification(config).eval()


def talking(folder):
    "The model as an exported file."
    to_onnx(talker(), folder/"fast.onnx", "in place")


@pytest.fixture(scope="module")
def both(once):
    "One model with two vocabularies."
    exported = once(talking)/"fast.onnx"
    model = talker()
    names = {"digits": DIGITS, "melody, ü & more": MELODY}
    tokenizers = {name: make_tokenizer({s: i for i, s in enumerate(vocab)}) for name, vocab in names.items()}
    def pages(folder):
        for name, tokenizer in tokenizers.items():
            model.save_pretrained(folder/name)
            save_tokenizer(tokenizer, folder/name)
            write_page(shutil.copy(exported, folder/name/"fast.onnx"), folder/name/"page.html")
    folder = once(pages)
    def made(name):
        return SimpleNamespace(model=model, tokenizer=tokenizers[name], file=folder/name/"fast.onnx",
                               page=folder/name/"page.html", vocab=names[name])
    return {name[:6]: made(name) for name in names}


@pytest.fixture
def digits(both): return both["digits"]


@pytest.fixture
def melody(both): return both["melody"]


@contextmanager
def opened(chromium, path, **settings):
    "The page, from the disk, in a browser without a network; nothing may be asked for, nothing go wrong."
    with tab(chromium, viewport={"width": 1280, "height": 900}, **settings) as page:
        page.context.set_offline(True)
        asked = []
        page.on("request", lambda r: asked.append(r.url))
        page.goto(path.as_uri())
        yield page
        assert [url for url in asked if not url.startswith(("blob:", "data:"))] == [path.as_uri()]
        assert page.wrong == []


def goes(page, button="Continue"):
    "Presses a button and waits for the end of what it begins; gives the first continuation, without what was given."
    page.get_by_role("button", name=button, exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("Done")
    return added(page)


def added(page): return page.evaluate("document.getElementById('tokens').lastChild.textContent").split()
def given(page): return page.evaluate("document.querySelector('#tokens mark')?.textContent ?? ''").split()
def greedy(made, prompt, most=None):
    sample = generate(made.model, made.tokenizer, [prompt], temperature=0, max_new_tokens=most)[0]
    return sample.tokens[sample.given:] + ([] if sample.finished else ["…"])


def centre(box, column, row):
    "Of a pixel of a drawing of 8 by 8."
    return box["x"] + box["width"]*(column + .5)/8, box["y"] + box["height"]*(row + .5)/8


def test_a_drawn_digit_is_continued_as_pytorch_does(chromium, digits):
    with opened(chromium, digits.page) as page:
        canvas = page.get_by_label("Drawing of 8 by 8 pixels")
        expect(page.get_by_role("status")).to_have_text("Ready.")
        page.get_by_role("button", name="Clear").click()
        page.get_by_label("Rows given").fill("3")
        box = canvas.bounding_box()
        page.mouse.move(*centre(box, 2, 0))
        page.mouse.down()
        page.mouse.move(*centre(box, 2, 3), steps=5) # a row lower than was given: that one is now given, too
        page.mouse.up()
        page.get_by_label("Temperature").fill("0")
        tokens = goes(page)
        prompt = given(page)
        assert len(prompt) == 32 and prompt[0] == "r00c00g0" and prompt[-1] == "r03c07g0"
        assert [s[6:] for s in prompt[2::8]] == ["g1"]*4
        assert tokens == greedy(digits, prompt) and len(set(tokens)) > 8
        expect(page.get_by_role("radio")).to_have_count(1) # greedily there is only one way

        # now by chance, in four ways; the same seed draws the same
        page.get_by_label("Temperature").fill("1")
        first = goes(page)
        second = goes(page, "Others")
        expect(page.get_by_role("radio")).to_have_count(4)
        assert first != second != tokens and page.get_by_label("Seed").input_value() == "2"
        page.get_by_label("Seed").fill("1")
        assert goes(page) == first
        page.get_by_label("Continuation 2").check()
        assert added(page) != first
        page.get_by_label("Top-k").fill("1") # the most probable one in each way
        assert goes(page) == tokens
        page.get_by_label("Continuation 4").check()
        assert added(page) == tokens
        page.get_by_label("Continuation 1").check()
        page.get_by_label("Top-k").fill("0")
        page.get_by_label("Top-p").fill("0.05")
        assert goes(page) == tokens

        page.get_by_label("Step").fill("4") # back to the fifth step
        assert added(page) == [*tokens[:5], "…"]
        expect(page.locator("caption")).to_have_text(f"Token 37, behind {tokens[3]}")


def test_keyboard_alone(chromium, digits):
    with opened(chromium, digits.page, color_scheme="dark", reduced_motion="reduce") as page:
        expect(page.get_by_role("status")).to_have_text("Ready.")
        def press(*keys):
            for k in keys: page.keyboard.press(k)
        def focused(): return page.evaluate("document.activeElement.id || document.activeElement.ariaLabel")
        press("Tab")
        assert focused() == "drawing"
        press(*["Tab"]*4, "Enter")
        assert focused() == "clear"
        press(*["Shift+Tab"]*3, "Home", "ArrowRight") # one row
        assert focused() == "rows"
        press("Shift+Tab", "ArrowDown", "ArrowRight", "ArrowRight", " ", "ArrowLeft")
        expect(page.locator("#place")).to_have_text("Row 2, column 2: blank")
        press(*["Tab"]*5)
        assert focused() == "go"
        press("Enter")
        expect(page.get_by_role("status")).to_contain_text("Done")
        prompt = given(page)
        assert len(prompt) == 16 and [s for s in prompt if not s.endswith("g0")] == ["r01c02g1"]
        press("Tab", "Tab", "ArrowDown")
        assert focused() == "Continuation 2" and page.get_by_label("Continuation 2").is_checked()
        press("Tab", "Home")
        assert focused() == "step" and len(added(page)) == 2


def check_end(page, melody, ends):
    "A sequence that ends by itself, or one at the model's last position."
    samples = generate(melody.model, melody.tokenizer, [s for s in MELODY if s[0] == "N"], temperature=0)
    sample = next(s for s in samples if s.finished == ends and len(s.tokens) > 9)
    page.get_by_role("combobox").fill(sample.tokens[0])
    assert goes(page) == sample.tokens[1:] + ["…"]*(not ends)
    tokens = len(sample.tokens) - 1 + ends # the end is one
    expect(page.get_by_role("status")).to_contain_text(f", {tokens} tokens;")


# a sequence, and whether it is said to be wrong: what is still being typed is not corrected
TYPED = [("C4 N11", False), ("C4 N11x", True), ("C4 N11 D", False), ("C4 Q D4", True)]


def test_any_sequence_and_hostile_symbols(chromium, melody):
    with opened(chromium, melody.page) as page:
        expect(page.get_by_role("status")).to_have_text("Ready.")
        field = page.get_by_role("combobox")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("New tokens").fill("12")
        for prompt in ("", "C4 D4", f"[START] {BREAKS} 音🎵 {{{{data}}}} <!-- &lt; \"\\u003c <unk>"):
            field.fill(prompt)
            assert goes(page) == greedy(melody, prompt, 12)
            assert given(page) == prompt.replace("[START] ", "").split()
        page.get_by_label("New tokens").fill("80")
        for ends in (True, False): check_end(page, melody, ends)
        assert page.locator("img").count() == 0 and page.title() == "Continue a sequence"

        status = page.get_by_role("status")
        alert = page.get_by_role("alert")
        field.fill("C4 H9")
        expect(alert).to_have_text("Symbol 2, H9, is not in the vocabulary.")
        for typed, shown in TYPED:
            field.fill(typed)
            if shown: expect(alert).to_be_visible()
            else: expect(alert).to_be_hidden()
        field.fill("C4 D")
        page.get_by_role("button", name="Continue", exact=True).click()
        expect(alert).to_have_text("Symbol 2, D, is not in the vocabulary.")
        expect(field).to_be_focused()
        field.fill("C4 </s>")
        expect(alert).to_have_text("Symbol 2, </s>, cannot be continued: "
                                   "only [START] may stand there, at the beginning.")
        field.fill(" ".join(["C4"]*79))
        expect(status).to_have_text("With [START] 80 tokens are given, but the model has 80 positions: "
                                    "there is no room to continue.")
        field.fill(" ".join(["C4"]*78))
        expect(status).to_have_text("Ready.")
        assert len(goes(page)) == 2 # a symbol, and that it goes on
        field.fill("C4 D")
        expect(alert).to_have_count(0)
        options = page.locator("#completions option")
        assert options.evaluate_all("all => all.map(o => o.value)") == ["C4 D4"]


def test_bars_show_the_model_and_the_settings(chromium, melody):
    with opened(chromium, melody.page) as page:
        page.get_by_role("combobox").fill("C4 D4 C4")
        scores = next_logits(melody.model, encode_prompt(melody.tokenizer, "C4 D4 C4"))
        expect(page.locator("caption")).to_have_text("Token 4, behind C4")
        for temperature, top_k, top_p in ((1, 0, 1), (2, 0, 1), (2, 4, 1), (2, 0, 0.5), (1.5, 6, 0.9)):
            for name, value in (("Temperature", temperature), ("Top-k", top_k), ("Top-p", top_p)):
                page.get_by_label(name).fill(str(value))
            assert bars(page) == true_bars(melody, scores, temperature, top_k, top_p), (temperature, top_k, top_p)
        page.locator("#bars button").first.press("Enter") # takes this one
        best = next(s for s, *_ in true_bars(melody, scores) if s not in SPECIAL)
        expect(page.locator("caption")).to_have_text(f"Token 5, behind {best}")
        assert page.get_by_role("combobox").input_value() == f"C4 D4 C4 {best} "
        assert page.evaluate("document.activeElement == document.querySelector('#bars button')")


def bars(page):
    parts = "rows => rows.map(r => [r.cells[0].title, r.cells[2].textContent, r.cells[3].textContent])"
    return page.locator("#bars tr").evaluate_all(parts)


def true_bars(made, scores, temperature=1, top_k=0, top_p=0.9, most=10):
    "What the bars should say, by PyTorch and Transformers."
    own = dict(zip(made.vocab, scores.softmax(-1).tolist()))
    drawn = chances(made, scores, temperature, top_k, top_p)
    best = sorted(own, key=own.get, reverse=True)[:most]
    return [[s, percent(own[s]), percent(drawn[s])] for s in best]


def percent(x): return "<0.1%" if 0 < x < 0.001 else f"{x:.1%}"


def chances(made, scores, temperature, top_k, top_p):
    "How probable each symbol is to be drawn, by Transformers."
    found = {}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, "multinomial", lambda p, n: found.update(p=p) or p.argmax(-1, keepdim=True))
        make_sampler(made.tokenizer, temperature, top_k, top_p)(torch.zeros(1, 1, dtype=torch.long), scores[None])
    return dict(zip(made.vocab, found["p"][0].tolist()))


def test_what_is_broken_is_said(chromium, melody, tmp_path):
    page = tmp_path/"page.html"
    text = melody.page.read_text(encoding="utf-8")
    nonsense = b64encode(gzip.compress(b"nonsense")).decode()
    def without(name): return text.replace("const WAYS", f"delete globalThis.{name}; const WAYS")
    cases = [
        (re.sub(r'"model": "[^"]*"', f'"model": "{nonsense}"', text),
         "The model fast.onnx cannot be opened; make this page anew."),
        (text[:-10**6], "This file is incomplete or damaged. Copy or download it again."),
        (text.replace('"wasm": "H4sI', '"wasm": "H4sH'), "This file is incomplete or damaged."),
        (without("WebAssembly"), "This browser does not run WebAssembly"),
        (without("DecompressionStream"), "This browser is too old"),
    ]
    with tab(chromium) as shown: # what it writes on the console is not looked at: the runtime reports there, too
        for content, says in cases:
            page.write_text(content, encoding="utf-8")
            shown.goto(page.as_uri())
            expect(shown.get_by_role("status")).to_contain_text(says)
            assert shown.locator("main").is_hidden()


def test_a_page_needs_a_model_and_room_for_it(melody, tmp_path):
    with pytest.raises(InputError, match=r"none.onnx: no such file. Write it with `seqgpt export`."):
        write_page(tmp_path/"none.onnx", tmp_path/"page.html")
    with open(melody.file.parent/"large.onnx", "wb") as f: f.truncate(2**28 + 2**20)
    with pytest.raises(InputError, match="257 MiB are too much for one page, which holds 256"):
        write_page(f.name, tmp_path/"page.html")
    assert not list(tmp_path.iterdir())


def test_the_page_says_which_licence_it_holds(melody):
    text = re.search(r'id="data">(.*?)</script>', melody.page.read_text(encoding="utf-8"), re.S)[1]
    data = json.loads(text)
    assert "MIT" in data["licence"] and data["symbols"] == MELODY and "<" not in text
