// Records, byte for byte, what the official TypeScript SDK sends for
// POST /v1/checkouts, next to the queue job that asks for the same checkout.
//
//   npm install creem@1.13.0
//   node capture.mjs OUT.ndjson
//
// One JSON object per line: {"name", "job", "body"}.
//   job   the request as snake_case JSON, as a producer would queue it
//   body  the exact body text the SDK sent for it
//
// The real API is never called: the SDK talks to a server in this process, on
// the loopback interface. The output holds no time, port or random value, so
// running it again with the same SDK version gives the same file.

import assert from "node:assert/strict";
import { once } from "node:events";
import { writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { Creem } from "creem";

const API_KEY = "creem_test_fake";
const PRODUCT_ID = "prod_4JkLmN";

// ---------------------------------------------------------------- cases

const textField = (key, more = {}) => ({ type: "text", key, label: `Label ${key}`, ...more });
const checkboxField = (key, more = {}) => ({ type: "checkbox", key, label: `Label ${key}`, ...more });

const everything = {
  units: 3,
  custom_price: 1500,
  discount_code: "AUTUMN",
  affiliate_code: "aff_ada",
  customer: { email: "ada@example.com", name: "Ada Lovelace" },
  custom_fields: [
    textField("company", { optional: true, text: { max_length: 80, min_length: 1 } }),
    checkboxField("terms", { optional: false, checkbox: { label: "I accept the [terms](https://shop.example/terms)" } }),
    textField("note"),
  ],
  success_url: "https://shop.example/thanks?ref=queue&lang=en#done",
  metadata: { zeta: 1, alpha: "two", nested: { y: [1, null, { b: true, a: false }], x: null } },
};

// Fields are written here in the order in which the SDK sends them; makeJob()
// turns that round. request_id and product_id are added to every case, because
// a job without them is not a job.
const CASES = [
  ["minimal", {}],

  // request_id is free text as far as anything published says.
  ["request_id_uuid", { request_id: "3f0c8a52-7d0e-4c43-9d2b-0d1f6f0f9a11" }],
  ["request_id_punctuation", { request_id: "order:2026/11#42 \"a\\b\" <&>" }],
  ["request_id_unicode", { request_id: "Bestellung-äöü-注文-🧾" }],

  ["units_one", { units: 1 }],
  ["units_many", { units: 250 }],
  ["custom_price", { custom_price: 1500 }],
  ["custom_price_lowest", { custom_price: 100 }],
  ["custom_price_highest", { custom_price: 99999999 }],
  ["discount_code", { discount_code: "AUTUMN-25" }],
  ["affiliate_code", { affiliate_code: "aff_ada" }],

  ["customer_id", { customer: { id: "cust_3GhI" } }],
  ["customer_email", { customer: { email: "ada@example.com" } }],
  ["customer_email_plus_tag", { customer: { email: "ada+shop'1@example.co.uk" } }],
  ["customer_email_name", { customer: { email: "ada@example.com", name: "Ada \"Countess\" Lövelace" } }],

  ["custom_fields_text_bare", { custom_fields: [textField("company")] }],
  ["custom_fields_text_min_max", { custom_fields: [textField("company", { text: { max_length: 80, min_length: 1 } })] }],
  ["custom_fields_text_min_only", { custom_fields: [textField("company", { text: { min_length: 0 } })] }],
  ["custom_fields_text_max_only", { custom_fields: [textField("company", { text: { max_length: 200 } })] }],
  ["custom_fields_text_empty_config", { custom_fields: [textField("company", { text: {} })] }],
  ["custom_fields_checkbox_bare", { custom_fields: [checkboxField("terms")] }],
  ["custom_fields_checkbox_label", {
    custom_fields: [checkboxField("terms", { checkbox: { label: "I accept the **terms** / [read](https://shop.example/t)" } })],
  }],
  ["custom_fields_optional_true", { custom_fields: [textField("company", { optional: true })] }],
  ["custom_fields_optional_false", { custom_fields: [textField("company", { optional: false })] }],
  ["custom_fields_several", {
    custom_fields: [
      textField("zulu", { optional: true, text: { max_length: 10, min_length: 2 } }),
      checkboxField("mike", { optional: false, checkbox: { label: "Yes" } }),
      textField("alpha"),
    ],
  }],
  ["custom_fields_empty", { custom_fields: [] }],

  ["success_url", { success_url: "https://shop.example/thanks" }],
  ["success_url_query_fragment", { success_url: "https://shop.example/thanks?a=1&b=%C3%A9%2F&c=x%20y#frag" }],
  // Sent as given: the SDK neither punycodes nor percent-encodes it.
  ["success_url_unicode", { success_url: "https://bücher.example/dänke?q=ü" }],

  ["metadata_empty", { metadata: {} }],
  ["metadata_flat", { metadata: { job_id: "job-42", batch: 7 } }],
  // Free-form keys keep the caller's order; nothing sorts them.
  ["metadata_key_order", { metadata: { zeta: 1, alpha: 2, Mike: 3, _x: 4, "": 5, "a.b": 6, "a b": 7 } }],
  // Names that mean something in the request mean nothing in metadata.
  ["metadata_request_names", {
    metadata: { success_url: null, request_id: "inner", customer: { name: "n", email: "e", id: "i" }, productId: 1, custom_field: [] },
  }],
  ["metadata_nested", { metadata: { b: { d: { f: { h: { j: "deep" } } } }, a: { c: {} } } }],
  ["metadata_arrays", { metadata: { list: [3, 1, 2], empty: [], mixed: ["a", 1, true, null, {}, []], rows: [[1, 2], [3, [4]]] } }],
  // Unlike everywhere else in the request, null inside metadata is data.
  ["metadata_null", { metadata: { nothing: null, inner: { nothing: null }, list: [null, null] } }],
  ["metadata_booleans", { metadata: { yes: true, no: false, list: [false, true] } }],
  ["metadata_integers", { metadata: { zero: 0, minus: -7, int32: -2147483648, safe_max: 9007199254740991, safe_min: -9007199254740991 } }],
  ["metadata_fractions", { metadata: { half: 0.5, minus: -12.75, price: 19.99, sum: 0.1 + 0.2, third: 1 / 3 } }],
  // Where JavaScript's number text differs from that of most other languages:
  // positional up to 1e21 and down to 1e-6, then an exponent with its sign.
  ["metadata_number_extremes", {
    metadata: { e20: 1e20, e21: 1e21, micro: 0.000001, tiny: 1e-7, ten_micro: 0.00001, max: Number.MAX_VALUE, min: Number.MIN_VALUE },
  }],
  ["metadata_unicode", { metadata: { "ключ": "значение", "日本": "語", de: "Größe", ar: "مرحبا", combining: "e\u0301 é", nbsp: "a\u00a0b", bom: "\ufeffx", noncharacter: "\uffff" } }],
  ["metadata_emoji", { metadata: { plain: "🚀", family: "👩‍👩‍👧‍👦", flag: "🇳🇱", skin: "👍🏽", "🔑": "astral key" } }],
  ["metadata_control_characters", {
    metadata: {
      c0: String.fromCharCode(...Array.from({ length: 0x20 }, (_, i) => i)),
      c1: "\u0080\u0085\u009f",
      "key\twith\u0001controls": 1,
    },
  }],
  ["metadata_del", { metadata: { del: "a\u007fb" } }],
  ["metadata_line_separators", { metadata: { ls: "a\u2028b", ps: "a\u2029b", crlf: "a\r\nb" } }],
  ["metadata_quotes", { metadata: { double: "say \"hi\"", single: "it's", back: "`x`", "key\"quoted": 1 } }],
  ["metadata_backslashes", { metadata: { path: "C:\\new\\table", twice: "\\\\", end: "x\\", looks_escaped: "\\u0041\\n" } }],
  ["metadata_slashes", { metadata: { url: "https://e.example/a/b?c=d&e", close: "</script>", html: "<b>&amp;</b>" } }],
  ["metadata_json_in_string", { metadata: { raw: "{\"a\":[1,\"b\\n\"]}" } }],
  // JavaScript moves keys that look like array indices to the front, rising.
  // They are listed that way here so that job and body agree.
  ["metadata_index_keys", { metadata: { 1: "one", 2: "two", 10: "ten", b: "b", "01": "not an index", a: "a" } }],

  ["price_and_units", { units: 2, custom_price: 2500 }],
  ["codes_both", { discount_code: "AUTUMN", affiliate_code: "aff_ada" }],
  ["customer_fields_metadata", {
    customer: { email: "ada@example.com" },
    custom_fields: [textField("company", { optional: true })],
    metadata: { batch: 7 },
  }],
  ["everything", everything],
  ["everything_customer_id", { ...everything, customer: { id: "cust_3GhI" } }],
  // The same request queued with its keys sorted (what a producer whose maps
  // are sorted writes) has to lead to the same body as "everything".
  ["everything_job_sorted", everything, { order: sortedKeys }],
  // The same values, queued as ASCII-only JSON with escaped slashes and spaces
  // between tokens: the body must not depend on how the producer spelled them.
  ["everything_job_ascii_escaped", {
    ...everything,
    customer: { email: "ada@example.com", name: "Ada Lövelace 🚀" },
    metadata: { "clé": "Größe/💾", del: "\u007f", ls: "\u2028", tab: "\t", rows: [1, null, "é"] },
  }, { spell: asciiSpelling }],
];

// ---------------------------------------------------------------- job side

function reversedKeys(object) {
  return Object.keys(object).reverse();
}

function sortedKeys(object) {
  return Object.keys(object).sort();
}

function reorder(object, order) {
  return Object.fromEntries(order(object).map((key) => [key, object[key]]));
}

// Job keys come in another order than the SDK's, so that a reader of the file
// cannot pass by copying what it was given. Only objects with a fixed schema are
// turned round: the order inside metadata belongs to the caller and is kept.
function makeJob(name, fields, order) {
  const job = { request_id: `job-${name}`, product_id: PRODUCT_ID, ...fields };
  if (job.customer) job.customer = reorder(job.customer, order);
  if (job.custom_fields) {
    job.custom_fields = job.custom_fields.map((field) => {
      const copy = { ...field };
      if (copy.text) copy.text = reorder(copy.text, order);
      return reorder(copy, order);
    });
  }
  return reorder(job, order);
}

function asciiSpelling(job) {
  // With an indent, JSON.stringify puts whitespace between tokens. Its line
  // breaks can become spaces, since those inside strings are always escaped.
  return JSON.stringify(job, null, 1)
    .replaceAll("\n", " ")
    .replaceAll("/", "\\/")
    .replace(/[\u007f-\uffff]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

// ---------------------------------------------------------------- SDK side

const camel = (key) => key.replace(/_([a-z])/g, (_, letter) => letter.toUpperCase());

function camelKeys(object) {
  return Object.fromEntries(Object.entries(object).map(([key, value]) => [camel(key), value]));
}

// The SDK takes camelCase and renames; metadata must not be renamed.
function sdkRequest(job) {
  const request = camelKeys(job);
  if (request.customFields) {
    request.customFields = request.customFields.map((field) =>
      field.text ? { ...field, text: camelKeys(field.text) } : field);
  }
  return request;
}

async function startRecorder() {
  const requests = [];
  const server = createServer(async (req, res) => {
    const chunks = [];
    for await (const chunk of req) chunks.push(chunk);
    requests.push({ method: req.method, url: req.url, headers: req.headers, body: Buffer.concat(chunks) });
    // The least the SDK accepts, plus a link. Only status 200 counts as success.
    const reply = {
      id: `ch_${requests.length}`,
      mode: "test",
      object: "checkout",
      status: "pending",
      product: PRODUCT_ID,
      checkout_url: `https://creem.io/test/checkout/${PRODUCT_ID}/ch_${requests.length}`,
    };
    res.writeHead(200, { "content-type": "application/json" });
    res.end(JSON.stringify(reply));
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  return { server, requests, url: `http://127.0.0.1:${server.address().port}` };
}

// ---------------------------------------------------------------- main

async function main(outPath) {
  const names = CASES.map(([name]) => name);
  assert.equal(new Set(names).size, names.length, "case names must be unique");

  const { server, requests, url } = await startRecorder();
  const creem = new Creem({ apiKey: API_KEY, serverURL: url, timeoutMs: 10_000 });
  const lines = [];
  try {
    for (const [name, fields, { order = reversedKeys, spell = JSON.stringify } = {}] of CASES) {
      const job = makeJob(name, fields, order);
      const before = requests.length;
      await creem.checkouts.create(sdkRequest(job));
      assert.equal(requests.length, before + 1, `${name}: one call must be one request`);
      const request = requests.at(-1);

      assert.equal(`${request.method} ${request.url}`, "POST /v1/checkouts", name);
      assert.equal(request.headers["content-type"], "application/json", name);
      assert.equal(request.headers["x-api-key"], API_KEY, name);
      assert.equal(Number(request.headers["content-length"]), request.body.length, name);

      // "fatal" and "ignoreBOM": bytes that text cannot carry must not be
      // replaced or dropped silently, since the body is stored as text.
      const body = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(request.body);
      const jobText = spell(job);
      assert.deepEqual(JSON.parse(body), JSON.parse(jobText), `${name}: job and body must ask for the same`);
      // deepEqual does not look at key order; inside metadata it matters.
      assert.equal(JSON.stringify(JSON.parse(body).metadata), JSON.stringify(job.metadata), name);
      assert.notEqual(jobText, body, `${name}: job must differ from body in its text`);

      // Put together by hand so that the job keeps its own spelling.
      lines.push(`{"name":${JSON.stringify(name)},"job":${jobText},"body":${JSON.stringify(body)}}`);
    }
  } finally {
    server.close();
    server.closeAllConnections();
  }
  await writeFile(outPath, `${lines.join("\n")}\n`);
  console.error(`${lines.length} cases; headers of the last request:`);
  console.error(requests.at(-1).headers);
}

if (process.argv.length !== 3) {
  console.error("usage: node capture.mjs OUT.ndjson");
  process.exit(2);
}
await main(process.argv[2]);
