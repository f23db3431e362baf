// What was refused or went wrong in the last hour, for who has to answer questions about it.
import { byId, h, say, show } from "./dom.js";
import { NONE, ago, count } from "./format.js";

const rows = new Map();
const body = byId("refusal-rows");
const words = (label) => label.replaceAll("_", " ");

function make() {
  const told = h("td", { class: "told" }, h("span", { class: "message" }), h("code", { class: "id" }));
  return h("tr", {}, h("th", { scope: "row" }), h("td", { class: "tenant" }), h("td", { class: "number" }), h("td", { class: "when" }), told);
}

/** Those of the last hour, newest first. */
export function update({ refusals, now_millis }) {
  show(byId("refusals"), refusals.length > 0);
  show(byId("no-refusals"), refusals.length === 0);
  const keys = refusals.map((one) => `${one.label}\n${one.tenant}`);
  for (const [key, row] of rows) {
    if (keys.includes(key)) continue;
    row.remove();
    rows.delete(key);
  }
  refusals.forEach((one, i) => {
    const row = rows.get(keys[i]) ?? make();
    rows.set(keys[i], row);
    const [label, tenant, times, last, told] = row.children;
    say(label, words(one.label));
    say(tenant, one.tenant || NONE);
    say(times, count(one.count));
    say(last, ago(now_millis, one.last_millis));
    say(told.firstChild, one.message);
    say(told.lastChild, one.request_id && `request ${one.request_id}`);
    if (body.children[i] !== row) body.insertBefore(row, body.children[i] ?? null);
  });
}
