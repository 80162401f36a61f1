"""Shared by all tests: one thread, no progress bars, a small data set, small networks."""

import os

import pytest
import torch

import kafnb

torch.set_num_threads(1)
# the kernels that nbval starts inherit it: more than a thousand updates of a bar, and messages behind them are lost
os.environ.setdefault("KAFNB_PROGRESS", "0")


@pytest.fixture(scope="session")
def digits():
    return kafnb.load_data("digits")


@pytest.fixture
def tiny(digits):
    """The first 200 training and 60 test digits."""
    import dataclasses

    cut = dict(x_train=digits.x_train[:200], y_train=digits.y_train[:200])
    return dataclasses.replace(digits, **cut, x_test=digits.x_test[:60], y_test=digits.y_test[:60])


@pytest.fixture
def net():
    """A convolutional network in eval mode, float64, for 8x8 grey images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kafnb.models.light_cnn("swish", in_channels=1, image_size=8).double().eval()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(13, 1, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 10, (13,), generator=generator)


def pytest_collection_modifyitems(items):
    """Files that take long first, so that the workers end together: notebooks by their measured times, slow tests."""
    from kafnb import figures, paths

    measured = figures.read_manifest(paths.home() / "figures" / "quick").get("notebooks", {})
    seconds = {name: entry.get("seconds_from_nothing", 0) for name, entry in measured.items()}
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("browser")}
    items.sort(key=lambda item: (-seconds.get(item.path.stem, 0), item.path not in slow))


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_json(benchmarks):
    """Without the one that was interrupted: it has no times, and the others' would be lost with it."""
    benchmarks[:] = [b for b in benchmarks if b.stats.data]


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """``make bench``: keep the table, and on which machine it was measured, in figures/benchmark/."""
    import pandas as pd

    from kafnb import figures, paths, provenance

    def cpu_time(stats):
        return {"median_ms": 1e3 * stats["median"], "min_ms": 1e3 * stats["min"], "rounds": stats["rounds"]}

    rows = [
        {"case": b["name"]}
        | ({} if "median_ms" in b["extra_info"] else cpu_time(b["stats"]))  # a GPU's is in there
        | {**(b["params"] or {}), **b["extra_info"]}
        for b in output_json["benchmarks"]
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = paths.home() / "figures" / "benchmark"
    paths.write_atomically(
        folder / f"kaf_{device}.csv", lambda p: pd.DataFrame(rows).to_csv(p, index=False, lineterminator="\n")
    )
    where = {
        "device": provenance.device_name(device),
        "processor": output_json["machine_info"]["cpu"].get("brand_raw", ""),
    }
    figures.update_manifest(folder, "tables", f"kaf_{device}", where | provenance.provenance())
