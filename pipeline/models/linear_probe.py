"""A linear classifier fitted to features: ridge regression in closed form, then logistic regression.

Everything is computed in float64 on standardised features, from sums over the samples. Each process passes its own samples and
`reduce`, which adds up a tensor over the processes; all of them then get the same classifier.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot, softplus

Reduce = Callable[[Tensor], Tensor]

NUM_FOLDS = 5  # of the cross-validation; above FEW_SAMPLES only one fold is held out
FEW_SAMPLES = 2000
ROWS_AT_ONCE = 8192  # bounds the memory of intermediate results: [rows, num_classes] in float64
NO_FOLD = -1
MOST_ITERATIONS = 1000
TOLERANCE, CROSS_VALIDATION_TOLERANCE = 1e-8, 1e-4  # largest entry of the gradient at the end of L-BFGS
PENALTIES = [10.0**exponent for exponent in range(5, -4, -1)]  # on the squared weights, strongest first
RIDGE_PENALTIES = [10 ** (exponent / 2) for exponent in range(2, -13, -1)]  # times the number of samples
SMALLEST_STD = 1e-3  # of a feature, in units of the mean over all features: constant ones are not amplified
ROUNDING = 1e-11  # a smaller std, in units of the mean, is rounding: the samples have equal features
NUMERICAL_RANK = 1e-11  # smaller eigenvalues, in units of the largest, are rounding
TEMPERATURES = [2 ** (exponent / 4) for exponent in range(41)]  # factors on ridge scores, 1 to 1024


def in_one_process(tensor: Tensor) -> Tensor:
    return tensor


class Unfittable(ValueError):
    """A linear classifier cannot be fitted; every process finds the same reason."""


@dataclass(frozen=True)
class LinearProbe:
    """A fitted classifier of raw features: logits = features @ weight.T + bias.

    weight: float64 [num_classes, D]; bias: float64 [num_classes], zeros if it was fitted without one. penalty: the factor on half
    the squared norm of the standardised weights, 1 / C of scikit-learn. loo_accuracy: the leave-one-out accuracy of the ridge
    regression over all processes, a fraction.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    loo_accuracy: float


@dataclass(frozen=True)
class Rotated:
    """Standardised features in the basis of their principal axes, where ridge regression is diagonal.

    values: float64 [N, R], R the numerical rank; labels: int64 [N], numbered without gaps; eigenvalues: float64 [R], of the sum
    of squares over all processes; count: samples of all processes.
    """

    values: Tensor
    labels: Tensor
    eigenvalues: Tensor
    count: int
    num_classes: int
    has_bias: bool
    reduce: Reduce

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Values and labels, ROWS_AT_ONCE rows at a time."""
        return zip(self.values.split(ROWS_AT_ONCE), self.labels.split(ROWS_AT_ONCE))


@dataclass(frozen=True)
class Basis:
    """Where rotated features come from: values = (features - mean) / std @ axes.

    mean, std: float64 [D]; axes: float64 [D, R]; present: whether a class has samples, bool [num_classes].
    """

    mean: Tensor
    std: Tensor
    axes: Tensor
    present: Tensor


def fit_linear_probe(
    features: Tensor,
    labels: Tensor,
    folds: Tensor,
    num_classes: int,
    has_bias: bool = True,
    per_class: bool = False,
    reduce: Reduce = in_one_process,
) -> LinearProbe:
    """Fits multinomial logistic regression with an L2 penalty, which is chosen by cross-validated log loss.

    features: float [N, D], of this process's samples; labels: int64 [N]; folds: int64 [N], the held-out part that a sample
    belongs to, 0 to NUM_FOLDS - 1. per_class: fits a binary logistic regression for each class instead, for sigmoids. A class
    without samples gets no weight and the smallest bias. Raises Unfittable if fewer than two classes have samples, if features
    are not finite, or if all samples have equal ones. Sources: linear probing before fine-tuning,
    https://arxiv.org/abs/2202.10054; leave-one-out residuals of ridge regression, https://en.wikipedia.org/wiki/PRESS_statistic.
    """
    rotated, basis = rotate(features, labels, num_classes, has_bias, reduce)
    ridge, scores = fit_ridge(rotated)
    fitted, offset, penalty = fit_logistic(rotated, ridge, folds, per_class)
    present = basis.present
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, device=features.device)
    weight[present] = (basis.axes @ fitted).T / basis.std
    bias = torch.full_like(weight[:, 0], float(offset.min()))
    bias[present] = offset - weight[present] @ basis.mean
    bias[~present] = bias[present].min()
    _, accuracy = calibrated(scores, rotated)
    return LinearProbe(weight, bias if has_bias else torch.zeros_like(bias), penalty, accuracy)


def leave_one_out(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, float]:
    """What ridge regression on all samples but one predicts for that one: probabilities, float64 [N, num_classes]; the accuracy.

    features: float [N, D]; labels: int64 [N]. The probabilities are calibrated; a class without samples has 0. The accuracy is
    loo_accuracy of fit_linear_probe, which takes much longer. Raises Unfittable as it does.
    """
    rotated, basis = rotate(features, labels, num_classes)
    _, scores = fit_ridge(rotated)
    probabilities = torch.zeros(len(labels), num_classes, dtype=torch.float64, device=features.device)
    probabilities[:, basis.present], accuracy = calibrated(scores, rotated)
    return probabilities, accuracy


def rotate(
    features: Tensor, labels: Tensor, num_classes: int, has_bias: bool = True, reduce: Reduce = in_one_process
) -> tuple[Rotated, Basis]:
    """The features in the basis of their principal axes. Raises Unfittable."""
    counts = reduce(torch.bincount(labels, minlength=num_classes))
    present = counts > 0
    if int(present.sum()) < 2:
        raise Unfittable("fewer than two classes have images")
    mean, std = moments(features, int(counts.sum()), has_bias, reduce)
    number = present.cumsum(0) - 1
    standardised = (features.double() - mean) / std
    eigenvalues, axes = torch.linalg.eigh(reduce(standardised.T @ standardised))
    independent = eigenvalues > NUMERICAL_RANK * eigenvalues[-1]
    axes, eigenvalues = axes[:, independent], eigenvalues[independent]
    rotated = Rotated(
        values=standardised @ axes,
        labels=number[labels],
        eigenvalues=eigenvalues,
        count=int(counts.sum()),
        num_classes=int(present.sum()),
        has_bias=has_bias,
        reduce=reduce,
    )
    return rotated, Basis(mean, std, axes, present)


def moments(features: Tensor, count: int, has_bias: bool, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature over all processes, float64 [D]; without a bias, zeros and the RMS.

    Raises Unfittable if features are not finite, or none of them varies.
    """
    wide = features.double()
    mean = reduce(wide.sum(dim=0)) / count if has_bias else wide.new_zeros(wide.shape[1])
    std = (reduce((wide - mean).square().sum(dim=0)) / count).sqrt()
    if not bool(torch.isfinite(mean).all() & torch.isfinite(std).all()):
        raise Unfittable("the features of some images are not finite")
    if not bool((std > ROUNDING * mean.abs()).any()):
        raise Unfittable("the features of all images are equal")
    return mean, std.clamp(min=float(SMALLEST_STD * std.mean()))


