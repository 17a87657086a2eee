import { signal } from "@preact/signals";
import { answer, reading, said, view } from "./state";
import { Card, State, shown } from "./widgets";

const copied = signal(false);

function copyLink(): void {
  navigator.clipboard.writeText(location.href).then(() => {
    copied.value = true;
    setTimeout(() => { copied.value = false; }, 1500);
  }, () => undefined); // the browser forbids it; the address bar holds the link too
}

/** What the explainer says of the chosen vector, as it says it. */
export function Explanation() {
  const { subject } = view.value;
  const state = answer.state.value;
  const text = state.at === "done" ? state.value : said.value;
  const link = subject && navigator.clipboard && (
    <button type="button" class="quiet" onClick={copyLink} aria-live="polite">{copied.value ? "Copied" : "Copy link"}</button>
  );
  return (
    <Card title="Explanation" id="explanation" aside={link}>
      {subject === null ? <p class="hint">Choose a vector in the grid.</p> : <p class="subject"><Where /></p>}
      <blockquote class={state.at === "loading" ? "writing" : ""} aria-live="polite" aria-busy={state.at === "loading"}>
        {state.at === "done" && !text.trim() ? <i>The explainer said nothing.</i> : text}
      </blockquote>
      {state.at === "failed" && <State of={answer} what="explanation" />}
    </Card>
  );
}

function Where() {
  const { subject } = view.value;
  if (subject?.kind === "latent") return <>Latent <b>{subject.latent}</b> of <b>{subject.coder}</b></>;
  if (subject?.kind !== "token") return null;
  const token = reading.value?.tokens.find(({ index }) => index === subject.position);
  return <>Layer <b>{subject.layer}</b> at token <b>{subject.position}</b> {token && <code>{shown(token)}</code>}</>;
}
