"use strict";
// Sorts tables, shows what tokens of heat maps say, and opens what links and printing need. The page is whole without it.
document.documentElement.classList.add("has-js");

// Tables: a button in each header. The first click sorts numbers downwards and texts upwards.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const before = header.getAttribute("aria-sort");
      const isNumeric = header.classList.contains("number");
      const order = before ? (before === "ascending" ? "descending" : "ascending") : isNumeric ? "descending" : "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const keys = new Map([...body.rows].map((row) => [row, key(row.cells[column])]));
      body.append(...[...body.rows].sort((a, b) => compare(keys.get(a), keys.get(b), sign)));
    });
  });
}
function key(cell) {
  const value = cell.dataset.v;
  return value === undefined ? cell.textContent.trim() : value === "" ? null : Number(value.replace("inf", "Infinity"));
}
function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null); // last in both orders
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return sign * (typeof a === "number" ? Math.sign(a - b) || 0 : a.localeCompare(b, undefined, { numeric: true }));
}

// Heat maps.
const LEVELS = 5;
const tip = document.getElementById("tip");
let shown = null; // the token that the tip is about
let pinned = false; // by a click or a tap, so that it stays
for (const heat of document.querySelectorAll(".heat")) {
  let read = null;
  const data = () => (read ??= JSON.parse(heat.querySelector("script").textContent));
  const tokens = [...heat.querySelectorAll(".tokens > i")];
  const places = new Map(tokens.map((token, place) => [token, place]));
  const select = heat.querySelector("select");
  heat.querySelectorAll(".tokens").forEach((side) => {
    side.setAttribute("role", "group");
    [...side.children].forEach((token, place) => {
      token.tabIndex = place ? -1 : 0;
      token.setAttribute("role", "button");
    });
  });
  const scale = heat.querySelector(".scale");
  const paint = () => {
    const { limits, negative, tokens: all } = data();
    const which = select.selectedIndex, limit = limits[which];
    tokens.forEach((token, place) => {
      const value = all[place][0][which];
      const level = value === null || !limit ? 0 : Math.floor(Math.min(Math.abs(value) / limit, 1) * LEVELS + 0.5);
      token.className = level ? (value < 0 ? "n" : "p") + level : "";
    });
    scale.querySelector(".low").textContent = negative[which] ? format(-limit) : "";
    scale.querySelector(".high").textContent = format(limit);
    scale.classList.toggle("positive", !negative[which]);
  };
  if (select) {
    select.addEventListener("change", paint);
    if (select.selectedIndex > 0 || !scale.querySelector(".low").textContent) paint();
  }
  const show = (token, pin) => {
    if (shown === token && pinned) return;
    hide();
    shown = token;
    pinned = pin;
    token.classList.add("on");
    token.setAttribute("aria-describedby", "tip");
    fill(token.textContent, data(), data().tokens[places.get(token)]);
    tip.hidden = false;
    place(token);
  };
  const tokenOf = (event) => event.target.closest?.(".tokens > i");
  heat.addEventListener("mouseover", (event) => tokenOf(event) && !pinned && show(tokenOf(event), false));
  heat.addEventListener("mouseout", (event) => tokenOf(event) && !pinned && document.activeElement !== shown && hide());
  heat.addEventListener("focusin", (event) => {
    if (!tokenOf(event)) return;
    const side = tokenOf(event).parentElement;
    side.querySelector('[tabindex="0"]').tabIndex = -1;
    tokenOf(event).tabIndex = 0;
    pinned = false;
    show(tokenOf(event), false);
  });
  heat.addEventListener("focusout", (event) => tokenOf(event) && !pinned && hide());
  heat.addEventListener("click", (event) => {
    if (!tokenOf(event)) return;
    pinned = false;
    show(tokenOf(event), true);
  });
  heat.addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    if (!token || event.ctrlKey || event.altKey || event.metaKey) return;
    const side = token.parentElement.children, at = [...side].indexOf(token);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: side.length - 1 }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      side[to]?.focus();
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      token.click();
    }
  });
}
document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
document.addEventListener("click", (event) => !event.target.closest?.(".tokens > i") && hide());
addEventListener("resize", hide);
addEventListener("scroll", () => shown && place(shown), { passive: true });

function hide() {
  shown?.classList.remove("on");
  shown?.removeAttribute("aria-describedby");
  tip.hidden = true;
  shown = null;
  pinned = false;
}
function place(token) {
  const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tip;
  const across = document.documentElement.clientWidth, down = document.documentElement.clientHeight;
  tip.style.left = Math.max(8, Math.min(box.left, across - width - 8)) + "px";
  const below = box.bottom + 8;
  tip.style.top = (below + height < down ? below : Math.max(8, box.top - height - 8)) + "px";
}
function fill(text, { quantities, distributions, texts }, [values, tops]) {
  const table = make("table");
  quantities.forEach((name, at) => table.append(make("tr", "", make("th", "", name), make("td", "number", format(values[at])))));
  const columns = make("div", "tops");
  distributions.forEach((name, at) => {
    const list = make("table");
    for (let i = 0; i < tops[at].length; i += 2) {
      list.append(make("tr", "", make("td", "", visible(texts[tops[at][i]])), make("td", "number", share(tops[at][i + 1]))));
    }
    if (tops[at].length) columns.append(make("div", "", make("b", "", name), list));
  });
  tip.replaceChildren(make("div", "token", text), table, ...(columns.childNodes.length ? [columns] : []));
}
function make(tag, name = "", ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children);
  return element;
}
function visible(text) {
  return text.replace(/\n/g, "⏎").replace(/^ | $/g, "␣").replace(/\p{C}/gu, (c) => "U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0"));
}
function format(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  const text = size >= 100 ? value.toFixed(0) : size >= 1e-3 || !value ? String(Number(value.toPrecision(3))) : value.toExponential(1);
  return text.replace("-", "−");
}
function share(p) {
  return p === null ? "–" : p >= 0.0005 ? (100 * p).toFixed(1) + "%" : "<0.1%";
}

// Links into what is closed open it. Printing opens everything.
function reveal() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let element = target; element; element = element.parentElement) if (element.tagName === "DETAILS") element.open = true;
  target.scrollIntoView();
}
addEventListener("hashchange", reveal);
document.addEventListener("click", (event) => event.target.closest?.('a[href^="#"]') && setTimeout(reveal));
reveal();
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const details of closed) details.open = true;
});
addEventListener("afterprint", () => closed.forEach((details) => (details.open = false)));
