import { signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { ChangeResult } from "./change-result";
import { TASK, explainersFor, go, models, outcome, readSource, reading, run, source, target, view } from "./state";
import type { Change } from "./view";
import { Card, Select, State, Strip, visible } from "./widgets";

type Kind = Change["kind"];
const NAME: Record<Kind, string> = { patch: "Patch a token", ablate: "Drop a span" };

/** The change that is being put together; tokens are counted in the sentence and in the source. */
interface Draft { kind: Kind; token: number; source: string; sourceToken: number; layers: [number, number]; span: [number, number] | null }
const draft = signal<Draft>({ kind: "patch", token: 0, source: "", sourceToken: 0, layers: [0, 0], span: null });
const edit = (change: Partial<Draft>): void => { draft.value = { ...draft.value, ...change }; };

/** A change of the target's run: what the explainer predicts, beside what happens. */
export function WhatIfCard() {
  const { kind } = draft.value;
  const { text, change, subject } = view.value;
  const tokens = reading.value?.tokens;
  useEffect(() => { adopt(change); }, [text, JSON.stringify(change), tokens]);
  // "This token" is the one of the grid, until a change was run.
  useEffect(() => { if (!change && subject?.kind === "token") edit({ token: placeOf(subject.position) }); }, [JSON.stringify(subject)]);
  useEffect(() => { void readSource(draft.value.source); }, [draft.value.source, view.value.target]);
  const able = explainersFor(TASK[kind]).map(({ name }) => name);
  return (
    <Card title="What if" id="what-if" aside={
      <div class="choice" role="group" aria-label="Kind of change">
        {(Object.keys(NAME) as Kind[]).map((one) => (
          <button type="button" key={one} aria-pressed={one === kind} onClick={() => edit({ kind: one })}>{NAME[one]}</button>
        ))}
      </div>
    }>
      <Examples kind={kind} />
      {tokens && (kind === "patch" ? <PatchForm /> : <AblateForm />)}
      <div class="run">
        <button type="button" class="main" disabled={!drafted() || able.length === 0} onClick={() => { const change = drafted(); if (change) run(change); }}>Predict and run</button>
        {able.length > 1 && <Select label="Explainer" value={able.includes(view.value.predictor) ? view.value.predictor : able[0]!} options={able} onChoose={(name) => go({ predictor: name })} />}
        {able.length === 0 && <p class="hint">No explainer of this server predicts such changes.</p>}
      </div>
      {change?.kind === kind && <State of={outcome} what="the outcome" />}
      {change?.kind === kind && outcome.value && <ChangeResult of={outcome.value} />}
    </Card>
  );
}

/** Where in the row of tokens the one at `position` stands. */
const placeOf = (position: number): number => Math.max(0, reading.value?.tokens.findIndex(({ index }) => index === position) ?? 0);

/** Drafts the change that the address names; else one about the token that is chosen in the grid. */
function adopt(change: Change | null): void {
  const tokens = reading.value?.tokens ?? [];
  if (change?.kind === "patch") {
    edit({ kind: "patch", token: placeOf(change.position), source: change.source_text, sourceToken: change.source_position, layers: change.layers });
  } else if (change) {
    const inside = tokens.flatMap(({ start, end }, index) => (start < change.span[1] && end > change.span[0] ? [index] : []));
    edit({ kind: "ablate", span: inside.length ? [inside[0]!, inside.at(-1)!] : null });
  } else {
    const { subject, text } = view.peek();
    const examples = models.value?.examples;
    const known = examples?.patches.find((patch) => patch.text === text);
    const token = subject?.kind === "token" ? placeOf(subject.position) : Math.max(0, tokens.length - 2);
    edit({
      token: known ? placeOf(known.position) : token,
      source: known?.source_text ?? examples?.texts.find((other) => other !== text) ?? text,
      sourceToken: known?.source_position ?? token,
      layers: known?.layers ?? [0, (target.value?.num_layers ?? 1) - 1],
      span: null,
    });
  }
}

/** The change that the draft stands for; null while it lacks something. */
function drafted(): Change | null {
  const { kind, token, source: source_text, sourceToken, layers, span } = draft.value;
  const tokens = reading.value?.tokens;
  if (kind === "ablate") {
    const [first, last] = [tokens?.[span?.[0] ?? -1], tokens?.[span?.[1] ?? -1]];
    return first && last && last.end > first.start ? { kind, span: [first.start, last.end] } : null;
  }
  const [replaced, by] = [tokens?.[token], source.value?.tokens.find(({ index }) => index === sourceToken)];
  return replaced && by ? { kind, position: replaced.index, source_text, source_position: by.index, layers } : null;
}

const firstLine = (text: string): string => text.trim().split("\n")[0]!;

function Examples({ kind }: { kind: Kind }) {
  const examples = models.value?.examples;
  const offered = kind === "patch"
    ? (examples?.patches ?? []).map(({ text, ...rest }): [string, string, Change] => [`${firstLine(text)} ← ${firstLine(rest.source_text)}`, text, {
        kind: "patch", position: rest.position, source_text: rest.source_text, source_position: rest.source_position, layers: rest.layers,
      }])
    : (examples?.ablations ?? []).map(({ text, span }): [string, string, Change] => [visible(text), text, { kind: "ablate", span }]);
  if (!offered.length) return null;
  return (
    <div class="examples" role="group" aria-label="Example changes">
      {offered.map(([label, text, change], index) => (
        <button type="button" class="quiet" key={index} title={label} onClick={() => run(change, { text, subject: null, words: null })}>{label}</button>
      ))}
    </div>
  );
}

function PatchForm() {
  const { token, source: text, sourceToken, layers } = draft.value;
  const tokens = reading.value?.tokens ?? [];
  const sourceTokens = source.value?.tokens ?? [];
  const at = sourceTokens.findIndex(({ index }) => index === sourceToken);
  return (
    <div class="change">
      <div class="step">
        <span class="of">replace</span>
        <Strip label="Token to replace" tokens={tokens} chosen={[token, token]} onChoose={([first]) => edit({ token: first })} />
      </div>
      <div class="step">
        <span class="of">in layers</span>
        <div class="range">
          <Layer label="First layer" value={layers[0]} onChoose={(first) => edit({ layers: [first, Math.max(first, layers[1])] })} />
          <span class="of">to</span>
          <Layer label="Last layer" value={layers[1]} onChoose={(last) => edit({ layers: [Math.min(last, layers[0]), last] })} />
        </div>
      </div>
      <div class="step">
        <span class="of">by what is at</span>
        <Strip label="Token whose vector replaces it" tokens={sourceTokens} chosen={at < 0 ? null : [at, at]} onChoose={([first]) => edit({ sourceToken: sourceTokens[first]!.index })} />
        <State of={source} what="the other sentence" />
      </div>
      <div class="step">
        <label class="of" for="source">of sentence</label>
        <textarea id="source" rows={1} value={text} spellcheck={false} onChange={(event) => edit({ source: event.currentTarget.value })} />
      </div>
    </div>
  );
}

function Layer({ label, value, onChoose }: { label: string; value: number; onChoose: (layer: number) => void }) {
  return (
    <select aria-label={label} value={String(value)} onChange={(event) => onChoose(Number(event.currentTarget.value))}>
      {Array.from({ length: target.value?.num_layers ?? 0 }, (_, layer) => <option key={layer} value={String(layer)}>{layer}</option>)}
    </select>
  );
}

function AblateForm() {
  return (
    <div class="change">
      <div class="step">
        <span class="of">drop</span>
        <Strip label="Span to drop" isRun tokens={reading.value?.tokens ?? []} chosen={draft.value.span} onChoose={(span) => edit({ span })} />
      </div>
      <p class="hint">Click the first token of the span, then its last one.</p>
    </div>
  );
}
