"""The page of a finished run: everything is on it, it asks for nothing, and a browser has nothing to complain about."""

import base64
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
from processes import effdet

from effdet_jax import config, reporting
from effdet_jax.errors import UnreadableError
from effdet_jax.evaluate import ImageResult, to_ground_truth_xyxy
from effdet_jax.evaluation import Detections, coco_metrics, voc_metrics
from effdet_jax.records import console

ROOT = Path(__file__).parents[1]
CHARTS = {
    'curve-training-loss', 'curve-average-precision', 'curve-learning-rate', 'precision-recall', 'scores',
    'calibration', 'speed',
}  # fmt: skip
SECTIONS = {
    'results', 'training', 'classes', 'curves', 'confusion', 'errors', 'sizes', 'calibrated', 'images', 'configuration',
    'machine',
}  # fmt: skip


@pytest.fixture(scope='module')
def page(finished_run):
    return (finished_run[0] / 'report.html').read_text(encoding='utf-8')


class Reader(html.parser.HTMLParser):
    """Checks that elements close in order; collects ids, images and the text."""

    VOID = ('meta', 'link', 'img', 'br')

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.images, self.text = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes['id']] if 'id' in attributes else []
        self.images += [attributes] if tag == 'img' else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == 'id']

    def handle_data(self, data):
        self.text.append(data)