def fit_ridge(rotated: Rotated) -> tuple[Tensor, Tensor]:
    """Ridge regression on the classes as 0 and 1, with the penalty of the smallest leave-one-out squared error.

    Returns its weights, float64 [R, num_classes], and the leave-one-out predictions of this process's samples, float64
    [N, num_classes]. The residual of a sample without it is its residual / (1 - leverage).
    """
    reduce, num_classes = rotated.reduce, rotated.num_classes
    shares = reduce(torch.bincount(rotated.labels, minlength=num_classes).double()) / rotated.count
    centre = shares if rotated.has_bias else torch.zeros_like(shares)
    moment = sum(values.T @ (one_hot(labels, num_classes) - centre) for values, labels in rotated.parts())
    moment = reduce(torch.as_tensor(moment, device=centre.device))

    def without_each(penalty: float) -> tuple[Tensor, Tensor]:
        shrunk = rotated.eigenvalues + penalty
        weights = moment / shrunk[:, None]
        predicted = []
        for values, labels in rotated.parts():
            leverage = (values.square() / shrunk).sum(dim=1) + (1 / rotated.count if rotated.has_bias else 0)
            target = one_hot(labels, num_classes).double()
            residual = target - centre - values @ weights
            predicted.append(target - residual / (1 - leverage).clamp(min=1e-9)[:, None])
        return weights, torch.cat(predicted)

    def squared_error(penalty: float) -> float:
        _, predicted = without_each(penalty)
        parts = zip(predicted.split(ROWS_AT_ONCE), rotated.labels.split(ROWS_AT_ONCE))
        errors = [(part - one_hot(labels, num_classes)).square().sum() for part, labels in parts]
        return float(reduce(torch.stack(errors).sum()))

    return without_each(min((penalty * rotated.count for penalty in RIDGE_PENALTIES), key=squared_error))


def calibrated(scores: Tensor, rotated: Rotated) -> tuple[Tensor, float]:
    """Softmax probabilities of scores times the factor of TEMPERATURES with the smallest log loss, and their accuracy.

    float64 [N, num_classes], of this process's samples; a fraction, of the samples of all processes.
    """

    def log_loss(factor: float) -> float:
        own = log_softmax(scores * factor, dim=1).gather(1, rotated.labels[:, None])
        return -float(rotated.reduce(own.sum()))

    probabilities = (scores * min(TEMPERATURES, key=log_loss)).softmax(dim=1)
    right = rotated.reduce((probabilities.argmax(dim=1) == rotated.labels).sum())
    return probabilities, int(right) / rotated.count


