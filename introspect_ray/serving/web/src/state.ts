// What is known, and what happens when the view changes. Parts of the page read the slots; they change the view with `go`.
import { computed, signal } from "@preact/signals";
import {
  type Activations, type Explainer, type Item, type Models, type OrProblem, type Score, type Simulated, type Target,
  type Task, type WhatIf, get, post, postOne, stream,
} from "./api";
import { remember } from "./history";
import { Slot } from "./slot";
import { projections } from "./vectors";
import { type Change, EMPTY, type Subject, type View, decode, encode } from "./view";

/** What an explainer must have been trained for to predict a change. */
export const TASK: Record<Change["kind"], Task> = { patch: "activation_patching", ablate: "input_ablation" };
/** Items of one request when a whole layer is explained. */
const BATCH = 8;

export const view = signal<View>(EMPTY);
export const models = new Slot<Models>();
export const reading = new Slot<Activations>();
export const answer = new Slot<string>();
/** What has arrived of an answer that is being written. */
export const said = signal("");
export const heat = new Slot<Heat>();
export const outcome = new Slot<WhatIf>();
export const sweep = new Slot<void>();
/** The sentence that a patch takes its vector from. */
export const source = new Slot<Activations>();
/** Models that the address names and this server does not have, in words; empty if it has all. */
export const missing = signal("");
/** Explanations so far, by `cellKey`. */
export const cells = signal<ReadonlyMap<string, Cell>>(new Map());

export interface Cell { text: string; failed: boolean }
/** A description's score; where nothing is true of it, only what is simulated. */
export type Heat = Omit<Score, "true"> & { true: number[] | null };

/** The activations of the view's sentence, as soon as they are there. */
let read: Promise<Activations | null> = Promise.resolve(null);

export const target = computed<Target | null>(() =>
  models.value?.targets.find(({ name }) => name === view.value.target) ?? null);
export const explainer = computed<Explainer | null>(() =>
  models.value?.explainers.find(({ name }) => name === view.value.explainer) ?? null);
export const description = computed(() => view.value.words ?? answer.value);

export const explainersFor = (task: Task, targetName = view.value.target): Explainer[] =>
  models.value?.explainers.filter((one) => one.target === targetName && one.tasks.includes(task)) ?? [];

export const simulatorsFor = (targetName: string): string[] =>
  models.value?.simulators.filter((one) => one.target === targetName).map(({ name }) => name) ?? [];

export const cellKey = (layer: number, position: number): string => {
  const { explainer, target, text } = view.value;
  return JSON.stringify([explainer, target, text, layer, position]);
};

/** Shows another view, whose address becomes the page's. The same one again tries again what failed. */
export function go(change: Partial<View>): void {
  const address = `#${encode({ ...view.value, ...change })}`;
  if (address !== location.hash) location.hash = address;
  else for (const slot of [reading, answer, heat, outcome]) if (slot.failed) slot.again();
}

export const pickSentence = (text: string): void => go({ text, subject: null, words: null, change: null });
export const pickSubject = (subject: Subject): void => go({ subject, words: null });

/** Has a change predicted and run; who predicted the last one does so again if trained for this kind. */
export function run(change: Change, more: Partial<View> = {}): void {
  const { predictor } = view.value;
  const isAble = explainersFor(TASK[change.kind]).some(({ name }) => name === predictor);
  go({ ...more, change, predictor: isAble ? predictor : "" });
}

export function start(): void {
  addEventListener("hashchange", () => void show(decode(location.hash)));
  void load();
}

async function load(): Promise<void> {
  if (!(await models.load((signal) => get<Models>("models", signal), load))) return;
  const asked = decode(location.hash);
  const found = await show(asked);
  if (asked.text || asked.subject || view.peek().subject || !found || found.tokens.length < 2) return;
  // A first visit shows something: the word before the last of an example, at a layer with a coder or in the middle.
  const layers = explainer.value?.layers ?? [];
  const layer = target.value?.coders.find((one) => layers.includes(one.layer))?.layer ?? layers[layers.length >> 1];
  if (layer !== undefined) replace({ subject: { kind: "token", layer, position: found.tokens.at(-2)!.index } });
}

function replace(change: Partial<View>): void {
  const next = { ...view.value, ...change };
  history.replaceState(null, "", `#${encode(next)}`);
  void show(next);
}

/** Names that the address leaves out, or that this server does not have, become the first that fit. */
function completed(asked: View, known: Models): View {
  const unknown: string[] = [];
  const choose = (name: string, names: string[]) => {
    if (name && !names.includes(name)) unknown.push(name);
    return names.includes(name) ? name : names[0] ?? "";
  };
  const targetName = choose(asked.target, known.targets.map(({ name }) => name));
  const able = (task: Task) => explainersFor(task, targetName).map(({ name }) => name);
  const view = {
    ...asked,
    target: targetName,
    explainer: choose(asked.explainer, able("feature_description")),
    predictor: asked.change ? choose(asked.predictor, able(TASK[asked.change.kind])) : asked.predictor,
    simulator: choose(asked.simulator, simulatorsFor(targetName)),
    text: asked.text || known.examples.texts[0] || "",
  };
  missing.value = unknown.length ? `This server does not have ${unknown.join(", ")}; another model answers.` : "";
  return view;
}

