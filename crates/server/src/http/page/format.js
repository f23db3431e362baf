// Numbers as people read them. "–" stands for what is not known.

export const NONE = "–";
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (n) => whole.format(n);

/** 0.0123, 1.23, 12.3, 123, 1,234, 12.3k, 1.23M. */
export function short(n) {
  const size = Math.abs(n);
  if (size >= 1e6) return `${digits(n / 1e6)}M`;
  if (size >= 1e4) return `${digits(n / 1e3)}k`;
  if (size >= 1000) return count(n);
  return digits(n);
}

function digits(n) {
  if (n === 0) return "0";
  if (Math.abs(n) >= 100) return count(n);
  const text = n.toPrecision(3);
  return text.includes("e") ? text : String(Number(text));
}

export const rate = (n) => (n > 0 && n < 0.005 ? "<0.01" : short(n));

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(n) {
  let unit = 0;
  let value = n;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  const text = unit === 0 || value >= 100 ? count(value) : String(Number(value.toFixed(value < 10 ? 2 : 1)));
  return `${text} ${UNITS[unit]}`;
}

export const percent = (share) => {
  const value = share * 100;
  return `${value > 0 && value < 9.95 ? value.toFixed(1) : Math.round(value)} %`;
};

/** Of waiting and computing. */
export function seconds(n) {
  if (n === 0) return "0 s";
  if (n < 0.001) return "<1 ms";
  if (n < 1) return `${Math.round(n * 1000)} ms`;
  if (n < 100) return `${Number(n.toPrecision(3))} s`;
  return span(n * 1000);
}

/** Of lifetimes, in the two largest units. */
export function span(millis) {
  const s = Math.max(0, Math.floor(millis / 1000));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export const ago = (now, then) => {
  if (!then) return NONE;
  const past = now - then;
  return past < 1500 ? "now" : `${span(past)} ago`;
};

export const clock = (millis, withSeconds = true) =>
  new Date(millis).toLocaleTimeString("en-GB", {
    hour: "2-digit",
    minute: "2-digit",
    ...(withSeconds && { second: "2-digit" }),
  });

export const moment = (millis) => {
  const date = new Date(millis);
  const day = date.toLocaleDateString("en-CA");
  return `${day} ${clock(millis)}`;
};

export const loss = (value) =>
  value === null || value === undefined ? NONE : value >= 1000 || value < 1e-3 ? value.toExponential(2) : value.toFixed(value < 10 ? 4 : 2);
