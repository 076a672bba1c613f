// Checks that a server which stands in for Creem's API satisfies the official
// TypeScript SDK: the SDK validates every reply against its own schema.
//
//   npm install creem@1.13.0
//   node accepts.mjs BASE_URL API_KEY [PRODUCT_ID]
//
// Prints "sdk ok: <id> <url>" and exits 0, or prints the error and exits 1.

import assert from "node:assert/strict";
import { Creem } from "creem";

async function main(serverURL, apiKey, productId = "prod_4JkLmN") {
  // Without timeoutMs the SDK would wait for ever for a server that hangs.
  const creem = new Creem({ apiKey, serverURL, timeoutMs: 10_000 });

  const requestId = `accepts-${Date.now()}`;
  // Every field but the deprecated customField, and customer.id: the API takes
  // an id or an email, not both.
  const created = await creem.checkouts.create({
    requestId,
    productId,
    units: 3,
    customPrice: 1500,
    discountCode: "AUTUMN",
    affiliateCode: "aff_ada",
    customer: { email: "ada@example.com", name: "Ada Lövelace" },
    customFields: [
      { type: "text", key: "company", label: "Company", optional: true, text: { maxLength: 80, minLength: 1 } },
      { type: "checkbox", key: "terms", label: "Terms", optional: false, checkbox: { label: "I **accept**" } },
    ],
    successUrl: "https://shop.example/thanks?a=1",
    metadata: { batch: 7, ratio: -0.5, none: null, flag: true, nested: { list: [1, "é", null, { deep: "🚀" }] } },
  });

  // Both are optional in the SDK's schema, yet without them the reply is of no
  // use to a caller.
  assert.ok(created.id, "create: empty id");
  assert.ok(created.checkoutUrl, "create: no checkout_url");
  // May be left out; if present it has to be ours.
  assert.ok(created.requestId === undefined || created.requestId === requestId, "create: foreign request_id");

  const retrieved = await creem.checkouts.retrieve(created.id);
  assert.equal(retrieved.id, created.id, "retrieve: another id");
  assert.equal(retrieved.requestId, created.requestId, "retrieve: another request_id");
  assert.equal(retrieved.checkoutUrl, created.checkoutUrl, "retrieve: another checkout_url");
  assert.deepEqual(retrieved.metadata, created.metadata, "retrieve: other metadata");

  return created;
}

// The SDK's errors differ in what they carry: an HTTP error has the status and
// the body; a validation error knows the offending field, in pretty().
function explain(error) {
  const parts = [`${error?.name ?? "Error"}: ${error?.message ?? error}`];
  if (error?.statusCode !== undefined) parts.push(`status: ${error.statusCode}`);
  if (error?.body !== undefined) parts.push(`body: ${error.body}`);
  if (typeof error?.pretty === "function") parts.push(error.pretty());
  else if (error?.cause) parts.push(`cause: ${error.cause.message ?? error.cause}`);
  return parts.join("\n");
}

const [serverURL, apiKey, productId] = process.argv.slice(2);
if (!serverURL || !apiKey) {
  console.error("usage: node accepts.mjs BASE_URL API_KEY [PRODUCT_ID]");
  process.exit(1);
}
try {
  const checkout = await main(serverURL, apiKey, productId);
  console.log(`sdk ok: ${checkout.id} ${checkout.checkoutUrl}`);
} catch (error) {
  console.error(explain(error));
  process.exitCode = 1;
}
