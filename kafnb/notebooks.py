"""Run the notebooks headless, through papermill."""

import dataclasses
import json
import os
import sys
import textwrap
import time
from concurrent.futures import as_completed

from tqdm import tqdm

from . import checks, engines, findings
from .figures import read_manifest, update_manifest
from .paths import home, write_atomically
from .poster import save_poster
from .profiles import PROFILES, resolve_data, resolve_device
from .widgets import VIEW

# notebook -> (section of the thesis, title); the map in README and notebook 00 is drawn from this
PROGRAMME = {
    "00_start_here": ("", "Start here: installation check, map, a two-minute tour"),
    "01_neural_networks": ("2.1.1-2.1.2", "Neural networks and how they learn"),
    "02_activation_functions": ("2.1.3", "Activation functions"),
    "03_convolutional_networks": ("2.1.4-2.1.5", "Convolutional networks"),
    "04_adversarial_examples": ("2.2", "Adversarial examples"),
    "05_defenses": ("2.3", "Defences"),
    "06_kernel_activation_functions": ("2.4", "Kernel activation functions"),
    "07_k_winners_take_all": ("3.1", "k-winners-take-all"),
    "08_smooth_adversarial_training": ("3.2", "Smooth adversarial training"),
    "09_activation_distributions": ("4", "Activation distributions"),
    "10_lipschitz": ("4.1", "Lipschitz constants"),
    "11_fast_adversarial_training": ("4.2", "Fast adversarial training"),
    "12_vgg_evaluation": ("5.1", "VGG-inspired networks"),
    "13_exploding_gradients": ("5.2", "Exploding gradients"),
    "14_resnet20_evaluation": ("5.3", "ResNet20"),
    "15_adaptive_attacks": ("6", "Adaptive attacks"),
    "16_kernels_and_scale": ("6", "Kernels and scale"),
    "17_errata": ("all", "Errata, measured"),
    "18_conclusions": ("7", "Conclusions: the claims and their verdicts"),
}


