// One piece of the page that is loaded: what it shows now, and the request that fills it. A newer one replaces an older.
import { signal } from "@preact/signals";
import { ApiError } from "./api";

export type Loaded<T> = { at: "empty" } | { at: "loading" } | { at: "failed"; message: string; isFinal: boolean } | { at: "done"; value: T };

export class Slot<T> {
  readonly state = signal<Loaded<T>>({ at: "empty" });
  /** Starts the last work once more, with what follows it. */
  again: () => void = () => undefined;
  private running = new AbortController();

  get value(): T | null {
    return this.state.value.at === "done" ? this.state.value.value : null;
  }

  get failed(): boolean {
    return this.state.value.at === "failed";
  }

  clear(): void {
    this.running.abort();
    this.state.value = { at: "empty" };
  }

  /** The result, or null if the work failed or something newer took the slot. `again` does the same once more. */
  async load(work: (signal: AbortSignal) => Promise<T>, again: () => void): Promise<T | null> {
    this.running.abort();
    this.again = again;
    const own = (this.running = new AbortController());
    this.state.value = { at: "loading" };
    try {
      const value = await work(own.signal);
      if (own.signal.aborted) return null;
      this.state.value = { at: "done", value };
      return value;
    } catch (error) {
      if (!own.signal.aborted) {
        const message = error instanceof Error ? error.message : String(error);
        this.state.value = { at: "failed", message, isFinal: error instanceof ApiError && error.isFinal };
      }
      return null;
    }
  }
}
