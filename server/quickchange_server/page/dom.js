// Elements made by calls: text is only ever text, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** The element of the document that has this id. */
export const byId = (id) => document.getElementById(id);

/** An HTML element. `attributes` with the value null or false are left out, true is "". */
export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same of SVG. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

/** A labelled field: a visible label around its control. */
export function field(label, control) {
  return el("label", { class: "field" }, el("span", {}, label), control);
}

/** Show what went wrong in `place`, or hide it where nothing did. */
export function showProblem(place, words) {
  if (place.textContent !== (words ?? "")) place.textContent = words ?? "";
  place.hidden = !words;
}

/** Set an element's text where it changed, so that screen readers are told of changes alone. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
