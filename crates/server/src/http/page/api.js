// The server's JSON, with the token of this tab.

const KEY = "offshoot-token";
const PATIENCE_MILLIS = 15000;

export const token = {
  get: () => sessionStorage.getItem(KEY),
  keep: (text) => sessionStorage.setItem(KEY, text),
  forget: () => sessionStorage.removeItem(KEY),
};

/** Why somebody was signed out, across the page's fresh beginning. */
export const farewell = {
  keep: (why) => sessionStorage.setItem("offshoot-farewell", why),
  take: () => {
    const why = sessionStorage.getItem("offshoot-farewell") ?? "";
    sessionStorage.removeItem("offshoot-farewell");
    return why;
  },
};

/** What the server said instead of an answer. */
export class Refused extends Error {
  constructor(status, told) {
    super(told.message);
    this.status = status;
    this.label = told.label;
    this.requestId = told.request_id;
  }
}

async function ask(method, path) {
  // The last one is what lets an open server know that this page is its own.
  const headers = { accept: "application/json", "x-offshoot": "1" };
  const sent = token.get();
  if (sent) headers.authorization = `Bearer ${sent}`;
  const signal = AbortSignal.timeout(PATIENCE_MILLIS);
  const response = await fetch(path, { method, headers, signal, cache: "no-store", credentials: "omit" });
  const text = await response.text();
  if (response.ok) return JSON.parse(text);
  let told;
  try {
    told = JSON.parse(text);
  } catch {
    told = { message: `the server answered ${response.status} ${response.statusText}` };
  }
  throw new Refused(response.status, told);
}

const session = (id) => `api/sessions/${encodeURIComponent(id)}`;

export const api = {
  overview: (since) => ask("GET", `api/overview?since=${since}`),
  snapshots: (id) => ask("GET", `${session(id)}/snapshots`),
  evict: (id) => ask("POST", `${session(id)}/evict`),
  pin: (id, pinned) => ask("POST", `${session(id)}/${pinned ? "pin" : "unpin"}`),
  deleteSession: (id) => ask("DELETE", session(id)),
  deleteSnapshot: (id, snapshot) =>
    ask("DELETE", `${session(id)}/snapshots/${encodeURIComponent(snapshot)}`),
};
