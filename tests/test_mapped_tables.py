"""CF vectors that stay on disk equal those in memory, and need no more memory than their rows."""

import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ckf.batches import VectorLookup
from ckf.cf import CFVectors, fit_fold_in, load_vectors
from ckf.cf import tables as module
from ckf.cf.tables import MappedTable

USERS, ITEMS, DIM = 50, 20, 6


@pytest.fixture
def raw(monkeypatch):
    """User and item tables; a few rows are unknown. Chunks of 7 rows, so that there are many."""
    monkeypatch.setattr(module, "_CHUNK_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    users = torch.randn(USERS, DIM, generator=generator) * 3 + 100
    users[[0, 13, 49]] = 0
    users[:, 2] = torch.where(users[:, 0] != 0, 7.0, 0.0)  # a column without spread
    return users, torch.randn(ITEMS, DIM, generator=generator)


def write(path, table, kind):
    if kind == "npy":
        np.save(path.with_suffix(".npy"), table.numpy())
        return path.with_suffix(".npy")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[kind]
    save_file({"other": torch.zeros(3), "users": table.to(dtype)}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def both(raw, tmp_path, kind="npy"):
    """The same vectors in memory and mapped, with their fold-in."""
    users, items = write(tmp_path / "u", raw[0], kind), tmp_path / "i.npy"
    np.save(items, raw[1].numpy())
    liked = np.repeat(np.arange(USERS), 4), np.arange(4 * USERS) * 7 % ITEMS
    return [
        fit_fold_in(load_vectors(users, items, USERS, ITEMS, above), *liked) for above in (2**30, 0)
    ]


@pytest.mark.parametrize("kind", ["npy", "bf16", "fp16", "fp64"])
def test_mapped_rows_equal_rows_in_memory(kind, raw, tmp_path):
    held, mapped = both(raw, tmp_path, kind)
    assert isinstance(held.users, torch.Tensor) and isinstance(mapped.users, MappedTable)
    assert torch.equal(held.user_known, mapped.user_known) and int(held.user_known.sum()) == 47
    assert torch.equal(held.fold_in, mapped.fold_in)
    index = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(mapped.users[index], held.users[index])
    assert torch.equal(mapped.score(index, index % ITEMS), held.score(index, index % ITEMS))


def test_statistics_in_chunks_equal_those_of_the_whole(raw, tmp_path):
    held, mapped = (v.standardised() for v in both(raw, tmp_path))
    everyone = torch.arange(USERS)
    found = mapped.users[everyone]
    # Values up to about 3, rounded once to float32; the statistics differ by fp64 roundings.
    torch.testing.assert_close(found, held.users, rtol=2e-7, atol=2e-7)
    assert (found[~mapped.user_known] == 0).all() and (found[:, 2] == 0).all()
    torch.testing.assert_close(mapped.fold_in, held.fold_in, rtol=1e-6, atol=1e-7)


def test_lookups_and_copies_in_workers(raw, tmp_path):
    held, mapped = (VectorLookup(v) for v in both(raw, tmp_path))
    users, history = np.array([-1, 5, 13]), np.array([[1, 2], [-1, 3], [-1, -1]])
    expected = held.users(users, history)
    for lookup in (mapped, pickle.loads(pickle.dumps(mapped))):
        torch.testing.assert_close(lookup.users(users, history), expected, rtol=1e-6, atol=1e-6)
    assert len(pickle.dumps(mapped.vectors.users)) < 3000  # the path, not the rows


def test_mapped_vectors_are_saved_in_chunks_and_load_either_way(raw, tmp_path):
    held, mapped = both(raw, tmp_path)
    held.save(tmp_path / "held.safetensors")
    mapped.save(tmp_path / "mapped.safetensors")
    one, two = (load_file(tmp_path / f"{n}.safetensors") for n in ("held", "mapped"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    for above, kind in ((0, MappedTable), (2**30, torch.Tensor)):
        found = CFVectors.load(tmp_path / "mapped.safetensors", above)
        assert isinstance(found.users, kind) and found.score_form == "dot"
        assert torch.equal(found.users[torch.arange(USERS)], held.users)
        assert torch.equal(found.fold_in, held.fold_in)


def test_many_users_shape_the_fold_in_by_an_even_part(raw, tmp_path, monkeypatch):
    monkeypatch.setattr("ckf.cf.fold_in._MOST_USERS", 10)
    held, mapped = both(raw, tmp_path)
    assert torch.equal(held.fold_in, mapped.fold_in) and held.fold_in.isfinite().all()


def test_wrong_files_are_refused(raw, tmp_path):
    items = tmp_path / "i.npy"
    np.save(items, raw[1].numpy())
    bad = raw[0].clone()
    bad[30, 1] = float("nan")
    for name, table, message in (
        ("nan", bad.numpy(), "row 30 has NaN"),
        ("int", np.ones((3, DIM), np.int32), "int32, expected floats"),
        ("columns", np.asfortranarray(raw[0].numpy()), "columns first"),
        ("flat", np.ones(9, np.float32), r"shape \(9,\), expected \(rows, width\)"),
    ):
        np.save(tmp_path / f"{name}.npy", table)
        with pytest.raises(ValueError, match=message):
            load_vectors(tmp_path / f"{name}.npy", items, mapped_above=0)
    save_file({"a": raw[0], "b": raw[1]}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="one named 'users'"):
        load_vectors(tmp_path / "two.safetensors", items, mapped_above=0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits as Linux counts them")
def test_a_table_above_the_memory_limit_is_read_by_rows(tmp_path):
    """1.1 GiB of users, sparse on the disk, in a process that may take 0.25 GiB more."""
    rows, width = 9 * 2**20, 32
    table = np.lib.format.open_memmap(tmp_path / "u.npy", "w+", np.float32, (rows, width))
    table[:: 2**20] = np.arange(1, 10, dtype=np.float32)[:, None] * np.linspace(1, 2, width)
    del table
    np.save(tmp_path / "i.npy", np.ones((4, width), np.float32))
    script = f"""
        import resource, sys, torch, numpy as np
        from ckf.batches import VectorLookup
        from ckf.cf import load_vectors
        torch.set_num_threads(1)
        used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + 2**28,) * 2)
        try:
            np.load("u.npy")
            sys.exit("the limit limits nothing")
        except MemoryError:
            pass
        vectors = load_vectors("u.npy", "i.npy", {rows}, 4)
        assert vectors.user_known.sum() == 9
        lookup = VectorLookup(vectors)
        found = lookup.users(np.arange(0, {rows}, 2**20), np.full((9, 1), -1))
        assert found.shape == (9, {width})
        torch.testing.assert_close(found.mean(0), torch.zeros({width}), atol=1e-6, rtol=0)
        torch.testing.assert_close(found.std(0, correction=0), torch.ones({width}))
        print("read")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "read", done.stderr
