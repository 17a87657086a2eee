import { useEffect, useRef } from "preact/hooks";
import { signal } from "@preact/signals";
import type { Activations, Token } from "./api";
import { cellKey, cells, explainer, explainLayer, pickSubject, reading, sweep, target, view } from "./state";
import { Card, State, short, shown, visible } from "./widgets";

/** More cells than that are shown in parts, so that long texts in deep models stay quick. */
const MOST_CELLS = 4000;
/** The cell that the arrow keys have reached, as [layer, token]. */
const focused = signal<[number, number]>([0, 0]);

/** One cell per layer and token: the norm of the residual vector, or what it was explained as. */
export function Grid() {
  const found = reading.value;
  const hint = explainer.value
    ? "Numbers are norms. Click a vector to have it explained, a layer to have all of its vectors."
    : "Numbers are norms. No explainer of this server describes this target's vectors.";
  return (
    <Card title="Residual stream" id="grid" aside={<p class="hint">{hint}</p>}>
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
  const takesFocus = useRef(false);
  const { tokens, layers, norms } = found;
  const { subject } = view.value;
  const logs = norms.flat().map((norm) => Math.log(norm + 1e-6));
  const least = logs.reduce((one, other) => Math.min(one, other));
  const range = logs.reduce((one, other) => Math.max(one, other)) - least;
  const depth = (norm: number) => (range > 0 ? (Math.log(norm + 1e-6) - least) / range : 0);
  const reached: [number, number] = [clamp(focused.value[0], layers.length), clamp(focused.value[1], tokens.length)];
  const width = Math.max(16, Math.floor(MOST_CELLS / layers.length));
  const first = reached[1] - (reached[1] % width);

  useEffect(() => {
    if (subject?.kind !== "token") return;
    const place: [number, number] = [layers.indexOf(subject.layer), tokens.findIndex(({ index }) => index === subject.position)];
    if (place[0] >= 0 && place[1] >= 0) focused.value = place;
  }, [found, subject]);
  useEffect(() => {
    if (!isAt(...reached)) return; // keys were quicker than this render; the next one is about to follow
    if (takesFocus.current) body.current?.querySelector<HTMLElement>("td[tabindex='0']")?.focus();
    else showChosen(body.current);
    takesFocus.current = false;
  }, [found, subject, focused.value]);

  const keyed = (event: KeyboardEvent) => {
    const [row, column] = focused.value;
    const moves: Record<string, [number, number]> = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      Home: [row, 0], End: [row, tokens.length - 1], PageUp: [0, column], PageDown: [layers.length - 1, column],
    };
    const to = moves[event.key];
    if (event.key === "Enter" || event.key === " ") choose(row, column);
    else if (to) {
      takesFocus.current = true;
      focused.value = [clamp(to[0], layers.length), clamp(to[1], tokens.length)];
    } else return;
    event.preventDefault();
  };
  const choose = (row: number, column: number) => {
    focused.value = [row, column];
    const layer = layers[row]!;
    if (isExplained(layer)) pickSubject({ kind: "token", layer, position: tokens[column]!.index });
  };
  const inSight = tokens.slice(first, first + width);
  return (
    <>
      <div class="scroll">
        <table role="grid" aria-label="Residual vectors by layer and token" class={layers.length > 12 ? "many" : ""}>
          <thead>
            <tr><td />{inSight.map((token) => <th scope="col" key={token.index} title={`token ${token.index}: ${JSON.stringify(token.text)}`}>{shown(token)}</th>)}</tr>
          </thead>
          <tbody ref={body}>
            {layers.map((layer, row) => (
              <tr key={layer}>
                <LayerHead layer={layer} />
                {inSight.map((token, offset) => {
                  const column = first + offset;
                  const isChosen = subject?.kind === "token" && subject.layer === layer && subject.position === token.index;
                  return (
                    <Cell key={token.index} layer={layer} token={token} norm={norms[row]![column]!} depth={depth(norms[row]![column]!)}
                      isChosen={isChosen} isReached={reached[0] === row && reached[1] === column}
                      onReach={() => { if (!isAt(row, column)) focused.value = [row, column]; }} onChoose={() => choose(row, column)} onKey={keyed} />
                  );
                })}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {tokens.length > width && (
        <p class="pager">
          <button type="button" aria-label="Earlier tokens" disabled={first === 0} onClick={() => { focused.value = [reached[0], first - width]; }}>←</button>
          tokens {first} to {first + inSight.length - 1} of {tokens.length}
          <button type="button" aria-label="Later tokens" disabled={first + width >= tokens.length} onClick={() => { focused.value = [reached[0], first + width]; }}>→</button>
        </p>
      )}
    </>
  );
}

function LayerHead({ layer }: { layer: number }) {
  const all = `L${layer}: explain every token at this layer`;
  return (
    <th scope="row">
      {isExplained(layer)
        ? <button type="button" title={all} aria-label={all} onClick={() => explainLayer(layer)}>L{layer}</button>
        : <span title="The explainer was not trained on this layer.">L{layer}</span>}
    </th>
  );
}

function Cell(props: {
  layer: number; token: Token; norm: number; depth: number; isChosen: boolean; isReached: boolean;
  onReach: () => void; onChoose: () => void; onKey: (event: KeyboardEvent) => void;
}) {
  const { layer, token, norm, isChosen, isReached, onReach, onChoose, onKey } = props;
  const cell = cells.value.get(cellKey(layer, token.index));
  const kind = cell ? (cell.failed ? "wrong" : "known") : "";
  return (
    <td role="gridcell" aria-selected={isChosen} aria-disabled={!isExplained(layer)} class={kind} style={{ "--depth": props.depth.toFixed(3) }}
      aria-label={`layer ${layer}, token ${shown(token)}, norm ${short(norm)}${cell ? `: ${cell.text}` : ""}`}
      title={cell ? `${cell.text}\nnorm ${short(norm)}` : `norm ${short(norm)}`} tabIndex={isReached ? 0 : -1} onFocus={onReach} onClick={onChoose} onKeyDown={onKey}>
      <span>{cell ? (cell.failed ? "failed" : cell.text || "(nothing)") : short(norm)}</span>
    </td>
  );
}

/** Brings the chosen cell into sight where the table is wider than the screen. */
function showChosen(body: HTMLElement | null): void {
  const cell = body?.querySelector<HTMLElement>("[aria-selected=true]");
  const scroll = body?.closest<HTMLElement>(".scroll");
  if (!cell || !scroll) return;
  const left = cell.offsetLeft - scroll.scrollLeft;
  if (left < cell.offsetWidth || left + cell.offsetWidth > scroll.clientWidth) scroll.scrollLeft = cell.offsetLeft - scroll.clientWidth / 2;
}

const isAt = (row: number, column: number): boolean => focused.value[0] === row && focused.value[1] === column;
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