def available():
    """Names of the notebooks that are there, in order."""
    return sorted(p.stem for p in (home() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def select(only=()):
    """The notebooks whose number or name is in ``only``; all for none.

    Raises
    ------
    ValueError
        Nothing of that name.
    """
    checks.instance(only, list | tuple, "only")
    for name in only:
        checks.instance(name, str, "a notebook")
    names = available()
    if not only:
        return names
    chosen = {o: [n for n in names if n == o or n.split("_")[0] == o.zfill(2)] for o in only}
    if missing := [o for o, found in chosen.items() if not found]:
        raise ValueError(
            f"no notebook {checks.shown(', '.join(missing))} in {home() / 'notebooks'}; there are {', '.join(names)}"
        )
    return sorted({n for found in chosen.values() for n in found})


@dataclasses.dataclass
class Outcome:
    """How one notebook went; ``error`` is empty if well. ``unmet`` counts its checks that do not hold."""

    name: str
    seconds: float
    error: str = ""
    unmet: int = 0


def _execute(name, profile, parameters, environment, position):
    """Run one notebook in this process; its kernel is a process of its own."""
    import papermill

    os.environ |= environment  # the kernel inherits it
    source, target = home() / "notebooks" / f"{name}.ipynb", home() / "runs" / profile / f"{name}.ipynb"
    started, error, unmet = time.perf_counter(), "", 0
    bar = {"position": position, "desc": name, "leave": False, "disable": not sys.stderr.isatty()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # its kernel would warn that it talks over TCP, and say that it was stopped
        how = {"progress_bar": bar, "extra_arguments": ["--log-level=CRITICAL"]}
        executed = papermill.execute_notebook(
            source, target, parameters, kernel_name="python3", cwd=source.parent, **how
        )
        unmet = findings.count(executed)
    except papermill.PapermillExecutionError as e:
        error = f"cell {e.exec_count} failed: {e.ename}: {textwrap.shorten(e.evalue, 300)}"  # the notebook has it all
    except Exception as e:  # a notebook that cannot start must not stop the others
        error = f"{type(e).__name__}: {e}"
    return Outcome(name, time.perf_counter() - started, " ".join(error.split()), unmet)


def run_notebooks(
    profile="quick", only=(), seed=0, device="auto", data_root=None, jobs=None, engine="local", address=None,
    stored=False,
):  # fmt: skip
    """Execute notebooks into runs/<profile>/, their figures into figures/<profile>/.

    Goes on after a notebook that fails. Running times go into the manifest, apart for a store that was empty at
    the start ("from nothing") and one that had all it took.

    Parameters
    ----------
    jobs : int, optional
        Notebooks at a time, each on an equal share of the cores; default one a core on CPU, 1 on a GPU and for an
        engine that uses all of this machine.
    engine, address : str
        Of ``kafnb.run``, for all experiments of the notebooks.
    stored : bool
        Train and attack nothing: draw what the store has. Then no GPU is needed, and no running time is kept.

    Returns
    -------
    list of Outcome
    """
    checks.pick(PROFILES, profile, "profile")
    checks.seed(seed)
    checks.count(jobs, "jobs", optional=True)
    names, cores = select(only), os.cpu_count() or 1
    engines.check(engine)
    resolved = resolve_device(device, PROFILES[profile].needs_gpu and engine != "ray" and not stored)
    device = device if engine == "ray" else resolved  # a cluster has its own
    resolve_data(PROFILES[profile], data_root)
    many = resolved == "cpu" and (engine == "local" or address)
    share = jobs or (cores if many else 1)
    jobs = min(len(names), share) or 1
    parameters = dict(profile=profile, seed=seed, device=device, data_root=str(data_root) if data_root else None)
    store = home() / "results"
    stocked = lambda: {p.parent.name for p in store.glob("*/SHA256SUMS")}  # noqa: E731
    manifest = read_manifest(home() / "figures" / profile).get("notebooks", {})
    names.sort(key=lambda n: -manifest.get(n, {}).get("seconds_from_nothing", 0))  # the longest first
    before = stocked()
    threads = str(max(1, cores // share))  # for one notebook alone, too: small tensors gain nothing from more
    environment = {"KAFNB_PROGRESS": "0", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    # glibc keeps what is freed: handing memory back makes each large tensor touch fresh pages
    environment |= {"MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
    environment["GOMP_SPINCOUNT"] = "1000"  # threads that wait give up their core soon: another process may need it
    environment |= {"KAFNB_ENGINE": engine, "KAFNB_ADDRESS": address or "", "KAFNB_STORED": str(int(stored))}
    outcomes = []
    with (
        engines.pool(jobs) as pool,
        tqdm(total=len(names), desc=f"{profile} notebooks", unit="notebook", position=0) as bar,
    ):
        futures = [
            pool.submit(_execute, n, profile, parameters, environment, 1 + i % jobs) for i, n in enumerate(names)
        ]
        for future in as_completed(futures):
            outcome = future.result()
            outcomes.append(outcome)
            unmet = f", {outcome.unmet} checks do not hold" * bool(outcome.unmet)
            bar.write(f"{outcome.name}: {outcome.error or 'done'} ({outcome.seconds:.0f} s){unmet}")
            bar.update()
            if not (outcome.error or stored or (before and stocked() - before)):  # part of it trained: neither time
                kind = "seconds" if before else "seconds_from_nothing"
                first = manifest.get(outcome.name, {}) if before else {}  # a first run starts anew
                entry = first | {kind: round(outcome.seconds), "jobs": jobs, "cores": cores, "unmet": outcome.unmet}
                update_manifest(home() / "figures" / profile, "notebooks", outcome.name, entry)
    save_poster(profile)
    return sorted(outcomes, key=lambda o: o.name)


def keep_outputs(name, profile="quick"):
    """Copy the outputs of an executed notebook back into notebooks/, without papermill's traces and timings."""
    executed = json.loads((home() / "runs" / profile / f"{name}.ipynb").read_text())
    path = home() / "notebooks" / f"{name}.ipynb"
    notebook = json.loads(path.read_text())
    outputs = {c["id"]: c.get("outputs") for c in executed["cells"]}
    # counted anew: the cell in which papermill sets the parameters is not there
    for count, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), start=1):
        cell["outputs"], cell["execution_count"] = outputs[cell["id"]], count
        for output in cell["outputs"]:
            output.get("data", {}).pop(VIEW, None)  # no sliders without their kernel
            if "execution_count" in output:
                output["execution_count"] = count
    write_atomically(path, lambda p: p.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"))
