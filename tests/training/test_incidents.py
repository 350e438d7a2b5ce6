import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from effdet_jax import data
from effdet_jax.errors import UserError
from effdet_jax.records import console
from effdet_jax.records.metrics import MetricsLog
from effdet_jax.training.incidents import Incidents, fetch, make_watch, means_of_steps


def values(loss):
    return {'loss': loss, 'gradient_norm': 1.0, 'skipped_steps': float(not math.isfinite(loss))}


def kinds(losses):
    """{step: kind} of the incidents, steps from 0."""
    incidents = Incidents()
    seen = [incidents.see(step, values(loss)) for step, loss in enumerate(losses)]
    return {incident.step: incident.kind for incident in seen if incident}


def test_noise_and_slow_changes_are_no_spikes():
    rng = np.random.default_rng(0)
    assert kinds(1 + 0.2 * rng.standard_normal(2000)) == {}
    assert kinds(np.exp(np.linspace(3, -3, 2000)) * (1 + 0.1 * rng.standard_normal(2000))) == {}
    assert kinds([0.5] * 100 + [0.99] * 10) == {}  # without any noise: twice the median is still needed


def test_a_jump_is_a_spike_and_hides_no_later_one():
    losses = 1 + 0.1 * np.random.default_rng(0).standard_normal(300)
    losses[[50, 51, 52, 200]] = 5.0
    assert kinds(losses) == dict.fromkeys((50, 51, 52, 200), 'spike')


def test_the_first_steps_only_fill_the_window():
    assert kinds([1.0] * 19 + [9.0]) == {}
    assert kinds([1.0] * 20 + [9.0]) == {20: 'spike'}


def test_a_jump_within_what_is_usual_is_none():
    noisy = np.tile([0.2, 1.0, 3.0], 50)
    assert kinds([*noisy, 6.0]) == {}


def test_skipped_steps_are_counted_in_a_row_and_leave_the_window_alone():
    incidents = Incidents()
    for step, (loss, in_a_row) in enumerate([(math.nan, 1), (math.inf, 2), (1.0, 0), (math.nan, 1)]):
        incident = incidents.see(step, values(loss))
        assert (incident.kind if incident else '') == ('skipped' if in_a_row else '')
        assert incidents.skipped_in_a_row == in_a_row
    assert kinds([math.nan] * 30 + [1.0] * 19 + [9.0]) == dict.fromkeys(range(30), 'skipped')


def test_means_are_over_the_steps_that_counted():
    none = np.arange(0)
    rows = [(1, {'loss': 2.0, 'skipped_steps': 0.0}, none), (2, {'loss': math.nan, 'skipped_steps': 1.0}, none)]
    assert means_of_steps(rows) == {'loss': 2.0, 'skipped_steps': 1}
    nothing = means_of_steps(rows[1:])
    assert math.isnan(nothing['loss'])
    assert nothing['skipped_steps'] == 1


def test_what_comes_from_the_devices_is_a_number_a_step():
    pending = [(3, {'loss': jnp.full(4, 0.5)}, np.arange(2))]
    ((step, row, index_B),) = fetch(pending)
    assert (step, row) == (3, {'loss': 0.5})
    np.testing.assert_array_equal(index_B, [0, 1])


def test_an_incident_is_written_with_its_images_and_too_many_end_the_run(tmp_path):
    source = data.open_source('shapes', '100:110')
    watch = make_watch(source, tmp_path, max_skipped=3)
    nan, good = values(math.nan), values(0.5)
    with MetricsLog(tmp_path) as log, console.terminal.capture() as printed:
        watch(
            [(1, nan, np.array([4, 7])), (2, good, np.array([1])), (3, nan, np.array([2])), (4, nan, np.array([5]))],
            log,
        )
        with pytest.raises(UserError, match=r'3 steps in a row, up to step 5, had no finite loss and gradient'):
            watch([(5, nan, np.array([6]))], log)
    lines = [json.loads(line) for line in (tmp_path / 'incidents.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == [1, 3, 4, 5]
    annotations = source.annotations(7)
    assert lines[0]['images'][1] == {'index': 7, 'id': annotations.image_id, 'file': annotations.file_name}
    assert (lines[0]['kind'], lines[0]['loss'], lines[0]['gradient_norm']) == ('skipped', 'nan', 1.0)
    shown = ' '.join(printed.get().split())
    assert 'WARNING: step 1: loss nan, gradient norm 1, the step is skipped; its images are in' in shown
