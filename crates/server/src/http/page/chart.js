// Lines and stacked areas over time, drawn as SVG. The pointer, or the arrow keys, show the values of
// one moment, in all charts of a group at once.
import { h, mark, s } from "./dom.js";
import { clock } from "./format.js";

const LEFT = 52;
const TOP = 8;
const BOTTOM = 20;
const RIGHT = 8;
const MINUTE = 60000;
const TICKS = [MINUTE / 4, MINUTE, 2 * MINUTE, 5 * MINUTE, 15 * MINUTE, 30 * MINUTE, 60 * MINUTE];

/** The least round number that is not below `value`, so that its half is round, too. */
export function roundUp(value, { base = 1000, least = 0 } = {}) {
  const wanted = Math.max(value, least);
  if (wanted <= 0) return 1;
  let unit = 1;
  while (wanted / unit >= base) unit *= base;
  const scaled = wanted / unit;
  const ten = 10 ** Math.floor(Math.log10(scaled));
  const step = [1, 2, 3, 4, 5, 6, 8, 10].find((one) => one * ten >= scaled * 0.999999);
  return step * ten * unit;
}

/** Charts that share the moment that is looked at. */
export class Group {
  charts = [];
  at = null;

  look(at) {
    this.at = at;
    for (const chart of this.charts) chart.drawCursor();
  }
}

/** The largest round number that is not above `value`, if that leaves out a good part of the scale. */
export function roundDown(value, most) {
  if (value < most / 2) return 0;
  const ten = 10 ** Math.floor(Math.log10(most - value || most));
  return Math.floor(value / ten) * ten;
}

