"""kafnb: the companion of "Robustness of Deep Neural Networks Using Trainable Activation Functions".

Table of contents, in the order of the story:

    kaf/, kwta, parametric, activations   the non-linearities; kaf/ holds how a KAF is evaluated
    models, data                          networks and images
    methods, recipe, training             how the one learns the other
    gradients, meanfield                  how gradients grow with depth: measured and predicted
    attacks/, evaluate, evaluations       fooling them, counting honestly, describing what was counted
    collapse, detect                      training that fools itself; recognising attacks, and why that fails
    probes, lipschitz/                    what goes on inside, and how fast it can change
    certify/                              proofs that no attack exists: intervals, lines, constants, votes
    experiments, results, provenance      describe, train or load, measure, and where it came from
    pretrained                            trained networks that come with the package, a card each
    store, integrity                      what is kept, and how nothing of it is lost
    engines, cluster                      the same on several processes or machines
    distributed/, imagenet/               one model on several processes; the recipe for ImageNet
    profiles, checks                      the sizes, and what callers may pass
    compare, thesis, errata               paired tests; what the thesis reports, and its own ways
    figures, diagrams, alttext, poster    pictures, and pictures in words
    views, widgets                        sliders above a picture
    notebooks, findings, dryrun, summary  running it all, at full size or dry; checks that report; README tables
"""

from . import (
    attacks,
    certify,
    diagrams,
    distributed,
    evaluate,
    figures,
    gradients,
    lipschitz,
    models,
    notebooks,
    paths,
    pretrained,
    probes,
    training,
)
from .activations import ACTIVATIONS, activation
from .data import Data, load_data
from .evaluations import Evaluation
from .experiments import Experiment, history, load, run
from .kaf import KAF
from .kwta import KWTA
from .paths import VERSION as __version__
from .profiles import PROFILES, Session
from .recipe import Recipe
from .training import fit

__all__ = [
    "ACTIVATIONS", "Data", "Evaluation", "Experiment", "KAF", "KWTA", "PROFILES", "Recipe", "Session", "__version__",
    "activation", "attacks", "certify", "diagrams", "distributed", "evaluate", "figures", "fit", "gradients", "history",
    "lipschitz", "load", "load_data", "models", "notebooks", "paths",
    "pretrained", "probes", "run", "training",
]  # fmt: skip
