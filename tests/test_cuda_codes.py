"""8-bit state in the CUDA kernels: the same bits as on the CPU, wherever the codes lie."""

from code_steps import SHAPES, over_cases, take_steps
from contract import same_values
from surroundings import MARGIN, Surrounded
from targets import over
from test_cuda import DEVICE
from training import at_offset

PLACES = {
    "aligned": lambda x, role: x.clone(),
    "alike": lambda x, role: at_offset(x, 1),
    "fours": lambda x, role: at_offset(x, 4),
    "each": lambda x, role: at_offset(x, (3 + role) % 9),
}


@over_cases
@over("place", PLACES)
def test_steps_are_those_of_the_cpu_backend(case, place):
    """The formulas are the same; so are the bits of all that a step writes."""
    true = take_steps("cpu", "cpu", case)
    found = take_steps("cuda", DEVICE, case, place)
    for ours, cpus in zip(found, true, strict=True):
        assert same_values(ours.cpu(), cpus)


@over_cases
def test_nothing_is_written_around_codes(case):
    surrounded = []

    def place(x, role):
        surrounded.append(Surrounded(x, MARGIN + len(surrounded) % 3, outside=77))
        return surrounded[-1].tensor

    take_steps("cuda", DEVICE, case, place)
    assert len(surrounded) > 4 * len(SHAPES)
    assert all(x.is_whole() for x in surrounded)