def fit_logistic(rotated: Rotated, ridge: Tensor, folds: Tensor, per_class: bool) -> tuple[Tensor, Tensor, float]:
    """Weights, float64 [R, num_classes], bias, float64 [num_classes], and penalty with the smallest held-out log loss.

    The penalty is lowered step by step, each fit starting from the one before, until the held-out loss has risen twice.
    """
    held_out = Logistic(rotated, folds, tuple(range(NUM_FOLDS if rotated.count <= FEW_SAMPLES else 1)), per_class)
    solutions = [held_out.start(ridge, PENALTIES[0])]
    losses: list[float] = []
    for penalty in PENALTIES:
        solutions.append(held_out.minimise(penalty, solutions[-1], CROSS_VALIDATION_TOLERANCE))
        losses.append(held_out.held_out_loss(solutions[-1]))
        best = losses.index(min(losses))
        if best <= len(losses) - 3:
            break
    start = solutions[best + 1].mean(dim=0, keepdim=True)
    (solution,) = Logistic(rotated, folds, (NO_FOLD,), per_class).minimise(PENALTIES[best], start, TOLERANCE)
    return solution[:-1], solution[-1], PENALTIES[best]


@dataclass(frozen=True)
class Logistic:
    """Independent logistic regressions, each on all samples but those of one fold; NO_FOLD leaves out none.

    Their solutions are float64 [F, R + 1, num_classes]: for each fold the weights, then the bias. folds: int64 [N]; per_class: as
    in fit_linear_probe.
    """

    rotated: Rotated
    folds: Tensor
    left_out: tuple[int, ...]
    per_class: bool

    def losses(self, values: Tensor, labels: Tensor, solutions: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each sample, float64 [F, B], and its gradient by the logits, float64 [F, B, num_classes].

        values: float64 [B, R]; labels: int64 [B].
        """
        logits = values @ solutions[:, :-1] + solutions[:, -1:]
        own = logits[:, torch.arange(len(labels), device=labels.device), labels]
        if self.per_class:
            losses, probabilities = softplus(logits).sum(dim=2) - own, logits.sigmoid()
        else:
            losses, probabilities = logits.logsumexp(dim=2) - own, logits.softmax(dim=2)
        return losses, probabilities - one_hot(labels, self.rotated.num_classes)

    def is_left_out(self, folds: Tensor) -> Tensor:
        """Whether each regression leaves out each sample; bool [F, B]."""
        return folds == folds.new_tensor(self.left_out)[:, None]

    def loss_and_gradient(self, solutions: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        """The loss, float64 [], and its gradient, in the shape of solutions.

        The loss is that of all samples and folds, summed, plus penalty / 2 times the squared weights.
        """
        gradient, loss = torch.zeros_like(solutions), solutions.new_zeros(())
        for (values, labels), folds in zip(self.rotated.parts(), self.folds.split(ROWS_AT_ONCE)):
            used = ~self.is_left_out(folds)
            losses, excess = self.losses(values, labels, solutions)
            loss += losses[used].sum()
            excess = excess * used[:, :, None]
            gradient[:, :-1] += values.T @ excess
            gradient[:, -1] += excess.sum(dim=1)
        sums = self.rotated.reduce(torch.cat([gradient.flatten(), loss[None]]))
        gradient, loss = sums[:-1].view_as(solutions), sums[-1]
        gradient[:, :-1] += penalty * solutions[:, :-1]
        if not self.rotated.has_bias:
            gradient[:, -1] = 0
        return loss + penalty / 2 * solutions[:, :-1].square().sum(), gradient

    def start(self, ridge: Tensor, penalty: float) -> Tensor:
        """The weights of the ridge regression, times the factor with the smallest loss, for each fold."""
        weights = torch.cat([ridge, torch.zeros_like(ridge[:1])]).expand(len(self.left_out), -1, -1)
        return min(
            (weights * factor for factor in (0, 1, 4, 16)), key=lambda start: float(self.loss_and_gradient(start, penalty)[0])
        )

    def minimise(self, penalty: float, start: Tensor, tolerance: float) -> Tensor:
        """The solutions for a penalty, by L-BFGS until no entry of the gradient exceeds the tolerance.

        It runs in coordinates in which the Hessian is near the identity: that of samples whose classes are equally likely.
        """
        curvature = (1 - 1 / self.rotated.num_classes) / self.rotated.num_classes
        of_bias = self.rotated.eigenvalues.new_tensor([curvature * self.rotated.count])
        scale = torch.cat([curvature * self.rotated.eigenvalues + penalty, of_bias]).rsqrt()[:, None]
        point = (start / scale).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [point],
            max_iter=MOST_ITERATIONS,
            history_size=10,
            tolerance_grad=tolerance,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss, gradient = self.loss_and_gradient(point.detach() * scale, penalty)
            point.grad = gradient * scale
            return loss

        optimizer.step(closure)
        return point.detach() * scale

    def held_out_loss(self, solutions: Tensor) -> float:
        """The log losses of the left-out samples, summed."""
        loss = solutions.new_zeros(())
        for (values, labels), folds in zip(self.rotated.parts(), self.folds.split(ROWS_AT_ONCE)):
            losses, _ = self.losses(values, labels, solutions)
            loss += losses[self.is_left_out(folds)].sum()
        return float(self.rotated.reduce(loss))
