// Latents of one coder: a list that is searched here, and exemplars that are loaded in pieces. Both come as scripts,
// because pages from disk may not fetch. Text from the data is only ever written as text nodes.
"use strict";
const section = document.querySelector(".latents");
const [search, order, which, list] = [".search", ".order", ".which", ".list"].map((name) => section.querySelector(name));
const [back, next, count] = [".back", ".next", ".count"].map((name) => section.querySelector(name));
const place = section.querySelector(".latent");
const [perFile, perPage, scoreName] = [Number(section.dataset.perFile), 100, section.dataset.score];
const shown = {
  all: () => true,
  live: (one) => one.density > 0,
  described: (one) => one.text,
  scored: (one) => one.score !== null,
  unscored: (one) => one.text && one.score === null,
};
const latents = [];
const details = new Map();
let found = [];
let page = 0;
let current = null;

function element(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}
function load(name, then) {
  const script = element("script");
  script.src = `data/${name}.js`;
  script.onload = then;
  script.onerror = () => place.replaceChildren(element("p", `data/${name}.js cannot be read.`, "wrong"));
  document.head.append(script);
}
const numbered = (kind, number) => `${kind}-${String(number).padStart(5, "0")}`;
const short = (value) => (value === 0 ? "0" : Math.abs(value) >= 0.001 ? value.toPrecision(3) : value.toExponential(1));

function listed(rows) {
  for (const [latent, density, maximum, text, score] of rows) {
    latents.push({ latent, density, maximum, text, score, words: `${latent} ${text.toLowerCase()}` });
  }
}
function loaded(file, content) { details.set(file, content); }

function filter() {
  const wanted = search.value.trim().toLowerCase();
  const isNumber = /^\d+$/.test(wanted);
  found = latents.filter((one) =>
    shown[which.value](one) &&
    (!wanted || (isNumber ? String(one.latent).startsWith(wanted) : one.words.includes(wanted))));
  const key = order.value;
  if (key !== "latent") found.sort((a, b) => (b[key] ?? -Infinity) - (a[key] ?? -Infinity) || a.latent - b.latent);
  page = 0;
  show();
  list.scrollTop = 0;
}
function show() {
  const pages = Math.max(1, Math.ceil(found.length / perPage));
  const rows = found.slice(page * perPage, (page + 1) * perPage).flatMap((one, number, onPage) => {
    const button = element("button");
    button.append(element("span", one.latent, "number-of"), element("span", one.text || "–", "text-of"));
    const value = order.value === "score" ? one.score : order.value === "maximum" ? one.maximum : one.density;
    button.append(element("small", value === null ? "–" : short(value)));
    button.title = one.text;
    button.dataset.latent = one.latent;
    button.setAttribute("aria-current", String(one.latent === current));
    button.addEventListener("click", () => {
      location.hash = one.latent;
      if (matchMedia("(max-width: 860px)").matches) place.scrollIntoView();
    });
    const item = element("li");
    item.append(button);
    const isApart = order.value === "score" && one.score === null && (number === 0 || onPage[number - 1].score !== null);
    return isApart ? [element("li", `Without ${scoreName}`, "apart"), item] : [item];
  });
  list.replaceChildren(...rows);
  count.textContent = found.length ? `${page + 1} of ${pages}, ${found.length.toLocaleString("en")} latents` : "none";
  back.disabled = page <= 0;
  next.disabled = page >= pages - 1;
}
function step(by) { page += by; show(); list.scrollTop = 0; }

function line(window, exemplar, maximum) {
  const row = element("div", undefined, "window");
  const text = element("p");
  const values = new Map(exemplar.positions.map((position, index) => [position, exemplar.values[index]]));
  window.forEach((piece, position) => {
    const value = values.get(position) ?? 0;
    const token = element("span", piece.replace(/\n/g, "⏎\n"));
    token.title = `${JSON.stringify(piece)}: ${short(value)}`;
    if (value > 0) token.style.setProperty("--heat", Math.max(8, (100 * value) / maximum).toFixed(1));
    else token.style.background = "none";
    text.append(token);
  });
  row.append(element("small", exemplar.values.length ? short(Math.max(...exemplar.values)) : "0"), text);
  return row;
}
function draw(one) {
  const content = details.get(Math.floor(one.latent / perFile));
  const detail = content.latents[one.latent];
  const nodes = [element("h2", `Latent ${one.latent}`)];
  const facts = `fires on ${short(100 * one.density)}% of tokens; largest activation ${short(one.maximum)}`;
  nodes.push(element("p", one.density ? facts : "never fires", "muted"));
  if (detail.descriptions.length) {
    const hasScore = (found) => typeof found.scores[scoreName] === "number";
    const all = new Set(detail.descriptions.flatMap((found) => Object.keys(found.scores)));
    const names = [...all].sort((a, b) => (b === scoreName) - (a === scoreName));
    const [scroll, table, head] = [element("div", undefined, "scroll"), element("table", undefined, "scores"), element("tr")];
    for (const name of ["Description", "Source", ...names]) head.append(element("th", name));
    const [top, body] = [element("thead"), element("tbody")];
    top.append(head);
    let isRanked = true;
    for (const found of detail.descriptions) {
      const row = element("tr");
      if (isRanked && !hasScore(found)) {
        const apart = element("th", `Without ${scoreName}`, "apart");
        apart.colSpan = names.length + 2;
        body.append(element("tr"));
        body.lastChild.append(apart);
        isRanked = false;
      }
      row.append(element("th", found.text), element("td", found.source));
      for (const name of names) row.append(element("td", typeof found.scores[name] === "number" ? found.scores[name].toFixed(2) : "–"));
      body.append(row);
    }
    table.append(top, body);
    scroll.append(table);
    nodes.push(scroll);
  }
  for (const [title, exemplars] of detail.groups) {
    nodes.push(element("h3", title));
    for (const exemplar of exemplars) nodes.push(line(content.windows[exemplar.window], exemplar, one.maximum));
  }
  place.replaceChildren(...nodes);
}
function open() {
  const one = latents.find((candidate) => String(candidate.latent) === location.hash.slice(1));
  if (!one) return;
  current = one.latent;
  for (const button of list.querySelectorAll("button")) {
    button.setAttribute("aria-current", String(Number(button.dataset.latent) === current));
  }
  const file = Math.floor(one.latent / perFile);
  const ready = () => { if (current === one.latent && details.has(file)) draw(one); };
  if (details.has(file)) ready();
  else load(numbered("latents", file), ready);
}
function start(chunk) {
  if (chunk < Number(section.dataset.chunks)) return load(numbered("list", chunk), () => start(chunk + 1));
  filter();
  if (!location.hash && found.length) history.replaceState(null, "", `#${found[0].latent}`);
  open();
}
back.addEventListener("click", () => step(-1));
next.addEventListener("click", () => step(1));
addEventListener("hashchange", open);
for (const control of [search, order, which]) control.addEventListener("input", filter);
start(0);
