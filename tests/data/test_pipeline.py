import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from effdet_jax.data import Annotations, Example, Unreadable, eval_batches, open_source, train_batches, transforms
from effdet_jax.errors import UnreadableError, UserError

BCCD = Path(__file__).parents[3] / 'shared' / 'data' / 'bccd'


class Numbered:
    """Images whose grey level is their index; image i has i % 4 boxes, the second a crowd, the third difficult."""

    class_names = ('thing',)
    category_ids = (1,)

    def __init__(self, length: int):
        self._length = length

    def __len__(self) -> int:
        return self._length

    def annotations(self, index: int) -> Annotations:
        count = index % 4
        return Annotations(
            image_id=index,
            file_name='',
            boxes_yxyx=np.array([[2, 3, 14 + j, 20] for j in range(count)], np.float32).reshape(-1, 4),
            labels=np.zeros(count, np.int32),
            areas=np.ones(count, np.float32),
            is_crowd=np.arange(count) == 1,
            is_difficult=np.arange(count) == 2,
        )

    def __getitem__(self, index: int) -> Example:
        return Example(np.full((20, 30, 3), index, np.uint8), self.annotations(index))


def batches(source, **changes):
    options = {'image_size': (16, 24), 'batch_size': 4, 'max_boxes': 5, 'scale_range': (0.5, 2.0), 'seed': 3}
    return iter(train_batches(source, **(options | changes)))


def take(iterator, count: int) -> list[dict]:
    return list(itertools.islice(iterator, count))


def assert_equal(batch, expected) -> None:
    assert batch.keys() == expected.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], expected[name], err_msg=name)


def test_batch_has_the_documented_arrays():
    batch = next(batches(Numbered(10)))
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        'image': ((4, 16, 24, 3), 'uint8'),
        'valid_size': ((4, 2), 'int32'),
        'boxes': ((4, 5, 4), 'float32'),
        'labels': ((4, 5), 'int32'),
        'index': ((4,), 'int32'),
        'dropped': ((4,), 'int32'),
        'unreadable': ((4,), 'int32'),
    }


def test_restored_position_continues_bit_for_bit():
    straight = take(batches(Numbered(10)), 8)
    first = batches(Numbered(10))
    take(first, 3)
    state = json.loads(json.dumps(first.get_state()))
    assert state == {'next_index': 3}
    second = batches(Numbered(10), threads=0)
    second.set_state(state)
    for batch, expected in zip(take(second, 5), straight[3:], strict=True):
        assert_equal(batch, expected)


def test_number_of_threads_changes_nothing():
    for one, many in zip(*(take(batches(Numbered(10), threads=n), 6) for n in (1, 4)), strict=True):
        assert_equal(one, many)


@pytest.mark.parametrize('num_hosts', [2, 4])
def test_hosts_together_see_what_one_host_sees(num_hosts):
    single = batches(Numbered(10), batch_size=4)
    hosts = [batches(Numbered(10), batch_size=4 // num_hosts, host=h, num_hosts=num_hosts) for h in range(num_hosts)]
    for _ in range(6):
        whole, parts = next(single), [next(host) for host in hosts]
        for h, part in enumerate(parts):
            assert_equal(part, {name: np.split(array, num_hosts)[h] for name, array in whole.items()})


def test_every_epoch_holds_every_image_in_a_new_order():
    order = np.concatenate([batch['index'] for batch in take(batches(Numbered(12)), 6)])
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12))
    assert (order[:12] != order[12:]).any() and (order[:12] != np.arange(12)).any()


def test_seed_decides_the_order():
    assert (next(batches(Numbered(50)))['index'] != next(batches(Numbered(50), seed=4))['index']).any()


def test_every_visit_is_jittered_anew():
    sizes = {tuple(size) for batch in take(batches(Numbered(1)), 4) for size in batch['valid_size'].tolist()}
    assert len(sizes) > 4


