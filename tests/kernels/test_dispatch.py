from effdet_jax.kernels.dispatch import runs_as


def test_the_kernel_takes_the_arguments_of_the_definition_by_position():
    @runs_as(lambda *arguments: arguments)
    def definition(a, b=2, *, c=3):
        """Adds."""
        return a + b + c

    assert definition(1) == (1, 2, 3)
    assert definition(b=5, a=4, c=6) == (4, 5, 6)
    assert (definition.__wrapped__(1), definition.__doc__) == (6, 'Adds.')
