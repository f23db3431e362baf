// What the server does: a number of now over a chart of the last hour.
import { Chart, Group, roundUp } from "./chart.js";
import { byId, h, mark, say, show } from "./dom.js";
import { bytes, count, percent, rate, short } from "./format.js";

const SPANS = [
  ["5 min", 5],
  ["15 min", 15],
  ["1 hour", 60],
];
const KINDS = [
  ["Weights", "c-weights", (memory) => memory.weights_bytes],
  ["Adapters", "c-adapters", (memory) => memory.adapter_bytes],
  ["Tapes", "c-tapes", (memory) => memory.tape_bytes],
  ["Caches", "c-caches", (memory) => memory.cache_bytes],
  ["Workspace", "c-workspace", (memory) => memory.workspace_bytes],
];

const group = new Group();
/** 0: not chosen yet. */
let minutes = 0;
let cards = null;
let shownTo = null;
let redraw = () => {};

/** One card; `chart` as for Chart, or none. */
class Card {
  constructor(title, chart) {
    this.value = h("p", { class: "value" });
    this.note = h("p", { class: "note" });
    this.chart = chart ? new Chart({ group, name: title, ...chart }) : null;
    this.extra = h("div");
    this.element = h("section", { class: "card", "aria-label": title },
      h("div", { class: "head" }, h("h3", {}, title), this.value, this.note),
      this.extra, this.chart?.element ?? null);
  }

  say(value, unit, note) {
    // The unit is smaller than its number.
    if (this.value.dataset.unit !== unit) {
      this.value.dataset.unit = unit;
      this.value.replaceChildren(h("span"), h("small", {}, unit));
    }
    say(this.value.firstChild, value);
    say(this.note, note);
  }
}

const flow = (label, value, colour = "c-flow") => ({
  series: [{ label, colour, value }],
  format: rate,
  top: (most) => roundUp(most, { least: 0.1 }),
});

function make(isOperator) {
  const tokens = new Card("Throughput", flow("Tokens/s", (point) => point.tokens_per_second));
  const steps = new Card("Steps", flow("Steps/s", (point) => point.steps_per_second));
  const memory = new Card("Memory", isOperator && {
    series: KINDS.map(([label, colour]) => ({ label, colour, value: (point) => point.memory[label] })),
    stacked: true,
    format: (n) => (n === 0 ? "0" : bytes(n)),
    // A budget far above what is used would press everything to the ground.
    top: (most, limit) => roundUp(limit && most > limit * 0.4 ? Math.max(most, limit) : most, { base: 1024, least: 1024 }),
  });
  memory.bar = h("div", { class: "bar-of", role: "img" });
  memory.keys = h("ul", { class: "keys" });
  memory.extra.append(memory.bar, memory.keys);
  if (!isOperator) return { tokens, steps, memory };
  const queue = new Card("Queue", {
    ...flow("Frames waiting", (point) => point.queued_jobs, "c-queue"),
    format: short,
    top: (most) => roundUp(most, { least: 4 }),
  });
  const device = new Card("Device", {
    ...flow("Engine busy", (point) => point.device_busy, "c-device"),
    format: percent,
    top: () => 1,
  });
  device.facts = h("p", { class: "note" });
  device.extra.append(device.facts);
  return { tokens, steps, queue, device, memory };
}

/** Draws everything; samples are those of the last hour. */
export function update(overview, samples) {
  const to = overview.is_operator;
  if (shownTo !== to) {
    shownTo = to;
    group.charts.length = 0;
    cards = make(to);
    byId("cards").replaceChildren(...Object.values(cards).map((card) => card.element));
  }
  redraw = () => draw(overview, samples);
  if (minutes) redraw();
  else choose(overview.now_millis - (samples[0]?.at_millis ?? overview.now_millis) < 5 * 60000 ? 5 : 15);
}

function draw(overview, samples) {
  const { server, sessions } = overview;
  const now = samples.at(-1);
  const last = (key) => (now ? now[key] : 0);
  const training = sessions.filter((one) => one.tokens_per_second > 0).length;
  cards.tokens.say(rate(last("tokens_per_second")), "tokens/s", `${count(training)} ${training === 1 ? "session trains" : "sessions train"}`);
  cards.steps.say(rate(last("steps_per_second")), "steps/s", "optimizer steps");
  if (cards.queue) {
    cards.queue.say(count(server.queued_jobs), server.queued_jobs === 1 ? "frame waits" : "frames wait", `mean batch ${short(last("batch_tokens"))} tokens`);
    drawDevice(server, last("device_busy"));
  }
  drawMemory(server.trunk.memory);
  const from = overview.now_millis - minutes * 60000;
  const points = samples.map((point) => ({ ...point, memory: kindsOf(point, server.trunk.memory) }));
  for (const card of Object.values(cards)) {
    const limit = card === cards.memory ? server.trunk.memory.budget_bytes : 0;
    card.chart?.update(points, from, overview.now_millis, limit);
  }
}

/** The weights never change; samples hold the rest. */
const kindsOf = (point, memory) =>
  Object.fromEntries(KINDS.map(([label, , value]) => [label, label === "Weights" ? memory.weights_bytes : value(point)]));

function drawDevice(server, busy) {
  const { device, trunk } = server;
  cards.device.say(percent(busy), "busy", trunk.device);
  show(cards.device.facts, Boolean(device));
  if (!device) return;
  const parts = [
    device.name,
    `kernels ${percent(device.utilisation)}`,
    `memory ${bytes(device.memory_used_bytes)} of ${bytes(device.memory_total_bytes)}`,
    device.temperature_celsius > 0 && `${Math.round(device.temperature_celsius)} °C`,
    device.power_watts > 0 && `${Math.round(device.power_watts)} W`,
  ];
  say(cards.device.facts, parts.filter(Boolean).join(" · "));
}

function drawMemory(memory) {
  const kinds = KINDS.map(([label, colour, value]) => [label, colour, value(memory)]);
  const used = kinds.reduce((sum, [, , n]) => sum + n, 0);
  const budget = memory.budget_bytes;
  const whole = Math.max(used, budget, 1);
  const of = budget ? `of ${bytes(budget)}` : "no limit";
  cards.memory.say(bytes(used), of, budget ? percent(used / budget) : "");
  const { bar, keys } = cards.memory;
  if (bar.children.length !== kinds.length) {
    bar.replaceChildren(...kinds.map(([, colour]) => h("i", { class: colour })));
    keys.replaceChildren(...kinds.map(([label, colour]) => h("li", {}, h("i", { class: `key ${colour}` }), `${label} `, h("b"))));
  }
  kinds.forEach(([, , n], i) => {
    // Anything at all is at least seen.
    bar.children[i].style.width = n ? `max(2px, ${(100 * n) / whole}%)` : "0";
    say(keys.children[i].lastChild, bytes(n));
  });
  mark(bar, "aria-label", `${bytes(used)} used, ${of}`);
}

/** How long a time is shown. */
function choose(length) {
  minutes = length;
  [...byId("spans").children].forEach((button, i) => mark(button, "aria-pressed", String(SPANS[i][1] === length)));
  redraw();
}

/** The buttons that choose it. */
export function start() {
  const button = ([label, length]) => h("button", { type: "button", "aria-pressed": "false", onclick: () => choose(length) }, label);
  byId("spans").replaceChildren(...SPANS.map(button));
}
