"The page of the service: what it shows is what the service says, and what goes wrong is said in words."
import asyncio
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from browser import tab
from playwright.sync_api import expect
from test_page import (
    BREAKS,
    DIGITS,
    MELODY,
    added,
    bars,
    centre,
    given,
    goes,
    greedy,
    listener,
    percent,
    talker,
    true_bars,
)

from seqgpt.classification import predict
from seqgpt.engine import QueueFull
from seqgpt.inference import generate, next_logits
from seqgpt.prompts import encode_prompt
from seqgpt.service import Service
from seqgpt.serving import make_app, serve_in_thread
from seqgpt.tokenizer import make_tokenizer

CLASSES = ["</ul><b>", "ja zz", *"23456789"]


@pytest.fixture(scope="module")
def made():
    "The same two models with two vocabularies."
    model = talker()
    classifier = listener(CLASSES)
    def with_vocab(vocab):
        tokenizer = make_tokenizer({s: i for i, s in enumerate(vocab)})
        return SimpleNamespace(model=model, classifier=classifier, vocab=vocab, tokenizer=tokenizer)
    return {"digits": with_vocab(DIGITS), "melody": with_vocab(MELODY)}


@pytest.fixture
def digits(made): return made["digits"]


@pytest.fixture
def melody(made): return made["melody"]


@pytest.fixture
def page(chromium):
    "Nothing goes wrong on it, other than what a test says."
    with tab(chromium, viewport={"width": 1280, "height": 900}) as page:
        yield page
        assert page.wrong == []


@contextmanager
def served(made, page, ready="Ready.", key=None):
    "A service with its page open."
    service = Service((made.model, made.tokenizer), (made.classifier, made.tokenizer), max_seconds=3600)
    with serve_in_thread(make_app(service, key)) as url:
        answer = page.goto(url)
        assert "default-src 'none'; script-src 'sha256-" in answer.headers["content-security-policy"]
        expect(page.get_by_role("status")).to_have_text(ready)
        if not key: expect(page.locator("#where")).to_contain_text("Token")
        service.url = url
        try: yield service
        finally:
            vars(service.engine).pop("step", None)
            page.goto("about:blank") # whatever is still under way ends


def hold(engine, steps):
    "Lets the engine make so many more steps, and from then on only do other work, until its own `turn` is back."
    turn = engine.step
    last = engine.steps + steps
    def held():
        if engine.steps < last: turn()
        elif engine.calls:
            future, call = engine.calls.popleft()
            future.set_result(call())
        else: time.sleep(0.005)
    engine.step = held


def left(page, continuations):
    "Waits until the service knows that nobody wants these any more."
    until = time.monotonic() + 300
    while not all(c.aborted for c in continuations):
        assert time.monotonic() < until
        page.wait_for_timeout(10)


def behind(made, page, tokens):
    "Waits for the bars of what comes after given tokens."
    expect(page.locator("#where")).to_have_text(f"Token {len(tokens) + 1}, behind {tokens[-1]}")
    return next_logits(made.model, encode_prompt(made.tokenizer, tokens))


def says(page, made, tokens):
    "The panel says what the classifier makes of a beginning."
    scores = predict(made.classifier, made.tokenizer, [tokens])[0]
    classes = zip(CLASSES, torch.tensor(scores).softmax(-1).tolist())
    expect(page.locator("#classes li")).to_have_text([f"{c}{percent(x)}" for c, x in classes])


def press(page, *keys):
    for k in keys: page.keyboard.press(k)


