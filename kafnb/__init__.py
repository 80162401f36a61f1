"""kafnb: the companion of "Robustness of Deep Neural Networks Using Trainable Activation Functions".

Table of contents, in the order of the story:

    kaf, kwta, parametric, activations    the non-linearities
    kernels, mixture, grid and grid_*     how a KAF is evaluated: eagerly, compiled, on CUDA
    models, data, methods, training       networks, images, how the one learns the other
    probes, lipschitz and lipschitz_*     what goes on inside, and how fast it can change
    gradients, meanfield                  how gradients grow with depth: measured and predicted
    attacks, evaluate                     fooling them, and counting honestly
    collapse, detect                      training that fools itself; recognising attacks, and why that fails
    curves, bounds, crown, certify        proofs that no attack exists: intervals, lines, constants, votes
    experiments, store                    describe, train or load, keep
    profiles, figures, diagrams           sizes, pictures, pictures of networks
    notebooks                             running it all
"""

from . import attacks, diagrams, evaluate, figures, gradients, lipschitz, models, notebooks, paths, probes, training
from .activations import ACTIVATIONS, activation
from .data import Data, load_data
from .experiments import Evaluation, Experiment, history, load, run
from .kaf import KAF
from .kwta import KWTA
from .paths import VERSION as __version__
from .profiles import PROFILES, Session
from .training import Recipe, fit

__all__ = [
    "ACTIVATIONS", "Data", "Evaluation", "Experiment", "KAF", "KWTA", "PROFILES", "Recipe", "Session", "__version__",
    "activation", "attacks", "diagrams", "evaluate", "figures", "fit", "gradients", "history", "lipschitz", "load",
    "load_data", "models", "notebooks", "paths", "probes", "run", "training",
]  # fmt: skip
