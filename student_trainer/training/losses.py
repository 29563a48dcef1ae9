"""The losses as pure tensor functions: no model, no trainer, so that NumPy in float64 can check every value."""

from __future__ import annotations

import math
from collections.abc import Mapping
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

    mean_logps: any shape, float32 or float64, natural log, <= 0: mean over the response's tokens. Source: Hong et al. 2024, section 4.
    """
    return mean_logps.clamp(max=_LARGEST_LOGP) - log1mexp(mean_logps)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(log odds(chosen) - log odds(rejected)): L_OR of each pair, > 0.

    chosen, rejected: (pairs,) mean log-probabilities as in `log_odds`. Source: Hong et al. 2024, eq. 7.
    """
    return F.softplus(log_odds(rejected) - log_odds(chosen))


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label.

    logits: (tokens, vocabulary) in any float type; labels: (tokens,) int64. Returns (tokens,) natural log, at least float32.
    """
    return -F.cross_entropy(precise(logits), labels, reduction="none")


@dataclass(frozen=True)
class Weights:
    """How much each term counts: L = NLL + orpo_lambda * L_OR + sum of (weight * KL term). 0 leaves a term out."""

    orpo_lambda: float = 0.1
    kl_reference: float = 0.0
    kl_teacher_sequence: float = 0.0
    kl_teacher_token: float = 0.0
    pseudocount: float = 1.0
    """Of `kl_teacher_token`: samples' worth of the uniform distribution mixed into every node of the prefix tree."""


@dataclass(frozen=True)
class Counts:
    """Denominators: of the whole optimizer step, over all its micro-batches and processes, so that parts add up to the large batch."""

    chosen_tokens: float
    """Tokens of chosen responses, each by the weight of its response."""
    pairs: float
    """Pairs, each by the weight of its chosen response."""
    prompts: float
    """Prompts with teacher samples."""


@dataclass(frozen=True)
class Terms:
    """What a batch adds to each term of the loss: () sums that carry the gradient, in nats; 0 where a term is left out."""

    nll: Tensor
    odds_ratio: Tensor
    kl_reference: Tensor
    kl_teacher_sequence: Tensor
    kl_teacher_token: Tensor
    chosen: Tensor
    """(pairs,) mean log-probability of each pair's chosen response, without gradient."""
    rejected: Tensor
    """(pairs,) the same of the rejected response."""

    def loss(self, weights: Weights, counts: Counts) -> Tensor:
        """() the loss, or a micro-batch's share of it. Source of the first two terms: Hong et al. 2024, eq. 6."""
        loss = self.nll / max(counts.chosen_tokens, 1e-9)
        if counts.pairs:
            loss = loss + weights.orpo_lambda * self.odds_ratio / counts.pairs
        if counts.chosen_tokens:
            loss = loss + weights.kl_reference * self.kl_reference / counts.chosen_tokens
        if counts.prompts:
            teacher = weights.kl_teacher_sequence * self.kl_teacher_sequence + weights.kl_teacher_token * self.kl_teacher_token
            loss = loss + teacher / counts.prompts
        return loss


def terms(logits: Tensor, batch: Mapping[str, Tensor], weights: Weights, *, reference: Tensor | None = None) -> Terms:
    """The sums of one batch.

    logits: (T, vocabulary) at every predicted token; batch: as `collate.Collator` makes it; reference: (C, vocabulary) logits of the
    frozen initial student at the tokens of chosen responses, needed where `weights.kl_reference` is not 0.
    """
    logps = token_logps(logits, batch["labels"])
    sums = logps.new_zeros(len(batch["weights"])).index_add(0, batch["response"], logps)
    means = sums / counted(batch["response"], sums)
    chosen_weights = batch["weights"].to(sums.dtype)
    better, worse = batch["pairs"][:, 0], batch["pairs"][:, 1]
    none = sums.new_zeros(())
    return Terms(
        nll=-(chosen_weights * sums).sum(),
        odds_ratio=(chosen_weights[better] * odds_ratio_loss(means[better], means[worse])).sum(),
        kl_reference=none if reference is None else _kl_reference(logits, reference, batch["chosen"], chosen_weights[batch["response"]]),
        kl_teacher_sequence=sequence_kl(sums, batch["shares"].to(sums.dtype)) if weights.kl_teacher_sequence else none,
        kl_teacher_token=prefix_tree_kl(logits, batch, weights.pseudocount) if weights.kl_teacher_token else none,
        chosen=means[better].detach(),
        rejected=means[worse].detach(),
    )


