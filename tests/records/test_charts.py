"""Charts are SVG that a page can hold several of, in colours that the page decides."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from effdet_jax.records import charts
from effdet_jax.records.charts import Line

X = np.arange(20)
TWO = (Line('a', X, X / 20), Line('b', X, X / 19))


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter() if element.text and element.text.strip()]


def chart(name='c', lines=TWO, **options):
    return charts.line_chart(name, lines, x_label='step', **options)


def calibration(name='k'):
    return charts.calibration_chart(
        name, np.linspace(0, 1, 4), np.array([100, 0, 3]), np.array([0.1, np.nan, 0.9]), np.array([0.0, np.nan, 1.0])
    )


@pytest.mark.parametrize('draw', [chart, calibration])
def test_colours_are_the_pages_and_nothing_is_fetched(draw):
    svg = draw()
    colours = set(re.findall(r'(?:fill|stroke): ([^;"]+)', svg))
    assert 'var(--series-5)' in colours
    assert all(colour == 'none' or re.fullmatch(r'var\(--[a-z]+(-[0-6])?\)', colour) for colour in colours), colours
    assert not re.search(r'#[0-9a-f]{6}\b', svg)
    assert '://' not in svg


@pytest.mark.parametrize('draw', [chart, calibration])
def test_ids_of_two_charts_differ_and_references_are_kept(draw):
    first, second = draw('first'), draw('second')
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', first)) <= ids[0]
    assert len(re.findall(r'\bid="', first)) == len(ids[0])


def test_the_same_numbers_make_the_same_chart():
    assert chart() == chart()


def test_names_are_text_and_no_markup():
    svg = chart(lines=[Line('$x$ <b>&', X, X / 20)])
    assert '$x$ <b>&' in texts(svg)
    assert 'step' in texts(svg)


def test_names_at_the_ends_do_not_overlap():
    lines = [Line(name, X, X / 20 + offset) for name, offset in (('a', 0.0), ('b', 0.001), ('c', 0.002))]
    heights = [float(re.search(rf'y="([\d.]+)"[^>]*>{name}</text>', chart(lines=lines)).group(1)) for name in 'abc']
    assert np.all(-np.diff(heights) >= charts.FONT_SIZE)


def test_a_long_log_stays_small():
    rng = np.random.default_rng(0)
    steps = np.arange(100_000)
    assert len(chart(lines=[Line('loss', steps, rng.random(len(steps)))])) < 40_000


def test_thinning_keeps_the_mean_and_short_lines():
    y = np.random.default_rng(0).random(10 * charts.MAX_POINTS)
    thin_x, thin_y = charts._thinned(np.arange(len(y)), y)
    assert len(thin_x) == len(thin_y) == charts.MAX_POINTS
    assert thin_y.mean() == pytest.approx(y.mean())
    np.testing.assert_array_equal(charts._thinned(X, X / 20)[1], X / 20)


@pytest.mark.parametrize('lines', [(), (Line('nothing', X, np.full(20, np.nan)),), (Line('once', X[:1], X[:1] / 1.0),)])
@pytest.mark.parametrize('legend', ['', 'best'])
def test_nothing_to_draw_is_an_empty_chart(lines, legend, recwarn):
    ET.fromstring(chart(lines=lines, legend=legend))
    assert not [str(warning.message) for warning in recwarn]
