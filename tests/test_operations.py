import jax
import jax.numpy as jnp
import pytest

from effdet_jax.runtime import xla
from experiments.benchmarks import operations
from experiments.benchmarks.operations import BACKBONE, DEPTHWISE, FUSION, LAYOUT, REST, SQUEEZE, STEM, Instruction


def test_a_compiled_programs_products_are_found_with_their_sizes():
    def product(rows, kernel):
        with jax.named_scope('backbone/blocks_1/expand_conv'):
            return jnp.tanh(rows) @ kernel

    shapes = (jax.ShapeDtypeStruct((400, 24), jnp.float32), jax.ShapeDtypeStruct((24, 40), jnp.float32))
    instructions = operations._instructions(xla.jit(product).lower(*shapes).compile().as_text())
    (name,) = (name for name, found in instructions.items() if found.operation == 'dot')
    assert instructions[name].shape == (400, 40) and operations._our_kind(instructions[name]) == BACKBONE
    assert operations._our_product(name, instructions) == (400, 32, 48)  # filled up to 16 channels


@pytest.mark.parametrize(
    ('path', 'kind'),
    [
        ('backbone/stem/conv/cond/branch_0_fun/concatenate', STEM),
        ('backbone/stem/conv/cond/branch_0_fun/dot_general', STEM),
        ('backbone/blocks_3/project_conv/dot_general', BACKBONE),
        ('class_net/predict/pw/dot_general', REST),
        ('resample_p6/conv/dot_general', REST),
        ('backbone/blocks_3/dw_conv/cond/branch_0_fun/jit(_pad)/pad', DEPTHWISE),
        ('backbone/blocks_3/dw_bn/jit(silu)/mul', DEPTHWISE),
        ('backbone/blocks_3/add', DEPTHWISE),
        ('fpn/cell_0/node_1/dw/cond/branch_0_fun/add', DEPTHWISE),
        ('fpn/cell_0/node_1/resample_0/jit(max_pool)/jit(_pad)/pad', FUSION),
        ('fpn/cell_0/node_1/div', FUSION),
        ('backbone/blocks_3/reduce_sum', SQUEEZE),
        ('backbone/blocks_3/se_reduce/dot_general', SQUEEZE),
        ('backbone/blocks_3/project_conv/mul', SQUEEZE),
        ('class_net/concatenate', LAYOUT),
    ],
)
def test_paths_of_ours_tell_the_kind(path, kind):
    assert operations._our_kind(Instruction('fusion', (), (), f'jit(f)/EfficientDet/{path}')) == kind


@pytest.mark.parametrize(
    ('operation', 'inputs', 'expected'),
    [
        ('Conv', [[1, 3, 512, 512], [32, 3, 3, 3]], (STEM, ())),
        ('Conv', [[1, 96, 8, 8], [96, 1, 3, 3]], (DEPTHWISE, ())),
        ('Conv', [[1, 96, 8, 8], [24, 96, 1, 1]], (BACKBONE, (64, 96, 32))),
        ('Conv', [[1, 64, 8, 8], [816, 64, 1, 1]], (REST, (64, 64, 816))),
        ('Conv', [[1, 96, 1, 1], [4, 96, 1, 1]], (SQUEEZE, ())),
        ('Mul', [[1, 96, 8, 8], [1, 96, 1, 1]], (SQUEEZE, ())),
        ('Mul', [[1, 64, 8, 8, 2], [2]], (FUSION, ())),
        ('QuickGelu', [[1, 96, 8, 8]], (DEPTHWISE, ())),
        ('ReorderOutput', [[1, 96, 8, 8]], (LAYOUT, ())),
    ],
)
def test_operations_of_onnx_runtime_tell_the_kind(operation, inputs, expected):
    outputs = [[1, inputs[-1][0], *inputs[0][2:]]]
    assert operations._onnx_kind(operation, inputs, outputs, width=64) == expected


def test_the_tables_have_every_kind_and_the_shared_products():
    product = (64, 16, 32)
    one = {'ms': 3.0, 'operations': [operations.Operation(BACKBONE, product, 1.0)] * 2}
    found = {(system, cores): one for system in ('ours', 'onnx') for cores in (1, 4)}
    text = operations.summary(found, 1)
    assert all(kind in text for kind in operations.KINDS) and 'the same on 4 cores' in text
    assert '64 x 16 x 32' in text and '2.00' in text