def test_training_ends_with_a_report_of_everything(finished_run, page):
    reader = Reader(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert set(reader.ids) >= SECTIONS | {f'{name}-caption' for name in CHARTS}
    assert page.count('<svg ') == len(CHARTS)
    text = ' '.join(' '.join(reader.text).split())
    for number in (finished_run[1]['AP'], finished_run[1]['AP50'], finished_run[1]['VOC07_AP50']):
        assert f'{number:.3f}' in text
    assert f'step {tiny.STEPS}' in text
    assert '4 x cpu on 1 host' in text
    assert 'optimizer.weight_decay' in text
    assert not finished_run[2].count('note: report.html')


def test_nothing_is_fetched(page):
    assert '://' not in page
    sources = re.findall(r'\b(?:src|href)="([^"]{5})', page)
    assert sources and all(source.startswith(('data:', '#')) for source in sources)
    assert "default-src 'none'" in page


def test_every_picture_decodes(page):
    images = Reader(page).images
    assert len(images) == 2 * 6  # six images, three worst and three best: none is shown as both
    for image in images:
        pixels = cv2.imdecode(np.frombuffer(base64.b64decode(image['src'].split(',')[1]), np.uint8), cv2.IMREAD_COLOR)
        assert max(pixels.shape) == 640
        assert image['alt']


def evaluated(workdir, source, scores=0.9, take=slice(None)):
    """(config, metrics, results) of a detector that finds the first objects of `take` of every image."""
    run = config.load(workdir)
    results = {}
    for index in range(len(source)):
        a = source.annotations(index)
        boxes = a.boxes_yxyx[take][:, [1, 0, 3, 2]]
        results[index] = ImageResult(a, Detections(boxes, np.full(len(boxes), scores, np.float32), a.labels[take]))
    truths = [to_ground_truth_xyxy(image.annotations) for image in results.values()]
    pairs = truths, [image.detections for image in results.values()], source.class_names
    return run, coco_metrics(*pairs) | voc_metrics(*pairs), results


@pytest.mark.parametrize('take', [slice(None), slice(0)], ids=['all', 'nothing'])
def test_a_perfect_detector_and_one_that_finds_nothing(take, finished_run, tmp_path):
    source = tiny.ManySizes(5)
    run, numbers, results = evaluated(finished_run[0], source, take=take)
    reporting.write_report(run, tmp_path, tmp_path / 'r.html', source, 1, numbers, results)
    reader = Reader((tmp_path / 'r.html').read_text(encoding='utf-8'))
    text = ' '.join(' '.join(reader.text).split())
    assert 'The training machine was not recorded' in text
    assert 'has no training log' in text
    assert ('F1 1.00' in text) == (take.stop is None)


def test_names_of_classes_are_text(finished_run, tmp_path):
    class Source(tiny.ManySizes):
        class_names = ('<script>alert(1)</script>', '$\\frac', '&amp;', '"', '日本')

    source = Source(3)
    run, numbers, results = evaluated(finished_run[0], source)
    reporting.write_report(run, tmp_path, tmp_path / 'r.html', source, 1, numbers, results)
    page = (tmp_path / 'r.html').read_text(encoding='utf-8')
    assert '<script>alert' not in page
    assert {'<script>alert(1)</script>', '&amp;', '日本'} <= {text.strip() for text in Reader(page).text}


def test_images_that_cannot_be_read_are_named_and_the_report_is_written(finished_run, tmp_path):
    """One that could not be read when it was evaluated, and one that has been damaged since."""

    class Source(tiny.ManySizes):
        def __getitem__(self, index):
            if index in (1, 2):
                raise UnreadableError(f'photos/{index}.jpg', 'it ends too early')
            return super().__getitem__(index)

    source = tiny.ManySizes(5)
    run, numbers, results = evaluated(finished_run[0], source)
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    results[1] = ImageResult(
        results[1].annotations, nothing, 'photos/1.jpg: it ends too early: replace or remove the file'
    )
    reporting.write_report(run, tmp_path, tmp_path / 'r.html', Source(5), 1, numbers, results)
    reader = Reader((tmp_path / 'r.html').read_text(encoding='utf-8'))
    text = ' '.join(' '.join(reader.text).split())
    assert '1 of 5 images could not be read.' in text
    assert text.count('photos/1.jpg: it ends too early') == 2  # in the list, and in the place of its pictures
    assert text.count('photos/2.jpg: it ends too early') == 1
    assert len(reader.images) == 2 * 3


def test_a_report_that_fails_is_a_line_and_leaves_nothing(finished_run, tmp_path):
    with console.terminal.capture() as printed:
        reporting.write_after_training(config.load(finished_run[0]), tmp_path, tiny.ManySizes(1), 1, {}, {})
    assert printed.get().startswith('note: report.html could not be written (')
    assert list(tmp_path.iterdir()) == []


def test_the_command_reports_the_best_checkpoint_on_any_split(finished_run, tmp_path):
    workdir = tmp_path / 'copy'
    shutil.copytree(finished_run[0], workdir)
    (workdir / 'report.html').unlink()
    out = tmp_path / 'made' / 'page.html'
    split = '--config.dataset.eval_split=1000000:1000004'
    code, printed, error = effdet('report', f'--workdir={workdir}', f'--out={out}', split)
    assert (code, error) == (0, '')
    assert 'evaluating' in printed and f'{out}' in printed
    assert 'on 4 images' in ' '.join(' '.join(Reader(out.read_text(encoding='utf-8')).text).split())
    assert not (workdir / 'report.html').exists()
    assert [path.name for path in out.parent.iterdir()] == [out.name]


PROBE = """
<script>
addEventListener('load', () => {
  const drawn = (e) => e.getBoundingClientRect().width > 100 && e.getBoundingClientRect().height > 50;
  document.querySelectorAll('img').forEach((image) => { image.loading = 'eager'; });
  const table = document.querySelector('table.sortable');
  table.querySelectorAll('th button')[1].click();
  setTimeout(() => parent.postMessage({
    width: innerWidth, scrollWidth: document.documentElement.scrollWidth,
    charts: [...document.querySelectorAll('svg')].filter(drawn).length,
    images: [...document.images].filter((image) => image.complete && image.naturalWidth > 0 && drawn(image)).length,
    objects: [...table.tBodies[0].rows].map((row) => Number(row.cells[1].dataset.value)),
  }, '*'), 300);
});
</script>
</body>"""
FRAME = """<!doctype html><body><iframe src="probe.html" width="WIDTH" height="900"></iframe><script>
addEventListener('message', (event) => { document.body.dataset.seen = JSON.stringify(event.data); });
</script></body>"""


def browse(folder, width):
    """What a page in a frame of this width says of itself, and the lines that the browser's console has."""
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not chromium:
        pytest.skip('no Chromium: apt-get install chromium')
    (folder / 'frame.html').write_text(FRAME.replace('WIDTH', str(width)))
    done = subprocess.run(
        [
            chromium, '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--enable-logging=stderr',
            f'--user-data-dir={folder / "profile"}', '--virtual-time-budget=5000', '--window-size=1600,1000',
            '--dump-dom', f'file://{folder / "frame.html"}',
        ],
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    seen = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert seen, done.stderr
    return json.loads(html.unescape(seen.group(1))), [line for line in done.stderr.splitlines() if 'CONSOLE' in line]


@pytest.mark.parametrize('width', [1280, 390])
def test_in_a_browser(width, page, tmp_path):
    (tmp_path / 'probe.html').write_text(page.replace('</body>', PROBE), encoding='utf-8')
    seen, console = browse(tmp_path, width)
    assert console == []
    assert seen['width'] == width
    assert seen['scrollWidth'] <= width  # wide tables scroll in themselves
    assert seen['charts'] == len(CHARTS)
    assert seen['images'] == 12
    assert seen['objects'] == sorted(seen['objects'], reverse=True)


def test_the_browser_would_complain(page, tmp_path):
    broken = page.replace('</body>', '<img src="https://example.invalid/x.png"><script>nonsense()</script>' + PROBE)
    (tmp_path / 'probe.html').write_text(broken, encoding='utf-8')
    _, console = browse(tmp_path, 800)
    assert any('nonsense' in line for line in console)
    assert any('Content Security Policy' in line for line in console)
