// requires: openai@7.59.0 zod@4.6.7
// OpenAI's client for JavaScript on /v1/responses: text, streams, zod's helpers, stored responses.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const { URL: url, MODEL, ADAPTER } = process.env;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0, timeout: 300_000 });
const Line = z
  .object({ product: z.enum(["hose", "lock"]), size: z.enum(["small", "large"]) })
  .meta({ id: "Line" });
const Order = z.object({ first: Line, second: Line.nullable() });

for (const model of [MODEL, ADAPTER]) {
  const body = { model, input: "Name a colour.", temperature: 0, max_output_tokens: 16 };
  const answer = await client.responses.create(body);
  assert.ok(answer.output_text);
  let text = "";
  for await (const event of await client.responses.create({ ...body, stream: true }))
    if (event.type === "response.output_text.delta") text += event.delta;
  assert.equal(text, answer.output_text);
  const final = await client.responses.stream(body).finalResponse();
  assert.equal(final.output[0].content[0].text, text);
}

const tool = zodResponsesFunction({ name: "order", parameters: Order });
const ask = { model: MODEL, input: "Order a small hose.", max_output_tokens: 200 };
for (const tool_choice of ["required", { type: "function", name: "order" }]) {
  const answer = await client.responses.parse({ ...ask, tools: [tool], tool_choice });
  const call = answer.output.find((item) => item.type === "function_call");
  Order.parse(call.parsed_arguments);
  const next = await client.responses.create({
    ...ask,
    input: [{ type: "function_call_output", call_id: call.call_id, output: "done" }],
    previous_response_id: answer.id,
    max_output_tokens: 16,
  });
  assert.ok(next.output_text);
  assert.deepEqual((await client.responses.retrieve(next.id)).output, next.output);
  const items = [];
  for await (const item of client.responses.inputItems.list(next.id, { limit: 2 })) items.push(item.type);
  assert.deepEqual(items, ["function_call_output", "function_call", "message"]);
  await client.responses.delete(next.id);
  await assert.rejects(client.responses.retrieve(next.id), OpenAI.NotFoundError);
}

const parsed = await client.responses.parse({
  ...ask,
  model: ADAPTER,
  text: { format: zodTextFormat(Order, "order") },
});
Order.parse(parsed.output_parsed);

await assert.rejects(
  client.responses.create({ model: "nobody", input: "Hello" }),
  (error) => error instanceof OpenAI.NotFoundError && error.param === "model",
);
