import { useEffect, useRef } from "preact/hooks";
import { type Heat, description, go, heat, view } from "./state";
import { Card, State, short, shown } from "./widgets";

/** Where the description says that the sentence responds, beside where it does. */
export function HeatCard() {
  const { words, subject } = view.value;
  const input = useRef<HTMLInputElement>(null);
  const current = description.value ?? "";
  useEffect(() => { if (input.current) input.current.value = current; }, [current]);
  if (!view.value.simulator) return null;
  const simulate = (event: SubmitEvent) => {
    event.preventDefault();
    const typed = input.current?.value.trim() ?? "";
    if (typed) go({ words: typed });
  };
  return (
    <Card title="Simulated from the words" id="heat" aside={<Correlation of={heat.value} />}>
      <form class="words" onSubmit={simulate}>
        <input ref={input} aria-label="Description" placeholder="a description of your own" />
        <button type="submit">Simulate</button>
        {words !== null && subject && <button type="button" class="quiet" onClick={() => go({ words: null })}>Back to the explainer's</button>}
      </form>
      <State of={heat} what="activations" />
      {heat.value && <Tokens of={heat.value} />}
    </Card>
  );
}

function Correlation({ of }: { of: Heat | null }) {
  if (!of?.true) return null;
  if (of.correlation === null) return <p class="hint">no correlation: {of.reason?.replaceAll("_", " ")}</p>;
  return <p class="correlation" title="Pearson correlation of simulated and true activations over this sentence"><i>r</i> = <b>{of.correlation.toFixed(2)}</b></p>;
}

function Tokens({ of }: { of: Heat }) {
  const { subject } = view.value;
  const most = Math.max(...(of.true ?? []), 0);
  return (
    <>
      <ul class="legend">
        <li class="simulated">simulated, 0 to 10</li>
        {of.true && <li class="true">true, {subject?.kind === "latent" ? `of latent ${subject.latent}` : "along this vector"}</li>}
      </ul>
      <ol class="heat">
        {of.tokens.map((token, index) => {
          const [simulated, truth] = [of.simulated[index] ?? 0, of.true?.[index]];
          return (
            <li key={index}>
              <code>{shown(token)}</code>
              <Level kind="simulated" value={simulated} share={simulated / 10} text={simulated.toFixed(1)} />
              {truth !== undefined && <Level kind="true" value={truth} share={most > 0 ? truth / most : 0} text={short(truth)} />}
            </li>
          );
        })}
      </ol>
    </>
  );
}

function Level({ kind, value, share, text }: { kind: string; value: number; share: number; text: string }) {
  return (
    <span class={`level ${kind}`} style={{ "--share": Math.max(0, Math.min(1, share)).toFixed(3) }} title={`${kind}: ${value}`}>
      <span class="visually-hidden">{kind} </span>{value === 0 ? "·" : text}
    </span>
  );
}