def _kl_reference(logits: Tensor, reference: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    return (weights[chosen] * token_kl(logits[chosen], reference)).sum()


def counted(places: Tensor, like: Tensor) -> Tensor:
    """How often each index of `like` (R,) stands in `places` (any length), int64. bincount says the same, but has a GPU waited for."""
    return places.new_zeros(len(like)).index_add(0, places, torch.ones_like(places))


def token_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """(T,) KL(student || reference) of the next token at every position: exact there, over the whole vocabulary.

    logits, reference: (T, vocabulary); the reference carries no gradient. Summed along responses that the *teacher* wrote it is no
    estimate of the divergence between the two models as distributions over texts (that would take texts of the student's); it keeps
    the student near its beginning along the path it is being taught.
    """
    student, initial = precise(logits).log_softmax(-1), precise(reference).log_softmax(-1)
    return (student.exp() * (student - initial)).sum(-1)


def sequence_kl(sums: Tensor, shares: Tensor) -> Tensor:
    """() KL(q || student) over whole answers, q being the K samples of a black-box teacher: sum of share * (log share - log p(answer)).

    sums: (responses,) log-probability of each whole response; shares: (responses,) the share of a prompt's samples that said it, 0 for
    others. Summed over prompts. It is the NLL of the samples up to their entropy, which the student cannot change. Samples at temperature 1
    from the whole distribution (top_p 1) make its gradient an unbiased estimate of that of KL(teacher || student); its value is
    biased upwards, as K samples have less entropy than the teacher. At another temperature the same holds for the tempered teacher. Answers
    that met the token limit are left out before: the teacher is then the one that has finished within it.
    """
    said = shares > 0
    return torch.where(said, shares * (torch.where(said, shares, 1.0).log() - sums), 0.0).sum()


def prefix_tree_kl(logits: Tensor, batch: Mapping[str, Tensor], pseudocount: float) -> Tensor:
    """() EXPERIMENTAL. Token KL(q || student) at the nodes of the K samples' prefix tree, each by the share of samples that pass it.
    Summed over prompts.

    At a node that n of K samples pass, of which c_v go on with v: q(v) = (c_v + a / V) / (n + a), a the pseudo-count, V the vocabulary.
    a = 0 gives `sequence_kl` (chain rule); K = 1 gives label smoothing by a / (1 + a). Smoothing makes it a biased estimate of
    KL(teacher || student) for any a > 0: mass goes to tokens that the teacher may never say. What it buys is a bound: at nodes one sample
    has passed, q is not certain.

    batch: `visits` (T,) n of each token's node, `mass` (T,) share of the samples that say the token's response; `edges` (E, 2) a token's
    index and a token id that follows its node; `edge_counts` (E,) how many samples follow it.
    """
    logps = precise(logits).log_softmax(-1)
    visits, vocabulary = batch["visits"].to(logps.dtype), logps.shape[-1]
    token, follows = batch["edges"][:, 0], batch["edges"][:, 1]
    smooth = pseudocount / (vocabulary * (visits + pseudocount))  # (T,) q of whatever no sample went on with
    said = batch["edge_counts"] / (visits + pseudocount)[token] + smooth[token]
    divergence = said * said.log() - (said - smooth[token]) * logps[token, follows]
    divergence = logps.new_zeros(len(logps)).index_add(0, token, divergence)
    if pseudocount:
        unsaid = vocabulary - counted(token, visits)
        divergence = divergence + smooth * (unsaid * smooth.log() - logps.sum(-1))
    return (batch["mass"].to(logps.dtype) * divergence).sum()


def precise(logits: Tensor) -> Tensor:
    """At least float32: a softmax over tens of thousands of entries in bfloat16 would be noise."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
