import { explainersFor, go, models, simulatorsFor, view } from "./state";
import { Select } from "./widgets";

/** The name of the page, and who is asked. */
export function Bar() {
  const known = models.value;
  const { target, explainer, simulator } = view.value;
  return (
    <header class="bar">
      <h1>introspect<b>_</b>ray <small>What is this vector?</small></h1>
      {known && (
        <div class="who">
          <Select label="Target" value={target} options={known.targets.map(({ name }) => name)}
            onChoose={(name) => go({ target: name, subject: null, change: null, explainer: "", predictor: "", simulator: "" })} />
          <Select label="Explainer" value={explainer} options={explainersFor("feature_description").map(({ name }) => name)}
            onChoose={(name) => go({ explainer: name })} />
          <Select label="Simulator" value={simulator} options={simulatorsFor(target)}
            onChoose={(name) => go({ simulator: name })} />
        </div>
      )}
    </header>
  );
}
