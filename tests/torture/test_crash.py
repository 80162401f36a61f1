"""Killed at any moment, out of space, on a read-only disk, two at once: nothing that was finished is lost."""

import collections
import multiprocessing
import os
import random
import subprocess
import sys
import time

import pytest

import kafnb

sys.path.insert(0, os.path.dirname(__file__))
import victim

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(
    ["kafnb", "sklearn.datasets", "sklearn.model_selection", "matplotlib.pyplot", "torch._dynamo"]
)


def start(home, **options):
    process = START.Process(target=victim.work, args=(home,), kwargs=options)
    process.start()
    return process


def finish(process, seconds=120):
    process.join(seconds)
    alive = process.is_alive()
    process.kill()
    process.join()
    return "blocked" if alive else process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the programme leaves behind uninterrupted, and the seconds it takes."""
    home = tmp_path_factory.mktemp("whole")
    finish(start(home / "warm"))
    began = time.perf_counter()
    assert finish(start(home / "timed")) == 0
    seconds = time.perf_counter() - began
    expected = victim.snapshot(home / "timed")
    assert len(expected) == 2 * (1 + 1 + 3) + 1 + 2  # weights, history, evaluations; the table; the figure
    assert victim.snapshot(home / "warm") == expected  # else nothing here means anything
    return expected, seconds


@pytest.mark.parametrize("kind", ["at a random time", "at a random write"])
def test_killed_and_restarted(kind, whole, tmp_path, tries, note):
    expected, seconds = whole
    generator, kills, losses, home, phases = random.Random(0), 0, [], tmp_path / "0", collections.Counter()
    wanted = tries(3, 50)
    while True:
        phase = START.Array("c", 20)
        if kind == "at a random write":
            process = start(home, phase=phase, die_at=generator.randint(1, generator.choice((12, 50, 200))))
            code = finish(process)
        else:
            process = start(home, phase=phase)
            while process.is_alive() and not phase.value:  # the start of Python is not ours
                time.sleep(0.001)
            process.join(victim.delay(generator, seconds))
            process.kill()
            process.join()
            code = process.exitcode
        if code == -9:
            kills += 1
            phases[phase.value.decode()] += 1
        elif code != 0:
            losses.append(f"after {kills} kills: exit {code}")
        if code == 0 or kills >= wanted:
            if code != 0 and (code := finish(start(home))) != 0:
                losses.append(f"restart: exit {code}")
            if victim.snapshot(home) != expected or victim.unsound(home):
                losses.append(f"other results after {kills} kills")
            home = tmp_path / str(kills)
        if kills >= wanted or losses:
            break
    print(kind, dict(phases))
    note(f"killed (SIGKILL) {kind} and restarted", kills, len(losses))
    assert not losses and kills >= wanted


def test_killed_while_it_holds_the_lock_blocks_nobody(whole, tmp_path):
    process = start(tmp_path, die_at=5)
    assert finish(process) == -9 and list((tmp_path / "results" / ".locks").iterdir())
    began = time.perf_counter()
    assert finish(start(tmp_path)) == 0 and time.perf_counter() - began < 30 + whole[1]


def answer_of(home, **options):
    ours, theirs = START.Pipe()
    process = start(home, answer=theirs, **options)
    code = finish(process)
    return code, ours.recv() if ours.poll() else ""


def one_clear_line(text):
    return "cannot write" in text and "\n" not in text and text.split(":")[0].endswith("Error")


def test_write_errors(whole, tmp_path, tries, note):
    """From a random write on the disk is full (ENOSPC); then there is room again."""
    generator, losses, n = random.Random(1), 0, tries(2, 50)
    for i in range(n):
        home = tmp_path / str(i % 10)
        fail_at = generator.randint(1, 25)
        code, text = answer_of(home, fail_at=fail_at)
        if code != 0 or (text and not one_clear_line(text)) or victim.unsound(home):
            losses += 1
            print(fail_at, code, text, victim.unsound(home))
        if not text or i >= n - 10:
            losses += finish(start(home)) != 0 or victim.snapshot(home) != whole[0]
    note("disk full (write error ENOSPC from a random write on)", n, losses)
    assert losses == 0


def test_file_size_limit(whole, tmp_path, tries, note):
    """RLIMIT_FSIZE: no file may grow beyond so many bytes."""
    generator, losses, n = random.Random(2), 0, tries(1, 30)
    for i in range(n):
        home, limit = tmp_path / str(i), generator.randint(100, 14_000)
        code, text = answer_of(home, limit=limit)
        # what fits under the limit gets through, and must be whole then
        well = one_clear_line(text) if text else victim.snapshot(home) == whole[0]
        if code != 0 or not well or victim.unsound(home):
            losses += 1
            print(limit, code, text)
    losses += finish(start(tmp_path / "0")) != 0 or victim.snapshot(tmp_path / "0") != whole[0]
    note("disk full (largest file size, RLIMIT_FSIZE)", n, losses)
    assert losses == 0


@pytest.fixture
def small_disk(tmp_path):
    """``resize(options)`` mounts a disk of its own, or changes it; needs root on Linux."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def resize(options):
        mounted = os.path.ismount(disk)
        how = f"remount,{options}" if mounted else options
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(disk)], capture_output=True, text=True)
        if done.returncode and not mounted:
            pytest.skip(f"no disk of its own can be mounted here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        return disk

    yield resize
    subprocess.run(["umount", str(disk)], capture_output=True)


def test_full_disk(whole, small_disk, tries, note):
    """A real one: a tmpfs of a few pages, which grows between the tries until the programme gets through."""
    losses, n, pages = 0, 0, 3
    step = tries(60, 2)
    while True:
        home = small_disk(f"size={4 * pages}k")
        code, text = answer_of(home)
        n += 1
        if not text and code == 0:
            break
        if code != 0 or not (one_clear_line(text) or "cannot lock" in text) or victim.unsound(home):
            losses += 1
            print(pages, code, text)
        if kept := list(home.rglob("*.damaged*")):  # tries that leave something behind would fill the disk for good
            losses += 1
            print(pages, kept)
            break
        pages += step
    losses += victim.snapshot(home) != whole[0]
    note("disk full (a tmpfs that grows page by page)", n, losses)
    assert losses == 0 and n >= 2


def test_read_only_disk(whole, small_disk, monkeypatch, note):
    """What is finished is read; what is not is refused in one line."""
    home = small_disk("size=8m")
    assert finish(start(home)) == 0
    small_disk("ro,size=8m")
    monkeypatch.setenv("KAFNB_HOME", str(home))
    monkeypatch.setattr("kafnb.results.fit", None)
    table = kafnb.run(victim.EXPERIMENTS, victim.EVALUATIONS)
    code, text = answer_of(home)  # gets as far as the figure
    new = kafnb.Evaluation("fgsm", eps=0.2)
    with pytest.raises(OSError, match=r"cannot write .*Read-only") as refused:
        kafnb.run(victim.EXPERIMENTS[0], [new])
    lost = len(table) != 6 or code != 0 or not one_clear_line(text) or "\n" in str(refused.value)
    lost |= victim.snapshot(home) != whole[0]
    note("read-only disk", 3, lost)
    assert not lost


def test_two_processes_on_one_store(whole, tmp_path, tries, note):
    """The same experiments in either order, and one alone: each trains once, all come out the same."""
    losses, n = 0, tries(1, 20)
    evaluations_and_weights = {k: v for k, v in whole[0].items() if "99_" not in k}
    for i in range(n):
        home, gate = tmp_path / str(i), START.Barrier(3)
        home.mkdir()
        orders = [(0, 1), (1, 0), (i % 2,)]
        processes = [START.Process(target=victim.race, args=(home, order, gate)) for order in orders]
        for p in processes:
            p.start()
        codes = [finish(p) for p in processes]
        trained = sorted((home / "trained.log").read_text().split("\n")[:-1])
        bad = codes != [0, 0, 0] or trained != ["fgsm_rs 0", "standard 1"] or victim.unsound(home)
        losses += bool(bad) or victim.snapshot(home) != evaluations_and_weights
    note("three processes at once on one store, same and different experiments", n, losses)
    assert losses == 0