/** Loads what another view needs and this one did not; the result is the sentence's activations. */
async function show(asked: View): Promise<Activations | null> {
  if (!models.value) return null;
  const before = view.peek();
  const next = completed(asked, models.value);
  view.value = next;
  const changed = (...names: (keyof View)[]) => names.some((name) => JSON.stringify(before[name]) !== JSON.stringify(next[name]));
  const newText = changed("target", "text");
  if (newText || changed("explainer")) sweep.clear();
  if (newText) readText(next);
  if (newText || changed("explainer", "subject")) void explain(next);
  else if (changed("simulator", "words")) void judge();
  if (newText || changed("change", "predictor")) void ask(next);
  return read;
}

function readText({ target, text }: View): void {
  if (!text) reading.clear();
  read = text ? readInto(reading, target, text, null) : Promise.resolve(null);
}

export function readSource(text: string): void {
  const { target } = view.peek();
  if (!text.trim() || !target) source.clear();
  else void readInto(source, target, text, [0]);
}

const readInto = (slot: Slot<Activations>, target: string, text: string, layers: number[] | null): Promise<Activations | null> =>
  slot.load(
    (signal) => post("activations", { target, text, layers, positions: null, vectors: false }, signal),
    () => void readInto(slot, target, text, layers),
  );

async function explain(at: View): Promise<void> {
  const { subject, text, explainer } = at;
  heat.clear();
  said.value = "";
  if (!subject) {
    answer.clear();
    return judge();
  }
  const found = await answer.load(async (signal) => {
    if (!explainer) throw new Error(`No explainer of this server describes vectors of ${at.target || "a target"}.`);
    const item: Item = subject.kind === "token" ? { ...subject, text } : subject;
    const hear = (piece: string) => { if (!signal.aborted) said.value += piece; };
    return stream({ explainer, items: [item], max_new_tokens: null }, hear, signal);
  }, () => void explain(at));
  if (found === null && !answer.failed) return; // something newer is under way
  if (found !== null) {
    if (subject.kind === "token") keep([[subject.layer, subject.position, { text: found, failed: false }]]);
    await read;
    remember({ ...at, words: null, change: null }, subjectName(subject), found);
  }
  await judge();
}

function keep(found: [number, number, Cell][]): void {
  const next = new Map(cells.value);
  for (const [layer, position, cell] of found) next.set(cellKey(layer, position), cell);
  cells.value = next;
}

/** Explains every token at one layer; what fails is said in its cell. */
export function explainLayer(layer: number): void {
  const { explainer, text } = view.value;
  const tokens = reading.value?.tokens ?? [];
  const missing = tokens.filter(({ index }) => cells.value.get(cellKey(layer, index))?.failed ?? true);
  void sweep.load(async (signal) => {
    for (let first = 0; first < missing.length; first += BATCH) {
      const batch = missing.slice(first, first + BATCH);
      const items = batch.map(({ index }): Item => ({ kind: "token", text, layer, position: index }));
      const answers = await post<{ items: OrProblem<{ explanation: string }>[] }>(
        "explain", { explainer, items, max_new_tokens: null }, signal);
      keep(batch.map(({ index }, at) => {
        const one = answers.items[at] ?? { error: { code: "unavailable", message: "The server answered nothing." } };
        return [layer, index, "error" in one ? { text: one.error.message, failed: true } : { text: one.explanation, failed: false }];
      }));
    }
  }, () => explainLayer(layer));
}

/** Simulates the description on the sentence, beside what is true of the subject where there is one. */
async function judge(): Promise<void> {
  const { simulator, text, subject, target } = view.peek();
  const words = description.value;
  if (!simulator || !words || !text) return heat.clear();
  await heat.load(async (signal): Promise<Heat> => {
    const item = { description: words, text };
    const score = (truth: object) => postOne<Score>("score", { simulator }, { ...item, ...truth }, signal);
    if (subject?.kind === "latent") return score({ coder: subject.coder, latent: subject.latent });
    if (subject?.kind === "token") {
      const found = await post<Activations>(
        "activations", { target, text, layers: [subject.layer], positions: null, vectors: true }, signal);
      return score({ activations: projections(found, subject.position) });
    }
    const { tokens, activations } = await postOne<Simulated>("simulate", { simulator }, item, signal);
    return { tokens, simulated: activations, true: null, correlation: null, reason: null };
  }, judge);
}

async function ask(at: View): Promise<void> {
  const { change, text, predictor } = at;
  if (!change || !text) return outcome.clear();
  const found = await outcome.load(async (signal) => {
    if (!predictor) throw new Error("No explainer of this server predicts such a change.");
    return post<WhatIf>("what_if", { explainer: predictor, text, ...change }, signal);
  }, () => void ask(at));
  await read;
  const dropped = change.kind === "ablate" ? `without “${text.slice(...change.span).trim()}”: ` : "";
  if (found) remember({ ...at, words: null, subject: null }, changeName(change), `${dropped}${found.clean.token.trim()} → ${found.truth.content.trim()}`);
}

const tokenName = (position: number): string =>
  reading.value?.tokens.find(({ index }) => index === position)?.text.trim() || `token ${position}`;

const subjectName = (subject: Subject): string =>
  subject.kind === "token" ? `${tokenName(subject.position)} · L${subject.layer}` : `${subject.coder} ${subject.latent}`;

const changeName = (change: Change): string =>
  change.kind === "patch" ? `patch ${tokenName(change.position)} · L${[...new Set(change.layers)].join("–")}` : "drop";
