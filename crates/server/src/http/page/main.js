// Asks the server every two seconds while somebody looks, and hands the answer to the page's parts.
import { Refused, api, farewell, token } from "./api.js";
import * as cards from "./cards.js";
import * as detail from "./detail.js";
import { byId, mark, pairs, say } from "./dom.js";
import { clock, count, span } from "./format.js";
import * as refusals from "./refusals.js";
import * as sessions from "./sessions.js";
import { notice, said, startSignIn, startTheme, tellLive, wantNothing, wantToken } from "./shell.js";

const EVERY_MILLIS = 2000;
const HOUR_MILLIS = 3600000;
/** Without an answer it is asked more and more slowly, up to this. */
const SLOWEST_MILLIS = 30000;

let samples = [];
let failures = 0;
let answered = 0;
let paused = false;
let timer = 0;
/** Counts what was asked: an answer to somebody who signed out meanwhile is not shown. */
let asking = 0;

async function ask() {
  clearTimeout(timer);
  const mine = ++asking;
  let next = EVERY_MILLIS;
  try {
    const overview = await api.overview(samples.at(-1)?.at_millis ?? 0);
    if (mine !== asking) return;
    failures = 0;
    answered = Date.now();
    take(overview);
  } catch (error) {
    if (mine !== asking) return;
    if (error instanceof Refused && error.status === 401) {
      signOut(token.get() ? "The server does not accept this token: it has expired, was taken back, or has a slip in it." : "");
      return;
    }
    failures += 1;
    next = Math.min(SLOWEST_MILLIS, EVERY_MILLIS * 2 ** Math.min(failures - 1, 6));
    tellFailure(error, next);
  }
  if (!paused && !document.hidden) timer = setTimeout(ask, next);
}

function take(overview) {
  const known = samples.at(-1)?.at_millis ?? 0;
  samples = samples.concat(overview.samples.filter((one) => one.at_millis > known));
  samples = samples.filter((one) => one.at_millis > overview.now_millis - HOUR_MILLIS);
  wantNothing();
  notice("");
  tellLive(paused ? "paused" : "live", paused ? `Paused at ${clock(answered)}` : "Live");
  drawServer(overview);
  cards.update(overview, samples);
  sessions.update(overview);
  refusals.update(overview);
  detail.update(overview);
  route();
  // For who waits for the page, as tests do.
  document.body.dataset.updates = String(Number(document.body.dataset.updates ?? 0) + 1);
}

function drawServer({ server, sessions: all, is_operator, now_millis }) {
  const { trunk } = server;
  say(byId("model"), trunk.model_name);
  document.title = `${trunk.model_name} – Offshoot`;
  say(byId("health"), server.health);
  mark(byId("health"), "class", `pill ${server.health === "serving" ? "good" : "warn"}`);
  say(byId("held"), `Layers ${trunk.split_point_1}–${trunk.split_point_2 - 1} of ${trunk.n_layers} on ${trunk.device} in ${trunk.compute_dtype}`);
  const attached = all.filter((one) => one.info.state === "attached").length;
  const device = all.filter((one) => one.info.residency === "device").length;
  const waiting = trunk.memory.waiting_for_room;
  pairs(byId("facts"), [
    ["Sessions", count(all.length)],
    ["Attached", count(attached)],
    ["On the device", count(device)],
    ...(is_operator ? [["Wait for room", count(waiting), "Sessions that wait for room on the device"]] : []),
    ["Up for", span(now_millis - server.started_millis)],
    ["Version", server.version, server.commit ? `commit ${server.commit}` : undefined],
  ]);
}

function tellFailure(error, next) {
  const since = answered ? `No answer since ${clock(answered)}` : "No answer from the server";
  const why = error instanceof Refused ? error.message : "it may be restarting, or the network is gone";
  notice(`${since}: ${why}. Asking again in ${Math.round(next / 1000)} s.`);
  tellLive("late", "No answer");
}

function signOut(why) {
  asking += 1;
  clearTimeout(timer);
  token.forget();
  if (answered) {
    // Nothing of what was seen stays in the page.
    farewell.keep(why);
    location.reload();
    return;
  }
  notice("");
  tellLive("idle", "Not signed in");
  wantToken(why || farewell.take());
}

/** `#/session/ID` is a session's own address. */
function route() {
  const id = /^#\/session\/([0-9a-f-]+)$/.exec(location.hash)?.[1];
  if (id && answered) detail.open(id);
  else detail.close();
}

function setPaused(on) {
  paused = on;
  const button = byId("pause");
  say(button, paused ? "Go on" : "Pause");
  if (paused) {
    clearTimeout(timer);
    tellLive("paused", `Paused at ${clock(answered)}`);
  } else {
    ask();
  }
}

startTheme();
startSignIn(ask);
cards.start();
sessions.start((id) => {
  location.hash = `#/session/${id}`;
});
detail.start({ said, changed: ask });
byId("pause").addEventListener("click", () => setPaused(!paused));
byId("sign-out").addEventListener("click", () => signOut(""));
window.addEventListener("hashchange", route);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !paused && !byId("console").hidden) ask();
});
ask();
