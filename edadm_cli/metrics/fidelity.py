r"""Distances between sets of images in a feature space; torch-fidelity does the arithmetic.

$$ \text{FD} = \lVert \mu_1 - \mu_2 \rVert^2 + \text{tr}(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2}) $$
$$ \text{KD} = \widehat{\text{MMD}}{}^2 \text{ with } k(x, y) = (x \cdot y / D + 1)^3 $$
$$ \text{IS} = \exp \mathbb{E}_x \, \text{KL}(p(y | x) \,\Vert\, p(y)) $$

The cache of torch-fidelity is never used: it is keyed by names, not by content.

References:
    Heusel et al. (arXiv 1706.08500), equation 6; Bińkowski et al. (arXiv 1801.01401), section 4;
    Salimans et al. (arXiv 1606.03498), section 4; Kynkäänniemi et al. (arXiv 1904.06991), section 3.
"""

from __future__ import annotations

from torch import Tensor
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

from edadm_cli.metrics.base import NEIGHBOURS
from edadm_cli.metrics.representation import Statistics

KERNEL_SUBSETS = 100
KERNEL_SUBSET_SIZE = 1000
SCORE_SPLIT_SIZE = 1000
SCORE_MAX_SPLITS = 10
_DISTANCE_ROWS = 1000


def feature_statistics(features: Tensor) -> Statistics:
    """Returns mean and covariance of features with shape `(N, D)`, accumulated in float64."""
    results = metric_fid.fid_features_to_statistics(features.double().cpu())
    return Statistics(results["mu"], results["sigma"])


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Returns the Fréchet distance of the normal distributions that have these statistics."""
    both = [{"mu": statistics.mean, "sigma": statistics.covariance} for statistics in (first, second)]
    return float(metric_fid.fid_statistics_to_metric(*both, verbose=False)[metric_fid.KEY_METRIC_FID])


def kernel_distance(features: Tensor, real: Tensor) -> float:
    """Returns the unbiased squared maximum mean discrepancy, a mean over 100 pairs of random subsets.

    A subset has 1,000 rows, or as many as the smaller set has. The value may be slightly negative.

    Args:
        features: Shape `(N, D)`.
        real: Shape `(M, D)`.
    """
    results = metric_kid.kid_features_to_metric(
        features.double().cpu(),
        real.double().cpu(),
        kid_subsets=KERNEL_SUBSETS,
        kid_subset_size=min(KERNEL_SUBSET_SIZE, len(features), len(real)),
        verbose=False,
    )
    return float(results[metric_kid.KEY_METRIC_KID_MEAN])


def score_splits(num_images: int) -> int:
    """Returns the number of parts that the score is a mean over: one per thousand images, from 1 to 10."""
    return max(1, min(SCORE_MAX_SPLITS, num_images // SCORE_SPLIT_SIZE))


def inception_score(logits: Tensor) -> float:
    """Returns the Inception score of a classifier's logits with shape `(N, K)`; it lies in `[1, K]`."""
    results = metric_isc.isc_features_to_metric(logits.cpu(), splits=score_splits(len(logits)))
    return float(results[metric_isc.KEY_METRIC_ISC_MEAN])


def precision_recall(features: Tensor, real: Tensor) -> tuple[float, float]:
    """Returns precision and recall of the manifolds spanned by the 3 nearest neighbours.

    Precision is the share of images within the real manifold; recall the share of real images within theirs.

    Args:
        features: Shape `(N, D)`, N at least 4.
        real: Shape `(M, D)`, M at least 4.
    """
    results = metric_prc.prc_features_to_metric(
        features.double().cpu(),
        real.double().cpu(),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=_DISTANCE_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return (
        _share(results[metric_prc.KEY_METRIC_PRECISION], len(features)),
        _share(results[metric_prc.KEY_METRIC_RECALL], len(real)),
    )


def prompt_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Returns the share of images that the classifier reads as the prompted class.

    Args:
        logits: Shape `(N, K)`.
        labels: The prompted classes, int64 with shape `(N,)`.
    """
    return float((logits.argmax(dim=1) == labels.to(logits.device)).double().mean())


def _share(value: float, count: int) -> float:
    """Returns the share of `count` that a mean in float32 stands for."""
    return round(value * count) / count
