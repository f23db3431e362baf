// The table of sessions: found, sorted, a page at a time. Rows stay the same elements as long as their
// session is on the page, and their order holds while somebody points at them or has the focus there.
import { byId, h, mark, s, say, show } from "./dom.js";
import { NONE, ago, bytes, count, loss, percent, rate, seconds } from "./format.js";

const PER_PAGE = 50;
const PLACES = { device: "on the device", host: "in host memory", disk: "on disk" };
const FILTERS = [
  ["", "All states", () => true],
  ["training", "Training now", (one) => one.tokens_per_second > 0],
  ["attached", "Attached", (one) => one.info.state === "attached"],
  ["detached", "Detached", (one) => one.info.state === "detached"],
  ["parked", "Parked", (one) => one.info.state === "parked"],
  ["device", "On the device", (one) => one.info.residency === "device"],
  ["pinned", "Pinned", (one) => one.pinned],
];

export const stateOf = (one) => one.info.state || NONE;
export const placeOf = (one) => PLACES[one.info.residency] ?? NONE;
export const bytesOf = ({ info }) => info.adapter_bytes + info.tape_bytes + info.cache_bytes;
export const nameOf = (one) => one.info.name || "unnamed";
const shortId = (one) => one.info.session_id.slice(0, 8);

const dash = (value, text) => (value ? text(value) : NONE);

// Key, head, class, what it is sorted by, what stands there, what the head means.
const COLUMNS = [
  ["name", "Session", "name", (one) => nameOf(one).toLowerCase(), null, ""],
  ["tenant", "Tenant", "tenant", (one) => one.tenant.toLowerCase(), (one) => one.tenant || NONE, ""],
  ["state", "State", "state", (one) => (one.tokens_per_second > 0 ? "" : one.info.state), null, "Whether a client is attached, and where the adapter is"],
  ["rank", "Rank", "number wide", (one) => one.info.lora?.r ?? 0, (one) => dash(one.info.lora?.r, count), "LoRA's r"],
  ["step", "Step", "number", (one) => one.info.step, (one) => count(one.info.step), "Optimizer steps taken"],
  ["speed", "Tokens/s", "number", (one) => one.tokens_per_second, (one) => dash(one.tokens_per_second, rate), "Of the last ten seconds"],
  ["loss", "Loss", "number middle", (one) => one.shared_loss, (one) => loss(one.shared_loss), "Of the last step, if its client shares it"],
  ["share", "Device", "number wide", (one) => one.device_share, (one) => dash(one.device_share, percent), "Share of the device's time in the last minute"],
  ["queue", "Queue", "number wide", (one) => one.queue_seconds, (one) => dash(one.queue_seconds, seconds), "How long its frames of the last minute waited on average"],
  ["bytes", "Memory", "number middle", bytesOf, (one) => dash(bytesOf(one), bytes), "Adapter, tapes and caches"],
  ["durable", "Durable", "number middle", (one) => one.durable_step, (one) => dash(one.durable_step, (n) => `step ${count(n)}`), "Step of the newest snapshot"],
];

const choice = { text: "", tenant: "", state: "", sort: "speed", down: true, page: 0 };
const rows = new Map();
let all = [];
let now = 0;
let leftOut = 0;
let held = false;
let order = [];

const body = byId("rows");

/** Heads, filters and pages; `open(id)` shows one session. */
export function start(open) {
  byId("heads").replaceChildren(...COLUMNS.map(head));
  byId("state").replaceChildren(...FILTERS.map(([value, label]) => h("option", { value }, label)));
  for (const [id, key] of [["search", "text"], ["tenant", "tenant"], ["state", "state"]]) {
    byId(id).addEventListener("input", (event) => choose({ [key]: event.target.value, page: 0 }));
  }
  byId("before").addEventListener("click", () => choose({ page: choice.page - 1 }));
  byId("after").addEventListener("click", () => choose({ page: choice.page + 1 }));
  const hold = () => {
    held = body.matches(":hover") || body.contains(document.activeElement);
  };
  for (const event of ["pointerover", "pointerout", "focusin", "focusout"]) {
    body.addEventListener(event, () => queueMicrotask(hold));
  }
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    // Whoever marks a text does not want to leave.
    if (row && !event.target.closest("a") && getSelection().isCollapsed) open(row.dataset.id);
  });
  document.addEventListener("keydown", (event) => {
    const writes = event.target.closest("input, select, dialog");
    if (event.key !== "/" || writes || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    byId("search").focus();
  });
}

function head([key, label, kind, , , title]) {
  const sort = () => {
    const down = choice.sort === key ? !choice.down : kind.startsWith("number");
    choose({ sort: key, down, page: 0 });
  };
  const button = h("button", { type: "button", onclick: sort, title: title || null }, label, h("span", { class: "arrow", "aria-hidden": true }));
  return h("th", { scope: "col", class: kind, "data-key": key }, button);
}

function choose(change) {
  Object.assign(choice, change);
  held = false;
  draw();
  say(byId("found"), `${count(found().length)} sessions`);
}

const found = () => {
  const text = choice.text.trim().toLowerCase();
  const [, , fits] = FILTERS.find(([value]) => value === choice.state) ?? FILTERS[0];
  return all.filter((one) =>
    fits(one) &&
    (!choice.tenant || one.tenant === choice.tenant) &&
    (!text || [nameOf(one), one.tenant, one.info.session_id].some((part) => part.toLowerCase().includes(text))),
  );
};

