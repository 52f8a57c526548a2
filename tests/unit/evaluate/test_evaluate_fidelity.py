"""The arithmetic of metrics is equal to formulae that are written independently."""

import math

import numpy as np
import pytest
import torch

from edadm_cli.metrics import fidelity


def _normal(seed: int, count: int, size: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, size, generator=generator) @ mixing * scale + shift


def _noise(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def _distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return fidelity.frechet_distance(fidelity.feature_statistics(first), fidelity.feature_statistics(second))


def test_frechet_distance_equals_the_formula_with_a_matrix_root() -> None:
    first, second = _normal(0, 400, 12), _normal(1, 300, 12, scale=1.3, shift=0.4)
    x, y = first.double().numpy(), second.double().numpy()
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(cov_x)
    root_x = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root_x @ cov_y @ root_x)).sum()
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cov_x + cov_y) - 2 * trace_of_root
    assert _distance(first, second) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_a_set_to_itself_is_zero_also_with_fewer_images_than_features() -> None:
    for count in (500, 10):
        features = _normal(2, count, 32)
        trace = float(np.trace(fidelity.feature_statistics(features).covariance))
        assert abs(_distance(features, features)) < 1e-5 * trace


def test_frechet_distance_of_a_shift_is_its_square() -> None:
    features = _normal(3, 300, 6).double()
    assert _distance(features + 2.0, features) == pytest.approx(6 * 4.0, rel=1e-9)


def test_statistics_keep_small_deviations_of_large_features() -> None:
    features = torch.randn(2000, 3, generator=torch.Generator().manual_seed(4)) + 4096.0
    actual = fidelity.feature_statistics(features)
    np.testing.assert_allclose(actual.mean, features.double().mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(actual.covariance, torch.cov(features.double().T).numpy(), rtol=1e-9, atol=1e-12)


def test_kernel_distance_equals_the_unbiased_estimate_when_a_subset_is_the_whole_set() -> None:
    first, second = _normal(5, 60, 4).double(), _normal(6, 60, 4, shift=0.7).double()

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal_mean(values: torch.Tensor) -> float:
        count = len(values)
        return float((values.sum() - values.diagonal().sum()) / (count * (count - 1)))

    within = off_diagonal_mean(kernel(first, first)) + off_diagonal_mean(kernel(second, second))
    expected = within - 2 * float(kernel(first, second).mean())
    assert fidelity.kernel_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_tells_other_distributions_from_the_same() -> None:
    samples = _noise(7, 300)
    same = fidelity.kernel_distance(samples, _noise(8, 400))
    other = fidelity.kernel_distance(samples, _noise(8, 400) + 0.5)
    assert abs(same) < 0.1 * other


def test_inception_score_of_certain_and_of_uniform_answers() -> None:
    certain = 100.0 * torch.eye(10).repeat(30, 1)
    assert fidelity.inception_score(certain) == pytest.approx(10.0, rel=1e-6)
    assert fidelity.inception_score(torch.zeros(300, 10)) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(("num_images", "splits"), [(2, 1), (999, 1), (2000, 2), (10_000, 10), (50_000, 10)])
def test_no_split_of_the_score_has_fewer_than_a_thousand_images(num_images: int, splits: int) -> None:
    assert fidelity.score_splits(num_images) == splits


def test_precision_and_recall_of_equal_and_of_separate_sets() -> None:
    features = _normal(9, 200, 6)
    assert fidelity.precision_recall(features, features) == (1.0, 1.0)
    assert fidelity.precision_recall(features, features + 1000.0) == (0.0, 0.0)


def test_precision_is_about_the_samples_and_recall_about_the_real_images() -> None:
    real = torch.cat([_normal(10, 200, 6), _normal(11, 200, 6) + 500.0])
    samples = _normal(12, 200, 6)  # one of the two real clusters, covered well
    precision, recall = fidelity.precision_recall(samples, real)
    assert precision > 0.8
    assert 0.3 < recall <= 0.5


def test_prompt_accuracy_counts_matching_classes() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 5.0], [1.0, 0.0]])
    assert fidelity.prompt_accuracy(logits, torch.tensor([1, 0, 0, 0])) == 0.75
    assert not math.isnan(fidelity.prompt_accuracy(logits[:1], torch.tensor([0])))
