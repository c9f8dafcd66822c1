// The model of the service that this page comes from, asked over HTTP.

let key = ""; // what the server wants to hear
let asked = null; // a promise while it is typed
let symbols; // the id of each
try { key = sessionStorage.getItem("key") ?? ""; } catch {} // storage may be forbidden

// The answer to a request. Whatever goes wrong becomes an Error in plain words; with `wait`, it may go well after so
// many seconds.
async function ask(path, body, signal) {
  const used = key;
  const headers = {...(used && {Authorization: `Bearer ${used}`}), ...(body && {"Content-Type": "application/json"})};
  const sent = body ? {method: "POST", body: JSON.stringify(body)} : {};
  const options = {...sent, headers, signal, cache: "no-store"};
  const answer = await fetch(path, options).catch(e => { throw lost(e, signal); });
  if (answer.ok) return answer;
  if (answer.status == 401) {
    if (used == key) await (asked ??= typed());
    return ask(path, body, signal);
  }
  if ([429, 503].includes(answer.status)) {
    const wait = +answer.headers.get("Retry-After") || 1;
    const seconds = `${wait} second${wait > 1 ? "s" : ""}`;
    throw Object.assign(Error(`The server has too much to do just now. Try again in ${seconds}.`), {wait});
  }
  const said = await answer.json().then(a => a.error.message, () => `${answer.status} ${answer.statusText}`);
  throw Error(`The server says: ${said}${answer.status == 404 ? " Reload this page." : ""}`);
}

const LOST = "The connection to the server is lost. Is it still running? Try again.";
const lost = (e, signal) => signal?.aborted ? e : Error(LOST);

// Waits until a key has been typed.
const typed = () => new Promise(done => {
  say(key ? "The server does not take this key." : "The server asks for a key.", true);
  $("unlock").hidden = false;
  $("key").focus();
  $("unlock").onsubmit = e => {
    e.preventDefault();
    key = $("key").value;
    try { sessionStorage.setItem("key", key); } catch {}
    $("unlock").hidden = true;
    asked = null;
    say("");
    done();
  };
});

async function open() {
  data = await (await ask("v1/vocabulary")).json();
  symbols = new Map(data.symbols.map((s, id) => [s, id]));
  $("host").textContent = "It runs on the server that this page comes from.";
  const sizes = `${data.symbols.length} symbols and ${data.positions} positions`;
  $("facts").append(make("p", {}, `The model ${data.model} has ${sizes}. Served by seqgpt.`));
}

// What the model finds, from the logarithms of some probabilities: what is left is spread evenly over the other
// symbols.
function spread(known) {
  const left = Math.max(1e-12, 1 - Object.values(known).reduce((sum, s) => sum + Math.exp(s), 0));
  const scores = new Float64Array(data.symbols.length);
  scores.fill(Math.log(left / Math.max(1, scores.length - Object.keys(known).length)));
  for (const [symbol, score] of Object.entries(known)) scores[symbols.get(symbol)] = score;
  return scores;
}

async function next(ids, signal) {
  const request = {model: data.model, prompt: [data.bos, ...ids], max_tokens: 1, temperature: 0};
  const answer = await ask("v1/completions", {...request, logprobs: data.symbols.length}, signal);
  const {choices} = await answer.json().catch(e => { throw lost(e, signal); });
  return spread(choices[0].logprobs.top_logprobs[0]);
}

async function* continuations(ids, ways, most, signal) {
  const request = {model: data.model, prompt: [data.bos, ...ids], n: ways, max_tokens: most, ...settings()};
  const logprobs = Math.min(10, data.symbols.length);
  const answer = await ask("v1/completions", {...request, stream: true, return_token_ids: true, logprobs}, signal);
  const stream = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "";;) {
    const {done, value} = await stream.read().catch(e => { throw lost(e, signal); });
    if (done) throw lost();
    const lines = (rest + value).split("\n"), tokens = [];
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      if (line.slice(5).trim() == "[DONE]") { yield tokens; return; }
      const {error, choices} = JSON.parse(line.slice(5));
      if (error) { yield tokens; throw Error(`The server says: ${error.message}`); }
      for (const {index, token_ids, logprobs} of choices)
        token_ids.forEach((id, k) => tokens.push({way: index, id, rough: true, get scores() {
          return spread({...logprobs.top_logprobs[k], [data.symbols[id]]: logprobs.token_logprobs[k]});
        }}));
    }
    yield tokens;
  }
}

// How probable each class is for a sequence, by the classifier of the service.
const classify = async (ids, signal) => {
  const {probabilities} = (await (await ask("v1/classify", {input: [ids]}, signal)).json()).data[0];
  return data.classes.map(name => probabilities[name]);
};
