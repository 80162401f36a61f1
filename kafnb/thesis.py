"""What the thesis reports, to stand beside what is computed here. Quoted, not computed.

CIFAR-10; clean accuracy and accuracy under attack, in per cent; one seed each; with the range of the one-cycle learning
rate where it is given. The attack is PGD at 8/255 with 50 steps and 10 restarts, that of chapter 4 at 0.031 with steps
of 0.003, 40 of them (or 40 restarts: the text is unclear).
"""

import pandas as pd

VGG = {  # section 5.1
    "relu": (1e-4, 0.08, 78.1, 45.41),
    "elu": (1e-4, 0.1, 73.99, 45.49),
    "kaf": (0.01, 1.0, 77.93, 46.8),
    "kaf_elu": (1e-4, 0.1, 74.93, 45.4),
    "swish": (1e-4, 0.3, 76.99, 47.73),
    "kaf_swish": (1e-4, 0.8, 78.85, 46.33),
    "kaf_free": (0.01, 2.0, 77.54, 46.2),
}
_NONE = float("nan")
RESNET20 = {  # section 5.3
    "relu": (_NONE, _NONE, 77.52, 50.17),
    "elu": (_NONE, _NONE, 75.42, 51.69),
    "swish": (_NONE, _NONE, 78.68, 53.88),
    "kaf": (_NONE, _NONE, 78.08, 52.23),
    "kaf_relu": (0.01, 0.8, 79.65, 51.44),
    "kaf_elu": (_NONE, _NONE, 78.69, 52.76),
    "kaf_swish": (_NONE, _NONE, 79.21, 52.10),
    "kaf_free": (_NONE, _NONE, 78.88, 52.07),
}
EPOCHS = {"light_cnn": "20; k-WTA 50", "vgg": "60", "resnet": "80, then 20 at falling rates"}
LIGHT_CNN = {"relu": (76.3, 11.2), "kwta": (67.3, 13.2), "kaf": (68.9, 15.7)}  # chapter 4, 1,000 images


def table(rows):
    """One of the tables above as a DataFrame: activation, lr low, lr high, clean %, PGD-50-10 %."""
    columns = ["lr low", "lr high", "clean %", "PGD-50-10 %"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("activation")
