import os

import numpy as np
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.record_writer import RecordWriter

from effdet_jax.records.board import Board, read_events


def write(folder, first, last, resume_step=0):
    board = Board(folder, resume_step)
    board.text('config', 'a')
    for step in range(first, last + 1):
        board.scalars(step, {'train/loss': 1 / step, 'train/rate': 2.0})
        if step % 2 == 0:
            board.picture(step, 'picture', np.zeros((2, 3, 3), np.uint8))
    board.sync()
    board.close()


def steps(folder):
    """{tag: steps} in all files."""
    found = {}
    for path in sorted(folder.iterdir()):
        for _, event in read_events(path):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    return {tag: sorted(steps) for tag, steps in found.items()}


def test_the_frames_are_those_of_tensorboard(tmp_path):
    write(tmp_path / 'board', 1, 3)
    (path,) = (tmp_path / 'board').iterdir()
    other = RecordWriter(str(tmp_path / 'other'))
    for _, event in read_events(path):
        other.write(event.SerializeToString())
    other.close()
    assert path.read_bytes() == (tmp_path / 'other').read_bytes()


def test_a_part_of_a_run_forgets_what_earlier_parts_wrote_behind_it(tmp_path):
    for part, resume_step in enumerate((0, 3, 3, 5)):
        write(tmp_path, resume_step + 1, resume_step + 4, resume_step)
        (new,) = tmp_path.glob(f'*.{os.getpid()}')
        new.rename(tmp_path / f'events.out.tfevents.{part}')  # as of another process
    assert steps(tmp_path) == {
        'train/loss': [1, 2, 3, 4, 5, 6, 7, 8, 9], 'train/rate': [1, 2, 3, 4, 5, 6, 7, 8, 9],
        'picture': [2, 4, 6, 8], 'config/text_summary': [1, 4, 6],
    }  # fmt: skip


def test_a_torn_event_ends_a_file_and_is_cut_off(tmp_path):
    write(tmp_path, 1, 3)
    (written,) = tmp_path.iterdir()
    path = written.rename(tmp_path / 'events.out.tfevents.0')  # as of another process
    whole = [end for end, _ in read_events(path)]
    content = path.read_bytes()
    assert whole[-1] == len(content)
    for size in range(whole[-2], whole[-1]):
        path.write_bytes(content[:size])
        assert [end for end, _ in read_events(path)] == whole[:-1]
    Board(tmp_path, resume_step=7).close()
    assert path.stat().st_size == whole[-2]
    Board(tmp_path, resume_step=0).close()
    assert not path.exists()


def test_hyper_parameters_stand_once_in_a_run_of_many_parts(tmp_path):
    config = {'name': 'd0', 'train.epochs': 2.5, 'seed': 0, 'augment.flip': True, 'image.size': [64, 96], 'none': None}
    for part, resume_step in enumerate((0, 3, 0, 2)):  # the third began anew, as after a crash before any checkpoint
        board = Board(tmp_path, resume_step)
        board.hyper_parameters(config, ['eval/AP'])
        board.scalars(resume_step + 1, {'eval/AP': 0.5})
        board.scalars(resume_step + 4, {'eval/AP': 0.5})
        board.close()
        (new,) = tmp_path.glob(f'*.{os.getpid()}')
        new.rename(tmp_path / f'events.out.tfevents.{part}')
    found = [value for path in tmp_path.iterdir() for _, event in read_events(path) for value in event.summary.value]
    values = {value.tag: value.metadata.plugin_data for value in found if value.tag.startswith('_hparams_/')}
    assert sum(value.tag.startswith('_hparams_/') for value in found) == len(values) == 2
    assert {plugin.plugin_name for plugin in values.values()} == {'hparams'}
    start, experiment = (
        HParamsPluginData.FromString(values[f'_hparams_/{name}'].content)
        for name in ('session_start_info', 'experiment')
    )
    assert {name: _python(value) for name, value in start.session_start_info.hparams.items()} == {
        'name': 'd0', 'train.epochs': 2.5, 'seed': 0.0, 'augment.flip': True, 'image.size': '[64, 96]', 'none': 'None',
    }  # fmt: skip
    assert {info.name for info in experiment.experiment.hparam_infos} == config.keys()
    assert [info.name.tag for info in experiment.experiment.metric_infos] == ['eval/AP']


def _python(value):
    return getattr(value, value.WhichOneof('kind'))
