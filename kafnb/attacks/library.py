"""Attacks of libraries behind the call shape of ``attacks``: AutoAttack, Square, Carlini-Wagner, DeepFool.

A library gets a copy of the network (``fast.twin``), so whatever it does to modes, statistics or gradients stays
there; the global random generators are put back.
"""

import contextlib
import copy
import logging
import sys
import warnings

import torch

from ..checks import count, forward, instance, labels, radius
from . import _check
from .balls import size
from .fast import twin

AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")


@contextlib.contextmanager
def _lent(model):
    """A frozen copy in eval mode for a library, and the global generators as they were afterwards."""
    net = twin(model)
    net = copy.deepcopy(model) if net is model else net
    trace, logger = sys.gettrace(), logging.getLogger("auto-attack")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what it warns of is in ``checklist``
    try:
        with torch.random.fork_rng():
            yield net.eval().requires_grad_(False)
    finally:
        logger.setLevel(level)
        sys.settrace(trace)  # AutoAttack's check for dynamic defences takes it


def _drawn():
    """A seed drawn from the global generator: a library's own seeding then follows it."""
    return int(torch.randint(2**31, ()))


def _autoattack(net, eps, norm, x):
    from pyautoattack import AutoAttack

    if x.dtype != torch.float32:
        raise ValueError(f"AutoAttack and Square take float32, got {x.dtype}: give model.float() and x.float()")
    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    return AutoAttack(net, norm=name, eps=eps, device=x.device, seed=_drawn())


def _classes(net, x, y):
    """Number of classes of a network, which accepts the images and knows the labels."""
    with torch.no_grad(), forward(x):
        classes = net(x[:1]).shape[1]
    labels(y, classes=classes)
    return classes


def autoattack(model, x, y, *, eps, norm="linf", attacks=AUTOATTACK):
    """AutoAttack's standard version: APGD-CE, targeted APGD-DLR, targeted FAB (100 steps each), Square (5,000 queries).

    Parameters
    ----------
    model, x, y, eps, norm
        As for ``attacks.pgd``; float32.
    attacks : tuple of str
        A part of ``AUTOATTACK``, run in this order, each on what still stands.

    Returns
    -------
    Tensor, same shape as x
        Images that stand come back unchanged.

    Raises
    ------
    ValueError
        Fewer than 4 classes, which the targeted DLR loss needs.

    Source: Croce and Hein, ICML 2020, arXiv:2003.01690; the authors' code as packaged in pyautoattack.
    """
    _check(model, x, y, eps, norm)
    instance(attacks, list | tuple, "attacks")
    if not attacks or not all(isinstance(a, str) for a in attacks) or not set(attacks) <= set(AUTOATTACK):
        raise ValueError(f"attacks must be some of {AUTOATTACK}, got {attacks!r}")
    if len(x) == 0:
        return x.clone()
    with _lent(model) as net:
        if (classes := _classes(net, x, y)) < 4:
            raise ValueError(f"AutoAttack's targeted losses need at least 4 classes, got {classes}")
        runner = _autoattack(net, eps, norm, x)
        runner.attacks_to_run, runner.verbose = list(attacks), False
        for part in (runner.apgd_targeted, runner.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)
        return runner.run_standard_evaluation(x, y, batch_size=250)[0]


def apgd(model, x, y, *, eps, norm="linf"):
    """AutoAttack's first two parts: APGD on the cross-entropy, then towards the 9 likeliest other classes (L1: 5)."""
    return autoattack(model, x, y, eps=eps, norm=norm, attacks=AUTOATTACK[:2])


def square(model, x, y, *, eps, norm="linf", queries=5000):
    """Square attack: random search with squares, which sees the logits and no gradient.

    Source: Andriushchenko et al., ECCV 2020, arXiv:1912.00049; the code that AutoAttack runs.
    """
    _check(model, x, y, eps, norm)
    count(queries, "queries")
    with _lent(model) as net, torch.no_grad():
        _classes(net, x, y)
        attack = _autoattack(net, eps, norm, x).square
        attack.n_queries, attack.seed = queries, _drawn()
        return attack.perturb(x, y)


def _smallest(model, x, y, eps, find):
    """``find(copy of the model, images, labels)`` where the model is right; kept where within the L2 ball."""
    if eps != float("inf"):
        radius(eps)
    _check(model, x, y, 0.0, "l2")
    with _lent(model) as net:
        _classes(net, x, y)
        with torch.no_grad():
            right = (net(x).argmax(1) == y).nonzero()[:, 0]
        result = x.clone()
        if len(right):
            with torch.enable_grad():
                adv = find(net, x[right], y[right]).to(x)
            inside = size(adv - x[right], "l2") <= eps
            result[right[inside]] = adv[inside]
    return result


def cw(model, x, y, *, eps, steps=100, searches=6):
    """Carlini and Wagner's L2 attack: the smallest change that it finds, kept where it is within ``eps``.

    Parameters
    ----------
    eps : float
        L2 radius, pixel units; ``float("inf")`` keeps every change found.
    steps, searches : int
        Adam's steps for each of the values of the constant that a binary search tries.

    Source: Carlini and Wagner, IEEE S&P 2017, arXiv:1608.04644. (Of the libraries tried, foolbox's finds the smallest.)
    """
    count(steps, "steps")
    count(searches, "searches")
    with warnings.catch_warnings():  # libraries add filters of their own when they are imported
        import foolbox
    attack = foolbox.attacks.L2CarliniWagnerAttack(searches, steps, stepsize=0.05, initial_const=0.1)

    def find(net, x, y):
        wrapped = foolbox.PyTorchModel(net, bounds=(0, 1), device=x.device)
        return attack(wrapped, x, y, epsilons=None)[1]

    return _smallest(model, x, y, eps, find)


def deepfool(model, x, y, *, eps, steps=50):
    """DeepFool: steps to the nearest boundary of the linearised network, kept where the sum is within L2 ``eps``.

    Source: Moosavi-Dezfooli et al., CVPR 2016, arXiv:1511.04599; run by the Adversarial Robustness Toolbox.
    """
    count(steps, "steps")
    with warnings.catch_warnings():
        from art.attacks.evasion import DeepFool
        from art.estimators.classification import PyTorchClassifier

    def find(net, x, y):
        with torch.no_grad():
            classes = net(x[:1]).shape[1]
        kind = "gpu" if x.device.type == "cuda" else "cpu"
        shape, loss = tuple(x.shape[1:]), torch.nn.CrossEntropyLoss()
        classifier = PyTorchClassifier(net, loss, shape, classes, clip_values=(0.0, 1.0), device_type=kind)
        attack = DeepFool(classifier, max_iter=steps, epsilon=0.02, batch_size=256, verbose=False)
        return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy()))

    return _smallest(model, x, y, eps, find)
