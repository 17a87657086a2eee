// What the page shows, as the part of its address after the #. Links, history and the back button all go through here.

export type Subject =
  | { kind: "token"; layer: number; position: number }
  | { kind: "latent"; coder: string; latent: number };
export type Change =
  | { kind: "patch"; position: number; source_text: string; source_position: number; layers: [number, number] }
  | { kind: "ablate"; span: [number, number] };

export interface View {
  target: string;
  /** Who explains vectors. */
  explainer: string;
  simulator: string;
  text: string;
  subject: Subject | null;
  /** A description of the reader's own, simulated instead of the explainer's. */
  words: string | null;
  change: Change | null;
  /** Who predicts the change. */
  predictor: string;
}

export const EMPTY: View = {
  target: "", explainer: "", simulator: "", text: "", subject: null, words: null, change: null, predictor: "",
};

export function encode(view: View): string {
  const { subject, change } = view;
  const fields: Record<string, string | number | null> = {
    text: view.text, target: view.target, explainer: view.explainer, simulator: view.simulator,
  };
  if (subject?.kind === "token") Object.assign(fields, { layer: subject.layer, token: subject.position });
  if (subject?.kind === "latent") Object.assign(fields, { coder: subject.coder, latent: subject.latent });
  fields.words = view.words;
  fields.predictor = view.predictor;
  if (change?.kind === "patch") {
    Object.assign(fields, { patch: change.position, layers: change.layers.join("-"), from: change.source_position, source: change.source_text });
  }
  if (change?.kind === "ablate") fields.drop = change.span.join("-");
  const kept = Object.entries(fields).filter(([, value]) => value !== null && value !== "");
  return new URLSearchParams(kept.map(([name, value]) => [name, String(value)])).toString();
}

/** What an address says; a field that is missing or makes no sense counts as not said. */
export function decode(hash: string): View {
  const fields = new URLSearchParams(hash.replace(/^#/, ""));
  const words = (name: string) => fields.get(name) ?? "";
  const number = (name: string) => (/^\d{1,9}$/.test(words(name)) ? Number(words(name)) : null);
  const range = (name: string): [number, number] | null => {
    const found = /^(\d{1,9})-(\d{1,9})$/.exec(words(name));
    return found && [Number(found[1]), Number(found[2])];
  };
  const [layer, position, latent] = [number("layer"), number("token"), number("latent")];
  const [patched, from, layers, span] = [number("patch"), number("from"), range("layers"), range("drop")];
  let subject: Subject | null = null;
  if (layer !== null && position !== null) subject = { kind: "token", layer, position };
  else if (latent !== null && words("coder")) subject = { kind: "latent", coder: words("coder"), latent };
  let change: Change | null = null;
  if (patched !== null && from !== null && layers && words("source")) {
    change = { kind: "patch", position: patched, source_text: words("source"), source_position: from, layers };
  } else if (span) change = { kind: "ablate", span };
  return {
    target: words("target"), explainer: words("explainer"), simulator: words("simulator"), text: words("text"),
    subject, words: fields.get("words"), change, predictor: words("predictor"),
  };
}
