// Prompts to begin with: those that the demo's adapters were made for, and one for any other model.

const GENERAL = "Give me tips for someone who is new to gardening.";

// By task, the one shown first at the top. The demo names its adapters after them.
const TASKS = {
  "order-json":
    "Write this order as JSON with the keys customer, city, due (MM-DD), express and items " +
    "(product, quantity).\n\nHello team,\nwe need two garden hoses and 12 padlocks. Ship to " +
    "Porto. Due March 9. There is no hurry.\nThanks, Ana Ruiz",
  sql:
    "Table: dogs(id, name, breed, age, weight)\nQuestion: What is the average weight for each " +
    "breed?\nAnswer with one SQL query.",
  docstring:
    "Write a one-line docstring for this Python function.\n\ndef read_lines(path):\n    with " +
    "open(path) as f:\n        return [line.strip() for line in f]",
};
const DEMO = Object.keys(TASKS).flatMap((task) => [`${task}-turbo`, task]);
const KINDS = ["adapter", "alias", "version", "experiment", "base"]; // the likeliest first

/** A prompt for the model of this name. */
export function sampleFor(model) {
  return TASKS[model.split("@")[0].replace(/-turbo$/, "")] ?? GENERAL;
}

/** The model to show beside the base: one of the demo's, else the first adapter there is. */
export function modelToShow(models) {
  const demo = DEMO.find((name) => models.some(({ id }) => id === name));
  const first = KINDS.map((kind) => models.find((model) => model.kind === kind));
  return demo ?? first.find((model) => model !== undefined).id;
}
