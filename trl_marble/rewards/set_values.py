# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
r"""
Values of sets of images, and how much each image raises them: pure functions of features.

A set is its empirical distribution, the images $x_i$ with weights $w_i = 1/n$, and its value is a functional $F(w)$.
The *influence* of image i is the derivative of F towards a distribution of this image alone (first variation, Gâteaux
derivative):

$$\mathrm{IF}_i = \frac{d}{d\epsilon}\, F\big((1 - \epsilon)\, w + \epsilon\, \delta_i\big) \Big|_{\epsilon = 0},
\qquad \sum_i w_i\, \mathrm{IF}_i = 0 .$$

It is the signal of the policy gradient of F: if images are drawn from $p_\theta$, then
$\nabla_\theta F(p_\theta) = \mathbb{E}[\mathrm{IF}(x)\, \nabla_\theta \log p_\theta(x)]$. So with it a value of a set
is an ordinary reward of each image.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


BLOCK = 1024  # rows of a kernel that are computed together
MOST = 2000  # features that a median distance is taken of


class SetValue(NamedTuple):
    """
    The value of a set and what each image does to it.

    Args:
        value (`Tensor` of shape `[]`, float64):
            `F`.
        influence (`Tensor` of shape `[n]`, float64):
            Of each image, with mean 0.
    """

    value: Tensor
    influence: Tensor

    @property
    def credit(self) -> Tensor:
        """The value plus the influence of each image: its mean is the value."""
        return self.value + self.influence


def vendi_score(features: Tensor) -> SetValue:
    r"""
    The Vendi score (https://huggingface.co/papers/2210.02410): the effective number of different images, from 1 (all
    alike) to n (no two alike).

    With features of unit length $u_i$ and $\rho = \sum_i w_i u_i u_i^\top$,

    $$F = e^{H}, \quad H = -\operatorname{tr} \rho \log \rho, \qquad
    \mathrm{IF}_i = e^{H}\, \big({-u_i^\top \log(\rho)\, u_i} - H\big) .$$

    Both are found from the eigenvectors of the n x n matrix of the cosines, whose nonzero eigenvalues $\rho$ shares.

    Args:
        features (`Tensor` of shape `[n, D]`):
            Features of any length.
    """
    unit = normalize(features.double(), dim=1)
    number = len(unit)
    values, vectors = torch.linalg.eigh(unit @ unit.T / number)
    values = values.clamp(min=0)
    entropies = -torch.xlogy(values, values)  # -l log l, and 0 for l = 0
    entropy = entropies.sum()
    # u_i = sqrt(n) sum_j sqrt(l_j) Q_ij v_j, so -u_i' log(rho) u_i = n sum_j Q_ij^2 (-l_j log l_j).
    surprise = number * vectors.square() @ entropies
    return SetValue(entropy.exp(), entropy.exp() * (surprise - entropy))


def gaussian_kernel(features: Tensor, others: Tensor, bandwidth: float) -> Tensor:
    r"""$\exp(-\lVert x - y \rVert^2 / 2 h^2)$ of all pairs: `[n, m]`."""
    return (-torch.cdist(features, others).square() / (2 * bandwidth**2)).exp()


def mean_kernel(features: Tensor, bandwidth: float) -> float:
    """The mean of [`gaussian_kernel`] over all pairs, of each with itself too; `BLOCK` rows of it are in memory."""
    features = features.double()
    total = sum(gaussian_kernel(block, features, bandwidth).sum().item() for block in features.split(BLOCK))
    return total / len(features) ** 2


def median_distance(features: Tensor) -> float:
    """
    The median distance between two different features: the usual bandwidth. 1 if it is 0.

    Args:
        features (`Tensor` of shape `[n, D]`):
            Features; `MOST` of them are used, evenly spaced, where there are more.
    """
    if len(features) > MOST:
        features = features[torch.arange(MOST) * len(features) // MOST]
    distances = torch.pdist(features)
    return distances.median().item() or 1.0 if len(distances) else 1.0


def squared_mmd(
    features: Tensor, reference: Tensor, bandwidth: float, among_reference: float | None = None
) -> SetValue:
    r"""
    Squared maximum mean discrepancy to a reference set, with a Gaussian kernel k.

    With $m_i = \sum_j w_j k(x_i, x_j)$ and $b_i = \operatorname{mean}_y k(x_i, y)$ over the reference,

    $$F = \sum_i w_i m_i - 2 \sum_i w_i b_i + \operatorname{mean}_{y, y'} k(y, y'), \qquad
    \mathrm{IF}_i = 2\, (m_i - b_i) - 2 \sum_j w_j\, (m_j - b_j) .$$

    Args:
        features (`Tensor` of shape `[n, D]`):
            Features of the set.
        reference (`Tensor` of shape `[m, D]`):
            Those of the reference.
        bandwidth (`float`):
            `h` of the kernel.
        among_reference (`float`, *optional*):
            The last mean of F, where it is known; computed by default.
    """
    features, reference = features.double(), reference.double()
    if among_reference is None:
        among_reference = mean_kernel(reference, bandwidth)
    own = gaussian_kernel(features, features, bandwidth).mean(dim=1)
    to_reference = gaussian_kernel(features, reference, bandwidth).mean(dim=1)
    difference = own - to_reference
    return SetValue(own.mean() - 2 * to_reference.mean() + among_reference, 2 * difference - 2 * difference.mean())


def principal_directions(centred: Tensor, number: int) -> Tensor:
    """
    The directions in which features differ most, the first ones first.

    Directions whose deviation is that of rounding are left out: they are arbitrary. M features with the mean 0 have
    at most M - 1 others.

    Args:
        centred (`Tensor` of shape `[M, D]`):
            Features with the mean 0.
        number (`int`):
            How many directions, at most.

    Returns:
        `Tensor` of shape `[P, D]`: orthonormal; none where all features are alike.
    """
    _, deviations, directions = torch.linalg.svd(centred, full_matrices=False)
    # Features come from networks that compute in float32, or less.
    rounding = max(centred.shape) * torch.finfo(torch.float32).eps
    return directions[deviations > rounding * deviations[0]][:number]


def frechet_distance(features: Tensor, mean: Tensor, covariance: Tensor, smoothing: float) -> SetValue:
    r"""
    Squared Fréchet distance to a normal distribution (as in FID), of features with some noise.

    With the mean $\mu$ and the covariance $S$ of the set, $R = (S + \lambda I)^{1/2}$, and
    $C = S_* + \lambda I$ of the reference,

    $$F = \lVert \mu - \mu_* \rVert^2 + \operatorname{tr}\big(S + \lambda I + C - 2\, (R C R)^{1/2}\big) ,$$
    $$\mathrm{IF}_i = 2\, (\mu - \mu_*)^\top (x_i - \mu) + (x_i - \mu)^\top M\, (x_i - \mu) - \operatorname{tr}(M S) ,
    \quad M = I - R^{-1} (R C R)^{1/2} R^{-1} .$$

    The noise of variance $\lambda$, in both, makes it smooth however few images there are: without it, fewer images
    than features have a singular covariance, and influences are infinite.

    Args:
        features (`Tensor` of shape `[n, D]`):
            Features of the set.
        mean (`Tensor` of shape `[D]`):
            That of the reference.
        covariance (`Tensor` of shape `[D, D]`):
            That of the reference.
        smoothing (`float`):
            `λ`, above 0 unless the covariance of the set has full rank.
    """
    features, mean, covariance = features.double(), mean.double(), covariance.double()
    own_mean = features.mean(dim=0)
    centred = features - own_mean
    own = centred.T @ centred / len(features)
    noise = smoothing * torch.eye(len(mean), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(own + noise)
    root, inverse = vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T
    between = _square_root(root @ (covariance + noise) @ root)
    shift = own_mean - mean
    value = shift.square().sum() + (own + covariance + 2 * noise - 2 * between).trace()
    slope = torch.eye(len(mean), dtype=torch.float64) - inverse @ between @ inverse
    quadratic = ((centred @ slope) * centred).sum(dim=1)
    return SetValue(value, 2 * centred @ shift + quadratic - (slope * own).sum())


def _square_root(matrix: Tensor) -> Tensor:
    """Of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
