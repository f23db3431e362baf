// The frame of the page: colours, signing in and out, notices.
import { token } from "./api.js";
import { byId, h, say, show } from "./dom.js";

const THEMES = [["auto", "Auto"], ["light", "Light"], ["dark", "Dark"]];
const SAID_MILLIS = 6000;

/** The button that goes through the colours: the system's, light, dark. */
export function startTheme() {
  const button = byId("theme");
  const root = document.documentElement;
  const name = () => root.dataset.theme ?? "auto";
  const label = () => {
    const [, text] = THEMES.find(([one]) => one === name());
    say(button, `◐ ${text}`);
    button.setAttribute("aria-label", `Colours: ${text}`);
  };
  button.addEventListener("click", () => {
    const at = THEMES.findIndex(([one]) => one === name());
    const [next] = THEMES[(at + 1) % THEMES.length];
    if (next === "auto") delete root.dataset.theme;
    else root.dataset.theme = next;
    try {
      localStorage.setItem("offshoot-theme", next);
    } catch {
      // It is as chosen until the page is closed.
    }
    label();
  });
  label();
}

/** Asks for a token; `signedIn()` follows when there is one to try. */
export function startSignIn(signedIn) {
  show(byId("insecure"), !window.isSecureContext);
  byId("sign-in-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const field = byId("token");
    const text = field.value.trim();
    // Anything else could not travel in a header.
    if (!/^[\x21-\x7e]+$/.test(text)) {
      say(byId("sign-in-said"), "That is no token: it has spaces or other signs within.");
      return;
    }
    field.value = "";
    token.keep(text);
    signedIn();
  });
}

/** Shows the form, and why. */
export function wantToken(why) {
  show(byId("console"), false);
  show(byId("pause"), false);
  show(byId("sign-out"), false);
  const wasHidden = byId("sign-in").hidden;
  show(byId("sign-in"), true);
  say(byId("sign-in-said"), why);
  if (wasHidden) byId("token").focus();
}

/** Shows the data. */
export function wantNothing() {
  show(byId("sign-in"), false);
  say(byId("sign-in-said"), "");
  show(byId("console"), true);
  show(byId("pause"), true);
  show(byId("sign-out"), token.get() !== null);
}

/** How fresh the data are: "live", "paused", "late". */
export function tellLive(kind, text) {
  byId("live").dataset.kind = kind;
  say(byId("live-text"), text);
}

/** Something that stays until it is mended; empty: nothing. */
export function notice(text) {
  show(byId("notice"), text !== "");
  say(byId("notice"), text);
}

/** Something that was done, or not; for a moment. */
export function said(text, failed = false) {
  const toast = h("p", { class: failed ? "toast failed" : "toast" }, text);
  // Before everything, an open dialog included.
  const place = document.querySelector("dialog[open]") ?? document.body;
  const box = byId("said");
  place.append(box);
  box.append(toast);
  setTimeout(() => toast.remove(), failed ? 3 * SAID_MILLIS : SAID_MILLIS);
}
