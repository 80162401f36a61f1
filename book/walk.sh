#!/bin/sh
# A newcomer's first hour, timed: sh book/walk.sh REPOSITORY EMPTY_FOLDER. Prints what book/walk.csv records.
set -e
unset PYTHONPATH KAFNB_HOME
step() { name=$1; shift; s=$(date +%s); "$@" > step.log 2>&1; echo "$name,$(( $(date +%s) - s )),$(cut -d' ' -f1 /proc/loadavg)"; }
cd "$2"
step "clone" git clone -q "$1" walk
cd walk
step "install" make .venv/ready
step "first figures: notebook 02" .venv/bin/python -m kafnb figures --only 02 --jobs 1
.venv/bin/python -c 'import re; print(re.findall(r"```python\n(.*?)```", open("README.md").read(), re.S)[0])' > own.py
step "own activation" .venv/bin/python own.py
cat > row.py <<'P'
import kafnb, pandas as pd
nb = kafnb.Session("14_resnet20_evaluation")
row = nb.run(nb.experiment("resnet20", "relu", nb.profile.recipe("resnet20")), [nb.profile.evaluation()])
stored = pd.read_csv("figures/quick/14_resnet20_evaluation_protocols.csv").set_index("activation").loc["relu"]
assert all(abs(rate - stored[metric]) < 0.03 for metric, rate in zip(row.metric, row.rate))
P
step "a table's row" .venv/bin/python row.py
step "book" make book
