def test_a(finished_run):
    import os
    w, n, p = finished_run
    print(p); print(n); os.system(f'ls -R {w} | head -80; cat {w}/metrics.jsonl')
def test_b(): pass
