// What was asked in this tab, newest first. It stays in the tab: texts may be nobody else's business.
import { signal } from "@preact/signals";
import { type View, encode } from "./view";

export interface Entry { address: string; where: string; found: string; text: string }

const KEY = "introspect_ray.history";
const LENGTH = 50;

export const entries = signal<Entry[]>(JSON.parse(sessionStorage.getItem(KEY) ?? "[]"));

/** Notes what was found at the subject of a view, or for its change. */
export function remember(view: View, where: string, found: string): void {
  const entry: Entry = { address: `#${encode(view)}`, where, found, text: view.text };
  store([entry, ...entries.value.filter(({ address }) => address !== entry.address)].slice(0, LENGTH));
}

export const forget = (): void => store([]);

function store(next: Entry[]): void {
  entries.value = next;
  sessionStorage.setItem(KEY, JSON.stringify(next));
}
