// The model in this file, run by ONNX Runtime Web.

let ort, session;

const unpack = text => {
  const packed = new Blob([Uint8Array.from(atob(text), c => c.charCodeAt(0))]);
  return new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
};

const NO_WASM = "This browser does not run WebAssembly, or it is switched off (as in a lockdown mode). "
  + "Open the page in another one.";
const TOO_OLD = "This browser is too old: take Chrome or Edge from 80, Firefox from 113 or Safari from 16.4 on.";
const DAMAGED = "This file is incomplete or damaged. Copy or download it again.";

async function open() {
  if (typeof WebAssembly != "object") throw Error(NO_WASM);
  if (typeof DecompressionStream != "function") throw Error(TOO_OLD);
  let runtime, wasm, model;
  try {
    data = JSON.parse($("data").textContent);
    [runtime, wasm, model] = await Promise.all([data.runtime, data.wasm, data.model].map(unpack));
  } catch { throw Error(DAMAGED); }
  ort = await import(URL.createObjectURL(new Blob([runtime], {type: "text/javascript"})));
  Object.assign(ort.env.wasm, {wasmBinary: wasm, numThreads: 1});
  const options = {executionProviders: ["wasm"], logSeverityLevel: 3};
  try { session = await ort.InferenceSession.create(new Uint8Array(model), options); }
  catch (e) {
    throw Error(`The model ${data.file} cannot be opened; make this page anew. ONNX Runtime says: ${e.message}`);
  }
  $("host").textContent = "It runs in this page: nothing is sent to anybody.";
  const megabytes = (data.bytes / 1e6).toFixed(1);
  const sizes = `${data.symbols.length} symbols and ${data.positions} positions`;
  $("facts").append(make("p", {}, `The model ${data.file} (${megabytes} MB) has ${sizes}. Made by seqgpt.`),
    make("p", {}, "It holds a copy of ONNX Runtime Web, under this licence:"), make("pre", {}, data.licence));
}

// What a model with key-value cache knows before the first token: nothing.
const nothing = () => {
  const inputs = session.inputMetadata.filter(i => i.name.startsWith("past"));
  const empty = ({name, shape: [, heads, , size]}) => [name, new ort.Tensor("float32", [], [1, heads, 0, size])];
  return Object.fromEntries(inputs.map(empty));
};

// The same keys and values for several rows.
const repeat = (past, rows) => Object.fromEntries(Object.entries(past).map(([name, {data, dims: [, ...rest]}]) => {
  const many = new Float32Array(rows * data.length);
  for (let r = 0; r < rows; r++) many.set(data, r * data.length);
  return [name, new ort.Tensor("float32", many, [rows, ...rest])];
}));

// New tokens of each row, after `at` whose keys and values are in `past`: the scores of what comes next, and what is
// known now.
async function forward(ids, at, past) {
  const n = ids[0].length;
  const size = data.symbols.length;
  const int64 = (row, width) =>
    new ort.Tensor("int64", BigInt64Array.from(ids.flatMap(row), BigInt), [ids.length, width]);
  const inputs = {
    input_ids: int64(row => row, n),
    position_ids: int64(row => row.map((_, k) => at + k), n),
    attention_mask: int64(() => Array(at + n).fill(1), at + n),
  };
  const out = await session.run({...past, ...inputs}).catch(e => { throw Error(`The model failed: ${e.message}`); });
  const present = session.outputNames.filter(name => name.startsWith("present"));
  const known = present.map(name => [name.replace("present", "past_key_values"), out[name]]);
  const scores = ids.map((_, r) => out.logits.data.slice(((r + 1) * n - 1) * size, (r + 1) * n * size));
  return {scores, past: Object.fromEntries(known)};
}

const next = async ids => (await forward([[data.bos, ...ids]], 0, nothing())).scores[0];

async function* continuations(ids, ways, most) {
  let {scores, past} = await forward([[data.bos, ...ids]], 0, nothing());
  let chosen = Array(ways).fill(null);
  [scores, past] = [chosen.map(() => scores[0]), repeat(past, ways)];
  const {seed} = settings();
  const over = id => [data.eos, data.pad].includes(id);
  for (let step = 0;; step++) {
    chosen = chosen.map((last, way) => over(last) ? data.pad : choose(scores[way], seed, way, step));
    yield chosen.map((id, way) => ({way, id, scores: scores[way]})).filter(t => t.id != data.pad);
    if (step + 1 >= most || chosen.every(over)) return;
    ({scores, past} = await forward(chosen.map(id => [id]), 1 + ids.length + step, past));
  }
}

// A number from 0 to 1 that depends on these whole numbers only (the last steps of the hash MurmurHash3).
function uniform(...numbers) {
  let x = 1;
  for (const n of numbers) {
    x = Math.imul(x ^ n, 0x9e3779b1);
    x = Math.imul(x ^ x >>> 16, 0x85ebca6b);
    x = Math.imul(x ^ x >>> 13, 0xc2b2ae35);
    x ^= x >>> 16;
  }
  return (x >>> 0) / 2**32;
}

function choose(scores, ...place) {
  const p = chances(scores);
  let left = uniform(...place);
  for (const [id, x] of p.entries()) if ((left -= x) < 0) return id;
  return p.indexOf(p.reduce((a, b) => Math.max(a, b)));
}
