import { useEffect, useRef } from "preact/hooks";
import { signal } from "@preact/signals";
import type { Activations } from "./api";
import { cellKey, cells, explainer, explainLayer, pickSubject, reading, sweep, target, view } from "./state";
import { Card, State, short, shown, visible } from "./widgets";

/** The cell that the arrow keys have reached, as [layer, token]. */
const focused = signal<[number, number]>([0, 0]);

/** One cell per layer and token: the norm of the residual vector, or what it was explained as. */
export function Grid() {
  const found = reading.value;
  return (
    <Card title="Residual stream" id="grid" aside={<p class="hint">Numbers are norms. Click a vector to have it explained, a layer to have all of its vectors.</p>}>
      <State of={reading} what="activations" />
      {found && <Table found={found} />}
      <State of={sweep} what="explanations" />
      {found && <NextTokens found={found} />}
      <LatentForm />
    </Card>
  );
}

function Table({ found }: { found: Activations }) {
  const body = useRef<HTMLTableSectionElement>(null);
  const { tokens, layers, norms } = found;
  const { subject } = view.value;
  const logs = norms.flat().map((norm) => Math.log(norm + 1e-6));
  const [least, most] = [Math.min(...logs), Math.max(...logs)];
  const depth = (norm: number) => (most > least ? (Math.log(norm + 1e-6) - least) / (most - least) : 0);
  const reached: [number, number] = [Math.min(focused.value[0], layers.length - 1), Math.min(focused.value[1], tokens.length - 1)];

  // The chosen cell is in sight, also where the table is wider than the screen.
  useEffect(() => {
    const cell = body.current?.querySelector<HTMLElement>("[aria-selected=true]");
    const scroll = body.current?.closest<HTMLElement>(".scroll");
    if (!cell || !scroll) return;
    const [hidden, inside] = [cell.offsetLeft + cell.offsetWidth - scroll.scrollLeft - scroll.clientWidth, cell.offsetLeft - scroll.scrollLeft];
    if (hidden > 0 || inside < cell.offsetWidth) scroll.scrollLeft = cell.offsetLeft - scroll.clientWidth / 2;
  }, [found, subject]);

  const keyed = (event: KeyboardEvent, row: number, column: number) => {
    const moves: Record<string, [number, number]> = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      Home: [row, 0], End: [row, tokens.length - 1], PageUp: [0, column], PageDown: [layers.length - 1, column],
    };
    const to = moves[event.key];
    if (event.key === "Enter" || event.key === " ") choose(row, column);
    else if (to) {
      const [nextRow, nextColumn] = [clamp(to[0], layers.length), clamp(to[1], tokens.length)];
      focused.value = [nextRow, nextColumn];
      body.current?.rows[nextRow]?.querySelectorAll<HTMLElement>("td")[nextColumn]?.focus();
    } else return;
    event.preventDefault();
  };
  const choose = (row: number, column: number) => {
    focused.value = [row, column];
    const layer = layers[row]!;
    if (isExplained(layer)) pickSubject({ kind: "token", layer, position: tokens[column]!.index });
  };
  return (
    <div class="scroll">
      <table role="grid" aria-label="Residual vectors by layer and token" class={layers.length > 12 ? "many" : ""}>
        <thead>
          <tr><td />{tokens.map((token) => <th scope="col" key={token.index} title={`token ${token.index}: ${JSON.stringify(token.text)}`}>{shown(token)}</th>)}</tr>
        </thead>
        <tbody ref={body}>
          {layers.map((layer, row) => (
            <tr key={layer}>
              <th scope="row">
                {isExplained(layer)
                  ? <button type="button" title={`Explain every token at layer ${layer}`} aria-label={`Explain every token at layer ${layer}`} onClick={() => explainLayer(layer)}>L{layer}</button>
                  : <span title="The explainer was not trained on this layer.">L{layer}</span>}
              </th>
              {tokens.map((token, column) => {
                const norm = norms[row]![column]!;
                const cell = cells.value.get(cellKey(layer, token.index));
                const isChosen = subject?.kind === "token" && subject.layer === layer && subject.position === token.index;
                return (
                  <td role="gridcell" key={token.index} aria-selected={isChosen} aria-disabled={!isExplained(layer)}
                    class={cell ? (cell.failed ? "wrong" : "known") : ""} style={{ "--depth": depth(norm).toFixed(3) }}
                    aria-label={`layer ${layer}, token ${shown(token)}, norm ${short(norm)}${cell ? `: ${cell.text}` : ""}`}
                    title={cell ? `${cell.text}\nnorm ${short(norm)}` : `norm ${short(norm)}`}
                    tabIndex={reached[0] === row && reached[1] === column ? 0 : -1}
                    onClick={() => choose(row, column)} onKeyDown={(event) => keyed(event, row, column)}>
                    <span>{cell ? (cell.failed ? "failed" : cell.text || "(nothing)") : short(norm)}</span>
                  </td>
                );
              })}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

const clamp = (value: number, count: number): number => Math.max(0, Math.min(count - 1, value));
const isExplained = (layer: number): boolean => explainer.value?.layers.includes(layer) ?? false;

function NextTokens({ found }: { found: Activations }) {
  return (
    <p class="next">The target goes on with{" "}
      {found.next_tokens.filter(({ probability }) => probability >= 0.005).slice(0, 5).map(({ text, probability }) => (
        <span class="option" key={text}><b>{visible(text)}</b> {probability.toFixed(2)}</span>
      ))}
    </p>
  );
}

/** A latent of one of the target's coders, instead of a token. */
function LatentForm() {
  const coders = target.value?.coders ?? [];
  const { subject } = view.value;
  const chosen = subject?.kind === "latent" ? subject : null;
  const coder = useRef("");
  const current = coders.find(({ name }) => name === (coder.current || chosen?.coder)) ?? coders[0];
  if (!current) return null;
  const ask = (event: SubmitEvent & { currentTarget: HTMLFormElement }) => {
    event.preventDefault();
    const fields = new FormData(event.currentTarget);
    pickSubject({ kind: "latent", coder: String(fields.get("coder") ?? current.name), latent: Number(fields.get("latent")) });
  };
  return (
    <form class="latent" onSubmit={ask}>
      <span class="hint">or a latent of</span>
      {coders.length > 1
        ? <select name="coder" aria-label="Coder">{coders.map(({ name }) => <option key={name} value={name} selected={name === current.name}>{name}</option>)}</select>
        : <b>{current.name}</b>}
      <input name="latent" type="number" min={0} max={current.num_latents - 1} required aria-label="Latent" defaultValue={chosen ? String(chosen.latent) : ""} placeholder={`0–${current.num_latents - 1}`} />
      <button type="submit">Explain</button>
    </form>
  );
}