def test_a_drawn_digit_is_continued_as_generate_does(digits, page):
    with served(digits, page):
        canvas = page.get_by_label("Drawing of 8 by 8 pixels")
        page.get_by_role("button", name="Clear").click()
        page.get_by_label("Rows given").fill("3")
        box = canvas.bounding_box()
        page.mouse.move(*centre(box, 2, 0))
        page.mouse.down()
        page.mouse.move(*centre(box, 2, 3), steps=5)
        page.mouse.up()
        page.get_by_label("Top-k").fill("9")
        page.get_by_label("Seed").fill("7")
        goes(page)
        prompt = given(page)
        drawn = []
        assert [s[6:] for s in prompt[2::8]] == ["g1"]*4 and len(prompt) == 32
        for way in range(4):
            page.get_by_label(f"Continuation {way + 1}").check()
            settings = dict(temperature=1, top_k=9, top_p=0.9)
            sample = generate(digits.model, digits.tokenizer, [prompt], seed=7 + way, **settings)[0]
            drawn.append(sample.tokens[32:])
            assert added(page) == drawn[-1] + ["…"]*(not sample.finished)
            says(page, digits, sample.tokens[:78]) # with <bos> and <eos> there is room for no more
        assert len({*map(tuple, drawn)}) == 4
        for step in (3, 4):
            page.get_by_label("Step").fill(str(step))
            says(page, digits, prompt + drawn[3][:step + 1])
        expect(page.locator("#of")).to_contain_text("Of continuation 4, as far as it is shown")


def test_keyboard_alone(digits, page):
    with served(digits, page):
        page.get_by_role("button", name="Clear").press("Enter")
        # one row is given; a second with a pixel in it
        press(page, *["Shift+Tab"]*3, "Home", "ArrowRight", "Shift+Tab", "ArrowDown", "ArrowRight", " ")
        expect(page.locator("#place")).to_have_text("Row 2, column 2: ink")
        prompt = [f"r00c0{k}g0" for k in range(8)] + [f"r01c0{k}g{int(k == 1)}" for k in range(8)]
        says(page, digits, prompt)
        expect(page.locator("#of")).to_contain_text("Of what is given")
        page.get_by_label("Temperature").press("Home")
        page.get_by_label("Rows given").focus()
        press(page, *["Tab"]*4, "Enter")
        expect(page.get_by_role("status")).to_contain_text("Done: the most probable continuation")
        assert given(page) == prompt and added(page) == greedy(digits, prompt)


def test_a_drawing_to_the_bottom_leaves_something_to_draw(digits, page):
    with served(digits, page):
        page.get_by_role("button", name="Erase").click()
        page.get_by_role("button", name="Clear").click() # and the pen draws again
        box = page.get_by_label("Drawing of 8 by 8 pixels").bounding_box()
        page.mouse.move(box["x"] + box["width"]/2, box["y"] + 5)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"]/2, box["y"] + box["height"] - 2, steps=9)
        page.mouse.up()
        expect(page.locator("label", has_text="Rows given")).to_contain_text("7 of 8")
        goes(page)
        assert len(given(page)) == 56 and any(s.endswith("g1") for s in given(page))
        for button in ("Clear", "Another digit"):
            page.get_by_role("button", name=button).click()
            expect(page.locator("label", has_text="Rows given")).to_contain_text("4 of 8")


def test_what_is_shown_belongs_to_what_is_given_or_is_pale(melody, page):
    with served(melody, page) as service:
        goes(page)
        service.engine.step = lambda: time.sleep(0.005)
        page.get_by_role("combobox").fill("C4 D4")
        expect(page.get_by_role("status")).to_have_text("")
        expect(page.locator("body")).to_have_class("symbols stale")
        del service.engine.step
        expect(page.get_by_role("status")).to_have_text("Ready.")
        expect(page.locator("body")).to_have_class("symbols")
        goes(page)
        page.get_by_label("Temperature").fill("0.5")
        expect(page.get_by_role("status")).to_have_text("Continue draws anew, with what is set now.")


