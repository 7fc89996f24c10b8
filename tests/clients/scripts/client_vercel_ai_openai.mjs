// requires: ai@7.0.173 @ai-sdk/openai@3.0.141 zod@4.6.7
// Vercel's AI SDK with OpenAI's own provider, whose default is /v1/responses.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { APICallError, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const { URL: url, MODEL, ADAPTER } = process.env;
const provider = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const Line = z.object({ product: z.enum(["hose", "lock"]), size: z.enum(["small", "large"]) });
const Order = z.object({ first: Line, second: Line.nullable() });
const common = { maxRetries: 0, maxOutputTokens: 200, prompt: "Order a small hose." };

for (const name of [MODEL, ADAPTER]) {
  const ask = { model: provider(name), prompt: "Name a colour.", temperature: 0, maxOutputTokens: 16 };
  const { text, usage } = await generateText({ ...ask, maxRetries: 0 });
  assert.ok(text && usage.outputTokens > 0);
  const streamed = streamText({ ...ask, maxRetries: 0 });
  let pieces = "";
  for await (const piece of streamed.textStream) pieces += piece;
  assert.equal(pieces, text);
  assert.equal((await streamed.usage).outputTokens, usage.outputTokens);
}

for (const toolChoice of ["required", { type: "tool", toolName: "order" }, "auto"]) {
  const orders = [];
  const order = tool({
    description: "Place an order",
    inputSchema: Order,
    execute: async (given) => orders.push(given) && "done",
  });
  const ask = { ...common, model: provider(MODEL), tools: { order }, toolChoice };
  const { toolCalls } = await generateText(ask);
  const streamed = streamText(ask);
  const kinds = [];
  for await (const part of streamed.fullStream) kinds.push(part.type);
  assert.ok(!kinds.includes("error"), kinds);
  if (toolChoice !== "auto") {
    assert.equal(toolCalls.length, 1);
    assert.ok(kinds.includes("tool-call"), kinds);
    assert.equal(orders.length, 2);
  }
  for (const given of orders) Order.parse(given);
}

const weather = tool({
  inputSchema: z.object({ city: z.enum(["Porto", "Oslo"]) }),
  execute: async () => "rain",
});
for (const store of [true, false]) {
  const steps = await generateText({
    ...common,
    maxOutputTokens: 40,
    model: provider(ADAPTER),
    tools: { weather },
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
    stopWhen: stepCountIs(2),
    providerOptions: { openai: { store } },
  });
  assert.equal(steps.steps.length, 2);
  const again = await generateText({
    ...common,
    prompt: undefined,
    messages: [
      { role: "user", content: "Order a small hose." },
      ...steps.response.messages, // by references, where they are stored
      { role: "user", content: "And in Oslo?" },
    ],
    maxOutputTokens: 16,
    model: provider(ADAPTER),
    providerOptions: { openai: { store } },
  });
  assert.ok(again.text);
}

const { output } = await generateText({
  ...common,
  model: provider(ADAPTER),
  output: Output.object({ schema: Order }),
});
Order.parse(output);

await assert.rejects(
  generateText({ ...common, model: provider("nobody") }),
  (error) => APICallError.isInstance(error) && error.statusCode === 404 && /nobody/.test(error.message),
);
