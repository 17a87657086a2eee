import type { Activations } from "./api";

/**
 * How far the vector of each token points in the direction of the one at `position`; below zero counts as zero, and
 * begin-of-text is left out. This is the activation of a vector that is no latent (features/projection.py).
 */
export function projections(found: Activations, position: number): number[] {
  const bytes = Uint8Array.from(atob(found.vectors ?? ""), (character) => character.charCodeAt(0));
  const numbers = new Float32Array(bytes.buffer);
  const width = numbers.length / found.positions.length;
  const vectors = found.positions.map((_, index) => numbers.subarray(index * width, (index + 1) * width));
  const chosen = vectors[found.positions.indexOf(position)];
  if (!chosen) throw new Error("The server gave no vector for this token.");
  const length = Math.sqrt(dot(chosen, chosen));
  const activations = vectors.map((vector) => Math.max(0, dot(vector, chosen) / length));
  return activations.slice(found.tokens[0]?.end === 0 ? 1 : 0);
}

const dot = (one: Float32Array, other: Float32Array): number => one.reduce((sum, value, index) => sum + value * other[index]!, 0);
