import json
import math

import numpy as np
import pytest
from full_disk import full_disk
from tensorboardX.proto.event_pb2 import Event

from effdet_jax.errors import UserError
from effdet_jax.records.metrics import MetricsLog, read_metrics


def test_rows_are_read_as_written(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {'train/loss': np.float32(0.5), 'train/images_per_second': 8})
        log.write(2, {'train/loss': 0.25, 'eval/AP': math.nan, 'eval/worst': math.inf})
        assert len(read_metrics(tmp_path / 'metrics.jsonl')) == 2  # before the log is closed
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert json.loads(lines[0]) == {'step': 1, 'train/loss': 0.5, 'train/images_per_second': 8.0}
    assert json.loads(lines[1]) == {'step': 2, 'train/loss': 0.25, 'eval/AP': None, 'eval/worst': None}
    assert lines[1].startswith('{"step": 2')
    assert math.isnan(read_metrics(tmp_path / 'metrics.jsonl')[1]['eval/AP'])


def test_a_resumed_run_writes_what_an_uninterrupted_one_writes(tmp_path):
    def run(workdir, *parts):
        for first, last in parts:
            with MetricsLog(workdir, resume_step=first) as log:
                for step in range(first + 1, last + 1):
                    log.write(step, {'train/loss': 1 / step})
        return (workdir / 'metrics.jsonl').read_text()

    assert run(tmp_path / 'two', (0, 5), (3, 8)) == run(tmp_path / 'one', (0, 8))
    assert run(tmp_path / 'two', (0, 2)) == run(tmp_path / 'short', (0, 2))


def test_a_torn_last_line_is_forgotten(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n{"step": 2, "train/lo')
    assert read_metrics(path) == [{'step': 1}]
    with MetricsLog(tmp_path, resume_step=7) as log:
        log.write(8, {})
    assert path.read_text() == '{"step": 1}\n{"step": 8}\n'
    assert [file.name for file in tmp_path.iterdir() if '.tmp' in file.name] == []


@pytest.mark.parametrize('line', ['nonsense', '[1]', '{"loss": 1}', ''])
def test_a_foreign_line_is_the_users_error(tmp_path, line):
    path = tmp_path / 'metrics.jsonl'
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match='line 2 is not a JSON object with a step'):
        read_metrics(path)


def test_a_missing_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / 'metrics.jsonl') == []


def test_tensorboard_gets_numbers_pictures_text_and_the_step_to_forget_from(tmp_path):
    picture = np.zeros((4, 6, 3), np.uint8)
    with MetricsLog(tmp_path, resume_step=10) as log:
        log.write(11, {'train/loss': 0.5, 'eval/AP': math.nan})
        log.pictures(11, {'eval/first': picture})
        log.text('config', '`a = 1`')
    events = read_events(tmp_path / 'tensorboard')
    assert [event.step for event in events if event.session_log.status == 1] == [11]
    values = {value.tag: value for event in events for value in event.summary.value}
    assert values.keys() == {'train/loss', 'eval/first', 'config/text_summary'}
    assert values['train/loss'].simple_value == 0.5
    assert (values['eval/first'].image.height, values['eval/first'].image.width) == (4, 6)
    assert (tmp_path / 'pictures' / '00000011' / 'eval' / 'first.png').exists()


def test_a_full_disk_ends_no_log_and_nothing_is_missing_once_there_is_room(tmp_path, capsys):
    picture = np.zeros((40, 60, 3), np.uint8)
    with MetricsLog(tmp_path) as log:
        log.write(1, {'train/loss': 1.0})
        with full_disk(40):
            for step in (2, 3):
                log.write(step, {'train/loss': 1 / step})
                log.pictures(step, {'image': picture})
                log.incident(step, {'kind': 'spike'})
                log.text('config', 'a' * 100)
                log.sync()
        log.write(4, {'train/loss': 0.25})
        log.incident(4, {'kind': 'skipped'})
    assert read_metrics(tmp_path / 'metrics.jsonl') == [{'step': step, 'train/loss': 1 / step} for step in (1, 2, 3, 4)]
    kinds = [json.loads(line)['kind'] for line in (tmp_path / 'incidents.jsonl').read_text().splitlines()]
    assert kinds == ['spike', 'spike', 'skipped']
    steps = [event.step for event in read_events(tmp_path / 'tensorboard') if event.summary.value and event.step]
    assert steps == [1, 2, 2, 1, 3, 3, 1, 4]
    out = capsys.readouterr().out
    assert f'WARNING: the log in {tmp_path} cannot be written (File too large): training goes on, and the' in out


def test_incidents_behind_the_step_to_continue_from_are_forgotten(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (3, 8):
            log.incident(step, {'kind': 'spike'})
    MetricsLog(tmp_path, resume_step=7).close()
    assert (tmp_path / 'incidents.jsonl').read_text() == '{"step": 3, "kind": "spike"}\n'


def read_events(folder):
    """TFRecord framing: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    events = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], 'little')
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events
