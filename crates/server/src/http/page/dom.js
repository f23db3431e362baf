// Elements. Texts become text nodes, never markup: names of sessions are the tenants' own.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** An HTML element: attributes, handlers as `onclick`, and children. */
export const h = (tag, props = {}, ...children) => fill(document.createElement(tag), props, children);

/** The same in a drawing. */
export const s = (tag, props = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), props, children);

/** Sets a text if it is another one: selections and screen readers are left alone. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Sets an attribute if it is another one; null takes it away. */
export function mark(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

/** Whether the element is to be seen. */
export function show(element, seen) {
  if (element.hidden === seen) element.hidden = !seen;
}

/** Pairs of a name and a text, in a <dl>: the same names keep their places. */
export function pairs(list, entries) {
  const names = entries.map(([name]) => name).join("\n");
  if (list.dataset.names !== names) {
    list.dataset.names = names;
    list.replaceChildren(...entries.map(([name]) => h("div", {}, h("dt", {}, name), h("dd"))));
  }
  entries.forEach(([, text, title], i) => {
    const value = list.children[i].lastChild;
    say(value, text);
    mark(value, "title", title ?? null);
  });
}
