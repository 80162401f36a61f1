"""Bad input: every public function gets one bad argument, and answers with one line from this package."""

import functools
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from effort import LONG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import kafnb
from kafnb import (
    KAF,
    KWTA,
    Evaluation,
    Experiment,
    Recipe,
    attacks,
    certify,
    checks,
    collapse,
    compare,
    detect,
    evaluate,
    figures,
    gradients,
    lipschitz,
    meanfield,
    models,
    notebooks,
    parametric,
    probes,
)
from kafnb.attacks import adaptive, checklist, library

PACKAGE = str(Path(kafnb.__file__).parent)
cases = functools.partial(
    settings, deadline=None, database=None, derandomize=not LONG, suppress_health_check=list(HealthCheck)
)

# --- what is given where all is well -------------------------------------------------------------------------------


def _net(activation="kaf_elu"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.mlp(activation, hidden=(8,)).eval()


NET, CNN, WTA = _net(), None, _net("kwta")
X = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 9])
DIGITS = kafnb.load_data("digits")
RESULTS = pd.DataFrame(
    {"activation": ["a", "b"], "metric": ["clean"] * 2, "seed": [0, 0], "correct": [np.array([1, 0], bool)] * 2}
)

# --- what is not -----------------------------------------------------------------------------------------------------

nothing = st.sampled_from([None, "x", "", [], {}, b"1", object(), math, (), 1j, True])
words = st.text(max_size=8).filter(lambda s: s not in ("", "none", "ce", "margin", "dlr"))
below = lambda low: st.one_of(  # noqa: E731
    st.floats(max_value=low, exclude_max=True), st.integers(max_value=math.ceil(low) - 1)
)
endless = st.sampled_from([math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")])
fractions = st.floats(0.01, 1e6).filter(lambda v: v != int(v))


def number(low=0, above=None, high=None, optional=False):
    bad = [endless, below(low if above is None else above), nothing.filter(lambda v: not (optional and v is None))]
    bad += [st.just(above)] if above is not None else []
    bad += [st.floats(high, 1e30, exclude_min=True)] if high is not None else []
    return st.one_of(*bad)


def count(low=1, optional=False):
    bad = nothing.filter(lambda v: not (optional and v is None))
    return st.one_of(st.integers(-(2**70), low - 1), fractions, endless, bad, st.just(2.0), st.just(2**64))


def name(known=()):
    return st.one_of(words.filter(lambda s: s not in known), st.sampled_from([None, 3, [], ["relu"], {}, b"relu", 1.5]))


def thing(*accepted):
    return nothing.filter(lambda v: not any(v is a or (type(v) is type(a) and v == a) for a in accepted))


@st.composite
def bad_images(draw, dims=4, box=True):
    good = X if dims == 4 else X[0]
    kinds = ["byte", "one dimension", "size", "type", "channels"] + ["above", "below", "nan", "inf"] * box
    kind, i = draw(st.sampled_from(kinds)), draw(st.integers(0, good.numel() - 1))
    if kind in ("above", "below", "nan", "inf"):
        good = good.clone()
        value = {"nan": math.nan, "inf": math.inf, "below": -draw(st.floats(1e-3, 1e9))}
        good.view(-1)[i] = value.get(kind, 1 + draw(st.floats(1e-3, 1e9)))
        return good
    return {
        "byte": (good * 255).byte(), "one dimension": good.flatten(), "size": good[..., : 1 + i % 7],
        "type": draw(st.sampled_from([None, good.numpy(), good.tolist(), "images", 0.5])),
        "channels": torch.cat([good] * 3, -3),
    }[kind]  # fmt: skip


@st.composite
def bad_labels(draw):
    i, kind = (
        draw(st.integers(0, 2)),
        draw(st.sampled_from(["float", "short", "long", "beyond", "below", "shape", "type"])),
    )
    if kind in ("beyond", "below"):
        y = Y.clone()
        y[i] = draw(st.integers(10, 2**40)) if kind == "beyond" else draw(st.integers(-(2**40), -1))
        return y
    return {
        "float": Y.double() + 0.5, "short": Y[:i], "long": Y.repeat(2 + i), "shape": Y[:, None],
        "type": draw(st.sampled_from([None, [0, 1, 2], Y.numpy(), 3])),
    }[kind]  # fmt: skip


model, eps, seed = thing(), number(), st.one_of(fractions, endless, nothing, st.integers(2**62, 2**80))
optional_step = number(optional=True)
ATTACK = dict(model=model, x=bad_images(), y=bad_labels(), eps=eps)
ATTACKED = dict(model=NET, x=X, y=Y, eps=0.1)
PGD = dict(
    steps=count(), restarts=count(), step_size=optional_step, norm=name(attacks.NORMS), loss=name(),
    targeted=name(["all"]), surrogate=thing(None),
)  # fmt: skip
LABELED = dict(model=NET, x=X, y=Y)
pair = st.one_of(nothing, st.tuples(bad_images(box=False), st.just(Y)), st.tuples(st.just(X), bad_labels()))
width = dict(channels=count())
shape = dict(in_channels=count(), num_classes=count(2), activation=name(kafnb.ACTIVATIONS))

# function -> arguments with which it works (in a second or less), and what is bad for each
CALLS = [
    (KAF, dict(channels=2), dict(channels=count(), dictionary_size=count(2), boundary=number(above=0), kernel=name().filter(lambda v: v != ["relu"]), init=name().filter(lambda v: v is not None), bandwidth=number(above=0, optional=True), ridge=number())),
    (KAF(1), dict(x=X), dict(x=st.one_of(thing(), st.just(X.byte()), st.just(X.repeat(1, 3, 1, 1)), st.just(X[0, 0, 0])))),
    (KWTA, dict(ratio=0.5), dict(ratio=number(above=0, high=1))),
    (kafnb.activation, dict(name="relu", channels=2), dict(name=name(kafnb.ACTIVATIONS), channels=count())),
    *[(f, dict(channels=2), width) for f in (parametric.SReLU, parametric.APL, parametric.SAF, parametric.Maxout, parametric.PSSiLU)],
    (parametric.SAF, dict(channels=1), dict(points=count(4), boundary=number(above=0))),
    (parametric.Maxout, dict(channels=1), dict(pieces=count())),
    (models.mlp, {}, shape | dict(image_size=count(), hidden=st.one_of(thing([], ()), st.lists(count(), min_size=1)))),
    (models.textbook_cnn, dict(image_size=8), shape | dict(image_size=count(4), filters=thing([], ()), dropout=number(high=1))),
    (models.light_cnn, dict(image_size=8), shape | dict(image_size=count(4))),
    (models.vgg, dict(image_size=8), shape | dict(image_size=count(8))),
    (models.resnet, dict(depth=8, width=2), shape | dict(depth=count(8), block=name(models.BLOCKS), width=count(), image_size=count())),
    (models.build, dict(name="mlp", activation="relu", data=DIGITS), dict(name=name(), activation=name(kafnb.ACTIVATIONS))),
    (Recipe, {}, dict(method=name(), epochs=count(0), batch_size=count(), optimizer=name(), momentum=number(), lr=st.one_of(nothing, st.tuples(number(), number()), st.just((1, 0))), schedule=name(), peak=number(high=1), l2=optional_step, eps=eps, steps=count(), step_size=optional_step, replays=count(), strength=optional_step, augment=name(["none"]), precision=name(), clip=optional_step, track=count(0), watch=count(0), kwta_start=number(above=0, high=1, optional=True))),
    (Evaluation, {}, dict(attack=name(), labels=name(), eps=eps, steps=count(), step_size=optional_step, restarts=count(), norm=name(), n=count(optional=True), seed=seed, loss=name(), targeted=name(["all"]), queries=count())),
    (Experiment, {}, dict(data=st.sampled_from([None, 3, []]), model=st.sampled_from([None, 3, "../x", "a/b", "", ".x", "a\0", "x" * 200]), activation=st.sampled_from([None, 3, "../x", "a/b", "", "-rf", "a\nb"]), recipe=nothing, seed=seed, options=st.sampled_from([None, 3, "ab", {"x": object()}, [(1,)], [1]]))),
    (kafnb.run, dict(experiments=[]), dict(experiments=st.sampled_from([3, None, "mlp", [3], [None]]), evaluations=st.sampled_from([3, "pgd", [3]]), device=st.sampled_from(["tpu9", 3.5, "cuda:999", "", object()]))),
    (kafnb.load, {"experiment": None}, dict(experiment=nothing)),
    (kafnb.history, {"experiment": None}, dict(experiment=nothing)),
    (kafnb.load_data, dict(spec="digits"), dict(spec=name(), root=st.sampled_from([3, [], 1.5]))),
    (DIGITS.test, {}, dict(n=count(optional=True))),
    (DIGITS.validation_split, {}, dict(fraction=number(above=0, high=1))),
    (kafnb.fit, dict(model=_net(), data=DIGITS, recipe=Recipe(epochs=0)), dict(model=model, data=nothing, recipe=nothing, seed=seed, device=st.sampled_from(["tpu9", None, 1.5]), resume=st.sampled_from([{"model": 1}, {"x": 2}, [1], "checkpoint.pt"]))),
    (kafnb.training.range_test, dict(model=_net(), data=DIGITS, recipe=Recipe(), steps=2), dict(model=model, data=nothing, recipe=nothing, low=number(above=0), steps=count(2), seed=seed)),
    (attacks.fgsm, ATTACKED, ATTACK | dict(norm=name(attacks.NORMS), targeted=words)),
    (attacks.pgd, ATTACKED | dict(steps=1), ATTACK | PGD),
    *[(functools.partial(f, steps=1), ATTACKED, ATTACK) for f in (adaptive.neighbours, adaptive.kwta_smooth, adaptive.kwta_both, adaptive.double, adaptive.kaf_tails)],
    (adaptive.neighbours, ATTACKED | dict(steps=1), dict(draws=count(), radius=number(optional=True), loss=name())),
    (adaptive.kaf_annealed, ATTACKED | dict(steps=4), ATTACK | dict(steps=count())),
    (adaptive.transfer, ATTACKED | dict(steps=1, source=NET), ATTACK | dict(source=nothing)),
    (library.square, ATTACKED | dict(queries=1), ATTACK | dict(queries=count(), norm=name(attacks.NORMS))),
    (library.autoattack, ATTACKED | dict(attacks=("square",)), ATTACK | dict(norm=name(attacks.NORMS), attacks=st.sampled_from([(), None, 3, ("pgd",), [None], "square"]))),
    (library.cw, ATTACKED | dict(steps=1, searches=1), ATTACK | dict(eps=st.one_of(below(0), nothing, st.just(math.nan)), steps=count(), searches=count())),
    (library.deepfool, ATTACKED | dict(steps=1), ATTACK | dict(eps=st.one_of(below(0), nothing, st.just(math.nan)), steps=count())),
    (checklist.checklist, dict(model=NET, data=(X, Y), eps=0.1), dict(model=model, data=pair, eps=eps, n=count(optional=True), steps=count(), queries=count(), source=thing(None))),
    (checklist.loss_surface, dict(model=NET, x=X[0], y=1, eps=0.1, size=2), dict(model=model, x=bad_images(3), y=count(0), eps=eps, size=count(), seed=seed)),
    (evaluate.predict, dict(model=NET, x=X), dict(model=model, x=st.one_of(bad_images(box=False), st.just(X[:0])), batch_size=count())),
    (evaluate.clean_accuracy, dict(model=NET, data=(X, Y)), dict(model=model, data=st.one_of(pair, st.tuples(st.just(X * math.nan), st.just(Y))), n=count(optional=True), batch_size=count())),
    (evaluate.robust_accuracy, dict(model=NET, data=(X, Y), attack=lambda m, x, y: x), dict(model=model, attack=thing(None, [], ()), labels=name(), n=count(optional=True), batch_size=count(), seed=seed)),
    (evaluate.wilson, dict(successes=1, n=2), dict(successes=count(0), n=count())),
    (lipschitz.kaf_constant, dict(kaf=KAF(1)), dict(kaf=thing())),
    (lipschitz.kaf_bound, dict(kaf=KAF(1)), dict(kaf=thing(), kind=name())),
    (lipschitz.activation_constant, dict(module=nn.ReLU()), dict(module=thing())),
    (lipschitz.spectral_norm, dict(layer=nn.Linear(2, 2)), dict(layer=thing(), method=name(), iterations=count(), tolerance=number(above=0))),
    (lipschitz.network_bound, dict(model=NET, x=X), dict(model=model, x=st.one_of(bad_images(box=False), st.just(X[:0])), norm=name())),
    (lipschitz.local_bound, LABELED | dict(eps=0.1), ATTACK | dict(norm=name(attacks.NORMS))),
    (lipschitz.gradient_norms, LABELED, ATTACK | dict(norm=name(attacks.NORMS), samples=count(0), seed=seed)),
    (lipschitz.jacobian_norms, dict(model=NET, x=X), dict(model=model, x=bad_images(box=False), iterations=count(), seed=seed)),
    (lipschitz.clever, dict(model=NET, x=X[0], eps=0.1, batches=2, samples=2), dict(model=model, x=bad_images(3), eps=eps, norm=name(attacks.NORMS), batches=count(2), samples=count(), seed=seed)),
    (certify.margin_bound, LABELED | dict(eps=0.1), ATTACK | dict(method=name())),
    (certify.certified, LABELED | dict(eps=0.1, method="interval"), ATTACK | dict(method=name())),
    (certify.lipschitz_radius, dict(logits=NET(X).detach(), y=Y, constant=2.0), dict(logits=thing(), y=bad_labels(), constant=st.one_of(below(0), nothing, st.just(0), st.just(math.nan)))),
    (certify.Smoothed, dict(model=NET, sigma=0.1), dict(model=model, sigma=number(above=0), alpha=number(above=0, high=1), batch_size=count())),
    (certify.Smoothed(NET, 0.1).votes, dict(image=X[0], n=2), dict(image=bad_images(3), n=count())),
    (certify.Smoothed(NET, 0.1).certify, dict(image=X[0], n0=2, n=2), dict(image=bad_images(3), n0=count(), n=count())),
    (certify.lower_confidence, dict(successes=1, n=2, alpha=0.1), dict(successes=count(0), n=count(), alpha=number(above=0, high=1))),
    (gradients.measure, dict(model=NET, batch=(X, Y)), dict(model=model, batch=pair)),
    (gradients.growth_factor, dict(name="relu"), dict(name=name(kafnb.ACTIVATIONS))),
    (gradients.growth_factor, dict(name="relu", block="he", depth=8, seeds=1), dict(block=name([*models.BLOCKS]).filter(lambda v: v is not None), depth=count(8), image_size=count(), seeds=count())),
    (meanfield.predict, dict(activation="relu", depth=8, images=2), dict(activation=name(kafnb.ACTIVATIONS), block=name(models.BLOCKS), depth=count(8), image_size=count(), width=count(), images=count(2), seed=seed)),
    (lambda **k: probes.capture(**k).__enter__(), dict(model=NET, layers=["0"]), dict(model=model, layers=st.sampled_from([None, 3, ["nope"], "0x", [3]]), where=name())),
    (probes.stream, dict(model=NET, batches=[X], collectors={}), dict(model=model, batches=st.lists(bad_images(box=False), min_size=1, max_size=1), collectors=thing({}))),
    (probes.Histogram, {}, dict(bins=st.one_of(count(4), st.integers(0, 1000).map(lambda n: 4 * n + 1)))),
    (detect.Detector, dict(model=NET, clean=X, adversarial=1 - X), dict(model=model, clean=bad_images(), adversarial=bad_images())),
    (functools.partial(detect.joint_attack, detect.Detector(NET, X, 1 - X)), dict(x=X, y=Y, eps=0.1, steps=1), dict(x=bad_images(), y=bad_labels(), eps=eps, steps=count())),
    (compare.percent, dict(results=RESULTS), dict(results=st.one_of(nothing, st.just(RESULTS[["metric"]])))),
    (compare.difference, dict(results=RESULTS, a="a", b="b", metric="clean"), dict(results=nothing, a=name("ab"), b=name("ab"), metric=words)),
    (compare.mcnemar, dict(results=RESULTS, metric="clean"), dict(results=nothing, metric=words)),
    (collapse.collapsed, dict(history=[]), dict(history=st.one_of(thing([], (), {}), st.just([{}]), st.just(pd.DataFrame({"loss": [1.0]}))))),
    (figures.save_figure, dict(figure=None, name="x", table=RESULTS, folder="."), dict(name=st.sampled_from(["../x", "/etc/x", "a/b", "..", "", None, 3, "a\0b", ".hidden", "C:x", "x" * 300]), table=thing(), figure=thing())),
    (kafnb.Session, dict(notebook="x"), dict(notebook=st.sampled_from(["../x", "a/b", "", None, 3]), profile=name(), seed=seed, device=name(["auto"]))),
    (kafnb.PROFILES["quick"].recipe, dict(model="mlp"), dict(model=name(), method=name(), epochs=count(0))),
    (kafnb.PROFILES["quick"].evaluation, {}, dict(labels=name(), attack=name(), n=count(optional=True))),
    (notebooks.select, {}, dict(only=st.one_of(st.lists(words, min_size=1), thing([], (), None, ""), st.just([3])))),
    (notebooks.run_notebooks, dict(only=["none"]), dict(profile=name(), only=st.just(["77"]), seed=seed, jobs=count(optional=True), device=name(["auto"]))),
]  # fmt: skip


def told_in_one_line(call, arguments):
    """What is wrong with how ``call`` refuses ``arguments``, or an empty text."""
    try:
        with torch.random.fork_rng():
            call(**arguments)
    except (ValueError, TypeError) as error:
        frame = error.__traceback__
        while frame.tb_next is not None:
            frame = frame.tb_next
        where, text = frame.tb_frame.f_code.co_filename, str(error)
        if not where.startswith(PACKAGE):
            return f"raised in {where}:{frame.tb_lineno}: {type(error).__name__}: {text}"
        if "\n" in text or not 10 < len(text) < 500:
            return f"not one clear line: {text!r}"
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def title(entry):
    call = getattr(entry[0], "func", entry[0])
    return f"{getattr(call, '__module__', '')}.{getattr(call, '__qualname__', type(call).__name__)}"


@pytest.mark.parametrize("entry", CALLS, ids=title)
def test_one_bad_argument_gets_one_line(entry, note, home):
    call, good, bad = entry
    number_of_cases, losses = 0, []

    @cases(max_examples=250 if LONG else 8)
    @given(st.data())
    def ask(data):
        nonlocal number_of_cases
        field = data.draw(st.sampled_from(sorted(bad)))
        value = data.draw(bad[field])
        number_of_cases += 1
        if complaint := told_in_one_line(call, good | {field: value}):
            losses.append(f"{title(entry)}({field}={checks.shown(value)}): {complaint}")
        assert not losses, losses[-1]

    try:
        ask()
    finally:
        note("one bad argument of a public function", number_of_cases, len(losses) > 0)


def test_the_good_arguments_are_good(home):
    """Else the test above would prove nothing. (Of those that need more than arguments, one part.)"""
    skipped = {"load", "history", "run_notebooks", "save_figure", "checklist"}
    for call, good, _ in CALLS:
        if getattr(getattr(call, "func", call), "__name__", "") not in skipped:
            call(**good)


def test_nearest_names_are_suggested():
    for call, near in (
        (lambda: kafnb.activation("kaf_swosh", 2), "kaf_swish"),
        (lambda: Recipe("fgsm_sr"), "fgsm_rs"),
        (lambda: Evaluation("pdg"), "pgd"),
        (lambda: models.build("reznet20", "relu", DIGITS), "resnet20"),
        (lambda: models.build("mlp", "relu", DIGITS, hiden=(3,)), "hidden"),
        (lambda: KAF(1, kernel="gausian"), "gaussian"),
        (lambda: attacks.pgd(NET, X, Y, eps=0.1, loss="margn"), "margin"),
        (lambda: attacks.pgd(NET, X, Y, eps=0.1, norm="lin"), "linf"),
    ):
        with pytest.raises(ValueError, match=f"did you mean '{near}'"):
            call()


# --- good input is not refused, and stays what it was ----------------------------------------------------------------

some = st.floats(0, 1, allow_subnormal=False)


@cases(max_examples=1500 if LONG else 30)
@given(
    eps=some,
    steps=st.integers(1, 9),
    restarts=st.integers(1, 3),
    norm=st.sampled_from(attacks.NORMS),
    n=st.one_of(st.none(), st.integers(1, 99)),
    seed=st.integers(-5, 2**31),
)
def test_any_evaluation_keeps_its_values(eps, steps, restarts, norm, n, seed):
    given_ = dict(eps=eps, steps=steps, restarts=restarts, norm=norm, n=n, seed=seed)
    made = Evaluation("pgd", **given_)
    assert {k: getattr(made, k) for k in given_} == given_
    numpy = {k: np.float64(v) if k == "eps" else np.int64(v) if isinstance(v, int) else v for k, v in given_.items()}
    assert kafnb.store.key_of(Evaluation("pgd", **numpy)) == kafnb.store.key_of(made)


@cases(max_examples=800 if LONG else 10)
@given(
    eps=st.floats(0, 1),
    steps=st.integers(1, 3),
    norm=st.sampled_from(attacks.NORMS),
    n=st.integers(0, 3),
    loss=st.sampled_from(["ce", "margin", "dlr"]),
)
def test_any_attack_stays_in_ball_and_box(eps, steps, norm, n, loss):
    x = attacks.pgd(NET, X[:n], Y[:n], eps=eps, steps=steps, norm=norm, loss=loss)
    assert x.shape == X[:n].shape and (n == 0 or (x.min() >= 0 and x.max() <= 1))
    assert (attacks.balls.size(x - X[:n], norm) <= eps * (1 + 1e-4) + 1e-5).all()


@cases(max_examples=2000 if LONG else 100)
@given(st.text(max_size=130))
def test_a_files_name_stays_in_its_folder(text):
    try:
        checks.file_name(text, "a name")
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        base = Path("/a/store")
        assert Path(os.path.normpath(base / f"{text}.png")).parent == base and "\0" not in text
