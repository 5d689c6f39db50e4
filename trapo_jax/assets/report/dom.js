"use strict";
// Builds the document. Data is inserted as text or as plain attributes, never as markup.

const DATA = JSON.parse(document.getElementById("data").textContent);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// Formats a number with up to four significant digits; missing numbers become "–".
function number(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(size < 1 ? 3 : 4)));
}

function seconds(value) {
  if (value < 120) return `${number(value)} s`;
  return value < 7200 ? `${(value / 60).toFixed(1)} min` : `${(value / 3600).toFixed(1)} h`;
}

// Formats an accuracy.
const fixed = (value) => make("span", {}, value === null ? "–" : value.toFixed(3));

// Returns a table that can be scrolled horizontally by pointer or keyboard. The first cell of each row is its header.
function table(caption, header, rows) {
  const cell = (content) =>
    content instanceof Node ? make("td", {}, content)
      : typeof content === "string" ? make("td", { class: "text" }, content) : make("td", {}, number(content));
  return make("div", { class: "wide", tabindex: 0, role: "group", "aria-label": caption },
    make("table", {},
      make("thead", {}, make("tr", {}, ...header.map((name, i) =>
        make("th", { scope: "col", class: typeof rows[0]?.[i] === "string" ? "text" : null }, name)))),
      make("tbody", {}, ...rows.map(([name, ...cells]) =>
        make("tr", {}, make("th", { scope: "row" }, name instanceof Node ? name : String(name)), ...cells.map(cell))))));
}

// Returns a collapsed section whose content is built when it is first opened.
function folded(title, build) {
  const details = make("details", {}, make("summary", {}, title));
  details.addEventListener("toggle", () => details.append(build()), { once: true });
  return details;
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
