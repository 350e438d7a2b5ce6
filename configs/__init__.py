"""One file per run: --config=configs/d0.py. In Python they are `effdet_jax.configs`, in a checkout and installed."""
