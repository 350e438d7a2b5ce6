"""The benchmark on a toy: what it says must agree with itself; peaks from data sheets; what a user gets wrong."""

import json

import jax
import pytest
import test_commands
import tiny

from effdet_jax.commands.benchmark import benchmarker, peaks, speed_tables, start_times
from effdet_jax.model.cost import cost_of_parts

pytestmark = pytest.mark.usefixtures('depthwise_by_xla')
PEAK = peaks.Peak(1e12, 1e11, 'data sheet')
CLASSES = benchmarker.CLASSES_WITHOUT_DATA


@pytest.fixture
def config(monkeypatch):
    """Of a toy, at 64x64 pixels, in blocks of one call."""
    monkeypatch.setattr(benchmarker, 'build_model', lambda config, classes, axis=None: tiny.toy(classes, axis))
    monkeypatch.setattr(benchmarker, 'SECONDS_OF_A_BLOCK', 0.0)
    monkeypatch.setattr(benchmarker, 'peak', lambda dtype: PEAK)
    config = tiny.config()
    config.model.max_level = 3  # the toy's only level
    return config


def agrees(row, flops):
    seconds = row['seconds']['median']
    assert row['images/s'] == pytest.approx(row['batch'] / seconds)
    assert row['flops/s'] == pytest.approx(flops / seconds)
    assert row['share of peak flops'] == pytest.approx(flops / seconds / PEAK.flops)
    assert len(row['blocks']) == row['seconds']['count'] == 2
    assert row['compile_s'] > 0 and row['peak memory'] > 0


def test_inference_is_measured_at_every_stage_and_batch_size(config):
    rows = list(benchmarker.infer(config, (1, 2), repeats=2))
    assert [(row['what'], row['batch']) for row in rows] == [
        (what, batch)
        for batch in (1, 2)
        for what in ('network only', 'resized image to boxes', 'photograph 480x640 to boxes')
    ]
    macs = sum(cost.macs for cost in cost_of_parts(tiny.toy(CLASSES), (64, 64)).values())
    for row in rows:
        agrees(row, 2 * macs * row['batch'])
    printed = speed_tables.to_markdown(speed_tables.settings(config, 'infer'), json.loads(json.dumps(rows)))
    assert printed.count('\n| ') == len(rows) + 1 and 'median of 2 blocks' in printed


@pytest.mark.slow
def test_the_training_step_is_measured_and_traced(config, tmp_path):
    (row,) = benchmarker.train(config, repeats=2, profile=tmp_path)
    macs = sum(cost.macs for cost in cost_of_parts(tiny.toy(CLASSES), (64, 64)).values())
    agrees(row, 3 * 2 * macs * config.train.batch_size / jax.local_device_count())
    assert list(tmp_path.glob('training_step-batch_4/**/*.trace.json.gz'))


def test_the_input_is_measured_stage_by_stage(config, monkeypatch):
    monkeypatch.setattr(benchmarker.data, 'stage_rates', lambda source, **options: {'decode': 500.0, 'boxes': 1e5})
    rows = list(benchmarker.read(config))
    assert '500.0' in speed_tables.to_markdown(speed_tables.settings(config, 'data'), rows)


def test_starts_are_told_by_phase(config, monkeypatch):
    monkeypatch.setattr(start_times, '_start', lambda config, cache, compiles: {'imports': 1.0, 'all': 3.0})
    rows = list(start_times.measure(config, 2))
    assert [(row['what'], row['cache']) for row in rows] == [
        ('imports', 'cold'), ('all', 'cold'), ('imports', 'warm'), ('all', 'warm')
    ]  # fmt: skip
    assert 'median of 2 starts' in speed_tables.to_markdown(speed_tables.settings(config, 'startup'), rows)


@pytest.mark.parametrize(
    ('kind', 'dtype', 'flops'),
    [
        ('TPU v5 lite', 'bfloat16', 197e12),
        ('TPU v5p', 'bfloat16', 459e12),
        ('TPU v6e', 'float32', 918e12),
        ('NVIDIA A100-SXM4-80GB', 'bfloat16', 312e12),
        ('NVIDIA H100 80GB HBM3', 'float32', 494e12),
        ('NVIDIA H200', 'bfloat16', 989e12),
        ('Tesla T4', 'float32', 8.1e12),
    ],
)
def test_peaks_are_found_by_the_devices_name(kind, dtype, flops):
    assert peaks.known_peak(kind, dtype).flops == pytest.approx(flops)


@pytest.mark.parametrize(('kind', 'dtype'), [('cpu', 'float32'), ('NVIDIA L40S', 'float32'), ('Tesla T4', 'bfloat16')])
def test_of_other_devices_no_peak_is_known(kind, dtype):
    assert peaks.known_peak(kind, dtype) is None


def test_what_is_attainable_is_measured(monkeypatch):
    for name, small in (('SECONDS', 0.0), ('MATRIX', 64), ('VECTOR', 64)):
        monkeypatch.setattr(peaks, name, small)
    monkeypatch.setattr(peaks.timing, 'seconds_of', lambda work: 0.5)
    monkeypatch.setattr(peaks, 'perf_counter', iter(range(100)).__next__)
    monkeypatch.setattr(peaks, 'SECONDS', 1.5)
    found = peaks.attainable('float32')
    assert found.flops == 2 * 64**3 / 0.5 and found.bandwidth == 2 * 64 * 4 / 0.5
    assert found.source.startswith('measured')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((), 'missing --config'),
        (('--config=configs/d0.py', '--what=speed'), 'speed'),
        (('--config=configs/d0.py', '--batch=one'), '--batch=one: give whole numbers'),
        (('--config=configs/d0.py', '--what=data', '--profile=P'), '--profile works with --what=infer and train'),
        (('--config=configs/d0.py', '--lower-only'), '--lower-only works with --what=startup'),
        (('--config=configs/d0.py', 'quickly'), 'unexpected quickly'),
    ],
)
def test_bad_usage_is_one_line(arguments, message):
    code, out, error = test_commands.start('benchmark', *arguments)
    assert (code, out) == (2, '')
    assert message in error and error.count('\n') == 1
