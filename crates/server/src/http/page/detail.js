// One session: what it does, what it has used, its snapshots, and what may be done to it.
import { api } from "./api.js";
import { Chart, Group, roundDown, roundUp } from "./chart.js";
import { byId, h, pairs, say, show } from "./dom.js";
import { NONE, ago, bytes, count, loss, moment, percent, rate, seconds, short } from "./format.js";
import { bytesOf, nameOf, placeOf, stateOf } from "./sessions.js";

/** Moments kept of each session since the page was opened. */
const KEPT = 900;
const HEADS = [["Step", "number"], ["Taken", ""], ["Why", ""], ["Size", "number"], ["Snapshot", ""]];
const dialog = byId("detail");
const history = new Map();

let shown = null;
let latest = null;
let parts = null;
let snapshots = null;
let did = () => {};

/** The dialog; `said(text)` tells of what was done, `changed()` asks for fresh data. */
export function start({ said, changed }) {
  did = async (what, action) => {
    try {
      await action();
      said(what);
    } catch (error) {
      said(error.requestId ? `${error.message} (request ${error.requestId})` : error.message, true);
    }
    await look();
    changed();
  };
  // Escape; the dialog's own word that it is closed may come when the next session is shown already.
  dialog.addEventListener("cancel", close);
  dialog.addEventListener("close", () => dialog.open || close());
  // Beside the sheet.
  dialog.addEventListener("click", (event) => event.target === dialog && close());
}

/** The address without a session, and the same entry in the tab's history. */
const history_back = () => window.history.replaceState(null, "", location.pathname + location.search);

/** Shows the session of this id. */
export function open(id) {
  if (shown === id) return;
  shown = id;
  snapshots = null;
  parts = make();
  dialog.replaceChildren(parts.sheet);
  if (!dialog.open) dialog.showModal();
  if (latest) fill();
  look();
}

export function close() {
  shown = null;
  if (location.hash.startsWith("#/session/")) history_back();
  if (dialog.open) dialog.close();
}

/** The sessions as they are now. */
export function update(overview) {
  latest = overview;
  const ids = new Set();
  for (const one of overview.sessions) {
    const id = one.info.session_id;
    ids.add(id);
    const points = history.get(id) ?? [];
    history.set(id, points);
    points.push({ at_millis: overview.now_millis, speed: one.tokens_per_second, loss: one.shared_loss });
    if (points.length > KEPT) points.shift();
  }
  for (const id of history.keys()) if (!ids.has(id)) history.delete(id);
  if (shown) fill();
}

function chart(name, colour, value, more) {
  return new Chart({ group: new Group(), name, series: [{ label: name, colour, value }], ...more });
}

function make() {
  const button = (label, onclick, kind) => h("button", { type: "button", class: kind, onclick }, label);
  const parts = {
    title: h("h2", { id: "detail-title", tabindex: -1, autofocus: true }, h("bdi")),
    under: h("p", { class: "muted" }),
    id: h("code", { class: "id", title: "The session's id" }, shown),
    evict: button("Take off the device", () => act("evict")),
    pin: button("Pin", () => act("pin")),
    remove: button("Delete…", () => ask(true), "danger"),
    sure: h("div", { class: "sure", hidden: true }),
    now: h("dl", { class: "facts" }),
    used: h("dl", { class: "facts" }),
    lora: h("dl", { class: "facts last-wide" }),
    speed: chart("Tokens/s", "c-flow", (point) => point.speed, { format: rate, top: (most) => roundUp(most, { least: 0.1 }) }),
    loss: chart("Loss", "c-queue", (point) => point.loss ?? 0, { format: short, top: (most) => roundUp(most, { least: 0.01 }), floor: roundDown }),
    list: h("tbody"),
    none: h("p", { class: "empty" }, "No snapshots yet."),
    gone: h("p", { class: "notice", hidden: true }, "This session is not there any more."),
  };
  parts.lossBox = h("div", {}, h("h3", {}, "Loss since this page was opened"), parts.loss.element);
  const table = h("table", {}, h("thead", {}, h("tr", {}, ...HEADS.map(([label, kind]) => h("th", { scope: "col", class: kind }, label)), h("td"))), parts.list);
  parts.sheet = h("div", { class: "sheet" },
    h("header", {}, h("div", {}, parts.title, parts.under), h("button", { type: "button", class: "close", "aria-label": "Close", onclick: close }, "×")),
    parts.gone,
    h("div", { class: "actions" }, parts.evict, parts.pin, parts.remove), parts.sure,
    parts.now,
    h("h3", {}, "Tokens/s since this page was opened"), parts.speed.element, parts.lossBox,
    h("h3", {}, "Used since it was opened"), parts.used,
    h("h3", {}, "Adapter"), parts.lora,
    h("h3", {}, "Snapshots"), h("div", { class: "scroll" }, table), parts.none,
    h("h3", {}, "Id"), parts.id);
  parts.sure.append(h("p"), button("Delete it", () => act("delete"), "danger"), button("Keep it", () => ask(false)));
  return parts;
}

const current = () => latest?.sessions.find((one) => one.info.session_id === shown);

function ask(sure) {
  show(parts.sure, sure);
  if (sure) parts.sure.lastChild.focus();
  else parts.remove.focus();
}

