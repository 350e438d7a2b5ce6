"""COCO's classes: detectors have 90 outputs, one for each category id from 1 to 90."""

# Ten ids have no objects in the data; they keep the names they have in Lin et al. 2014, Microsoft COCO, appendix.
_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, street sign,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, hat, backpack,
umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat,
baseball glove, skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon, bowl,
banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed,
mirror, dining table, window, desk, toilet, door, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven,
toaster, sink, refrigerator, blender, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"""
CLASS_NAMES = tuple(name.strip() for name in _NAMES.split(','))
CATEGORY_IDS = tuple(range(1, 91))

_WITHOUT_OBJECTS = """street sign, hat, shoe, eye glasses, plate, mirror, window, desk, door, blender"""
USED_NAMES = tuple(name for name in CLASS_NAMES if name not in _WITHOUT_OBJECTS.split(', '))  # 80