@pytest.mark.parametrize('length', [1, 3])
def test_fewer_images_than_a_batch_are_repeated(length):
    batch = take(batches(Numbered(length), batch_size=8), 2)[1]
    assert set(batch['index']) == set(range(length)) and len(batch['index']) == 8


def test_crowds_are_dropped_and_difficult_objects_kept():
    batch = next(batches(Numbered(4), scale_range=(1.0, 1.0)))
    for index, boxes, labels in zip(batch['index'], batch['boxes'], batch['labels'], strict=True):
        expected = Numbered(4).annotations(int(index))
        assert (labels >= 0).sum() == (~expected.is_crowd).sum()
        assert (boxes[labels < 0] == 0).all()
        if index == 3:  # 20x30 scaled to 16x24, clipped to the last pixel
            np.testing.assert_allclose(boxes[:2], [[1.6, 2.4, 11.2, 16], [1.6, 2.4, 12.8, 16]], rtol=1e-6)


def test_boxes_beyond_the_limit_are_counted():
    batch = next(batches(Numbered(4), scale_range=(1.0, 1.0), max_boxes=1))
    assert batch['labels'].shape == (4, 1)
    assert dict(zip(batch['index'].tolist(), batch['dropped'].tolist(), strict=True)) == {0: 0, 1: 0, 2: 0, 3: 1}


@pytest.mark.parametrize(
    ('length', 'num_hosts', 'batch_size'), [(10, 1, 4), (10, 3, 2), (9, 4, 2), (1, 4, 2), (8, 2, 4)]
)
def test_evaluation_sees_every_image_once_and_hosts_stay_in_step(length, num_hosts, batch_size):
    source = Numbered(length)
    seen = [
        list(eval_batches(source, image_size=(16, 24), batch_size=batch_size, host=h, num_hosts=num_hosts))
        for h in range(num_hosts)
    ]
    assert len({len(batches) for batches in seen}) == 1
    everything = list(itertools.chain(*seen))
    assert sorted(i for b in everything for i in b.index[b.mask]) == list(range(length))
    for batch in everything:
        count = batch.mask.sum()
        assert batch.image.shape == (batch_size, 16, 24, 3) and len(batch.annotations) == count
        assert (
            batch.mask[:count].all() and (batch.index[~batch.mask] == -1).all() and not batch.image[~batch.mask].any()
        )
        assert set(batch.arrays) == {'image', 'valid_size', 'image_scale', 'mask', 'index'}


def test_evaluation_annotations_are_the_whole_truth():
    (batch,) = eval_batches(Numbered(4), image_size=(16, 24), batch_size=4)
    assert [len(annotations.labels) for annotations in batch.annotations] == [0, 1, 2, 3]
    np.testing.assert_array_equal(batch.annotations[3].boxes_yxyx, Numbered(4).annotations(3).boxes_yxyx)
    image, valid_size, image_scale = transforms.resize_and_pad(Numbered(4)[3].image, (16, 24))
    np.testing.assert_array_equal(batch.image[3], image)
    assert tuple(batch.valid_size[3]) == valid_size and batch.image_scale[3] == np.float32(image_scale)


class Damaged(Numbered):
    """Of which some images cannot be read."""

    def __init__(self, length: int, *damaged: int):
        super().__init__(length)
        self._damaged = damaged

    def __getitem__(self, index: int) -> Example:
        if index in self._damaged:
            raise UnreadableError(f'{index}.jpg', 'damaged')
        return super().__getitem__(index)


def test_an_image_that_cannot_be_read_is_replaced_by_the_next_one():
    sound, damaged = (take(batches(source), 10) for source in (Numbered(10), Damaged(10, 3, 9, 0)))
    next_one = {3: 4, 9: 1, 0: 1}
    for batch, expected in zip(damaged, sound, strict=True):
        meant = expected['index'].tolist()
        assert batch['index'].tolist() == [next_one.get(index, index) for index in meant]
        assert batch['unreadable'].tolist() == [index if index in next_one else -1 for index in meant]
        for place, index in enumerate(batch['index']):
            assert batch['image'][place].max() == index  # the grey level


