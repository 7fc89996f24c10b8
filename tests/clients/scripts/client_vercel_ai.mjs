// requires: ai@7.0.173 @ai-sdk/openai-compatible@3.0.92 zod@4.6.7
// Vercel's AI SDK with its provider for compatible servers.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embedMany, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const { URL: url, MODEL, ADAPTER } = process.env;
const provider = createOpenAICompatible({
  name: "quickchange",
  baseURL: `${url}/v1`,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const Line = z.object({ product: z.enum(["hose", "lock"]), size: z.enum(["small", "large"]) });
const Order = z.object({ first: Line, second: Line.nullable() });
const common = { maxRetries: 0, maxOutputTokens: 200, prompt: "Order a small hose." };

for (const name of [MODEL, ADAPTER]) {
  const ask = { model: provider(name), prompt: "Name a colour.", temperature: 0, maxOutputTokens: 12 };
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
const steps = await generateText({
  ...common,
  maxOutputTokens: 40,
  model: provider(ADAPTER),
  tools: { weather },
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
  stopWhen: stepCountIs(2),
});
assert.equal(steps.steps.length, 2);

const { output } = await generateText({
  ...common,
  model: provider(ADAPTER),
  output: Output.object({ schema: Order }),
});
Order.parse(output);

const completion = await generateText({
  ...common,
  maxOutputTokens: 5,
  model: provider.completionModel(ADAPTER),
});
assert.ok(completion.text);
const { embeddings } = await embedMany({
  model: provider.textEmbeddingModel(MODEL),
  values: Array.from({ length: 300 }, (_, index) => `text ${index % 7}`),
});
assert.equal(embeddings.length, 300);
assert.deepEqual(embeddings[0], embeddings[7]);

await assert.rejects(
  generateText({ ...common, model: provider("nobody") }),
  (error) => APICallError.isInstance(error) && error.statusCode === 404 && /nobody/.test(error.message),
);
