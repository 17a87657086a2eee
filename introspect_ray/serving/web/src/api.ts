// The server's HTTP API, version 1: what goes over the wire, and requests that wait for a token or for a busy server.
import { signal } from "@preact/signals";

export interface Token { index: number; text: string; start: number; end: number }
export interface Coder { name: string; layer: number; num_latents: number }
export interface Target { name: string; num_layers: number; width: number; coders: Coder[] }
export type Task = "feature_description" | "activation_patching" | "input_ablation";
export interface Explainer { name: string; target: string; layers: number[]; tasks: Task[] }
export interface PatchBody {
  text: string; position: number; source_text: string; source_position: number; layers: [number, number];
}
export interface AblateBody { text: string; span: [number, number] }
export interface Models {
  targets: Target[];
  explainers: Explainer[];
  simulators: { name: string; target: string }[];
  examples: { texts: string[]; patches: PatchBody[]; ablations: AblateBody[] };
}
export interface Activations {
  tokens: Token[];
  layers: number[];
  /** One list per layer, one number per token. */
  norms: number[][];
  /** Tokens whose vectors are given. */
  positions: number[];
  /** Little-endian float32 [layer][position][width] in base64. */
  vectors: string | null;
  next_tokens: { text: string; probability: number }[];
}
export type Item =
  | { kind: "token"; text: string; layer: number; position: number }
  | { kind: "latent"; coder: string; latent: number };
export interface Problem { code: string; message: string; field?: string | null }
export type OrProblem<T> = T | { error: Problem };
export interface WhatIf {
  clean: { token: string };
  truth: { changed: boolean; content: string };
  prediction: { changed: boolean | null; content: string | null; text: string };
  agrees: boolean;
}
/** `simulated` is in 0..10, `true` in units of its own; both leave begin-of-text out. `reason`: why there is no correlation. */
export interface Score { correlation: number | null; reason: string | null; simulated: number[]; true: number[]; tokens: Token[] }
export interface Simulated { tokens: Token[]; activations: number[] }

/** A request that failed, in one line for people. */
export class ApiError extends Error {
  constructor(readonly code: string, message: string, readonly retryAfter = 1) { super(message); }

  /** Whether the same request would only fail again. */
  get isFinal(): boolean {
    return ["bad_request", "not_found", "too_large"].includes(this.code);
  }

  static of(problem: Problem, retryAfter?: number): ApiError {
    return new ApiError(problem.code, problem.field ? `${problem.message} (${problem.field})` : problem.message, retryAfter);
  }
}

const TRIES = 6;
const LONGEST_PAUSE_SECONDS = 30;
const TOKEN_KEY = "introspect_ray.token";

/** What the page waits for, in words; empty if nothing. */
export const waiting = signal("");
/** Why a token is asked for; null while none is. */
export const tokenWanted = signal<string | null>(null);

let token = sessionStorage.getItem(TOKEN_KEY) ?? "";
let tokenGiven = Promise.withResolvers<void>();

export function giveToken(given: string): void {
  token = given;
  sessionStorage.setItem(TOKEN_KEY, given);
  tokenWanted.value = null;
  tokenGiven.resolve();
  tokenGiven = Promise.withResolvers<void>();
}

export const get = async <T>(path: string, signal: AbortSignal): Promise<T> =>
  (await send(path, undefined, signal)).json();

export const post = async <T>(path: string, body: object, signal: AbortSignal): Promise<T> =>
  (await send(path, body, signal)).json();

/** One item of a batch; its own failure is thrown. */
export async function postOne<T extends object>(path: string, body: object, item: object, signal: AbortSignal): Promise<T> {
  const { items } = await post<{ items: OrProblem<T>[] }>(path, { ...body, items: [item] }, signal);
  const [only] = items;
  if (!only) throw new ApiError("unavailable", "The server answered nothing.");
  if ("error" in only) throw ApiError.of(only.error);
  return only;
}

/** An explanation as it is written: `said` hears every piece; the whole is returned. */
export async function stream(body: object, said: (piece: string) => void, signal: AbortSignal): Promise<string> {
  const response = await send("explain/stream", body, signal);
  for await (const { event, data } of events(response.body!)) {
    if (event === "token") said(data.text);
    if (event === "done") return data.explanation;
    if (event === "error") throw ApiError.of(data.error ?? data);
  }
  throw new ApiError("unavailable", "The explanation broke off.");
}

async function* events(body: ReadableStream<BufferSource>): AsyncGenerator<{ event: string; data: any }> {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (buffer + value).split(/\r\n\r\n|\n\n/);
      buffer = blocks.pop()!;
      for (const block of blocks) {
        const lines = block.split(/\r?\n/);
        const field = (name: string) => lines.filter((line) => line.startsWith(`${name}:`))
          .map((line) => line.slice(name.length + 1).replace(/^ /, "")).join("\n");
        if (field("data")) yield { event: field("event"), data: JSON.parse(field("data")) };
      }
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
}

async function send(path: string, body: object | undefined, signal: AbortSignal): Promise<Response> {
  for (let tried = 1; ; tried++) {
    const used = token;
    const response = await fetch(`v1/${path}`, {
      method: body ? "POST" : "GET",
      headers: { ...(body && { "Content-Type": "application/json" }), ...(used && { Authorization: `Bearer ${used}` }) },
      body: body && JSON.stringify(body),
      signal,
    }).catch((error) => {
      throw signal.aborted ? error : new ApiError("unreachable", "The server cannot be reached.");
    });
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status === 401) {
      tried = 0;
      if (used !== token) continue;
      tokenWanted.value = used ? "The server does not accept this token." : "This server asks for a token.";
      await unlessAborted(tokenGiven.promise, signal);
    } else if (response.status === 503 && tried < TRIES) {
      await pause(error.retryAfter, signal);
    } else throw error;
  }
}

async function errorOf(response: Response): Promise<ApiError> {
  const seconds = Number(response.headers.get("Retry-After") ?? 1);
  const retryAfter = Math.min(Number.isFinite(seconds) ? seconds : 1, LONGEST_PAUSE_SECONDS);
  try {
    return ApiError.of((await response.json()).error, retryAfter);
  } catch {
    return new ApiError("unavailable", `The server answered ${response.status} and did not say why.`, retryAfter);
  }
}

async function pause(seconds: number, signal: AbortSignal): Promise<void> {
  waiting.value = `The server is busy; trying again in ${seconds} s.`;
  const { promise, resolve } = Promise.withResolvers<void>();
  const timer = setTimeout(resolve, 1000 * seconds);
  try {
    await unlessAborted(promise, signal);
  } finally {
    clearTimeout(timer);
    waiting.value = "";
  }
}

function unlessAborted(promise: Promise<void>, signal: AbortSignal): Promise<void> {
  signal.throwIfAborted();
  const { promise: aborted, reject } = Promise.withResolvers<never>();
  const stop = () => reject(signal.reason);
  signal.addEventListener("abort", stop);
  return Promise.race([promise, aborted]).finally(() => signal.removeEventListener("abort", stop));
}