def test_replacement_depends_neither_on_hosts_nor_threads_nor_on_where_one_starts():
    source = Damaged(10, 3, 4)
    whole = take(batches(source), 6)
    hosts = [batches(source, batch_size=2, host=h, num_hosts=2, threads=h) for h in range(2)]
    for batch in whole:
        for h, host in enumerate(hosts):
            assert_equal(next(host), {name: array[2 * h : 2 * h + 2] for name, array in batch.items()})
    late = batches(source)
    late.set_state({'next_index': 4})
    assert_equal(next(late), whole[4])


def test_too_many_in_a_row_end_it():
    with pytest.raises(UserError, match=r'11 consecutive images from image \d+ on cannot be read: \d+\.jpg: damaged'):
        take(batches(Damaged(40, *range(40))), 1)


def test_replaced_images_are_named_once_and_limited():
    said: list[str] = []
    unreadable = Unreadable(Damaged(10, 3, 7, 8), 0.2, said.append)
    assert unreadable.count(np.array([-1, 3, -1, 3])) == 2
    assert unreadable.count(np.array([7, 3, -1, -1])) == 2
    assert unreadable.count(np.array([-1, -1, -1, -1])) == 0
    assert said == [
        f'warning: replaced by the next image: {index}.jpg: damaged: replace or remove the file' for index in (3, 7)
    ]
    with pytest.raises(UserError, match=r'^3 of 10 images cannot be read, more than .*=0\.2 allows: 3\.jpg.*8\.jpg'):
        unreadable.count(np.array([8]))


def test_an_evaluated_image_that_cannot_be_read_is_black_and_says_why():
    source = Damaged(6, 3)
    first, second = eval_batches(source, image_size=(16, 24), batch_size=4)
    assert first.errors == ('', '', '', '3.jpg: damaged: replace or remove the file') and second.errors == ('', '')
    assert not first.image[3].any() and first.mask.all() and first.index.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(first.annotations[3].boxes_yxyx, source.annotations(3).boxes_yxyx)


def corrupted(folder: Path) -> str:
    """A good image and a JPEG of which no more than the beginning is left."""
    for name in ('Annotations', 'ImageSets/Main', 'JPEGImages'):
        (folder / name).mkdir(parents=True)
    for stem in ('good', 'bad'):
        (folder / 'Annotations' / f'{stem}.xml').write_text('<annotation></annotation>')
        cv2.imwrite(str(folder / 'JPEGImages' / f'{stem}.jpg'), np.full((8, 8, 3), 200, np.uint8))
    (folder / 'JPEGImages' / 'bad.jpg').write_bytes(b'\xff\xd8\xff\xe0 no more than a beginning')
    (folder / 'ImageSets' / 'Main' / 'all.txt').write_text('good\nbad\n')
    return f'voc:{folder}@all'


def test_a_corrupt_file_takes_the_same_ways(tmp_path):
    source, said = open_source(corrupted(tmp_path)), []
    unreadable = Unreadable(source, 0.5, said.append)
    for batch in take(batches(source), 3):
        assert (batch['index'] == 0).all()
        assert unreadable.count(batch['unreadable']) == 2
    assert len(said) == 1 and 'bad.jpg: not a readable image' in said[0]
    (batch,) = eval_batches(source, image_size=(16, 16), batch_size=2)
    assert batch.errors[0] == '' and 'bad.jpg: not a readable image' in batch.errors[1]


@pytest.mark.skipif(not BCCD.is_dir(), reason=f'no photographs: {BCCD} is absent')
def test_photographs_pass_through_both_ways():
    source = open_source(f'voc:{BCCD}@test')
    batch = next(batches(source, image_size=(128, 128), max_boxes=100, scale_range=(0.8, 1.2)))
    real = batch['labels'] >= 0
    assert real.sum() > 4 and batch['boxes'][real].max() <= 127 and batch['image'].std() > 10
    count = sum(b.mask.sum() for b in eval_batches(source, image_size=(64, 64), batch_size=16))
    assert count == 72
