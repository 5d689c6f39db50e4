"""Rotary position embeddings, with the frequency scaling methods of Hugging Face checkpoints."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Angles = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Rope:
    """The frequencies of a rotary embedding.

    Attributes:
      theta: base of the frequencies.
      scaling: "none"; "linear" divides all frequencies by `factor`; "llama3" divides the low frequencies, keeps
        the high ones, and interpolates between them.
      factor: ratio of the extended to the original context length.
      low_freq_factor, high_freq_factor: interpolation bounds of "llama3", in turns per `original_len` positions.
      original_len: context length before the extension, in tokens.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_len: int = 8192

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Returns the frequency of each pair of dimensions in radians per position, float32 `[H / 2]`."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequencies = 1.0 / np.float32(self.theta) ** exponents
        if self.scaling == "linear":
            return frequencies / np.float32(self.factor)
        if self.scaling == "llama3":
            turns = self.original_len * frequencies / (2 * math.pi)
            ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = np.clip(ramp, 0.0, 1.0)
            return (frequencies * (keep + (1 - keep) / self.factor)).astype(np.float32)
        return frequencies


def rope_angles(positions_BT: jax.Array, rope: Rope, head_dim: int) -> Angles:
    """Returns the cosine and sine of all angles, float32 `[B, T, 1, H / 2]`."""
    angles = positions_BT[..., None].astype(jnp.float32) * rope.frequencies(head_dim)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def apply_rope(x_BTNH: jax.Array, angles: Angles) -> jax.Array:
    """Rotates the pairs of dimensions (h, h + H / 2), the pairing used by Hugging Face checkpoints."""
    cos, sin = angles
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)
