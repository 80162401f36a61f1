"""Short or long: ``make torture`` sets the variable."""

import os

LONG = os.environ.get("KAFNB_TORTURE") == "long"
