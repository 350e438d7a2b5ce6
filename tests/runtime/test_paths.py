from pathlib import Path

import pytest
from PIL import Image

from effdet_jax.errors import UserError
from effdet_jax.runtime import paths


@pytest.mark.parametrize('text', ['gs://b/run', 'S3://b', 'http://h/a.jpg', 'file:///a', 'abfss://c@a/x', 'gs:/b'])
def test_an_address_is_no_path(text):
    for spelled in (text, Path(text)):
        with pytest.raises(UserError, match='is an address'):
            paths.local(spelled)


@pytest.mark.parametrize('text', ['runs/d0', '/a/b', 'C:/runs/d0', 'a:b', './gs:', 'a/gs://b', 'x=1', 'a b', '.'])
def test_a_path_stays_as_it_is(text):
    assert paths.local(text) == Path(text)


def test_the_home_folder_is_expanded_at_the_start_alone(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    assert paths.local('~/runs/d0') == Path('/home/me/runs/d0')
    assert paths.local('runs/~/d0') == Path('runs/~/d0')


def test_an_address_within_a_source_is_found():
    for text in ('voc:gs://b/voc', 'coco:a.json,s3://b/images', 'csv:a.csv + csv:gs://b/a.csv', 'gs://b/a'):
        with pytest.raises(UserError, match=r'^(gs|s3)://b\S* is an address'):
            paths.refuse_addresses(text)
    for text in ('voc:/data/voc', 'coco:C:/a.json,C:/images', 'tfds:voc/2007', 'train[:90%]', ''):
        paths.refuse_addresses(text)


def test_pillow_knows_every_format_and_ending():
    endings = Image.registered_extensions()
    for kind, suffixes in paths.IMAGE_FORMATS.items():
        assert {endings.get(suffix, kind) for suffix in suffixes} == {kind}
