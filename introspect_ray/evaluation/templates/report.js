// Browsable examples: filter, search, page. Text from records is only ever written as text nodes.
"use strict";
function element(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

function draw(example, place) {
  place.replaceChildren();
  const left = element("div");
  const text = element("div", undefined, "text");
  for (const [piece, marked] of example.pieces) {
    const lead = marked ? piece.match(/^\n*/)[0] : ""; // a marked line break would show as a stray block of colour
    text.append(lead, element(marked ? "mark" : "span", piece.slice(lead.length) || (marked ? "⏎" : "")));
  }
  const details = element("dl", undefined, "details");
  for (const [label, value] of example.details) details.append(element("dt", label), element("dd", value));
  left.append(text, details);
  const table = element("table", undefined, "answers");
  const truth = element("tr", undefined, "truth");
  const answer = element("td", example.truth);
  answer.colSpan = 2;
  truth.append(element("th", "Truth"), answer);
  table.append(truth);
  for (const [label, answer, right] of example.answers) {
    const row = element("tr");
    const verdict = right ? "✓ right" : "✗ wrong";
    row.append(element("th", label), element("td", answer || "(empty)"), element("td", verdict, right ? "right" : "wrong"));
    table.append(row);
  }
  const side = element("div");
  side.append(table);
  place.append(left, side);
}

function browse(section) {
  const examples = JSON.parse(section.querySelector("script").textContent).examples;
  for (const example of examples) {
    const words = [...example.pieces.map((piece) => piece[0]), example.truth, example.id];
    words.push(...example.details.map((detail) => detail[1]), ...example.answers.map((answer) => answer[1]));
    example.words = words.join("\n").toLowerCase();
  }
  const [result, search] = [section.querySelector(".result"), section.querySelector(".search")];
  const [back, next] = [section.querySelector(".back"), section.querySelector(".next")];
  const place = section.querySelector(".example");
  const selects = [...section.querySelectorAll("select[data-title]")];
  let found = examples;
  let index = 0;

  function show() {
    section.querySelector(".count").textContent = found.length ? `${index + 1} of ${found.length}` : "none";
    back.disabled = index <= 0;
    next.disabled = index >= found.length - 1;
    if (found.length) draw(found[index], place);
    else place.replaceChildren(element("p", "No example fits these filters.", "muted"));
  }
  function filter() {
    const wanted = search.value.trim().toLowerCase();
    found = examples.filter((example) =>
      (!result.value || (example.answers[0][2] ? "right" : "wrong") === result.value) &&
      selects.every((select) => !select.value || example.labels[select.dataset.title] === select.value) &&
      example.words.includes(wanted));
    index = 0;
    show();
  }
  function step(by) {
    index = Math.min(Math.max(index + by, 0), Math.max(found.length - 1, 0));
    show();
  }
  back.addEventListener("click", () => step(-1));
  next.addEventListener("click", () => step(1));
  section.addEventListener("keydown", (event) => {
    if (["INPUT", "SELECT"].includes(event.target.tagName)) return;
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  for (const control of [result, search, ...selects]) control.addEventListener("input", filter);
  show();
}
document.querySelectorAll(".browser").forEach(browse);
