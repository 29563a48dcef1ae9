"""The ORPO loss as pure tensor functions: no model, no trainer, so that NumPy in float64 can check every value."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST_LOGP = -1e-6
"""Mean log-probabilities are clamped here: p <= 1 - 1e-6, so log(1 - p) >= -13.8 and its gradient stay finite in float32."""


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x), elementwise, for x <= 0 in natural log; values above -1e-6 are clamped to it. Same shape and dtype as `x`.

    Source: Maechler 2012, "Accurately computing log(1 - exp(-|a|))".
    """
    x = x.clamp(max=_LARGEST_LOGP)
    # log(1 - e^x) cancels near x = 0 and underflows far from it: branch at -ln 2. Each branch gets a harmless input where
    # the other one is selected, else autograd multiplies 0 by the inf of the branch that was not.
    near_zero = x > -math.log(2.0)
    harmless = torch.full_like(x, -1.0)
    near = torch.log(-torch.expm1(torch.where(near_zero, x, harmless)))
    far = torch.log1p(-torch.exp(torch.where(near_zero, harmless, x)))
    return torch.where(near_zero, near, far)


def log_odds(mean_logps: Tensor) -> Tensor:
    """Log odds log(p / (1 - p)) of whole responses.

    mean_logps: any shape, float32 or float64, natural log, <= 0: mean over the response's tokens. Source: Hong et al. 2024, eq. 5.
    """
    return mean_logps.clamp(max=_LARGEST_LOGP) - log1mexp(mean_logps)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(log odds(chosen) - log odds(rejected)): L_OR of each pair, > 0.

    chosen, rejected: (pairs,) mean log-probabilities as in `log_odds`. Source: Hong et al. 2024, eq. 7.
    """
    return F.softplus(log_odds(rejected) - log_odds(chosen))


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label.

    logits: (tokens, vocabulary) in any float type; labels: (tokens,) int64. Returns (tokens,) natural log, at least float32:
    a softmax over tens of thousands of entries in bfloat16 would be noise.
    """
    precise = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return -F.cross_entropy(precise, labels, reduction="none")


@dataclass(frozen=True)
class Scores:
    """What a batch adds to the loss and to the log. Sums, not means: the denominators belong to the whole optimizer step."""

    nll: Tensor
    """() summed over the chosen tokens, in nats; carries the gradient."""
    odds_ratio: Tensor
    """() L_OR summed over the pairs; carries the gradient."""
    chosen: Tensor
    """(pairs,) mean log-probability of each pair's chosen response, without gradient."""
    rejected: Tensor
    """(pairs,) the same of the rejected response."""

    def detached(self) -> Scores:
        """The same numbers without their graph, to be kept."""
        return Scores(self.nll.detach(), self.odds_ratio.detach(), self.chosen, self.rejected)

    def loss(self, orpo_lambda: float, *, chosen_tokens: float, pairs: float) -> Tensor:
        """() nll / chosen_tokens + lambda * odds_ratio / pairs. Source: Hong et al. 2024, eq. 6.

        chosen_tokens, pairs: counts of the whole optimizer step, so that accumulated micro-batches add up to the large batch.
        """
        loss = self.nll / chosen_tokens
        return loss + orpo_lambda * self.odds_ratio / pairs if orpo_lambda and pairs else loss


def score(logps: Tensor, response: Tensor, chosen: Tensor, pairs: Tensor) -> Scores:
    """The sums of one batch.

    logps: (tokens,) from `token_logps`, of all responses one after the other; response: (tokens,) int64, the response each
    token belongs to; chosen: (responses,) bool; pairs: (pairs, 2) int64, indices of a chosen and a rejected response.
    Every response must have at least one token.
    """
    sums = logps.new_zeros(len(chosen)).index_add(0, response, logps)
    lengths = torch.bincount(response, minlength=len(chosen))
    means = sums / lengths
    better, worse = means[pairs[:, 0]], means[pairs[:, 1]]
    return Scores(nll=-sums[chosen].sum(), odds_ratio=odds_ratio_loss(better, worse).sum(), chosen=better.detach(), rejected=worse.detach())
