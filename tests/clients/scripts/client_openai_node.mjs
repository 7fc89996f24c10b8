// requires: openai@7.59.0 zod@4.6.7
// OpenAI's client for JavaScript: chat, streams, zod's helpers, runTools.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const { URL: url, MODEL, ADAPTER } = process.env;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0, timeout: 300_000 });
const Line = z
  .object({ product: z.enum(["hose", "lock"]), size: z.enum(["small", "large"]) })
  .meta({ id: "Line" });
const Order = z.object({ first: Line, second: Line.nullable() });
const said = (content) => [{ role: "user", content }];

for (const model of [MODEL, ADAPTER]) {
  const body = { model, messages: said("Name a colour."), temperature: 0, max_tokens: 12 };
  const answer = await client.chat.completions.create(body);
  assert.ok(answer.choices[0].message.content);
  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...body, stream: true }))
    text += chunk.choices[0]?.delta?.content ?? "";
  assert.equal(text, answer.choices[0].message.content);
  const final = await client.chat.completions.stream(body).finalChatCompletion();
  assert.equal(final.choices[0].message.content, text);
}

const tool = zodFunction({ name: "order", parameters: Order });
assert.equal(tool.function.strict, true);
const ask = { model: MODEL, messages: said("Order a small hose."), max_tokens: 200 };
for (const tool_choice of ["required", { type: "function", function: { name: "order" } }]) {
  const answer = await client.chat.completions.parse({ ...ask, tools: [tool], tool_choice });
  const [call] = answer.choices[0].message.tool_calls;
  Order.parse(call.function.parsed_arguments);
}
const auto = await client.chat.completions.create({ ...ask, tools: [tool], max_tokens: 40 });
for (const call of auto.choices[0].message.tool_calls ?? [])
  Order.parse(JSON.parse(call.function.arguments));

const orders = [];
const runner = client.chat.completions.runTools(
  {
    ...ask,
    tool_choice: { type: "function", function: { name: "order" } },
    tools: [zodFunction({ name: "order", parameters: Order, function: (order) => orders.push(order) })],
  },
  { maxChatCompletions: 1 },
);
await runner.done();
assert.equal(orders.length, 1);
Order.parse(orders[0]);

const parsed = await client.chat.completions.parse({
  ...ask,
  model: ADAPTER,
  response_format: zodResponseFormat(Order, "order"),
});
Order.parse(parsed.choices[0].message.parsed);

const completion = await client.completions.create({ model: ADAPTER, prompt: "Once", max_tokens: 5 });
assert.ok(completion.choices[0].text);
const { data } = await client.embeddings.create({ model: MODEL, input: ["one", "two"] });
assert.equal(data.length, 2);
assert.equal(typeof data[0].embedding[0], "number");

await assert.rejects(
  client.chat.completions.create({ model: "nobody", messages: said("Hello") }),
  (error) => error instanceof OpenAI.NotFoundError && error.param === "model",
);
