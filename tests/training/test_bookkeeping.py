from effdet_jax.training import bookkeeping


def test_the_stopwatch_knows_rate_and_share_of_waiting(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 5.0, 7.0, 10.0, 10.0, 20.0, 20.0, 21.0])
    monkeypatch.setattr(bookkeeping, 'perf_counter', lambda: next(clock))
    stopwatch = bookkeeping.Stopwatch()  # at 0
    for _ in range(2):  # 1 to 2, 5 to 7
        with stopwatch.waiting():
            pass
    assert stopwatch.share_waited() == 0.3  # at 10
    stopwatch.count(640)
    assert stopwatch.per_second() == 64
    stopwatch.reset()  # at 20
    stopwatch.count(8)
    assert stopwatch.share_waited() == 0 and stopwatch.per_second() == 8