function sorted(sessions) {
  const value = COLUMNS.find(([key]) => key === choice.sort)[3];
  const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  const sign = choice.down ? -1 : 1;
  // What is not known comes last, in either order.
  const known = (a, b) =>
    a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b);
  return sessions.toSorted((a, b) =>
    known(value(a), value(b)) ||
    compare(nameOf(a), nameOf(b)) || compare(a.info.session_id, b.info.session_id),
  );
}

/** The sessions as they are now. */
export function update(overview) {
  all = overview.sessions;
  now = overview.now_millis;
  leftOut = overview.sessions_left_out ?? 0;
  tenants();
  draw();
}

function tenants() {
  const names = [...new Set(all.map((one) => one.tenant))].sort();
  const select = byId("tenant");
  show(select, names.length > 1);
  document.body.classList.toggle("one-tenant", names.length < 2);
  if (select.dataset.names === names.join("\n")) return;
  select.dataset.names = names.join("\n");
  if (!names.includes(choice.tenant)) choice.tenant = "";
  select.replaceChildren(h("option", { value: "" }, "All tenants"), ...names.map((name) => h("option", { value: name }, name)));
  select.value = choice.tenant;
}

function draw() {
  const fitting = found();
  const n = fitting.length;
  const last = Math.max(0, Math.ceil(n / PER_PAGE) - 1);
  choice.page = Math.min(last, Math.max(0, choice.page));
  const begin = choice.page * PER_PAGE;
  const byName = new Map(fitting.map((one) => [one.info.session_id, one]));
  const page = sorted(fitting).slice(begin, begin + PER_PAGE).map((one) => one.info.session_id);
  if (held) {
    const kept = order.filter((id) => byName.has(id));
    order = [...kept, ...page.filter((id) => !kept.includes(id))].slice(0, PER_PAGE);
  } else {
    order = page;
  }
  place(order.map((id) => byName.get(id)));
  for (const th of byId("heads").children) {
    const isSorted = th.dataset.key === choice.sort;
    mark(th, "aria-sort", isSorted ? (choice.down ? "descending" : "ascending") : null);
    say(th.querySelector(".arrow"), isSorted ? (choice.down ? "↓" : "↑") : "");
  }
  const narrowed = n < all.length;
  say(byId("n-sessions"), narrowed ? `${count(n)} of ${count(all.length)}` : count(n));
  show(byId("left-out"), leftOut > 0);
  say(byId("left-out"), `${count(leftOut)} more, none of them live, are not shown: offshoot sessions list has them all.`);
  show(byId("no-sessions"), n === 0);
  say(byId("no-sessions"), narrowed ? "No session fits." : "No sessions yet. They appear here when a client opens one.");
  show(byId("pages"), n > PER_PAGE);
  say(byId("page-text"), `${count(begin + 1)}–${count(Math.min(n, begin + PER_PAGE))} of ${count(n)}`);
  byId("before").disabled = choice.page === 0;
  byId("after").disabled = choice.page === last;
}

function place(sessions) {
  const wanted = new Set(sessions.map((one) => one.info.session_id));
  for (const [id, row] of rows) {
    if (wanted.has(id)) continue;
    row.remove();
    rows.delete(id);
  }
  sessions.forEach((one, i) => {
    const id = one.info.session_id;
    let row = rows.get(id);
    if (!row) {
      row = make(one);
      rows.set(id, row);
    }
    fill(row, one);
    // Moved only if it stands elsewhere: a row that moves loses its focus.
    if (body.children[i] !== row) body.insertBefore(row, body.children[i] ?? null);
  });
}

function make(one) {
  const id = one.info.session_id;
  const cells = COLUMNS.map(([key, , kind]) => {
    if (key === "name") {
      const link = h("a", { href: `#/session/${id}` }, h("bdi"));
      const under = h("span", { class: "under" }, h("span"), h("bdi", { class: "inline-tenant" }));
      return h("th", { scope: "row", class: kind }, link, under);
    }
    if (key === "state") return h("td", { class: kind }, h("i", { class: "dot" }), h("span"), pin(), h("span", { class: "under" }));
    return h("td", { class: kind });
  });
  return h("tr", { "data-id": id }, ...cells);
}

/** A pin, for sessions that stay on the device. */
const pin = () =>
  s("svg", { class: "pin", viewBox: "0 0 16 16", role: "img", "aria-label": "pinned" }, s("path", { d: "M5 1h6l-1 5 3 3H9v6H7V9H3l3-3z" }));

function fill(row, one) {
  const training = one.tokens_per_second > 0;
  COLUMNS.forEach(([key, , , , text], i) => {
    const cell = row.children[i];
    if (key === "name") {
      say(cell.querySelector("bdi"), nameOf(one));
      mark(cell.firstChild, "title", nameOf(one));
      say(cell.lastChild.firstChild, shortId(one));
      say(cell.lastChild.lastChild, one.tenant && ` · ${one.tenant}`);
    } else if (key === "state") {
      mark(cell.firstChild, "class", `dot ${training ? "training" : stateOf(one)}`);
      say(cell.children[1], training ? "training" : stateOf(one));
      mark(cell.children[2], "class", one.pinned ? "pin" : "pin unset");
      say(cell.lastChild, one.last_frame_millis && !training ? `${placeOf(one)}, ${ago(now, one.last_frame_millis)}` : placeOf(one));
    } else {
      say(cell, text(one));
    }
  });
}
