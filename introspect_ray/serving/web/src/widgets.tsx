// Small pieces that several parts share.
import type { ComponentChildren } from "preact";
import { useRef } from "preact/hooks";
import type { Token } from "./api";
import type { Slot } from "./slot";

/** That something loads, or why it failed; nothing otherwise. */
export function State({ of: slot, what }: { of: Slot<any>; what: string }) {
  const of = slot.state.value;
  if (of.at === "loading") return <p class="loading" role="status"><span class="visually-hidden">Loading {what}</span></p>;
  if (of.at === "failed") {
    return (
      <p class="failed" role="alert">
        <span>{of.message}</span>{!of.isFinal && <button type="button" class="quiet" onClick={slot.again}>Try again</button>}
      </p>
    );
  }
  return null;
}

export function Select(props: { label: string; value: string; options: string[]; onChoose: (value: string) => void }) {
  const { label, value, options, onChoose } = props;
  return (
    <label class="field"><span>{label}</span>
      <select value={value} onChange={(event) => onChoose(event.currentTarget.value)} disabled={options.length === 0}>
        {options.length ? options.map((name) => <option key={name} value={name}>{name}</option>) : <option value="">none</option>}
      </select>
    </label>
  );
}

/** A token's text; begin-of-text has none. */
export const shown = (token: Token): string => (token.end === 0 ? "⟨begin⟩" : visible(token.text));
/** Text on one line, its blanks made visible where they are all there is. */
export const visible = (text: string): string => {
  const broken = text.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  return broken.trim() || broken.replace(/ /g, "␣");
};
/** A number in about three digits. */
export const short = (value: number): string =>
  value === 0 ? "0" : Math.abs(value) >= 100 ? value.toFixed(0) : Math.abs(value) >= 0.01 ? value.toPrecision(3) : value.toExponential(1);

/** Where an arrow key leads from one of `count` items in a line; null if the key is none of ours. */
export function stepped(key: string, index: number, count: number): number | null {
  const to = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: count - 1 }[key];
  return to === undefined ? null : Math.max(0, Math.min(count - 1, to));
}

/** Tokens in a line, of which a run is chosen. Arrows move, Enter or Space chooses; with shift a run is extended. */
export function Strip(props: {
  label: string; tokens: Token[]; chosen: [number, number] | null; isRun?: boolean; onChoose: (run: [number, number]) => void;
}) {
  const { tokens, chosen, isRun, onChoose } = props;
  const list = useRef<HTMLDivElement>(null);
  const anchor = useRef<number | null>(null);
  const choose = (index: number, extend: boolean) => {
    const from = isRun && extend ? anchor.current ?? chosen?.[0] ?? index : index;
    anchor.current = from;
    onChoose([Math.min(from, index), Math.max(from, index)]);
  };
  // Without a shift key a run is made of two clicks: the first of them alone, then the other end.
  const click = (index: number, shift: boolean) =>
    choose(index, shift || (chosen !== null && chosen[0] === chosen[1] && anchor.current !== null));
  const move = (event: KeyboardEvent, index: number) => {
    const to = stepped(event.key, index, tokens.length);
    if (to === null) return;
    event.preventDefault();
    (list.current?.children[to] as HTMLElement | undefined)?.focus();
    if (event.shiftKey && isRun) {
      anchor.current ??= index;
      choose(to, true);
    }
  };
  return (
    <div class="strip" role="listbox" aria-label={props.label} aria-multiselectable={isRun} aria-orientation="horizontal" ref={list}>
      {tokens.map((token, index) => {
        const isChosen = chosen !== null && chosen[0] <= index && index <= chosen[1];
        return (
          <button type="button" role="option" key={index} aria-selected={isChosen} title={`token ${token.index}`}
            tabIndex={index === (chosen?.[0] ?? 0) ? 0 : -1}
            onClick={(event) => click(index, event.shiftKey)} onKeyDown={(event) => move(event, index)}>
            {shown(token)}
          </button>
        );
      })}
    </div>
  );
}

export function Card({ title, id, aside, children }: { title: string; id: string; aside?: ComponentChildren; children: ComponentChildren }) {
  return (
    <section class="card" id={id} aria-labelledby={`${id}-title`}>
      <header><h2 id={`${id}-title`}>{title}</h2>{aside}</header>
      {children}
    </section>
  );
}
