"""Learning-rate schedules: pure functions of the number of updates already made in the stage."""

from __future__ import annotations

from typing import Annotated, Literal

import jax.numpy as jnp
from pydantic import Field, model_validator

from bertgpt_jax.config import Config
from bertgpt_jax.shapes import Array


class _Warmup(Config):
    """Linear warmup to `peak`, then the schedule's own shape.

    `offset` shifts the step: a second stage that goes on with the first one's curve starts at the first one's length.
    """

    peak: float = Field(default=1e-4, gt=0, description="learning rate after warmup")
    warmup_steps: int = Field(default=0, ge=0)
    offset: int = Field(default=0, ge=0, description="steps added before the schedule is read")

    def _warm(self, step: Array, after: Array) -> Array:
        ramp = (step + 1) / max(self.warmup_steps, 1)
        return jnp.where(step < self.warmup_steps, self.peak * ramp, after).astype(jnp.float32)


class _Horizon(_Warmup):
    """A schedule that needs its end."""

    total_steps: int | None = Field(default=None, ge=1, description="step at which it ends; None: the stage's last")
    final_fraction: float = Field(default=0.0, ge=0, le=1, description="of the peak, at the end")

    @model_validator(mode="after")
    def _ends_after_warmup(self) -> _Horizon:
        if self.total_steps is not None and self.warmup_steps >= self.total_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below total_steps {self.total_steps}")
        return self

    def _progress(self, step: Array) -> Array:
        return jnp.clip((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 0.0, 1.0)

    def _decayed(self, fraction: Array) -> Array:
        return self.peak * (self.final_fraction + (1 - self.final_fraction) * fraction)


class BertLinear(_Horizon):
    """google-research/bert `optimization.py`: polynomial decay counted from step 0, overridden during warmup.

    So the rate drops at the end of warmup (1e-4, 10k of 1M: 9.999e-5 to 9.9e-5) and the first update has rate 0.
    `power` 0.5 is NVIDIA's LAMB schedule (DeepLearningExamples, PyTorch BERT).
    """

    kind: Literal["bert_linear"] = "bert_linear"
    power: float = Field(default=1.0, gt=0)

    def __call__(self, step: Array) -> Array:
        """fp32 rate for the update after `step` updates."""
        step = step + self.offset
        decayed = self._decayed((1 - jnp.clip(step / self.total_steps, 0.0, 1.0)) ** self.power)
        warm = self.peak * step / max(self.warmup_steps, 1)
        return jnp.where(step < self.warmup_steps, warm, decayed).astype(jnp.float32)


class Linear(_Horizon):
    """From the peak at the end of warmup straight down to `final_fraction` of it."""

    kind: Literal["linear"] = "linear"

    def __call__(self, step: Array) -> Array:
        """fp32 rate for the update after `step` updates."""
        step = step + self.offset
        return self._warm(step, self._decayed(1 - self._progress(step)))


class Cosine(_Horizon):
    """Half a cosine (Loshchilov & Hutter 2017, eq. 5, without restarts)."""

    kind: Literal["cosine"] = "cosine"

    def __call__(self, step: Array) -> Array:
        """fp32 rate for the update after `step` updates."""
        step = step + self.offset
        return self._warm(step, self._decayed(0.5 * (1 + jnp.cos(jnp.pi * self._progress(step)))))


class OneMinusSqrt(_Horizon):
    """1 - sqrt(progress) (Hägele et al. 2024; ModernBERT's decay)."""

    kind: Literal["one_minus_sqrt"] = "one_minus_sqrt"

    def __call__(self, step: Array) -> Array:
        """fp32 rate for the update after `step` updates."""
        step = step + self.offset
        return self._warm(step, self._decayed(1 - jnp.sqrt(self._progress(step))))


class WarmupStableDecay(_Horizon):
    """Constant, then a decay over the last `decay_steps` (Hu et al. 2024, MiniCPM)."""

    kind: Literal["wsd"] = "wsd"
    decay_steps: int = Field(default=0, ge=0)
    decay: Literal["linear", "one_minus_sqrt"] = "linear"

    @model_validator(mode="after")
    def _decay_fits(self) -> WarmupStableDecay:
        if self.total_steps is not None and self.decay_steps > self.total_steps - self.warmup_steps:
            raise ValueError(f"decay_steps {self.decay_steps} + warmup_steps exceed total_steps {self.total_steps}")
        return self

    def __call__(self, step: Array) -> Array:
        """fp32 rate for the update after `step` updates."""
        step = step + self.offset
        progress = jnp.clip((step - (self.total_steps - self.decay_steps)) / max(self.decay_steps, 1), 0.0, 1.0)
        left = 1 - (progress if self.decay == "linear" else jnp.sqrt(progress))
        return self._warm(step, self._decayed(jnp.where(progress > 0, left, 1.0)))


class Constant(_Warmup):
    """The peak for as long as it takes."""

    kind: Literal["constant"] = "constant"

    def __call__(self, step: Array) -> Array:
        """fp32 rate for the update after `step` updates."""
        return self._warm(step + self.offset, jnp.asarray(self.peak))


class InverseSquareRoot(_Warmup):
    """peak x sqrt(warmup / step) (Vaswani et al. 2017, eq. 3, with the peak in place of its formula)."""

    kind: Literal["rsqrt"] = "rsqrt"

    def __call__(self, step: Array) -> Array:
        """fp32 rate for the update after `step` updates."""
        step = step + self.offset
        reference = max(self.warmup_steps, 1)
        return self._warm(step, self.peak * jnp.sqrt(reference / jnp.maximum(step + 1, reference)))


Schedule = Annotated[
    BertLinear | Linear | Cosine | OneMinusSqrt | WarmupStableDecay | Constant | InverseSquareRoot,
    Field(discriminator="kind"),
]