def test_bars_show_the_model_and_the_settings(melody, page):
    with served(melody, page):
        page.get_by_role("combobox").fill("C4 D4 C4")
        scores = behind(melody, page, ["C4", "D4", "C4"])
        for temperature, top_k, top_p in ((1, 0, 1), (2, 0, 0.5), (1.5, 6, 0.9)):
            for name, value in (("Temperature", temperature), ("Top-k", top_k), ("Top-p", top_p)):
                page.get_by_label(name).fill(str(value))
            assert bars(page) == true_bars(melody, scores, temperature, top_k, top_p)
        page.get_by_label("Temperature").fill("0")
        new = goes(page)
        page.get_by_label("Top-k").fill("0")
        # what streamed has only the most probable symbols; now there are all of them
        page.get_by_label("Temperature").fill("2")
        for step in (0, 2, 5):
            page.get_by_label("Step").fill(str(step))
            expected = true_bars(melody, behind(melody, page, ["C4", "D4", "C4", *new[:step]]), 2, 0, 0.9)
            expect(page.locator("#bars td + td")).to_have_text([p for _, *both in expected for p in both])


def test_it_shows_what_streams_and_stop_frees_the_place(digits, page):
    with served(digits, page) as service:
        asked = []
        at_once = [0]
        may_answer = threading.Event()
        classify = service.classify
        async def counted(body):
            asked.append(body)
            at_once.append(at_once[-1] + 1)
            while not may_answer.is_set(): await asyncio.sleep(0.01) # meanwhile the page wants to know more
            try: return await classify(body)
            finally: at_once.append(at_once[-1] - 1)
        service.classify = counted
        prompt = given(page)
        hold(service.engine, 20)
        page.get_by_role("button", name="Continue", exact=True).click()
        expect(page.get_by_label("Step")).to_have_attribute("max", "19")
        expect(page.get_by_role("status")).to_have_text("Drawing …")
        new = added(page)[:-1]
        assert len(prompt) == 32 and len(new) == 20
        expected = true_bars(digits, behind(digits, page, prompt + new[:-1]))
        assert [r[:2] for r in bars(page)[:4]] == [r[:2] for r in expected[:4]] # the fifth may be the one drawn
        assert len(asked) < 3 # not for each token
        may_answer.set()
        expect(page.locator("#of")).to_contain_text("Of continuation 1, as far as it is shown") # while it goes on
        drawing = [*service.engine.running]
        drawn = [len(c.output_ids) for c in drawing]
        assert drawn and {*drawn} == {20}
        page.get_by_role("button", name="Stop", exact=True).click()
        expect(page.get_by_role("status")).to_have_text("Stopped.")
        left(page, drawing)
        del service.engine.step
        says(page, digits, prompt + added(page)[:-1])
        assert [len(c.output_ids) for c in drawing] == drawn
        may_answer.clear()
        before = len(asked)
        goes(page)
        assert max(at_once) == 1 and len(asked) - before < 3
        may_answer.set()


def test_a_later_run_ends_an_earlier_one(digits, page):
    with served(digits, page) as service:
        hold(service.engine, 5)
        page.get_by_role("button", name="Continue", exact=True).click()
        expect(page.get_by_label("Step")).to_have_attribute("max", "4")
        first = [*service.engine.running]
        page.get_by_role("button", name="Others").click()
        expect(page.get_by_role("status")).to_have_text("Drawing …")
        left(page, first)
        del service.engine.step
        expect(page.get_by_role("status")).to_contain_text("Done")
        assert page.get_by_label("Seed").input_value() == "2"
        new = added(page)[:-1]
        expected = generate(digits.model, digits.tokenizer, [given(page)], top_p=0.9, seed=2)[0].tokens[32:]
        assert added(page) != [] and new == expected[:len(new)]


def test_any_sequence_and_hostile_symbols(melody, page):
    with served(melody, page):
        field = page.get_by_role("combobox")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("New tokens").fill("12")
        for prompt in ("", f"[START] {BREAKS} 音🎵 {{{{data}}}} <!-- &lt; \"\\u003c <unk>"):
            field.fill(prompt)
            assert goes(page) == greedy(melody, prompt, 12)
            assert given(page) == prompt.replace("[START] ", "").split()
            says(page, melody, [*given(page), *[s for s in added(page) if s != "…"]])
        assert page.locator("img, b").count() == 0 and page.title() == "Continue a sequence"
        field.fill("C4 D")
        page.locator("#bars button").first.click() # the one after what could be read last