function act(what) {
  const one = current();
  if (!one) return;
  const [id, name] = [shown, nameOf(one)];
  if (what === "evict") did(`${name} leaves the device; its next frame brings it back.`, () => api.evict(id));
  if (what === "pin") did(one.pinned ? `${name} is no longer pinned.` : `${name} is pinned to the device.`, () => api.pin(id, !one.pinned));
  if (what === "delete") {
    did(`${name} was deleted.`, async () => {
      await api.deleteSession(id);
      close();
    });
  }
}

function fill() {
  const one = current();
  show(parts.gone, !one);
  for (const button of [parts.evict, parts.pin, parts.remove]) button.disabled = !one;
  if (!one) return;
  const { info } = one;
  const now = latest.now_millis;
  say(parts.title.firstChild, nameOf(one));
  const training = one.tokens_per_second > 0;
  say(parts.under, [one.tenant, training ? "training" : stateOf(one), placeOf(one), one.pinned && "pinned"].filter(Boolean).join(" · "));
  say(parts.pin, one.pinned ? "Unpin" : "Pin to the device");
  parts.evict.disabled = info.residency !== "device";
  say(parts.sure.firstChild, `Delete ${nameOf(one)} at step ${count(info.step)} with all its snapshots? Its client cannot go on, and nothing brings it back.`);
  pairs(parts.now, [
    ["Step", count(info.step)],
    ["Durable", one.durable_step ? `step ${count(one.durable_step)}` : NONE],
    ["Tokens/s", rate(one.tokens_per_second)],
    ["Loss", loss(one.shared_loss), one.shared_loss === null ? "Its client does not share it" : undefined],
    ["Device", percent(one.device_share), "Share of the device's time in the last minute"],
    ["Queue", seconds(one.queue_seconds), "How long its frames of the last minute waited on average"],
    ["Memory", bytes(bytesOf(one)), `adapter ${bytes(info.adapter_bytes)}, tapes ${bytes(info.tape_bytes)}, caches ${bytes(info.cache_bytes)}`],
    ["Last frame", ago(now, one.last_frame_millis)],
    ["Opened", ago(now, one.opened_millis), one.opened_millis ? moment(one.opened_millis) : undefined],
  ]);
  const used = one.metering;
  pairs(parts.used, [
    ["Tokens", count(used?.tokens ?? 0)],
    ["Device time", seconds(used?.device_seconds ?? 0)],
    ["Received", bytes(used?.bytes_in ?? 0)],
    ["Sent", bytes(used?.bytes_out ?? 0)],
    ["Most memory", bytes(used?.peak_bytes ?? 0)],
    ["Steps", count(used?.steps ?? 0)],
  ]);
  const lora = info.lora;
  pairs(parts.lora, [
    ["Rank", count(lora?.r ?? 0)],
    ["Alpha", String(lora?.lora_alpha ?? NONE)],
    ["Dropout", String(lora?.lora_dropout ?? NONE)],
    ["Scaling", lora?.use_rslora ? "alpha / √r" : "alpha / r"],
    ["Modules", lora?.target_modules.join(", ") || "the server's default"],
  ]);
  const points = history.get(shown) ?? [];
  const from = Math.max(points[0]?.at_millis ?? now, now - 15 * 60000);
  // Never a width of nothing.
  const begin = Math.min(from, now - 30000);
  parts.speed.update(points, begin, now);
  const shared = points.filter((point) => point.loss !== null);
  show(parts.lossBox, shared.length > 0);
  if (shared.length > 0) parts.loss.update(shared, begin, now);
  if (snapshots && snapshots.durable !== one.durable_step) look();
  fillSnapshots(now);
}

/** Asks for the snapshots again. */
async function look() {
  const id = shown;
  const durable = current()?.durable_step;
  if (!id || !current()) return;
  try {
    const answer = await api.snapshots(id);
    if (id !== shown) return;
    snapshots = { durable, list: answer.snapshots };
    fillSnapshots(latest.now_millis);
  } catch {
    // The next overview tells whether the session or the server is gone.
  }
}

function fillSnapshots(now) {
  if (!snapshots) return;
  const { list } = snapshots;
  show(parts.none, list.length === 0);
  show(parts.list.parentElement, list.length > 0);
  const ids = list.map((one) => one.info.snapshot_id).join();
  if (parts.list.dataset.ids !== ids) {
    parts.list.dataset.ids = ids;
    parts.list.replaceChildren(...list.map(row));
  }
  list.forEach((one, i) => say(parts.list.children[i].children[1], ago(now, one.taken_millis)));
}

function row({ info, taken_millis, reason, is_head }) {
  const id = info.snapshot_id;
  const session = shown;
  const remove = h("button", {
    type: "button", class: "small", "aria-label": `Delete the snapshot of step ${info.step}`,
    onclick: () => did(`The snapshot of step ${count(info.step)} was deleted.`, () => api.deleteSnapshot(session, id)),
  }, "Delete");
  return h("tr", {},
    h("td", { class: "number" }, count(info.step)),
    h("td", { title: taken_millis ? moment(taken_millis) : null }),
    h("td", {}, reason || NONE),
    h("td", { class: "number" }, bytes(info.bytes)),
    h("td", {}, h("code", { class: "id" }, id)),
    h("td", {}, is_head ? h("span", { class: "muted", title: "The session goes on from here" }, "newest") : remove));
}
