"""Detections beside ground truth from a run: python -m experiments.picture WORKDIR OUT.png INDEX...

INDEX counts in the run's evaluation split.
"""

import sys
from pathlib import Path

from effdet_jax import config, data
from effdet_jax.evaluate import to_ground_truth_xyxy
from effdet_jax.inference import Detector
from effdet_jax.records import pictures


def main(workdir: str, out: str, *indices: str) -> None:
    dataset = config.load(Path(workdir)).dataset
    source = data.open_source(dataset.source, dataset.eval_split, dataset.class_names)
    detector = Detector.load(workdir)
    drawn = []
    for example in (source[int(index)] for index in indices):
        image = example.image if not isinstance(example.image, bytes) else data.decode(example.image, 'image')
        truth, found = to_ground_truth_xyxy(example.annotations), detector(image)
        drawn.append(
            pictures.detections_beside_truth(
                image, truth.boxes_xyxy, truth.labels, found.boxes_xyxy, found.labels, found.scores, source.class_names
            )
        )
    pictures.write_image(Path(out), pictures.grid(drawn, columns=2))


if __name__ == '__main__':
    main(*sys.argv[1:])