def test_a_key_is_asked_for_and_kept_while_the_tab_is_open(melody, page):
    with served(melody, page, ready="The server asks for a key.", key="swordfish"):
        field = page.get_by_label("Key")
        use = page.get_by_role("button", name="Use it")
        expect(field).to_be_focused()
        field.fill("mackerel")
        use.click()
        expect(page.get_by_role("status")).to_have_text("The server does not take this key.")
        field.fill("swordfish")
        field.press("Enter")
        expect(page.get_by_role("status")).to_have_text("Ready.")
        expect(field).to_be_hidden()
        assert goes(page)
        page.reload()
        expect(page.get_by_role("status")).to_have_text("Ready.")
        expect(field).to_be_hidden()
        assert "swordfish" not in page.url and page.evaluate("localStorage.length + document.cookie.length") == 0
        assert all("401" in w for w in page.wrong)
        page.wrong.clear() # browsers note each refusal on their console


LOST = "The connection to the server is lost. Is it still running? Try again."


def is_busy(response): return response.url.endswith("/v1/classify") and response.status == 429


def test_what_goes_wrong_is_said(melody, page):
    def says_status(text): expect(page.get_by_role("status")).to_have_text(text)
    def full(some): raise QueueFull
    go = page.get_by_role("button", name="Continue", exact=True)
    with served(melody, page) as service:
        service.engine.add_requests = full
        go.click()
        says_status("The server has too much to do just now. Try again in 1 second.")
        del service.engine.add_requests
        goes(page)

        page.get_by_label("Seed").evaluate("seed => seed.value = -2")
        go.click()
        says_status("The server says: seed: Input should be greater than or equal to -1.")
        page.get_by_label("Seed").fill("1")

        fail_after(service.engine, 6)
        go.click()
        says_status("The server says: The model failed; the log of the server says how.")
        assert len(added(page)) == 6 # five, and that it would go on: what was there stays
        del service.engine.sample
        goes(page)

        service.engine.submit_call = full
        page.get_by_role("combobox").fill("C4 D4")
        behind(melody, page, ["C4", "D4"])
        for _ in range(2): # it asks again and again, the second time certainly about these
            with page.expect_response(is_busy): pass
        expect(page.locator("#of")).to_contain_text("Of continuation 1, as far as it is shown") # still that of before
        del service.engine.submit_call
        says(page, melody, ["C4", "D4"]) # it was asked again

        page.route("**/v1/completions", lambda route: route.fulfill(body='data: {"choices": []}\n\n')) # and no more
        go.click()
        says_status(LOST)
        page.unroute("**/v1/completions")
        goes(page)
    page.wrong.clear()


def fail_after(engine, n):
    "The model fails after `n` more steps."
    choose = engine.sample
    steps = engine.steps
    def fails(logits):
        if engine.steps - steps < n: return choose(logits)
        raise RuntimeError("on purpose")
    engine.sample = fails


def test_a_server_that_is_gone(digits, page):
    with serve_in_thread(make_app(Service((digits.model, digits.tokenizer)))) as url:
        page.goto(url)
        expect(page.get_by_role("status")).to_have_text("Ready.")
        assert page.locator("#prediction").is_hidden() # there is no classifier
    page.get_by_role("button", name="Continue", exact=True).click()
    expect(page.get_by_role("status")).to_have_text(LOST)
    expect(page.get_by_role("button", name="Continue", exact=True)).to_be_enabled()
    page.wrong.clear()


@pytest.mark.parametrize("name", ["digits", "melody"])
def test_it_fits_on_a_telephone(made, page, name):
    page.set_viewport_size({"width": 320, "height": 640})
    with served(made[name], page):
        goes(page)
        says(page, made[name], (given(page) + [s for s in added(page) if s != "…"])[:78])
        page.locator("details").evaluate_all("all => all.forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
