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
  /** `again`: whether the same request may be answered in a moment. */
  constructor(readonly code: string, message: string, readonly retryAfter = 1, readonly again = false) { super(message); }

  /** Whether the same request would only fail again. */
  get isFinal(): boolean {
    return ["bad_request", "not_found", "too_large"].includes(this.code);
  }

  static of(problem: Problem, retryAfter?: number, again?: boolean): ApiError {
    const message = problem.field ? `${problem.message} (${problem.field})` : problem.message;
    return new ApiError(problem.code, message, retryAfter, again);
  }
}

const TRIES = 6;
/** Of a request that takes the server longer than it may: each one costs as much again. */
const TRIES_IN_TIME = 2;
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

export const get = <T>(path: string, signal: AbortSignal): Promise<T> => ask(path, undefined, signal);

export const post = <T>(path: string, body: object, signal: AbortSignal): Promise<T> => ask(path, body, signal);

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
  return again(async () => {
    const response = await send("explain/stream", body, signal);
    let begun = false;
    try {
      for await (const { event, data } of events(response.body!)) {
        if (event === "done") return data.explanation as string;
        if (event === "error") throw ApiError.of(data.error ?? data);
        if (event === "token") {
          begun = true;
          said(data.text);
        }
      }
    } catch (error) {
      if (error instanceof ApiError || signal.aborted) throw error;
      throw new ApiError("unavailable", "The explanation broke off.", 1, !begun);
    }
    throw new ApiError("unavailable", "The explanation broke off.", 1, !begun);
  }, signal);
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

function ask<T>(path: string, body: object | undefined, signal: AbortSignal): Promise<T> {
  return again(async () => {
    const response = await send(path, body, signal);
    return response.json().catch((error) => {
      throw signal.aborted ? error : new ApiError("unavailable", "The answer broke off.", 1, true);
    });
  }, signal);
}

/** What `attempt` gives, made again while that may help: every request only reads. */
async function again<T>(attempt: () => Promise<T>, signal: AbortSignal): Promise<T> {
  let tried = 0;
  let late = 0;
  for (;;) {
    const used = token;
    try {
      return await attempt();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      tried += 1;
      if (error.code === "timeout") late += 1;
      if (error.code === "unauthorized") {
        tried = 0;
        if (used !== token) continue;
        tokenWanted.value = used ? "The server does not accept this token." : "This server asks for a token.";
        await unlessAborted(tokenGiven.promise, signal);
      } else if (error.again && tried < TRIES && late < TRIES_IN_TIME) {
        await pause(error, signal);
      } else throw error;
    }
  }
}

async function send(path: string, body: object | undefined, signal: AbortSignal): Promise<Response> {
  const response = await fetch(`v1/${path}`, {
    method: body ? "POST" : "GET",
    headers: { ...(body && { "Content-Type": "application/json" }), ...(token && { Authorization: `Bearer ${token}` }) },
    body: body && JSON.stringify(body),
    signal,
  }).catch((error) => {
    throw signal.aborted ? error : new ApiError("unreachable", "The server cannot be reached.", 1, true);
  });
  if (response.ok) return response;
  throw await errorOf(response);
}

async function errorOf(response: Response): Promise<ApiError> {
  const seconds = Number(response.headers.get("Retry-After") ?? 1);
  const retryAfter = Math.min(Number.isFinite(seconds) ? seconds : 1, LONGEST_PAUSE_SECONDS);
  try {
    return ApiError.of((await response.json()).error, retryAfter, response.status === 503);
  } catch {
    // Not ours: so what stands before the server says that it died under the request, or is not there.
    const message = `The server answered ${response.status} and did not say why.`;
    const code = response.status === 401 ? "unauthorized" : "unavailable";
    return new ApiError(code, message, retryAfter, response.status >= 500);
  }
}

async function pause({ code, retryAfter }: ApiError, signal: AbortSignal): Promise<void> {
  const seconds = retryAfter;
  waiting.value = `The server ${code === "unreachable" ? "cannot be reached" : "is busy"}; trying again in ${seconds} s.`;
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
