"""Attacks of libraries behind the call shape of ``attacks``: AutoAttack, Square, Carlini-Wagner, DeepFool.

A library gets a copy of the network (``fast.twin``), so whatever it does to modes, statistics or gradients stays
there; the global random generators are put back.
"""

import contextlib
import copy
import logging
import sys

import torch

from .attacks import _check
from .balls import size
from .fast import twin

AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")


def _pyautoattack():
    try:
        import pyautoattack
    except ImportError:
        raise ImportError("AutoAttack and Square need pyautoattack: pip install 'kafnb[attacks]'") from None
    return pyautoattack


@contextlib.contextmanager
def _lent(model, seed=None):
    """A frozen copy in eval mode for a library, and the global generators as they were afterwards."""
    net = twin(model)
    net = copy.deepcopy(model) if net is model else net
    trace, logger = sys.gettrace(), logging.getLogger("auto-attack")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what it warns of is in ``checklist``
    try:
        with torch.random.fork_rng():
            if seed is not None:
                torch.manual_seed(seed)
            yield net.eval().requires_grad_(False)
    finally:
        logger.setLevel(level)
        sys.settrace(trace)  # AutoAttack's check for dynamic defences takes it


def _drawn():
    """A seed drawn from the global generator: a library's own seeding then follows it."""
    return int(torch.randint(2**31, ()))


def _autoattack(net, eps, norm, x):
    from pyautoattack import AutoAttack

    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    return AutoAttack(net, norm=name, eps=eps, device=x.device, seed=_drawn())


def autoattack(model, x, y, *, eps, norm="linf", attacks=AUTOATTACK, batch_size=250):
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
    ImportError
        pyautoattack is not installed.
    ValueError
        Fewer than 4 classes, which the targeted DLR loss needs.

    Source: Croce and Hein, ICML 2020, arXiv:2003.01690; the authors' code as packaged in pyautoattack.
    """
    _pyautoattack()
    _check(x, y, eps, norm)
    if not attacks or not set(attacks) <= set(AUTOATTACK):
        raise ValueError(f"attacks must be some of {AUTOATTACK}, got {attacks!r}")
    with _lent(model) as net:
        with torch.no_grad():
            classes = net(x[:1]).shape[1]
        if classes < 4:
            raise ValueError(f"AutoAttack's targeted losses need at least 4 classes, got {classes}")
        runner = _autoattack(net, eps, norm, x)
        runner.attacks_to_run, runner.verbose = list(attacks), False
        for part in (runner.apgd_targeted, runner.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)
        return runner.run_standard_evaluation(x, y, batch_size=batch_size)[0]


def square(model, x, y, *, eps, norm="linf", queries=5000, restarts=1):
    """Square attack: random search with squares, which sees the logits and no gradient.

    Source: Andriushchenko et al., ECCV 2020, arXiv:1912.00049; the code that AutoAttack runs.
    """
    _pyautoattack()
    _check(x, y, eps, norm)
    with _lent(model) as net, torch.no_grad():
        attack = _autoattack(net, eps, norm, x).square
        attack.n_queries, attack.n_restarts, attack.seed = queries, restarts, _drawn()
        return attack.perturb(x, y)


def _art_attack(model, x, y, eps, make):
    """Run ``make(classifier)`` of ART on the images that the model gets right; what leaves the L2 ball goes back."""
    import numpy as np
    from art.estimators.classification import PyTorchClassifier

    if not x.is_floating_point() or y is None or eps < 0:
        raise ValueError("minimal-norm attacks need float images, labels, and eps >= 0 (inf for no limit)")
    _check(x, y, 0.0, "l2")
    state = np.random.get_state()
    with _lent(model) as net:
        with torch.no_grad():
            logits = net(x)
        right = (logits.argmax(1) == y).nonzero()[:, 0]
        result = x.clone()
        if len(right):
            classifier = PyTorchClassifier(
                net, torch.nn.CrossEntropyLoss(), tuple(x.shape[1:]), logits.shape[1], clip_values=(0.0, 1.0),
                device_type="gpu" if x.device.type == "cuda" else "cpu",
            )  # fmt: skip
            adv = make(classifier).generate(x[right].cpu().numpy(), y[right].cpu().numpy())
            adv = torch.from_numpy(adv).to(x)
            inside = size(adv - x[right], "l2") <= eps
            result[right[inside]] = adv[inside]
    np.random.set_state(state)
    return result


def cw(model, x, y, *, eps, steps=10, searches=10, confidence=0.0):
    """Carlini and Wagner's L2 attack: the smallest change that it finds, kept where it is within ``eps``.

    Parameters
    ----------
    eps : float
        L2 radius, pixel units; ``float("inf")`` keeps every change found.
    steps, searches : int
        Descent steps for each of the values of the constant that a binary search tries.
    confidence : float
        Lead that the wrong logit must have.

    Source: Carlini and Wagner, IEEE S&P 2017, arXiv:1608.04644; run by the Adversarial Robustness Toolbox.
    """
    from art.attacks.evasion import CarliniL2Method

    options = dict(max_iter=steps, binary_search_steps=searches, confidence=confidence)
    options |= dict(learning_rate=0.1, initial_const=1.0, batch_size=256, verbose=False)
    return _art_attack(model, x, y, eps, lambda classifier: CarliniL2Method(classifier, **options))


def deepfool(model, x, y, *, eps, steps=50, overshoot=0.02):
    """DeepFool: steps to the nearest boundary of the linearised network, kept where the sum is within L2 ``eps``.

    Source: Moosavi-Dezfooli et al., CVPR 2016, arXiv:1511.04599; run by the Adversarial Robustness Toolbox.
    """
    from art.attacks.evasion import DeepFool

    options = dict(max_iter=steps, epsilon=overshoot, batch_size=256, verbose=False)
    return _art_attack(model, x, y, eps, lambda classifier: DeepFool(classifier, **options))
