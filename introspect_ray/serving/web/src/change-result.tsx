import type { WhatIf } from "./api";
import { visible } from "./widgets";

const verdict = (changed: boolean): string => (changed ? "changes to" : "stays");

/** Prediction and truth, side by side. */
export function ChangeResult({ of: { clean, prediction, truth, agrees } }: { of: WhatIf }) {
  return (
    <div class="outcome" role="status">
      <dl>
        <div><dt>Unchanged, the target says</dt><dd><b>{visible(clean.token)}</b></dd></div>
        <div class="prediction"><dt>{prediction.changed === null ? "The explainer's prediction cannot be read" : `The explainer predicts that it ${verdict(prediction.changed)}`}</dt>
          <dd><b>{prediction.content === null ? "–" : visible(prediction.content)}</b><small title="The explainer's answer">{visible(prediction.text)}</small></dd></div>
        <div class="truth"><dt>In truth it {verdict(truth.changed)}</dt><dd><b>{visible(truth.content)}</b></dd></div>
      </dl>
      <p class={agrees ? "right" : "wrong"}>{agrees ? "✓ The prediction is right." : "✗ The prediction is wrong."}</p>
    </div>
  );
}
