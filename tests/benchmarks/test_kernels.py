"""Every operation that `benchmarks.kernels` times can be called as it calls it."""

from benchmarks.kernels import __main__ as kernels_cpu


def test_every_contender_runs_on_each_layer(monkeypatch):
    monkeypatch.setattr(kernels_cpu, "CACHES_BYTES", 1)
    calls = kernels_cpu.contenders(4, 2, 64, context=kernels_cpu.N_INIT + 3 * kernels_cpu.TOP_K)
    assert {"score", "vote", "block_table", "attend", "reselect", "reuse", "dense"} <= set(calls)
    assert {len(layers) for layers in calls.values()} == {2}
    times = kernels_cpu.medians(calls, repeats=1)
    assert all(milliseconds > 0 for milliseconds in times.values())
