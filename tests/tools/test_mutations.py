"""The list of mutations fits the package; `python tools/mutations.py` runs them."""

from mutations import read_mutations, stale


def test_every_mutation_can_be_applied_and_names_its_tests():
    assert not stale(read_mutations())