export class Chart {
  /**
   * series: [{ label, colour, value(point) }], bottom first if stacked; format: a value as text;
   * floor(least, most): where the scale begins, top(height, limit): how far it goes from there; name: for who cannot see it.
   */
  constructor({ group, series, stacked = false, format, top, floor = () => 0, name }) {
    Object.assign(this, { group, series, stacked, format, top, floor, name });
    this.points = [];
    this.width = 0;
    this.height = 0;
    this.drawing = s("g");
    this.cursor = s("g");
    this.svg = s("svg", { "aria-hidden": true }, this.drawing, this.cursor);
    this.tip = h("div", { class: "tip", hidden: true });
    this.element = h("div", { class: "plot", tabindex: 0, role: "img" }, this.svg, this.tip);
    this.element.addEventListener("pointermove", (event) => this.point(event));
    this.element.addEventListener("pointerdown", (event) => this.point(event));
    this.element.addEventListener("pointerleave", () => this.leave());
    this.element.addEventListener("blur", () => this.leave());
    this.element.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.resize()).observe(this.element);
    group.charts.push(this);
  }

  /** points: [{ at_millis, ... }], oldest first; limit: a line to stay below, or 0. */
  update(points, from, to, limit = 0) {
    const first = points.findIndex((point) => point.at_millis >= from);
    // One more on the left, so that the line begins at the edge.
    this.points = first < 0 ? [] : points.slice(Math.max(0, first - 1));
    Object.assign(this, { from, to, limit });
    this.draw();
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.element;
    if (width === this.width && height === this.height) return;
    Object.assign(this, { width, height });
    mark(this.svg, "width", String(width));
    mark(this.svg, "height", String(height));
    this.draw();
  }

  x(at) {
    const width = this.width - LEFT - RIGHT;
    return LEFT + (width * (at - this.from)) / (this.to - this.from);
  }

  y(value) {
    const share = (value - this.min) / (this.max - this.min);
    return this.height - BOTTOM - (this.height - TOP - BOTTOM) * Math.min(1, Math.max(0, share));
  }

  /** Values of one point, each series on top of those before if they are stacked. */
  stack(point) {
    let below = 0;
    return this.series.map((one) => {
      const value = one.value(point);
      if (!this.stacked) return [0, value];
      below += value;
      return [below - value, below];
    });
  }

  draw() {
    if (!this.width || this.from === undefined) return;
    const tops = this.points.map((point) => Math.max(...this.stack(point).map(([, top]) => top)));
    const most = Math.max(0, ...tops);
    this.min = this.floor(tops.length ? Math.min(...tops) : 0, most);
    this.max = this.min + this.top(most - this.min, this.limit);
    this.drawing.replaceChildren(...this.grid(), ...this.areas(), ...this.bound());
    this.drawCursor();
    const last = this.points.at(-1);
    const now = last ? this.format(this.total(last)) : "nothing yet";
    mark(this.element, "aria-label", `${this.name}: now ${now}, at most ${this.format(most)} in the time shown`);
  }

  total(point) {
    return Math.max(...this.stack(point).map(([, top]) => top));
  }

  grid() {
    const lines = [0, 0.5, 1].flatMap((share) => {
      const value = this.min + share * (this.max - this.min);
      const y = this.y(value);
      return [
        s("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y }),
        s("text", { class: "tick", x: LEFT - 6, y: y + 3.5, "text-anchor": "end" }, this.format(value)),
      ];
    });
    const span = this.to - this.from;
    const room = Math.max(2, Math.floor(this.width / 90));
    const step = TICKS.find((one) => span / one <= room) ?? TICKS.at(-1);
    const zone = new Date(this.to).getTimezoneOffset() * MINUTE;
    const times = [];
    for (let at = Math.ceil((this.from - zone) / step) * step + zone; at <= this.to; at += step) {
      const x = this.x(at);
      if (x < LEFT + 12 || x > this.width - RIGHT - 14) continue;
      times.push(s("text", { class: "tick", x, y: this.height - 4, "text-anchor": "middle" }, clock(at, step < MINUTE)));
    }
    return [...lines, ...times];
  }

  /** Pieces without a gap: a server that was away has no values. */
  pieces() {
    const steps = this.points.slice(1).map((point, i) => point.at_millis - this.points[i].at_millis);
    const usual = steps.toSorted((a, b) => a - b)[Math.floor(steps.length / 2)] ?? 0;
    const pieces = [];
    this.points.forEach((point, i) => {
      if (i === 0 || steps[i - 1] > 3 * usual + 5000) pieces.push([]);
      pieces.at(-1).push(point);
    });
    return pieces;
  }

  areas() {
    const clip = (x) => Math.max(LEFT, x).toFixed(1);
    const shapes = [];
    for (const piece of this.pieces()) {
      const stacks = piece.map((point) => [clip(this.x(point.at_millis)), this.stack(point)]);
      this.series.forEach((one, i) => {
        const upper = stacks.map(([x, stack]) => `${x},${this.y(stack[i][1]).toFixed(1)}`);
        const lower = stacks.map(([x, stack]) => `${x},${this.y(Math.max(this.min, stack[i][0])).toFixed(1)}`).reverse();
        shapes.push(s("polygon", { class: `area ${one.colour}`, points: [...upper, ...lower].join(" ") }));
        shapes.push(s("polyline", { class: `line ${one.colour}`, points: upper.join(" ") }));
      });
    }
    return shapes;
  }

  bound() {
    if (!this.limit || this.limit > this.max) return [];
    const y = this.y(this.limit);
    return [s("line", { class: "limit", x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y })];
  }

  /** The point next to the moment that is looked at. */
  nearest() {
    const at = this.group.at;
    if (at === null) return null;
    let best = null;
    for (const point of this.points) {
      if (!best || Math.abs(point.at_millis - at) < Math.abs(best.at_millis - at)) best = point;
    }
    return best;
  }

  drawCursor() {
    const point = this.width ? this.nearest() : null;
    if (!point) {
      this.cursor.replaceChildren();
      this.tip.hidden = true;
      return;
    }
    const x = Math.max(LEFT, this.x(point.at_millis));
    const dots = this.stack(point).map(([, top], i) =>
      s("circle", { class: `spot ${this.series[i].colour}`, cx: x, cy: this.y(top), r: 3 }),
    );
    this.cursor.replaceChildren(s("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: this.height - BOTTOM }), ...dots);
    this.drawTip(point, x);
  }

  drawTip(point, x) {
    this.tip.hidden = !this.holds;
    if (!this.holds) return;
    const lines = this.series.map((one) =>
      h("div", {}, h("i", { class: `key ${one.colour}` }), `${one.label} `, h("b", {}, this.format(one.value(point)))),
    );
    this.tip.replaceChildren(h("div", { class: "muted" }, clock(point.at_millis)), ...lines.reverse());
    const width = this.tip.offsetWidth;
    const left = x + 12 + width > this.width ? x - 12 - width : x + 12;
    this.tip.style.left = `${Math.max(0, left)}px`;
  }

  point(event) {
    const x = event.clientX - this.element.getBoundingClientRect().left;
    const share = (x - LEFT) / (this.width - LEFT - RIGHT);
    this.look(this.from + Math.min(1, Math.max(0, share)) * (this.to - this.from));
  }

  look(at) {
    for (const chart of this.group.charts) chart.holds = chart === this;
    this.group.look(at);
  }

  leave() {
    this.holds = false;
    this.group.look(null);
  }

  key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape" && this.holds) this.leave();
    if (!by || this.points.length === 0) return;
    event.preventDefault();
    const now = this.points.indexOf(this.nearest() ?? this.points.at(-1));
    const next = this.points[Math.min(this.points.length - 1, Math.max(0, now + by))];
    this.look(next.at_millis);
    // Said by screen readers, since it is the focused element's name.
    const values = this.series.map((one) => `${one.label} ${this.format(one.value(next))}`);
    mark(this.element, "aria-label", `${this.name} at ${clock(next.at_millis)}: ${values.join(", ")}`);
  }
}
